"""Results as text: the tables of an evaluation in Markdown and CSV, and Markdown tables in general."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerdecomp.errors import InputError
from layerdecomp.files import atomic_write
from layerdecomp.metrics.layers import METRICS, PER_IMAGE, STDERR_SUFFIX

Results = Mapping[str, Mapping[str, float]]  # row -> metric -> value


def format_csv(names: Sequence[str], per_image: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """CSV with one line per image and row, one column per metric in PER_IMAGE; cells are empty where undefined.

    Args:
        names: of the images.
        per_image: row -> metric -> value per image.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "row", *PER_IMAGE])
    for place, name in enumerate(names):
        for row, values in per_image.items():
            cells = [values[metric][place] for metric in PER_IMAGE]
            lines.writerow([name, row, *("" if math.isnan(value) else f"{value:.6g}" for value in cells)])
    return text.getvalue()


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


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table from lines of cells, header first; all columns but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"


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
