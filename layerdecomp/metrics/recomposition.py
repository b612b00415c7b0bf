"""Metrics of recomposition: how well the two layers together reproduce the input image."""

from torch import Tensor

from layerdecomp.imaging.compositing import over
from layerdecomp.metrics import background as background_metrics
from layerdecomp.metrics.perceptual import LPIPS


def psnr(foreground: Tensor, background: Tensor, image: Tensor, occluder: Tensor) -> Tensor:
    """PSNR in dB of the foreground over the background against the image.

    Only pixels where the occluder's alpha is 0 count: elsewhere the image shows the occluder, while the composite
    correctly shows the object.

    Args:
        foreground: (B, 4, H, W), straight RGB in [-1, 1], alpha in [0, 1].
        background, image: (B, 3, H, W) in [-1, 1].
        occluder: (B, 1, H, W) in [0, 1].

    Returns:
        (B,); NaN for an image that the occluder covers completely.
    """
    return background_metrics.psnr(over(foreground, background), image, occluder == 0)


def lpips(network: LPIPS, foreground: Tensor, background: Tensor, image: Tensor, occluder: Tensor) -> Tensor:
    """LPIPS of the foreground over the background against the image; pixels, arguments and result as in ``psnr``."""
    return network(over(foreground, background), image, occluder == 0)
