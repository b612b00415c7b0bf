import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from layerdecomp.imaging.compositing import over
from layerdecomp.metrics import background, foreground, recomposition
from layerdecomp.metrics.layers import METRICS, STDERR_SUFFIX, LayerMetrics, per_image
from layerdecomp.metrics.region import dilate, mean_over

SIZE = 32


def disc(radius: float, row: float = 16, column: float = 16, softness: float = 1.0) -> Tensor:
    """A soft-edged disc (1, SIZE, SIZE)."""
    rows, columns = torch.meshgrid(torch.arange(float(SIZE)), torch.arange(float(SIZE)), indexing="ij")
    return ((radius - torch.hypot(rows - row, columns - column)) / softness + 0.5).clamp(0, 1)[None]


def make_batch(count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Discs on noise, partly behind a bar; the mask shows what is left of the disc and misses its top."""
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
    """Layers that are wrong by noise, within their ranges."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.cat([batch["background"], batch["foreground"]], dim=1)
    layers = (layers + amount * torch.randn(layers.shape, generator=generator)).clamp(-1, 1)
    return layers[:, :3], torch.cat([layers[:, 3:6], layers[:, 6:].clamp(min=0)], dim=1)


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


def test_psnr_of_a_region_sees_that_region_only():
    target = torch.zeros(2, 3, SIZE, SIZE)
    prediction = target.clone()
    prediction[:, :, :4] = 0.2  # 20 log10(2 / 0.2) = 20 dB
    region = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    region[0, :, :4] = True
    inside, empty = background.psnr(prediction, target, region)
    assert inside == pytest.approx(20, abs=1e-4)
    assert empty.isnan()
    assert background.psnr(prediction, target)[0] == pytest.approx(20 + 10 * math.log10(SIZE / 4), abs=1e-4)


@pytest.mark.parametrize("kind", ["noise", "gradient", "border"])
def test_ssim_equals_scikit_image(kind: str):
    target = make_batch(2)["background"]
    ramp = torch.linspace(-0.9, 0.5, SIZE).expand_as(target)
    prediction = {"noise": 0.7 * target + 0.1, "gradient": 0.5 * target + ramp / 2, "border": target.clone()}[kind]
    if kind == "border":
        prediction[..., :7] = -1  # windows that touch the border must count as scikit-image counts them
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


def test_ssim_keeps_its_precision_under_autocast():
    target = make_batch(2)["background"]
    prediction = 0.7 * target + 0.1
    expected = background.ssim(prediction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(background.ssim(prediction, target), expected, rtol=0, atol=1e-6)


def test_alpha_metrics_equal_their_definitions():
    target, prediction = make_batch()["foreground"], make_batch(seed=5)["foreground"]
    prediction[:, 3:] = disc(9, column=13, softness=6)
    for index in range(len(target)):
        a, b = prediction[index, 3].double().numpy(), target[index, 3].double().numpy()
        iou = np.minimum(a, b).sum() / np.maximum(a, b).sum()
        assert foreground.alpha_iou(prediction, target)[index] == pytest.approx(iou, rel=1e-5)
        assert foreground.alpha_sad(prediction, target)[index] == pytest.approx(np.abs(a - b).sum() / 1000, rel=1e-5)
        assert foreground.alpha_mse(prediction, target)[index] == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)


def test_alpha_sad_counts_thousands_of_fully_wrong_pixels():
    target, prediction = torch.zeros(1, 4, 50, 60), torch.zeros(1, 4, 50, 60)
    prediction[:, 3] = 1
    assert foreground.alpha_sad(prediction, target).item() == pytest.approx(3)


def test_rgb_l1_compares_straight_colour_where_the_true_alpha_is_positive():
    target = torch.zeros(2, 4, SIZE, SIZE)
    target[0, 3, :8], target[0, 3, 8:16] = 1, 0.01
    prediction = target.clone()
    prediction[:, :3, :8] = 0.5  # a quarter of the range on half of the region
    prediction[:, :3, 16:] = 1  # outside
    prediction[:, 3] = 0  # the predicted alpha plays no part
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


def test_boundary_metric_sees_the_outline_only():
    target, prediction = make_batch()["foreground"], make_batch(seed=5)["foreground"]
    for index in range(len(target)):
        band = boundary_by_definition(target[index, 3].numpy())
        assert 0 < band.sum() < (target[index, 3] > 0.05).sum()
        difference = (prediction - target)[index, :3].abs().numpy()[:, band].mean() / 2
        assert foreground.boundary_rgb_l1(prediction, target)[index] == pytest.approx(difference, rel=1e-5)


def test_boundary_band_of_hard_half_transparent_and_cropped_objects():
    alpha = torch.zeros(3, 1, SIZE, SIZE)
    alpha[0, :, 8:24, 8:24] = 1  # a hard outline has no fractional values, but a band all the same
    alpha[1, :, 8:24, 8:24] = 0.5  # the inside of half-transparent things is not outline
    alpha[2] = 1  # the border of the image is not outline
    expected = torch.zeros_like(alpha, dtype=torch.bool)
    expected[:2, :, 8:24, 8:24] = True
    expected[:2, :, 11:21, 11:21] = False
    assert torch.equal(foreground.boundary_band(alpha), expected)
    assert foreground.boundary_rgb_l1(alpha.expand(-1, 4, -1, -1), alpha.expand(-1, 4, -1, -1))[2].isnan()


def test_hidden_iou_punishes_what_is_missing_and_what_is_too_much():
    target = torch.zeros(1, 4, SIZE, SIZE)
    target[:, 3, 8:16, 8:24] = 1  # 8 x 16
    mask, occluder = torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    mask[:, :, 8:16, 8:18] = 1  # misses 8 x 6
    occluder[:, :, 8:16, 16:18] = 1  # and wrongly includes 8 x 2 of the occluder: 8 x 8 are hidden

    def value(rows: slice, columns: slice) -> float:
        prediction = torch.zeros_like(target)
        prediction[:, 3, rows, columns] = 1
        return foreground.hidden_iou(prediction, target, mask=mask, occluder=occluder).item()

    assert value(slice(8, 16), slice(8, 24)) == 1
    assert value(slice(8, 16), slice(8, 16)) == 0  # only what the mask shows
    assert value(slice(8, 16), slice(16, 20)) == 0.5
    assert value(slice(8, 16), slice(8, 32)) == 0.5  # grown 8 x 8 beyond the object
    assert value(slice(0, 32), slice(0, 32)) == pytest.approx(64 / (32 * 32 - 64))


def test_hidden_iou_is_undefined_without_a_hidden_part():
    target = torch.zeros(2, 4, SIZE, SIZE)
    target[:, 3, 8:16, 8:16] = 1
    mask = target[:, 3:].clone()
    mask[0, :, 8:10, 8:16] = 0  # 16 pixels
    mask[1, :, 8:11, 8:13] = 0  # 15 pixels
    enough, too_few = foreground.hidden_iou(target, target, mask=mask, occluder=torch.zeros_like(mask))
    assert enough == 1
    assert too_few.isnan()


def test_recomposition_ignores_what_stands_in_front():
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


def test_regions():
    values = torch.stack([torch.ones(2, 4), 3 * torch.ones(2, 4)])[None].repeat(2, 1, 1, 1)
    region = torch.zeros(2, 1, 2, 4, dtype=torch.bool)
    region[0, :, 0] = True
    mean, empty = mean_over(values, region)
    assert mean == 2
    assert empty.isnan()
    point = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    point[..., 1, 4] = True
    grown = torch.zeros_like(point)
    grown[..., 0:4, 2:7] = True
    assert torch.equal(dilate(point, 2), grown)


def test_perfect_layers_have_perfect_values():
    batch = make_batch()
    perfect = {name: 1.0 if info.higher_is_better else 0.0 for name, info in METRICS.items()}
    perfect |= {name: background.PSNR_CEILING for name, info in METRICS.items() if info.unit == "dB"}
    values = per_image(batch["background"], batch["foreground"], batch)
    assert values.keys() == METRICS.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, torch.full((3,), perfect[name]), msg=name)


def test_every_metric_reports_worse_layers_as_worse():
    batch = make_batch()
    a_little, a_lot = (per_image(*worsened(batch, amount=amount), batch) for amount in (0.02, 0.6))
    for name, info in METRICS.items():
        change = a_lot[name] - a_little[name]
        assert (change < 0 if info.higher_is_better else change > 0).all(), name


def test_diverged_predictions_are_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match="diverged"):
        per_image(batch["background"] * torch.nan, batch["foreground"], batch)


def test_layer_metrics_average_the_images_that_define_a_metric():
    batch = make_batch(6)
    batch["mask"][4:] = 0  # psnr_mask is defined by four images
    prediction = worsened(batch)
    metric = LayerMetrics()
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(prediction[0][part], prediction[1][part], {key: value[part] for key, value in batch.items()})
    computed = metric.compute()
    assert len(computed) == 2 * len(METRICS)
    for name, values in per_image(*prediction, batch).items():
        defined = values[~values.isnan()].double().numpy()
        assert len(defined) == (4 if name == "background/psnr_mask" else 6)
        assert computed[name].item() == pytest.approx(defined.mean(), rel=1e-5)
        stderr = defined.std(ddof=1) / math.sqrt(len(defined))
        assert computed[name + STDERR_SUFFIX].item() == pytest.approx(stderr, rel=1e-5), name


def test_layer_metrics_without_any_defining_image_are_nan():
    batch = make_batch(1)
    batch["mask"].zero_()
    metric = LayerMetrics()
    metric.update(*worsened(batch), batch)
    computed = metric.compute()
    assert computed["background/psnr_mask"].isnan()
    assert computed["background/psnr"] > 0
    assert computed["background/psnr" + STDERR_SUFFIX].isnan()  # of one image
    assert not metric.state_dict()


def _compute_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = make_batch(5)
    background_layer, foreground_layer = worsened(batch)
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    metric = LayerMetrics()
    metric.update(background_layer[part], foreground_layer[part], {key: x[part] for key, x in batch.items()})
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path):
    batch = make_batch(5)
    metric = LayerMetrics()
    metric.update(*worsened(batch), batch)
    torch.multiprocessing.spawn(_compute_in_process, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), metric.compute(), rtol=1e-5, atol=0)
