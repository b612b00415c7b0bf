"""Metrics of the foreground layer, one value per image.

Foregrounds are (B, 4, H, W): straight RGB in [-1, 1], alpha in [0, 1]. Every function returns (B,), with NaN where the
metric is undefined for an image. That depends only on the truth and the input, never on the prediction, so the means of
two models cover the same images.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import label
from torch import Tensor
from torch.nn import functional as F

from layerdecomp.imaging.geometry import dilate
from layerdecomp.metrics.region import mean_over, weighted

OPAQUE = 0.5  # alpha above which a pixel belongs to an object
VISIBLE = 0.05  # smallest visible alpha, or change of alpha
MIN_HIDDEN_PIXELS = 16  # a smaller hidden part is just the ragged edge of a mask
BOUNDARY_RADIUS = 2  # pixels

_GRAD_SIGMA = 1.4
_GRAD_RADIUS = 4  # pixels; common implementations truncate the Gaussian where its density falls below 0.01
_CONN_LEVELS = tuple(level / 10 for level in range(1, 11))
_CONN_THETA = 0.15  # smallest excess of alpha over its connected level that counts


def alpha_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Soft intersection over union of the alphas: sum of minima over sum of maxima.

    NaN if the true foreground is fully transparent.
    """
    intersection = torch.minimum(_alpha(prediction), _alpha(target)).sum(dim=(1, 2, 3))
    union = torch.maximum(_alpha(prediction), _alpha(target)).sum(dim=(1, 2, 3))
    return torch.where(_alpha(target).sum(dim=(1, 2, 3)) > 0, intersection / union, torch.nan)


def alpha_sad(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute alpha differences over the whole image, in thousands of fully wrong pixels.

    This is the unit of the matting literature (Xu et al., Deep Image Matting): the sum over alpha in [0, 1], divided by
    1000. It grows with the resolution.
    """
    return (_alpha(prediction) - _alpha(target)).abs().sum(dim=(1, 2, 3)) / 1000


def alpha_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared alpha difference over the whole image, alpha in [0, 1]."""
    return (_alpha(prediction) - _alpha(target)).square().mean(dim=(1, 2, 3))


def alpha_grad(prediction: Tensor, target: Tensor) -> Tensor:
    """Gradient error of the alphas over the whole image: squared differences of gradient magnitudes, sum / 1000.

    Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting" (2009), as commonly reported (Xu's
    MATLAB code and its ports, such as mmagic): derivatives of a Gaussian with sigma 1.4, truncated at 4 pixels, the
    two-dimensional kernels scaled to unit norm, with replicate padding. Alpha is not rescaled, as in GCA-Matting. The
    MATLAB code and mmagic first stretch it to [0, 1], which hides errors if its range is smaller.
    """
    difference = _gradient_magnitude(_alpha(prediction)) - _gradient_magnitude(_alpha(target))
    return difference.square().sum(dim=(1, 2, 3)) / 1000


def _gradient_magnitude(alpha: Tensor) -> Tensor:
    """(B, 1, H, W) to (B, 1, H, W) float32."""
    x = torch.arange(-_GRAD_RADIUS, _GRAD_RADIUS + 1)
    gaussian = torch.exp(-x.square() / (2 * _GRAD_SIGMA**2))
    smooth, slope = ((k / k.norm()).tolist() for k in (gaussian, x * gaussian))  # the factors cancel in the norm
    padded = F.pad(alpha.float(), [_GRAD_RADIUS] * 4, mode="replicate")
    derivatives = (weighted(weighted(padded, smooth, dim), slope, 5 - dim) for dim in (2, 3))
    return torch.hypot(*derivatives)


def alpha_conn(prediction: Tensor, target: Tensor) -> Tensor:
    """Connectivity error of the alphas over the whole image, in thousands of pixels: penalises islands and holes.

    Rhemann et al. (2009) with step 0.1 and theta 0.15, as in Xu's MATLAB code and its ports. A pixel's connected level
    l is the highest of 0, 0.1 .. 1 such that, at every level up to l, it lies in the largest 4-connected component of
    the pixels where both alphas reach that level. The excess of an alpha over l counts if it is at least theta. The
    error is the sum of absolute differences between the two excesses, divided by 1000. Runs on the CPU, per image.
    """
    pairs = zip(*(_alpha(layer)[:, 0].detach().float().cpu().numpy() for layer in (prediction, target)), strict=True)
    return torch.tensor([_connectivity_error(*pair) for pair in pairs], device=target.device)


def _connectivity_error(prediction: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    both = np.minimum(prediction, target)
    level, connected = np.zeros_like(both), np.ones(both.shape, dtype=bool)
    for threshold in _CONN_LEVELS:
        connected &= _largest_component(both >= threshold)
        level[connected] = threshold
    excess = [alpha - level for alpha in (prediction, target)]
    noticed = [np.where(d >= _CONN_THETA, d, 0) for d in excess]
    return float(np.abs(noticed[0] - noticed[1]).sum() / 1000)


def _largest_component(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 4-connected component of a region (H, W), if any; of equally large ones, the first in row order."""
    components = label(region, connectivity=1)
    sizes = np.bincount(components.flat)
    sizes[0] = 0  # outside the region
    return region & (components == sizes.argmax())


def rgb_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of straight RGB, in units of [0, 1], where the true alpha is above 0.

    The predicted alpha is ignored: predicted colours count even under alpha 0. NaN if the true foreground is fully
    transparent.
    """
    return _rgb_l1(prediction, target, _alpha(target) > 0)


def boundary_rgb_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """``rgb_l1`` along the true outline, where halos and colour bleeding show. NaN if there is no outline."""
    return _rgb_l1(prediction, target, boundary_band(_alpha(target)))


def boundary_band(alpha: Tensor) -> Tensor:
    """Visible pixels (alpha > 0.05) within 2 pixels of an edge of the alpha (B, 1, H, W), bool.

    An edge is where alpha changes by more than 0.05 within 3 x 3 pixels. Selecting fractional alphas would not work: a
    hard outline has none, while a semi-transparent object is fractional throughout. The image border is not an edge.
    """
    highest = F.max_pool2d(alpha, 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-alpha, 3, stride=1, padding=1)
    return dilate(highest - lowest > VISIBLE, BOUNDARY_RADIUS) & (alpha > VISIBLE)


def hidden_iou(prediction: Tensor, target: Tensor, mask: Tensor, occluder: Tensor) -> Tensor:
    """Intersection over union of the object's hidden part, which an occluder covers or the mask missed.

    Both alphas are thresholded at 0.5 and compared over all pixels that the input does not show as the object
    (occluder > 0.5 or mask = 0). This area extends far beyond the object, so that growing the alpha past the true
    outline is penalised like omitting the hidden part.

    Args:
        prediction, target: (B, 4, H, W).
        mask: (B, 1, H, W) in {0, 1}, the model's input.
        occluder: (B, 1, H, W) in [0, 1].

    Returns:
        (B,) in [0, 1]; NaN for an image whose hidden part has fewer than 16 pixels.
    """
    predicted, hidden = (_hidden(layer, mask, occluder) for layer in (prediction, target))
    iou = (predicted & hidden).sum(dim=(1, 2, 3)) / (predicted | hidden).sum(dim=(1, 2, 3))
    return _where_enough(iou, hidden)


def hidden_rgb_l1(prediction: Tensor, target: Tensor, mask: Tensor, occluder: Tensor) -> Tensor:
    """``rgb_l1`` in the hidden part of the object (true alpha > 0.5), whose colours the model had to invent.

    Arguments and undefined images as in ``hidden_iou``.
    """
    hidden = _hidden(target, mask, occluder)
    return _where_enough(_rgb_l1(prediction, target, hidden), hidden)


def _hidden(layer: Tensor, mask: Tensor, occluder: Tensor) -> Tensor:
    """Pixels where a foreground is opaque but hidden in the input, (B, 1, H, W) bool."""
    return (_alpha(layer) > OPAQUE) & ((occluder > OPAQUE) | (mask < 0.5))


def _where_enough(values: Tensor, hidden: Tensor) -> Tensor:
    return torch.where(hidden.sum(dim=(1, 2, 3)) >= MIN_HIDDEN_PIXELS, values, torch.nan)


def _alpha(foreground: Tensor) -> Tensor:
    return foreground[:, 3:]


def _rgb_l1(prediction: Tensor, target: Tensor, region: Tensor) -> Tensor:
    return mean_over((prediction[:, :3] - target[:, :3]).abs() / 2, region)
