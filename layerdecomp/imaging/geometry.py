"""Converts between images of any size and model tensors: ranges, resizing, padding; grows and feathers masks."""

from collections.abc import Callable
from functools import partial
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from layerdecomp.imaging.layers import Pixels

Box = tuple[float, float, float, float]  # left, top, right, bottom
ResizePicture = Callable[[Image.Image, tuple[int, int], Box | None], Image.Image]  # as `resize_picture`


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, C) uint8 -> (1, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 127.5 - 1


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """(..., C, H, W) in [-1, 1] -> (..., H, W, C) uint8, rounded."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> (..., C, *size), bicubic with antialiasing; unchanged if it has that size."""
    if images.shape[-2:] == size:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(flat, size, mode="bicubic", antialias=True).clamp(-1, 1)  # it overshoots at edges
    return resized.reshape(*images.shape[:-2], *size)


def resize_picture(picture: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """A picture, or a crop of it, resized to (height, width); colours are weighted by alpha."""
    resize = partial(Image.Image.resize, size=size[::-1], resample=Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    unchanged = picture.size == size[::-1] and box in (None, (0, 0, *picture.size))
    if picture.mode != "RGBA" or unchanged or picture.getchannel("A").getextrema()[0] == 255:
        return resize(picture)
    picture, box = _cropped(picture, size, box or (0, 0, *picture.size))
    resize = partial(resize, box=box)
    # Pillow would weight in 8 bits, which leaves few levels of colour at a low alpha. As in
    # `compositing.resize_straight`, colours are divided by alpha before its overshoot is clipped.
    *rgb, alpha = (np.array(channel, np.float32) for channel in picture.split())
    *rgb, alpha = (np.asarray(resize(Image.fromarray(plane))) for plane in (*(plane * alpha for plane in rgb), alpha))
    straight = np.stack([*(plane / alpha.clip(0.5) for plane in rgb), alpha], axis=-1)
    return Image.fromarray(np.where(alpha[..., None] < 0.5, 0, straight.clip(0, 255)).round().astype(np.uint8))


def _cropped(picture: Image.Image, size: tuple[int, int], box: Box) -> tuple[Image.Image, Box]:
    """The part of a picture that the box, resized to (height, width), depends on, and the box within it."""
    left, top, right, bottom = box
    reach = ceil(3 * max((right - left) / size[1], (bottom - top) / size[0], 1)) + 4  # of the bicubic kernel, and more
    x, y = max(int(left) - reach, 0), max(int(top) - reach, 0)
    width, height = picture.size
    part = picture.crop((x, y, min(ceil(right) + reach, width), min(ceil(bottom) + reach, height)))
    return part, (left - x, top - y, right - x, bottom - y)


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) in {0, 1} -> smaller (B, 1, *size): 1 if any covered pixel is 1, so that thin parts survive."""
    return F.adaptive_max_pool2d(mask, size)


def fitted_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width), shrunk with the same aspect so that the longer side is at most `max_side`."""
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pads (..., H, W) at the bottom and right by reflection, until both sides are multiples."""
    for axis in (-2, -1):
        length = images.shape[axis]
        period = max(1, 2 * length - 2)  # reflect repeatedly, for sides shorter than the padding
        places = torch.arange(-(-length // multiple) * multiple) % period
        images = images.index_select(axis, torch.minimum(places, period - places).to(images.device))
    return images


def grow_and_feather(mask: Tensor, grow: float, feather: float) -> Tensor:
    """A soft mask (B, 1, H, W) in [0, 1] from a mask in {0, 1}: grown by `grow`, then fading to 0 outwards.

    The widths `grow` and `feather` (half of the fade) are fractions of the longer side.
    """
    longer = max(mask.shape[-2:])
    wide = dilate(mask, round(grow * longer))
    reach = round(feather * longer)
    wider = dilate(wide, reach)  # so that the fade lies outside the grown mask
    faded = _box_sum(wider, reach) / (2 * reach + 1) ** 2
    return torch.where(wide, 1, faded)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Dilates a mask (B, 1, H, W) by a square of `radius` pixels in every direction; bool."""
    return _box_sum(mask, radius) > 0


def _box_sum(mask: Tensor, radius: int) -> Tensor:
    """How many pixels of each square of 2 radius + 1 are 1, at a cost that does not depend on the radius.

    The border's values continue beyond it. Counts are integers: exact, and summed deterministically on a GPU.
    """
    for axis in (-2, -1):
        length = mask.shape[axis]
        places = torch.arange(-radius - 1, length + radius, device=mask.device).clamp(0, length - 1)
        total = mask.index_select(axis, places).cumsum(axis, dtype=torch.int32)
        mask = total.narrow(axis, 2 * radius + 1, length) - total.narrow(axis, 0, length)
    return mask
