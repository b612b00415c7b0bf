"""Loads the pictures of an index's items; cropping and resizing are one operation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from layerdecomp.data.folders import open_mask, part_names, part_path, to_rgba
from layerdecomp.data.index import Index, Item
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import with_unit_alpha
from layerdecomp.imaging.cues import REGISTRY
from layerdecomp.imaging.geometry import Box, ResizePicture, resize_picture, to_tensor
from layerdecomp.imaging.layers import READABLE, check_pixels, open_picture, read_image


@dataclass(frozen=True)
class Crop:
    """A crop of all pictures of an item, and the size it is resized to."""

    source: tuple[int, int]  # (width, height) of the pictures
    box: Box
    size: tuple[int, int]  # (height, width) after resizing

    def apply(self, picture: Image.Image, path: Path, resize: ResizePicture = resize_picture) -> Image.Image:
        """A picture, cropped and resized."""
        if picture.size != self.source:
            raise InputError(
                f"{path} is {picture.width} x {picture.height} pixels, its index says {self.source[0]} x "
                f"{self.source[1]}; run tools/prepare_data.py again"
            )
        return resize(picture, self.size, self.box)


def random_crop(
    source: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, around: Box | None = None
) -> Crop:
    """Draw the position of the largest crop with the aspect of `size` (height, width) from `source` (width, height).

    Along each axis the crop contains the box `around`, or lies inside it if it is too small.
    """
    scale = min(source[0] / size[1], source[1] / size[0])
    width, height = scale * size[1], scale * size[0]
    columns = None if around is None else (around[0], around[2])
    rows = None if around is None else (around[1], around[3])
    left = _random_offset(source[0], width, columns, rng)
    top = _random_offset(source[1], height, rows, rng)
    return Crop(source, (left, top, left + width, top + height), size)


def _random_offset(total: float, length: float, around: tuple[float, float] | None, rng: np.random.Generator) -> float:
    low, high = 0.0, max(0.0, total - length)
    if around is not None:
        ends = sorted((around[0], around[1] - length))
        low, high = np.clip(ends, low, high).tolist()
    return float(rng.uniform(low, high))


def load_background(index: Index, item: Item, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A random crop of a background, rotated upright: (3, *size) in [-1, 1]."""
    path = index.root / item.path
    picture = Image.fromarray(read_image(open_shrunk(path, item, size)))
    crop = random_crop((item.width, item.height), size, rng)
    # the decoder may have downscaled the picture: scale the box too
    shrink = picture.width / item.width
    left, top, right, bottom = (shrink * edge for edge in crop.box)
    box = (left, top, min(right, picture.width), min(bottom, picture.height))
    return to_tensor(np.asarray(resize_picture(picture, size, box)))[0]


def open_shrunk(path: Path, item: Item, size: tuple[int, int]) -> Image.Image:
    """An upright picture, possibly downscaled by the JPEG decoder to 1/2, 1/4 or 1/8, but never below `size`."""
    needed = max(size[1] / item.width, size[0] / item.height)
    try:
        with Image.open(path, formats=READABLE) as file:
            check_pixels(path, file)
            file.draft("RGB", (int(np.ceil(needed * file.width)), int(np.ceil(needed * file.height))))
            file.load()
            picture = ImageOps.exif_transpose(file)
    except Exception:  # a damaged file can raise anything
        open_picture(path)  # raises an error that says what is wrong
        raise
    if item.rotation:
        picture = picture.rotate(item.rotation, expand=True)
    # the decoder rounds sides up
    if abs(picture.width / picture.height * item.height / item.width - 1) > 2 / min(picture.size):
        raise InputError(
            f"{path} does not have the aspect of the {item.width} x {item.height} pixels in its index; "
            "run tools/prepare_data.py again"
        )
    return picture


def load_foreground(path: Path) -> Image.Image:
    """A cut-out as RGBA, upright, cropped to the bounds of alpha > 0."""
    picture = to_rgba(open_picture(path, upright=True), path)
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise InputError(f"{path} is transparent everywhere; run tools/prepare_data.py again")
    return picture.crop(box)


def load_layers(index: Index, item: Item) -> list[Image.Image]:
    """The layers of a layered picture as RGBA, back to front."""
    return [to_rgba(open_picture(path), path) for path in layer_paths(index.root, item)]


def layer_paths(root: Path, item: Item) -> Iterator[Path]:
    """The files of a layered picture, back to front."""
    return (root / item.path.replace("{layer}", str(layer)) for layer in range(item.layers))


def load_parts(index: Index, item: Item, parts: Sequence[str]) -> list[Image.Image]:
    """The named parts of a triplet, upright: the foreground as RGBA, the mask as L, the others as RGB."""
    pictures = []
    for part in parts:
        path = part_path(index.root, item, part)
        if part == "mask":
            pictures.append(Image.fromarray(open_mask(path).astype(np.uint8) * 255))
        else:
            picture = open_picture(path, upright=True)
            opaque = part != "foreground"  # read as in evaluation
            pictures.append(Image.fromarray(read_image(picture)) if opaque else to_rgba(picture, path))
    return pictures


WITH_MAPS = ("layered", "triplets")  # kinds of index whose items are complete images, so cue maps can be precomputed


def map_path(root: Path, item: Item, cue: str) -> Path:
    """The path of the cue map of a layered picture or a triplet, beside `image/` and `mask/`; it may not exist."""
    return root / cue / f"{item.id}.png"


def read_map(root: Path, item: Item, cue: str) -> Image.Image | None:
    """A cue map as RGB, if there is one; `InputError` if it is damaged or differs in size from the picture."""
    path = map_path(root, item, cue)
    if not path.is_file():
        return None
    picture = Image.fromarray(read_image(open_picture(path)))
    if picture.size != (item.width, item.height):
        raise InputError(
            f"{path} is {picture.width} x {picture.height} pixels, its picture {item.width} x {item.height}; expected "
            "equal sizes: create the map again, or delete it"
        )
    return picture


def load_maps(index: Index, item: Item, crop: Crop) -> dict[str, Tensor]:
    """The existing cue maps of an item, cropped like its picture: name -> (3, *size) in [-1, 1]."""
    found = {cue: read_map(index.root, item, cue) for cue in REGISTRY}
    return {
        cue: to_tensor(np.asarray(crop.apply(picture, map_path(index.root, item, cue), REGISTRY[cue].resize)))[0]
        for cue, picture in found.items()
        if picture is not None
    }


def has_foreground(item: Item) -> bool:
    """Whether a triplet has a foreground; RORem's do not."""
    return "foreground" in part_names(item)


def layer_tensor(picture: Image.Image) -> Tensor:
    """RGBA -> (4, H, W): colours in [-1, 1], alpha in [0, 1]."""
    return with_unit_alpha(to_tensor(np.asarray(picture))[0])
