"""Straight and premultiplied alpha: telling from a picture's pixels which of the two it has."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import Pixels


def check_straight(rgba: Pixels, path: Path) -> None:
    """Raises `InputError`, naming the file, if a picture (H, W, 4) looks premultiplied."""
    if looks_premultiplied(rgba):
        raise InputError(
            f"{path} looks premultiplied: where it is semi-transparent, its colours darken in proportion to alpha and "
            "never exceed it; expected straight alpha: divide the colours by alpha and save again"
        )


def looks_premultiplied(rgba: Pixels) -> bool:
    """Whether the colours of a picture seem to have been multiplied by its alpha.

    Examines v, the brightest channel of each semi-transparent pixel. Returns True if all of these hold:

    - Most of these pixels are not black. Black is the same in both forms, and an object that fades into a black shadow
      darkens as if it were premultiplied.
    - v exceeds alpha almost nowhere (lossy files change a few pixels). Straight colours are independent of alpha:
      unless they are dark, they exceed it along soft edges, where alpha falls to 0.
    - Dividing by alpha would make the pixels clearly brighter. This accepts dark objects as straight.
    - v follows alpha: from the pixels below the mean alpha to those above it, it grows more like alpha than like a
      constant. This accepts objects whose colour is below alpha everywhere. If alpha is uniform, as in a pane of glass,
      the opaque pixels take the place of those above the mean; if there are none, this condition counts as met.

    The test favours false negatives over false positives: it accepts dark premultiplied pictures, those with black
    shadows and those with very few semi-transparent pixels.

    Args:
        rgba: (H, W, 4) uint8.
    """
    alpha, brightest = rgba[..., 3], rgba[..., :3].max(axis=2)
    half = (alpha > 16) & (alpha < 255)  # below that, rounding can make v black
    if np.count_nonzero(half & (brightest <= 4)) * 2 > np.count_nonzero(half):
        return False
    telling = (alpha > 0) & (alpha < 255) & (brightest > 4)
    if np.count_nonzero(telling) < 64:
        return False
    density, value = alpha[telling].astype(np.float64), brightest[telling].astype(np.float64)
    exceeds = np.mean(value > density + 2) > 0.005
    brighter = value.sum() / density.sum() * 255 - value.mean() >= 16
    return not exceeds and bool(brighter) and _follows(value, density, brightest[alpha == 255])


def _follows(value: NDArray[np.float64], density: NDArray[np.float64], opaque: NDArray[np.uint8]) -> bool:
    dense = density > density.mean()
    if dense.any() and (growth := density[dense].mean() / density[~dense].mean()) >= 1.1:
        return bool(value[dense].mean() >= np.sqrt(growth) * value[~dense].mean())
    growth = 255 / density.mean()
    return opaque.size == 0 or bool(opaque.mean() >= np.sqrt(growth) * value.mean())
