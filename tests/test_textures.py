"""Photographs are bundled with scikit-image, not downloaded; textures are varied and in range."""

import numpy as np
import pytest
import skimage.data

from layerdecomp.data.textures import _FIELDS, PHOTOGRAPHS, photograph, photograph_crop, procedural
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
