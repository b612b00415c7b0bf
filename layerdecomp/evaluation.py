"""Evaluation of any number of methods on one data set: writes their layers to files, and scores these files.

Layers always pass through a folder (`layerdecomp/predictions.py`), so that an interrupted evaluation resumes where it
stopped, and every method, built-in or external, is measured in the same way. In all outputs, each method is a row under
its name.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from layerdecomp.errors import InputError
from layerdecomp.files import atomic_write
from layerdecomp.metric_networks import Networks
from layerdecomp.metrics.layers import METRICS, PER_IMAGE, STDERR_SUFFIX, per_image, set_features, summarize, sums
from layerdecomp.predictions import LAYERS, Prediction, PredictionFolder, is_written, write_prediction
from layerdecomp.tables import Results, format_csv, format_table

Batch = dict[str, Tensor]


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Method:
    """A method that predicts layers: a function from a batch (collated samples) to a background and a foreground.

    A method that draws noise should seed it from ``batch["index"]``, so that its output depends neither on the batch
    size nor on how samples are distributed over processes.
    """

    draw: Callable[[Batch], Prediction]
    layers: tuple[str, ...] = LAYERS  # the layers it predicts; it returns None for the others


@dataclass(frozen=True)
class Share:
    """The share of this process in a distributed evaluation: every `world_size`-th sample, starting at `rank`."""

    rank: int = 0
    world_size: int = 1
    group: Any = None  # a torch.distributed process group; None: the default group
    before_waiting: Callable[[], None] | None = None  # called before each barrier, for work that other ranks wait for

    @classmethod
    def join(cls) -> "Share":
        """The share of a process that torchrun or a training run has started; otherwise all samples."""
        group: Any = None
        timeout = timedelta(days=7)  # ranks may finish hours apart
        if torch.distributed.is_initialized():  # by a training run, whose timeout is minutes
            group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        else:
            torch.distributed.init_process_group("gloo", timeout=timeout)
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)

    def positions(self, count: int) -> range:
        return range(self.rank, count, self.world_size)

    def wait(self) -> None:
        """Waits for all processes."""
        if self.before_waiting is not None:
            self.before_waiting()
        if self.world_size > 1:
            torch.distributed.barrier(self.group)

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(item, items, group=self.group)
        return items or []


@dataclass(frozen=True)
class Evaluation:
    """The results of every row.

    Attributes:
        names: of the samples, in order.
        results: row -> metric -> value: the mean over all images for which the metric is defined (NaN if there are
            none), or the value of a metric of the whole set; the standard error of a mean is under the metric's
            name + STDERR_SUFFIX.
        per_image: row -> metric in PER_IMAGE -> value per image, NaN where undefined.
        reasons: row -> metric -> why its value is not finite.
    """

    names: list[str]
    results: dict[str, dict[str, float]]
    per_image: dict[str, dict[str, list[float]]]
    reasons: dict[str, dict[str, str]]


@torch.inference_mode()
def draw_layers(
    methods: Mapping[str, Method],
    data: Samples,
    names: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    share: Share | None = None,
) -> dict[str, float]:
    """Predicts the layers of this process's samples with every method, into ``folder / row``; existing files are kept.

    Returns:
        Row -> seconds per image to predict and write the layers, for rows that had any left to predict.

    Raises:
        ValueError: a method returns NaN or infinity.
    """
    positions = (share or Share()).positions(len(data))
    spent: dict[str, list[float]] = {}
    with tqdm(total=len(positions), desc="draw", unit="image", disable=positions.start > 0) as progress:
        for start in range(0, len(positions), batch_size):
            chunk = positions[start : start + batch_size]
            pending = {
                row: method
                for row, method in methods.items()
                if not all(is_written(folder / row, names[position], method.layers) for position in chunk)
            }
            for group, batch in _batches(data, chunk if pending else (), device):
                for row, method in pending.items():
                    progress.set_postfix_str(row)
                    started = time.perf_counter()
                    drawn = [names[position] for position in group]
                    write_prediction(folder / row, drawn, _drawn(row, method, batch, drawn))
                    spent.setdefault(row, []).extend([(time.perf_counter() - started) / len(group)] * len(group))
            progress.update(len(chunk))
    return {row: sum(seconds) / len(seconds) for row, seconds in spent.items()}


def _drawn(row: str, method: Method, batch: Batch, names: Sequence[str]) -> Prediction:
    try:
        return method.draw(batch)
    except InputError as error:
        raise InputError(f"{row}, of {', '.join(names)}: {error}; or remove {row} from evaluate.rows") from error


def _batches(data: Samples, positions: Sequence[int], device: torch.device | str) -> Iterator[tuple[list[int], Batch]]:
    """The samples at the given positions, batched by size."""
    samples = {position: data[position] for position in positions}
    sizes = {position: sample["image"].shape for position, sample in samples.items()}
    for size in dict.fromkeys(sizes.values()):
        group = [position for position in positions if sizes[position] == size]
        yield group, to_batch([samples[position] for position in group], device)


def to_batch(samples: Sequence[Mapping[str, Any]], device: torch.device | str) -> Batch:
    """Collates samples of one size."""
    batch = default_collate([dict(sample) for sample in samples])
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


@torch.inference_mode()
def score(
    folders: Mapping[str, PredictionFolder],
    data: Samples,
    names: Sequence[str],
    networks: Networks | None = None,
    *,
    device: torch.device | str = "cpu",
    share: Share | None = None,
) -> Evaluation | None:
    """Scores every row's layers, image by image.

    Returns:
        The results, on rank 0; None on the others.
    """
    networks, share = networks or Networks(), share or Share()
    found: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    positions = share.positions(len(data))
    for position in tqdm(positions, desc="score", unit="image", disable=share.rank > 0):
        batch = to_batch([data[position]], device)
        found[position] = {}
        true = set_features(batch["background"], batch, networks.measures)
        for row, folder in folders.items():
            layers = folder.read(names[position], batch["image"])
            background, foreground = (None if layer is None else layer.to(device) for layer in layers)
            measured = per_image(background, foreground, batch, networks.measures)
            predicted = set_features(background, batch, networks.measures)
            features = torch.stack([predicted, true[: len(predicted)]], dim=1)
            found[position][row] = torch.stack(list(measured.values())).cpu(), features.cpu()
    with_truth = "foreground" in data[0]
    shares = share.gather((found, [folder.resized for folder in folders.values()]))
    if not shares:
        return None
    every = {position: rows for part, _ in shares for position, rows in part.items()}
    for place, folder in enumerate(folders.values()):
        folder.resized.update(*(resized[place] for _, resized in shares))
    evaluation = Evaluation(list(names), {}, {}, {})
    for row, folder in folders.items():
        pairs = [every[position][row] for position in range(len(data))]
        values = torch.cat([values for values, _ in pairs], dim=1)  # (metrics, N)
        features = torch.cat([features for _, features in pairs])  # (N, 2, 2048)
        figures = {name: float(x) for name, x in summarize(*sums(values), features).items()}
        evaluation.results[row] = figures
        evaluation.per_image[row] = dict(zip(PER_IMAGE, values.tolist(), strict=True))
        evaluation.reasons[row] = _reasons(figures, folder, with_truth, networks.missing)
    return evaluation


def _reasons(
    figures: Mapping[str, float], folder: PredictionFolder, with_truth: bool, missing: Mapping[str, str]
) -> dict[str, str]:
    """Metric -> the reason why its value is not finite, for a row."""
    return {
        name: _why_not(name, folder, with_truth, missing) for name, value in figures.items() if not math.isfinite(value)
    }


def _why_not(name: str, folder: PredictionFolder, with_truth: bool, missing: Mapping[str, str]) -> str:
    metric = name.removesuffix(STDERR_SUFFIX)
    needs = METRICS[metric].needs
    if lacking := [layer for layer in LAYERS if layer in needs and layer not in folder.given]:
        return f"this row has no {lacking[0]}s"
    if "true foreground" in needs and not with_truth:
        return "the data set has no true foregrounds"
    if metric in missing:
        return missing[metric]
    if name != metric:
        return "fewer than two images have a value for this metric"
    return f"undefined for every image: {METRICS[metric].undefined}"


def write_figures(out: Path, evaluation: Evaluation, protocol: Mapping[str, Any]) -> str:
    """Writes metrics.json, per_image.csv and table.md into a folder, and returns the table."""
    table = format_table(evaluation.results)
    atomic_write(out / "per_image.csv", format_csv(evaluation.names, evaluation.per_image))
    atomic_write(out / "table.md", table + "\n")
    write_metrics(out / "metrics.json", evaluation.results, protocol, evaluation.reasons)
    return table


def write_metrics(
    path: str | Path,
    results: Results,
    protocol: Mapping[str, Any],
    reasons: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes metrics.json atomically: ``{"protocol": {...}, "results": {row: {metric: value}}}``.

    A value that is not finite becomes null, with the reason in ``protocol["undefined"][row][metric]``.
    """
    undefined = {
        row: {name: (reasons or {}).get(row, {}).get(name, "not finite") for name in figures}
        for row, values in results.items()
        if (figures := [name for name, x in values.items() if not math.isfinite(x)])
    }
    document = {
        "protocol": {**protocol, "undefined": undefined},
        "results": {
            row: {name: x if math.isfinite(x) else None for name, x in v.items()} for row, v in results.items()
        },
    }
    atomic_write(Path(path), json.dumps(document, indent=2, allow_nan=False) + "\n")
