"""Regions of an image: selection, means over a region."""

from collections.abc import Sequence

import torch
from torch import Tensor

REGIONS = ("full", "mask", "outside")


def select(region: str, mask: Tensor) -> Tensor | None:
    """The pixels of one of REGIONS, given masks (B, 1, H, W) in {0, 1}: (B, 1, H, W) bool; None means all pixels."""
    assert region in REGIONS
    if region == "full":
        return None
    inside = mask > 0.5
    return inside if region == "mask" else ~inside


def paste(prediction: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
    """The prediction in a region, the truth elsewhere: for networks, whose receptive fields extend past the region."""
    return prediction if region is None else torch.where(region, prediction, target)


def mean_over(values: Tensor, region: Tensor) -> Tensor:
    """Mean of ``values`` (B, C, H, W) over all channels and the pixels of ``region`` (B, 1, H, W) bool.

    Returns:
        (B,); NaN for an image whose region is empty.
    """
    inside = torch.where(region, values, 0).sum(dim=(1, 2, 3))
    return inside / (region.sum(dim=(1, 2, 3)) * values.shape[1])


def weighted(values: Tensor, weights: Sequence[float], dim: int) -> Tensor:
    """Cross-correlation along an axis, without padding: the axis loses ``len(weights) - 1`` entries.

    Uses additions, since the rounding of a convolution depends on the device (TF32) and on autocast.
    """
    length = values.shape[dim] - len(weights) + 1
    total = torch.zeros_like(values.narrow(dim, 0, length))
    for start, weight in enumerate(weights):
        total.add_(values.narrow(dim, start, length), alpha=weight)
    return total
