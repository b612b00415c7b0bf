"""MULAN: photographs decomposed into a background and one RGBA layer per object, back to front.

Only annotations are published, which `annotation` reads: they give, for each layer, the part of the photograph it shows
and the content inpainted where other layers hid it. The photographs come from COCO 2017 and LAION-Aesthetics.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.data.alpha import check_straight
from layerdecomp.data.annotation import LIMIT_BYTES, SUFFIX, read_annotation
from layerdecomp.data.folders import list_pictures, to_rgba
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError, RunError
from layerdecomp.files import atomic_path
from layerdecomp.imaging.layers import Pixels, open_picture, read_image

MAX_MISFIT = 8.0  # of 255; chosen without access to the published files
LICENCE = "CC BY-NC-SA 4.0"
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_LAYER = re.compile(r"(?:.*/)?(?P<id>[^/]+)[-/]layer_(?P<layer>0|[1-9]\d*)\.png")  # one folder per picture, or flat


def rebuild_layers(annotation: dict[str, Any], image: Pixels, where: str = "annotation") -> list[Pixels]:
    """Rebuilds the layers of an image, back to front, as (H, W, 4) uint8 with straight alpha; the first is opaque.

    Args:
        annotation: from `read_annotation`; PIL images are accepted as arrays. Masks and alpha are in [0, 1] or
            [0, 255]; the inpainted content is in [0, 255] levels, and is added to the masked image.
        image: (H, W, 3) uint8, the annotated image.
        where: name of the annotation in errors.

    Raises:
        InputError: an array differs in size from the image, or its values are out of range.
    """
    parts = [annotation["background"], *annotation["instances"].values()]
    return [_rebuild(part, image, number > 0, f"{where}: layer {number}") for number, part in enumerate(parts)]


def _rebuild(part: dict[str, Any], image: Pixels, transparent: bool, where: str) -> Pixels:
    mask = _shares(f"{where}: original_image_mask", part["original_image_mask"], image)
    delta = _levels(f"{where}: inpainted_delta", part["inpainted_delta"], image)
    alpha: NDArray[Any] = np.ones((*image.shape[:2], 1), np.float32)
    if transparent:
        alpha = _alpha(f"{where}: instance_alpha", part["instance_alpha"], image)
    rgb = (image * mask + delta).clip(0, 255)  # in float32: uint8 would overflow before the clip
    return np.concatenate([rgb, 255 * alpha], axis=-1).round().astype(np.uint8)


def _levels(where: str, values: Any, image: Pixels) -> NDArray[Any]:
    delta = _planes(where, values, image)
    highest = np.abs(delta).max()
    if highest > 255 or (highest <= 1 and (delta % 1).any()):
        raise InputError(f"{where}: numbers up to {highest:g}; expected levels up to 255")
    return delta


def _shares(where: str, values: Any, image: Pixels) -> NDArray[Any]:
    mask = _planes(where, values, image)
    if mask.min() < 0 or mask.max() > 255:
        raise InputError(f"{where}: numbers from {mask.min():g} to {mask.max():g}; expected 0 to 1, or 0 to 255")
    return mask / 255 if mask.max() > 1 else mask


def _alpha(where: str, values: Any, image: Pixels) -> NDArray[Any]:
    values = np.asarray(values)
    if values.ndim == 3 and values.shape[2] in (2, 4):  # a picture with an alpha channel
        values = values[..., -1]
    alpha = _shares(where, values, image)
    if (alpha != alpha[..., :1]).any():
        raise InputError(f"{where} is in colour; expected an alpha channel, or grey levels")
    return alpha[..., :1]


def _planes(where: str, values: Any, image: Pixels) -> NDArray[Any]:
    """Checks the size of an (H, W) or (H, W, 1 or 3) array, and returns it as float32 (H, W, 1 or 3)."""
    planes = np.asarray(values, dtype=np.float32)
    planes = planes[..., None] if planes.ndim == 2 else planes
    if planes.shape[:2] != image.shape[:2]:
        raise InputError(
            f"{where} is {_size(planes)} pixels, the image {_size(image)}; expected equal sizes: "
            "use the annotated image itself, neither scaled nor rotated"
        )
    if planes.shape[2:] not in ((1,), (3,)):
        raise InputError(f"{where}: {planes.shape} numbers; expected one channel or three")
    if not np.isfinite(planes).all():
        raise InputError(f"{where}: numbers that are not finite; download the annotation again")
    return planes


def _size(array: NDArray[Any]) -> str:
    return " x ".join(str(length) for length in array.shape[1::-1])


def recompose(layers: Sequence[Pixels]) -> Pixels:
    """Composites layers (H, W, 4), back to front, into (H, W, 3) uint8. The first is treated as opaque."""
    image: NDArray[Any] = layers[0][..., :3]
    for layer in layers[1:]:
        alpha = layer[..., 3:] / 255
        image = alpha * layer[..., :3] + (1 - alpha) * image
    return image.round().astype(np.uint8)


def misfit(layers: Sequence[Pixels], image: Pixels) -> float:
    """Mean absolute difference, of 255, between the recomposed layers and an image (H, W, 3) of their size."""
    return float(np.abs(recompose(layers).astype(np.int16) - image).mean())


def _check_misfit(where: str, layers: Sequence[Pixels], image: Pixels, limit: float) -> None:
    if layers[0].shape[:2] != image.shape[:2]:
        raise InputError(f"{where}: layers of {_size(layers[0])} pixels, the image {_size(image)}; expected equal")
    if (found := misfit(layers, image)) > limit:
        raise InputError(
            f"{where}: its layers, recomposed, are {found:.1f} of 255 away from the image; "
            f"expected at most {limit:g}: check that it is the same image, or raise max_misfit"
        )


def _read_annotated(path: Path) -> Pixels:
    """A picture's stored values, without its colour profile applied: annotations are relative to these."""
    picture = open_picture(path)
    picture.info.pop("icc_profile", None)
    return read_image(picture)


def read_layers(paths: Iterable[Path]) -> list[Pixels]:
    """Reads the layers of one picture, back to front, as (H, W, 4) uint8.

    Raises:
        InputError: one cannot be read, differs in size from the first, or has no alpha; or the first is not opaque.
    """
    layers: list[Pixels] = []
    for path in paths:
        layer = _read_layer(path, transparent=bool(layers))
        if layers and layer.shape != layers[0].shape:
            raise InputError(f"{path} is {_size(layer)} pixels, layer 0 {_size(layers[0])}; expected equal sizes")
        layers.append(layer)
    return layers


def _read_layer(path: Path, transparent: bool) -> Pixels:
    picture = open_picture(path)
    layer = np.asarray(to_rgba(picture, path))
    if transparent and not picture.has_transparency_data:
        raise InputError(f"{path} has no alpha channel; expected RGBA above layer 0")
    if not transparent and layer[..., 3].min() < 255:
        raise InputError(f"{path} is transparent in places; expected an opaque background as layer 0")
    return layer


def _write_layers(folder: Path, layers: Sequence[Pixels]) -> None:
    """Writes layer_{k}.png into a new folder: all of them, or none if there is an error, which is a `RunError`."""
    try:
        with atomic_path(folder) as partial:
            partial.mkdir()
            for number, layer in enumerate(layers):
                Image.fromarray(layer).save(partial / f"layer_{number}.png")
    except InputError as error:  # not a fault of the annotation, which would be left out of the index
        raise RunError(f"{error}; rerun the command to resume") from error


def _pictures_below(folder: Path) -> dict[str, list[Path]]:
    """Stem -> paths of the pictures below a folder."""
    found: dict[str, list[Path]] = {}
    for name in list_pictures(folder, _PICTURES):
        path = folder / name
        found.setdefault(path.stem, []).append(path)
    return found


def _find_picture(path: Path, pictures: dict[str, list[Path]], id: str) -> Path | None:
    found = pictures.get(id, [])
    if len(found) > 1:
        raise InputError(f"{path}: two pictures {id}, {found[0]} and {found[1]}; leave one of them in `images`")
    return found[0] if found else None


def _read_stack(path: Path, numbers: list[int]) -> list[Pixels]:
    """All layers of a picture, given a path with "{layer}" for the number; `InputError` if any is missing or unfit."""
    if len(numbers) < 2 or sorted(numbers) != list(range(len(numbers))):
        found = ", ".join(str(number) for number in sorted(numbers)) or "none"
        raise InputError(f"{path}: layer {found} found; expected at least two, numbered from 0 without a gap")
    return read_layers(_layer_path(path, number) for number in range(len(numbers)))


def _layer_path(path: Path, number: int) -> Path:
    return Path(str(path).replace("{layer}", str(number)))


@dataclass(frozen=True)
class MulanAnnotations:
    """The data set as published. Its layers are rebuilt once and stored as PNG files below `root`."""

    source: ClassVar[str] = "mulan"
    kind: ClassVar[str] = "layered"
    licence: ClassVar[str] = LICENCE
    annotations: Path  # *.p.zl, at any depth
    images: Path  # COCO 2017 (train and val), LAION-Aesthetics or both, at any depth
    root: Path  # output folder for the layers, images/{id}/layer_{k}.png
    max_misfit: float = MAX_MISFIT  # maximum `misfit` between the layers and the picture
    limit_bytes: int = LIMIT_BYTES  # of a decompressed annotation

    def candidates(self) -> list[str]:
        """The annotation files, relative to `annotations`; `InputError` if one of the folders is missing or empty."""
        _ = self._pictures  # so that a wrong folder is a single error, not one per annotation
        return [name for name in list_pictures(self.annotations, frozenset({".zl"})) if name.endswith(SUFFIX)]

    def read(self, candidate: str) -> Item:
        """Rebuilds the layers of an annotation, unless they exist, and compares them with the picture.

        Raises:
            InputError: the picture is missing or not the annotated one, or the annotation cannot be read.
            RunError: the layers cannot be written.
        """
        path = self.annotations / candidate
        id = path.name.removesuffix(SUFFIX)
        folder = self.root / "images" / id
        picture = _find_picture(path, self._pictures, id)
        if picture is None:
            raise InputError(
                f"{path}: its picture {id} is not found below {self.images} ({' '.join(sorted(_PICTURES))}); "
                "12 digits are of COCO 2017 (train or val), 9 of LAION-Aesthetics"
            )
        image = _read_annotated(picture)
        finished = folder.is_dir()
        if finished:
            names = [_LAYER.fullmatch(f"{id}/{file.name}") for file in folder.iterdir()]
            layers = _read_stack(folder / "layer_{layer}.png", [int(name["layer"]) for name in names if name])
        else:
            layers = rebuild_layers(read_annotation(path, self.limit_bytes), image, str(path))
        _check_misfit(str(path), layers, image, self.max_misfit)
        if not finished:
            _write_layers(folder, layers)
        height, width = image.shape[:2]
        return Item(id, f"images/{id}/layer_{{layer}}.png", width, height, len(layers))

    @cached_property
    def _pictures(self) -> dict[str, list[Path]]:
        return _pictures_below(self.images)


@dataclass(frozen=True)
class MulanLayers:
    """Layers already rebuilt by other tools: {id}-layer_{k}.png, or {id}/layer_{k}.png, at any depth below `root`."""

    source: ClassVar[str] = "mulan"
    kind: ClassVar[str] = "layered"
    licence: ClassVar[str] = LICENCE
    root: Path
    images: Path | None = None  # the original pictures; those found are compared with their layers
    max_misfit: float = MAX_MISFIT  # maximum `misfit` between the layers and the picture

    def candidates(self) -> list[str]:
        """Paths of layered pictures, with "{layer}" for the number; `InputError` if a folder is missing or empty."""
        _ = self._pictures
        return sorted(self._stacks)

    def read(self, candidate: str) -> Item:
        """Opens all layers of a picture.

        Raises:
            InputError: a layer is missing or damaged, sizes differ, the background is not opaque, another layer has no
                alpha or looks premultiplied, or the layers do not recompose to the picture, if that exists.
        """
        path = self.root / candidate
        layers = _read_stack(path, self._stacks[candidate])
        for number, layer in enumerate(layers):
            check_straight(layer, _layer_path(path, number))
        match = _LAYER.fullmatch(candidate.replace("{layer}", "0"))
        assert match is not None
        if picture := _find_picture(path, self._pictures, match["id"]):
            _check_misfit(str(path), layers, _read_annotated(picture), self.max_misfit)
        height, width = layers[0].shape[:2]
        return Item(match["id"], candidate, width, height, len(layers))

    @cached_property
    def _pictures(self) -> dict[str, list[Path]]:
        return _pictures_below(self.images) if self.images else {}

    @cached_property
    def _stacks(self) -> dict[str, list[int]]:
        """Candidate -> numbers of its existing layers."""
        found: dict[str, list[int]] = {}
        for name in list_pictures(self.root, frozenset({".png"})):
            if match := _LAYER.fullmatch(name):
                candidate = f"{name[: match.start('layer')]}{{layer}}.png"
                found.setdefault(candidate, []).append(int(match["layer"]))
        return found
