"""Layered files: other libraries read the same layers back, which composite to the preview."""

import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from psd_tools import PSDImage

from layerdecomp.imaging.layered import Raster
from layerdecomp.imaging.layers import Layers

HEIGHT, WIDTH, TOP, LEFT = 40, 61, 9, 14


def _layers(height: int = HEIGHT, width: int = WIDTH) -> Layers:
    """A foreground of every alpha from 0 to 255 on 16 x 18 pixels, colour below alpha 0 included."""
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    foreground = np.zeros((height, width, 4), np.uint8)
    foreground[TOP : TOP + 16, LEFT : LEFT + 18] = rng.integers(0, 256, (16, 18, 4))
    alpha = np.r_[np.arange(256), np.full(32, 255)].reshape(16, 18).astype(np.uint8)
    alpha[0], alpha[:, 0] = 200, 100  # makes the whole rectangle its bounding box
    foreground[TOP : TOP + 16, LEFT : LEFT + 18, 3] = alpha
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Layers(image, foreground[..., 3] > 127, background, foreground)


def _placed(layers: list[tuple[NDArray[np.uint8], int, int]], height: int, width: int) -> NDArray[np.uint8]:
    """Layers (pixels, left, top), from the bottom to the top, composited as image editors do."""
    canvas = np.zeros((height, width, 3))
    for pixels, left, top in layers:
        alpha = pixels[..., 3:] / 255
        place = canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]]
        place[:] = pixels[..., :3] * alpha + place * (1 - alpha)
    return canvas.round().astype(np.uint8)


def _last_panel(preview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return preview[:, -WIDTH:]


def test_openraster_keeps_the_layers_and_composites_to_the_preview(tmp_path: Path) -> None:
    layers = _layers()
    layers.save(tmp_path, ["ora"])
    with zipfile.ZipFile(tmp_path / "layers.ora") as file:
        first = file.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        assert file.read("mimetype") == b"image/openraster"
        image = ElementTree.fromstring(file.read("stack.xml"))
        assert image.tag == "image" and (image.get("w"), image.get("h")) == (str(WIDTH), str(HEIGHT))
        found = {}
        for layer in image.findall("stack/layer"):  # topmost first
            with file.open(str(layer.get("src"))) as png:
                pixels = np.asarray(Image.open(png).convert("RGBA"))
            found[layer.get("name")] = (pixels, int(layer.get("x", 0)), int(layer.get("y", 0)))
            assert (layer.get("opacity"), layer.get("composite-op")) == ("1.0", "svg:src-over")
        assert list(found) == ["foreground", "background"]
        merged = np.asarray(Image.open(file.open("mergedimage.png")))
        assert max(Image.open(file.open("Thumbnails/thumbnail.png")).size) <= 256
    pixels, left, top = found["foreground"]
    assert (left, top, pixels.shape) == (LEFT, TOP, (16, 18, 4))
    np.testing.assert_array_equal(pixels, layers.foreground[TOP : TOP + 16, LEFT : LEFT + 18])
    np.testing.assert_array_equal(found["background"][0][..., :3], layers.background)
    recomposed = _placed([found["background"], found["foreground"]], HEIGHT, WIDTH)
    np.testing.assert_array_equal(recomposed, _last_panel(layers.preview()))
    np.testing.assert_array_equal(merged, recomposed)


def test_photoshop_keeps_the_layers_and_composites_to_the_preview(tmp_path: Path) -> None:
    layers = _layers()
    layers.save(tmp_path, ["psd"])
    document = PSDImage.open(tmp_path / "layers.psd")
    assert document.size == (WIDTH, HEIGHT) and document.depth == 8
    background, foreground = document  # bottom to top
    assert (background.name, foreground.name) == ("background", "foreground")
    assert foreground.offset == (LEFT, TOP) and not foreground.has_mask() and foreground.is_visible()
    read = [np.asarray(layer.topil()) for layer in (background, foreground)]
    np.testing.assert_array_equal(read[1], layers.foreground[TOP : TOP + 16, LEFT : LEFT + 18])
    np.testing.assert_array_equal(read[0][..., :3], layers.background)
    recomposed = _placed([(read[0], 0, 0), (read[1], LEFT, TOP)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(recomposed, _last_panel(layers.preview()))
    with Image.open(tmp_path / "layers.psd") as picture:  # Pillow reads the merged image, as viewers without layers do
        assert [layer[:1] + layer[2:3] for layer in picture.layers] == [  # type: ignore[attr-defined]
            ("background", (0, 0, WIDTH, HEIGHT)),
            ("foreground", (LEFT, TOP, LEFT + 18, TOP + 16)),
        ]
        stored = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(stored - recomposed).max() <= 1


@pytest.mark.parametrize("format", ["ora", "psd"])
def test_the_same_layers_give_the_same_bytes(tmp_path: Path, format: str) -> None:
    files = [_layers().save(tmp_path / name, [format]) / f"layers.{format}" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_large_images_get_a_small_thumbnail(tmp_path: Path) -> None:
    _layers(600, 300).save(tmp_path, ["ora"])
    with zipfile.ZipFile(tmp_path / "layers.ora") as file:
        assert Image.open(file.open("Thumbnails/thumbnail.png")).size == (128, 256)


@pytest.mark.parametrize(
    ("visible", "box"),
    [([], (0, 0, 1, 1)), ([(2, 3)], (3, 2, 1, 1)), ([(0, 4), (5, 6)], (4, 0, 3, 6)), ([(0, 0), (5, 6)], (0, 0, 7, 6))],
)
def test_layers_are_cropped_to_visible_pixels(visible: list[tuple[int, int]], box: tuple[int, int, int, int]) -> None:
    pixels = np.full((6, 7, 4), (9, 9, 9, 0), np.uint8)
    for row, column in visible:
        pixels[row, column, 3] = 1
    raster = Raster("a", pixels, left=20, top=30).cropped()
    assert (raster.left - 20, raster.top - 30, raster.pixels.shape[1], raster.pixels.shape[0]) == box
    assert (raster.pixels[..., 3] > 0).sum() == len(visible)
