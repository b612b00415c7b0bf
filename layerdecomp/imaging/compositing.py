"""Compositing, and the two representations of colour and alpha.

Both are (..., 4, H, W):

- straight: RGB in [-1, 1], not premultiplied; alpha in [0, 1]. Used by files, data samples and `over`.
- autoencoder space: RGB premultiplied by alpha, alpha mapped to [-1, 1]. All channels are in [-1, 1]; fully transparent
  pixels are mid-grey (0, 0, 0, -1), whatever their straight colour, and the RGB of an opaque image is unchanged.

`over` (Porter and Duff, "Compositing Digital Images", SIGGRAPH 1984) is affine in colour, so it gives the same result
for [-1, 1] as for [0, 1]. It blends the stored (sRGB) values, as image editors do by default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INVISIBLE = 0.5 / 255  # alpha below this rounds to 0 in 8 bits
FADING = 0.05  # alpha below which the colours of a decoded foreground fade to mid-grey


def over(foreground: Tensor, background: Tensor) -> Tensor:
    """Composite a straight foreground (..., 4, H, W) over an opaque background: both images are (..., 3, H, W)."""
    rgb, alpha = foreground[..., :3, :, :], foreground[..., 3:, :, :]
    return alpha * rgb + (1 - alpha) * background


def with_unit_alpha(rgba: Tensor) -> Tensor:
    """Straight RGBA (..., 4, H, W) whose alpha is in [-1, 1], as read from pixels, with alpha in [0, 1]."""
    return torch.cat([rgba[..., :3, :, :], (rgba[..., 3:, :, :] + 1) / 2], dim=-3)


def with_pixel_alpha(foreground: Tensor) -> Tensor:
    """The inverse of `with_unit_alpha`, for conversion to pixels; an RGB image (..., 3, H, W) stays as it is."""
    return torch.cat([foreground[..., :3, :, :], 2 * foreground[..., 3:, :, :] - 1], dim=-3)


def to_autoencoder(foreground: Tensor) -> Tensor:
    """Map a straight foreground (..., 4, H, W) to autoencoder space, of the same shape."""
    rgb, alpha = foreground[..., :3, :, :], foreground[..., 3:, :, :]
    return torch.cat([rgb * alpha, 2 * alpha - 1], dim=-3)


def from_autoencoder(decoded: Tensor, margin: float = 0.0) -> Tensor:
    """Map the output of an RGBA decoder, (..., 4, H, W) in about [-1, 1], to a straight foreground of the same shape.

    Colour is divided by alpha, but by no less than `FADING`: smaller divisors would amplify decoding errors into
    random saturated colours. Below it, colour fades to mid-grey, and it is 0 where alpha rounds to 0 in 8 bits.
    Alphas within `margin` of 0 or 1 are snapped to 0 or 1; those between are stretched linearly.
    """
    alpha = ((decoded[..., 3:, :, :] + 1) / 2).clamp(0, 1)
    rgb = (decoded[..., :3, :, :] / alpha.clamp(min=FADING)).clamp(-1, 1)
    alpha = ((alpha - margin) / (1 - 2 * margin)).clamp(0, 1)
    return torch.cat([torch.where(alpha < INVISIBLE, 0, rgb), alpha], dim=-3)


def resize_straight(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a straight foreground (B, 4, H, W), bicubic with antialiasing.

    Resizes premultiplied values, so that colours under alpha 0 do not bleed. They are divided by alpha before its
    overshoot is clamped: a uniformly coloured object keeps its colour up to its edge, at any alpha.
    """
    rgb, alpha = foreground[:, :3], foreground[:, 3:]
    resized = F.interpolate(torch.cat([rgb * alpha, alpha], dim=1), size, mode="bicubic", antialias=True)
    premultiplied, alpha = resized[:, :3], resized[:, 3:]
    rgb = (premultiplied / alpha.clamp(min=INVISIBLE)).clamp(-1, 1)
    return torch.where(alpha < INVISIBLE, 0, torch.cat([rgb, alpha.clamp(max=1)], dim=1))


def checkerboard(height: int, width: int, cell: int = 8) -> Tensor:
    """Make the grey and white checkerboard (3, height, width) in [-1, 1] that editors show behind transparency."""
    rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
    odd = (rows[:, None] + columns) % 2
    return (1 - 0.5 * odd.float()).expand(3, height, width)


def on_checkerboard(foreground: Tensor, cell: int = 8) -> Tensor:
    """Composite a straight foreground (..., 4, H, W) over a checkerboard: an image (..., 3, H, W) in [-1, 1]."""
    height, width = foreground.shape[-2:]
    return over(foreground, checkerboard(height, width, cell).to(foreground))
