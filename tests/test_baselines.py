import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from layerdecomp.baselines import base_foreground, classical, matted_foreground, trimap
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.metrics import foreground as metrics

SIZE = 32


def gradient() -> Tensor:
    """Two images (2, 3, SIZE, SIZE), linear in both directions, with a different slope in each channel."""
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


def test_classical_replaces_the_rim_and_keeps_the_pixels_beyond_it():
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


def test_classical_rejects_a_mask_without_background():
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


def soft_disc(side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A disc whose rim of 4 pixels is half-transparent: image (1, 3, side, side), a shifted mask, the true layer."""
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    alpha = ((20 - torch.hypot(rows - 32, columns - 30)) / 4 + 0.5).clamp(0, 1)
    rgb = torch.stack([0.4 + columns / 200, rows / 150, torch.full_like(rows, -0.8)])
    truth = torch.cat([rgb, alpha[None]])[None]
    behind = torch.stack([-0.9 + rows / 300, torch.full_like(rows, 0.7), 0.2 + columns / 200])[None]
    return over(truth, behind), (alpha > 0.5).float().roll(1, dims=1)[None, None], truth


def test_matting_beats_the_mask_on_a_soft_disc():
    image, mask, truth = soft_disc()
    matted, masked = matted_foreground(image, mask), base_foreground(image, mask)
    assert matted.shape == truth.shape and matted.dtype == image.dtype
    assert matted.abs().max() <= 1 and matted[:, 3].min() >= 0
    for metric in (metrics.alpha_sad, metrics.alpha_grad, metrics.alpha_conn, metrics.rgb_l1):
        assert metric(matted, truth) < 0.5 * metric(masked, truth), metric.__name__


@pytest.mark.parametrize(("height", "width", "radius"), [(32, 32, 2), (120, 160, 6), (16, 16, 1)])
def test_trimap_is_unknown_around_the_outline(height: int, width: int, radius: int):
    mask = torch.zeros(1, 1, height, width)
    mask[..., 3 : height - 5, : width // 2] = 1  # touches the left border, which is not an outline
    mask[..., height // 3, width - 4] = 1
    inside = mask[0, 0].numpy() > 0
    to_other = np.maximum(distance_transform_cdt(inside, "chessboard"), distance_transform_cdt(~inside, "chessboard"))
    expected = np.where(to_other <= radius, 0.5, inside)
    np.testing.assert_array_equal(trimap(mask)[0, 0].numpy(), expected)


def test_matting_keeps_the_mask_if_the_trimap_lacks_foreground_or_background():
    image = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(5, 1, SIZE, SIZE)
    mask[1] = 1
    mask[2, :, 9:11, 4:20] = 1  # thinner than the band
    mask[3] = 1 - mask[2]
    mask[4, :, 8:24, 8:24] = 1
    foreground, masked = matted_foreground(image, mask), base_foreground(image, mask)
    assert [torch.equal(*pair) for pair in zip(foreground, masked, strict=True)] == [True] * 4 + [False]


def test_matting_keeps_the_mask_if_the_solver_fails(monkeypatch: pytest.MonkeyPatch):
    def diverges(*args: object, **kwargs: object) -> None:
        raise ValueError("did not converge")

    image, mask, _ = soft_disc()
    monkeypatch.setattr("pymatting.estimate_alpha_cf", diverges)
    with pytest.warns(UserWarning, match="sample 0 of the batch failed, its mask is used: did not converge"):
        foreground = matted_foreground(image, mask)
    assert torch.equal(foreground, base_foreground(image, mask))


def test_matting_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pymatting", None)
    image, mask, _ = soft_disc()
    with pytest.raises(InputError, match=r"pip install -e '\.\[matting\]'"):
        matted_foreground(image, mask)
