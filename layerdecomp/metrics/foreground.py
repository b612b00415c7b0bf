"""Metrics of the foreground layer, one value per image.

Foregrounds are (B, 4, H, W): straight RGB in [-1, 1], alpha in [0, 1]. Every function returns (B,) and holds NaN where
an image does not define the metric. Only the truth and the input decide that, never the prediction, so that the means
of two models are over the same images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from layerdecomp.metrics.region import dilate, mean_over

OPAQUE = 0.5  # alpha above which a pixel belongs to an object
VISIBLE = 0.05  # alpha, or change of alpha, that the eye would notice
MIN_HIDDEN_PIXELS = 16  # a hidden part smaller than this is the ragged rim of a mask
BOUNDARY_RADIUS = 2  # pixels


def alpha_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Soft intersection over union of the alphas: sum of minima over sum of maxima.

    NaN where the true foreground is fully transparent.
    """
    intersection = torch.minimum(_alpha(prediction), _alpha(target)).sum(dim=(1, 2, 3))
    union = torch.maximum(_alpha(prediction), _alpha(target)).sum(dim=(1, 2, 3))
    return torch.where(_alpha(target).sum(dim=(1, 2, 3)) > 0, intersection / union, torch.nan)


def alpha_sad(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute alpha differences over the whole image, in thousands of fully wrong pixels.

    This is the unit of the matting literature (Xu et al., Deep Image Matting): alpha in [0, 1] (files of 0..255 are
    divided by 255), the sum divided by 1000. It grows with the resolution.
    """
    return (_alpha(prediction) - _alpha(target)).abs().sum(dim=(1, 2, 3)) / 1000


def alpha_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared alpha difference over the whole image, alpha in [0, 1]."""
    return (_alpha(prediction) - _alpha(target)).square().mean(dim=(1, 2, 3))


def rgb_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of straight RGB, in units of [0, 1], where the true alpha is above 0.

    The predicted alpha plays no part: a colour that the prediction hides under alpha 0 counts as it stands.
    NaN where the true foreground is fully transparent.
    """
    return _rgb_l1(prediction, target, _alpha(target) > 0)


def boundary_rgb_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """``rgb_l1`` along the true outline, where halos and colour bleed show. NaN where there is no outline."""
    return _rgb_l1(prediction, target, boundary_band(_alpha(target)))


def boundary_band(alpha: Tensor) -> Tensor:
    """Pixels within 2 of an edge of the alpha (B, 1, H, W) that are visible themselves (alpha > 0.05), bool.

    An edge is where alpha changes by more than 0.05 within 3 x 3 pixels. Fractional values alone would not do: a hard
    outline has none, and the whole inside of a half-transparent object does. The image's border is no edge.
    """
    highest = F.max_pool2d(alpha, 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-alpha, 3, stride=1, padding=1)
    return dilate(highest - lowest > VISIBLE, BOUNDARY_RADIUS) & (alpha > VISIBLE)


def hidden_iou(prediction: Tensor, target: Tensor, *, mask: Tensor, occluder: Tensor) -> Tensor:
    """Intersection over union of the hidden part of the object: what another thing covers or the mask missed.

    Both alphas are cut at 0.5 and compared on all the pixels that the input does not show as the object
    (occluder > 0.5 or mask = 0). That area goes far beyond the object, so growing the alpha past the true outline costs
    as much as leaving the hidden part out.

    Args:
        prediction, target: (B, 4, H, W).
        mask: (B, 1, H, W) in {0, 1}, as the model received it.
        occluder: (B, 1, H, W) in [0, 1].

    Returns:
        (B,) in [0, 1]; NaN for an image whose hidden part has fewer than 16 pixels.
    """
    unseen = (occluder > OPAQUE) | (mask < 0.5)
    predicted = (_alpha(prediction) > OPAQUE) & unseen
    hidden = (_alpha(target) > OPAQUE) & unseen
    iou = (predicted & hidden).sum(dim=(1, 2, 3)) / (predicted | hidden).sum(dim=(1, 2, 3))
    return torch.where(hidden.sum(dim=(1, 2, 3)) >= MIN_HIDDEN_PIXELS, iou, torch.nan)


def _alpha(foreground: Tensor) -> Tensor:
    return foreground[:, 3:]


def _rgb_l1(prediction: Tensor, target: Tensor, region: Tensor) -> Tensor:
    return mean_over((prediction[:, :3] - target[:, :3]).abs() / 2, region)
