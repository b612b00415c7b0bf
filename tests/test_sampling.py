"""Schedule against diffusers' scheduler with FLUX's settings; Euler against known solutions; invalid settings."""

from collections.abc import Iterator
from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.flow import FlowConfig
from layerdecomp.models.autoencoder import Tiling
from layerdecomp.sampling import SampleConfig, euler, schedule


@pytest.mark.parametrize(
    "tokens", [2, 64, 256, 1536, 4096, 16384]
)  # the last: 2048 x 2048, where the shift is extrapolated
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_schedule_equals_diffusers(steps: int, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # FLUX.1's scheduler_config.json
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    times = schedule(steps, tokens)
    assert (times[0], times[-1]) == (1, 0)
    torch.testing.assert_close(times, scheduler.sigmas, atol=1e-6, rtol=0)


def test_schedule_decreases_and_follows_its_config() -> None:
    times = schedule(10, 1024)
    assert (times.diff() < 0).all()
    torch.testing.assert_close(schedule(10, 1024, FlowConfig(base_shift=0.0, max_shift=0.0)), torch.linspace(1, 0, 11))


def test_euler_is_exact_on_straight_paths() -> None:
    z, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(euler(lambda x, t: noise - z, noise, schedule(7, 256)), z)


def test_euler_converges_to_a_curved_solution_at_first_order() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        return x * t[:, None]  # x(0) = x(1) * exp(-1 / 2)

    start = torch.ones(2, 3, dtype=torch.float64)
    errors = [
        (euler(velocity, start, torch.linspace(1, 0, steps + 1, dtype=torch.float64)) - np.exp(-0.5)).abs().max().item()
        for steps in (20, 40)
    ]
    assert 1e-3 < errors[0] < 5e-2
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_euler_keeps_no_graph_and_does_not_modify_its_input() -> None:
    scale = torch.ones((), requires_grad=True)
    x = torch.ones(1, 2)
    result = euler(lambda x, t: scale * x, x, schedule(2, 256))
    assert not result.requires_grad
    assert torch.equal(x, torch.ones(1, 2))
    assert not torch.equal(result, x)


def test_progress_iterates_over_the_steps() -> None:
    seen: list[int] = []

    def progress(steps: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for step in steps:
            yield step
            seen.append(len(steps))

    noise = torch.ones(2, 3)
    expected = euler(lambda x, t: x, noise, schedule(5, 256))
    assert torch.equal(euler(lambda x, t: x, noise, schedule(5, 256), progress), expected)
    assert seen == [5] * 5


def test_euler_evaluates_the_velocity_at_the_start_of_each_step() -> None:
    times, seen = schedule(5, 256), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    euler(velocity, torch.ones(2, 3), times)
    assert torch.equal(torch.stack(seen), times[:-1, None].expand(-1, 2))


def test_the_default_guidance_is_that_of_the_fill_pipeline() -> None:
    assert SampleConfig().guidance == signature(FluxFillPipeline.__call__).parameters["guidance_scale"].default


def test_tiles_may_overlap_by_half() -> None:
    assert SampleConfig(tile=256, tile_overlap=128).tiling == Tiling(256, 128)


def test_less_than_one_step_is_refused() -> None:
    with pytest.raises(InputError, match="steps"):
        schedule(0, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 32}, "sample.tile is 32; expected at least 64"),
        ({"tile": 256}, "sample.tile_overlap is 256; expected at most half of a tile, 256"),
        ({"tile_overlap": -8}, "sample.tile_overlap is -8; expected at least 0"),
        ({"alpha_margin": 0.5}, "sample.alpha_margin is 0.5; expected less than 0.5"),
        ({"ensemble": 0}, "sample.ensemble is 0; expected at least 1"),
        ({"grow": -0.1}, "sample.grow is -0.1; expected at least 0"),
        ({"feather": -0.1}, "sample.feather is -0.1; expected at least 0"),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SampleConfig(**change)
