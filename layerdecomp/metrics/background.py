"""Metrics of the background layer, one value per image.

Images are (B, 3, H, W) in [-1, 1]. Every function returns (B,), with NaN where the metric is undefined for an image.
"""

import math

import torch
from torch import Tensor

from layerdecomp.metrics.region import mean_over, weighted

DATA_RANGE = 2.0  # of images in [-1, 1]
PSNR_CEILING = 100.0  # dB; an exact copy would make the mean infinite
SHARPNESS_CEILING = 2.0
FLAT = 2 / 255  # RMS difference of neighbours below which an image is flat: one 8-bit level

_SSIM_SIGMA = 1.5
_SSIM_RADIUS = 5  # the Gaussian is cut at 3.5 sigma
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2  # for images in [0, 1]


def psnr(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most PSNR_CEILING.

    The error is averaged per image, not over the batch: the published figures are means of per-image values.

    Args:
        prediction, target: (B, 3, H, W) in [-1, 1].
        region: (B, 1, H, W) bool, the pixels that count; None means all of them.

    Returns:
        (B,); NaN for an image whose region is empty.
    """
    if region is None:
        region = torch.ones_like(target[:, :1], dtype=torch.bool)
    error = mean_over((prediction - target).square(), region)
    return (10 * torch.log10(DATA_RANGE**2 / error)).clamp(max=PSNR_CEILING)


def ssim(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window, sigma 1.5, 11 x 11, K1 0.01, K2 0.03, mean over RGB.

    Equals scikit-image's ``structural_similarity`` with ``gaussian_weights=True, use_sample_covariance=False`` on
    images in [0, 1]. The range matters, because SSIM compares means as ratios. As in scikit-image, the outermost 5
    pixels, whose windows extend beyond the image, do not count; torchmetrics includes them, with reflected content.

    Args:
        prediction, target: (B, 3, H, W) in [-1, 1].
        region: (B, 1, H, W) bool, the centres of the windows that count; None means all of them.

    Returns:
        (B,) in [-1, 1]; NaN if an image's region is empty, or a side is shorter than 11 pixels, so that no window fits.
    """
    if min(target.shape[-2:]) <= 2 * _SSIM_RADIUS:
        return target.new_full((len(target),), torch.nan, dtype=torch.float32)
    x, y = (prediction.float() + 1) / 2, (target.float() + 1) / 2
    mean_x, mean_y, square_x, square_y, product = (_window_mean(z) for z in (x, y, x * x, y * y, x * y))
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    contrast = (2 * (product - mean_x * mean_y) + _SSIM_C2) / (variances + _SSIM_C2)
    similarity = contrast * (2 * mean_x * mean_y + _SSIM_C1) / (mean_x.square() + mean_y.square() + _SSIM_C1)
    if region is None:
        region = torch.ones_like(target[:, :1], dtype=torch.bool)
    inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)
    return mean_over(similarity, region[..., inside, inside])


def _window_mean(images: Tensor) -> Tensor:
    """The Gaussian mean over every complete window: (B, 3, H, W) to (B, 3, H - 10, W - 10)."""
    gaussian = [math.exp(-(x**2) / (2 * _SSIM_SIGMA**2)) for x in range(-_SSIM_RADIUS, _SSIM_RADIUS + 1)]
    weights = [weight / sum(gaussian) for weight in gaussian]
    return weighted(weighted(images, weights, dim=2), weights, dim=3)


def sharpness(prediction: Tensor, target: Tensor, region: Tensor) -> Tensor:
    """Gradient of the prediction over that of the truth: 0 for a flat fill, 1 if equally sharp, above 1 for noise.

    PSNR favours blur where the true texture cannot be known; this metric tells blur from texture, right or wrong. The
    gradient is the root mean square difference of horizontal and vertical neighbours that both lie in the region, so
    the step between the region and its surroundings does not count. These forward differences detect single-pixel
    noise, which central differences miss.

    The ratio is unbounded, so a few nearly flat scenes would dominate the mean over images. It is therefore clamped to
    2, as far above 1 as a flat fill is below, and images whose truth is flat do not count.

    Args:
        prediction, target: (B, 3, H, W) in [-1, 1].
        region: (B, 1, H, W) bool, the inpainted region.

    Returns:
        (B,) in [0, 2]; NaN if an image has no neighbouring pixels in its region, or if the truth's neighbours differ by
        less than one 8-bit level (root mean square).
    """
    predicted, true = _gradient(prediction, region), _gradient(target, region)
    return torch.where(true >= FLAT, (predicted / true).clamp(max=SHARPNESS_CEILING), torch.nan)


def _gradient(image: Tensor, region: Tensor) -> Tensor:
    """Root-mean-square difference (B,) of neighbours in the region; NaN if there are none."""
    differences = torch.cat([image.diff(dim=dim).flatten(2) for dim in (2, 3)], dim=2)  # (B, 3, pairs)
    inside = torch.cat([region.unfold(dim, 2, 1).all(dim=-1).flatten(2) for dim in (2, 3)], dim=2)  # (B, 1, pairs)
    return mean_over(differences.square()[..., None], inside[..., None]).sqrt()
