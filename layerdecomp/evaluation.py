"""Evaluation of any number of methods on one data set: writes their layers to files, and scores these files.

Layers always pass through a folder (`layerdecomp/predictions.py`), so that an interrupted evaluation resumes where it
stopped, and every method, built-in or external, is measured in the same way. In all outputs, each method is a row under
its name.
"""

import csv
import io
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

Batch = dict[str, Tensor]
Results = Mapping[str, Mapping[str, float]]  # row -> metric -> value


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
    """The share of this process in a distributed evaluation: every `world`-th sample, starting at `rank`."""

    rank: int = 0
    world: int = 1
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
        return range(self.rank, count, self.world)

    def wait(self) -> None:
        """Waits for all processes."""
        if self.before_waiting is not None:
            self.before_waiting()
        if self.world > 1:
            torch.distributed.barrier(self.group)

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, on rank 0; an empty list elsewhere."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.rank == 0 else None
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
        batch, found[position] = to_batch([data[position]], device), {}
        true = set_features(batch["background"], batch, networks.measures)
        for row, folder in folders.items():
            layers = folder.read(names[position], batch["image"])
            background, foreground = (None if layer is None else layer.to(device) for layer in layers)
            values = per_image(background, foreground, batch, networks.measures)
            predicted = set_features(background, batch, networks.measures)
            features = torch.stack([predicted, true[: len(predicted)]], dim=1)
            found[position][row] = torch.stack(list(values.values())).cpu(), features.cpu()
    with_truth = "foreground" in data[0]
    shares = share.gather((found, [folder.resized for folder in folders.values()]))
    if not shares:
        return None
    every = {position: rows for part, _ in shares for position, rows in part.items()}
    for place, folder in enumerate(folders.values()):
        folder.resized.update(*(resized[place] for _, resized in shares))
    joined = {
        row: [torch.cat(parts, dim=dim) for dim, parts in ((1, values), (0, features))]
        for row in folders
        for values, features in [zip(*(every[position][row] for position in range(len(data))), strict=True)]
    }
    results = {
        row: {name: float(x) for name, x in summarize(*sums(values), features).items()}
        for row, (values, features) in joined.items()
    }
    return Evaluation(
        list(names),
        results,
        {row: dict(zip(PER_IMAGE, values.tolist(), strict=True)) for row, (values, _) in joined.items()},
        {row: _reasons(results[row], folder, with_truth, networks.missing) for row, folder in folders.items()},
    )


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
    atomic_write(out / "per_image.csv", format_csv(evaluation))
    atomic_write(out / "table.md", table + "\n")
    write_metrics(out / "metrics.json", evaluation.results, protocol, evaluation.reasons)
    return table


def format_csv(evaluation: Evaluation) -> str:
    """CSV with one line per image and row, one column per metric in PER_IMAGE; cells are empty where undefined."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "row", *PER_IMAGE])
    for place, name in enumerate(evaluation.names):
        for row, values in evaluation.per_image.items():
            cells = [values[metric][place] for metric in PER_IMAGE]
            lines.writerow([name, row, *("" if math.isnan(value) else f"{value:.6g}" for value in cells)])
    return text.getvalue()


def ranked_cases(values: Sequence[float], *, higher_is_better: bool) -> dict[str, int]:
    """Indices of a good (90th percentile), the median and the worst case, ignoring NaN."""
    defined = [index for index, value in enumerate(values) if not math.isnan(value)]
    assert defined, "no image defines this metric; rank by another one"
    best_first = sorted(defined, key=lambda index: values[index], reverse=higher_is_better)
    last = len(best_first) - 1
    return {"good": best_first[last // 10], "median": best_first[last // 2], "worst": best_first[last]}


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


def format_table(results: Results) -> str:
    """An aligned Markdown table, mean ± standard error: one line per metric, one column per row of the results.

    Metrics without a value in any row are omitted.
    """
    found = {name for values in results.values() for name, value in values.items() if not math.isnan(value)}
    names = [name for name in METRICS if name in found]
    table = [["metric", *results]]
    table += [[metric_title(name), *(_cell(name, values) for values in results.values())] for name in names]
    return markdown_table(table)


def format_published(results: Results, published: Results) -> str:
    """A Markdown table with one line per row and metric of the published figures, next to ours if available."""
    table = [["row", "metric", "published", "ours"]]
    for row, figures in published.items():
        for name, value in figures.items():
            ours = _cell(name, results[row]) if row in results else ""
            table.append([row, metric_title(name), f"{value:.2f}", ours])
    return markdown_table(table)


def fill(path: Path, name: str, content: str) -> None:
    """Replaces the text between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown file."""
    before, after = split_at_markers(path, name)
    atomic_write(path, f"{before}\n{content}\n\n{after}")


def check_fill(path: Path, name: str, published: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the file has the lines that `fill` needs and there are published figures."""
    if not published:
        raise InputError(f"fill={path} compares with published figures; expected config= with evaluate.published")
    split_at_markers(path, name)


def split_at_markers(path: Path, name: str) -> tuple[str, str]:
    """The text up to and including the opening line of ``fill``, and the text from the closing line on.

    Raises:
        InputError: the file does not exist or lacks these lines.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    text = path.read_text() if path.is_file() else ""
    before, begun, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not begun or not ended:
        raise InputError(f"{path} has no lines {first.strip()} and {last}; expected them around the text to replace")
    return before + begun, ended + after


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table from lines of cells, header first; all columns but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def metric_title(name: str) -> str:
    """A metric's name, unit and direction of improvement."""
    return f"{name} {METRICS[name].unit} {METRICS[name].better}".replace("  ", " ")


def _cell(name: str, values: Mapping[str, float]) -> str:
    return metric_value(name, values.get(name, math.nan), values.get(name + STDERR_SUFFIX, math.nan))


def metric_value(name: str, mean: float, spread: float) -> str:
    """A metric's value ± spread, with two decimals for dB and four otherwise; NaN is "-", a NaN spread is omitted."""
    digits = 2 if METRICS[name].unit == "dB" else 4
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"
