"""Images of an index as training loads them: the same pixels that an evaluation reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from profiles import SWAPPED

from layerdecomp.data.folders import BackgroundFolder, TripletFolder, read_rgba
from layerdecomp.data.index import Index, write_index
from layerdecomp.data.loading import (
    Crop,
    load_background,
    load_foreground,
    load_layers,
    load_maps,
    load_parts,
    map_path,
    open_shrunk,
    random_crop,
)
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.errors import InputError
from layerdecomp.imaging.cues import CUES, REGISTRY
from layerdecomp.imaging.geometry import Box, to_pixels, to_tensor
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
        "background": Image.fromarray(noise(2).view(np.uint16)[..., 0]),  # 16 bits
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
    """Both files have a colour profile and are rotated by EXIF."""
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
    np.testing.assert_array_equal(np.asarray(load_foreground(path)), loaded[32:64, 64:96])
    predicted = PredictionFolder(tmp_path, ["a"]).read("a", torch.zeros(1, 3, SIDE, SIDE))[1]
    assert predicted is not None
    np.testing.assert_array_equal(to_pixels(predicted[0, :3]), loaded[..., :3])


def test_palette_images_are_averaged_when_shrunk(tmp_path: Path) -> None:
    Image.fromarray(noise(3)).quantize(64).save(tmp_path / "a.png")
    reader = BackgroundFolder(tmp_path)
    write_index(tmp_path / "i.safetensors", reader, [reader.read(reader.candidates()[0])])
    index = Index(tmp_path / "i.safetensors")
    background = load_background(index, index[0], (16, 16), np.random.default_rng(0))
    assert background.std() < 0.2  # averaged noise; nearest neighbours would keep its full strength


def background_of(path: Path, rotation: int = 0) -> np.ndarray:
    """A whole image (3, H, W), which is stored `rotation` degrees from upright."""
    item = replace(BackgroundFolder(path.parent).read(path.name), rotation=rotation)
    if rotation % 180:
        item = replace(item, width=item.height, height=item.width)
    write_index(path.with_suffix(".safetensors"), BackgroundFolder(path.parent), [item])
    size = (item.height, item.width)
    return load_background(Index(path.with_suffix(".safetensors")), item, size, np.random.default_rng(0)).numpy()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_background_is_rotated_counter_clockwise_as_its_index_says(tmp_path: Path, rotation: int) -> None:
    pixels = noise(3)[:, :80]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = to_tensor(np.rot90(pixels, rotation // 90))[0].numpy()
    np.testing.assert_array_equal(background_of(tmp_path / "a.png", rotation), expected)


@pytest.mark.parametrize(("orientation", "quarters"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_a_background_is_rotated_by_its_exif_orientation(tmp_path: Path, orientation: int, quarters: int) -> None:
    pixels, exif = noise(3)[:, :80], Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = to_tensor(np.rot90(pixels, quarters))[0].numpy()
    np.testing.assert_array_equal(background_of(tmp_path / "a.png"), expected)


def test_a_large_jpeg_is_decoded_at_the_smallest_sufficient_size_and_cropped_as_at_full_size(tmp_path: Path) -> None:
    path, size = tmp_path / "a.jpg", (96, 96)
    Image.fromarray(noise(3)[:5, :12]).resize((780, 200), Image.Resampling.BICUBIC).save(path, quality=95)
    item = BackgroundFolder(tmp_path).read("a.jpg")
    write_index(tmp_path / "a.safetensors", BackgroundFolder(tmp_path), [item])
    assert open_shrunk(path, item, size).size == (390, 100)  # a quarter would have 50 rows
    found = load_background(Index(tmp_path / "a.safetensors"), item, size, np.random.default_rng(3))
    crop = random_crop((780, 200), size, np.random.default_rng(3))
    expected = to_tensor(np.asarray(crop.apply(Image.fromarray(read_image(path)), path)))[0]
    assert (found - expected).abs().mean() < 0.02 < 0.1 * expected.std()


def layered(root: Path) -> Index:
    """An index of one image with two layers."""
    for number, pixels in enumerate((noise(3), noise(4))):
        Image.fromarray(pixels).save(root / f"a-layer_{number}.png")
    reader = MulanLayers(root)
    write_index(root / "index.safetensors", reader, [reader.read(reader.candidates()[0])])
    return Index(root / "index.safetensors")


def test_16_bit_grey_layers_are_refused(tmp_path: Path) -> None:
    index = layered(tmp_path)
    assert [picture.mode for picture in load_layers(index, index[0])] == ["RGBA", "RGBA"]
    Image.fromarray(noise(2).view(np.uint16)[..., 0]).save(tmp_path / "a-layer_0.png")
    with pytest.raises(InputError, match=r"a-layer_0\.png is greyscale with more than 8 bits"):
        load_layers(index, index[0])


def map_of(pixels: np.ndarray, cue: str, size: tuple[int, int], box: Box) -> np.ndarray:
    """The crop `box` of a grey map, resized for a cue: (*size) in [-1, 1]."""
    crop = Crop(pixels.shape[1::-1], box, size)
    picture = Image.fromarray(pixels).convert("RGB")
    fitted = crop.apply(picture, Path("map.png"), REGISTRY[cue].resize)
    values = to_tensor(np.asarray(fitted))[0].numpy()
    assert (values == values[:1]).all()
    return values[0]


@pytest.mark.parametrize("side", [24, 100, 128, 300])
def test_lines_of_a_resized_edge_map_are_neither_lost_nor_grey(side: int) -> None:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[:, 77], pixels[40] = 255, 200  # the second as a lossy file would store it
    edges = map_of(pixels, "edge", (side, side), (0, 0, SIDE, SIDE))
    assert set(np.unique(edges)) == {-1, 1}
    assert (edges[:, int(77.5 * side / SIDE)] == 1).all() and (edges[int(40.5 * side / SIDE)] == 1).all()
    assert (edges == 1).mean() < 4 / min(side, SIDE)


def test_an_edge_map_is_cropped_like_its_image() -> None:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[:, 20] = 255
    edges = map_of(pixels, "edge", (32, 32), (8, 0, 72, 64))
    assert np.flatnonzero(edges[0] == 1).tolist() == [6]  # two pixels become one


def test_segments_of_a_resized_map_do_not_blend() -> None:
    pixels = np.where(np.arange(SIDE) < 50, 30, 220).astype(np.uint8)[None].repeat(SIDE, 0)
    segments = map_of(pixels, "segmentation", (47, 47), (0, 0, SIDE, SIDE))
    np.testing.assert_array_equal(np.unique(segments), np.float32([30, 220]) / np.float32(127.5) - 1)
    assert (segments[:, :18] < 0).all() and (segments[:, 19:] > 0).all()


def test_each_map_is_resized_as_its_cue_needs(tmp_path: Path) -> None:
    index = layered(tmp_path)
    stripes = np.where(np.arange(SIDE) % 8 < 3, 255, 0).astype(np.uint8)[None].repeat(SIDE, 0)
    for cue in CUES:
        path = map_path(index.root, index[0], cue)
        path.parent.mkdir()
        Image.fromarray(stripes).save(path)
    maps = load_maps(index, index[0], Crop((SIDE, SIDE), (0, 0, SIDE, SIDE), (50, 50)))
    levels = {cue: len(values.unique()) for cue, values in maps.items()}
    assert levels["edge"] == levels["segmentation"] == 2 < levels["depth"]
