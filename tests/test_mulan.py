"""MULAN: pickles are read without running them, layers rebuilt exactly, and invalid data refused."""

import codecs
import copy
import io
import os
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from profiles import SWAPPED

from layerdecomp.data.annotation import read_annotation
from layerdecomp.data.index import Index, write_index
from layerdecomp.data.mulan import MulanAnnotations, MulanLayers, misfit, rebuild_layers, recompose
from layerdecomp.data.prepare import prepare
from layerdecomp.errors import InputError, RunError
from layerdecomp.imaging.compositing import over

SIZE = (12, 17)  # height, width
PROTOCOLS = (2, 3, 4, 5)
ID = "000000581346"


def _truth(seed: int = 0) -> list[np.ndarray]:
    """A background and two overlapping objects with random colours and some soft edges."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (*SIZE, 4), dtype=np.uint8) for _ in range(3)]
    for layer in layers:
        layer[..., 3] = 0
    layers[0][..., 3] = 255
    layers[1][2:9, 2:9, 3] = 255
    layers[1][9, 2:9, 3] = 130
    layers[2][5:11, 6:14, 3] = 255
    layers[2][5:11, 14, 3] = 77
    return layers


def _annotation(layers: list[np.ndarray]) -> dict[str, Any]:
    """MULAN's annotation of these layers: the image where a layer alone is visible, inpainted content elsewhere."""
    uncovered = np.ones(SIZE, bool)
    parts = []
    for layer in layers[::-1]:
        mask = uncovered & (layer[..., 3] == 255)
        delta = layer[..., :3].astype(np.int16) * ~mask[..., None]
        alpha = Image.fromarray(layer[..., 3])
        parts.append({"original_image_mask": mask, "inpainted_delta": delta, "instance_alpha": alpha, "blip2": "a cat"})
        uncovered &= layer[..., 3] == 0
    del parts[-1]["instance_alpha"]
    return {
        "captioning": {"llava": "details", "clip": {"score": np.float32(0.5)}},
        "background": parts[-1],
        "image": {"llava": "a picture", "blip2": "N/A"},
        "instances": {7 - number: part for number, part in enumerate(parts[-2::-1])},  # not sorted by key
    }


def _write(path: Path, annotation: Any, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = annotation if isinstance(annotation, bytes) else pickle.dumps(annotation, protocol)
    path.write_bytes(zlib.compress(content))
    return path


def _rebuilt(path: Path) -> list[np.ndarray]:
    return rebuild_layers(read_annotation(path), recompose(_truth()), str(path))


def _assert_truth(layers: list[np.ndarray]) -> None:
    assert len(layers) == 3 and all(layer.dtype == np.uint8 for layer in layers)
    for layer, expected in zip(layers, _truth(), strict=True):
        np.testing.assert_array_equal(layer, expected)


def _png(picture: Image.Image) -> Image.Image:
    """The image as read from a file: another class, whose state also has a file name."""
    file = io.BytesIO()
    picture.save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_layers_are_rebuilt_exactly(tmp_path: Path, protocol: int) -> None:
    path = _write(tmp_path / "1.p.zl", _annotation(_truth()), protocol)
    annotation = read_annotation(path)
    assert list(annotation["instances"]) == [7, 6]
    assert annotation["background"]["blip2"] == "a cat"
    layers = _rebuilt(path)
    _assert_truth(layers)
    assert misfit(layers, recompose(_truth())) == 0
    assert misfit([layers[0], layers[2], layers[1]], recompose(_truth())) > 1  # a wrong order is detected


def _grey_palette(picture: Image.Image) -> Image.Image:
    """Palette indices that differ from the grey levels they stand for."""
    indexed = Image.fromarray(255 - np.asarray(picture), mode="P")
    indexed.putpalette([level for index in range(256) for level in [255 - index] * 3])
    return indexed


ALPHAS: dict[str, Callable[[Image.Image], Any]] = {
    "L of a file": _png,
    "RGB": lambda picture: picture.convert("RGB"),
    "RGBA of a file": lambda picture: _png(Image.merge("RGBA", [Image.new("L", SIZE[::-1], 9)] * 3 + [picture])),
    "LA": lambda picture: Image.merge("LA", [Image.new("L", SIZE[::-1], 9), picture]),
    "P": _grey_palette,
    "F": lambda picture: Image.fromarray(np.asarray(picture, np.float32)),
    "levels": np.asarray,
    "shares": lambda picture: np.asarray(picture) / 255,
    "three channels": lambda picture: np.repeat(np.asarray(picture)[..., None], 3, axis=-1),
    "one channel": lambda picture: np.asarray(picture)[..., None].astype(np.int64),
    "big-endian": lambda picture: np.asarray(picture).astype(">u2"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", ALPHAS)
def test_every_form_of_alpha_is_read(tmp_path: Path, form: str, protocol: int) -> None:
    annotation = _annotation(_truth())
    for part in annotation["instances"].values():
        part["instance_alpha"] = ALPHAS[form](part["instance_alpha"])
    _assert_truth(_rebuilt(_write(tmp_path / "1.p.zl", annotation, protocol)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", [np.asarray, Image.fromarray, np.float64, np.uint8], ids=["bool", "1", "f8", "u1"])
def test_every_form_of_binary_alpha_is_read(tmp_path: Path, form: Any, protocol: int) -> None:
    annotation = _annotation(_truth())
    hard = [layer[..., 3] > 128 for layer in _truth()[1:]]
    for part, alpha in zip(annotation["instances"].values(), hard, strict=True):
        part["instance_alpha"] = form(alpha)
    layers = _rebuilt(_write(tmp_path / "1.p.zl", annotation, protocol))
    for layer, alpha in zip(layers[1:], hard, strict=True):
        np.testing.assert_array_equal(layer[..., 3], alpha * 255)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask.astype(np.uint8) * 255,
        lambda mask: np.repeat(mask[..., None], 3, axis=-1).astype(np.float64),
        lambda mask: np.asfortranarray(mask),
        lambda mask: np.repeat(mask, 2, axis=1)[:, ::2],
        lambda mask: Image.fromarray(mask),
        lambda mask: _png(Image.fromarray(mask).convert("RGB")),
    ],
    ids=["levels", "three channels", "Fortran", "strided", "PIL 1", "PNG RGB"],
)
def test_every_form_of_mask_is_read(tmp_path: Path, form: Callable[[Any], Any], protocol: int) -> None:
    annotation = _annotation(_truth())
    for part in [annotation["background"], *annotation["instances"].values()]:
        part["original_image_mask"] = form(part["original_image_mask"])
    _assert_truth(_rebuilt(_write(tmp_path / "1.p.zl", annotation, protocol)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "form",
    [
        lambda delta: delta.astype(np.uint8),
        lambda delta: delta.astype(np.float64),
        lambda delta: np.asfortranarray(delta.astype(np.int64)),
        lambda delta: np.ascontiguousarray(delta.transpose(2, 0, 1)).transpose(1, 2, 0),  # neither C nor Fortran
        lambda delta: Image.fromarray(delta.astype(np.uint8)),
    ],
    ids=["u1", "f8", "Fortran", "planes", "PIL"],
)
def test_every_form_of_inpainted_content_is_read(tmp_path: Path, form: Callable[[Any], Any], protocol: int) -> None:
    annotation = _annotation(_truth())
    for part in [annotation["background"], *annotation["instances"].values()]:
        part["inpainted_delta"] = form(part["inpainted_delta"])
    _assert_truth(_rebuilt(_write(tmp_path / "1.p.zl", annotation, protocol)))


def test_differences_are_added_without_overflow(tmp_path: Path) -> None:
    annotation, image = _annotation(_truth()), recompose(_truth()).astype(np.int16)
    parts = [annotation["background"], *annotation["instances"].values()]
    for part, layer in zip(parts, _truth(), strict=True):
        part["original_image_mask"] = np.ones(SIZE, np.uint8)
        part["inpainted_delta"] = layer[..., :3] - image
    assert parts[0]["inpainted_delta"].min() < -128  # too small for a signed byte
    _assert_truth(_rebuilt(_write(tmp_path / "1.p.zl", annotation)))
    parts[0]["inpainted_delta"] = np.full((*SIZE, 3), 200)
    background = _rebuilt(_write(tmp_path / "2.p.zl", annotation))[0]
    np.testing.assert_array_equal(background[..., :3], (image + 200).clip(0, 255))


def test_module_names_of_older_numpy_are_read(tmp_path: Path) -> None:
    annotation = _annotation(_truth())
    two = pickle.dumps(annotation, 2)
    assert two.count(b"cnumpy._core.multiarray\n_reconstruct") == 1
    _assert_truth(_rebuilt(_write(tmp_path / "2.p.zl", two.replace(b"numpy._core.", b"numpy.core."))))
    five = pickle.dumps(annotation, 5)
    for name in (b"multiarray", b"numeric"):
        long, short = b"numpy._core." + name, b"numpy.core." + name
        assert long in five
        five = five.replace(b"\x8c" + bytes([len(long)]) + long, b"\x8c" + bytes([len(short)]) + short)
    assert five[2:3] == b"\x95"  # a frame, which starts with its length
    _assert_truth(_rebuilt(_write(tmp_path / "5.p.zl", five[:3] + struct.pack("<Q", len(five) - 11) + five[11:])))


class _Call:
    """Pickles as a call of any function with any arguments, followed by an optional state."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def test_images_pickled_by_older_pillow_are_read(tmp_path: Path) -> None:
    annotation = _annotation(_truth())
    for part in annotation["instances"].values():
        state = part["instance_alpha"].__getstate__()
        assert len(state) == 5
        part["instance_alpha"] = _Call(type(_png(part["instance_alpha"])), state=state)
    _assert_truth(_rebuilt(_write(tmp_path / "1.p.zl", annotation)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["top", "captioning", "instance_alpha", "object array", "state"])
def test_pickled_calls_are_not_run(tmp_path: Path, protocol: int, place: str) -> None:
    marker = tmp_path / "marker"
    annotation, trap = _annotation(_truth()), _Call(os.system, f"touch {marker}")
    if place == "top":
        annotation = trap  # type: ignore[assignment]
    elif place == "captioning":
        annotation["captioning"]["llava"] = [{"deep": (trap,)}]
    elif place == "instance_alpha":
        annotation["instances"][6]["instance_alpha"] = trap
    elif place == "object array":
        annotation["background"]["original_image_mask"] = np.array([[trap, 1], [1, 1]], object)
    else:
        annotation["background"]["original_image_mask"] = _Call(Image.Image, state=[{"exif": trap}, "L", (1, 1), None])
    content = pickle.dumps(annotation, protocol)
    with pytest.raises(InputError, match=r"1\.p\.zl: references posix\.system, .*no code was executed"):
        read_annotation(_write(tmp_path / "1.p.zl", content))
    assert not marker.exists()
    if place == "top":
        pickle.loads(content)
        assert marker.exists()  # the trap works


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "bytearray"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "memmap"),
        ("numpy.f2py", "compile"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("PIL.Image", "open"),
        ("_codecs", "decode"),
        ("copyreg", "_reconstructor"),
        ("layerdecomp.data.annotation", "_Picture"),
    ],
)
def test_other_globals_are_refused_and_named(tmp_path: Path, module: str, name: str) -> None:
    lines = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    stacked = b"\x80\x04" + b"".join(bytes([0x8C, len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    for content in (lines, stacked):
        with pytest.raises(InputError, match=rf"1\.p\.zl: references {module}\.{name},"):
            read_annotation(_write(tmp_path / "1.p.zl", content))


@pytest.mark.parametrize("name", [b"numpy\ndtype", b"PIL.Image\nImage", b"_codecs\nencode", b"numpy\nndarray"])
@pytest.mark.parametrize("state", [b"}X\x04\x00\x00\x00argsK\x01s", b"N}X\x04\x00\x00\x00argsK\x01s\x86"])
def test_a_pickle_cannot_alter_the_reader(tmp_path: Path, name: bytes, state: bytes) -> None:
    """`BUILD` on a global would set attributes of the object it names, for all files read later."""
    with pytest.raises(InputError, match=r"1\.p\.zl: not a pickle, or damaged"):
        read_annotation(_write(tmp_path / "1.p.zl", b"\x80\x02c" + name + b"\n" + state + b"b."))
    _assert_truth(_rebuilt(_write(tmp_path / "2.p.zl", _annotation(_truth()), 2)))


def _reconstructed(shape: Any, dtype: Any, data: Any) -> _Call:
    reconstruct = np.zeros((1, 1)).__reduce__()[0]
    return _Call(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


def _picture(mode: Any, size: Any, data: Any, palette: Any = None) -> _Call:
    return _Call(Image.Image, state=[{}, mode, size, palette, data])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([[{}, 1], [1, 1]], object), "dtype O8"),
        (np.array([["a", "b"]]), "dtype U1"),
        (np.zeros(SIZE, "M8[s]"), "dtype M8"),
        (np.zeros(SIZE, [("a", "u1")]), "dtype V1"),
        (np.zeros(SIZE, complex), "dtype c16"),
        (np.zeros(3), r"the shape is not \(H, W\)"),
        (np.zeros((1, 2, 3, 4)), r"the shape is not \(H, W\)"),
        (_reconstructed((0, 3), np.dtype("u1"), b"a"), r"the shape is not \(H, W\)"),
        (_reconstructed((10**9, 10**9), np.dtype("u1"), b"ab"), "more than 100,000,000 pixels"),
        (_reconstructed((2, 10**9, 2), np.dtype("u1"), b"ab"), "more than 100,000,000 pixels"),
        (_reconstructed((-1, -2), np.dtype("u1"), b"ab"), r"the shape is not"),
        (_reconstructed((2, 2), np.dtype("u1"), b"ab"), "reshape"),
        (_reconstructed((1, 2), np.dtype("u1"), [1, 2]), "list for bytes"),
        (_reconstructed((1, 2), "u1", b"ab"), "u1 for a dtype"),
        (_reconstructed((1, 2), _Call(np.dtype, "u1", state=(3, "2", None, None, None, -1, -1, 0)), b"ab"), "order 2"),
        (_reconstructed((1, 2), np.dtype("u1"), _Call(codecs.encode, "ab", "utf8")), "bytes in the encoding utf8"),
        (_picture("1", (10**6, 10**6), b"ab"), "more than 100,000,000 pixels"),
        (_picture("L", (3, 2), b"ab"), "not enough image data"),
        (_picture("L", (2, 2), 4), "int for bytes"),
        (_picture("CMYK", (1, 1), b"abcd"), "a picture of mode CMYK"),
        (_picture(["L"], (1, 1), b"a"), "a picture of mode list"),
        (_picture("P", (1, 1), b"a", ["x"]), "cannot be interpreted as an integer"),
        (np.float32(1), "_Record"),
        ([[1, 2], [3, 4]], "list"),
        (None, "NoneType"),
    ],
)
def test_invalid_arrays_and_images_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    annotation = _annotation(_truth())
    annotation["instances"][6]["original_image_mask"] = value
    for protocol in PROTOCOLS:
        path = _write(tmp_path / "1.p.zl", annotation, protocol)
        with pytest.raises(
            InputError, match=rf"1\.p\.zl: instance 2: original_image_mask cannot be read: .*{message}"
        ) as error:
            read_annotation(path)
        assert len(str(error.value)) < 400


def test_a_decompression_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = _write(tmp_path / "1.p.zl", bytes(100 << 20))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(InputError, match=r"1\.p\.zl: more than 1,048,576 bytes unpacked"):
        read_annotation(path, limit_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_size_limit_is_exact(tmp_path: Path) -> None:
    content = pickle.dumps(_annotation(_truth()))
    path = _write(tmp_path / "1.p.zl", content)
    read_annotation(path, limit_bytes=len(content))
    with pytest.raises(InputError, match=f"more than {len(content) - 1:,} bytes"):
        read_annotation(path, limit_bytes=len(content) - 1)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_content_of_several_chunks_is_read(tmp_path: Path, extra: int) -> None:
    annotation = _annotation(_truth())
    annotation["captioning"]["llava"] = ""
    short = len(pickle.dumps(annotation, 2))
    annotation["captioning"]["llava"] = "a" * ((4 << 20) - short + extra)
    for level in (0, 9):
        path = tmp_path / f"{level}.p.zl"
        path.write_bytes(zlib.compress(pickle.dumps(annotation, 2), level))
        assert len(zlib.decompress(path.read_bytes())) == (4 << 20) + extra
        _assert_truth(_rebuilt(path))


def test_a_large_memo_index_does_not_allocate_memory(tmp_path: Path) -> None:
    content = b"\x80\x02Nr" + struct.pack("<I", 1 << 24) + b"."
    with pytest.raises(InputError, match=r"1\.p\.zl: not a pickle, or damaged \(entry 16777216 of its memo"):
        read_annotation(_write(tmp_path / "1.p.zl", content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_missing_and_damaged_files_are_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "1.p.zl"
    with pytest.raises(InputError, match=r"1\.p\.zl cannot be read .*expected a MULAN annotation"):
        read_annotation(path)
    content = pickle.dumps(_annotation(_truth()), protocol)
    for end in (0, 1, 2, 50, -100, -5, -1):
        path.write_bytes(zlib.compress(content)[:end])
        with pytest.raises(InputError, match=r"1\.p\.zl: cut off after [\d,]+ bytes"):
            read_annotation(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"1\.p\.zl: not compressed by zlib, or damaged"):
        read_annotation(path)
    for length in (0, 1, 2, 3, 20, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(InputError, match=r"1\.p\.zl: not a pickle, or damaged"):
            read_annotation(_write(path, content[:length]))


def test_a_changed_byte_raises_an_input_error_or_nothing(tmp_path: Path) -> None:
    content = pickle.dumps(_annotation(_truth()), 4)
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(content), 300):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        try:
            _rebuilt(_write(tmp_path / "1.p.zl", bytes(changed)))
        except InputError:
            refused += 1
    assert 10 < refused < 300


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["background"], "no background; found captioning, image, instances, expected background, instances"),
        (["instances"], "no instances; found"),
        (["background", "inpainted_delta"], "background: no inpainted_delta; found original_image_mask, blip2"),
        (["background", "original_image_mask"], "background: no original_image_mask"),
        (["instances", 6, "instance_alpha"], "instance 2: no instance_alpha; found original_image_mask"),
        (["instances", 7, "original_image_mask"], "instance 1: no original_image_mask"),
    ],
)
def test_missing_keys_are_named(tmp_path: Path, keys: list[Any], message: str) -> None:
    annotation = _annotation(_truth())
    part = annotation
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    with pytest.raises(InputError, match=rf"1\.p\.zl: {message}"):
        read_annotation(_write(tmp_path / "1.p.zl", annotation))


@pytest.mark.parametrize("content", [[], "text", {}, {"background": 1, "instances": {1: 2}}])
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(InputError, match=r"1\.p\.zl: (background: )?no "):
        read_annotation(_write(tmp_path / "1.p.zl", content))


@pytest.mark.parametrize("instances", [{}, [], [1], None])
def test_an_annotation_without_objects_is_refused(tmp_path: Path, instances: Any) -> None:
    annotation = {**_annotation(_truth()), "instances": instances}
    with pytest.raises(InputError, match=r"1\.p\.zl: no instances; expected a dict"):
        read_annotation(_write(tmp_path / "1.p.zl", annotation))


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("instance_alpha", lambda value: np.asarray(value)[:-1], "is 17 x 11 pixels, the image 17 x 12; expected eq"),
        ("instance_alpha", lambda value: np.asarray(value).T, "is 12 x 17 pixels"),
        ("original_image_mask", lambda value: value[:, 1:], "is 16 x 12 pixels"),
        ("inpainted_delta", lambda value: value[1:], "is 17 x 11 pixels"),
        ("instance_alpha", lambda value: _truth()[0][..., :3], "is in colour; expected an alpha"),
        ("instance_alpha", lambda value: np.asarray(value) * 257.0, "numbers from 0 to 65535; expected 0 to 1"),
        ("original_image_mask", lambda value: value * -1.0, "numbers from -1 to"),
        ("original_image_mask", lambda value: value * np.nan, "numbers that are not finite"),
        ("inpainted_delta", lambda value: value * np.inf, "numbers that are not finite"),
        ("inpainted_delta", lambda value: value / 255, "numbers up to [0-9.]+; expected levels up to 255"),
        ("inpainted_delta", lambda value: value * 256, "numbers up to [0-9.e+]+; expected levels"),
        ("inpainted_delta", lambda value: np.zeros((*SIZE, 5)), r"\(12, 17, 5\) numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, form: Callable[[Any], Any], message: str
) -> None:
    annotation = _annotation(_truth())
    annotation["instances"][6][name] = form(annotation["instances"][6][name])
    with pytest.raises(InputError, match=rf"1\.p\.zl: layer 2: {name}:? ?{message}"):
        _rebuilt(_write(tmp_path / "1.p.zl", annotation))


def test_recompose_equals_compositing_with_over() -> None:
    layers = _truth(1)
    for layer in layers[1:]:
        layer[..., 3] = np.random.default_rng(2).integers(0, 256, SIZE)
    expected = torch.from_numpy(layers[0][..., :3]).permute(2, 0, 1).double()
    for layer in layers[1:]:
        straight = torch.from_numpy(layer).permute(2, 0, 1).double()
        straight[3] /= 255
        expected = over(straight, expected)
    np.testing.assert_array_equal(recompose(layers), expected.round().byte().permute(1, 2, 0).numpy())
    image = recompose(layers)
    assert misfit(layers, image) == 0
    assert misfit(layers, 255 - image) == pytest.approx(np.abs(255 - 2.0 * image).mean())


def _data_set(folder: Path) -> MulanAnnotations:
    """Two annotations, their pictures in subfolders, and an unrelated picture; colour profiles are ignored."""
    for seed, id in enumerate([ID, "000635517"]):
        layers = _truth(seed)
        _write(folder / "mulan" / f"part{seed}" / f"{id}.p.zl", _annotation(layers))
        picture = folder / "pictures" / f"of {seed}" / f"{id}.{'png' if seed else 'webp'}"
        picture.parent.mkdir(parents=True)
        Image.fromarray(recompose(layers)).save(picture, lossless=True, icc_profile=SWAPPED)
    Image.new("RGB", (3, 3)).save(folder / "pictures" / "000000000009.jpg")
    (folder / "pictures" / f"{ID}.json").write_text("{}")
    return MulanAnnotations(folder / "mulan", folder / "pictures", folder / "layers")


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_annotations_become_items(tmp_path: Path) -> None:
    reader = _data_set(tmp_path)
    assert reader.candidates() == [f"part0/{ID}.p.zl", "part1/000635517.p.zl"]
    items = [reader.read(candidate) for candidate in reader.candidates()]
    write_index(tmp_path / "index.safetensors", reader, items)
    index = Index(tmp_path / "index.safetensors")
    assert (index.source, index.kind, index.licence) == ("mulan", "layered", "CC BY-NC-SA 4.0")
    for item, seed, id in zip(index, [0, 1], [ID, "000635517"], strict=True):
        assert (item.id, item.path) == (id, f"images/{id}/layer_{{layer}}.png")
        assert (item.height, item.width, item.layers, item.rotation) == (*SIZE, 3, 0)
        for number, expected in enumerate(_truth(seed)):
            np.testing.assert_array_equal(_pixels(index.root / item.path.format(layer=number)), expected)
    assert sorted(path.name for path in (tmp_path / "layers" / "images").iterdir()) == [ID, "000635517"]
    others = MulanLayers(tmp_path / "layers", tmp_path / "pictures", max_misfit=0)
    assert [others.read(candidate) for candidate in others.candidates()] == items


def test_finished_layers_are_kept(tmp_path: Path) -> None:
    reader = _data_set(tmp_path)
    candidate, folder = f"part0/{ID}.p.zl", tmp_path / "layers" / "images" / ID
    leftover = folder.with_name(f".{ID}.01234567.partial")
    leftover.mkdir(parents=True)
    (leftover / "layer_9.png").write_text("of an interrupted run")
    item = reader.read(candidate)
    assert sorted(path.name for path in folder.iterdir()) == ["layer_0.png", "layer_1.png", "layer_2.png"]
    assert MulanLayers(tmp_path / "layers").candidates() == [f"images/{ID}/layer_{{layer}}.png"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (tmp_path / "mulan" / candidate).write_text("no longer readable")
    assert reader.read(candidate) == item
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "layer_1.png").unlink()
    with pytest.raises(InputError, match="layer 0, 2 found; expected at least two, numbered from 0"):
        reader.read(candidate)


def test_a_full_disk_leaves_no_partial_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, save, calls = _data_set(tmp_path), Image.Image.save, []

    def full_disk(self: Image.Image, path: Path, *args: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) < 2:
            return save(self, path, *args, **options)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    out = tmp_path / "mulan.safetensors"
    with pytest.raises(RunError, match=rf"{ID} could not be written .*No space left.* free some space .*rerun"):
        prepare(reader, out)  # ends: otherwise the annotation would be listed as faulty
    assert len(calls) == 2 and list((tmp_path / "layers" / "images").iterdir()) == []
    assert not out.exists() and (tmp_path / ".mulan.safetensors.journal").exists()
    monkeypatch.undo()
    assert all(outcome.item for outcome in prepare(reader, out))


def test_a_picture_that_does_not_match_its_annotation_is_refused(tmp_path: Path) -> None:
    reader, candidate = _data_set(tmp_path), f"part0/{ID}.p.zl"
    path = tmp_path / "pictures" / "of 0" / f"{ID}.webp"
    image = recompose(_truth())
    changed = np.where(image < 128, image + 9, image - 9).astype(np.uint8)
    Image.fromarray(changed).save(path, lossless=True)
    layers = rebuild_layers(read_annotation(tmp_path / "mulan" / candidate), changed)
    found = misfit(layers, changed)  # at soft edges only, since the visible pixels are the picture's own
    assert 0 < found < 8
    with pytest.raises(InputError, match=rf"{ID}\.p\.zl: its layers, recomposed, are .* of 255 away .*max_misfit"):
        MulanAnnotations(reader.annotations, reader.images, reader.root, max_misfit=found * 0.99).read(candidate)
    assert not (tmp_path / "layers" / "images" / ID).exists()
    assert reader.read(candidate).layers == 3
    Image.fromarray(image[:, :-1]).save(path, lossless=True)
    with pytest.raises(InputError, match="layers of 17 x 12 pixels, the image 16 x 12"):
        reader.read(candidate)


def test_missing_and_duplicate_pictures_and_missing_folders_are_refused(tmp_path: Path) -> None:
    reader, candidate = _data_set(tmp_path), f"part0/{ID}.p.zl"
    (tmp_path / "pictures" / "of 0" / f"{ID}.webp").rename(tmp_path / "pictures" / "other.webp")
    with pytest.raises(InputError, match=rf"its picture {ID} is not found below {tmp_path}/pictures .*COCO"):
        reader.read(candidate)
    twice = MulanAnnotations(reader.annotations, reader.images, reader.root)
    for name in (f"{ID}.png", f"{ID}.JPG"):
        Image.new("RGB", (3, 3)).save(tmp_path / "pictures" / name)
    with pytest.raises(InputError, match=rf"two pictures {ID}, .*leave one"):
        twice.read(candidate)
    for folders in ((tmp_path / "none", reader.images), (reader.annotations, tmp_path / "none")):
        with pytest.raises(InputError, match="none is not a folder"):
            MulanAnnotations(*folders, reader.root).candidates()


FLAT, NESTED = "123-layer_{layer}.png", "images/000000581346/layer_{layer}.png"


def _save_layers(root: Path, candidate: str, layers: list[np.ndarray]) -> None:
    for number, layer in enumerate(layers):
        path = root / candidate.format(layer=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(layer).save(path)


def test_flat_and_nested_layouts_are_found(tmp_path: Path) -> None:
    places = [FLAT, NESTED, "coco/7-layer_{layer}.png", "8/layer_{layer}.png"]
    for seed, candidate in enumerate(places):
        _save_layers(tmp_path, candidate, _truth(seed))
    _save_layers(tmp_path, "images/.9.partial/layer_{layer}.png", _truth())
    (tmp_path / "meta_data.csv").write_text("paths,blip2,llava\n")
    Image.new("RGB", (3, 3)).save(tmp_path / "layer_0.png")
    reader = MulanLayers(tmp_path)
    assert reader.candidates() == sorted(places)
    items = {candidate: reader.read(candidate) for candidate in places}
    assert [item.id for item in items.values()] == ["123", "000000581346", "7", "8"]
    for candidate, item in items.items():
        assert item.path == candidate
        assert (item.height, item.width, item.layers) == (*SIZE, 3)


def test_a_background_without_alpha_is_opaque(tmp_path: Path) -> None:
    layers = _truth()
    _save_layers(tmp_path, FLAT, [layers[0][..., :3], *layers[1:]])
    assert MulanLayers(tmp_path).read(FLAT).layers == 3


def _delete(number: int) -> Callable[[Path, str], None]:
    return lambda root, candidate: (root / candidate.format(layer=number)).unlink()


def _change(number: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, str], None]:
    def apply(root: Path, candidate: str) -> None:
        path = root / candidate.format(layer=number)
        Image.fromarray(change(_pixels(path))).save(path)

    return apply


def _with_a_translucent_pixel(layer: np.ndarray) -> np.ndarray:
    layer = layer.copy()
    layer[-1, -1, 3] = 254
    return layer


def _premultiplied_glass(layer: np.ndarray) -> np.ndarray:
    """Half-transparent everywhere; as random as the layer."""
    return np.dstack([layer[..., :3] // 2, np.full(SIZE, 128, np.uint8)])


def _truncate(root: Path, candidate: str) -> None:
    path = root / candidate.format(layer=2)
    path.write_bytes(path.read_bytes()[:200])


def _delete_all_objects(root: Path, candidate: str) -> None:
    _delete(1)(root, candidate)
    _delete(2)(root, candidate)


@pytest.mark.parametrize("candidate", [FLAT, NESTED])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_delete(0), "layer 1, 2 found; expected at least two, numbered from 0 without a gap"),
        (_delete(1), "layer 0, 2 found"),
        (_delete_all_objects, "layer 0 found"),
        (_change(1, lambda layer: layer[:-1]), "layer_1.png is 17 x 11 pixels, layer 0 17 x 12"),
        (_change(2, lambda layer: np.ascontiguousarray(layer[..., :3])), "layer_2.png has no alpha channel"),
        (_change(0, _with_a_translucent_pixel), "layer_0.png is transparent in places; expected an opaque"),
        (_change(0, lambda layer: layer[..., 0] * np.uint16(257)), "layer_0.png is greyscale with more than 8 bits"),
        (_change(2, _premultiplied_glass), "layer_2.png looks premultiplied: .*divide the colours by alpha"),
        (_truncate, "layer_2.png cannot be read as an image"),
    ],
    ids=["none below", "gap", "none above", "size", "no alpha", "not opaque", "deep", "premultiplied", "cut off"],
)
def test_layers_that_do_not_fit_are_refused(
    tmp_path: Path, candidate: str, damage: Callable[[Path, str], None], message: str
) -> None:
    _save_layers(tmp_path, candidate, _truth())
    MulanLayers(tmp_path).read(candidate)
    damage(tmp_path, candidate)
    reader = MulanLayers(tmp_path)
    assert reader.candidates() == [candidate]
    with pytest.raises(InputError, match=message):
        reader.read(candidate)


def test_rebuilt_layers_are_compared_with_the_picture(tmp_path: Path) -> None:
    layers = _truth()
    _save_layers(tmp_path / "layers", FLAT, layers)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "pictures" / "124.png")
    reader = MulanLayers(tmp_path / "layers", tmp_path / "pictures", max_misfit=0)
    assert reader.read(FLAT).layers == 3  # the picture is missing
    Image.fromarray(recompose(layers)).save(tmp_path / "pictures" / "123.png")
    assert MulanLayers(tmp_path / "layers", tmp_path / "pictures", max_misfit=0).read(FLAT).layers == 3
    swapped = copy.copy(layers)
    swapped[1], swapped[2] = layers[2], layers[1]
    _save_layers(tmp_path / "layers", FLAT, swapped)
    with pytest.raises(InputError, match=r"123-layer_\{layer\}\.png: its layers, recomposed, are [1-9][0-9.]* of 255"):
        MulanLayers(tmp_path / "layers", tmp_path / "pictures", max_misfit=1).read(FLAT)
    with pytest.raises(InputError, match="none is not a folder"):
        MulanLayers(tmp_path / "layers", tmp_path / "none").candidates()
