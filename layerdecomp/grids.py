"""Images for evaluations: grids of layers side by side, and error maps."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from layerdecomp.imaging.compositing import on_checkerboard
from layerdecomp.imaging.geometry import dilate, to_pixels
from layerdecomp.predictions import Prediction

MAX_TILE = 256  # pixels; larger samples are downscaled
GAP, HEADER, GUTTER = 4, 30, 60  # pixels between tiles, above them for column names, left of them for row labels
IN_A_ROW = 8  # images
ERROR_GAIN = 4  # an error of a quarter of the range saturates


def comparison_grid(
    batch: Mapping[str, Tensor], predictions: Mapping[str, Prediction], labels: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """Draws an image with one line per sample: input, mask outline, the layers of every prediction, the true layers.

    Args:
        batch: B collated samples with image, mask, foreground and background.
        predictions: row name -> (background, foreground) for that batch; foregrounds are shown on a checkerboard.
        labels: B texts to the left of the samples, such as "worst"; may be empty.

    Returns:
        (height, width, 3) uint8.
    """
    assert not labels or len(labels) == len(batch["image"])
    columns = _columns(batch, predictions)
    tiles = [tiles_of(images) for images in columns.values()]
    height, width = tiles[0].shape[1:3]
    left = GUTTER if labels else GAP
    size = left + len(tiles) * (width + GAP), HEADER + len(tiles[0]) * (height + GAP)
    canvas = Image.new("RGB", size, "white")
    for x, column in enumerate(tiles):
        for y, tile in enumerate(column):
            canvas.paste(Image.fromarray(tile), (left + x * (width + GAP), HEADER + y * (height + GAP)))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for x, name in enumerate(columns):
        draw.multiline_text((left + x * (width + GAP), 2), name, fill="black", font=font)
    for y, label in enumerate(labels):
        draw.text((GAP, HEADER + y * (height + GAP)), label, fill="black", font=font)
    return np.asarray(canvas)


def _columns(batch: Mapping[str, Tensor], predictions: Mapping[str, Prediction]) -> dict[str, Tensor]:
    """Column name -> images (B, 3, H, W) in [-1, 1], left to right."""
    columns = {"input": batch["image"], "mask": outlined(batch["image"], batch["mask"])}
    for row, (background, foreground) in {
        **predictions,
        "truth": (batch["background"], batch.get("foreground")),
    }.items():
        if background is not None:
            columns[f"{row}\nbackground"] = background
        if foreground is not None:
            columns[f"{row}\nforeground"] = on_checkerboard(foreground)
    return columns


def outlined(image: Tensor, mask: Tensor) -> Tensor:
    """The image with a magenta outline just outside the mask."""
    inside = mask > 0.5
    magenta = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).to(image)
    return torch.where(dilate(inside, 1) & ~inside, magenta, image)


def tiles_of(images: Tensor) -> NDArray[np.uint8]:
    """Images (B, 3, H, W) in [-1, 1] as (B, h, w, 3) uint8, the longer side at most MAX_TILE."""
    images = images.detach().float().cpu()
    scale = MAX_TILE / max(images.shape[-2:])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
        images = F.interpolate(images, size=(height, width), mode="area")
    return to_pixels(images)


def image_rows(*rows: Tensor) -> NDArray[np.uint8]:
    """The first images of each row, (B, 3, H, W) in [-1, 1], side by side: (rows H, 8 W, 3) uint8."""
    return to_pixels(torch.cat([torch.cat(list(row[:IN_A_ROW].float()), dim=-1) for row in rows], dim=-2))


def error_map(prediction: Tensor, target: Tensor, scale: float) -> Tensor:
    """Absolute differences as colours (B, 3, H, W) in [-1, 1]: black for none, then red, yellow, white.

    Args:
        prediction, target: (B, C, H, W).
        scale: size of the value range: 1 for alpha, 2 for colours in [-1, 1].
    """
    error = (prediction - target).abs().mean(dim=1, keepdim=True) * ERROR_GAIN / scale
    return torch.cat([3 * error - step for step in range(3)], dim=1).clamp(0, 1) * 2 - 1
