"""Augmentations that hide the seams of a pasted object: matched lighting, blur, shared grain and JPEG artefacts.

Tensors are (C, H, W) as in samples: straight colours in [-1, 1], alpha in [0, 1].
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from layerdecomp.errors import check_probabilities
from layerdecomp.imaging.geometry import to_pixels, to_tensor


@dataclass
class BlendingConfig:
    """Probability of each augmentation; 0 disables it."""

    light: float = 0.7  # shift the object's brightness, contrast and tint towards the background's
    blur: float = 0.3  # blur the object, as if out of focus
    grain: float = 0.5  # add the same noise to all layers
    jpeg: float = 0.5  # compress the image (not the layers) as JPEG

    def __post_init__(self) -> None:
        check_probabilities(self, "data.triplets.blending.", *vars(self))


def match_light(foreground: Tensor, background: Tensor, strength: float) -> Tensor:
    """Move the colours of a foreground (4, H, W) towards the mean and deviation of a background (3, H, W).

    A weakened form of Reinhard et al., "Color Transfer between Images" (2001): per RGB channel, `strength` in [0, 1] of
    the way, deviations changed by a factor of at most 1.5. The full transfer, in a decorrelated colour space, would
    recolour the object entirely.
    """
    rgb, alpha = foreground[:3], foreground[3:]
    weight = alpha / alpha.sum().clamp(min=1)
    mean = (rgb * weight).sum(dim=(1, 2), keepdim=True)
    deviation = ((rgb - mean).square() * weight).sum(dim=(1, 2), keepdim=True).sqrt()
    aim, spread = background.mean(dim=(1, 2), keepdim=True), background.std(dim=(1, 2), keepdim=True)
    ratio = ((spread + 0.02) / (deviation + 0.02)).clamp(1 / 1.5, 1.5) ** strength
    moved = (rgb - mean) * ratio + mean + strength * (aim - mean)
    return torch.cat([moved.clamp(-1, 1), alpha])


def soften(foreground: Tensor, sigma: float) -> Tensor:
    """Blur a foreground (4, H, W) with a Gaussian of `sigma` pixels, colours weighted by alpha."""
    size = 2 * max(1, round(3 * sigma)) + 1
    premultiplied = torch.cat([foreground[:3] * foreground[3:], foreground[3:]])
    blurred = gaussian_blur(premultiplied, [size, size], [sigma, sigma])
    alpha = blurred[3:]
    rgb = torch.where(alpha > 1e-3, blurred[:3] / alpha.clamp(min=1e-3), foreground[:3])
    return torch.cat([rgb.clamp(-1, 1), alpha.clamp(0, 1)])


def draw_grain(size: tuple[int, int], deviation: float, rng: np.random.Generator) -> Tensor:
    """Draw noise (3, H, W) for colours in [-1, 1]: mostly luminance, a little chroma, correlated as by demosaicing."""
    noise = torch.from_numpy(rng.standard_normal((4, *size), dtype=np.float32))
    mixed = 0.9 * noise[:1] + 0.45 * noise[1:]
    smooth = gaussian_blur(mixed, [3, 3], [0.5, 0.5])
    return deviation * smooth / smooth.std()


def through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress an image (3, H, W) in [-1, 1] as JPEG with quality 1 to 100, and decode it again."""
    file = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(file, "JPEG", quality=quality)
    return to_tensor(np.asarray(Image.open(file)))[0]
