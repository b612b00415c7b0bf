"""Folders of pictures: finding and opening files for all readers, plain backgrounds, and triplets in two layouts."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from layerdecomp.data.alpha import check_straight
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import Pixels, open_picture, read_mask, to_srgb

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
UNFINISHED = frozenset({".part", ".partial", ".tmp"})  # such as "a.partial.png", which is still being written
LICENCE = "not stated"


def list_pictures(folder: Path, extensions: frozenset[str] = PICTURES) -> list[str]:
    """The pictures in a folder and its subfolders, sorted, with forward slashes; skips hidden and unfinished files."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a folder of pictures ({' '.join(sorted(extensions))})")
    found = []
    for subfolder, names in _folders_below(folder):
        inside = subfolder.relative_to(folder)
        found += [(inside / name).as_posix() for name in names if _is_picture(name, extensions)]
    if not found:
        raise InputError(f"{folder} holds no pictures; expected files ending in {' '.join(sorted(extensions))}")
    return sorted(found)


def _folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and its subfolders with the names of their files, each once: links are followed, cycles are not."""
    seen = set()
    for path, below, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(path)
        if (identity := (status.st_dev, status.st_ino)) in seen:
            below.clear()
            continue
        seen.add(identity)
        below[:] = sorted(name for name in below if not name.startswith("."))  # same order on every file system
        yield Path(path), names


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}); change its permissions") from error


def _is_picture(name: str, extensions: frozenset[str]) -> bool:
    path = Path(name.lower())
    return path.suffix in extensions and UNFINISHED.isdisjoint(path.suffixes) and not name.startswith(".")


def by_stem(folder: Path, extensions: frozenset[str] = PICTURES) -> dict[str, str]:
    """Path without extension -> path, for the pictures below a folder; `InputError` if two share a stem."""
    names: dict[str, str] = {}
    for name in list_pictures(folder, extensions):
        stem = name.rpartition(".")[0]
        if stem in names:
            raise InputError(f"{folder}: {names[stem]} and {name} differ only in their extension; keep one")
        names[stem] = name
    return names


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if it is missing or invalid."""
    value = picture.getexif().get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation is applied, as by `read_image`."""
    return picture.size if orientation(picture) < 5 else (picture.height, picture.width)


def to_rgba(picture: Image.Image, path: Path) -> Image.Image:
    """An opened layer as RGBA in sRGB; `InputError` for 16-bit greyscale, which the conversion would clip."""
    if picture.mode.startswith("I") or picture.mode == "F":
        raise InputError(
            f"{path} is greyscale with more than 8 bits (its mode is {picture.mode}); expected a layer with 8 bits "
            "per channel: save it as RGB or RGBA"
        )
    return to_srgb(picture).convert("RGBA")


def read_rgba(path: Path) -> Pixels:
    """A foreground as (H, W, 4) uint8 in sRGB, EXIF orientation applied.

    Raises:
        InputError: as for `open_picture`; or there is no alpha channel, or it is 0 everywhere or 255 everywhere.
    """
    picture = open_picture(path, upright=True)
    if not picture.has_transparency_data:
        raise InputError(f"{path} has no alpha channel (its mode is {picture.mode}); expected a cut-out RGBA picture")
    rgba = np.asarray(to_rgba(picture, path))
    if not rgba[..., 3].any():
        raise InputError(f"{path} is transparent everywhere; expected an object whose alpha is above 0")
    if rgba[..., 3].min() == 255:
        raise InputError(f"{path} is opaque everywhere; expected alpha 0 around the object: cut it out")
    return rgba


def read_straight(path: Path) -> Pixels:
    """`read_rgba` for data to train on: `InputError` also if the colours look premultiplied."""
    rgba = read_rgba(path)
    check_straight(rgba, path)
    return rgba


@dataclass(frozen=True)
class BackgroundFolder:
    """Pictures in a folder and its subfolders, each one a background."""

    root: Path
    source: str = "backgrounds"
    licence: str = LICENCE
    kind: ClassVar[str] = "backgrounds"

    def candidates(self) -> list[str]:
        return sorted(by_stem(self.root).values())

    def read(self, candidate: str) -> Item:
        width, height = upright_size(open_picture(self.root / candidate))
        return Item(candidate.rpartition(".")[0], candidate, width, height)


# Triplets. The path of an item is a JSON object, part -> file: the parts of a triplet may differ in extension (in
# RORem also in name), and the foreground may be missing:
# {"image": "image/a.jpg", "mask": "mask/a.png", "foreground": "foreground/a.png", "background": "background/a.jpg"}
PARTS = ("image", "mask", "foreground", "background")


def part_names(item: Item) -> dict[str, str]:
    """Part -> file of a triplet, relative to its root, in the order of `PARTS`; the foreground may be missing."""
    names: dict[str, str] = json.loads(item.path)
    return names


def part_path(root: Path, item: Item, part: str) -> Path:
    """The path of a triplet's part; `InputError` if the triplet lacks it."""
    names = part_names(item)
    if part not in names:
        raise InputError(f"the triplet {item.id} of {root} has no {part}; it has {', '.join(names)}")
    return root / names[part]


@dataclass(frozen=True)
class TripletFolder:
    """Four folders, image, mask, foreground and background, in which the parts of a triplet share one stem."""

    root: Path
    source: str = "triplets"
    licence: str = LICENCE
    kind: ClassVar[str] = "triplets"

    def candidates(self) -> list[str]:
        """The paths of all triplets, including incomplete ones, for which `read` raises."""
        folders = {part: by_stem(self.root / part) for part in PARTS}
        stems = sorted(set().union(*folders.values()))
        triplets = [{part: names[stem] for part, names in folders.items() if stem in names} for stem in stems]
        return [_joined({part: f"{part}/{name}" for part, name in triplet.items()}) for triplet in triplets]

    def read(self, candidate: str) -> Item:
        names: dict[str, str] = json.loads(candidate)
        for part in PARTS:
            if part not in names:
                found = ", ".join(names.values())
                raise InputError(f"{self.root}: {found} lacks its {part}; expected a file of that stem in {part}/")
        return Item(triplet_id(names), candidate, *_checked_size(self.root, names))


@dataclass(frozen=True)
class RoremFolder:
    """The layout of RORem's downloads: `meta.json` is a list of records {"source": ..., "mask": ..., "GT": ...}.

    Paths are relative to the folder of `meta.json`. The source is our image, the GT our background; there is no
    foreground. Records may share files. An item's id is as in `triplet_id`.
    """

    root: Path
    licence: str = "CC BY-NC-SA 4.0"  # of RORem's copy of MULAN
    source: ClassVar[str] = "rorem"
    kind: ClassVar[str] = "triplets"

    def candidates(self) -> list[str]:
        path = self.root / "meta.json"
        try:
            records = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); expected RORem's list of records") from error
        if not isinstance(records, list) or not records:
            raise InputError(f"{path} holds no records; expected a list of {{source, mask, GT}}")
        triplets = Counter(_joined(_named(path, position, record)) for position, record in enumerate(records))
        candidate, count = triplets.most_common(1)[0]
        if count > 1:
            raise InputError(f"{path}: {count} of its records are {candidate}; keep one")
        return sorted(triplets)

    def read(self, candidate: str) -> Item:
        names: dict[str, str] = json.loads(candidate)
        return Item(triplet_id(names), candidate, *_checked_size(self.root, names))


def triplet_id(names: dict[str, str]) -> str:
    """The common stem of a triplet's files, or their distinct stems joined by "+"."""
    return "+".join(dict.fromkeys(_stem(name) for name in names.values()))


def _joined(names: dict[str, str]) -> str:
    return json.dumps(names, ensure_ascii=False)


def _stem(name: str) -> str:
    """ "image/a/b.png" -> "a/b"."""
    return name.rpartition(".")[0].partition("/")[2]


def _named(path: Path, position: int, record: Any) -> dict[str, str]:
    """Part -> file of a RORem record."""
    keys = {"image": "source", "mask": "mask", "background": "GT"}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys.values()):
        raise InputError(f"{path}: record {position} is {record!r}; expected the paths source, mask and GT")
    names = {part: PurePosixPath(record[key]) for part, key in keys.items()}
    for name in names.values():
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path}: record {position} names {name}; expected a path below {path.parent}")
    return {part: str(name) for part, name in names.items()}


def _checked_size(root: Path, names: dict[str, str]) -> tuple[int, int]:
    """Opens all parts of a triplet, checks that their sizes agree, and returns width and height."""
    paths = {part: root / name for part, name in names.items()}
    size = upright_size(open_picture(paths["image"]))
    sizes = {"background": upright_size(open_picture(paths["background"]))}
    if "foreground" in paths:
        height, width = read_straight(paths["foreground"]).shape[:2]
        sizes["foreground"] = (width, height)
    for part, found in sizes.items():
        if found != size:
            raise InputError(
                f"{paths[part]} is {found[0]} x {found[1]} pixels, {paths['image']} {size[0]} x {size[1]}; "
                "expected parts of one size"
            )
    open_mask(paths["mask"], size)
    return size


def open_mask(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """A mask as (H, W) bool, True on the object; raises the errors of `open_picture` and `read_mask`, naming the file.

    Args:
        size: required (width, height).
    """
    picture = open_picture(path)
    try:
        return read_mask(picture, size and size[::-1])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
