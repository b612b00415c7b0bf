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
    """RGBA files in a folder, at any depth: complete objects, straight alpha, any colour under alpha 0."""

    root: Path
    source: str = "layerdiffuse"
    licence: str = LICENCE
    min_side: int = 256  # pixels that the shorter side must have
    kind: ClassVar[str] = "foregrounds"

    def candidates(self) -> list[str]:
        return sorted(by_stem(self.root, CUT_OUTS).values())

    def read(self, candidate: str) -> Item:
        path = self.root / candidate
        rgba = read_rgba(path)
        height, width = rgba.shape[:2]
        if min(width, height) < self.min_side:
            raise InputError(f"{path} is {width} x {height} pixels; expected sides of {self.min_side} at least")
        if looks_premultiplied(rgba):
            raise InputError(
                f"{path} looks premultiplied: where it is half transparent, its colours are dark in proportion to "
                "alpha and never exceed it; expected straight alpha: divide the colours by alpha and save again"
            )
        return Item(candidate.rpartition(".")[0], candidate, width, height)


def looks_premultiplied(rgba: Pixels) -> bool:
    """Whether the colours of a picture have been multiplied by its alpha.

    Looks at the brightest channel v of the half-transparent pixels; it says yes if all of this holds:

    - Most of them are not black. Black is the same either way, and an object that fades into a black shadow all around
      it darkens as if it were premultiplied.
    - v exceeds alpha nowhere, give or take what lossy files do to a few pixels. Straight colours know nothing of
      alpha: unless they are dark, they exceed it on the soft edge of a cut-out, where alpha falls to 0.
    - The pixels would be clearly brighter if they were divided by alpha. This clears dark objects.
    - v follows alpha: from the fainter to the denser half of the pixels, it grows more like alpha does than like a
      constant. This clears objects whose alpha nowhere falls below their colour. Under an even alpha, as of a pane of
      glass, the two halves do not differ and nothing follows.

    It would rather miss one than refuse a sound one: dark premultiplied pictures pass, so do those with black shadows
    and those with next to no half-transparent pixels.

    Args:
        rgba: (H, W, 4) uint8.
    """
    alpha, brightest = rgba[..., 3], rgba[..., :3].max(axis=2)
    half = (alpha > 16) & (alpha < 255)  # in fainter ones v is black through rounding
    if np.count_nonzero(half & (brightest <= 4)) * 2 > np.count_nonzero(half):
        return False
    telling = (alpha > 0) & (alpha < 255) & (brightest > 4)
    if np.count_nonzero(telling) < 64:
        return False
    density, value = alpha[telling].astype(np.float64), brightest[telling].astype(np.float64)
    exceeds = np.mean(value > density + 2) > 0.005
    brighter = value.sum() / density.sum() * 255 - value.mean() >= 16
    return not exceeds and bool(brighter) and _follows(value, density)


def _follows(value: NDArray[np.float64], density: NDArray[np.float64]) -> bool:
    dense = density > np.median(density)
    if not dense.any() or density[dense].mean() < 1.1 * density[~dense].mean():
        return True
    growth = density[dense].mean() / density[~dense].mean()
    return bool(value[dense].mean() >= np.sqrt(growth) * value[~dense].mean())


def pad_colours(foreground: Tensor) -> Tensor:
    """Gives pixels under alpha 0 the colours of the visible ones around them; visible pixels stay as they are.

    As LayerDiffuse does it: alpha and the colours times alpha are shrunk by 1.2 again and again, down to one
    pixel; then each size, from the coarsest, takes from the one before it what it lacks in alpha.

    Args:
        foreground: (4, H, W), straight colours on any scale, alpha in [0, 1].

    Returns:
        (4, H, W); the foreground itself where alpha is 0 everywhere, or nowhere.
    """
    rgb, alpha = foreground[:3], foreground[3:]
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return foreground
    filled = _filled(torch.cat([rgb * alpha, alpha])[None])[0]
    return torch.cat([torch.where(hidden, filled[:3], rgb), alpha])


def _filled(layer: Tensor) -> Tensor:
    """(1, 4, H, W) premultiplied layer -> the same with every pixel full."""
    sizes = [layer]
    while max(sizes[-1].shape[-2:]) > 1:
        smaller = [max(1, int(side / 1.2)) for side in sizes[-1].shape[-2:]]
        # a bilinear sample sees 2 x 2 pixels: at such steps none is passed over, so alpha never vanishes
        sizes.append(F.interpolate(sizes[-1], smaller, mode="bilinear"))
    full = sizes[-1] / sizes[-1][:, 3:]
    for size in reversed(sizes[:-1]):
        full = torch.addcmul(size, F.interpolate(full, size.shape[-2:], mode="bilinear"), 1 - size[:, 3:])
    return full
