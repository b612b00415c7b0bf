"""Rectified flow: noise convention, density of training times and loss, shared by training and sampling.

t = 0 is data, t = 1 is noise; x_t = (1 - t) z + t noise, and the velocity dx/dt = noise - z points towards the noise.
Following Esser et al. 2024 (arXiv 2403.03206), with FLUX's shift of times by the number of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layerdecomp.errors import check_at_least


@dataclass
class FlowConfig:
    """Density of training times and the shift towards noise, which grows with the number of tokens.

    The shift mu is the line through (base_tokens, base_shift) and (max_tokens, max_shift); the defaults are FLUX's.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        check_at_least(self.base_tokens + 1, self, "flow.", "max_tokens")
        check_at_least(0, self, "flow.", "logit_std")


def shift_times(t: Tensor, tokens: int, config: FlowConfig | None = None) -> Tensor:
    """Moves times in [0, 1] towards 1: e^mu / (e^mu + 1 / t - 1). 0 and 1 map exactly to themselves.

    Args:
        t: any shape.
        tokens: tokens of ONE layer, L. More tokens are more redundant, so it takes more noise to hide the image.
    """
    config = config or FlowConfig()
    slope = (config.max_shift - config.base_shift) / (config.max_tokens - config.base_tokens)
    mu = config.base_shift + slope * (tokens - config.base_tokens)
    return 1 / (1 + math.exp(-mu) * (1 / t - 1))  # the same formula, but exact at 0 and 1


def sample_times(normal: Tensor, tokens: int, config: FlowConfig | None = None) -> Tensor:
    """Training times: logit-normal, then shifted.

    Args:
        normal: draws from the standard normal distribution, (B,); the caller owns the randomness.
        tokens: tokens of one layer, L.

    Returns:
        (B,) in (0, 1).
    """
    config = config or FlowConfig()
    return shift_times(torch.sigmoid(config.logit_mean + config.logit_std * normal), tokens, config)


def interpolate(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t (B,) on the straight line from data `z` to `noise`, both (B, ...)."""
    t = t.view(-1, *[1] * (z.dim() - 1))
    return (1 - t) * z + t * noise


def velocity_target(z: Tensor, noise: Tensor) -> Tensor:
    """Derivative of `interpolate` with respect to t."""
    return noise - z


def flow_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over everything, in float32: a scalar."""
    return F.mse_loss(velocity.float(), target.float())


def seed_at(seed: int, position: int, stream: int) -> int:
    """A generator seed, statistically independent of those of other positions and streams."""
    return int(np.random.SeedSequence([seed, position, stream]).generate_state(1, np.uint64)[0])


def seeded_normal(seed: int, positions: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (len(positions), *shape), float32, each row a pure function of (seed, position, stream).

    Drawn on the CPU, so that neither the device nor the split into batches and ranks changes the numbers.
    """

    def row(position: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_at(seed, position, stream)))

    return torch.stack([row(position) for position in positions])
