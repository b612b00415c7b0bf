"""Pictures of an index as training sees them: the same pixels that an evaluation reads."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from profiles import SWAPPED

from layerdecomp.data.folders import BackgroundFolder, TripletFolder, read_rgba
from layerdecomp.data.index import Index, write_index
from layerdecomp.data.loading import load_background, load_foreground, load_parts
from layerdecomp.imaging.geometry import to_pixels
from layerdecomp.imaging.layers import read_image
from layerdecomp.predictions import PredictionFolder

SIDE = 128


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)


def test_parts_of_a_triplet_are_read_as_an_evaluation_reads_them(tmp_path: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:64, 32:64] = 255
    pictures = {
        "image": Image.fromarray(noise(4)),  # transparent in places
        "mask": Image.fromarray(mask),
        "foreground": Image.fromarray(noise(4)),
        "background": Image.fromarray(noise(2).view(np.uint16)[..., 0]),  # of 16 bits
    }
    for part, picture in pictures.items():
        (tmp_path / part).mkdir()
        picture.save(tmp_path / part / "a.png")
    reader = TripletFolder(tmp_path)
    item = reader.read(reader.candidates()[0])
    write_index(tmp_path / "index.safetensors", reader, [item])
    index = Index(tmp_path / "index.safetensors")
    image, foreground, background = load_parts(index, index[0], ["image", "foreground", "background"])
    np.testing.assert_array_equal(np.asarray(image), read_image(tmp_path / "image" / "a.png"))
    np.testing.assert_array_equal(np.asarray(background), read_image(tmp_path / "background" / "a.png"))
    np.testing.assert_array_equal(np.asarray(foreground), noise(4))


def test_a_foreground_has_the_colours_of_its_image(tmp_path: Path) -> None:
    """Both in a colour space of their own, and lying on their side."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:64, 32:64] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([noise(3), mask])
    for part, pixels in {"image": rgba[..., :3], "mask": mask, "foreground": rgba, "background": noise(3)}.items():
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "a.png", icc_profile=SWAPPED, exif=exif)
    reader = TripletFolder(tmp_path)
    write_index(tmp_path / "index.safetensors", reader, [reader.read(reader.candidates()[0])])
    index = Index(tmp_path / "index.safetensors")
    path = tmp_path / "foreground" / "a.png"
    image, loaded = (np.asarray(part) for part in load_parts(index, index[0], ["image", "foreground"]))
    np.testing.assert_allclose(image.astype(int), np.rot90(noise(3), -1)[..., ::-1], atol=2)
    np.testing.assert_array_equal(loaded, np.dstack([image, np.rot90(mask, -1)]))
    np.testing.assert_array_equal(read_rgba(path), loaded)
    np.testing.assert_array_equal(np.asarray(load_foreground(path, index[0])), loaded[32:64, 64:96])
    predicted = PredictionFolder(tmp_path, ["a"]).read("a", torch.zeros(1, 3, SIDE, SIDE))[1]
    assert predicted is not None
    np.testing.assert_array_equal(to_pixels(predicted[0, :3]), loaded[..., :3])


def test_pictures_with_a_palette_are_shrunk_as_others_are(tmp_path: Path) -> None:
    Image.fromarray(noise(3)).quantize(64).save(tmp_path / "a.png")
    reader = BackgroundFolder(tmp_path)
    write_index(tmp_path / "i.safetensors", reader, [reader.read(reader.candidates()[0])])
    index = Index(tmp_path / "i.safetensors")
    background = load_background(index, index[0], (16, 16), np.random.default_rng(0))
    assert background.std() < 0.2  # noise that was averaged; its nearest pixels alone would be as strong as before
