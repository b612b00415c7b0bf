"""Any input gives a correct result or one clear error: drawn by hypothesis, the same examples every time."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load, save

from layerdecomp.config import RunConfig, load_config
from layerdecomp.data.folders import open_picture
from layerdecomp.data.index import Index
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import read_image, read_mask
from layerdecomp.imaging.masks import imperfect_mask
from layerdecomp.weights import Adapter, load_autoencoder, load_mmdit

quick = settings(
    max_examples=60, deadline=60_000, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)
TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
# A mode, and a format that keeps it.
KINDS = [
    *(("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("I;16", "PNG")),
    *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF")),
    *(("CMYK", "TIFF"), ("LAB", "TIFF"), ("F", "TIFF"), ("I", "TIFF"), ("I;16", "TIFF"), ("YCbCr", "TIFF")),
    *(("RGB", "BMP"), ("L", "BMP")),
]
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)  # relative positions and new bytes
sides = st.one_of(st.integers(1, 40), st.just(255))
sizes = st.one_of(st.tuples(sides, sides), st.sampled_from([(1, 1), (8192, 1), (1, 8192), (8192, 9)]))


@contextlib.contextmanager
def one_clear_error(*named: str) -> Any:
    """Accepts success, or an `InputError` of a few lines that contains the names; everything else fails."""
    try:
        yield
    except InputError as error:
        assert 0 < len(str(error)) < 2000 and all(name in str(error) for name in named)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Image.Image, dict[str, Any]]:
    """An image of random colours, and the options to save it with."""
    mode, kind = draw(st.sampled_from(KINDS))
    width, height = draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode in ("F", "I"):
        values = rng.uniform(-10, 70000, (height, width)).astype(np.float32 if mode == "F" else np.int32)
        picture = Image.fromarray(values)
    elif mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
        via = "RGB" if mode in ("CMYK", "LAB", "YCbCr", "P", "1", "L") else "RGBA"
        picture = (
            rgba.convert(via).convert(mode)
            if mode != "LAB"
            else Image.frombytes("LAB", (width, height), rng.bytes(3 * width * height))
        )
    options: dict[str, Any] = {"format": kind}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 9))  # 0 and 9 are invalid
        options["exif"] = exif
    if mode == "P" and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255))
    if kind in ("GIF", "PNG", "WEBP", "TIFF") and mode in ("P", "RGB", "RGBA") and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [picture.transpose(Image.Transpose.ROTATE_180)]}
    return picture, options


def saved(picture: Image.Image, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@quick
@given(drawn=pictures())
def test_every_image_is_read_upright(folder: Path, drawn: tuple[Image.Image, dict[str, Any]]) -> None:
    picture, options = drawn
    path = folder / "a.picture"
    path.write_bytes(saved(picture, options))
    pixels = read_image(path)
    swapped = "exif" in options and options["exif"][0x0112] in range(5, 9)
    assert pixels.dtype == np.uint8 and pixels.shape == (*(picture.size if swapped else picture.size[::-1]), 3)
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    if upright.mode in ("RGB", "L", "1", "CMYK", "YCbCr") and not upright.has_transparency_data:
        np.testing.assert_array_equal(pixels, np.asarray(upright.convert("RGB")))
    if upright.mode in ("RGBA", "LA", "P") and upright.has_transparency_data:
        values = np.asarray(upright.convert("RGBA")).astype(float)
        expected = values[..., :3] * values[..., 3:] / 255 + 255 - values[..., 3:]
        assert np.abs(pixels - expected).max() <= 1.01
    if upright.mode == "I;16":
        deep = np.asarray(upright).astype(float)
        expected = deep / (257 if deep.max() > 255 else 1)
        assert np.abs(pixels[..., 0] - expected).max() <= 1


@quick
@given(drawn=pictures(), flips=changes, end=st.floats(0, 1))
def test_damaged_images_are_read_or_one_error(
    folder: Path, drawn: tuple[Image.Image, dict[str, Any]], flips: list[tuple[float, int]], end: float
) -> None:
    content = bytearray(saved(*drawn))
    for place, value in flips:
        content[int(place * (len(content) - 1))] = value
    path = folder / "a.damaged"
    path.write_bytes(content[: max(1, int(len(content) * min(1, 0.3 + end)))])
    for read in (read_image, read_mask, open_picture):
        with one_clear_error("a.damaged"):
            read(path)


@quick
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"]))
def test_bytes_that_are_no_image_are_one_error(folder: Path, content: bytes, start: bytes) -> None:
    path = folder / "a.bytes"
    path.write_bytes(start + content)
    for read in (read_image, read_mask, open_picture):
        with one_clear_error("a.bytes"):
            read(path)


def png_of(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size, with almost no pixel data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((60_000, 60_000), "cannot be read"),  # by Pillow itself
        ((2**31 - 1, 2**31 - 1), "cannot be read"),
        ((10_000, 10_000), "expected at most 89,478,485 in all"),
        ((100_000_000, 1), "expected at most 89,478,485 in all"),
    ],
)
def test_huge_images_are_refused_before_they_are_decoded(folder: Path, size: tuple[int, int], message: str) -> None:
    path = folder / "bomb.png"
    path.write_bytes(png_of(*size))
    for read in (read_image, read_mask, open_picture):
        with pytest.raises(InputError, match=rf"bomb\.png.*{message}"):
            read(path)


def test_the_largest_allowed_images_are_read(folder: Path) -> None:
    path = folder / "large.png"
    Image.new("L", (8192, 8192), 77).save(path, compress_level=1)
    pixels = read_image(path)
    assert pixels.shape == (8192, 8192, 3) and (pixels[::97, ::89] == 77).all()


@quick
@given(
    width=st.integers(2, 48), height=st.integers(1, 48), seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 0.999)
)
def test_imperfect_masks_are_never_empty_or_full(width: int, height: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    alpha = (rng.random((height, width)) < share) * rng.uniform(0.05, 1, (height, width))
    alpha.flat[0], alpha.flat[-1] = 1.0, 0.0
    mask = imperfect_mask(alpha, rng)
    assert mask.shape == (height, width) and mask.dtype == np.bool_ and mask.any() and not mask.all()


# Configs

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
KEYS = ["train.steps", "optim.betas", "data.scenes", "lora.rank", "fusion.enabled", "sample", "name", "nobody", "seed"]


@settings(quick, max_examples=40)
@given(key=st.sampled_from(["", *(f"{key}=" for key in KEYS)]), value=st.one_of(values, st.text(max_size=12)))
def test_any_override_is_a_config_or_one_error(key: str, value: Any) -> None:
    with one_clear_error():
        text = value if isinstance(value, str) else json.dumps(value)
        assert isinstance(load_config(TINY, [f"{key}{text}"]), RunConfig)


@settings(quick, max_examples=30)
@given(tree=st.dictionaries(st.sampled_from([key.split(".")[0] for key in KEYS]), values, max_size=4), junk=st.binary())
def test_any_file_is_a_config_or_one_error(folder: Path, tree: dict[str, Any], junk: bytes) -> None:
    path = folder / "a.yaml"
    for content in (json.dumps({"job": "decomposer", **tree}).encode(), junk):
        path.write_bytes(content)
        with one_clear_error():
            assert isinstance(load_config(path), RunConfig)


# Weights

fields = st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"])
headers = st.recursive(
    st.one_of(st.none(), st.integers(-10, 2**63), st.text(max_size=6), st.sampled_from(["F32", "F64", "I8", "BOOL"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(fields, inner, max_size=3),
    ),
    max_leaves=12,
)
READERS = (Adapter.load, load_autoencoder, load_mmdit, Index)


def check_readers(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for read in READERS:
        with one_clear_error(path.name):
            index = read(path)
            if isinstance(index, Index):
                list(index)


@quick
@given(header=headers, length=st.one_of(st.none(), st.integers(0, 2**64 - 1)), body=st.binary(max_size=64))
def test_any_header_is_read_or_one_error(folder: Path, header: Any, length: int | None, body: bytes) -> None:
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    check_readers(folder / "a.safetensors", struct.pack("<Q", size) + text + body)


@quick
@given(
    names=st.lists(st.sampled_from(["lora", "img_in.weight", "layers", "size", "id.text"]), min_size=1, unique=True),
    offsets=st.lists(st.tuples(st.integers(-4, 80), st.integers(-4, 2**40)), min_size=5, max_size=5),
    dtype=st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "X"]),
    metadata=st.dictionaries(
        st.sampled_from(["lora", "weights", "format_version", "index_version", "config", "kind", "source"]),
        st.sampled_from(["1", "2", "{}", "[", "null", "${oc.env:HOME}", "layered"]),
    ),
)
def test_any_offsets_are_read_or_one_error(
    folder: Path, names: list[str], offsets: list[tuple[int, int]], dtype: str, metadata: dict[str, str]
) -> None:
    entries = {
        name: {"dtype": dtype, "shape": [max(0, end - start)], "data_offsets": [start, end]}
        for name, (start, end) in zip(names, offsets, strict=False)
    }
    text = json.dumps({**entries, "__metadata__": metadata}).encode()
    check_readers(folder / "b.safetensors", struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(folder: Path, tiny_weights: Path, dtype: torch.dtype) -> None:
    tensors = load((tiny_weights / "autoencoder.safetensors").read_bytes())
    with open(tiny_weights / "autoencoder.safetensors", "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(size))["__metadata__"]
    name = next(iter(tensors))
    path = folder / "c.safetensors"
    path.write_bytes(save({**tensors, name: tensors[name].to(dtype)}, metadata))
    with pytest.raises(InputError, match=rf"c\.safetensors: 1 tensors are not of floating.*{name}"):
        load_autoencoder(path)


@quick
@given(end=st.floats(0, 1), flips=changes)
def test_damaged_weights_are_read_or_one_error(
    folder: Path, tiny_weights: Path, end: float, flips: list[tuple[float, int]]
) -> None:
    content = bytearray((tiny_weights / "autoencoder.safetensors").read_bytes())
    for place, value in flips:
        content[int(place**4 * (len(content) - 1))] = value  # mostly in the header
    path = folder / "d.safetensors"
    path.write_bytes(content[: int(len(content) * min(1, 0.5 + end))])
    with one_clear_error("d.safetensors"):
        load_autoencoder(path)
