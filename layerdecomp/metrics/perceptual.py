"""LPIPS, the distance between two images in the features of a classification network, one value per image.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), version 0.1. The
caller loads the weights: this module reads no files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import alexnet, squeezenet1_1, vgg16

from layerdecomp.metrics.region import paste

# ImageNet's mean and standard deviation, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
SMALLEST = 32  # pixels: minimum side for all trunks


@dataclass(frozen=True)
class Trunk:
    """A torchvision classification network, the layers of its `features` to compare, and their channels."""

    build: Callable[[], nn.Module]
    taps: tuple[int, ...]
    channels: tuple[int, ...]


TRUNKS = {
    "alex": Trunk(partial(alexnet, weights=None), (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg": Trunk(partial(vgg16, weights=None), (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    "squeeze": Trunk(
        partial(squeezenet1_1, weights=None), (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)
    ),
}


class LPIPS(nn.Module):
    """A frozen LPIPS network, created without weights.

    Args:
        net: one of TRUNKS.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        trunk = TRUNKS[net]
        self.net, self.taps = net, trunk.taps
        features = trunk.build().features
        assert isinstance(features, nn.Sequential)
        self.features = features[: trunk.taps[-1] + 1]
        self.heads = nn.ParameterList([torch.empty(1, width, 1, 1) for width in trunk.channels])
        self.requires_grad_(False).eval()

    def forward(self, prediction: Tensor, target: Tensor, region: Tensor | None = None) -> Tensor:
        """The distance, 0 for equal images.

        Args:
            prediction, target: (B, 3, H, W) in [-1, 1].
            region: (B, 1, H, W) bool, the pixels that count; None means all of them, which is LPIPS as published. With
                a region, the truth replaces the prediction outside it, and features are weighted by the fraction of
                their cell that lies inside.

        Returns:
            (B,); NaN if an image's region is empty, or a side is shorter than 32 pixels, too small for the trunks.
        """
        if min(target.shape[-2:]) < SMALLEST:
            return target.new_full((len(target),), torch.nan, dtype=torch.float32)
        prediction = paste(prediction, target, region)
        with torch.autocast(target.device.type, enabled=False):
            first, second = (self._unit_features(image.float()) for image in (prediction, target))
            distances = [
                _mean((head * (a - b).square()).sum(dim=1, keepdim=True), region)
                for head, a, b in zip(self.heads, first, second, strict=True)
            ]
        return torch.stack(distances).sum(dim=0)

    def _unit_features(self, x: Tensor) -> list[Tensor]:
        """The features at every tap, normalised to unit length per pixel."""
        x = (x - x.new_tensor(_SHIFT).view(1, 3, 1, 1)) / x.new_tensor(_SCALE).view(1, 3, 1, 1)
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
        return found


def _mean(values: Tensor, region: Tensor | None) -> Tensor:
    """Mean (B,) of a map (B, 1, h, w), weighted by the fraction of each cell inside a region (B, 1, H, W)."""
    if region is None:
        return values.mean(dim=(1, 2, 3))
    weights = F.adaptive_avg_pool2d(region.float(), (values.shape[-2], values.shape[-1]))
    return (weights * values).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
