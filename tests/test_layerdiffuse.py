"""Cut-outs: which are refused, which look premultiplied, and the colours that invisible pixels get."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image, ImageFilter

from layerdecomp.data.alpha import looks_premultiplied
from layerdecomp.data.index import Item
from layerdecomp.data.layerdiffuse import ForegroundFolder, pad_colours
from layerdecomp.data.shapes import whole_shape
from layerdecomp.data.textures import photograph_crop, procedural
from layerdecomp.errors import InputError

SIDE = 96


def _blurred(alpha: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(alpha).filter(ImageFilter.GaussianBlur(radius)))


def _cut_out(seed: int, softness: float = 3.0, brightness: float = 1.0) -> np.ndarray:
    """(SIDE, SIDE, 4) uint8, straight alpha: a random shape of a random texture."""
    rng = np.random.default_rng(seed)
    texture = (photograph_crop if seed % 2 else procedural)(rng, SIDE, "train")
    alpha = (whole_shape(rng, SIDE, "train", 0.3) * 255).astype(np.uint8)
    return np.dstack([(texture * 255 * brightness).round().astype(np.uint8), _blurred(alpha, softness)])


def _premultiplied(rgba: np.ndarray) -> np.ndarray:
    return np.dstack([(rgba[..., :3] * (rgba[..., 3:] / 255)).round().astype(np.uint8), rgba[..., 3]])


def test_cut_outs_are_found_at_any_depth(tmp_path: Path) -> None:
    save_picture(_cut_out(0)[:80], tmp_path / "a.png")
    save_picture(_cut_out(1), tmp_path / "deep" / "er" / "b.webp")
    save_picture(_cut_out(2), tmp_path / "c.tif")
    save_picture(_cut_out(3)[..., :3], tmp_path / "preview.jpg")
    reader = ForegroundFolder(tmp_path, min_side=80)
    assert (reader.source, reader.kind) == ("layerdiffuse", "foregrounds")
    assert [reader.read(candidate) for candidate in reader.candidates()] == [
        Item("a", "a.png", SIDE, 80),
        Item("c", "c.tif", SIDE, SIDE),
        Item("deep/er/b", "deep/er/b.webp", SIDE, SIDE),
    ]


OPAQUE = np.dstack([_cut_out(0)[..., :3], np.full((SIDE, SIDE), 255, np.uint8)])
CLEAR = np.dstack([_cut_out(0)[..., :3], np.zeros((SIDE, SIDE), np.uint8)])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (_cut_out(0)[..., :3], r"has no alpha channel \(its mode is RGB\)"),
        (OPAQUE, "is opaque everywhere; expected alpha 0 around the object"),
        (CLEAR, "is transparent everywhere; expected an object"),
        (_cut_out(0)[:-1], "is 96 x 95 pixels; expected sides of at least 96: leave it out, or lower min_side="),
        (_premultiplied(_cut_out(0)), "looks premultiplied: .*divide the colours by alpha"),
    ],
    ids=["no alpha", "opaque", "clear", "small", "premultiplied"],
)
@pytest.mark.parametrize("format", ["png", "tif", "webp"])
def test_files_that_are_no_cut_outs_are_refused(tmp_path: Path, array: np.ndarray, message: str, format: str) -> None:
    if array is OPAQUE and format == "webp":
        message = "has no alpha channel"  # the encoder drops it
    reader = ForegroundFolder(tmp_path, min_side=SIDE)
    save_picture(array, tmp_path / f"a.{format}", **({"lossless": True} if format == "webp" else {}))
    with pytest.raises(InputError, match=rf"a\.{format} {message}"):
        reader.read(*reader.candidates())
    content = save_picture(_cut_out(0), tmp_path / f"a.{format}").read_bytes()
    assert reader.read(*reader.candidates()).width == SIDE
    (tmp_path / f"a.{format}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"a\.{format} cannot be read"):
        reader.read(*reader.candidates())


@pytest.mark.parametrize("softness", [0.7, 3, 9])
def test_premultiplied_colours_are_recognized(softness: float) -> None:
    straight = [_cut_out(seed, softness) for seed in range(40)]
    assert not any(looks_premultiplied(rgba) for rgba in straight)
    found = [looks_premultiplied(_premultiplied(rgba)) for rgba in straight]
    assert np.mean(found) > 0.85  # dark textures are missed


def test_noise_and_plain_white_look_premultiplied_only_if_they_are() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    white = np.dstack([np.full((SIDE, SIDE, 3), 255, np.uint8), _cut_out(0)[..., 3]])
    for rgba in (noise, white):
        assert not looks_premultiplied(rgba)
        assert looks_premultiplied(_premultiplied(rgba))


@pytest.mark.parametrize("brightness", [0.0, 0.02, 0.1, 0.3])
def test_dark_objects_are_not_premultiplied(brightness: float) -> None:
    assert not any(looks_premultiplied(_cut_out(seed, 6, brightness)) for seed in range(20))


def test_a_pane_of_constant_alpha_looks_premultiplied_only_if_it_is() -> None:
    glass = np.dstack([_cut_out(1)[..., :3] // 2 + 100, np.full((SIDE, SIDE), 120, np.uint8)])
    glass[:9] = 0
    assert not looks_premultiplied(glass) and looks_premultiplied(_premultiplied(glass))


def test_an_object_darker_than_its_high_alpha_looks_premultiplied_only_if_it_is() -> None:
    rgba = _cut_out(1, brightness=0.6)
    rgba[..., 3] = np.random.default_rng(0).integers(160, 255, (SIDE, SIDE))  # never below a colour
    assert not looks_premultiplied(rgba) and looks_premultiplied(_premultiplied(rgba))


@pytest.mark.parametrize("brightness", [0.1, 0.25, 0.5])
def test_a_dark_object_with_three_levels_of_alpha_is_not_premultiplied(brightness: float) -> None:
    """Its semi-transparent pixels have one alpha, which no colour exceeds: the opaque pixels tell."""
    for seed in range(20):
        rgba = _cut_out(seed, brightness=brightness)
        rgba[..., 3] = (rgba[..., 3] > 60) * 127 + (rgba[..., 3] > 190) * np.uint8(128)
        assert not looks_premultiplied(rgba)


def test_a_large_dark_pane_with_a_smooth_edge_is_not_premultiplied() -> None:
    """Few pixels lie on its edge, where alpha is below the colours."""
    alpha = np.zeros((800, 800), np.uint8)
    alpha[100:700, 100:700] = 128
    edges = np.asarray(Image.fromarray(alpha).resize((400, 400), box=(1, 1, 799, 799)))
    assert not looks_premultiplied(np.dstack([np.full((400, 400, 3), 25, np.uint8), edges]))


def test_a_dark_nearly_opaque_object_is_not_premultiplied() -> None:
    rgba = _cut_out(1, brightness=0.5)
    rgba[..., 3] = np.random.default_rng(0).integers(225, 250, (SIDE, SIDE))  # premultiplying would hardly change it
    assert (rgba[..., :3].max(axis=2) < rgba[..., 3]).all() and not looks_premultiplied(rgba)


@pytest.mark.parametrize("seed", range(6))
def test_black_shadows_are_not_premultiplied(seed: int) -> None:
    solid = _cut_out(seed, 1) / 255
    shadow = 0.6 * _blurred(_cut_out(seed, 1)[..., 3], 8)[..., None] / 255
    alpha = solid[..., 3:] + shadow * (1 - solid[..., 3:])
    colours = solid[..., :3] * solid[..., 3:] / alpha.clip(1e-6)
    assert not looks_premultiplied((np.dstack([colours, alpha]) * 255).round().astype(np.uint8))


def test_a_few_translucent_pixels_are_not_enough_to_look_premultiplied() -> None:
    rgba = _premultiplied(_cut_out(0))
    half = np.flatnonzero((rgba[..., 3] > 0) & (rgba[..., 3] < 255))
    rgba.reshape(-1, 4)[half[60:], 3] = 0
    assert len(half) > 200 and not looks_premultiplied(rgba)


def _layer(rgba: np.ndarray) -> torch.Tensor:
    """(H, W, 4) uint8 -> (4, H, W): colours in [-1, 1], alpha in [0, 1]."""
    layer = torch.from_numpy(rgba.copy()).permute(2, 0, 1).float() / 255
    return torch.cat([2 * layer[:3] - 1, layer[3:]])


@pytest.mark.parametrize("shape", [(96, 96), (1, 40), (37, 2), (50, 91)])
def test_padding_keeps_visible_pixels(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (*shape, 4), dtype=np.uint8)
    rgba[rng.random(shape) < 0.7, 3] = 0
    layer = _layer(rgba)
    before = layer.clone()
    padded = pad_colours(layer)
    visible = layer[3] > 0
    assert padded.shape == layer.shape and 0 < visible.sum() < visible.numel()
    assert layer.equal(before)
    assert padded[:, visible].equal(layer[:, visible]) and padded[3].equal(layer[3])
    assert (padded != layer).any(dim=0)[~visible].float().mean() > 0.9
    low, high = layer[:3, visible].amin(1)[:, None, None], layer[:3, visible].amax(1)[:, None, None]
    assert (padded[:3] >= low - 1e-5).all() and (padded[:3] <= high + 1e-5).all()


@pytest.mark.parametrize("shape", [(13, 27), (31, 1), (3, 5)])
def test_padding_spreads_the_colour_of_a_single_faint_pixel(shape: tuple[int, int]) -> None:
    colour = torch.tensor([-0.9, -0.1, 0.95])[:, None, None]
    for place in range(shape[0] * shape[1]):
        layer = torch.zeros(4, *shape)
        layer.flatten(1)[:, place] = torch.tensor([-0.9, -0.1, 0.95, 1 / 255])
        assert (pad_colours(layer)[:3] - colour).abs().max() < 1e-2


def test_padding_ignores_hidden_colours_and_follows_the_nearest_visible_ones() -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    rgba[20:44, 4:10] = 220, 30, 40, 255
    rgba[20:44, 54:60] = 20, 30, 240, 255
    other = rgba.copy()
    other[rgba[..., 3] == 0, :3] = 255 - rgba[rgba[..., 3] == 0, :3]
    assert pad_colours(_layer(other)).equal(pad_colours(_layer(rgba)))
    padded = (pad_colours(_layer(rgba))[:3].permute(1, 2, 0).numpy() + 1) * 127.5
    assert (abs(padded[20:44, 10:12] - (220, 30, 40)) < 40).all()
    assert (abs(padded[20:44, 52:54] - (20, 30, 240)) < 40).all()
    row = padded[32, 10:54, 0]
    assert (np.diff(row) <= 2).all() and row[0] - row[-1] > 120  # one colour fades into the other
    assert (abs(padded[..., 1] - 30) <= 1).all()  # the channel that both share is constant everywhere


def test_padding_spreads_a_constant_colour_exactly() -> None:
    layer = _layer(_cut_out(0))
    colour = torch.tensor([0.2, -0.5, 0.9])[:, None, None]
    layer[:3] = torch.where(layer[3:] > 0, colour, 0)
    torch.testing.assert_close(pad_colours(layer)[:3], colour.expand(3, *layer.shape[1:]), atol=1e-5, rtol=0)


def test_padding_leaves_opaque_and_clear_layers_unchanged() -> None:
    for rgba in (OPAQUE, CLEAR):
        assert pad_colours(_layer(rgba)).equal(_layer(rgba))
