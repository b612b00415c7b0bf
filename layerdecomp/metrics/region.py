"""Means over a region of each image, and the growing of regions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_over(values: Tensor, region: Tensor) -> Tensor:
    """Mean of ``values`` (B, C, H, W) over the pixels of ``region`` (B, 1, H, W) bool, all channels alike.

    Returns:
        (B,); NaN for an image whose region is empty.
    """
    inside = torch.where(region, values, 0).sum(dim=(1, 2, 3))
    return inside / (region.sum(dim=(1, 2, 3)) * values.shape[1])


def dilate(region: Tensor, radius: int) -> Tensor:
    """Grow a region (B, 1, H, W) bool by ``radius`` pixels in every direction, diagonals included."""
    return F.max_pool2d(region.float(), 2 * radius + 1, stride=1, padding=radius) > 0.5
