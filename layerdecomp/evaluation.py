"""Evaluation of any number of predictors on one data set: numbers, metrics.json, a table and a picture.

A predictor is a function from a batch (collated samples) to a background (B, 3, H, W) in [-1, 1] and a foreground
(B, 4, H, W) of straight RGB in [-1, 1] and alpha in [0, 1]. Its name is the name of its row in every output.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from layerdecomp.imaging.compositing import on_checkerboard
from layerdecomp.metrics.layers import METRICS, STDERR_SUFFIX, per_image, summarize, sums
from layerdecomp.metrics.region import dilate

Batch = dict[str, Tensor]
Prediction = tuple[Tensor, Tensor]
Predictor = Callable[[Batch], Prediction]
Results = Mapping[str, Mapping[str, float]]  # row -> metric -> value

MAX_TILE = 256  # pixels; larger samples are reduced in the comparison picture
GAP, HEADER, GUTTER = 4, 30, 50  # pixels between tiles, above them for column names, left of them for row labels


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        results: row -> metric -> mean over the images that define it (NaN if none does), and the standard error of that
            mean under the metric's name + STDERR_SUFFIX.
        per_image: row -> metric -> value of each image in the order of the data set, NaN where undefined.
    """

    results: dict[str, dict[str, float]]
    per_image: dict[str, dict[str, list[float]]]


@torch.inference_mode()
def evaluate(
    predictors: Mapping[str, Predictor], dataset: Samples, *, batch_size: int = 8, device: torch.device | str = "cpu"
) -> Evaluation:
    """Run every predictor on every sample, in order, and measure it; shows progress on stderr.

    Nothing here is random: results repeat exactly if the data set and the predictors do. A predictor that draws noise
    should seed it from ``batch["index"]``, so that the result does not depend on the batch size either.

    Args:
        predictors: row name -> predictor; it receives a batch on ``device`` and may return tensors on any device.
        dataset: samples with image, mask, foreground, background and occluder.
        batch_size: samples per batch; the last batch may be smaller.
        device: where the batches and the metrics live.

    Raises:
        ValueError: a prediction holds NaN or infinity.
    """
    values: dict[str, list[Tensor]] = {row: [] for row in predictors}  # each (names, B)
    with tqdm(total=len(dataset), desc="evaluate", unit="image") as progress:
        for batch in _batches(dataset, batch_size, torch.device(device)):
            for row, predict in predictors.items():
                progress.set_postfix_str(row)
                values[row].append(_measure(predict(batch), batch))
            progress.update(len(batch["image"]))
    joined = {row: torch.cat(parts, dim=1) for row, parts in values.items()}  # (names, N)
    return Evaluation(
        results={row: {name: float(x) for name, x in summarize(*sums(v)).items()} for row, v in joined.items()},
        per_image={row: dict(zip(METRICS, v.tolist(), strict=True)) for row, v in joined.items()},
    )


def _batches(dataset: Samples, batch_size: int, device: torch.device) -> Iterator[Batch]:
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        batch = default_collate([dataset[index] for index in range(start, stop)])
        yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def _measure(prediction: Prediction, batch: Batch) -> Tensor:
    """All metrics (names, B) of one prediction, on the CPU."""
    background, foreground = (layer.to(batch["image"].device) for layer in prediction)
    values = per_image(background, foreground, batch)
    return torch.stack([values[name] for name in METRICS]).cpu()


def ranked_cases(values: Sequence[float], *, higher_is_better: bool) -> dict[str, int]:
    """Indices of a good (better than nine in ten), the median and the worst case; undefined (NaN) ones are left out."""
    defined = [index for index, value in enumerate(values) if not math.isnan(value)]
    assert defined, "no image defines this metric; rank by another one"
    best_first = sorted(defined, key=lambda index: values[index], reverse=higher_is_better)
    last = len(best_first) - 1
    return {"good": best_first[last // 10], "median": best_first[last // 2], "worst": best_first[last]}


def write_metrics(path: str | Path, results: Results, protocol: Mapping[str, Any]) -> None:
    """Write metrics.json: ``{"protocol": {...}, "results": {row: {metric: value}}}``.

    A value that is not finite becomes null, and ``protocol["undefined"][row][metric]`` says why. The file appears
    complete or not at all.
    """
    undefined = {
        row: {name: _reason(name) for name, x in v.items() if not math.isfinite(x)} for row, v in results.items()
    }
    document = {
        "protocol": {**protocol, "undefined": {row: reasons for row, reasons in undefined.items() if reasons}},
        "results": {
            row: {name: x if math.isfinite(x) else None for name, x in v.items()} for row, v in results.items()
        },
    }
    write_atomically(Path(path), json.dumps(document, indent=2, allow_nan=False) + "\n")


def _reason(name: str) -> str:
    if name.endswith(STDERR_SUFFIX):
        return "fewer than two images define the metric"
    return f"undefined for every image: {METRICS[name].undefined}" if name in METRICS else "not finite"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its name, then rename it, so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def format_table(results: Results) -> str:
    """One line per metric, one column per row of the results, mean ± standard error: aligned text that is Markdown."""
    names = [name for name in METRICS if any(name in values for values in results.values())]
    table = [["metric", *results]]
    table += [[metric_title(name), *(_cell(name, values) for values in results.values())] for name in names]
    return markdown_table(table)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the header's first, as aligned text that is Markdown; all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def metric_title(name: str) -> str:
    """A metric's name, unit and better direction."""
    return f"{name} {METRICS[name].unit} {METRICS[name].better}".replace("  ", " ")


def _cell(name: str, values: Mapping[str, float]) -> str:
    return metric_value(name, values.get(name, math.nan), values.get(name + STDERR_SUFFIX, math.nan))


def metric_value(name: str, mean: float, spread: float) -> str:
    """A metric's value ± what it varies by, as many digits as it deserves; NaN is left out."""
    digits = 2 if METRICS[name].unit == "dB" else 4
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"


def comparison_grid(
    batch: Batch, predictions: Mapping[str, Prediction], labels: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """Draw a picture with one line per sample: input, mask outline, the layers of every prediction, the true layers.

    Args:
        batch: B collated samples with image, mask, foreground and background.
        predictions: row name -> (background, foreground) for that batch; foregrounds are shown on a checkerboard.
        labels: B texts to the left of the samples, "worst" for example; none leaves no room for them.

    Returns:
        (height, width, 3) uint8.
    """
    assert not labels or len(labels) == len(batch["image"])
    columns = _columns(batch, predictions)
    tiles = [_tiles(images) for images in columns.values()]
    height, width = tiles[0].shape[1:3]
    left = GUTTER if labels else GAP
    size = left + len(tiles) * (width + GAP), HEADER + len(tiles[0]) * (height + GAP)
    canvas = Image.new("RGB", size, "white")
    for x, column in enumerate(tiles):
        for y, tile in enumerate(column):
            canvas.paste(Image.fromarray(tile), (left + x * (width + GAP), HEADER + y * (height + GAP)))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for x, name in enumerate(columns):
        draw.multiline_text((left + x * (width + GAP), 2), name, fill="black", font=font)
    for y, label in enumerate(labels):
        draw.text((GAP, HEADER + y * (height + GAP)), label, fill="black", font=font)
    return np.asarray(canvas)


def _columns(batch: Batch, predictions: Mapping[str, Prediction]) -> dict[str, Tensor]:
    """Column name -> images (B, 3, H, W) in [-1, 1], left to right."""
    columns = {"input": batch["image"], "mask": _outlined(batch["image"], batch["mask"])}
    for row, (background, foreground) in {**predictions, "truth": (batch["background"], batch["foreground"])}.items():
        columns[f"{row}\nbackground"] = background
        columns[f"{row}\nforeground"] = on_checkerboard(foreground)
    return columns


def _outlined(image: Tensor, mask: Tensor) -> Tensor:
    """The image with a magenta line around the mask, just outside it."""
    inside = mask > 0.5
    magenta = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).to(image)
    return torch.where(dilate(inside, 1) & ~inside, magenta, image)


def _tiles(images: Tensor) -> NDArray[np.uint8]:
    """Images (B, 3, H, W) in [-1, 1] as (B, h, w, 3) uint8, the longer side at most MAX_TILE."""
    images = images.detach().float().cpu()
    scale = MAX_TILE / max(images.shape[-2:])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
        images = F.interpolate(images, size=(height, width), mode="area")
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()
