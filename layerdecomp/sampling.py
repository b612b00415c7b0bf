"""Sampling: a schedule of times and an Euler solver over any velocity function."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.flow import FlowConfig, shift_times

Step = tuple[Tensor, Tensor]  # the times that it goes from and to
Progress = Callable[[list[Step]], Iterable[Step]]  # passes on what it is given and shows how far it is, as tqdm does


def schedule(steps: int, tokens: int, config: FlowConfig | None = None) -> Tensor:
    """Times of a sampler with `steps` steps, from exactly 1 to exactly 0: (steps + 1,) in float32.

    Args:
        steps: how often the velocity will be computed, at least 1.
        tokens: tokens of ONE layer, L, which sets the shift as in training.

    Raises:
        InputError: fewer than one step.
    """
    if steps < 1:
        raise InputError(f"sample.steps = {steps}: expected a positive whole number")
    return shift_times(torch.linspace(1, 0, steps + 1), tokens, config)


@torch.no_grad()
def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, timesteps: Tensor, progress: Progress = iter
) -> Tensor:
    """Follows the velocity from the first to the last of the given times.

    Args:
        velocity: maps x (B, ...) and t (B,) to dx/dt, shaped as x.
        x: the state at timesteps[0]; pure noise if that is 1. Keep it float32 where the model is bf16.
        timesteps: from `schedule`, (steps + 1,).
        progress: goes through the steps; `tqdm` shows a bar.

    Returns:
        The state at timesteps[-1].
    """
    for t, t_next in progress(list(pairwise(timesteps.to(x.device)))):
        x = x + (t_next - t) * velocity(x, t.expand(x.shape[0]))
    return x
