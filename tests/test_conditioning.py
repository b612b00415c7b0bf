"""Packing against diffusers' Flux pipelines, positions, and the two contexts."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxFillPipeline, FluxPipeline
from torch import Tensor

from layerdecomp.conditioning import (
    ConditioningConfig,
    bidirectional_context,
    inpainting_context,
    masked_images,
    pack,
    pack_mask,
    position_ids,
    unpack,
)

SIZES = [(32, 48), (64, 16)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def draw_mask(batch: int, height: int, width: int) -> Tensor:
    return (draw(batch, 1, height, width) > 0).float()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pack_and_unpack_equal_diffusers(height: int, width: int) -> None:
    latents = draw(2, 16, height // 8, width // 8)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, height // 8, width // 8))
    assert torch.equal(unpack(tokens, height // 8, width // 8), latents)
    assert torch.equal(unpack(tokens, height // 8, width // 8), FluxPipeline._unpack_latents(tokens, height, width, 8))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_context_equals_the_fill_pipeline(height: int, width: int) -> None:
    mask, latents = draw_mask(2, height, width), draw(2, 16, height // 8, width // 8)
    pipeline = SimpleNamespace(
        vae_scale_factor=8,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)),
        _pack_latents=FluxPipeline._pack_latents,
    )
    packed_mask, packed_latents = FluxFillPipeline.prepare_mask_latents(
        pipeline, mask, latents, 2, 16, 1, height, width, torch.float32, "cpu", None
    )
    assert torch.equal(pack_mask(mask), packed_mask)
    assert torch.equal(inpainting_context(latents, mask), torch.cat([packed_latents, packed_mask], dim=-1))


@pytest.mark.parametrize(("height", "width"), [(2, 3), (1, 5)])
def test_position_ids_equal_diffusers_but_for_the_layer(height: int, width: int) -> None:
    expected = FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
    assert torch.equal(position_ids(height, width), expected)
    expected[:, 0] = 1
    found = position_ids(height, width, layer=1)
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_a_token_and_its_position_match_its_pixels() -> None:
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., 32:48, 16:32] = 1
    token = int(pack_mask(mask).sum(-1).argmax())
    assert position_ids(4, 3)[token].tolist() == [0, 2, 1]
    assert pack_mask(mask).sum() == pack_mask(mask)[0, token].sum() == 256


def test_masked_images_partition_the_image() -> None:
    image, mask = draw(2, 3, 16, 32), draw_mask(2, 16, 32)
    background, foreground = masked_images(image, mask)
    assert torch.equal(background + foreground, image)
    assert not background[mask.expand_as(image) == 1].any()
    assert not foreground[mask.expand_as(image) == 0].any()


def test_each_layer_is_conditioned_on_its_masked_image_and_mask() -> None:
    background, foreground, mask = draw(2, 16, 4, 6), 1 + draw(2, 16, 4, 6), draw_mask(2, 32, 48)
    both = bidirectional_context(background, foreground, mask, ConditioningConfig())
    assert both.shape == (2, 2 * 6, 64 + 256)
    assert torch.equal(both[:, :6], inpainting_context(background, mask))
    assert torch.equal(both[:, 6:], inpainting_context(foreground, 1 - mask))
    assert inpainting_context(background.bfloat16(), mask).dtype == torch.bfloat16


def test_without_foreground_context_its_latents_are_zero_and_its_mask_is_one() -> None:
    background, foreground, mask = draw(2, 16, 4, 6), 1 + draw(2, 16, 4, 6), draw_mask(2, 32, 48)
    blind = bidirectional_context(background, foreground, mask, ConditioningConfig(foreground=False))
    assert torch.equal(blind[:, :6], inpainting_context(background, mask))
    assert not blind[:, 6:, :64].any()
    assert (blind[:, 6:, 64:] == 1).all()


def test_without_a_mask_only_the_mask_channels_are_zeroed() -> None:
    background, foreground, mask = draw(2, 16, 4, 6), 1 + draw(2, 16, 4, 6), draw_mask(2, 32, 48)
    for foreground_context in (True, False):
        usual = bidirectional_context(background, foreground, mask, ConditioningConfig(foreground=foreground_context))
        maskless = bidirectional_context(
            background, foreground, mask, ConditioningConfig(foreground=foreground_context, mask=False)
        )
        assert torch.equal(maskless[..., :64], usual[..., :64]) and usual[..., 64:].any()
        assert not maskless[..., 64:].any()
