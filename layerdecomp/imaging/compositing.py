"""The one place that composites, and that owns how colour and alpha are represented.

Two representations of a foreground, both (..., 4, H, W):

- straight: RGB in [-1, 1] that alpha has not touched, alpha in [0, 1]. Files, data samples and `over` use it.
- autoencoder space: RGB multiplied by alpha, alpha mapped to [-1, 1]; all four channels in [-1, 1], so that fully
  transparent is mid-grey (0, 0, 0, -1) whatever colour hides under it, and an opaque picture is the picture itself.

Since `over` is affine in colour, it gives the same result for [-1, 1] as for [0, 1] (Porter and Duff, "Compositing
Digital Images", SIGGRAPH 1984). Colours are blended as they are stored (sRGB values), as image editors do by default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INVISIBLE = 0.5 / 255  # an alpha below this is 0 in an 8-bit file


def over(foreground: Tensor, background: Tensor) -> Tensor:
    """Put a straight foreground (..., 4, H, W) over an opaque background (..., 3, H, W): an image (..., 3, H, W)."""
    rgb, alpha = foreground[..., :3, :, :], foreground[..., 3:, :, :]
    return alpha * rgb + (1 - alpha) * background


def to_autoencoder(foreground: Tensor) -> Tensor:
    """Map a straight foreground (..., 4, H, W) to autoencoder space, same shape, all channels in [-1, 1]."""
    rgb, alpha = foreground[..., :3, :, :], foreground[..., 3:, :, :]
    return torch.cat([rgb * alpha, 2 * alpha - 1], dim=-3)


def from_autoencoder(decoded: Tensor, threshold: float = 0.05, margin: float = 0.0) -> Tensor:
    """Map what an RGBA decoder returns, (..., 4, H, W) in about [-1, 1], to a straight foreground of the same shape.

    Colour is divided by alpha, but never by less than `threshold`: below it a decoder's error would be magnified into
    random saturated colours, so colour fades to mid-grey there, and is 0 where alpha would round to 0 in 8 bits.
    Alphas nearer to 0 or 1 than `margin` become 0 or 1, and those between are stretched.
    """
    alpha = ((decoded[..., 3:, :, :] + 1) / 2).clamp(0, 1)
    rgb = (decoded[..., :3, :, :] / alpha.clamp(min=threshold)).clamp(-1, 1)
    alpha = ((alpha - margin) / (1 - 2 * margin)).clamp(0, 1)
    return torch.cat([torch.where(alpha < INVISIBLE, 0, rgb), alpha], dim=-3)


def resize_straight(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """A straight foreground (B, 4, H, W) at another size.

    Premultiplied meanwhile, lest colours under alpha 0 bleed, and bilinear: without overshoot, an object of one colour
    keeps it to where alpha ends.
    """
    resized = F.interpolate(to_autoencoder(foreground), size, mode="bilinear", antialias=True)
    rgba = from_autoencoder(resized, threshold=INVISIBLE)
    return torch.where(rgba[..., 3:, :, :] < INVISIBLE, 0, rgba)


def checkerboard(height: int, width: int, cell: int = 8) -> Tensor:
    """Make the grey and white board (3, height, width) in [-1, 1] that editors show behind transparency."""
    rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
    odd = (rows[:, None] + columns) % 2
    return (1 - 0.5 * odd.float()).expand(3, height, width)


def on_checkerboard(foreground: Tensor, cell: int = 8) -> Tensor:
    """Show a straight foreground (..., 4, H, W) on a checkerboard: an image (..., 3, H, W) in [-1, 1]."""
    height, width = foreground.shape[-2:]
    return over(foreground, checkerboard(height, width, cell).to(foreground))
