"""Sampling: its settings, a schedule of times, and an Euler solver over any velocity function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from layerdecomp.errors import InputError, check_at_least
from layerdecomp.flow import FlowConfig, shift_times
from layerdecomp.models.autoencoder import Tiling

Step = tuple[Tensor, Tensor]  # the times that it goes from and to
Progress = Callable[[list[Step]], Iterable[Step]]  # passes on what it is given and shows how far it is, as tqdm does


@dataclass
class SampleConfig:
    """How layers are drawn from the model."""

    steps: int = 28
    guidance: float = 30.0  # FLUX.1-Fill is distilled to take the scale as an input; tiny models ignore it
    max_side: int = 1024  # larger pictures are decomposed at this size, the layers brought back
    ensemble: int = 1  # draws, of whose foregrounds the median is taken: what differs from draw to draw is a guess
    alpha_margin: float = 0.0  # alphas nearer to 0 or 1 become 0 or 1: a small model's are never quite there
    tile: int = 1024  # pixels: larger pictures pass the autoencoder in tiles of this side, so that they fit,
    tile_overlap: int = 256  # each of which fades into its neighbours over so many
    keep_pixels: bool = True  # the background away from the object is the input itself
    grow: float = 0.015  # by how much the mask grows before that, and over how much it
    feather: float = 0.01  # fades; both as shares of the longer side

    def __post_init__(self) -> None:
        check_at_least(1, self, "sample.", "steps", "max_side", "ensemble")
        check_at_least(64, self, "sample.", "tile")
        check_at_least(0, self, "sample.", "grow", "feather", "alpha_margin", "tile_overlap")
        if self.alpha_margin >= 0.5:
            raise InputError(
                f"sample.alpha_margin is {self.alpha_margin}; expected less than 0.5, which leaves no alpha between"
            )
        if self.tile_overlap > self.tile // 2:
            raise InputError(
                f"sample.tile_overlap is {self.tile_overlap}; expected at most half of a tile, {self.tile}"
            )

    @property
    def tiling(self) -> Tiling:
        """How the autoencoder sees large pictures."""
        return Tiling(self.tile, self.tile_overlap)


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
