"""MULAN: photographs decomposed into a background and one RGBA layer per object, back to front.

Only annotations are published: zlib-compressed pickles that give, for each layer, the part of the photograph it shows
and the content inpainted where other layers hid it. The photographs come from COCO 2017 and LAION-Aesthetics. Loading a
pickle can run arbitrary code, so this reader runs none: it replaces every object in the file by a passive `_Record`,
which is interpreted afterwards.
"""

import io
import math
import os
import pickle
import pickletools
import re
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.data.folders import list_pictures, to_rgba
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError
from layerdecomp.files import remedy
from layerdecomp.imaging.layers import Pixels, open_picture, read_image

LIMIT_BYTES = 2 << 30  # of a decompressed annotation
PIXEL_LIMIT = 100_000_000  # of a layer
MAX_MISFIT = 8.0  # of 255; chosen without access to the published files
LICENCE = "CC BY-NC-SA 4.0"
_CHUNK = 1 << 20
_SUFFIX = ".p.zl"
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_BACKGROUND = ("original_image_mask", "inpainted_delta")
_INSTANCE = (*_BACKGROUND, "instance_alpha")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F")
_LAYER = re.compile(r"(?:.*/)?(?P<id>[^/]+)[-/]layer_(?P<layer>0|[1-9]\d*)\.png")  # one folder per picture, or flat


def read_annotation(path: str | Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """Reads a `.p.zl` file, which describes the layers of a picture, without running any code from it.

    Args:
        limit_bytes: maximum size after decompression.

    Returns:
        "background", with the arrays "original_image_mask" and "inpainted_delta"; and "instances", by the names and in
        the order of the file, each with the same arrays and "instance_alpha". Captions are included if they are
        strings. The arrays are (H, W) or (H, W, C), in the file's own number type and scale.

    Raises:
        InputError: the file is missing, truncated, too large or not a compressed pickle, references more than
            pictures and numeric arrays, or lacks one of the entries above.
    """
    path = Path(path)
    content = _unpickle(path, _decompress(path, limit_bytes))
    _check_names(f"{path}", content, ("background", "instances"))
    instances = content["instances"]
    if not isinstance(instances, dict) or not instances:
        raise InputError(f"{path}: no instances; expected a dict with one entry per object")
    return {
        "background": _part(f"{path}: background", content["background"], _BACKGROUND),
        "instances": {
            name: _part(f"{path}: instance {number}", part, _INSTANCE)
            for number, (name, part) in enumerate(instances.items(), start=1)
        },
    }


def _decompress(path: Path, limit: int) -> io.BytesIO:
    stream, plain = zlib.decompressobj(), io.BytesIO()
    try:
        with path.open("rb") as file:
            while not stream.eof and (chunk := stream.unconsumed_tail or file.read(_CHUNK)):
                plain.write(stream.decompress(chunk, _CHUNK))
                if plain.tell() > limit:
                    raise InputError(f"{path}: more than {limit:,} bytes decompressed; raise the limit if you trust it")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); expected a MULAN annotation, *{_SUFFIX}") from error
    except zlib.error as error:
        raise InputError(f"{path}: not compressed by zlib, or damaged ({error}); download it again") from error
    if not stream.eof:
        raise InputError(f"{path}: cut off after {path.stat().st_size:,} bytes; download it again")
    plain.seek(0)
    return plain


class _Record:
    """Stands in for an object in a pickle: stores its arguments and state, and executes nothing during loading."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:  # without it, a pickle could set arbitrary attributes
        self.state = state


class _Encoded(_Record):
    """`_codecs.encode`: bytes in pickle protocol 2."""

    def content(self) -> bytes:
        text, encoding = self.args
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {_name(encoding)}")
        return text.encode("latin1")


class _Type(_Record):
    """`numpy.dtype`; only plain numeric types are accepted, not objects, strings, times or structured types."""

    def content(self) -> np.dtype[Any]:
        code, order = self.args[0], self.state[1]
        if not isinstance(code, str) or not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"an array of dtype {_name(code)}")
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"the byte order {_name(order)}")
        return np.dtype(order + code)


class _Array(_Record):
    """`numpy._core.multiarray._reconstruct`: an array whose content is in its state."""

    def pixels(self) -> NDArray[Any]:
        _, shape, dtype, fortran, data = self.state
        return _array(data, dtype, shape, "F" if fortran else "C")


class _Buffer(_Record):
    """`numpy._core.numeric._frombuffer`: an array in pickle protocol 5."""

    def pixels(self) -> NDArray[Any]:
        data, dtype, shape, order, *axes = self.args
        array = _array(data, dtype, shape, "F" if order == "F" else "C")
        return array.transpose(axes[0]) if order == "K" else array


class _Picture(_Record):
    """A PIL image. Its state is [info, mode, (width, height), palette, bytes], longer if it came from a file."""

    def pixels(self) -> NDArray[Any]:
        _, mode, size, palette, data = self.state[:5]
        if not isinstance(mode, str) or mode not in _MODES:
            raise ValueError(f"a picture of mode {_name(mode)}")
        width, height = size
        _check_shape((height, width))
        picture = Image.frombytes(mode, (width, height), _bytes(data))
        if mode == "P" and isinstance(palette, list):
            picture.putpalette(palette)
            picture = picture.convert("RGB")
        return np.asarray(picture)


_GLOBALS: dict[tuple[str, str], type[_Record]] = {
    ("PIL.Image", "Image"): _Picture,
    ("PIL.PngImagePlugin", "PngImageFile"): _Picture,
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Record,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Record for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> type[_Record]:
        if (module, name) not in _GLOBALS:
            raise InputError(
                f"{self.path}: references {module}.{name}, which no annotation needs; no code was executed. Expected a "
                "MULAN annotation as published; do not load this file with any other tool"
            )
        return _GLOBALS[module, name]


def _unpickle(path: Path, file: io.BytesIO) -> Any:
    try:
        _check_memo(file)
        file.seek(0)
        return _Unpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(f"{path}: not a pickle, or damaged ({error}); download it again") from error


def _check_memo(file: io.BytesIO) -> None:
    """Rejects memo indices beyond the number of preceding opcodes: a ten-byte file could allocate gigabytes."""
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > count:
            raise ValueError(f"entry {argument} of its memo, after {count} steps")


def _check_names(where: str, content: Any, names: Sequence[str]) -> None:
    found = list(content) if isinstance(content, dict) else []
    if missing := [name for name in names if name not in found]:
        keys = ", ".join(_name(key) for key in found[:10]) or "nothing"
        raise InputError(f"{where}: no {' and no '.join(missing)}; found {keys}, expected {', '.join(names)}")


def _part(where: str, content: Any, names: Sequence[str]) -> dict[str, Any]:
    _check_names(where, content, names)
    captions = {key: value for key, value in content.items() if isinstance(value, str)}
    return {**captions, **{name: _pixels(f"{where}: {name}", content[name]) for name in names}}


def _pixels(where: str, value: Any) -> NDArray[Any]:
    try:
        if not isinstance(value, _Array | _Buffer | _Picture):
            raise TypeError(_name(value))
        return value.pixels()
    except Exception as error:  # what a record holds can be anything
        raise InputError(f"{where} cannot be read: {error}; expected a picture or an array of numbers") from error


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    _check_shape(shape)
    if not isinstance(dtype, _Type):
        raise TypeError(f"{_name(dtype)} for a dtype")
    numbers = dtype.content()  # before the data, so that an object array gets the right error
    return np.frombuffer(_bytes(data), numbers).reshape(shape, order=order)


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, tuple) or len(shape) not in (2, 3) or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError("the shape is not (H, W) or (H, W, C)")
    if math.prod(sorted(shape)[-2:]) > PIXEL_LIMIT:  # whichever two of the axes are H and W
        raise ValueError(f"more than {PIXEL_LIMIT:,} pixels")


def _bytes(data: Any) -> bytes | bytearray:
    data = data.content() if isinstance(data, _Encoded) else data
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"{_name(data)} for bytes")
    return data


def _name(value: Any) -> str:
    """A value in an error message: the start of a string, the type of anything else, which may be huge."""
    return value[:40] if isinstance(value, str) else type(value).__name__


def rebuild_layers(annotation: dict[str, Any], image: Pixels, where: str = "annotation") -> list[Pixels]:
    """Rebuilds the layers of a picture, back to front, as (H, W, 4) uint8 with straight alpha; the first is opaque.

    Args:
        annotation: from `read_annotation`; PIL images are accepted as arrays. Masks and alpha are in [0, 1] or
            [0, 255]; the inpainted content is in [0, 255] levels, and is added to the masked picture.
        image: (H, W, 3) uint8, the annotated picture.
        where: name of the annotation in errors.

    Raises:
        InputError: an array differs in size from the picture, or its values are out of range.
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
            f"{where} is {_size(planes)} pixels, the picture {_size(image)}; expected equal sizes: "
            "use the annotated picture itself, neither scaled nor rotated"
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
    picture: NDArray[Any] = layers[0][..., :3]
    for layer in layers[1:]:
        alpha = layer[..., 3:] / 255
        picture = alpha * layer[..., :3] + (1 - alpha) * picture
    return picture.round().astype(np.uint8)


def misfit(layers: Sequence[Pixels], image: Pixels) -> float:
    """Mean absolute difference, of 255, between the recomposed layers and a picture (H, W, 3) of their size."""
    return float(np.abs(recompose(layers).astype(np.int16) - image).mean())


def _check_misfit(where: str, layers: Sequence[Pixels], image: Pixels, limit: float) -> None:
    if layers[0].shape[:2] != image.shape[:2]:
        raise InputError(f"{where}: layers of {_size(layers[0])} pixels, the picture {_size(image)}; expected equal")
    if (found := misfit(layers, image)) > limit:
        raise InputError(
            f"{where}: its layers, recomposed, are {found:.1f} of 255 away from the picture; "
            f"expected at most {limit:g}: check that it is the same picture, or raise max_misfit"
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
    """Writes layer_{k}.png into a new folder: all of them, or none if there is an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run
        partial.mkdir(parents=True)
        for number, layer in enumerate(layers):
            Image.fromarray(layer).save(partial / f"layer_{number}.png")
        os.replace(partial, folder)
    except OSError as error:
        raise InputError(
            f"{folder} could not be written ({error}); {remedy(error, folder.parent)} or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    return read_layers(Path(str(path).replace("{layer}", str(number))) for number in range(len(numbers)))


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
        return [name for name in list_pictures(self.annotations, frozenset({".zl"})) if name.endswith(_SUFFIX)]

    def read(self, candidate: str) -> Item:
        """Rebuilds the layers of an annotation, unless they exist, and compares them with the picture.

        Raises:
            InputError: the picture is missing or not the annotated one, or the annotation cannot be read.
        """
        path = self.annotations / candidate
        id = path.name.removesuffix(_SUFFIX)
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
                alpha, or the layers do not recompose to the picture, if that exists.
        """
        path = self.root / candidate
        layers = _read_stack(path, self._stacks[candidate])
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
