"""Folders of images: layers equal those of single images, and bad images and interruptions lose no others."""

import json
import os
import shutil
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from layerdecomp.bulk import SETTINGS, decompose_folder, pair_up
from layerdecomp.decomposer import SHA256_BY_SOURCE, Decomposer
from layerdecomp.errors import InputError, RunError
from layerdecomp.imaging.layers import FORMATS, Layers

SIZES = {"a": (40, 56), "b": (24, 30), "c": (39, 50), "deep/d": (40, 56), "e": (33, 60)}  # all but b padded to 48 x 64
ADAPTER = {"adapter": "a sum"}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of five images and their masks, and the output folder."""
    rng = np.random.default_rng(0)
    images, masks = tmp_path / "images", tmp_path / "masks"
    for stem, (height, width) in SIZES.items():
        for folder in (images, masks):
            (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{stem}.jpg")
        mask = np.zeros((height, width), np.uint8)
        mask[8:20, 8:24] = 255
        Image.fromarray(mask).save(masks / f"{stem}.png")
    return images, masks, tmp_path / "out"


@pytest.fixture
def drawn(tiny_decomposer: Decomposer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the number of images in each batch that is drawn."""
    counts: list[int] = []
    draw = Decomposer.draw

    def recorded(self: Decomposer, batch: dict[str, torch.Tensor], *args: object) -> object:
        counts.append(len(batch["image"]))
        return draw(self, batch, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decomposer, "draw", recorded)
    monkeypatch.setattr(tiny_decomposer.sample, "steps", 2)
    return counts


def test_an_image_gives_the_same_layers_alone_and_in_a_batch(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int]
) -> None:
    pairs = pair_up(*folders)
    assert [pair.stem for pair in pairs] == list(SIZES)
    assert decompose_folder(tiny_decomposer, pairs, folders[2], ADAPTER, seed=3, batch_size=3) == []
    assert drawn == [1, 2, 2]  # b, a and c, d and e: no batch extends into the next chunk
    for pair in pairs:
        alone = tiny_decomposer.decompose(pair.image, pair.mask, seed=3)
        for name in ("background", "foreground"):
            found = np.asarray(Image.open(folders[2] / pair.stem / f"{name}.png"))
            difference = np.abs(found.astype(int) - getattr(alone, name))
            assert difference.max() <= 1 and difference.mean() < 0.01, (pair.stem, name)


def test_an_interrupted_run_resumes_and_other_settings_are_rejected(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, out, save = pair_up(*folders), folders[2], Layers.save

    def full(self: Layers, folder: Path, formats: object) -> Path:
        if folder in (out / "c", out / "deep" / "d"):
            raise InputError(f"{folder} could not be written")
        return save(self, folder, formats)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "save", full)
        with pytest.raises(InputError, match="c could not be written"):
            decompose_folder(tiny_decomposer, pairs, out, ADAPTER, batch_size=2)
    assert drawn == [1, 1, 2, 1] and not (out / "c").exists() and not (out / "e").exists()
    drawn.clear()
    assert decompose_folder(tiny_decomposer, pairs, out, ADAPTER, batch_size=2) == []
    assert drawn == [2, 1]
    decompose_folder(tiny_decomposer, pairs, out, ADAPTER)
    assert drawn == [2, 1]
    later = (out / "a" / "background.png").stat().st_mtime + 10
    os.utime(pairs[0].mask, (later, later))  # the mask was edited
    os.utime(pairs[1].image, (later, later))  # and another image
    decompose_folder(tiny_decomposer, pairs, out, ADAPTER)
    assert drawn == [2, 1, 1, 1]
    with pytest.raises(InputError, match=r"settings\.json: existing files were made with seed=0, now it is 1"):
        decompose_folder(tiny_decomposer, pairs, out, ADAPTER, seed=1)
    with pytest.raises(InputError, match="made with adapter=a sum, now it is another"):
        decompose_folder(tiny_decomposer, pairs, out, {"adapter": "another"})
    with monkeypatch.context() as patch:
        patch.setitem(SHA256_BY_SOURCE, "layerdecomp/sampling.py", "of a changed file")
        with pytest.raises(InputError, match=r"made with layerdecomp/sampling\.py=[0-9a-f]{64}, now it is of a"):
            decompose_folder(tiny_decomposer, pairs, out, ADAPTER)
    assert json.loads((out / SETTINGS).read_text())["steps"] == 2
    for pair in pairs:
        shutil.rmtree((out / pair.stem), ignore_errors=True)
    decompose_folder(tiny_decomposer, pairs[:1], out, ADAPTER, seed=1)  # no layers made with seed 0 are left
    assert json.loads((out / SETTINGS).read_text())["seed"] == 1


def test_layers_of_other_pairs_keep_the_settings(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int]
) -> None:
    pairs, out = pair_up(*folders), folders[2]
    decompose_folder(tiny_decomposer, pairs[3:4], out, ADAPTER, seed=0)  # deep/d
    with pytest.raises(InputError, match=r"existing files were made with seed=0, now it is 1"):
        decompose_folder(tiny_decomposer, pairs[:1], out, ADAPTER, seed=1)
    assert decompose_folder(tiny_decomposer, pairs[:1], out, ADAPTER, seed=0) == [] and drawn == [1, 1]


def test_files_are_written_while_the_next_image_is_drawn(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    second, draw, save = Event(), Decomposer.draw, Layers.save

    def interrupted(self: Decomposer, *args: object) -> object:
        if len(drawn) == 1:
            second.set()
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, *args)  # type: ignore[arg-type]

    def late(self: Layers, folder: Path, formats: object) -> Path:
        assert second.wait(10), "the second image is drawn after the first is written"
        return save(self, folder, formats)  # type: ignore[arg-type]

    monkeypatch.setattr(Decomposer, "draw", interrupted)
    monkeypatch.setattr(Layers, "save", late)
    with pytest.raises(KeyboardInterrupt):
        decompose_folder(tiny_decomposer, pair_up(*folders), folders[2], ADAPTER)
    written = {path.relative_to(folders[2]).as_posix() for path in folders[2].rglob("*.*")}
    assert written == {SETTINGS, *(f"{stem}/{name}" for stem in "ab" for name in FORMATS["png"])}


def test_a_full_disk_is_reported_for_the_last_image_too(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Layers, folder: Path, formats: object) -> Path:
        raise InputError(f"{folder} could not be written")

    monkeypatch.setattr(Layers, "save", full)
    with pytest.raises(InputError, match="a could not be written"):
        decompose_folder(tiny_decomposer, pair_up(*folders)[:1], folders[2], ADAPTER)


def test_bad_images_are_skipped_and_the_others_decomposed(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], drawn: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    images, masks, out = folders
    (images / "a.jpg").write_bytes(b"no picture")
    Image.new("L", (50, 39), 0).save(masks / "c.png")
    assert sorted(decompose_folder(tiny_decomposer, pair_up(*folders), out, ADAPTER, batch_size=8)) == ["a", "c"]
    assert drawn == [1, 2]
    assert "a is skipped: " in caplog.text and "a.jpg cannot be read as an image" in caplog.text
    assert "c is skipped: " in caplog.text and "c.png is empty" in caplog.text
    split = {path.parent.relative_to(out).as_posix() for path in out.rglob("preview.png")}
    assert split == {"b", "deep/d", "e"}


def test_a_batch_that_does_not_fit_into_memory_suggests_a_smaller_one(
    tiny_decomposer: Decomposer, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Decomposer, "draw", full)
    with pytest.raises(RunError, match=r"1 images of 32 x 32 pixels do not fit .* smaller batch_size="):
        decompose_folder(tiny_decomposer, pair_up(*folders), folders[2], ADAPTER, batch_size=5)


def test_images_and_masks_without_a_partner_are_reported(folders: tuple[Path, Path, Path]) -> None:
    images, masks, out = folders
    for stem in ("a", "c", "deep/d"):
        (masks / f"{stem}.png").unlink()
    (images / "e.jpg").unlink()
    with pytest.raises(InputError) as error:
        pair_up(images, masks, out)
    message = f"3 of {images} have no mask in {masks} (a.jpg, c.jpg, deep/d.jpg) and 1 of {masks} have no image in "
    assert str(error.value).startswith(f"{message}{images} (e.png); ")
    assert not out.exists()


def test_invalid_folders_are_rejected(folders: tuple[Path, Path, Path]) -> None:
    images, masks, out = folders
    with pytest.raises(InputError, match=r"image=.*a\.jpg is not a folder, but .*masks is; expected two folders"):
        pair_up(images / "a.jpg", masks, out)
    with pytest.raises(InputError, match=r"mask=.*a\.png is not a folder"):
        pair_up(images, masks / "a.png", out)
    with pytest.raises(InputError, match=r"out=.*layers lies in image=.*images, whose images are read"):
        pair_up(images, masks, images / "layers")
    (images / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png differ only in their extension"):
        pair_up(images, masks, out)
