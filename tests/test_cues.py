"""Cue maps of images with known edges and segments."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.imaging.cues import CUES, REGISTRY, compute_cues, edge_map, resize_lines, segmentation_map


def _two_halves() -> NDArray[np.uint8]:
    """Red on the left, blue on the right, with a little noise; 64 x 96."""
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    image[:, :48], image[:, 48:] = (200, 40, 40), (40, 40, 200)
    return image + np.random.default_rng(0).integers(0, 4, image.shape, dtype=np.uint8)


def test_cues_have_fixed_order_shape_and_range_and_depth_is_absent() -> None:
    cues, present = compute_cues(_two_halves())
    assert CUES[:3] == ("edge", "segmentation", "depth")  # `decompose(cues=...)` relies on it
    assert cues.shape == (len(CUES), 3, 64, 96) and cues.dtype == np.float32 and np.abs(cues).max() <= 1
    assert present.tolist() == [cue != "depth" for cue in CUES]
    assert cues.any(axis=(1, 2, 3)).tolist() == present.tolist()


def test_edges_are_where_the_colour_changes() -> None:
    edges = edge_map(np.asarray(_two_halves()))[0]
    assert set(np.unique(edges)) == {-1, 1}
    assert (edges[4:-4, 46:50].max(axis=1) == 1).all()
    assert (edges[:, :40] == -1).all() and (edges[:, 56:] == -1).all()


def test_edge_cue_has_three_equal_channels() -> None:
    edge = compute_cues(_two_halves())[0][0]
    assert (edge == edge[:1]).all() and (edge == 1).any()


def test_segments_have_the_mean_colour_of_their_pixels() -> None:
    image = _two_halves()
    segments = segmentation_map(image)
    for part in (np.s_[:, :48], np.s_[:, 48:]):
        mean = image[part].reshape(-1, 3).mean(axis=0) / 127.5 - 1
        painted = segments[(slice(None), *part)].reshape(3, -1)
        np.testing.assert_allclose(painted[:, len(painted[0]) // 2], mean, atol=0.05)
        assert len(np.unique(painted[0])) <= 3


@pytest.mark.parametrize(
    ("size", "segmented"), [((400, 1200), (128, 384)), ((1, 1200), (1, 384)), ((64, 96), (64, 96))]
)
def test_large_images_are_segmented_at_a_longer_side_of_384(
    size: tuple[int, int], segmented: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def halves(image: NDArray[np.uint8], **_: Any) -> NDArray[np.int64]:
        seen.append(image.shape[:2])
        return np.broadcast_to(np.arange(image.shape[1]) >= image.shape[1] // 2, image.shape[:2]).astype(int)

    monkeypatch.setattr("layerdecomp.imaging.cues.felzenszwalb", halves)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    segments = segmentation_map(image)
    assert seen == [segmented]
    for part in np.split(np.arange(size[1]), 2):
        mean = image[:, part].mean(axis=(0, 1)) / 127.5 - 1
        np.testing.assert_allclose(
            segments[:, :, part], mean[:, None, None].repeat(size[0], 1).repeat(len(part), 2), atol=1e-5
        )


def test_a_patch_of_one_percent_is_a_segment() -> None:
    image = np.full((100, 100, 3), 60, np.uint8)
    image[40:50, 40:50] = 250
    painted = segmentation_map(image)
    assert painted[0, 45, 45] - painted[0, 10, 10] > 1


@pytest.mark.parametrize("cue", CUES)
def test_a_resized_box_equals_the_resized_crop(cue: str) -> None:
    rng, box = np.random.default_rng(0), (8, 4, 56, 36)
    picture = Image.fromarray(255 * rng.integers(0, 2, (48, 64, 3), dtype=np.uint8))
    resize = REGISTRY[cue].resize
    inside, outside = resize(picture, (16, 24), box), resize(picture, (16, 24), None)
    assert np.abs(np.asarray(inside).astype(int) - np.asarray(resize(picture.crop(box), (16, 24), None))).mean() < 10
    assert np.abs(np.asarray(inside).astype(int) - np.asarray(outside)).max() > 50


def test_lines_of_grey_levels_become_two_levels() -> None:
    levels = np.full((16, 16, 3), 90, np.uint8)  # as after JPEG compression
    levels[5], levels[:, 9] = 128, 127
    resized = np.asarray(resize_lines(Image.fromarray(levels), (8, 8), None))
    assert (resized[2] == 255).all() and not np.delete(resized, 2, axis=0).any()


@pytest.mark.parametrize("given", [("depth",), ("edge", "depth"), ("segmentation",), CUES])
def test_given_maps_are_used_and_the_others_computed(given: tuple[str, ...]) -> None:
    image, rng = _two_halves(), np.random.default_rng(1)
    maps = {cue: rng.uniform(-1, 1, (1 if cue == "depth" else 3, 64, 96)).astype(np.float32) for cue in given}
    computed = compute_cues(image)[0]
    cues, present = compute_cues(image, maps)
    some, used = compute_cues(image, maps, [True, False, True])  # the second is neither computed nor taken from maps
    assert (some[[0, 2]] == cues[[0, 2]]).all() and not some[1].any() and used.tolist() == [True, False, present[2]]
    assert present.tolist() == [cue != "depth" or cue in given for cue in CUES]
    for cue, found, otherwise in zip(CUES, cues, computed, strict=True):
        assert (found == maps.get(cue, otherwise)).all()
