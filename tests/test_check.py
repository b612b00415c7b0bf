"""Checking indexes: every kind of fault is found and named, and sound data sets have none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerdecomp.data.check import check_indexes
from layerdecomp.data.folders import BackgroundFolder, RoremFolder, TripletFolder
from layerdecomp.data.index import Index, Item, Reader, write_index
from layerdecomp.data.layerdiffuse import ForegroundFolder
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.data.prepare import prepare


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def cut_out(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Opaque in the middle, half transparent around it, transparent at the border."""
    result = picture(seed, size).convert("RGBA")
    alpha = np.zeros(size[::-1], np.uint8)
    alpha[5:-5, 5:-5], alpha[8:-8, 8:-8] = 100, 255
    result.putalpha(Image.fromarray(alpha))
    return result


def backgrounds(root: Path) -> Reader:
    for i in range(6):
        picture(i).save(root / f"{i}.png")
    return BackgroundFolder(root)


def foregrounds(root: Path) -> Reader:
    for i in range(6):
        cut_out(i).save(root / f"{i}.png")
    return ForegroundFolder(root, min_side=8)


def layered(root: Path) -> Reader:
    for i in range(6):
        picture(i).convert("RGBA").save(root / f"{i}-layer_0.png")
        cut_out(100 + i).save(root / f"{i}-layer_1.png")
    return MulanLayers(root)


def triplets(root: Path) -> Reader:
    for part in ("image", "mask", "foreground", "background"):
        (root / part).mkdir()
    for i in range(6):
        background, foreground = picture(i).convert("RGBA"), cut_out(100 + i)
        background.convert("RGB").save(root / "background" / f"{i}.png")
        foreground.save(root / "foreground" / f"{i}.png")
        Image.alpha_composite(background, foreground).convert("RGB").save(root / "image" / f"{i}.png")
        foreground.getchannel("A").point(lambda value: 255 * (value > 127)).save(root / "mask" / f"{i}.png")
    return TripletFolder(root)


def indexed(make: Callable[[Path], Reader], root: Path) -> Path:
    data = root / "data"
    data.mkdir()
    prepare(make(data), root / "index.safetensors", test_share=0.3)
    return root / "index.safetensors"


@pytest.mark.parametrize("make", [backgrounds, foregrounds, layered, triplets])
@pytest.mark.parametrize("workers", [1, 2])
def test_sound_data_sets_have_no_faults(
    make: Callable[[Path], Reader], workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = indexed(make, tmp_path)
    assert check_indexes([path], workers) == []
    printed = capsys.readouterr().out
    assert "6 items of" in printed and "width 40 to 40" in printed and "no faults" in printed
    with Image.open(tmp_path / "index.contact.jpg") as sheet:
        assert sheet.size == (960, 640) and np.asarray(sheet).std() > 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def premultiply(path: Path) -> None:
    with Image.open(path) as file:
        rgba = np.asarray(file).astype(int)
    rgba[..., :3] = rgba[..., :3] * rgba[..., 3:] // 255
    Image.fromarray(rgba.astype(np.uint8)).save(path)


def invert(path: Path) -> None:
    with Image.open(path) as file:
        inverted = file.point(lambda value: 255 - value)
    inverted.save(path)


def pierce(path: Path) -> None:
    """Makes one corner transparent."""
    with Image.open(path) as file:
        rgba = np.asarray(file.convert("RGBA")).copy()
    rgba[:3, :3, 3] = 0
    Image.fromarray(rgba).save(path)


def transparent(seed: int) -> Image.Image:
    """A fully transparent image."""
    result = picture(seed).convert("RGBA")
    result.putalpha(0)
    return result


def deepen(path: Path) -> None:
    """Converts to 16-bit grey."""
    with Image.open(path) as file:
        Image.fromarray(np.asarray(file.convert("L")) * np.uint16(257)).save(path)


FAULTS: list[tuple[Callable[[Path], Reader], str, Callable[[Path], object], str]] = [
    (backgrounds, "3.png", truncate, "cannot be read"),
    (backgrounds, "3.png", Path.unlink, "does not exist"),
    (backgrounds, "3.png", lambda path: picture(3, (41, 30)).save(path), "41 x 30 pixels, 40 x 30 when it was indexed"),
    (foregrounds, "3.png", premultiply, "looks premultiplied"),
    (foregrounds, "3.png", lambda path: picture(3).save(path), "no alpha channel"),
    (foregrounds, "3.png", lambda path: picture(3).convert("RGBA").save(path), "opaque everywhere"),
    (layered, "3-layer_0.png", pierce, "expected an opaque background"),
    (layered, "3-layer_0.png", deepen, "greyscale with more than 8 bits"),
    (layered, "3-layer_1.png", truncate, "cannot be read"),
    (layered, "3-layer_1.png", premultiply, "looks premultiplied"),
    (triplets, "foreground/3.png", premultiply, "looks premultiplied"),
    (triplets, "mask/3.png", invert, "looks inverted"),
    (triplets, "foreground/3.png", lambda path: cut_out(3, (41, 30)).save(path), "41 x 30 pixels"),
    (triplets, "mask/3.png", lambda path: Image.new("L", (40, 30), 255).save(path), "it marks every pixel"),
    (triplets, "mask/3.png", lambda path: picture(3).save(path), "in colour"),
    (triplets, "depth/3.png", lambda path: path.write_bytes(b"no picture"), "cannot be read"),
    (layered, "depth/3.png", lambda path: picture(3, (41, 30)).save(path), "its picture 40 x 30; expected equal sizes"),
    (layered, "3-layer_1.png", lambda path: transparent(3).save(path), "transparent everywhere"),
    (foregrounds, "3.png", lambda path: transparent(3).save(path), "transparent everywhere"),
]


@pytest.mark.parametrize(("make", "name", "damage", "message"), FAULTS)
def test_a_fault_is_found_and_named(
    make: Callable[[Path], Reader], name: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = indexed(make, tmp_path)
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    damage(tmp_path / "data" / name)
    (fault,) = check_indexes([path])
    assert message in fault and name in fault


def test_duplicate_content_is_found_within_and_across_splits(tmp_path: Path) -> None:
    path = indexed(backgrounds, tmp_path)
    index = Index(path)
    train, test = (index.rows(split).tolist() for split in ("train", "test"))
    first, second, held_out = (index[row].id for row in (*train[:2], test[0]))
    (tmp_path / "data" / f"{second}.png").write_bytes((tmp_path / "data" / f"{first}.png").read_bytes())
    (fault,) = check_indexes([path])
    assert f"{second} has the same content as" in fault and "leak" not in fault
    (tmp_path / "data" / f"{held_out}.png").write_bytes((tmp_path / "data" / f"{first}.png").read_bytes())
    assert sum("a leak between the splits" in fault for fault in check_indexes([path])) == 1


def test_a_shared_background_layer_is_not_called_the_same_content(tmp_path: Path) -> None:
    path, data = indexed(layered, tmp_path), tmp_path / "data"
    index = Index(path)
    train, test = (index.rows(split).tolist() for split in ("train", "test"))
    first, second, held_out = (index[row].id for row in (*train[:2], test[0]))
    for id, leak in ((second, False), (held_out, True)):
        (data / f"{id}-layer_0.png").write_bytes((data / f"{first}-layer_0.png").read_bytes())
        fault = next(fault for fault in check_indexes([path]) if ("a leak between the splits" in fault) == leak)
        assert f"{id}" in fault and "has the same background layer as" in fault
        assert fault.endswith("keep one, or both in one split if their objects differ")


def test_contents_are_compared_across_indexes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [indexed(backgrounds, tmp_path / name) for name in ("a", "b")]
    assert check_indexes(paths[:1]) == []
    assert len(check_indexes(paths)) == 6


def test_an_id_in_both_splits_of_a_source_is_a_leak(tmp_path: Path) -> None:
    """A re-encoded image has different content, but is the same image."""
    paths = []
    for name, share in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "0.jpg", quality=95 - len(paths))
        reader = BackgroundFolder(tmp_path / name, source="other" if name == "c" else "backgrounds")
        paths.append(tmp_path / f"{name}.safetensors")
        prepare(reader, paths[-1], test_share=share)
    (fault,) = check_indexes(paths)
    assert "b.safetensors: 0 (test) has the same id as a.safetensors: 0 (train): a leak between the splits" in fault


def test_a_background_that_its_index_rotates_has_no_fault(tmp_path: Path) -> None:
    picture(0).resize((40, 30)).save(tmp_path / "a.png")
    item = Item("a", "a.png", width=30, height=40, rotation=90)
    write_index(tmp_path / "index.safetensors", BackgroundFolder(tmp_path), [item])
    assert check_indexes([tmp_path / "index.safetensors"]) == []


def test_cue_maps_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = indexed(triplets, tmp_path)
    for cue, count in (("depth", 4), ("edge", 1)):
        (tmp_path / "data" / cue).mkdir()
        for i in range(count):
            picture(i).save(tmp_path / "data" / cue / f"{i}.png")
    assert check_indexes([path]) == []
    assert "cue maps: 1 edge, 0 segmentation, 4 depth" in capsys.readouterr().out


def test_a_mask_without_a_foreground_is_checked_against_the_removed_pixels(tmp_path: Path) -> None:
    for part in ("source", "mask", "GT"):
        (tmp_path / part).mkdir()
    background = picture(0)
    image, mask = background.copy(), Image.new("L", background.size)
    for target, colour in ((image, (250, 20, 20)), (mask, 255)):
        target.paste(colour, (10, 10, 25, 20))
    background.save(tmp_path / "GT/a.png")
    image.save(tmp_path / "source/a.png")
    mask.save(tmp_path / "mask/a.png")
    (tmp_path / "meta.json").write_text('[{"source": "source/a.png", "mask": "mask/a.png", "GT": "GT/a.png"}]')
    prepare(RoremFolder(tmp_path), tmp_path / "index.safetensors")
    assert check_indexes([tmp_path / "index.safetensors"]) == []
    invert(tmp_path / "mask/a.png")
    assert "looks inverted" in check_indexes([tmp_path / "index.safetensors"])[0]
