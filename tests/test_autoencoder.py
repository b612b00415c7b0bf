"""Autoencoder against the published names and against diffusers' AutoencoderKL."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import build_reference_autoencoder, randomize, relative_error

from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig, rescale_latents

TINY = AutoencoderConfig(ch=8, ch_mult=[1, 2, 3, 3], num_res_blocks=2, z_channels=16, norm_groups=4)


def build(config: AutoencoderConfig = TINY) -> Autoencoder:
    model = Autoencoder(config)
    randomize(model)
    return model.eval()


def test_full_size_has_the_published_names_and_shapes() -> None:
    published = json.loads((Path(__file__).parent / "published_keys.json").read_text())["autoencoder"]
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
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
def test_rescaled_latents_decode_to_the_same_picture() -> None:
    model = build()
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factors = torch.linspace(0.3, 3, 16)
    mean, log_variance = model.posterior(x)
    picture = model.decoder(mean)
    rescale_latents(model, factors)
    rescaled, rescaled_log_variance = model.posterior(x)
    assert relative_error(rescaled, mean * factors.view(-1, 1, 1)) < 1e-5
    deviation = torch.exp(0.5 * log_variance) * factors.view(-1, 1, 1)
    assert relative_error(torch.exp(0.5 * rescaled_log_variance), deviation) < 1e-5
    assert relative_error(model.decoder(rescaled), picture) < 1e-5
