"""Compositing against definitions written out in NumPy, and the round trip through the autoencoder's representation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdecomp.imaging.compositing import (
    checkerboard,
    from_autoencoder,
    on_checkerboard,
    over,
    resize_straight,
    to_autoencoder,
)


def _foreground(*batch: int, lowest_alpha: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(*batch, 3, 12, 20, generator=generator) * 2 - 1
    alpha = lowest_alpha + (1 - lowest_alpha) * torch.rand(*batch, 1, 12, 20, generator=generator)
    return torch.cat([rgb, alpha], dim=-3)


def _background(*batch: int) -> Tensor:
    return torch.rand(*batch, 3, 12, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_over_equals_its_definition_pixel_by_pixel() -> None:
    foreground, background = _foreground(), _background()
    expected = np.empty((3, 12, 20), dtype=np.float32)
    for row in range(12):
        for column in range(20):
            *rgb, alpha = foreground[:, row, column].tolist()
            for channel in range(3):
                behind = background[channel, row, column].item()
                expected[channel, row, column] = rgb[channel] * alpha + behind * (1 - alpha)
    np.testing.assert_allclose(over(foreground, background).numpy(), expected, atol=1e-6)


def test_over_takes_any_batch_and_agrees_with_single_images() -> None:
    foreground, background = _foreground(2, 3), _background(2, 3)
    image = over(foreground, background)
    assert image.shape == (2, 3, 3, 12, 20)
    assert torch.equal(image[1, 2], over(foreground[1, 2], background[1, 2]))


def test_over_is_exact_for_opaque_and_transparent() -> None:
    foreground, background = _foreground(), _background()
    foreground[3, :, :10], foreground[3, :, 10:] = 1, 0
    image = over(foreground, background)
    assert torch.equal(image[..., :10], foreground[:3, :, :10])
    assert torch.equal(image[..., 10:], background[..., 10:])


def test_over_is_associative() -> None:
    # Two foregrounds composited first (premultiplied), then over a background = one after the other.
    front, middle, background = _foreground(), _foreground(1)[0].flip(-1), _background()
    alpha = front[3:] + middle[3:] * (1 - front[3:])
    rgb = (front[:3] * front[3:] + middle[:3] * middle[3:] * (1 - front[3:])) / alpha
    joined = torch.cat([rgb, alpha])
    torch.testing.assert_close(over(joined, background), over(front, over(middle, background)))


def test_autoencoder_space_is_within_range_and_transparent_is_grey() -> None:
    foreground = _foreground(2)
    foreground[:, 3, 0] = 0
    encoded = to_autoencoder(foreground)
    assert encoded.min() >= -1 and encoded.max() <= 1
    assert torch.equal(encoded[:, :3, 0], torch.zeros(2, 3, 20))
    assert torch.equal(encoded[:, 3, 0], -torch.ones(2, 20))


def test_the_round_trip_is_accurate_where_alpha_is_large() -> None:
    foreground = _foreground(2, lowest_alpha=0.06)
    torch.testing.assert_close(from_autoencoder(to_autoencoder(foreground)), foreground, atol=1e-5, rtol=0)


def test_opaque_images_round_trip_exactly() -> None:
    foreground = torch.cat([_background(), torch.ones(1, 12, 20)])
    encoded = to_autoencoder(foreground)
    assert torch.equal(encoded, foreground)
    assert torch.equal(from_autoencoder(encoded), foreground)


def test_decoder_errors_are_clamped_and_not_magnified_where_alpha_is_small() -> None:
    decoded = torch.tensor([1.7, -0.02, 0.002, -0.998]).reshape(4, 1, 1)  # alpha 0.001: invisible
    torch.testing.assert_close(from_autoencoder(decoded).flatten(), torch.tensor([0.0, 0.0, 0.0, 0.001]))
    decoded[3] = -0.98  # alpha 0.01, below the threshold: an error of 0.02 becomes 0.4 and not 2
    rgb = from_autoencoder(decoded)[:3].flatten()
    torch.testing.assert_close(rgb, torch.tensor([1.0, -0.4, 0.04]))
    decoded[3] = 1.3
    assert from_autoencoder(decoded)[3].item() == 1


def test_eight_bit_files_lose_less_than_a_level() -> None:
    foreground, background = _foreground(), _background()
    eight_bit = torch.cat([((foreground[:3] + 1) * 127.5).round() / 127.5 - 1, (foreground[3:] * 255).round() / 255])
    difference = (over(eight_bit, background) - over(foreground, background)).abs().max()
    # Half a level of colour, and half a level of alpha times the largest contrast.
    assert 0 < difference <= (0.5 / 127.5) + 0.5 / 255 * 2


@pytest.mark.parametrize("size", [(96, 96), (20, 20), (45, 64)])
def test_resizing_keeps_the_colour_of_a_plain_object(size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    alpha = (18 - ((rows - 24) ** 2 + (columns - 24) ** 2).sqrt()).clamp(0, 1)  # a disc with a soft edge
    colour = torch.tensor([0.9, -0.8, 0.3]).view(3, 1, 1)
    foreground = torch.cat([torch.where(alpha > 0, colour, -colour), alpha[None]])[None]
    resized = resize_straight(foreground, size)
    visible = resized[:, 3:] > 0
    assert resized.shape[-2:] == size and 0.2 < visible.float().mean() < 0.6
    assert (resized[:, :3] - colour)[visible.expand(-1, 3, -1, -1)].abs().max() < 1e-4
    assert resized[:, 3].min() == 0 and resized[:, 3].max() == pytest.approx(1)


def test_shrinking_a_foreground_averages_fine_detail() -> None:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    checks = ((rows + columns) % 2 * 2 - 1).expand(3, 48, 48)
    foreground = torch.cat([checks, torch.ones(1, 48, 48)])[None]
    shrunk = resize_straight(foreground, (16, 16))
    assert shrunk[:, :3, 1:-1, 1:-1].abs().max() < 0.05 and (shrunk[:, 3] == 1).all()


def test_checkerboard_alternates_and_shows_behind_transparency() -> None:
    board = checkerboard(20, 12, cell=4)
    assert board.shape == (3, 20, 12) and board.min() == 0.5 and board.max() == 1
    assert board[0, 0, 0] == board[0, 4, 4] == board[0, 3, 3] != board[0, 0, 4]
    clear = torch.zeros(2, 4, 20, 12)
    assert torch.equal(on_checkerboard(clear, cell=4), board.expand(2, 3, 20, 12))
    clear[:, 3] = 1
    assert torch.equal(on_checkerboard(clear), torch.zeros(2, 3, 20, 12))


def test_a_margin_snaps_nearly_transparent_and_nearly_opaque_alpha() -> None:
    alpha = torch.tensor([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.97])
    decoded = torch.cat([torch.full((3, 1, 7), 0.2), (2 * alpha - 1).view(1, 1, 7)])
    straight, plain = from_autoencoder(decoded, margin=0.1), from_autoencoder(decoded)
    torch.testing.assert_close(straight[3, 0], torch.tensor([0, 0, 0, 0.25, 0.5, 1, 1]))
    torch.testing.assert_close(straight[:3, 0, 3:], plain[:3, 0, 3:])  # colours do not change
    assert not straight[:3, 0, :3].any()
