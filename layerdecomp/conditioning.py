"""Packing of images, latents and masks into tokens, and the two image-mask contexts.

All token layouts of FLUX.1-Fill-dev are defined here. L = (H / 16) * (W / 16) tokens per layer for H x W pixels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

LATENT_FACTOR = 8  # pixels per latent
PATCH = 2  # latents per token, along each side
TOKEN_FACTOR = LATENT_FACTOR * PATCH  # pixels per token: image sides are multiples of it


@dataclass
class ConditioningConfig:
    """What the transformer is conditioned on; each `False` is an ablation."""

    foreground: bool = True  # False: the foreground layer is not conditioned on image and mask
    mask: bool = True  # False: mask channels stay zero, as for an image-to-image base, which takes no mask


def pack(latents: Tensor) -> Tensor:
    """Each 2 x 2 patch becomes a token: (B, C, h, w) -> (B, h / 2 * w / 2, 4 * C), channel slowest."""
    return rearrange(latents, "B C (h p) (w q) -> B (h w) (C p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`: (B, L, 4 * C) -> (B, C, h, w), with h and w counted in latents."""
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=h // PATCH, w=w // PATCH, p=PATCH, q=PATCH)


def pack_mask(mask: Tensor) -> Tensor:
    """Full-resolution mask: (B, 1, H, W) -> (B, L, 256). Each 8 x 8 block becomes 64 channels, packed like latents."""
    return pack(rearrange(mask, "B 1 (h p) (w q) -> B (p q) h w", p=LATENT_FACTOR, q=LATENT_FACTOR))


def position_ids(height: int, width: int, layer: int = 0, device: torch.device | str | None = None) -> Tensor:
    """(layer, row, column) of every token of a layer with height x width tokens, row by row: (L, 3) in float32."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    layers = torch.full((1,), layer, device=device)
    return torch.cartesian_prod(layers, rows, columns).float()


def masked_images(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The visible part of the image for each layer: everything but the object, and nothing but the object.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) in {0, 1}, 1 = object.

    Returns:
        The images for background and foreground, (B, 3, H, W) each; hidden pixels are 0 (mid-grey).
    """
    return image * (1 - mask), image * mask


def inpainting_context(latents: Tensor, mask: Tensor, with_mask: bool = True) -> Tensor:
    """The inpainting context of one layer, concatenated to its noisy tokens along the channels.

    Args:
        latents: scaled latents of the masked image, (B, C, H / 8, W / 8).
        mask: the hole, (B, 1, H, W), 1 = to be generated.
        with_mask: whether the mask channels hold the mask; otherwise they are zero.

    Returns:
        (B, L, 4 * C + 256).
    """
    mask = mask if with_mask else torch.zeros_like(mask)
    return torch.cat([pack(latents), pack_mask(mask).to(latents.dtype)], dim=-1)


def bidirectional_context(background: Tensor, foreground: Tensor, mask: Tensor, config: ConditioningConfig) -> Tensor:
    """The bi-directional context: the background is filled inside the mask, the foreground extended outside it.

    Args:
        background, foreground: scaled latents of the two `masked_images`, (B, C, H / 8, W / 8) each.
        mask: (B, 1, H, W) in {0, 1}, 1 = object.

    Returns:
        Context of the background's tokens, then of the foreground's, (B, 2 * L, 4 * C + 256).
    """
    if not config.foreground:  # zero latents, and a hole that covers everything
        foreground, foreground_hole = torch.zeros_like(foreground), torch.ones_like(mask)
    else:
        foreground_hole = 1 - mask
    layers = (background, mask), (foreground, foreground_hole)
    return torch.cat([inpainting_context(latents, hole, config.mask) for latents, hole in layers], dim=1)
