"""Folders of pictures and of triplets: files found, files refused, and paths of the parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_picture
from PIL import Image

from layerdecomp.data.folders import (
    BackgroundFolder,
    RoremFolder,
    TripletFolder,
    list_pictures,
    orientation,
    part_names,
    part_path,
    read_rgba,
    upright_size,
)
from layerdecomp.data.index import Index, Item, Reader, write_index
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import open_picture

WIDTH, HEIGHT = 13, 9
Edit = Callable[[Path], Any]


def _pixels(channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def _cut_out() -> np.ndarray:
    rgba = _pixels(4)
    rgba[:2, :, 3], rgba[4, :, 3] = 0, 255
    return rgba


def _premultiplied() -> np.ndarray:
    rgba = _cut_out()
    return np.dstack([(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(np.uint8), rgba[..., 3]])


def _mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:6, 4:9] = 255
    return mask


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_pictures_are_found_at_any_depth(tmp_path: Path) -> None:
    names = ["b.JPG", "a.png", "deep/er/c.webp", "deep.er/1.5m.tiff"]
    others = [".hidden.png", ".cache/d.png", "e.partial.png", "f.png.part", "g.png.crdownload", "notes.txt", "png"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"never opened")
    (tmp_path / "elsewhere.png").mkdir()
    assert list_pictures(tmp_path) == sorted(names)
    assert list_pictures(tmp_path, frozenset({".webp"})) == ["deep/er/c.webp"]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    save_picture(_pixels(), tmp_path / "disk" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    assert BackgroundFolder(tmp_path / "data").candidates() == ["linked/a.png"]


def test_circular_links_list_nothing_twice(tmp_path: Path) -> None:
    for root, link, target in (("circle", "deep/up", "."), ("twice", "same", "deep")):
        save_picture(_pixels(), tmp_path / root / "deep" / "a.png")
        (tmp_path / root / link).symlink_to(tmp_path / root / target)
        assert list_pictures(tmp_path / root) == ["deep/a.png"]


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no pictures; expected files ending in .*png"):
        BackgroundFolder(tmp_path).candidates()
    with pytest.raises(InputError, match="none is not a folder"):
        BackgroundFolder(tmp_path / "none").candidates()


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tif", "bmp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_files_are_refused(tmp_path: Path, format: str) -> None:
    content = save_picture(np.tile(_pixels(), (4, 4, 1)), tmp_path / f"whole.{format}").read_bytes()
    path = tmp_path / f"a.{format}"
    for length in (0, 20, len(content) // 4, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"a\.{format} cannot be read as an image .*again"):
            open_picture(path)
    path.write_bytes(content)
    assert open_picture(path).size == (4 * WIDTH, 4 * HEIGHT)


@pytest.mark.parametrize("excess", [1.5, 3])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: float) -> None:
    path = save_picture(_pixels(), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT)
    assert open_picture(path).size == (WIDTH, HEIGHT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(WIDTH * HEIGHT / excess))
    with pytest.raises(InputError, match=r"a\.png (has 13 x 9 pixels; expected at most 78|cannot be read .*exceeds)"):
        open_picture(path)


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (3, 3), (6, 6), (8, 8), (0, 1), (77, 1)])
def test_exif_orientation_swaps_width_and_height(tmp_path: Path, value: int, expected: int) -> None:
    picture = open_picture(save_picture(_pixels(), tmp_path / "a.jpg", exif=_exif(value)))
    assert orientation(picture) == expected and picture.size == (WIDTH, HEIGHT)
    assert upright_size(picture) == ((HEIGHT, WIDTH) if expected > 4 else (WIDTH, HEIGHT))


def test_cut_outs_are_read_upright(tmp_path: Path) -> None:
    rgba = _cut_out()
    np.testing.assert_array_equal(read_rgba(save_picture(rgba, tmp_path / "a.png")), rgba)
    np.testing.assert_array_equal(read_rgba(save_picture(rgba, tmp_path / "b.png", exif=_exif(6))), np.rot90(rgba, -1))


def test_a_16_bit_grey_cut_out_is_refused(tmp_path: Path) -> None:
    deep = np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 500
    path = save_picture(deep, tmp_path / "a.png", transparency=500)
    with pytest.raises(InputError, match=r"a\.png is greyscale with more than 8 bits .*: save it as RGB or RGBA"):
        read_rgba(path)


def test_a_folder_of_backgrounds_becomes_an_index(tmp_path: Path) -> None:
    save_picture(_pixels(), tmp_path / "pictures" / "a.jpg")
    save_picture(_pixels(), tmp_path / "pictures" / "trip" / "a.png", exif=_exif(8))
    reader: Reader = BackgroundFolder(tmp_path / "pictures", source="bg20k", licence="MIT")
    items = [reader.read(candidate) for candidate in reader.candidates()]
    assert items == [Item("a", "a.jpg", WIDTH, HEIGHT), Item("trip/a", "trip/a.png", HEIGHT, WIDTH)]
    assert write_index(tmp_path / "i.safetensors", reader, [item for item in items if item]) == 2
    index = Index(tmp_path / "i.safetensors")
    assert list(index) == items and (index.source, index.kind, index.licence) == ("bg20k", "backgrounds", "MIT")


def test_names_that_differ_only_in_their_extension_are_refused(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/a.jpg", "a.png"):
        save_picture(_pixels(), tmp_path / name)
    with pytest.raises(InputError, match=r"x/a\.jpg and x/a\.png differ only in their extension; keep one"):
        BackgroundFolder(tmp_path).candidates()


def _triplet(root: Path, stem: str = "a") -> None:
    save_picture(_pixels(seed=1), root / "image" / f"{stem}.jpg")
    save_picture(_mask(), root / "mask" / f"{stem}.png")
    save_picture(_cut_out(), root / "foreground" / f"{stem}.webp", lossless=True, exact=True)
    save_picture(_pixels(seed=2), root / "background" / f"{stem}.PNG", format="png")


def _only(reader: Reader) -> Item:
    (candidate,) = reader.candidates()
    item = reader.read(candidate)
    assert item is not None
    return item


def test_triplets_are_found_with_any_extensions(tmp_path: Path) -> None:
    for stem in ("b", "deep/a", "{part} é 1.5"):
        _triplet(tmp_path, stem)
    reader = TripletFolder(tmp_path)
    items = {item.id: item for item in map(reader.read, reader.candidates())}
    assert sorted(items) == ["b", "deep/a", "{part} é 1.5"]
    for stem, item in items.items():
        assert (item.width, item.height) == (WIDTH, HEIGHT)
        assert part_names(item)["background"] == f"background/{stem}.PNG"
        np.testing.assert_array_equal(read_rgba(part_path(tmp_path, item, "foreground")), _cut_out())
        np.testing.assert_array_equal(np.asarray(open_picture(part_path(tmp_path, item, "mask"))), _mask())
    with pytest.raises(InputError, match=r"triplet b of .* has no depth; it has image, mask, foreground, background"):
        part_path(tmp_path, items["b"], "depth")


def test_triplets_survive_a_round_trip_through_an_index(tmp_path: Path) -> None:
    _triplet(tmp_path)
    reader = TripletFolder(tmp_path)
    item = _only(reader)
    write_index(tmp_path / "i.safetensors", reader, [item])
    assert Index(tmp_path / "i.safetensors")[0] == item


def _replaced(name: str, array: np.ndarray | None, **options: Any) -> Edit:
    def edit(root: Path) -> None:
        (old,) = (root / name).parent.glob("a.*")
        old.unlink()
        if array is not None:
            save_picture(array, root / name, **options)

    return edit


def _truncated(name: str) -> Edit:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-40])


SMALLER = np.s_[:-1]
FAULTS: list[tuple[Edit, str]] = [
    (_replaced("mask/b.png", None), r"image/a\.jpg, foreground/a\.webp, background/a\.PNG lacks its mask; .*in mask/"),
    (_replaced("image/b.png", None), r"mask/a\.png, .* lacks its image"),
    (_replaced("foreground/a.png", _pixels()), r"foreground/a\.png has no alpha channel \(its mode is RGB\)"),
    (_replaced("foreground/a.png", np.dstack([_pixels(), 0 * _mask()])), "transparent everywhere"),
    (_replaced("foreground/a.png", np.dstack([_pixels(), 0 * _mask() + 255])), "opaque everywhere"),
    (_replaced("foreground/a.png", _cut_out()[SMALLER]), r"foreground/a\.png is 13 x 8 pixels, .*image/a\.jpg 13 x 9"),
    (_replaced("foreground/a.png", _premultiplied()), r"foreground/a\.png looks premultiplied: .*divide the colours"),
    (_replaced("background/a.png", _pixels()[SMALLER]), r"background/a\.png is 13 x 8 pixels, .*of one size"),
    (_replaced("background/a.png", _pixels(), exif=_exif(6)), r"background/a\.png is 9 x 13 pixels"),
    (_replaced("mask/a.png", _mask()[SMALLER]), r"mask/a\.png: mask is 13 x 8 pixels, the image 13 x 9"),
    (_replaced("mask/a.png", 0 * _mask()), r"mask/a\.png: mask is empty"),
    (_replaced("mask/a.png", 0 * _mask() + 255), r"mask/a\.png: mask is full"),
    (_replaced("mask/a.png", _pixels()), r"mask/a\.png: mask is in colour"),
    (_truncated("image/a.jpg"), r"image/a\.jpg cannot be read"),
    (_truncated("mask/a.png"), r"mask/a\.png cannot be read"),
    (_truncated("foreground/a.webp"), r"foreground/a\.webp cannot be read"),
    (_truncated("background/a.PNG"), r"background/a\.PNG cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_faulty_triplet_is_an_error_and_others_remain_readable(tmp_path: Path, damage: Edit, message: str) -> None:
    _triplet(tmp_path)
    _triplet(tmp_path, "sound")
    reader = TripletFolder(tmp_path)
    assert len([reader.read(candidate) for candidate in reader.candidates()]) == 2
    damage(tmp_path)
    sound, broken = sorted(reader.candidates(), key=lambda candidate: "sound" not in candidate)
    assert reader.read(sound).id == "sound"
    with pytest.raises(InputError, match=message):
        reader.read(broken)


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    _triplet(tmp_path)
    save_picture(_mask(), tmp_path / "mask" / "a.bmp")
    with pytest.raises(InputError, match=r"mask: a\.bmp and a\.png differ only in their extension"):
        TripletFolder(tmp_path).candidates()


def _rorem(root: Path, records: Any, **parts: str) -> RoremFolder:
    names = {"source": "source/1.jpg", "mask": "mask/1.png", "GT": "GT/1.jpg"} | parts
    for name, array in zip(names.values(), (_pixels(), _mask(), _pixels(seed=1)), strict=True):
        save_picture(array, root / name)
    (root / "meta.json").write_text(json.dumps([names] if records is None else records))
    return RoremFolder(root)


@pytest.mark.parametrize(
    ("parts", "id"), [({}, "1"), ({"mask": "mask/1_b.png"}, "1+1_b"), ({"source": "./source/x/2.jpg"}, "x/2+1")]
)
def test_a_rorem_record_becomes_an_item(tmp_path: Path, parts: dict[str, str], id: str) -> None:
    reader = _rorem(tmp_path, None, **parts)
    item = _only(reader)
    assert (item.id, item.width, item.height, reader.source) == (id, WIDTH, HEIGHT, "rorem")
    assert list(part_names(item)) == ["image", "mask", "background"]
    assert part_path(tmp_path, item, "background") == tmp_path / "GT" / "1.jpg"
    assert part_path(tmp_path, item, "image") == tmp_path / parts.get("source", "source/1.jpg")
    with pytest.raises(InputError, match="has no foreground; it has image, mask, background"):
        part_path(tmp_path, item, "foreground")


def test_rorem_records_may_share_files_but_not_all(tmp_path: Path) -> None:
    records = [{"source": "source/1.jpg", "mask": f"mask/{name}.png", "GT": "GT/1.jpg"} for name in "12"]
    save_picture(_mask(), tmp_path / "mask" / "2.png")
    reader = _rorem(tmp_path, records)
    assert [reader.read(candidate).id for candidate in reader.candidates()] == ["1", "1+2"]
    (tmp_path / "meta.json").write_text(json.dumps(records + records[:1]))
    with pytest.raises(InputError, match="meta.json: 2 of its records are"):
        reader.candidates()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "meta.json holds no records"),
        ([], "meta.json holds no records"),
        ([{"source": "a", "mask": "b"}], "record 0 is .*; expected the paths source, mask and GT"),
        ([["a", "b", "c"]], "record 0 is"),
        ([{"source": "/etc/a.png", "mask": "b", "GT": "c"}], "record 0 names /etc/a.png; expected a path below"),
        ([{"source": "a", "mask": "b", "GT": "../c.png"}], r"record 0 names \.\./c\.png"),
    ],
)
def test_malformed_rorem_records_are_refused(tmp_path: Path, records: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _rorem(tmp_path, records).candidates()


def test_missing_or_unreadable_rorem_files_are_named(tmp_path: Path) -> None:
    reader = _rorem(tmp_path, None)
    (tmp_path / "GT" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"GT/1\.jpg does not exist; expected an image file"):
        _only(reader)
    (tmp_path / "meta.json").write_text("[{")
    with pytest.raises(InputError, match=r"meta\.json cannot be read .*expected RORem's list"):
        reader.candidates()
    (tmp_path / "meta.json").unlink()
    with pytest.raises(InputError, match=r"meta\.json cannot be read .*No such file"):
        reader.candidates()
