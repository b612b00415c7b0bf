"""Building indexes: parallel equals serial, interrupted runs resume, and faults are reported without stopping."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from layerdecomp.data.folders import BackgroundFolder
from layerdecomp.data.index import Index, Item
from layerdecomp.data.prepare import prepare
from layerdecomp.errors import InputError, RunError


@dataclass(frozen=True)
class Numbers:
    """Text files that contain a width; every read appends a mark to a file next to it."""

    root: Path
    smallest: int = 0
    source: str = "numbers"
    kind: str = "backgrounds"
    licence: str = "CC0"

    def candidates(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("*.txt"))

    def read(self, candidate: str) -> Item | None:
        with (self.root / f"{candidate}.reads").open("a") as marks:
            marks.write("x")
        text = (self.root / candidate).read_text()
        if text == "stop":
            raise KeyboardInterrupt
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if not text.isdigit():
            raise InputError(f"{candidate} says {text!r}; expected a number")
        width = int(text)
        return Item(Path(candidate).stem, candidate, width, 2 * width) if width >= self.smallest else None


def reads(root: Path) -> dict[str, int]:
    return {path.name.split(".")[0]: len(path.read_text()) for path in sorted(root.glob("*.reads"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(str(10 * number + 1))
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_valid_items_are_indexed_and_faulty_ones_reported(
    folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "3.txt").write_text("three")
    out = folder / "out" / "index.safetensors"
    outcomes = prepare(Numbers(folder, smallest=20), out, workers)
    assert [outcome.candidate for outcome in outcomes] == [f"{number}.txt" for number in range(8)]
    assert [item.id for item in Index(out)] == ["2", "4", "5", "6", "7"]
    assert "; 2 left out, 1 faulty" in capsys.readouterr().out
    assert (folder / "out" / "index.faults.txt").read_text() == "3.txt says 'three'; expected a number\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["index.faults.txt", "index.safetensors"]


def test_an_interrupted_run_resumes_where_it_stopped(folder: Path) -> None:
    out, journal = folder / "index.safetensors", folder / ".index.safetensors.journal"
    for number in (5, 7):
        (folder / f"{number}.txt").write_text("stop")
        with pytest.raises(KeyboardInterrupt):
            prepare(Numbers(folder), out)
        assert not out.exists()
        journal.write_text(journal.read_text() + '{"candidate": "5.t')  # as after a power cut in the middle of a write
        (folder / f"{number}.txt").write_text(f"{number}1")
    (folder / "0.txt").unlink()
    prepare(Numbers(folder), out)
    assert reads(folder) == {str(number): 2 if number in (5, 7) else 1 for number in range(8)}
    assert [item.width for item in Index(out)] == [10 * number + 1 for number in range(1, 8)]
    assert not journal.exists()


def test_a_full_disk_does_not_damage_the_journal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "5.txt").write_text("stop")
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(folder), folder / "index.safetensors")
    before = (folder / ".index.safetensors.journal").read_text()

    def full_disk(path: Path, content: str | bytes) -> None:
        with path.open("w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="could not be written .*No space left.* free some space"):
        prepare(Numbers(folder), folder / "index.safetensors")
    assert (folder / ".index.safetensors.journal").read_text() == before


def test_every_outcome_is_in_the_journal_before_the_next_item_is_read(folder: Path) -> None:
    lines: list[int] = []

    class Watching(Numbers):
        def read(self, candidate: str) -> Item | None:
            lines.append(len((folder / ".index.safetensors.journal").read_text().splitlines()))
            return super().read(candidate)

    prepare(Watching(folder), folder / "index.safetensors")
    assert lines == list(range(1, 9))  # after the line with the settings


def test_a_killed_run_leaves_no_workers_and_can_resume(tmp_path: Path) -> None:
    Image.effect_noise((600, 600), 50).save(tmp_path / "0.png")
    for i in range(1, 200):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "0.png").read_bytes())
    tool = Path(__file__).resolve().parent.parent / "tools" / "prepare_data.py"
    out = tmp_path / "out" / "index.safetensors"
    command = [sys.executable, tool, "source=backgrounds", f"root={tmp_path}", f"out={out}", "workers=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        journal = out.with_name(f".{out.name}.journal")
        wait_until(lambda: journal.is_file() and len(journal.read_text().splitlines()) > 1)
        run.kill()
        assert run.stdout is not None
        run.stdout.read()  # returns once no process holds the pipe
    assert not out.exists()
    prepare(BackgroundFolder(tmp_path), out)
    assert len(Index(out)) == 200


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_other_settings_restart_from_the_beginning(folder: Path) -> None:
    (folder / "5.txt").write_text("stop")
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(folder), folder / "index.safetensors")
    (folder / "5.txt").write_text("51")
    prepare(Numbers(folder, smallest=40), folder / "index.safetensors")
    assert [item.id for item in Index(folder / "index.safetensors")] == ["4", "5", "6", "7"]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"candidate": "0.t\n',
        b"\xff\xfe\n",
        b"7\n",
        b'{"candidate": "0.txt", "fault": null}\n',
        b'{"candidate": "0.txt", "item": {"colour": "red"}, "fault": null}\n',
    ],
    ids=["JSON", "text", "object", "entry", "item"],
)
def test_a_damaged_journal_is_set_aside(folder: Path, damage: bytes) -> None:
    (folder / "5.txt").write_text("stop")
    out, journal = folder / "index.safetensors", folder / ".index.safetensors.journal"
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(folder), out)
    damaged = journal.read_bytes() + damage
    journal.write_bytes(damaged)
    (folder / "5.txt").write_text("51")
    prepare(Numbers(folder), out)
    assert len(Index(out)) == 8 and journal.with_suffix(".old").read_bytes() == damaged


def test_a_killed_worker_is_an_error_and_a_later_run_succeeds(folder: Path) -> None:
    (folder / "7.txt").write_text("die")
    with pytest.raises(RunError, match=r"one of 2 workers died, .* fewer workers="):
        prepare(Numbers(folder), folder / "index.safetensors", workers=2)
    (folder / "7.txt").write_text("71")
    prepare(Numbers(folder), folder / "index.safetensors", workers=2)
    assert len(Index(folder / "index.safetensors")) == 8


@pytest.mark.parametrize(
    ("share", "summary"),
    [
        (0.5, "8 items, 3 for training and 5 held out; 0 left out"),
        (1e-6, r"8 for training and 0 held out \(nothing to validate or evaluate on: .* a larger test_share=\); 0"),
        (1 - 1e-6, r"0 for training and 8 held out \(nothing to train on: .* a smaller test_share=\); 0"),
        (0.0, "8 for training and 0 held out; 0"),
    ],
)
def test_the_summary_gives_the_sizes_of_the_split(
    folder: Path, share: float, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(Numbers(folder), folder / "index.safetensors", test_share=share)
    assert re.search(summary, capsys.readouterr().out)


def test_repaired_faults_are_no_longer_listed(folder: Path) -> None:
    out = folder / "out" / "index.safetensors"
    (folder / "0.txt").write_text("?")
    prepare(Numbers(folder), out)
    assert out.with_suffix(".faults.txt").exists()
    (folder / "0.txt").write_text("7")
    prepare(Numbers(folder), out)
    assert not out.with_suffix(".faults.txt").exists() and len(Index(out)) == 8


def test_a_run_interrupted_before_its_first_item_resumes(folder: Path) -> None:
    for number in (0, 1):
        before = (folder / f"{number}.txt").read_text()
        (folder / f"{number}.txt").write_text("stop")
        with pytest.raises(KeyboardInterrupt):
            prepare(Numbers(folder), folder / "index.safetensors")
        (folder / f"{number}.txt").write_text(before)
    prepare(Numbers(folder), folder / "index.safetensors")
    assert len(Index(folder / "index.safetensors")) == 8


def test_faulty_items_are_read_again(folder: Path) -> None:
    for number in range(8):
        (folder / f"{number}.txt").write_text("?")
    with pytest.raises(InputError, match="none of 8 candidates can be used"):
        prepare(Numbers(folder), folder / "index.safetensors")
    (folder / "3.txt").write_text("5")
    prepare(Numbers(folder), folder / "index.safetensors")
    assert [item.width for item in Index(folder / "index.safetensors")] == [5]


def test_a_name_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    for name in (b"a.png", b"\xc4\xe3.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        os.replace(tmp_path / "a.png", os.fsencode(tmp_path) + b"/" + name)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    out = tmp_path / "index.safetensors"
    for _ in range(2):
        prepare(BackgroundFolder(tmp_path), out)
        assert [item.id for item in Index(out)] == ["a"]
        fault = r"'\udcc4\udce3.png' is not UTF-8; rename that file or folder"
        assert (tmp_path / "index.faults.txt").read_text() == f"{fault}\n"
    (folder := tmp_path / os.fsdecode(b"\xc4")).mkdir()
    with pytest.raises(InputError, match=r"udcc4' is not UTF-8; rename"):
        prepare(BackgroundFolder(folder), out)


def test_nothing_to_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing for source=numbers"):
        prepare(Numbers(tmp_path), tmp_path / "index.safetensors")
    (tmp_path / "0.txt").write_text("zero")
    with pytest.raises(InputError, match="none of 1 candidates can be used.*says 'zero'"):
        prepare(Numbers(tmp_path), tmp_path / "index.safetensors")
    assert not (tmp_path / "index.safetensors").exists()


def test_an_output_that_cannot_be_written_is_an_error(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        prepare(Numbers(folder), folder / "file" / "index.safetensors")


def test_the_journal_has_one_json_object_per_line(folder: Path) -> None:
    (folder / "2.txt").write_text("stop")
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(folder), folder / "index.safetensors")
    lines = (folder / ".index.safetensors.journal").read_text().splitlines()
    assert [json.loads(line).get("candidate") for line in lines] == [None, "0.txt", "1.txt"]
