"""Files and folders that appear complete or not at all."""

import os
from pathlib import Path

import pytest

from layerdecomp.errors import InputError
from layerdecomp.files import atomic_path, atomic_write, keep_settings


def test_a_file_appears_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.png"
    with atomic_path(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".png" and partial.name.startswith(".b.")
        partial.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]
    atomic_write(path, "zü")
    assert path.read_bytes() == "zü".encode()


def test_a_folder_is_written_like_a_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "b").write_text("c")
    assert (tmp_path / "a" / "b").read_text() == "c" and len(list(tmp_path.iterdir())) == 1


def test_a_file_or_folder_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(
            InputError, match="could not be written .*; rename the file that is where a folder is needed"
        ):
            atomic_write(path, "")
    with pytest.raises(InputError, match="could not be written .*; rename the folder of that name or choose another"):
        atomic_write(tmp_path / "folder", "")


def test_concurrent_writers_of_one_file_do_not_interfere(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        atomic_write(tmp_path / "a", "second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failed_write_keeps_the_previous_file(tmp_path: Path, error: BaseException) -> None:
    atomic_write(tmp_path / "a", "old")
    kind = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as raised, atomic_path(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "b").write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
    if isinstance(error, OSError):
        assert f"{tmp_path / 'a'} could not be written" in str(raised.value) and "free some space" in str(raised.value)


def test_files_made_with_unknown_settings_are_not_mixed_with_others(tmp_path: Path) -> None:
    keep_settings(tmp_path / "settings.json", {"seed": 1})
    keep_settings(tmp_path / "settings.json", {"seed": 1})
    with pytest.raises(InputError, match="made with steps=unknown, now it is 4"):
        keep_settings(tmp_path / "settings.json", {"seed": 1, "steps": 4})
