"""Imperfect masks: the errors of each kind, and that no mask is empty or full."""

from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from layerdecomp.errors import InputError
from layerdecomp.imaging.masks import MaskConfig, imperfect_mask

KINDS = [field.name for field in fields(MaskConfig)]


def _only(kind: str) -> MaskConfig:
    return MaskConfig(**{name: float(name == kind) for name in KINDS})


def _matte(size: int = 64) -> NDArray[np.float32]:
    """A half-transparent disc that lacks its upper right quarter, so that neither polygon nor hull is exact."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    inside = (np.hypot(x, y) < 0.35) & ~((x > 0) & (y < 0))
    return np.asarray(0.6 * inside, np.float32)


def _masks(kind: str, alpha: NDArray[np.float32], count: int = 20) -> NDArray[np.bool_]:
    return np.stack([imperfect_mask(alpha, np.random.default_rng(seed), _only(kind)) for seed in range(count)])


def _iou(masks: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray((masks & truth).sum(axis=(1, 2)) / (masks | truth).sum(axis=(1, 2)))


@pytest.mark.parametrize("weights", [dict.fromkeys(KINDS, 0.0), {"box": -1.0}, {"exact": float("inf")}])
def test_invalid_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(InputError, match="masks"):
        MaskConfig(**weights)


def test_exact_is_the_visible_part() -> None:
    alpha = _matte()
    assert (_masks("exact", alpha) == (alpha > 0.3)).all()


@pytest.mark.parametrize("kind", ["dilated", "hull", "spill"])
def test_some_kinds_only_add_pixels(kind: str) -> None:
    truth = _matte() > 0.3
    masks = _masks(kind, _matte())
    assert (masks | ~truth).all()
    assert (masks.sum(axis=(1, 2)) > truth.sum()).mean() > 0.9


@pytest.mark.parametrize("kind", ["eroded", "holes"])
def test_some_kinds_only_remove_pixels(kind: str) -> None:
    truth = _matte() > 0.3
    masks = _masks(kind, _matte())
    assert (~masks | truth).all()
    assert (masks.sum(axis=(1, 2)) < truth.sum()).all()


def test_the_hull_fills_half_of_the_missing_quarter() -> None:
    mask = _masks("hull", _matte(), 1)[0]
    assert mask[28, 36] and not mask[14, 50]


def test_shifted_has_the_same_area() -> None:
    truth = _matte() > 0.3
    masks = _masks("shifted", _matte())
    assert (masks.sum(axis=(1, 2)) == truth.sum()).all()
    assert not (masks == truth).all(axis=(1, 2)).any()


def test_low_resolution_masks_have_few_different_columns() -> None:
    for mask in _masks("low_resolution", _matte(128), 5):
        assert len(np.unique(mask, axis=1).T) <= 8
        changes = np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1))
        assert np.diff(changes).min() >= 4


def test_boxes_are_rectangles_close_to_the_bounding_box() -> None:
    truth = _matte(128) > 0.3
    rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
    for mask in _masks("box", _matte(128)):
        top, left = np.argwhere(mask).min(axis=0)
        bottom, right = np.argwhere(mask).max(axis=0)
        assert mask.sum() == (bottom + 1 - top) * (right + 1 - left)
        errors = np.array([top, left, bottom, right]) - (rows[0], columns[0], rows[-1], columns[-1])
        assert 0 < np.abs(errors).max() <= 6


def test_the_box_of_a_very_small_object_is_exact() -> None:
    alpha = np.zeros((32, 32), np.float32)
    alpha[10:16, 8:14], alpha[10:12, 8:10] = 1, 0
    expected = np.zeros((32, 32), bool)
    expected[10:16, 8:14] = True
    assert (_masks("box", alpha) == expected).all()


def test_brush_strokes_are_thick_connected_to_the_object_and_miss_some_of_it() -> None:
    truth = _matte(128) > 0.3
    for mask in _masks("brush", _matte(128)):
        assert (mask & truth).sum() > (mask & ~truth).sum()
        assert (truth & ~mask).any()
        # no thin lines
        assert np.lib.stride_tricks.sliding_window_view(mask, (9, 9)).all(axis=(2, 3)).any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "exact"])
def test_every_kind_is_imperfect_but_overlaps_the_object(kind: str) -> None:
    alpha = _matte(128)
    iou = _iou(_masks(kind, alpha), alpha > 0.3)
    assert 0.5 < iou.mean() < 0.97


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["one pixel", "one row", "all but one pixel", "at the border"])
def test_masks_are_never_empty_or_full(kind: str, case: str) -> None:
    alpha = np.zeros((48, 32), dtype=np.float32)
    if case == "one pixel":
        alpha[20, 10] = 1
    elif case == "one row":
        alpha[20, 3:30] = 0.4
    elif case == "all but one pixel":
        alpha[:] = 1
        alpha[5, 5] = 0
    else:
        alpha[:20, :12] = 1
    masks = _masks(kind, alpha, 10)
    assert masks.dtype == bool and masks.shape == (10, 48, 32)
    assert masks.any(axis=(1, 2)).all() and not masks.all(axis=(1, 2)).any()


def test_masks_are_determined_by_the_generator_and_vary() -> None:
    alpha = _matte()
    first, second = (
        np.stack([imperfect_mask(alpha, np.random.default_rng(seed)) for seed in range(30)]) for _ in range(2)
    )
    assert (first == second).all()
    assert len(np.unique(first.reshape(30, -1), axis=0)) > 20


def test_an_empty_or_full_matte_fails_an_assertion() -> None:
    for alpha in (np.zeros((16, 16), np.float32), np.ones((16, 16), np.float32)):
        with pytest.raises(AssertionError):
            imperfect_mask(alpha, np.random.default_rng(0))
