"""Reports of an evaluation: a grid of example cases, and a self-contained HTML report that works offline.

The HTML report has a table of all means, the ten best and worst images with every row's layers and error maps, and the
metrics of every image. Clicking a column header sorts its table.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from layerdecomp.evaluation import Evaluation, Samples, to_batch
from layerdecomp.grids import comparison_grid, error_map, outlined, tiles_of
from layerdecomp.imaging.compositing import on_checkerboard, resize_straight
from layerdecomp.imaging.geometry import resize
from layerdecomp.imaging.layers import Pixels
from layerdecomp.metrics.layers import METRICS, PER_IMAGE, STDERR_SUFFIX
from layerdecomp.predictions import PredictionFolder
from layerdecomp.tables import metric_title, metric_value

RANKED_BY = ("background/psnr", "foreground/alpha_iou")
EXTREMES = 10  # number of best and of worst images per metric

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; }
table { border-collapse: collapse; margin: 1em 0 2em; }
th, td { padding: 3px 6px; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; vertical-align: bottom; font-size: 12px; }
thead th[aria-sort]::after { content: " ▲"; } thead th[aria-sort=descending]::after { content: " ▼"; }
img { display: block; max-width: 192px; margin: 0 0 2px auto; }
pre { background: #f4f4f4; padding: 1em; overflow: auto; max-height: 30em; }
"""
_SCRIPT = """
for (const head of document.querySelectorAll("thead th")) head.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending", body = head.closest("table").tBodies[0];
  const key = row => { const cell = row.cells[head.cellIndex]; return cell.dataset.value ?? cell.textContent; };
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // undefined values stay last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  };
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(compare));
});
"""


def format_report(
    evaluation: Evaluation, folders: Mapping[str, PredictionFolder], data: Samples, protocol: Mapping[str, Any]
) -> str:
    """The complete report as HTML.

    Args:
        evaluation: of `folders` on `data`.
        protocol: as in metrics.json.
    """
    chosen = extremes(evaluation)
    parts = [
        "<h1>Layer decomposition</h1>",
        f"<p>{len(evaluation.names)} images. Click a column header to sort the table.</p>",
        "<h2>Means</h2>",
        _table(["row", *_shown(evaluation)], _summary(evaluation)),
        "<h2>Best and worst</h2>",
        f"<p>The {EXTREMES} best and worst images of {html.escape(next(iter(folders)))} by {' and '.join(RANKED_BY)}. "
        "Error maps: black is no error, white is an error of a quarter of the range or more.</p>",
        *_table_parts(_case_heads(evaluation), _cases(evaluation, folders, data, chosen)),
        "<h2>All images</h2>",
        _table(["image", "row", *map(metric_title, PER_IMAGE)], _images(evaluation)),
        "<h2>Protocol</h2>",
        f"<pre>{html.escape(json.dumps(protocol, indent=2))}</pre>",
    ]
    content = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Layer decomposition</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{content}\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def extremes(evaluation: Evaluation, count: int = EXTREMES) -> dict[int, list[str]]:
    """Position -> rankings ("best 1 by background/psnr"), for the first row's best and worst images by RANKED_BY."""
    found: dict[int, list[str]] = {}
    values_of = next(iter(evaluation.per_image.values()))
    for metric in RANKED_BY:
        ranking = best_first(values_of[metric], higher_is_better=METRICS[metric].better == "↑")
        for kind, places in (("best", ranking[:count]), ("worst", ranking[::-1][:count])):
            for rank, place in enumerate(places, start=1):
                found.setdefault(place, []).append(f"{kind} {rank} by {metric}")
    return found


def ranked_cases(values: Sequence[float], *, higher_is_better: bool) -> dict[str, int]:
    """Indices of a good (90th percentile), the median and the worst case, ignoring NaN."""
    ranking = best_first(values, higher_is_better=higher_is_better)
    assert ranking, "no image defines this metric; rank by another one"
    last = len(ranking) - 1
    return {"good": ranking[last // 10], "median": ranking[last // 2], "worst": ranking[last]}


def best_first(values: Sequence[float], *, higher_is_better: bool) -> list[int]:
    """Indices of the values that are not NaN, best first."""
    defined = [index for index, value in enumerate(values) if not math.isnan(value)]
    return sorted(defined, key=lambda index: values[index], reverse=higher_is_better)


def case_grid(evaluation: Evaluation, folders: Mapping[str, PredictionFolder], data: Samples) -> Pixels | None:
    """A grid of the first row's good, median and worst cases, by background and then by alpha.

    None if the row has no values for either metric. All images are resized to the size of the first.
    """
    places, labels = [], []
    for metric in RANKED_BY:
        values = next(iter(evaluation.per_image.values()))[metric]
        if any(not math.isnan(value) for value in values):
            cases = ranked_cases(values, higher_is_better=METRICS[metric].better == "↑")
            places += list(cases.values())
            labels += [f"{case}\n{metric.split('/')[1]}" for case in cases]
    if not places:
        return None
    batches = [to_batch([data[place]], "cpu") for place in places]
    size = (batches[0]["image"].shape[-2], batches[0]["image"].shape[-1])
    parts = [part for part in ("image", "mask", "background", "foreground") if part in batches[0]]
    layers = {
        row: [
            folder.read(evaluation.names[place], batch["image"]) for place, batch in zip(places, batches, strict=True)
        ]
        for row, folder in folders.items()
    }
    predictions = {
        row: (_joined([pair[0] for pair in pairs], 3, size), _joined([pair[1] for pair in pairs], 4, size))
        for row, pairs in layers.items()
    }
    batch = {str(part): torch.cat([_at(found[part], size) for found in batches]) for part in parts}
    return comparison_grid(batch, predictions, labels)


def _joined(layers: Sequence[Tensor | None], channels: int, size: tuple[int, int]) -> Tensor | None:
    """Single-image layers, resized and batched; a missing layer is grey or transparent."""
    if all(layer is None for layer in layers):
        return None
    return torch.cat([torch.zeros(1, channels, *size) if layer is None else _at(layer, size) for layer in layers])


def _at(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (1, 1, H, W), image (1, 3, H, W) or straight foreground (1, 4, H, W), resized if its size differs."""
    straight = image.shape[1] == 4 and image.shape[-2:] != size
    return resize_straight(image, size) if straight else resize(image, size)


Cell = tuple[str, float | str]  # content, sort key


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    return "\n".join(_table_parts(heads, rows))


def _table_parts(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Iterator[str]:
    yield f"<table><thead><tr>{''.join(f'<th>{_breakable(head)}</th>' for head in heads)}</tr></thead><tbody>"
    for cells in rows:
        yield f"<tr>{''.join(_cell(shown, key) for shown, key in cells)}</tr>"
    yield "</tbody></table>"


def _breakable(head: str) -> str:
    """Allows line breaks in column headers, to keep the columns narrow."""
    return html.escape(head).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _cell(shown: str, key: float | str) -> str:
    value = "" if isinstance(key, float) and math.isnan(key) else key
    return f'<td data-value="{html.escape(str(value))}">{shown}</td>'


def _shown(evaluation: Evaluation) -> list[str]:
    """Titles of the metrics with a value in at least one row."""
    return [metric_title(name) for name in _measured(evaluation)]


def _measured(evaluation: Evaluation) -> list[str]:
    rows = evaluation.results.values()
    return [name for name in METRICS if any(not math.isnan(row[name]) for row in rows)]


def _summary(evaluation: Evaluation) -> Iterator[list[Cell]]:
    for row, figures in evaluation.results.items():
        values = [(name, figures[name], figures.get(name + STDERR_SUFFIX, math.nan)) for name in _measured(evaluation)]
        yield [(html.escape(row), row), *((metric_value(*value), value[1]) for value in values)]


def _images(evaluation: Evaluation) -> Iterator[list[Cell]]:
    for place, name in enumerate(evaluation.names):
        for row, values in evaluation.per_image.items():
            figures = [(metric, values[metric][place]) for metric in PER_IMAGE]
            yield [
                (html.escape(name), name),
                (html.escape(row), row),
                *((metric_value(metric, value, math.nan), value) for metric, value in figures),
            ]


def _case_heads(evaluation: Evaluation) -> list[str]:
    figures = [f"{row}, {metric}" for row in evaluation.results for metric in RANKED_BY]
    return ["image", "input and mask", "truth", *(f"{row}: layers, errors" for row in evaluation.results), *figures]


def _cases(
    evaluation: Evaluation, folders: Mapping[str, PredictionFolder], data: Samples, chosen: Mapping[int, Sequence[str]]
) -> Iterator[list[Cell]]:
    for place, kinds in chosen.items():
        batch = to_batch([data[place]], "cpu")
        name = evaluation.names[place]
        figures = [
            (metric, evaluation.per_image[row][metric][place]) for row in evaluation.results for metric in RANKED_BY
        ]
        images = [
            [batch["image"], outlined(batch["image"], batch["mask"])],
            _stack(batch["background"], batch.get("foreground")),
            *(_layers_and_errors(folder, name, batch) for folder in folders.values()),
        ]
        yield [
            (f"{html.escape(name)}<br>{'<br>'.join(kinds)}", name),
            *(("".join(map(_image_element, column)), "") for column in images),
            *((metric_value(metric, value, math.nan), value) for metric, value in figures),
        ]


def _layers_and_errors(folder: PredictionFolder, name: str, batch: Mapping[str, Tensor]) -> list[Tensor]:
    background, foreground = folder.read(name, batch["image"])
    images = _stack(background, foreground)
    if background is not None:
        images.insert(1, error_map(background, batch["background"], 2))
    if foreground is not None and "foreground" in batch:
        images.append(error_map(foreground[:, 3:], batch["foreground"][:, 3:], 1))
    return images


def _stack(background: Tensor | None, foreground: Tensor | None) -> list[Tensor]:
    shown = None if foreground is None else on_checkerboard(foreground)
    return [image for image in (background, shown) if image is not None]


@torch.no_grad()
def _image_element(image: Tensor) -> str:
    """An image (1, 3, H, W) in [-1, 1] as an HTML element with embedded data."""
    file = io.BytesIO()
    Image.fromarray(tiles_of(image)[0]).save(file, "JPEG", quality=85)
    return f'<img loading="lazy" alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
