"""Blending a pasted object into its surroundings: how far colours move, and what stays unchanged."""

import pytest
import torch
from torch import Tensor

from layerdecomp.data.blending import match_light, soften


def noisy_colours(seed: int, centre: tuple[float, float, float], deviation: float) -> Tensor:
    """Colours (3, 48, 48) around a centre."""
    noise = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(centre).view(3, 1, 1) + deviation * noise


def test_match_light_moves_colours_by_the_given_fraction() -> None:
    background = noisy_colours(1, (-0.2, 0.0, 0.3), 0.12)
    foreground = torch.cat([noisy_colours(2, (0.1, 0.2, 0.2), 0.1), torch.ones(1, 48, 48)])
    unchanged, halfway, matched = (match_light(foreground, background, strength) for strength in (0.0, 0.5, 1.0))
    torch.testing.assert_close(unchanged, foreground)
    before, target = foreground[:3].mean((1, 2)), background.mean((1, 2))
    torch.testing.assert_close(halfway[:3].mean((1, 2)), (before + target) / 2)
    torch.testing.assert_close(matched[:3].mean((1, 2)), target)
    torch.testing.assert_close(matched[:3].std((1, 2)), background.std((1, 2)), rtol=0.05, atol=0)
    assert matched[3].equal(foreground[3])


@pytest.mark.parametrize(("deviation", "expected"), [(0.3, 0.15), (0.01, 0.1 / 1.5)])
def test_match_light_scales_deviations_by_a_factor_of_at_most_1_5(deviation: float, expected: float) -> None:
    foreground = torch.cat([noisy_colours(2, (0.0, 0.0, 0.0), 0.1), torch.ones(1, 48, 48)])
    matched = match_light(foreground, noisy_colours(1, (0.0, 0.0, 0.0), deviation), 1.0)
    assert matched[:3].std().item() == pytest.approx(expected, rel=0.03)


def test_softening_keeps_the_colour_of_a_plain_object() -> None:
    colour, alpha = torch.tensor([0.9, -0.8, 0.3]).view(3, 1, 1), torch.zeros(1, 32, 32)
    alpha[:, 8:24, 8:24] = 1
    soft = soften(torch.cat([torch.where(alpha > 0, colour, -colour), alpha]), 1.5)
    assert 0.1 < soft[3, 8, 16] < 0.9 and soft[3, 7, 16] > 0.1, "expected a soft edge"
    assert (soft[:3] - colour)[:, soft[3] > 0.01].abs().max() < 1e-4
