"""All metrics of the two layers: per-image values, and a torchmetrics.Metric that aggregates them over a set.

A metric of your own is one function and one entry in `METRICS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from layerdecomp.imaging.compositing import resize_straight
from layerdecomp.imaging.geometry import resize
from layerdecomp.metrics import background, foreground, recomposition
from layerdecomp.metrics.distribution import FEATURES, frechet_distance, inception_features, kernel_distance
from layerdecomp.metrics.perceptual import LPIPS
from layerdecomp.metrics.region import paste, select


@dataclass(frozen=True)
class MetricInfo:
    """A metric: how it is computed, and its unit and interpretation for tables of results."""

    compute: Callable[..., Tensor]  # -> (B,); if whole_set, predicted and true features (N, 2048) -> scalar
    needs: tuple[str, ...]  # the arguments of `compute`, names of `_inputs`; if whole_set, what the features need
    unit: str
    better: Literal["↑", "↓", "→1"]  # higher, lower, closer to 1
    undefined: str  # when the metric is undefined for an image (if whole_set, for the set)
    whole_set: bool = False  # computed on the whole set, not a mean over images


_REGION = ("background", "true background", "region")
_INSIDE = ("background", "true background", "inside")
_FEATURES = ("background", "inception")
_LAYER = ("foreground", "true foreground")
_HIDDEN = (*_LAYER, "mask", "occluder")
_COMPOSITE = ("foreground", "background", "image", "occluder")
_TRANSPARENT = "the true foreground is fully transparent"
_HIDDEN_TOO_SMALL = f"the object's hidden part has fewer than {foreground.MIN_HIDDEN_PIXELS} pixels"
_EMPTY = "the region is empty"
_COVERED = "the occluder covers the whole image"
_SMALL_FOR_SSIM = "the image has a side shorter than 11 pixels"
_SMALL_FOR_LPIPS = "the image has a side shorter than 32 pixels"
_TOO_FEW = "there are fewer than two images"
METRICS = {
    "background/psnr": MetricInfo(background.psnr, _REGION, "dB", "↑", _EMPTY),
    "background/psnr_mask": MetricInfo(background.psnr, _INSIDE, "dB", "↑", "the mask is empty"),
    "background/ssim": MetricInfo(background.ssim, _REGION, "", "↑", f"{_EMPTY}, or {_SMALL_FOR_SSIM}"),
    "background/lpips": MetricInfo(LPIPS.__call__, ("lpips", *_REGION), "", "↓", f"{_EMPTY}, or {_SMALL_FOR_LPIPS}"),
    "background/fid": MetricInfo(frechet_distance, _FEATURES, "", "↓", _TOO_FEW, whole_set=True),
    "background/kid": MetricInfo(kernel_distance, _FEATURES, "", "↓", _TOO_FEW, whole_set=True),
    "background/sharpness": MetricInfo(
        background.sharpness, _INSIDE, "", "→1", "the mask has no two adjacent pixels, or the truth is flat there"
    ),
    "foreground/alpha_iou": MetricInfo(foreground.alpha_iou, _LAYER, "", "↑", _TRANSPARENT),
    "foreground/alpha_sad": MetricInfo(foreground.alpha_sad, _LAYER, "kpx", "↓", "never undefined"),
    "foreground/alpha_mse": MetricInfo(foreground.alpha_mse, _LAYER, "", "↓", "never undefined"),
    "foreground/alpha_grad": MetricInfo(foreground.alpha_grad, _LAYER, "", "↓", "never undefined"),
    "foreground/alpha_conn": MetricInfo(foreground.alpha_conn, _LAYER, "kpx", "↓", "never undefined"),
    "foreground/rgb_l1": MetricInfo(foreground.rgb_l1, _LAYER, "", "↓", _TRANSPARENT),
    "foreground/hidden_iou": MetricInfo(foreground.hidden_iou, _HIDDEN, "", "↑", _HIDDEN_TOO_SMALL),
    "foreground/hidden_rgb_l1": MetricInfo(foreground.hidden_rgb_l1, _HIDDEN, "", "↓", _HIDDEN_TOO_SMALL),
    "boundary/rgb_l1": MetricInfo(foreground.boundary_rgb_l1, _LAYER, "", "↓", "the true alpha has no outline"),
    "recomposition/psnr": MetricInfo(recomposition.psnr, _COMPOSITE, "dB", "↑", _COVERED),
    "recomposition/lpips": MetricInfo(
        recomposition.lpips, ("lpips", *_COMPOSITE), "", "↓", f"{_COVERED}, or {_SMALL_FOR_LPIPS}"
    ),
}
PER_IMAGE = [name for name, info in METRICS.items() if not info.whole_set]
STDERR_SUFFIX = "_stderr"
Layer = Tensor | None


@dataclass(frozen=True)
class Measures:
    """Measurement settings, and the networks that some metrics need; these metrics are NaN without their network.

    Not a module, so that the networks stay out of its owner's state_dict and optimizer.
    """

    region: str = "full"  # one of REGIONS, for the background metrics
    resolution: int | None = None  # longer side, in pixels, to which everything is resized first; None: no resizing
    lpips: LPIPS | None = None
    inception: nn.Module | None = None  # for `inception_features`


def per_image(
    prediction_background: Layer,
    prediction_foreground: Layer,
    batch: Mapping[str, Tensor],
    measures: Measures | None = None,
) -> dict[str, Tensor]:
    """Every metric in PER_IMAGE for every image of a batch.

    Args:
        prediction_background: (B, 3, H, W) in [-1, 1], or None.
        prediction_foreground: (B, 4, H, W), straight RGB in [-1, 1], alpha in [0, 1], or None.
        batch: collated samples with image, mask, background and occluder, and foreground if the truth is known, on the
            same device.

    Returns:
        Name -> (B,) float32, NaN where the metric is undefined or its layer or network is missing.

    Raises:
        ValueError: the prediction contains NaN or infinity. Otherwise the NaN would be treated as "undefined" and left
            out of the means, so that a diverged model could look good.
    """
    measures = measures or Measures()
    rgb, rgba, truth = _at_resolution(measures.resolution, prediction_background, prediction_foreground, batch)
    inputs = _inputs(rgb, rgba, truth, measures)
    missing = {name for name in ("background", *_LAYER, "lpips", "inception") if inputs[name] is None}
    undefined = torch.full_like(truth["image"][:, 0, 0, 0], torch.nan)

    def measured(info: MetricInfo) -> Tensor:
        return undefined if missing & {*info.needs} else info.compute(*(inputs[name] for name in info.needs))

    return {name: measured(METRICS[name]) for name in PER_IMAGE}


def _inputs(rgb: Layer, rgba: Layer, truth: Mapping[str, Tensor], measures: Measures) -> dict[str, Any]:
    """What metrics are computed from, None where it is missing; a region of None is the whole image."""
    return {
        "background": rgb,
        "foreground": rgba,
        "true background": truth["background"],
        "true foreground": truth.get("foreground"),
        **{name: truth[name] for name in ("image", "mask", "occluder")},
        "region": select(measures.region, truth["mask"]),
        "inside": truth["mask"] > 0.5,
        "lpips": None if measures.lpips is None else measures.lpips.to(truth["mask"].device),
        "inception": measures.inception,
    }


@torch.no_grad()
def set_features(background: Layer, batch: Mapping[str, Tensor], measures: Measures) -> Tensor:
    """Inception features of predicted or true backgrounds, for the metrics of a whole set.

    Returns:
        (B, 2048) float32; (0, 2048) if the network or the background is missing.
    """
    if measures.inception is None or background is None:
        return torch.empty(0, FEATURES, device=batch["image"].device)
    rgb, _, truth = _at_resolution(measures.resolution, background, None, batch)
    assert rgb is not None
    pasted = paste(rgb, truth["background"], select(measures.region, truth["mask"]))
    return inception_features(measures.inception.to(rgb.device), pasted)


def set_metrics(features: Tensor) -> dict[str, Tensor]:
    """The metrics of a whole set, float64 scalars, from the ``set_features`` (N, 2, 2048) of predictions and truth."""
    predicted, true = features.unbind(1)
    return {name: info.compute(predicted, true) for name, info in METRICS.items() if info.whole_set}


def _at_resolution(
    resolution: int | None, rgb: Layer, rgba: Layer, batch: Mapping[str, Tensor]
) -> tuple[Layer, Layer, dict[str, Tensor]]:
    """Checks predictions and truth, casts them to float32, and resizes the longer side to `resolution` if given."""
    _check(rgb, rgba, batch)
    names = ("image", "mask", "foreground", "background", "occluder")
    truth = {name: batch[name].float() for name in names if name in batch}
    rgb, rgba = (None if layer is None else layer.float() for layer in (rgb, rgba))
    height, width = truth["image"].shape[-2:]
    if resolution is None or max(height, width) == resolution:
        return rgb, rgba, truth
    scale = resolution / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    scaled = {name: _scaled(layer, size) for name, layer in truth.items()}
    scaled["mask"] = (scaled["mask"] >= 0.5).float()
    rgb, rgba = (None if layer is None else _scaled(layer, size) for layer in (rgb, rgba))
    return rgb, rgba, scaled


def _scaled(layer: Tensor, size: tuple[int, int]) -> Tensor:
    """An image, a foreground or a mask, resized."""
    if layer.shape[1] == 1:  # bilinear has no overshoot, so 0 stays 0
        return F.interpolate(layer, size, mode="bilinear", antialias=True)
    if layer.shape[1] == 4:
        return resize_straight(layer, size)
    return resize(layer, size)


def _check(rgb: Layer, rgba: Layer, batch: Mapping[str, Tensor]) -> None:
    slack = 1e-3  # rounding of bf16 un-premultiplication and compositing
    for layer, channels in ((rgb, 3), (rgba, 4)):
        if layer is None:
            continue
        expected = (batch["image"].shape[0], channels, *batch["image"].shape[2:])
        assert layer.shape == expected, f"a predicted layer is {tuple(layer.shape)}, not {expected}"
        if not torch.isfinite(layer).all():
            raise ValueError(
                "The predicted layers contain NaN or infinity: the model has diverged, its metrics are meaningless."
            )
        assert layer.abs().max() <= 1 + slack, "predicted layers exceed their range"
    assert rgba is None or rgba[:, 3].min() >= -slack, "predicted layers exceed their range"


def sums(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and count of the defined entries of each row of ``values`` (names, B): (names,) float64 each.

    In float32, rounding would swamp a small variance, such as that of an SSIM of 0.99 +- 0.0001.
    """
    defined = ~values.isnan()
    values = torch.where(defined, values, 0).double()
    return values.sum(dim=1), values.square().sum(dim=1), defined.sum(dim=1).double()


def summarize(total: Tensor, total_squared: Tensor, count: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Results for a set, from the totals of ``sums`` (for PER_IMAGE) over its batches, and its features.

    Args:
        total, total_squared, count: (names,) each.
        features: as in ``set_metrics``.

    Returns:
        Scalars under each name in METRICS: the mean (NaN if count is 0), or the metric of the whole set; then the
        standard error of each mean under name + STDERR_SUFFIX (NaN if count is below 2).
    """
    mean = total / count
    variance = (total_squared - count * mean.square()).clamp(min=0) / (count - 1)
    stderr = torch.where(count > 1, variance / count, torch.nan).sqrt()
    figures = dict(zip(PER_IMAGE, mean, strict=True)) | set_metrics(features)
    errors = {name + STDERR_SUFFIX: value for name, value in zip(PER_IMAGE, stderr, strict=True)}
    return {name: figures[name] for name in METRICS} | errors


class LayerMetrics(Metric):
    """Every metric over a set of images, means with standard errors, independent of the number of processes.

    The state is three numbers per metric and, for FID and KID, the features; no images. Neither the state nor the
    networks in `measures` enter checkpoints. Keyword arguments go to torchmetrics.Metric.
    """

    full_state_update = False
    total: Tensor
    total_squared: Tensor
    count: Tensor
    features: list[Tensor]

    def __init__(self, measures: Measures | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.measures = measures or Measures()
        for state in ("total", "total_squared", "count"):
            self.add_state(state, default=torch.zeros(len(PER_IMAGE), dtype=torch.float64), dist_reduce_fx="sum")
        # one-dimensional, because that is how torchmetrics creates the state of a process without data
        self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, prediction_background: Layer, prediction_foreground: Layer, batch: Mapping[str, Tensor]) -> None:
        """Adds a batch; arguments and errors as in ``per_image``."""
        values = per_image(prediction_background, prediction_foreground, batch, self.measures)
        total, total_squared, count = sums(torch.stack(list(values.values())))
        self.total += total
        self.total_squared += total_squared
        self.count += count
        predicted = set_features(prediction_background, batch, self.measures)
        true = set_features(batch["background"], batch, self.measures)
        self.features.append(torch.stack([predicted, true[: len(predicted)]], dim=1).flatten())

    def compute(self) -> dict[str, Tensor]:
        """The results of ``summarize``; images for which a metric is undefined do not count."""
        features = dim_zero_cat(self.features) if len(self.features) else self.total.new_empty(0)
        return summarize(self.total, self.total_squared, self.count, features.view(-1, 2, FEATURES))
