"""Photographs are bundled with scikit-image, not downloaded; textures are varied and in range."""

from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.data.textures import (
    _FIELDS,
    DISTINCT,
    PHOTOGRAPHS,
    _coloured,
    _grid,
    _rotated_grid,
    _wave,
    many_coloured,
    material,
    noise,
    photograph,
    photograph_crop,
    procedural,
)
from layerdecomp.errors import InputError


def test_splits_share_no_photograph() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    assert set(PHOTOGRAPHS["test"]) == {"coffee.png", "rocket.jpg"}


@pytest.mark.parametrize("name", [name for split in PHOTOGRAPHS.values() for name in split])
def test_photographs_are_bundled_and_halved(name: str) -> None:
    levels = photograph(name)
    assert min(levels[0].size) >= 300 and 128 <= min(levels[-1].size) < 256
    assert np.asarray(levels[-1]).std() > 5
    assert photograph(name) is levels


def test_levels_are_the_photograph_itself() -> None:
    assert (np.asarray(photograph("coffee.png")[0]) == skimage.data.coffee()).all()


def test_a_missing_photograph_is_named() -> None:
    with pytest.raises(InputError, match="nowhere.png"):
        photograph("nowhere.png")


@pytest.mark.parametrize("size", [16, 128, 512])
@pytest.mark.parametrize("split", ["train", "test"])
def test_crops_are_varied_and_in_range(size: int, split: str) -> None:
    crops = np.stack([photograph_crop(np.random.default_rng(seed), size, split) for seed in range(12)])
    assert crops.shape == (12, size, size, 3) and crops.dtype == np.float32
    assert crops.min() >= 0 and crops.max() <= 1
    assert crops.std(axis=(1, 2, 3)).mean() > 0.1
    assert len({crop.tobytes() for crop in crops}) == 12


@pytest.mark.parametrize("size", [16, 90, 300])
def test_a_crop_is_an_upright_square_of_the_photograph(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, rows = np.meshgrid(np.arange(400) * 255 / 399, np.arange(300) * 255 / 399)
    ramp = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8))
    monkeypatch.setattr("layerdecomp.data.textures.photograph", lambda _: (ramp, ramp.reduce(2), ramp.reduce(4)))
    monkeypatch.setattr("layerdecomp.data.textures._jittered", lambda crop, rng: crop)
    monkeypatch.setitem(PHOTOGRAPHS, "train", {"ramp.png": 1})
    sides, flipped = [], 0
    for seed in range(20):
        crop = photograph_crop(np.random.default_rng(seed), size, "train")
        across, down = crop[:, -1, 0] - crop[:, 0, 0], crop[-1, :, 1] - crop[0, :, 1]
        flipped += int(across.mean() < 0)
        assert down.min() > 0 and np.ptp(across) < 0.02 and abs(abs(across.mean()) - down.mean()) < 0.02
        sides.append(down.mean() * 399 * size / (size - 1))
    assert min(sides) > 0.75 * min(size, 300) - 6 and max(sides) < 306 and 4 < flipped < 16
    assert size == 300 or np.ptp(sides) > 100


@pytest.mark.parametrize("make", [material, many_coloured])
def test_objects_stand_out_from_their_surroundings(make: Callable[..., NDArray[np.float32]]) -> None:
    for surroundings in (np.full((5, 3), 0.5, np.float32), np.array([[0.9, 0.1, 0.2], [0.7, 0.2, 0.2]], np.float32)):
        textures = np.stack([make(np.random.default_rng(seed), 32, "train", surroundings) for seed in range(40)])
        assert textures.shape == (40, 32, 32, 3) and textures.dtype == np.float32
        assert textures.min() >= 0 and textures.max() <= 1
        means = textures.mean(axis=(1, 2))
        distances = np.linalg.norm(means[:, None] - surroundings, axis=-1).mean(axis=1)
        crops = np.stack([photograph_crop(np.random.default_rng(seed), 32, "train") for seed in range(40)])
        usual = np.linalg.norm(crops.mean(axis=(1, 2))[:, None] - surroundings, axis=-1).mean()
        assert distances.min() > DISTINCT - 0.1 if make is material else distances.mean() > 1.1 * usual


def test_a_palette_is_spread_over_the_field() -> None:
    palette = np.random.default_rng(0).random((3, 3))
    field = np.array([[0, 0.25, 0.5, 1]], np.float32)
    np.testing.assert_allclose(
        _coloured(field, palette)[0], [palette[0], palette[:2].mean(axis=0), palette[1], palette[2]], rtol=1e-6
    )


def test_noise_is_rougher_the_more_its_octaves_persist() -> None:
    def roughness(persistence: float) -> float:
        return float(np.abs(np.diff(noise(np.random.default_rng(0), 64, persistence=persistence))).mean())

    assert roughness(0.2) < 0.6 * roughness(0.5) < 0.5 * roughness(1.0)


def test_bands_are_counted_per_unit_and_do_not_alias() -> None:
    position = np.tile(np.linspace(0, 1, 257, dtype=np.float32)[:256], (256, 1))
    for sharpness in (0.5, 100):
        bands = _wave(position, frequency=8, sharpness=sharpness)[0] > 0.5
        assert (bands[1:] & ~bands[:-1]).sum() in (7, 8)
    assert np.abs(np.diff(_wave(position, frequency=8, sharpness=100)[0])).max() < 0.55  # an edge takes two pixels


def test_a_rotated_grid_keeps_distances() -> None:
    (x, y), (u, v) = _grid(9), _rotated_grid(np.random.default_rng(0), 9)
    np.testing.assert_allclose(np.hypot(u, v), np.hypot(x, y), rtol=1e-5, atol=1e-6)
    assert np.abs(u - x).max() > 0.1


@pytest.mark.parametrize("split", ["train", "test"])
def test_procedural_textures_are_varied_and_in_range(split: str) -> None:
    textures = np.stack([procedural(np.random.default_rng(seed), 64, split) for seed in range(60)])
    assert textures.shape == (60, 64, 64, 3) and textures.dtype == np.float32
    assert textures.min() >= 0 and textures.max() <= 1
    assert textures.std(axis=(1, 2)).max(axis=1).min() > 0.02  # none is uniform
    assert (procedural(np.random.default_rng(7), 64, split) == textures[7]).all()


def test_half_of_the_test_textures_are_of_unseen_families() -> None:
    seen, drawn = set(_FIELDS["train"]), _FIELDS["test"]
    assert seen < set(drawn)
    assert 2 * sum(make not in seen for make in drawn) == len(drawn)
