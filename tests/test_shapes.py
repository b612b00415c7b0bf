"""Shapes: areas, placement, anti-aliasing, and families that only the test split has."""

import numpy as np
import pytest
from PIL import Image

from layerdecomp.data.shapes import _FAMILIES, MARGIN, SHAPES, draw_shape, inpainting_mask, placed, scaled, whole_shape


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


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_a_stamp_fits_the_image_and_changes_its_aspect_by_up_to_a_third(size: tuple[int, int]) -> None:
    drawing = Image.new("L", size, 255)
    large, small = (
        [scaled(drawing, area, np.random.default_rng(seed), 256) for seed in range(20)] for area in (0.9, 0.05)
    )
    for stamp in large:
        assert max(stamp.size) == pytest.approx(MARGIN * 256, abs=1)
    changes = np.log([stamp.width / stamp.height / (size[0] / size[1]) for stamp in small])
    assert -0.35 < changes.min() < -0.1 and 0.1 < changes.max() < 0.35
    assert all(stamp.width * stamp.height == pytest.approx(0.05 * 256**2, rel=0.05) for stamp in small)


def test_rings_have_a_hole_and_the_others_a_filled_centre() -> None:
    for family in ("ring", "super_ellipse", "polygon", "star", "blob"):
        for seed in range(10):
            drawing = np.asarray(_FAMILIES[family](np.random.default_rng(seed), 90))
            assert (drawing[45, 45] == 255) == (family != "ring") and drawing.max() == 255
            assert max(np.ptp(axis) for axis in np.nonzero(drawing)) > 42  # its outline fills the drawing


def test_a_silhouette_is_a_horse_that_faces_either_side() -> None:
    drawings = [_FAMILIES["silhouette"](np.random.default_rng(seed), 90) for seed in range(12)]
    ink = [np.asarray(drawing) > 127 for drawing in drawings]
    assert all(0.05 < pixels.mean() < 0.4 and not pixels[[0, -1]].any() for pixels in ink)
    heads = [np.nonzero(pixels[: len(pixels) // 3])[1].mean() / pixels.shape[1] for pixels in ink]
    assert min(heads) < 0.45 and max(heads) > 0.55


def test_shapes_are_cropped_to_their_bounds() -> None:
    for seed in range(20):
        drawing = draw_shape(np.random.default_rng(seed), 32, "test")
        assert drawing.getbbox() == (0, 0, *drawing.size)


def test_a_stamp_is_cut_off_at_the_border() -> None:
    rng = np.random.default_rng(0)
    stamp = scaled(draw_shape(rng, 64, "train"), 0.2, rng, 64)
    inside, outside = placed(stamp, 5, 5, 64), placed(stamp, -stamp.width // 2, 60 - stamp.height, 64)
    assert 0 < outside.sum() < 0.9 * inside.sum()
    assert not placed(stamp, 64, 0, 64).any() and placed(stamp, 0, 60, 64)[60:, : stamp.width].any()
    whole = np.asarray(stamp, np.float32) / 255
    assert np.array_equal(outside[60 - stamp.height : 60, : stamp.width // 2], whole[:, -(stamp.width // 2) :])
    assert np.array_equal(inside[5 : 5 + stamp.height, 5:][:, : stamp.width], whole[:, : 64 - 5])


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
