"""Pictures of any size: made ready for a model, and its layers brought back to where they came from."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layerdecomp.conditioning import TOKEN_FACTOR
from layerdecomp.imaging.compositing import from_autoencoder, to_autoencoder
from layerdecomp.imaging.geometry import fitted_size, grow_and_feather, pad_to_multiple, resize, shrink_mask
from layerdecomp.sampling import SampleConfig


def model_size(image: Tensor, sample: SampleConfig) -> tuple[int, int]:
    """The (height, width) that a model looks at of an image (B, 3, H, W), before it is padded."""
    return fitted_size((image.shape[-2], image.shape[-1]), sample.max_side)


def to_model_size(batch: Mapping[str, Tensor], sample: SampleConfig) -> dict[str, Tensor]:
    """A batch with its image, mask and cues shrunk to `sample.max_side` and padded to multiples of 16."""
    size = model_size(batch["image"], sample)
    pictures = {name: resize(batch[name], size) for name in ("image", "cues") if name in batch}
    pictures["mask"] = shrink_mask(batch["mask"], size)
    return {**batch, **{name: pad_to_multiple(values, TOKEN_FACTOR) for name, values in pictures.items()}}


def to_own_size(
    background: Tensor, foreground: Tensor, batch: Mapping[str, Tensor], sample: SampleConfig
) -> tuple[Tensor, Tensor]:
    """Layers that were drawn of `to_model_size(batch)`, at the batch's own size and where it is.

    Outside the mask, and what of the object it has missed, the background is the image's own if `sample.keep_pixels`.
    """
    image = batch["image"]
    full, size = (image.shape[-2], image.shape[-1]), model_size(image, sample)
    background, foreground = (layer[..., : size[0], : size[1]].to(image.device) for layer in (background, foreground))
    if size != full:  # premultiplied, or the grey under alpha 0 would bleed into the edges
        foreground = from_autoencoder(resize(to_autoencoder(foreground), full))
    background = resize(background, full).clamp(-1, 1)
    hole = torch.maximum(batch["mask"], missed(image, background, foreground))
    return keep_pixels(image, hole, background, sample), foreground


def at_its_size(
    draw: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]], batch: Mapping[str, Tensor], sample: SampleConfig
) -> tuple[Tensor, Tensor]:
    """What a model draws of a batch of pictures of any size, at that size."""
    return to_own_size(*draw(to_model_size(batch, sample)), batch, sample)


def missed(image: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """What of the object a mask may have missed: where it is, and has the image's colour rather than the background.

    Args:
        image, background: (B, 3, H, W) in [-1, 1].
        foreground: straight, (B, 4, H, W); where something stands in front of the object, the image has not its colour.

    Returns:
        (B, 1, H, W) in {0, 1}, as a mask.
    """
    misfits = ((image - layer[:, :3]).square().sum(1, keepdim=True) for layer in (foreground, background))
    return ((foreground[:, 3:] > 0.5) & torch.lt(*misfits)).to(image)


def keep_pixels(image: Tensor, mask: Tensor, painted: Tensor, sample: SampleConfig) -> Tensor:
    """What was painted in and around the mask (B, 1, H, W) in {0, 1}, the image elsewhere, if `sample.keep_pixels`."""
    if not sample.keep_pixels:
        return painted
    share = grow_and_feather(mask, sample.grow, sample.feather)
    return share * painted + (1 - share) * image
