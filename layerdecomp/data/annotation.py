"""MULAN's annotations: pickles, read without running any code from them.

Loading a pickle can run arbitrary code, so this reader runs none: it replaces every object in the file by a passive
`_Record`, which is interpreted afterwards.
"""

import io
import math
import pickle
import pickletools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.errors import InputError

SUFFIX = ".p.zl"
LIMIT_BYTES = 2 << 30  # of a decompressed annotation
PIXEL_LIMIT = 100_000_000  # of a layer
_CHUNK = 1 << 20
_BACKGROUND = ("original_image_mask", "inpainted_delta")
_INSTANCE = (*_BACKGROUND, "instance_alpha")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F")


def read_annotation(path: str | Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """Reads a `.p.zl` file, which describes the layers of an image, without running any code from it.

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
                    raise InputError(f"{path}: more than {limit:,} bytes unpacked; raise limit_bytes= if you trust it")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); expected a MULAN annotation, *{SUFFIX}") from error
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
