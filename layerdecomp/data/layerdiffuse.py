"""Cut-out foregrounds with straight alpha, such as those that LayerDiffuse generates."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from layerdecomp.data.folders import LICENCE, by_stem, read_rgba
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import Pixels

CUT_OUTS = frozenset({".png", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class ForegroundFolder:
    """RGBA files in a folder and its subfolders: complete objects with straight alpha, any colour under alpha 0."""

    root: Path
    source: str = "layerdiffuse"
    licence: str = LICENCE
    min_side: int = 256  # pixels: minimum length of the shorter side
    kind: ClassVar[str] = "foregrounds"

    def candidates(self) -> list[str]:
        return sorted(by_stem(self.root, CUT_OUTS).values())

    def read(self, candidate: str) -> Item:
        path = self.root / candidate
        rgba = read_rgba(path)
        height, width = rgba.shape[:2]
        if min(width, height) < self.min_side:
            raise InputError(f"{path} is {width} x {height} pixels; expected sides of at least {self.min_side}")
        if looks_premultiplied(rgba):
            raise InputError(
                f"{path} looks premultiplied: where it is semi-transparent, its colours darken in proportion to alpha "
                "and never exceed it; expected straight alpha: divide the colours by alpha and save again"
            )
        return Item(candidate.rpartition(".")[0], candidate, width, height)


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


def pad_colours(foreground: Tensor) -> Tensor:
    """Fills pixels under alpha 0 with the colours of nearby visible pixels, which stay unchanged.

    As in LayerDiffuse: a pyramid of the premultiplied layer, each level smaller by 1.2, down to one pixel. Then each
    level, from the coarsest, is composited over the upsampled coarser result.

    Args:
        foreground: (4, H, W), straight colours in any range, alpha in [0, 1].

    Returns:
        (4, H, W); the input itself if alpha is 0 everywhere or nowhere.
    """
    rgb, alpha = foreground[:3], foreground[3:]
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return foreground
    filled = _filled(torch.cat([rgb * alpha, alpha])[None])[0]
    return torch.cat([torch.where(hidden, filled[:3], rgb), alpha])


def _filled(layer: Tensor) -> Tensor:
    """Premultiplied layer (1, 4, H, W) -> the same with every pixel opaque."""
    sizes = [layer]
    while max(sizes[-1].shape[-2:]) > 1:
        smaller = [max(1, int(side / 1.2)) for side in sizes[-1].shape[-2:]]
        # a bilinear sample reads 2 x 2 pixels: a factor of 1.2 skips none, so alpha never vanishes
        sizes.append(F.interpolate(sizes[-1], smaller, mode="bilinear"))
    full = sizes[-1] / sizes[-1][:, 3:]
    for size in reversed(sizes[:-1]):
        full = torch.addcmul(size, F.interpolate(full, size.shape[-2:], mode="bilinear"), 1 - size[:, 3:])
    return full
