"""The HTML report: complete, self-contained, sortable."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import torch
from squares import Squares
from test_evaluation import METHODS, NAMES

from layerdecomp.evaluation import Evaluation, Method, draw_layers, score
from layerdecomp.metrics.layers import METRICS, PER_IMAGE
from layerdecomp.predictions import PredictionFolder
from layerdecomp.report import _joined, extremes, format_report, ranked_cases


def test_invisible_colours_do_not_bleed_into_a_resized_foreground() -> None:
    """Visible pixels are red, invisible ones white."""
    visible = torch.zeros(1, 1, 16, 16)
    visible[..., :7] = 1
    foreground = torch.cat([torch.ones_like(visible), *[1 - 2 * visible] * 2, visible], dim=1)
    for size in ((8, 8), (24, 24)):
        joined = _joined([foreground, None], 4, size)
        assert joined is not None and joined.shape == (2, 4, *size) and not joined[1].any()
        rgb, alpha = joined[0, :3], joined[0, 3]
        red = torch.tensor([1.0, -1.0, -1.0])[:, None]
        assert ((alpha > 0.1) & (alpha < 0.9)).any()
        torch.testing.assert_close(rgb[:, alpha > 0.1], red.expand(3, int((alpha > 0.1).sum())), atol=1e-3, rtol=0)


class Reader(HTMLParser):
    """Parsed contents of a page: cells of every table, sources of images, open elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.keys: list[str | None] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        if tag not in ("img", "br", "meta", "wbr"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.keys.append(found.get("data-value"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def evaluated(folder: Path, methods: dict[str, Method]) -> tuple[Evaluation, dict[str, PredictionFolder]]:
    draw_layers(methods, Squares(), NAMES, folder)
    folders = {row: PredictionFolder(folder / row, NAMES) for row in methods}
    evaluation = score(folders, Squares(), NAMES)
    assert evaluation is not None
    return evaluation, folders


def test_the_report_is_complete_and_self_contained(tmp_path: Path) -> None:
    matting = Method(lambda batch: (None, METHODS["base"].draw(batch)[1]), ("foreground",))
    rows = {"noisy<": METHODS["noisy"], "base": METHODS["base"], "matting": matting}
    evaluation, folders = evaluated(tmp_path, rows)
    page = format_report(evaluation, folders, Squares(), {"count": 5, "note": "<&>"})
    read = Reader(page)
    assert read.open == [] and read.links and all(link.startswith("data:image/jpeg;base64,") for link in read.links)
    assert not re.search(r"https?://|@import|url\(", page)
    means, cases, images = read.tables
    assert [line[0] for line in means] == ["row", "noisy<", "base", "matting"] and len({*map(len, means)}) == 1
    assert not any(title.startswith("background/lpips") for title in means[0])
    assert len(cases) == 1 + 5 and len({*map(len, cases)}) == 1  # every image is among the ten best
    assert "best 1 by background/psnr" in "".join(line[0] for line in cases)
    assert len(images) == 1 + 5 * 3 and len(images[0]) == 2 + len(PER_IMAGE)
    # input, mask, true layers; layers and errors of noisy and base; matting's foreground and its error
    assert len(read.links) == 5 * (2 + 2 + 4 + 4 + 2)
    assert "&lt;&amp;&gt;" in page and "noisy<," not in page


def test_cells_have_their_values_as_sort_keys(tmp_path: Path) -> None:
    evaluation, folders = evaluated(tmp_path, dict(METHODS))
    read = Reader(format_report(evaluation, folders, Squares(), {}))
    values = evaluation.per_image["noisy"]["background/psnr"]
    assert {str(value) for value in values} <= set(read.keys)
    assert "" in read.keys and "nan" not in read.keys  # undefined values, which are sorted last


def test_extremes_are_the_best_and_worst_of_the_first_row() -> None:
    psnr = [float(value) for value in (5, 1, 4, 2, 3, 6)] + [math.nan]
    values = {"background/psnr": psnr, "foreground/alpha_iou": [math.nan] * 7}
    other = {"background/psnr": psnr[::-1], "foreground/alpha_iou": psnr}
    evaluation = Evaluation(list("abcdefg"), {}, {"ours": values, "other": other}, {})
    assert extremes(evaluation, 2) == {
        5: ["best 1 by background/psnr"],
        0: ["best 2 by background/psnr"],
        1: ["worst 1 by background/psnr"],
        3: ["worst 2 by background/psnr"],
    }
    assert METRICS["background/psnr"].better == "↑"


def test_ranked_cases_are_the_90th_percentile_the_median_and_the_worst() -> None:
    values = [0.1 * index for index in (7, 0, 3, 9, 5, 2, 8, 1, 6, 4, 10)] + [math.nan]
    assert ranked_cases(values, higher_is_better=True) == {"good": 3, "median": 4, "worst": 1}
    assert ranked_cases(values, higher_is_better=False) == {"good": 7, "median": 4, "worst": 10}
    assert ranked_cases([math.nan, 2.0], higher_is_better=True) == {"good": 1, "median": 1, "worst": 1}
