"""All metrics that need no network, as per-image values and as one torchmetrics.Metric that averages them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from layerdecomp.metrics import background, foreground, recomposition


@dataclass(frozen=True)
class MetricInfo:
    """What a reader of a result table has to know about one metric."""

    unit: str
    better: Literal["↑", "↓", "→1"]  # higher, lower, nearer 1
    undefined: str  # when an image does not define the metric


_HIDDEN_TOO_SMALL = f"the object's hidden part has fewer than {foreground.MIN_HIDDEN_PIXELS} pixels"
METRICS = {
    "background/psnr": MetricInfo("dB", "↑", "never undefined"),
    "background/psnr_mask": MetricInfo("dB", "↑", "the mask is empty"),
    "background/ssim": MetricInfo("", "↑", "never undefined"),
    "background/sharpness": MetricInfo("", "→1", "the mask holds no neighbours, or the true background is flat there"),
    "foreground/alpha_iou": MetricInfo("", "↑", "the true foreground is fully transparent"),
    "foreground/alpha_sad": MetricInfo("kpx", "↓", "never undefined"),
    "foreground/alpha_mse": MetricInfo("", "↓", "never undefined"),
    "foreground/alpha_grad": MetricInfo("", "↓", "never undefined"),
    "foreground/alpha_conn": MetricInfo("kpx", "↓", "never undefined"),
    "foreground/rgb_l1": MetricInfo("", "↓", "the true foreground is fully transparent"),
    "foreground/hidden_iou": MetricInfo("", "↑", _HIDDEN_TOO_SMALL),
    "foreground/hidden_rgb_l1": MetricInfo("", "↓", _HIDDEN_TOO_SMALL),
    "boundary/rgb_l1": MetricInfo("", "↓", "the true alpha has no outline"),
    "recomposition/psnr": MetricInfo("dB", "↑", "the occluder covers the whole image"),
}
STDERR_SUFFIX = "_stderr"


def per_image(
    prediction_background: Tensor, prediction_foreground: Tensor, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every metric of METRICS for every image of a batch.

    Args:
        prediction_background: (B, 3, H, W) in [-1, 1].
        prediction_foreground: (B, 4, H, W), straight RGB in [-1, 1], alpha in [0, 1].
        batch: collated samples with image, mask, foreground, background and occluder, on the same device.

    Returns:
        Name -> (B,) float32, NaN where the image does not define the metric.

    Raises:
        ValueError: the prediction holds NaN or infinity. As values they would pass for "undefined", and a diverged
            model for a good one.
    """
    layers = torch.cat([prediction_background, prediction_foreground], dim=1).float()
    _check(layers, batch)
    rgb, rgba = layers[:, :3], layers[:, 3:]
    image, mask, true_rgba, true_rgb, occluder = (
        batch[key].float() for key in ("image", "mask", "foreground", "background", "occluder")
    )
    return {
        "background/psnr": background.psnr(rgb, true_rgb),
        "background/psnr_mask": background.psnr(rgb, true_rgb, mask > 0.5),
        "background/ssim": background.ssim(rgb, true_rgb),
        "background/sharpness": background.sharpness(rgb, true_rgb, mask > 0.5),
        "foreground/alpha_iou": foreground.alpha_iou(rgba, true_rgba),
        "foreground/alpha_sad": foreground.alpha_sad(rgba, true_rgba),
        "foreground/alpha_mse": foreground.alpha_mse(rgba, true_rgba),
        "foreground/alpha_grad": foreground.alpha_grad(rgba, true_rgba),
        "foreground/alpha_conn": foreground.alpha_conn(rgba, true_rgba),
        "foreground/rgb_l1": foreground.rgb_l1(rgba, true_rgba),
        "foreground/hidden_iou": foreground.hidden_iou(rgba, true_rgba, mask=mask, occluder=occluder),
        "foreground/hidden_rgb_l1": foreground.hidden_rgb_l1(rgba, true_rgba, mask=mask, occluder=occluder),
        "boundary/rgb_l1": foreground.boundary_rgb_l1(rgba, true_rgba),
        "recomposition/psnr": recomposition.psnr(rgba, rgb, image, occluder=occluder),
    }


def _check(layers: Tensor, batch: Mapping[str, Tensor]) -> None:
    expected = (batch["image"].shape[0], 7, *batch["image"].shape[2:])
    assert layers.shape == expected, f"background and foreground are {tuple(layers.shape)} together, not {expected}"
    if not torch.isfinite(layers).all():
        raise ValueError("The predicted layers hold NaN or infinity: the model has diverged, its metrics mean nothing.")
    slack = 1e-3  # rounding of bf16 un-premultiplication and compositing
    assert layers.abs().max() <= 1 + slack and layers[:, 6].min() >= -slack, "predicted layers exceed their range"


def sums(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and count of the defined entries of each row of ``values`` (names, B): (names,) float64 each.

    In float32 the difference of squares that gives the variance would drown in rounding: an SSIM of 0.99 +- 0.0001.
    """
    defined = ~values.isnan()
    values = torch.where(defined, values, 0).double()
    return values.sum(dim=1), values.square().sum(dim=1), defined.sum(dim=1).double()


def summarize(total: Tensor, total_squared: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Means and their standard errors from what ``sums`` returns, added up over any number of batches.

    Returns:
        Scalars: the mean under each name of METRICS (NaN where count is 0), then the standard error of each mean under
        name + STDERR_SUFFIX (NaN where count is below 2).
    """
    mean = total / count
    variance = (total_squared - count * mean.square()).clamp(min=0) / (count - 1)
    stderr = torch.where(count > 1, variance / count, torch.nan).sqrt()
    means = dict(zip(METRICS, mean, strict=True))
    return means | {name + STDERR_SUFFIX: value for name, value in zip(METRICS, stderr, strict=True)}


class LayerMetrics(Metric):
    """Mean and standard error of every metric over a set of images, the same in one process and in many.

    Only sums are kept, no images and no networks: the state is three numbers per metric and stays out of checkpoints.
    Keyword arguments go to torchmetrics.Metric.
    """

    full_state_update = False
    total: Tensor
    total_squared: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("total", "total_squared", "count"):
            self.add_state(state, default=torch.zeros(len(METRICS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction_background: Tensor, prediction_foreground: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch; arguments and errors as in ``per_image``."""
        values = per_image(prediction_background, prediction_foreground, batch)
        total, total_squared, count = sums(torch.stack([values[name] for name in METRICS]))
        self.total += total
        self.total_squared += total_squared
        self.count += count

    def compute(self) -> dict[str, Tensor]:
        """Means and standard errors as ``summarize`` names them; an image counts for the metrics it defines."""
        return summarize(self.total, self.total_squared, self.count)
