import pytest
import torch
from torch import Tensor

from layerdecomp.baselines import base_foreground, classical
from layerdecomp.errors import InputError

SIZE = 32


def gradient() -> Tensor:
    """Two images (2, 3, SIZE, SIZE), linear in both directions, another slope in each channel."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    image = torch.stack([0.5 * rows + 0.4 * columns, 0.9 * rows, -0.3 * columns + 0.2])
    return torch.stack([image, -image])


def masks() -> Tensor:
    mask = torch.zeros(2, 1, SIZE, SIZE)
    mask[0, :, 10:20, 12:25] = 1
    mask[1, :, 5:9, 3:12] = 1
    return mask


def test_classical_fills_a_linear_gradient_almost_exactly():
    truth, mask = gradient(), masks()
    image = torch.where(mask > 0, torch.tensor(1.0), truth)
    background, foreground = classical(image, mask)
    torch.testing.assert_close(background, truth, rtol=0, atol=1e-4)
    assert torch.equal(foreground, base_foreground(image, mask))


def test_classical_replaces_the_rim_and_keeps_the_rest():
    truth, mask = gradient(), masks()
    rim = torch.nn.functional.max_pool2d(mask, 3, stride=1, padding=1)
    image = torch.where(rim > 0, torch.tensor(1.0), truth)  # the object bleeds one pixel beyond its mask
    background, _ = classical(image, mask)
    torch.testing.assert_close(background, truth, rtol=0, atol=1e-4)
    noise = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    background, _ = classical(noise, mask)
    outside = (rim == 0).expand_as(noise)
    assert torch.equal(background[outside], noise[outside])
    assert background.abs().max() <= 1


def test_classical_returns_the_image_where_nothing_is_masked():
    image = gradient()
    background, foreground = classical(image, torch.zeros(2, 1, SIZE, SIZE))
    assert torch.equal(background, image)
    assert not foreground.any()


def test_classical_refuses_a_mask_without_background():
    mask = masks()
    mask[1] = 1
    with pytest.raises(InputError, match="mask 1 of the batch"):
        classical(gradient(), mask)


def test_base_foreground_is_the_masked_image():
    image, mask = gradient(), masks()
    foreground = base_foreground(image, mask)
    assert torch.equal(foreground[:, 3:], mask)
    inside = (mask > 0).expand_as(image)
    assert torch.equal(foreground[:, :3][inside], image[inside])
    assert not foreground[:, :3][~inside].any()
