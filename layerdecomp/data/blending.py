"""What keeps a pasted object from giving itself away: the light of its surroundings, one camera's blur, grain and JPEG.

Pictures are (C, H, W) as in samples: straight colours in [-1, 1], alpha in [0, 1].
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
    """How often each is done; 0 switches it off."""

    light: float = 0.7  # the object takes on some of the background's brightness, contrast and tint
    blur: float = 0.3  # the object is made as soft as a background that is out of focus
    grain: float = 0.5  # noise over everything
    jpeg: float = 0.5  # the image (not the layers) goes through JPEG

    def __post_init__(self) -> None:
        check_probabilities(self, "data.triplets.blending.", *vars(self))


def match_light(foreground: Tensor, background: Tensor, strength: float) -> Tensor:
    """Move the colours of a foreground (4, H, W) towards the mean and deviation of a background's (3, H, W).

    Channel by channel, `strength` in [0, 1] of the way (Reinhard et al., "Color Transfer between Images", 2001, in RGB:
    whole and in decorrelated colours it would paint the object over). Deviations change by at most a factor of 1.5.
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
    """Blur a foreground (4, H, W) by a Gaussian of `sigma` pixels, its colours weighted by alpha."""
    size = 2 * max(1, round(3 * sigma)) + 1
    premultiplied = torch.cat([foreground[:3] * foreground[3:], foreground[3:]])
    blurred = gaussian_blur(premultiplied, [size, size], [sigma, sigma])
    alpha = blurred[3:]
    rgb = torch.where(alpha > 1e-3, blurred[:3] / alpha.clamp(min=1e-3), foreground[:3])
    return torch.cat([rgb.clamp(-1, 1), alpha.clamp(0, 1)])


def draw_grain(size: tuple[int, int], deviation: float, rng: np.random.Generator) -> Tensor:
    """Draw noise (3, H, W) for colours in [-1, 1]: mostly brightness, a little colour, correlated as by demosaicing."""
    noise = torch.from_numpy(rng.standard_normal((4, *size), dtype=np.float32))
    mixed = 0.9 * noise[:1] + 0.45 * noise[1:]
    smooth = gaussian_blur(mixed, [3, 3], [0.5, 0.5])
    return deviation * smooth / smooth.std()


def through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress an image (3, H, W) in [-1, 1] as JPEG of a quality from 1 to 100, and read it again."""
    file = io.BytesIO()
    Image.fromarray(to_pixels(image)).save(file, "JPEG", quality=quality)
    return to_tensor(np.asarray(Image.open(file)))[0]
