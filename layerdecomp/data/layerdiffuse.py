"""Cut-out foregrounds with straight alpha, such as those that LayerDiffuse generates."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdecomp.data.folders import LICENCE, by_stem, read_straight
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError

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
        height, width = read_straight(path).shape[:2]
        if min(width, height) < self.min_side:
            raise InputError(
                f"{path} is {width} x {height} pixels; expected sides of at least {self.min_side}: leave "
                "it out, or lower min_side="
            )
        return Item(candidate.rpartition(".")[0], candidate, width, height)


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
