"""The autoencoder against the published tensor names and against diffusers' AutoencoderKL."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from reference import build_reference_autoencoder, randomize, relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from layerdecomp.errors import InputError
from layerdecomp.imaging.geometry import to_tensor
from layerdecomp.memory import Peak
from layerdecomp.metrics.background import psnr
from layerdecomp.models.autoencoder import (
    AttnBlock,
    Autoencoder,
    AutoencoderConfig,
    ResnetBlock,
    Tiling,
    extend_to_rgba,
    rescale_latents,
)
from layerdecomp.weights import load_autoencoder

TINY = AutoencoderConfig(ch=8, ch_mult=[1, 2, 3, 3], num_res_blocks=2, z_channels=16, norm_groups=4)


def build(config: AutoencoderConfig = TINY) -> Autoencoder:
    model = Autoencoder(config)
    randomize(model)
    return model.eval()


def test_full_size_has_the_published_names_and_shapes() -> None:
    published = json.loads((Path(__file__).parent / "published_keys.json").read_text())["autoencoder"]
    config = AutoencoderConfig()
    with torch.device("meta"):
        model = Autoencoder(config)
    assert (config.scale_factor, config.shift_factor) == (0.3611, 0.1159)  # which no tensor holds
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert len(published) == 244
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_819_683


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, in_channels=4), replace(TINY, num_res_blocks=1, ch_mult=[1, 1, 2])],
    ids=["rgb", "rgba", "shallow"],
)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 32, 48), (1, 64, 16)])
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(config: AutoencoderConfig, batch: int, height: int, width: int) -> None:
    model = build(config)
    reference = build_reference_autoencoder(model)
    generator = torch.Generator().manual_seed(height)
    x = torch.rand(batch, config.in_channels, height, width, generator=generator) * 2 - 1
    noise = torch.randn(batch, 16, height // config.factor, width // config.factor, generator=generator)
    posterior = reference.encode(x).latent_dist

    def scaled(latents: torch.Tensor) -> torch.Tensor:
        return (latents - config.shift_factor) * config.scale_factor

    assert relative_error(model.encode(x), scaled(posterior.mode())) < 2e-5
    assert relative_error(model.encode(x, noise=noise), scaled(posterior.mean + posterior.std * noise)) < 2e-5
    z = scaled(noise)
    assert relative_error(model.decode(z), reference.decode(noise).sample) < 2e-5


@torch.no_grad()
def test_log_variances_are_clamped_like_diffusers() -> None:
    model = build()
    model.encoder.conv_out.bias[16:] += torch.tensor([-100.0, 100.0]).repeat(8)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = build_reference_autoencoder(model).encode(x).latent_dist.logvar
    assert (expected.min(), expected.max()) == (-30, 20)
    torch.testing.assert_close(model.posterior(x)[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 1}, "in_channels is 1; expected 3"),
        ({"ch": 6, "ch_mult": [2, 1]}, "a level is 6 channels wide, which norm_groups = 4 does not divide"),
        ({"norm_groups": 5}, "a level is 8 channels wide"),
    ],
)
def test_invalid_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


def test_every_level_is_a_multiple_of_the_groups_though_their_unit_is_not() -> None:
    assert replace(TINY, ch=2, ch_mult=[2, 4]).factor == 2


@torch.no_grad()
def test_initial_weights_preserve_images() -> None:
    model = Autoencoder(TINY)
    randomize(model)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, ResnetBlock | AttnBlock):
            width = module.norm1.num_channels if isinstance(module, ResnetBlock) else module.norm.num_channels
            features = torch.randn(1, width, 6, 6, generator=generator)
            shortcut = module.nin_shortcut if isinstance(module, ResnetBlock) else nn.Identity()
            assert torch.equal(module(features), shortcut(features))
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    for conv in (model.encoder.down[0].downsample.conv, model.decoder.up[1].upsample.conv, model.decoder.conv_in):
        taps = slice(0, 2) if conv.stride[0] == 2 else slice(1, 2)
        kernel = conv.weight[:, :, taps, taps].flatten(1)
        side = min(kernel.shape)
        gram = kernel @ kernel.T if len(kernel) == side else kernel.T @ kernel
        assert (gram - torch.eye(side)).abs().max() < 0.4
        shares = conv.weight[:, :, taps, taps].square().sum(dim=(0, 1)) / kernel.square().sum()
        assert shares.min() > 0.1  # every pixel counts
        assert conv.weight[:, :, 2].any() and conv.weight[:, :, 2].abs().max() < 0.15 and not conv.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_extended_autoencoder_equals_the_original_on_opaque_images(dtype: torch.dtype) -> None:
    rgb = build().to(dtype)
    rgba = extend_to_rgba(rgb)
    x = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    z = rgb.encode(x)
    torch.testing.assert_close(rgba.encode(F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)), z)
    decoded = rgba.decode(z)
    torch.testing.assert_close(decoded[:, :3], rgb.decode(z))
    assert decoded.dtype == dtype and (decoded[:, 3] == 1).all()
    rgba.decoder.conv_in.weight.zero_()
    assert rgb.decoder.conv_in.weight.any()  # a copy
    with pytest.raises(InputError, match="4 channels cannot be extended"):
        extend_to_rgba(rgba)


@torch.no_grad()
def test_rescaled_latents_decode_to_the_same_image() -> None:
    model = build()
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factors = torch.linspace(0.3, 3, 16)
    mean, log_variance = model.posterior(x)
    decoded = model.decoder(mean)
    rescale_latents(model, factors)
    rescaled, rescaled_log_variance = model.posterior(x)
    assert relative_error(rescaled, mean * factors.view(-1, 1, 1)) < 1e-5
    deviation = torch.exp(0.5 * log_variance) * factors.view(-1, 1, 1)
    assert relative_error(torch.exp(0.5 * rescaled_log_variance), deviation) < 1e-5
    assert relative_error(model.decoder(rescaled), decoded) < 1e-5


@pytest.mark.parametrize("size", [(160, 48), (48, 160)])
@torch.no_grad()
def test_tiled_encoding_and_decoding_equal_diffusers(size: tuple[int, int]) -> None:
    """Except for diffusers' last tile, which is only as wide as the remainder, and corners, which it blends twice."""
    model, tiling = build(), Tiling(size=64, overlap=16)
    reference = build_reference_autoencoder(model)
    reference.tile_sample_min_size, reference.tile_latent_min_size, reference.tile_overlap_factor = 64, 8, 0.25
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = model.posterior(x, tiling)
    moments, expected = torch.cat([mean, log_variance], 1), reference._tiled_encode(x)
    z = (mean - model.config.shift_factor) * model.config.scale_factor
    assert torch.equal(model.encode(x, tiling=tiling), z)
    tiled, expected_tiled = model.decode(z, tiling=tiling), reference.tiled_decode(mean).sample
    dim = size.index(160) - 2
    assert relative_error(moments.narrow(dim, 0, 18), expected.narrow(dim, 0, 18)) < 2e-5
    assert relative_error(tiled.narrow(dim, 0, 144), expected_tiled.narrow(dim, 0, 144)) < 2e-5
    assert relative_error(tiled, model.decode(z)) > 1e-3


@pytest.mark.parametrize("overlap", [0, 8, 24, 32])
@pytest.mark.parametrize(("height", "width"), [(72, 64), (8, 2048), (200, 136), (64, 64)])
def test_tiles_cover_every_size(height: int, width: int, overlap: int) -> None:
    """With an encoder and a decoder that process each latent separately, tiling changes nothing."""
    model, tiling = build(), Tiling(64, overlap)
    model.encoder.forward = lambda x: F.avg_pool2d(x, 8).repeat(1, 16, 1, 1)[:, :32]  # type: ignore[method-assign]
    model.decoder.forward = lambda z: F.interpolate(z[:, :3], scale_factor=8)  # type: ignore[method-assign]
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    z = model.encode(x)
    torch.testing.assert_close(model.encode(x, tiling=tiling), z)
    torch.testing.assert_close(model.decode(z, tiling=tiling), model.decode(z))


@torch.no_grad()
def test_tiling_does_not_change_images_that_fit_one_tile() -> None:
    model, x = build(), torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    for tiling in (Tiling(), Tiling(64, 16)):
        z = model.encode(x, tiling=tiling)
        assert torch.equal(z, model.encode(x)) and torch.equal(model.decode(z, tiling=tiling), model.decode(z))


@torch.no_grad()
def test_tiles_of_a_photograph_show_no_seams() -> None:
    model = load_autoencoder("checkpoints/tiny/autoencoder.safetensors").eval()
    x = to_tensor(skimage.data.coffee()[:160, 100:260])
    z = model.encode(x)
    whole = model.decode(z)
    hard, soft = (psnr(model.decode(z, tiling=Tiling(80, overlap)), whole).item() for overlap in (0, 32))
    assert soft > max(38, hard + 1)
    assert psnr(model.decode(model.encode(x, tiling=Tiling(80, 32)), tiling=Tiling(80, 32)), x) > psnr(whole, x) - 0.3


@pytest.fixture
def in_bf16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@torch.no_grad()
def test_decoding_2048_in_tiles_takes_the_memory_of_1024(in_bf16: None) -> None:
    """FLUX's autoencoder; memory is counted on fake tensors."""
    peaks = {}
    with FakeTensorMode():
        model = Autoencoder(AutoencoderConfig())
        for side, tiling in ((1024, None), (2048, None), (2048, Tiling())):
            with Peak() as live:
                model.decode(torch.empty(1, 16, side // 8, side // 8), tiling=tiling)
            peaks[f"{side}{' in tiles' if tiling else ''}"] = live.peak / 1e9
    print(*(f"{name}: {peak:.2f} GB" for name, peak in peaks.items()), sep="\n")
    assert peaks["2048"] > 3.5 * peaks["1024"]
    assert peaks["2048 in tiles"] < 1.1 * peaks["1024"]
