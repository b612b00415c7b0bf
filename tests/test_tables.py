"""Tables of results in Markdown and CSV."""

import csv
import io
import math
from pathlib import Path

import pytest

from layerdecomp.errors import InputError
from layerdecomp.metrics.layers import PER_IMAGE
from layerdecomp.tables import fill, format_csv, format_published, format_table


def test_format_table_is_aligned_markdown():
    results = {
        "adapted": {
            "background/psnr": 27.304, "background/psnr_stderr": 0.123, "foreground/rgb_l1": 0.05,
            "foreground/alpha_iou": math.nan, "background/sharpness": 0.75,
        },
        "base": {"background/psnr": 25.59, "background/psnr_stderr": 1.5, "foreground/rgb_l1": 0.25},
    }  # fmt: skip
    assert format_table(results).splitlines() == [
        "| metric                  |      adapted |         base |",
        "|-------------------------|-------------:|-------------:|",
        "| background/psnr dB ↑    | 27.30 ± 0.12 | 25.59 ± 1.50 |",
        "| background/sharpness →1 |       0.7500 |            - |",
        "| foreground/rgb_l1 ↓     |       0.0500 |       0.2500 |",
    ]


def test_published_figures_are_listed_next_to_ours(tmp_path: Path):
    published = {"base": {"background/psnr": 25.59, "background/fid": 35.96}, "adapted": {"background/psnr": 27.3}}
    results = {"base": {"background/psnr": 25.5, "background/psnr_stderr": 0.125, "background/fid": math.nan}}
    table = format_published(results, published)
    assert table.splitlines()[2:] == [
        "| base    | background/psnr dB ↑ |     25.59 | 25.50 ± 0.12 |",
        "| base    |     background/fid ↓ |     35.96 |            - |",
        "| adapted | background/psnr dB ↑ |     27.30 |              |",
    ]
    path = tmp_path / "results.md"
    path.write_text("before\n<!-- published -->\nold\n<!-- /published -->\nafter\n")
    for _ in range(2):
        fill(path, "published", table)
        assert path.read_text() == f"before\n<!-- published -->\n\n{table}\n\n<!-- /published -->\nafter\n"
    with pytest.raises(InputError, match="results.md has no lines <!-- other --> and <!-- /other -->"):
        fill(path, "other", table)


def test_per_image_csv_has_a_line_per_image_and_row():
    names, rows = ["00000", "00001"], ["adapted", "base"]
    values = {row: {name: [place + 1 / 3, math.nan] for name in PER_IMAGE} for place, row in enumerate(rows)}
    lines = list(csv.DictReader(io.StringIO(format_csv(names, values))))
    assert [(line["image"], line["row"]) for line in lines] == [(name, row) for name in names for row in rows]
    for line, expected in zip(lines, ("0.333333", "1.33333", "", ""), strict=True):
        assert [line[name] for name in PER_IMAGE] == [expected] * len(PER_IMAGE)
