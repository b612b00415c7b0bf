import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter, label
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from layerdecomp.imaging.compositing import over
from layerdecomp.metrics import background, foreground, recomposition
from layerdecomp.metrics.distribution import FEATURES, frechet_distance, kernel_distance
from layerdecomp.metrics.layers import (
    METRICS,
    PER_IMAGE,
    STDERR_SUFFIX,
    LayerMetrics,
    Measures,
    _scaled,
    per_image,
    summarize,
    sums,
)
from layerdecomp.metrics.perceptual import LPIPS
from layerdecomp.metrics.region import mean_over, paste, select

SIZE = 32


def disc(radius: float, row: float = 16, column: float = 16, softness: float = 1.0) -> Tensor:
    """A soft-edged disc (1, SIZE, SIZE)."""
    rows, columns = torch.meshgrid(torch.arange(float(SIZE)), torch.arange(float(SIZE)), indexing="ij")
    return ((radius - torch.hypot(rows - row, columns - column)) / softness + 0.5).clamp(0, 1)[None]


class SmallInception(torch.nn.Module):
    """A random network with features of the right shape."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3 * 16, FEATURES, generator=generator), requires_grad=False)

    def forward(self, levels: Tensor) -> tuple[Tensor]:
        assert levels.dtype == torch.uint8
        pooled = torch.nn.functional.adaptive_avg_pool2d(levels.float() / 128 - 1, 4)
        return (torch.tanh(pooled.flatten(1) @ self.weight),)


def with_networks(**settings: str | int) -> Measures:
    """Measures with small random networks."""
    lpips = LPIPS("squeeze")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lpips.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise.abs() if name.startswith("heads") else noise / max(1, noise[0].numel()) ** 0.5)
    return Measures(lpips=lpips, inception=SmallInception(), **settings)


def make_batch(count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Discs on noise, partly behind a bar; the mask covers the visible disc without its top."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.stack([disc(8 + index % 4) for index in range(count)])
    occluder = torch.zeros_like(alpha)
    occluder[..., 12:20] = 1
    rest = torch.rand(count, 3, SIZE, SIZE, generator=generator) * 2 - 1
    rgba = torch.cat([torch.rand(count, 3, SIZE, SIZE, generator=generator) * 2 - 1, alpha], dim=1)
    bar = torch.full_like(rest, 0.25)
    true_background = occluder * bar + (1 - occluder) * rest
    image = occluder * bar + (1 - occluder) * over(rgba, rest)
    mask = ((alpha > 0.5) & (occluder == 0)).float()
    mask[:, :, :12] = 0
    return {"image": image, "mask": mask, "foreground": rgba, "background": true_background, "occluder": occluder}


def worsened(batch: dict[str, Tensor], seed: int = 1, amount: float = 0.3) -> tuple[Tensor, Tensor]:
    """Layers with added noise, clamped to their ranges."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.cat([batch["background"], batch["foreground"]], dim=1)
    layers = (layers + amount * torch.randn(layers.shape, generator=generator)).clamp(-1, 1)
    return layers[:, :3], torch.cat([layers[:, 3:6], layers[:, 6:].clamp(min=0)], dim=1)


def blobs(count: int = 4, seed: int = 0) -> Tensor:
    """Random soft blobs (count, 1, SIZE, SIZE) in [0, 1], with flat parts at 0 and 1."""
    noise = np.random.default_rng(seed).standard_normal((count, SIZE, SIZE))
    smooth = gaussian_filter(noise, (0, 2, 2))
    return torch.from_numpy(np.clip(0.5 + 4 * smooth, 0, 1)).float()[:, None]


def as_layers(alpha: Tensor) -> Tensor:
    """Grey foregrounds (B, 4, H, W) with `alpha` (B, 1, H, W)."""
    return torch.cat([torch.zeros_like(alpha).expand(-1, 3, -1, -1), alpha], dim=1)


def unit(image: Tensor) -> np.ndarray:
    """One image (3, H, W) in [-1, 1] as (H, W, 3) float64 in [0, 1]."""
    return ((image.double() + 1) / 2).permute(1, 2, 0).numpy()


def test_psnr_equals_scikit_image_and_is_not_pooled_over_the_batch():
    batch = make_batch()
    prediction = batch["background"].clone()
    prediction[0] += 0.01
    prediction[1] *= 0.2
    expected = [
        peak_signal_noise_ratio(unit(true), unit(predicted), data_range=1)
        for true, predicted in zip(batch["background"][:2], prediction[:2], strict=True)
    ]
    torch.testing.assert_close(
        background.psnr(prediction, batch["background"]),
        torch.tensor([*expected, background.PSNR_CEILING], dtype=torch.float32),
        rtol=1e-4,
        atol=1e-4,
    )


def test_psnr_of_a_region_ignores_the_rest():
    target = torch.zeros(2, 3, SIZE, SIZE)
    prediction = target.clone()
    prediction[:, :, :4] = 0.2  # 20 log10(2 / 0.2) = 20 dB
    region = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    region[0, :, :4] = True
    inside, empty = background.psnr(prediction, target, region)
    assert inside == pytest.approx(20, abs=1e-4)
    assert empty.isnan()
    assert background.psnr(prediction, target)[0] == pytest.approx(20 + 10 * math.log10(SIZE / 4), abs=1e-4)


@pytest.mark.parametrize("kind", ["noise", "gradient", "border", "dark"])
def test_ssim_equals_scikit_image(kind: str):
    target = make_batch(2)["background"]
    ramp = torch.linspace(-0.9, 0.5, SIZE).expand_as(target)
    prediction = {"noise": 0.7 * target + 0.1, "gradient": 0.5 * target + ramp / 2, "border": target.clone()}.get(
        kind, target
    )
    if kind == "dark":  # where the constants count
        target = 0.02 * target - 0.97
        prediction = 0.5 * target - 0.49
    if kind == "border":
        prediction[..., :7] = -1  # windows at the border must be treated as in scikit-image
    expected = [
        structural_similarity(
            unit(true), unit(predicted), data_range=1, channel_axis=-1,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for true, predicted in zip(target, prediction, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(
        background.ssim(prediction, target), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=3e-5
    )
    assert max(expected) < 0.99


def test_images_smaller_than_a_window_have_no_ssim_and_no_lpips():
    small, network = torch.rand(2, 3, 10, 40), LPIPS("alex")
    assert background.ssim(small, small).isnan().all() and network(small, small).isnan().all()
    assert not background.ssim(torch.rand(2, 3, 11, 40), torch.rand(2, 3, 11, 40)).isnan().any()


def test_ssim_keeps_its_precision_under_autocast():
    target = make_batch(2)["background"]
    prediction = 0.7 * target + 0.1
    expected = background.ssim(prediction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(background.ssim(prediction, target), expected, rtol=0, atol=1e-6)


def gradient_by_definition(image: np.ndarray, region: np.ndarray) -> float:
    squares = []
    for row, column in zip(*np.nonzero(region), strict=True):
        for neighbour in ((row + 1, column), (row, column + 1)):
            if max(neighbour) < SIZE and region[neighbour]:
                squares.append(np.square(image[:, row, column] - image[(slice(None), *neighbour)]))
    return float(np.sqrt(np.mean(squares)))


def test_sharpness_equals_its_definition_on_smeared_and_noisy_images():
    truth = make_batch(2)["background"]
    smear = torch.from_numpy(gaussian_filter(truth.numpy(), (0, 0, 1, 1)))
    noisy = (0.1 * truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)
    region = blobs(2) > 0.5
    for prediction, target, low, high in ((smear, truth, 0.05, 0.4), (noisy, smear, 1.1, 2)):
        for index, value in enumerate(background.sharpness(prediction, target, region)):
            inside = region[index, 0].numpy()
            predicted, true = (gradient_by_definition(x[index].numpy(), inside) for x in (prediction, target))
            assert low < value < high
            assert value == pytest.approx(min(predicted / true, 2), rel=1e-4)


def test_sharpness_is_the_ratio_of_contrasts_up_to_two():
    truth, region = make_batch(1)["background"] * 0.1, torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    for factor, expected in ((1, 1), (-1, 1), (0.5, 0.5), (0, 0), (1.5, 1.5), (9, 2)):
        assert background.sharpness(0.05 + factor * truth, truth, region) == pytest.approx(expected, abs=1e-5)


def test_sharpness_ignores_pixels_outside_the_region_and_the_step_at_its_edge():
    truth = make_batch(1)["background"]
    region = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    region[..., 4:20, 6:30] = True
    prediction = torch.where(region, 0.4 * truth + 0.5, -truth)
    assert background.sharpness(prediction, truth, region).item() == pytest.approx(0.4, abs=1e-5)


def test_sharpness_is_undefined_without_neighbours_or_on_a_flat_truth():
    truth = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    region = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool)
    region[1, :, ::2, ::2] = True
    region[2:] = True
    truth[2:] = torch.arange(SIZE) * torch.tensor([2.9 / 255, 2.8 / 255]).view(2, 1, 1, 1)  # sqrt(2) times one level
    assert background.sharpness(truth, truth, region).isnan().tolist() == [True, True, False, True]


def test_alpha_metrics_equal_their_definitions():
    target, prediction = make_batch()["foreground"], make_batch(seed=5)["foreground"]
    prediction[:, 3:] = disc(9, column=13, softness=6)
    for index in range(len(target)):
        a, b = prediction[index, 3].double().numpy(), target[index, 3].double().numpy()
        iou = np.minimum(a, b).sum() / np.maximum(a, b).sum()
        assert foreground.alpha_iou(prediction, target)[index] == pytest.approx(iou, rel=1e-5)
        assert foreground.alpha_sad(prediction, target)[index] == pytest.approx(np.abs(a - b).sum() / 1000, rel=1e-5)
        assert foreground.alpha_mse(prediction, target)[index] == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)


def test_alpha_iou_is_undefined_without_a_true_object_only() -> None:
    object_, nothing = torch.ones(1, 4, SIZE, SIZE), torch.zeros(1, 4, SIZE, SIZE)
    assert foreground.alpha_iou(nothing, object_).item() == 0
    assert foreground.alpha_iou(object_, nothing).isnan().all()


def test_alpha_sad_counts_thousands_of_fully_wrong_pixels():
    target, prediction = torch.zeros(1, 4, 50, 60), torch.zeros(1, 4, 50, 60)
    prediction[:, 3] = 1
    assert foreground.alpha_sad(prediction, target).item() == pytest.approx(3)


def gradient_magnitude_by_scipy(alpha: np.ndarray) -> np.ndarray:
    def derivative(image: np.ndarray, order: tuple[int, int]) -> np.ndarray:
        return gaussian_filter(image, 1.4, order=order, mode="nearest", radius=4)

    point = np.zeros((SIZE, SIZE))
    point[SIZE // 2, SIZE // 2] = 1
    norm = np.linalg.norm(derivative(point, (0, 1)))
    return np.hypot(derivative(alpha, (0, 1)), derivative(alpha, (1, 0))) / norm


def test_alpha_grad_equals_gaussian_derivatives():
    target, prediction = blobs(seed=0), blobs(seed=1)
    for index, value in enumerate(foreground.alpha_grad(as_layers(prediction), as_layers(target))):
        magnitudes = [gradient_magnitude_by_scipy(alpha[index, 0].double().numpy()) for alpha in (prediction, target)]
        expected = np.square(magnitudes[0] - magnitudes[1]).sum() / 1000
        assert expected > 0.1
        assert value == pytest.approx(expected, rel=1e-4)


def test_alpha_grad_of_known_alphas():
    nothing, point = torch.zeros(1, 4, SIZE, SIZE), torch.zeros(1, 4, SIZE, SIZE)
    point[:, 3, 9, 20] = 1
    assert foreground.alpha_grad(nothing, point).item() == pytest.approx(2 / 1000)  # two kernels of norm 1
    alpha = blobs()
    missed = foreground.alpha_grad(nothing.expand(4, -1, -1, -1), as_layers(alpha))
    faint = foreground.alpha_grad(as_layers(alpha / 2), as_layers(alpha))
    torch.testing.assert_close(faint, missed / 4)  # if stretched to [0, 1], the faint alpha would count as exact
    inverted = foreground.alpha_grad(as_layers(1 - alpha), as_layers(alpha))
    torch.testing.assert_close(inverted, torch.zeros(4), rtol=0, atol=1e-6)  # gradient directions do not matter


def test_alpha_grad_keeps_its_precision_under_autocast():
    target, prediction = as_layers(blobs(seed=0)), as_layers(blobs(seed=1))
    expected = foreground.alpha_grad(prediction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(foreground.alpha_grad(prediction, target), expected, rtol=0, atol=1e-6)


def connectivity_by_definition(prediction: np.ndarray, target: np.ndarray) -> float:
    level = np.full(prediction.shape, -1.0)
    for step in range(1, 11):
        pieces, count = label((prediction >= np.float32(step / 10)) & (target >= np.float32(step / 10)))
        sizes = [(pieces == piece).sum() for piece in range(1, count + 1)]
        largest = pieces == 1 + int(np.argmax(sizes)) if sizes else np.zeros(pieces.shape, dtype=bool)
        level[(level == -1) & ~largest] = (step - 1) / 10
    level[level == -1] = 1
    phi = [1 - (alpha - level) * (alpha - level >= 0.15) for alpha in (prediction, target)]
    return float(np.abs(phi[0] - phi[1]).sum() / 1000)


def test_alpha_conn_equals_its_definition():
    target = blobs(8, seed=0)
    prediction = (0.7 * target + 0.4 * blobs(8, seed=1)).clamp(0, 1)
    for index, value in enumerate(foreground.alpha_conn(as_layers(prediction), as_layers(target))):
        pieces = label((torch.minimum(prediction, target) > 0.5)[index, 0].numpy())[1]
        assert pieces > 1  # several pieces, so that the largest has to be found
        expected = connectivity_by_definition(prediction[index, 0].numpy(), target[index, 0].numpy())
        assert expected > 0.01
        assert value == pytest.approx(expected, rel=1e-4)


def test_alpha_conn_of_known_alphas():
    target = torch.zeros(1, 1, SIZE, SIZE)
    target[..., 4:14, 4:14] = 1
    target[..., 14:16, 14:16] = 1  # touches the square at a corner: not 4-connected to it

    def value(rows: slice, columns: slice, alpha: float) -> float:
        prediction = target.clone()
        prediction[..., rows, columns] = alpha
        return foreground.alpha_conn(as_layers(prediction), as_layers(target)).item() * 1000

    assert value(slice(0, 1), slice(0, 1), 0) == 0
    assert value(slice(20, 23), slice(20, 23), 1) == pytest.approx(9)  # a floating piece
    assert value(slice(20, 23), slice(20, 23), 0.1) == 0  # below the threshold
    assert value(slice(20, 23), slice(20, 23), 0.15) == pytest.approx(1.35)  # at the threshold
    assert value(slice(6, 8), slice(6, 8), 0) == pytest.approx(4)  # a hole
    assert value(slice(6, 8), slice(6, 8), 0.9) == 0  # connected up to 0.9, and the rest is below the threshold
    assert value(slice(14, 16), slice(14, 16), 0.9) == pytest.approx(0.4)  # a separate piece counts completely
    assert value(slice(0, 32), slice(0, 32), 0) == pytest.approx(104)


def test_rgb_l1_compares_straight_colour_where_the_true_alpha_is_positive():
    target = torch.zeros(2, 4, SIZE, SIZE)
    target[0, 3, :8], target[0, 3, 8:16] = 1, 0.01
    prediction = target.clone()
    prediction[:, :3, :8] = 0.5  # a quarter of the range on half of the region
    prediction[:, :3, 16:] = 1  # outside the region
    prediction[:, 3] = 0  # the predicted alpha does not matter
    values = foreground.rgb_l1(prediction, target)
    assert values[0] == pytest.approx(0.125)
    assert values[1].isnan()


def boundary_by_definition(alpha: np.ndarray) -> np.ndarray:
    band = np.zeros(alpha.shape, dtype=bool)
    for row, column in np.ndindex(*alpha.shape):
        window = alpha[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        if window.max() - window.min() > 0.05:
            band[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = True
    return band & (alpha > 0.05)


def test_boundary_metric_covers_only_the_outline():
    target, prediction = make_batch()["foreground"], make_batch(seed=5)["foreground"]
    for index in range(len(target)):
        band = boundary_by_definition(target[index, 3].numpy())
        assert 0 < band.sum() < (target[index, 3] > 0.05).sum()
        difference = (prediction - target)[index, :3].abs().numpy()[:, band].mean() / 2
        assert foreground.boundary_rgb_l1(prediction, target)[index] == pytest.approx(difference, rel=1e-5)


def test_boundary_band_follows_hard_and_half_transparent_outlines_but_not_the_image_border():
    alpha = torch.zeros(3, 1, SIZE, SIZE)
    alpha[0, :, 8:24, 8:24] = 1  # a hard outline has a band although it has no fractional values
    alpha[1, :, 8:24, 8:24] = 0.5  # the inside of a half-transparent object is not outline
    alpha[2] = 1  # the border of the image is not outline
    expected = torch.zeros_like(alpha, dtype=torch.bool)
    expected[:2, :, 8:24, 8:24] = True
    expected[:2, :, 11:21, 11:21] = False
    assert torch.equal(foreground.boundary_band(alpha), expected)
    assert foreground.boundary_rgb_l1(alpha.expand(-1, 4, -1, -1), alpha.expand(-1, 4, -1, -1))[2].isnan()


def test_hidden_iou_penalises_missing_and_excess_pixels():
    target = torch.zeros(1, 4, SIZE, SIZE)
    target[:, 3, 8:16, 8:24] = 1  # 8 x 16
    mask, occluder = torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    mask[:, :, 8:16, 8:18] = 1  # misses 8 x 6
    occluder[:, :, 8:16, 16:18] = 1  # the mask wrongly includes 8 x 2 of the occluder: 8 x 8 are hidden
    occluder[:, :, 8:16, 10:12] = 0.5  # the object shows through

    def value(rows: slice, columns: slice) -> float:
        prediction = torch.zeros_like(target)
        prediction[:, 3, rows, columns] = 1
        return foreground.hidden_iou(prediction, target, mask=mask, occluder=occluder).item()

    assert value(slice(8, 16), slice(8, 24)) == 1
    assert value(slice(8, 16), slice(8, 16)) == 0  # the visible part only
    assert value(slice(8, 16), slice(16, 20)) == 0.5
    assert value(slice(8, 16), slice(8, 32)) == 0.5  # extends 8 x 8 beyond the object
    assert value(slice(0, 32), slice(0, 32)) == pytest.approx(64 / (32 * 32 - 64))


def test_hidden_rgb_l1_covers_only_the_hidden_part():
    batch = make_batch(4)
    target, mask, occluder = batch["foreground"], batch["mask"], batch["occluder"]
    prediction = make_batch(4, seed=5)["foreground"]
    prediction[:, 3] = 0  # the predicted alpha does not matter
    values = foreground.hidden_rgb_l1(prediction, target, mask=mask, occluder=occluder)
    for index, value in enumerate(values):
        hidden = (target[index, 3] > 0.5) & ((occluder[index, 0] > 0.5) | (mask[index, 0] == 0))
        assert 16 <= hidden.sum() < (target[index, 3] > 0.5).sum()
        expected = (prediction - target)[index, :3].abs()[:, hidden].mean() / 2
        assert value == pytest.approx(expected.item(), rel=1e-5)
        prediction[index, :3, hidden] = target[index, :3, hidden]
    exact = foreground.hidden_rgb_l1(prediction, target, mask=mask, occluder=occluder)
    assert not exact.any() and foreground.rgb_l1(prediction, target).all()


def test_hidden_metrics_are_undefined_without_a_hidden_part():
    target = torch.zeros(2, 4, SIZE, SIZE)
    target[:, 3, 8:16, 8:16] = 1
    mask = target[:, 3:].clone()
    mask[0, :, 8:10, 8:16] = 0  # 16 pixels
    mask[1, :, 8:11, 8:13] = 0  # 15 pixels
    for metric, perfect in ((foreground.hidden_iou, 1), (foreground.hidden_rgb_l1, 0)):
        enough, too_few = metric(target, target, mask=mask, occluder=torch.zeros_like(mask))
        assert enough == perfect
        assert too_few.isnan()


def test_recomposition_ignores_occluders():
    batch = make_batch()
    rgba, rgb, image, occluder = (batch[key] for key in ("foreground", "background", "image", "occluder"))
    assert (recomposition.psnr(rgba, rgb, image, occluder=occluder) > 99).all()
    assert (recomposition.psnr(rgba, rgb, image, occluder=torch.zeros_like(occluder)) < 40).all()
    assert recomposition.psnr(rgba, rgb, image, occluder=torch.ones_like(occluder)).isnan().all()
    dimmed = rgba * torch.tensor([1, 1, 1, 0.5]).view(1, 4, 1, 1)
    for index, value in enumerate(recomposition.psnr(dimmed, rgb, image, occluder=occluder)):
        alpha, visible = dimmed[index, 3:].numpy(), occluder[index, 0].numpy() == 0
        composite = alpha * dimmed[index, :3].numpy() + (1 - alpha) * rgb[index].numpy()
        error = np.square((composite - image[index].numpy())[:, visible]).mean()
        assert value == pytest.approx(10 * math.log10(4 / error), abs=1e-3)


def test_recomposition_ignores_the_soft_edge_of_occluders():
    batch = make_batch()
    rgba, rgb, image, occluder = (batch[key].clone() for key in ("foreground", "background", "image", "occluder"))
    occluder[..., 11] = 0.3
    image[..., 11] = 0.3 * 0.25 + 0.7 * image[..., 11]
    assert (recomposition.psnr(rgba, rgb, image, occluder=occluder) > 99).all()


def test_mean_over_handles_regions():
    values = torch.stack([torch.ones(2, 4), 3 * torch.ones(2, 4)])[None].repeat(2, 1, 1, 1)
    region = torch.zeros(2, 1, 2, 4, dtype=torch.bool)
    region[0, :, 0] = True
    values[0, :, 1] = torch.nan  # outside
    mean, empty = mean_over(values, region)
    assert mean == 2
    assert empty.isnan()


def test_perfect_layers_have_perfect_values():
    batch = make_batch()
    perfect = {name: {"↑": 1.0, "↓": 0.0, "→1": 1.0}[info.better] for name, info in METRICS.items()}
    perfect |= {name: background.PSNR_CEILING for name, info in METRICS.items() if info.unit == "dB"}
    values = per_image(batch["background"], batch["foreground"], batch, with_networks())
    assert list(values) == PER_IMAGE
    for name, value in values.items():
        torch.testing.assert_close(value, torch.full((3,), perfect[name]), msg=name)


def test_every_metric_reports_worse_layers_as_worse():
    batch = make_batch()
    a_little, a_lot = (per_image(*worsened(batch, amount=amount), batch, with_networks()) for amount in (0.02, 0.6))
    badness = {"↑": lambda value: -value, "↓": lambda value: value, "→1": lambda value: (value - 1).abs()}
    for name, info in METRICS.items():
        if info.whole_set:
            continue
        assert (badness[info.better](a_lot[name]) > badness[info.better](a_little[name])).all(), name


def test_every_metric_gets_its_own_layers_and_region():
    batch, (rgb, rgba) = make_batch(), worsened(make_batch())
    batch["occluder"][..., 11] = 0.3
    measures = with_networks(region="outside")
    truth, true_foreground, mask, occluder = (batch[key] for key in ("background", "foreground", "mask", "occluder"))
    inside, hidden, free = mask > 0.5, {"mask": mask, "occluder": occluder}, occluder == 0
    composite = over(rgba, rgb)
    expected = {
        "background/psnr": background.psnr(rgb, truth, ~inside),
        "background/psnr_mask": background.psnr(rgb, truth, inside),
        "background/ssim": background.ssim(rgb, truth, ~inside),
        "background/lpips": measures.lpips(rgb, truth, ~inside),
        "background/sharpness": background.sharpness(rgb, truth, inside),
        "foreground/rgb_l1": foreground.rgb_l1(rgba, true_foreground),
        "foreground/hidden_iou": foreground.hidden_iou(rgba, true_foreground, **hidden),
        "foreground/hidden_rgb_l1": foreground.hidden_rgb_l1(rgba, true_foreground, **hidden),
        "boundary/rgb_l1": foreground.boundary_rgb_l1(rgba, true_foreground),
        "recomposition/psnr": background.psnr(composite, batch["image"], free),
        "recomposition/lpips": measures.lpips(composite, batch["image"], free),
    }
    for name in ("alpha_iou", "alpha_sad", "alpha_mse", "alpha_grad", "alpha_conn"):
        expected[f"foreground/{name}"] = getattr(foreground, name)(rgba, true_foreground)
    torch.testing.assert_close(per_image(rgb, rgba, batch, measures), expected, rtol=0, atol=0)


def test_layers_in_bf16_are_measured_in_float32():
    batch, layers = make_batch(), worsened(make_batch())
    batch, half = {key: value.bfloat16() for key, value in batch.items()}, [layer.bfloat16() for layer in layers]
    expected = per_image(*(layer.float() for layer in half), {key: value.float() for key, value in batch.items()})
    torch.testing.assert_close(per_image(*half, batch), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("channel", "value"), [(0, 1.002), (2, -1.002), (3, 1.002), (6, -0.002)])
def test_values_out_of_range_are_refused_but_rounding_is_not(channel: int, value: float):
    batch = make_batch()
    layers = torch.cat([batch["background"], batch["foreground"]], dim=1)
    layers[0, channel, 0, 0] = value
    with pytest.raises(AssertionError, match="range"):
        per_image(layers[:, :3], layers[:, 3:], batch)
    layers[0, channel, 0, 0] = value - math.copysign(0.0015, value)
    per_image(layers[:, :3], layers[:, 3:], batch)


def test_a_metric_of_your_own_is_one_entry(monkeypatch: pytest.MonkeyPatch):
    batch = make_batch()
    monkeypatch.setattr("layerdecomp.metrics.layers.PER_IMAGE", [*PER_IMAGE, "background/mine"])
    mine = replace(METRICS["background/psnr"], needs=("background", "image"))
    monkeypatch.setitem(METRICS, "background/mine", mine)
    layers = worsened(batch)
    assert per_image(*layers, batch)["background/mine"].equal(background.psnr(layers[0], batch["image"]))
    assert per_image(None, layers[1], batch)["background/mine"].isnan().all()
    monkeypatch.setitem(METRICS, "background/mine", replace(mine, needs=("background", "picture")))
    with pytest.raises(KeyError, match="picture"):
        per_image(*layers, batch)


def test_diverged_predictions_are_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match="diverged"):
        per_image(batch["background"] * torch.nan, batch["foreground"], batch)


def test_layer_metrics_average_the_images_that_define_a_metric():
    batch = make_batch(6)
    batch["mask"][4:] = 0  # metrics of the mask are defined for four images only
    prediction = worsened(batch)
    metric = LayerMetrics(with_networks())
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(prediction[0][part], prediction[1][part], {key: value[part] for key, value in batch.items()})
    computed = metric.compute()
    assert len(computed) == len(METRICS) + len(PER_IMAGE)
    counts = {}
    for name, values in per_image(*prediction, batch, with_networks()).items():
        defined = values[~values.isnan()].double().numpy()
        counts[name] = len(defined)
        assert computed[name].item() == pytest.approx(defined.mean(), rel=1e-5)
        stderr = defined.std(ddof=1) / math.sqrt(len(defined))
        assert computed[name + STDERR_SUFFIX].item() == pytest.approx(stderr, rel=1e-5), name
    assert counts["background/psnr_mask"] == 4 and counts["background/psnr"] == 6


def test_layer_metrics_without_any_defining_image_are_nan():
    batch = make_batch(1)
    batch["mask"].zero_()
    metric = LayerMetrics()
    metric.update(*worsened(batch), batch)
    computed = metric.compute()
    assert computed["background/psnr_mask"].isnan()
    assert computed["background/psnr"] > 0
    assert computed["background/psnr" + STDERR_SUFFIX].isnan()  # a single image has no standard error
    assert not metric.state_dict()


def test_equal_values_have_a_standard_error_of_zero():
    for count in (2, 3, 7):
        values = torch.linspace(0.1, 40, len(PER_IMAGE))[:, None].expand(-1, count)
        total, squares, counts = sums(values)
        for rounded in (squares, squares * (1 - 1e-12)):  # rounding may make the variance negative
            results = summarize(total, rounded, counts, torch.empty(0, 2, FEATURES))
            assert all(results[name + STDERR_SUFFIX] < 1e-6 for name in PER_IMAGE)


def _compute_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = make_batch(5)
    background_layer, foreground_layer = worsened(batch)
    for first in (3, 5):  # samples of the first process; of 5, none are left for the second
        part = slice(0, first) if rank == 0 else slice(first, 5)
        metric = LayerMetrics(with_networks())
        if part.start < 5:
            metric.update(background_layer[part], foreground_layer[part], {key: x[part] for key, x in batch.items()})
        torch.save(metric.compute(), f"{folder}/{first}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path):
    batch = make_batch(5)
    metric = LayerMetrics(with_networks())
    metric.update(*worsened(batch), batch)
    expected = metric.compute()
    assert all(expected[name].isfinite() for name in METRICS)
    torch.multiprocessing.spawn(_compute_in_process, args=(str(tmp_path),), nprocs=2)
    for name in ("3-0", "3-1", "5-0", "5-1"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=1e-5, atol=1e-9)


def test_networks_are_neither_saved_nor_trained():
    metric = LayerMetrics(with_networks())
    assert not metric.state_dict() and not list(metric.parameters()) and not list(metric.modules())[1:]
    holder = torch.nn.Sequential(metric, torch.nn.Linear(2, 2))
    metric.update(*worsened(make_batch()), make_batch())
    assert set(holder.state_dict()) == {"1.weight", "1.bias"} and len(list(holder.parameters())) == 2


def test_metrics_whose_network_or_layer_is_missing_are_nan():
    batch, (rgb, rgba) = make_batch(), worsened(make_batch())
    both, without_foreground, without_background = (
        per_image(*layers, batch) for layers in ((rgb, rgba), (rgb, None), (None, rgba))
    )
    networks = {"background/lpips", "recomposition/lpips"}
    recomposed = {"recomposition/psnr", "recomposition/lpips"}
    background_only = {name for name in PER_IMAGE if name.startswith("background/")}
    for values, undefined in (
        (both, networks),
        (without_background, networks | recomposed | background_only),
        (without_foreground, networks | set(PER_IMAGE) - background_only),
    ):
        assert {name for name, value in values.items() if value.isnan().any()} == undefined
    no_truth = {name: value for name, value in batch.items() if name != "foreground"}
    found = per_image(rgb, rgba, no_truth)
    assert found["foreground/alpha_sad"].isnan().all() and found["recomposition/psnr"].isfinite().all()
    assert found["background/psnr"].equal(both["background/psnr"])
    metric = LayerMetrics(with_networks())
    metric.update(None, rgba, batch)
    assert metric.compute()["background/fid"].isnan() and metric.compute()["foreground/alpha_iou"] > 0


@pytest.mark.parametrize("name", ["mask", "outside"])
def test_background_metrics_of_a_region_ignore_the_rest(name: str):
    batch, measures = make_batch(), with_networks(region=name)
    region = select(name, batch["mask"])
    assert region is not None and region.any() and not region.all()
    prediction = torch.where(region, worsened(batch)[0], batch["background"])
    kept = torch.where(region, batch["background"], worsened(batch)[0])
    metrics = ("background/psnr", "background/lpips")
    wrong, right = (per_image(layer, None, batch, measures) for layer in (prediction, kept))
    full = per_image(prediction, None, batch, with_networks())
    for metric in metrics:
        assert (right[metric] == {"background/psnr": background.PSNR_CEILING, "background/lpips": 0}[metric]).all()
        assert (wrong[metric] != full[metric]).all()
    inside = region.expand_as(prediction).double()
    error = (inside * (prediction - batch["background"]).double().square()).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    torch.testing.assert_close(wrong["background/psnr"], (10 * torch.log10(4 / error)).float(), rtol=1e-5, atol=0)
    sets = [LayerMetrics(with_networks(region=which)) for which in (name, "full")]
    for metric in sets:
        metric.update(kept, None, batch)
    distances = [metric.compute()["background/fid"] for metric in sets]
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[1] > 1e-3


def test_ssim_of_a_region_is_the_mean_of_the_scikit_image_map():
    batch = make_batch(2)
    prediction, region = worsened(batch)[0], batch["mask"] > 0.5
    for index, value in enumerate(background.ssim(prediction, batch["background"], region)):
        _, similarity = structural_similarity(
            unit(batch["background"][index]), unit(prediction[index]), data_range=1, channel_axis=-1, full=True,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        inside = region[index, 0].numpy().copy()
        inside[[*range(5), *range(SIZE - 5, SIZE)]] = inside[:, [*range(5), *range(SIZE - 5, SIZE)]] = False
        assert 0 < inside.sum() < inside.size
        assert value == pytest.approx(similarity[inside].mean(), abs=3e-5)
    assert background.ssim(prediction, batch["background"], torch.zeros_like(region)).isnan().all()


def test_a_resolution_resizes_everything_before_measuring():
    batch, layers = make_batch(), worsened(make_batch())
    half = per_image(*layers, batch, Measures(resolution=SIZE // 2))
    small = torch.nn.functional.interpolate(
        torch.cat([batch["background"], layers[0]]), (SIZE // 2,) * 2, mode="bicubic", antialias=True
    ).clamp(-1, 1)
    torch.testing.assert_close(half["background/psnr"], background.psnr(small[3:], small[:3]), rtol=1e-5, atol=0)
    assert (half["foreground/alpha_sad"] < 0.5 * per_image(*layers, batch)["foreground/alpha_sad"]).all()
    same = per_image(*layers, batch, Measures(resolution=SIZE))
    torch.testing.assert_close(same, per_image(*layers, batch), rtol=0, atol=0, equal_nan=True)
    perfect = per_image(batch["background"], batch["foreground"], batch, Measures(resolution=2 * SIZE))
    assert (perfect["background/psnr"] == background.PSNR_CEILING).all() and (perfect["foreground/rgb_l1"] == 0).all()


def test_a_resolution_is_that_of_the_longer_side() -> None:
    batch = {name: layer[..., : SIZE // 2, :] for name, layer in make_batch().items()}
    predicted = worsened({name: layer.clone() for name, layer in batch.items()})
    for side in (SIZE, SIZE // 2):
        found = per_image(*predicted, batch, Measures(resolution=side))["foreground/alpha_sad"]
        halved = [torch.nn.functional.avg_pool2d(layer, SIZE // side) for layer in (predicted[1], batch["foreground"])]
        torch.testing.assert_close(found, foreground.alpha_sad(*halved), rtol=0.1, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_value_that_is_not_finite_is_an_error(value: float) -> None:
    batch, (rgb, rgba) = make_batch(), worsened(make_batch())
    rgb[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="contain NaN or infinity"):
        per_image(rgb, rgba, batch)


def test_layers_are_resized_without_aliasing_overshoot_or_bleeding():
    mask = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = Image.fromarray(mask[0, 0].numpy()).resize((12, 10), Image.Resampling.BILINEAR)
    torch.testing.assert_close(_scaled(mask, (10, 12))[0, 0], torch.from_numpy(np.array(expected)), rtol=0, atol=1e-5)
    step = torch.full((1, 3, SIZE, SIZE), -1.0)
    step[..., 7:] = 1
    small = _scaled(step, (24, 24))
    assert (small.min(), small.max()) == (-1, 1)
    red = torch.zeros(1, 4, SIZE, SIZE)
    red[:, 1:3], red[:, 0, :, 7:], red[:, 3, :, 7:] = -1, 1, 1  # transparent pixels are of another colour
    visible = _scaled(red, (24, 24))
    assert (visible[:, 0][visible[:, 3] > 0.1] > 0.99).all()


@pytest.mark.parametrize("rows", [10, 9])  # of 9, the fifth pair is half covered
def test_a_mask_keeps_its_relative_size_at_another_resolution(rows: int):
    batch, layers = make_batch(), worsened(make_batch())
    batch["mask"] = torch.zeros_like(batch["mask"])
    batch["mask"][..., :rows] = 1
    half = per_image(*layers, batch, Measures(resolution=SIZE // 2))
    small = torch.nn.functional.interpolate(
        torch.cat([batch["background"], layers[0]]), (SIZE // 2,) * 2, mode="bicubic", antialias=True
    ).clamp(-1, 1)
    inside = torch.zeros(3, 1, SIZE // 2, SIZE // 2, dtype=torch.bool)
    inside[..., :5] = True
    expected = background.psnr(small[3:], small[:3], inside)
    torch.testing.assert_close(half["background/psnr_mask"], expected, rtol=1e-5, atol=0)


def test_select_and_paste_follow_the_region():
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    assert select("full", mask) is None
    prediction, target = torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    assert paste(prediction, target, select("mask", mask))[0, 0, 0].tolist() == [1, 0]
    assert paste(prediction, target, select("outside", mask))[0, 0, 0].tolist() == [0, 1]
    assert paste(prediction, target, None) is prediction


def features(count: int, width: int, seed: int) -> Tensor:
    """Correlated, skewed features with zeros, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return (mixed / width**0.5 + 0.3 * seed).clamp(min=0)


@pytest.mark.parametrize("counts", [(300, 400), (40, 25), (2, 3)])
def test_frechet_distance_equals_its_definition(counts: tuple[int, int]):
    first, second = features(counts[0], 48, 0), features(counts[1], 48, 1)
    a, b = first.double().numpy(), second.double().numpy()
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(48))
    trace = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root.real)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_equals_torchmetrics():
    first, second = features(200, 64, 0), features(150, 64, 1)
    moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in (first, second)]
    expected = _compute_fid(*moments[0], *moments[1])
    assert frechet_distance(first, second).item() == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_equals_its_definition():
    first, second = features(7, 16, 0), features(9, 16, 1)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 16 + 1) ** 3)

    a, b = first.double().numpy(), second.double().numpy()
    expected = (
        sum(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
        + sum(kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
        - 2 * sum(kernel(x, y) for x in a for y in b) / (7 * 9)
    )
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_equals_torchmetrics_on_all_members():
    first, second = features(60, 16, 0), features(60, 16, 1)
    assert kernel_distance(first, second) == pytest.approx(poly_mmd(first.double(), second.double()).item(), rel=1e-6)


def test_distances_of_too_few_images_are_nan():
    assert frechet_distance(torch.ones(1, 4), torch.ones(5, 4)).isnan()
    assert kernel_distance(torch.ones(5, 4), torch.ones(0, 4)).isnan()
