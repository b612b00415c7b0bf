"""Images of any size: resized and padded for a model, and its layers restored to the original size."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layerdecomp.conditioning import TOKEN_FACTOR
from layerdecomp.imaging.compositing import resize_straight
from layerdecomp.imaging.cues import resize_cues
from layerdecomp.imaging.geometry import fitted_size, grow_and_feather, pad_to_multiple, resize, shrink_mask
from layerdecomp.sampling import SampleConfig


def model_size(image: Tensor, sample: SampleConfig) -> tuple[int, int]:
    """The (height, width) at which a model sees an image (B, 3, H, W), before padding."""
    return fitted_size((image.shape[-2], image.shape[-1]), sample.max_side)


def to_model_size(batch: Mapping[str, Tensor], sample: SampleConfig) -> dict[str, Tensor]:
    """A batch with its image, mask and cues shrunk to `sample.max_side` and padded to multiples of 16."""
    size = model_size(batch["image"], sample)
    resized = {"image": resize(batch["image"], size), "mask": shrink_mask(batch["mask"], size)}
    if "cues" in batch:
        resized["cues"] = resize_cues(batch["cues"], size)
    return {**batch, **{name: pad_to_multiple(values, TOKEN_FACTOR) for name, values in resized.items()}}


def to_original_size(
    background: Tensor, foreground: Tensor, batch: Mapping[str, Tensor], sample: SampleConfig
) -> tuple[Tensor, Tensor]:
    """Layers sampled for `to_model_size(batch)`, at the batch's original size and on its device.

    With `sample.keep_pixels`, the background is the image itself outside the mask and any part of the object it missed.
    """
    image = batch["image"]
    full = (image.shape[-2], image.shape[-1])
    height, width = model_size(image, sample)
    background = background[..., :height, :width].to(image.device)
    foreground = foreground[..., :height, :width].to(image.device)
    if (height, width) != full:
        foreground = resize_straight(foreground, full)
    background = resize(background, full)
    hole = torch.maximum(batch["mask"], missed_object_mask(image, background, foreground))
    return keep_pixels(image, hole, background, sample), foreground


def at_original_size(
    draw: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]], batch: Mapping[str, Tensor], sample: SampleConfig
) -> tuple[Tensor, Tensor]:
    """Layers sampled by a model for a batch of images of any size, at that size."""
    return to_original_size(*draw(to_model_size(batch, sample)), batch, sample)


def missed_object_mask(image: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """Object pixels that the mask may have missed: opaque, and nearer to the image's colour than the background.

    Args:
        image, background: (B, 3, H, W) in [-1, 1].
        foreground: straight, (B, 4, H, W); where the object is occluded, the image has another colour.

    Returns:
        Mask (B, 1, H, W) in {0, 1}.
    """

    def misfit(layer: Tensor) -> Tensor:
        return (image - layer[:, :3]).square().sum(1, keepdim=True)

    return ((foreground[:, 3:] > 0.5) & (misfit(foreground) < misfit(background))).to(image)


def keep_pixels(image: Tensor, mask: Tensor, painted: Tensor, sample: SampleConfig) -> Tensor:
    """`painted` in and around the mask (B, 1, H, W) in {0, 1} and, if `sample.keep_pixels`, the image elsewhere."""
    if not sample.keep_pixels:
        return painted
    share = grow_and_feather(mask, sample.grow, sample.feather)
    return share * painted + (1 - share) * image
