"""Shapes: areas, placement, anti-aliasing, and families that only the test split has."""

import numpy as np
import pytest

from layerdecomp.data.shapes import SHAPES, draw_shape, inpainting_mask, placed, scaled, whole_shape


@pytest.mark.parametrize("split", ["train", "test"])
def test_whole_shapes_have_about_the_requested_area_and_anti_aliased_edges(split: str) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        goal = rng.uniform(0.05, 0.25)
        matte = whole_shape(rng, 128, split, goal)
        assert matte.shape == (128, 128) and matte.dtype == np.float32 and matte.max() == 1 and matte.min() == 0
        assert 0.6 * goal < matte.mean() < 1.15 * goal
        partial = ((matte > 0.05) & (matte < 0.95)).sum()
        assert partial > 2 * np.sqrt((matte > 0.5).sum())  # along the whole outline


def test_a_stamp_is_cut_off_at_the_border() -> None:
    rng = np.random.default_rng(0)
    stamp = scaled(draw_shape(rng, 64, "train"), 0.2, rng, 64)
    inside, outside = placed(stamp, 5, 5, 64), placed(stamp, -stamp.width // 2, 60 - stamp.height, 64)
    assert 0 < outside.sum() < 0.9 * inside.sum()
    assert not placed(stamp, 64, 0, 64).any()


def test_the_test_split_has_unseen_families_and_glyphs() -> None:
    train, test = SHAPES["train"], SHAPES["test"]
    assert set(test.families) - set(train.families) == {"crescent", "silhouette"}
    assert not set(train.glyphs) & set(test.glyphs)


def test_shapes_differ() -> None:
    mattes = np.stack([whole_shape(np.random.default_rng(seed), 64, "train", 0.2) for seed in range(30)])
    assert len(np.unique(mattes.reshape(30, -1), axis=0)) == 30


def test_inpainting_masks_cover_5_to_50_percent() -> None:
    masks = np.stack([inpainting_mask(np.random.default_rng(seed), 64) for seed in range(60)])
    areas = masks.mean(axis=(1, 2))
    assert masks.dtype == bool and areas.min() >= 0.05 and areas.max() <= 0.5 and areas.std() > 0.05
