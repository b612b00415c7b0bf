"""Sampling: settings, time schedule, and an Euler solver for any velocity function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from layerdecomp.errors import InputError, check_at_least
from layerdecomp.flow import FlowConfig, shift_times
from layerdecomp.models.autoencoder import Tiling

Step = tuple[Tensor, Tensor]  # start and end time
Progress = Callable[[list[Step]], Iterable[Step]]  # wraps the steps to show progress, as tqdm does


@dataclass
class SampleConfig:
    """How layers are sampled from the model."""

    steps: int = 28  # of the solver; `euler` evaluates the model once per step
    guidance: float = 30.0  # an input of guidance-distilled models, 30 as in Fill's pipelines; tiny models ignore it
    max_side: int = 1024  # larger images are decomposed at this size, and their layers resized back
    ensemble: int = 1  # samples drawn; the foreground is their median, since what varies between them is a guess
    alpha_margin: float = 0.0  # alphas within this of 0 or 1 become 0 or 1, which small models never quite reach
    tile: int = 1024  # pixels: larger images pass through the autoencoder in tiles of this side, to limit memory
    tile_overlap: int = 256  # minimum number of pixels over which neighbouring tiles are blended
    keep_pixels: bool = True  # keep the input's pixels in the background, away from the object
    grow: float = 0.015  # for keep_pixels, the mask is dilated by this fraction of the longer side
    feather: float = 0.01  # and fades to 0 over twice this fraction

    def __post_init__(self) -> None:
        check_at_least(1, self, "sample.", "steps", "max_side", "ensemble")
        check_at_least(64, self, "sample.", "tile")
        check_at_least(0, self, "sample.", "grow", "feather", "alpha_margin", "tile_overlap")
        if self.alpha_margin >= 0.5:
            raise InputError(
                f"sample.alpha_margin is {self.alpha_margin}; expected less than 0.5, which leaves no alphas in between"
            )
        if self.tile_overlap > self.tile // 2:
            raise InputError(
                f"sample.tile_overlap is {self.tile_overlap}; expected at most half of a tile, {self.tile}"
            )

    @property
    def tiling(self) -> Tiling:
        """Tiling of large images in the autoencoder."""
        return Tiling(self.tile, self.tile_overlap)


def schedule(steps: int, tokens: int, config: FlowConfig | None = None) -> Tensor:
    """Times of `steps` sampling steps, from exactly 1 to exactly 0: (steps + 1,) in float32.

    Args:
        steps: number of velocity evaluations, at least 1.
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
    """Integrates the velocity from the first to the last of `timesteps`.

    Args:
        velocity: maps x (B, ...) and t (B,) to dx/dt, shaped as x.
        x: the state at timesteps[0]; pure noise if that is 1. Keep it float32 where the model is bf16.
        timesteps: from `schedule`, (steps + 1,).
        progress: wraps the steps; `tqdm` shows a progress bar.

    Returns:
        The state at timesteps[-1].
    """
    for t, t_next in progress(list(pairwise(timesteps.to(x.device)))):
        x = x + (t_next - t) * velocity(x, t.expand(x.shape[0]))
    return x
