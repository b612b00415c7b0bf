"""Checks indexed data: reads every file again, and looks for faults that show only across files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from layerdecomp.data.folders import (
    PARTS,
    open_mask,
    part_names,
    part_path,
    read_straight,
    to_rgba,
    upright_size,
)
from layerdecomp.data.index import Index, Item
from layerdecomp.data.loading import WITH_MAPS, layer_paths, layer_tensor, read_map
from layerdecomp.data.prepare import parallel, print_some
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import on_checkerboard
from layerdecomp.imaging.cues import CUES
from layerdecomp.imaging.geometry import to_pixels
from layerdecomp.imaging.layers import open_picture, read_image

COMPARED = {"layered": "background layer", "triplets": "image"}  # the file that finds equal items; else the only one
SHEET = (6, 4)  # columns and rows of the contact sheet
TILE = 160  # pixels


@dataclass(frozen=True)
class Finding:
    """The result of reading an item's files."""

    row: int
    digest: bytes = b""  # of its first file; empty if there is a fault
    maps: tuple[str, ...] = ()  # the cues it has maps for
    fault: str | None = None


class Place(NamedTuple):
    """The location of an item."""

    name: str
    split: str


def check_indexes(paths: Sequence[Path], workers: int = 1) -> list[str]:
    """Reads every item of the indexes; prints a summary and writes a contact sheet beside each index.

    Returns:
        A line per fault: files that are missing, truncated or whose size has changed since indexing, a wrong mode, an
        alpha channel that is 0 or 255 everywhere or looks premultiplied, an inverted mask, a cue map of the wrong size;
        and ids (within one source), pictures or background layers that occur twice, within a split or, worse, in both.
    """
    faults: list[str] = []
    contents: dict[bytes, Place] = {}
    ids: dict[tuple[str, str], Place] = {}
    for path in paths:
        index = Index(path)
        test = set(index.rows("test").tolist())
        what = COMPARED.get(index.kind, "content")
        remedy = "keep one" if what == "content" else "keep one, or both in one split if their objects differ"
        findings = list(_examine_all(index, workers))
        own = [f"{index[finding.row].id}: {finding.fault}" for finding in findings if finding.fault]
        for finding in findings:
            id = index[finding.row].id
            place = Place(f"{path.name}: {id}", "test" if finding.row in test else "train")
            before = contents.setdefault(finding.digest, place) if finding.digest else place
            namesake = ids.setdefault((index.source, id), place)
            if before is not place:
                own.append(_twice(place, before, what, remedy))
            elif namesake is not place:
                own.append(_twice(place, namesake, "id", "keep one, or rename one if they differ"))
        sheet = path.with_suffix(".contact.jpg")
        contact_sheet(index, [finding.row for finding in findings if not finding.fault]).save(sheet, quality=90)
        _summarise(index, findings, len(own), sheet)
        print_some(own, f"{len(own)} in all")
        faults += own
    return faults


def _examine_all(index: Index, workers: int) -> Iterator[Finding]:
    findings = parallel(partial(examine, index), range(len(index)), workers)
    yield from tqdm(findings, total=len(index), desc=index.path.name, unit="item")


def examine(index: Index, row: int) -> Finding:
    """Reads and checks the files of an item."""
    item = index[row]
    check: Callable[[Path, Item], Path] = _CHECKS[index.kind]
    try:
        first = check(index.root, item)
        maps = tuple(cue for cue in CUES if read_map(index.root, item, cue)) if index.kind in WITH_MAPS else ()
        return Finding(row, hashlib.sha256(first.read_bytes()).digest(), maps)
    except (InputError, OSError) as error:
        return Finding(row, fault=str(error))


def _check_background(root: Path, item: Item) -> Path:
    path = root / item.path
    size = upright_size(open_picture(path))
    _check_size(path, size[::-1] if item.rotation % 180 else size, item)
    return path


def _check_foreground(root: Path, item: Item) -> Path:
    path = root / item.path
    rgba = read_straight(path)
    _check_size(path, (rgba.shape[1], rgba.shape[0]), item)
    return path


def _check_layers(root: Path, item: Item) -> Path:
    for number, path in enumerate(layer_paths(root, item)):
        if number == 0:
            picture = open_picture(path)
            _check_size(path, picture.size, item)
            if to_rgba(picture, path).getchannel("A").getextrema() != (255, 255):
                raise InputError(f"{path} is transparent in places; expected an opaque background")
        else:
            rgba = read_straight(path)
            _check_size(path, (rgba.shape[1], rgba.shape[0]), item)
    return next(layer_paths(root, item))


def _check_triplet(root: Path, item: Item) -> Path:
    paths = {part: part_path(root, item, part) for part in part_names(item)}
    for path in paths.values():
        _check_size(path, upright_size(open_picture(path)), item)
    mask = open_mask(paths["mask"])
    image, background = (read_image(paths[part]).astype(np.int16) for part in ("image", "background"))
    if "foreground" in paths:
        evidence = read_straight(paths["foreground"])[..., 3] / 255
    else:
        evidence = np.abs(image - background).mean(axis=-1)
    if evidence[mask].mean() < evidence[~mask].mean():
        raise InputError(f"{paths['mask']} looks inverted; expected white on the object: invert it")
    return paths["image"]


def _check_size(path: Path, found: tuple[int, int], item: Item) -> None:
    if found != (item.width, item.height):
        raise InputError(
            f"{path} is {found[0]} x {found[1]} pixels, {item.width} x {item.height} when it was indexed; "
            "run tools/prepare_data.py again"
        )


_CHECKS = {
    "backgrounds": _check_background,
    "foregrounds": _check_foreground,
    "layered": _check_layers,
    "triplets": _check_triplet,
}


def _twice(place: Place, before: Place, what: str, remedy: str) -> str:
    if place.split == before.split:
        return f"{place.name} has the same {what} as {before.name}; {remedy}"
    places = f"{place.name} ({place.split}) has the same {what} as {before.name} ({before.split})"
    return f"{places}: a leak between the splits; {remedy}"


def _summarise(index: Index, findings: Sequence[Finding], faults: int, sheet: Path) -> None:
    widths, heights = index.sizes.T
    print(f"{index.path}: {len(index)} items of {index.source} ({index.kind}, {index.licence}) in {index.root}")
    print(f"  {len(index.rows('train'))} for training, {len(index.rows('test'))} for testing")
    for name, values in (("width", widths), ("height", heights)):
        low, middle, high = np.percentile(values, (0, 50, 100)).astype(int).tolist()
        print(f"  {name} {low} to {high}, median {middle}")
    if index.kind in WITH_MAPS:
        counts = [f"{sum(cue in finding.maps for finding in findings)} {cue}" for cue in CUES]
        print(f"  cue maps: {', '.join(counts)}")
    print(f"  contact sheet: {sheet}; {faults or 'no'} faults")


def contact_sheet(index: Index, rows: Sequence[int]) -> Image.Image:
    """Thumbnails of items spread evenly over an index; transparency is shown on a checkerboard."""
    columns, lines = SHEET
    sheet = Image.new("RGB", (columns * TILE, lines * TILE), "white")
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), columns * lines)).round().astype(int))
    for position, number in enumerate(chosen.tolist()):
        tile = _thumbnail(index, index[rows[number]])
        sheet.paste(tile, (position % columns * TILE, position // columns * TILE))
    return sheet


def _thumbnail(index: Index, item: Item) -> Image.Image:
    """The thumbnail of an item: the top layer of a layered picture, all parts of a triplet side by side."""
    if index.kind == "triplets":
        paths = [part_path(index.root, item, part) for part in PARTS if part in part_names(item)]
    else:
        paths = [list(layer_paths(index.root, item))[-1]]
    side = TILE // len(paths)
    tile = Image.new("RGB", (TILE, TILE), "white")
    for position, path in enumerate(paths):
        picture = open_picture(path).rotate(item.rotation, expand=True)
        picture.thumbnail((side, TILE))
        tile.paste(_on_board(picture), (position * side, 0))
    return tile


def _on_board(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.fromarray(to_pixels(on_checkerboard(layer_tensor(picture.convert("RGBA")))))
