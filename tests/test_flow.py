"""The noise convention, the distribution of training times and the loss."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from layerdecomp.errors import InputError
from layerdecomp.flow import (
    FlowConfig,
    flow_loss,
    interpolate,
    sample_times,
    seeded_normal,
    shift_times,
    velocity_target,
)


def test_interpolation_runs_from_data_to_noise_with_the_target_as_its_derivative() -> None:
    z, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(interpolate(z, noise, torch.zeros(3)), z)
    assert torch.equal(interpolate(z, noise, torch.ones(3)), noise)
    t = torch.tensor([0.2, 0.5, 0.7])  # one time per sample
    difference = interpolate(z, noise, t + 0.25) - interpolate(z, noise, t)
    torch.testing.assert_close(difference / 0.25, velocity_target(z, noise), atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_squared_error_in_float32() -> None:
    velocity = torch.full((2, 8), 3.0, dtype=torch.bfloat16)
    target = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16).expand(2, 8)
    loss = flow_loss(velocity, target)
    assert loss.dtype == torch.float32
    assert loss.item() == 2.5


@pytest.mark.parametrize(("tokens", "mu"), [(64, 0.4675), (256, 0.5), (4096, 1.15)])
def test_shift_is_linear_in_the_tokens_and_keeps_the_ends(tokens: int, mu: float) -> None:
    shifted = shift_times(torch.tensor([0.0, 0.5, 1.0]), tokens)
    assert shifted[1].item() == pytest.approx(math.exp(mu) / (math.exp(mu) + 1))
    ends = torch.tensor([0.0, 1.0])
    assert all(shift_times(ends, count).equal(ends) for count in range(tokens, tokens + 1000, 7))


def test_times_are_logit_normal_then_shifted() -> None:
    config = FlowConfig(logit_mean=0.3, logit_std=0.7)
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = sample_times(normal, 256, config)
    assert t.shape == normal.shape
    assert t.min() > 0
    assert t.max() < 1
    assert torch.equal(t, sample_times(normal, 256, config))
    logit = torch.logit(t)  # the shift by mu moves logits by exactly mu
    assert logit.mean().item() == pytest.approx(0.3 + 0.5, abs=0.02)
    assert logit.std().item() == pytest.approx(0.7, abs=0.02)


def test_without_shift_the_default_density_is_the_plain_logit_normal() -> None:
    normal = torch.linspace(-4, 4, 9)
    plain = replace(FlowConfig(), base_shift=0.0, max_shift=0.0)
    torch.testing.assert_close(sample_times(normal, 4096, plain), torch.sigmoid(normal))
    assert (sample_times(normal, 4096) > sample_times(normal, 4096, plain)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_tokens": 256, "max_tokens": 256}, "flow.max_tokens is 256; expected at least 257"),
        ({"logit_std": -1.0}, "flow.logit_std is -1.0; expected at least 0"),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowConfig(**change)


def test_noise_is_a_function_of_seed_position_and_stream() -> None:
    keys = [(0, 1, 0), (1, 0, 0), (0, 2, 0), (2, 0, 0), (0, 1, 1), (1, 1, 0)]  # no sum of two may stand for them
    rows = torch.cat([seeded_normal(seed, [position], (4,), stream) for seed, position, stream in keys])
    assert len(rows.unique(dim=0)) == len(keys)
    assert seeded_normal(0, [2, 1], (4,)).equal(rows[[2, 0]])
