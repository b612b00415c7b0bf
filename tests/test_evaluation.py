import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerdecomp.baselines import base_foreground
from layerdecomp.evaluation import (
    GAP,
    GUTTER,
    HEADER,
    MAX_TILE,
    Batch,
    Prediction,
    comparison_grid,
    evaluate,
    format_table,
    ranked_cases,
    write_metrics,
)
from layerdecomp.metrics.layers import METRICS, STDERR_SUFFIX, LayerMetrics

SIZE = 32


class Squares:
    """Squares on noise; the mask of even samples misses the top half of the object, odd ones are exact."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        background, rgb = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
        alpha = torch.zeros(1, SIZE, SIZE)
        alpha[:, 8 : 20 + index, 8:24] = 1
        mask = alpha.clone()
        mask[:, : 14 if index % 2 == 0 else 0] = 0
        return {
            "image": alpha * rgb + (1 - alpha) * background,
            "mask": mask,
            "foreground": torch.cat([rgb, alpha]),
            "background": background,
            "occluder": torch.zeros_like(alpha),
            "index": index,
        }


def do_nothing(batch: Batch) -> Prediction:
    return batch["image"], base_foreground(batch["image"], batch["mask"])


def noisy_truth(batch: Batch) -> Prediction:
    noise = [torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(int(i))) for i in batch["index"]]
    return (batch["background"] + 0.05 * torch.stack(noise)).clamp(-1, 1), batch["foreground"]


def collate(*indices: int) -> Batch:
    return torch.utils.data.default_collate([Squares()[index] for index in indices])


def test_evaluate_equals_layer_metrics_and_does_not_depend_on_the_batch_size():
    found = evaluate({"noisy": noisy_truth, "base": do_nothing}, Squares(), batch_size=2)
    again = evaluate({"base": do_nothing, "noisy": noisy_truth}, Squares(), batch_size=5)
    batch = collate(*range(5))
    for row, predict in {"noisy": noisy_truth, "base": do_nothing}.items():
        metric = LayerMetrics()
        metric.update(*predict(batch), batch)
        for name, value in metric.compute().items():
            assert found.results[row][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6, nan_ok=True), name
        assert found.results[row] == pytest.approx(again.results[row], rel=1e-4, abs=1e-6, nan_ok=True)


def test_evaluate_is_deterministic():
    first, second = (evaluate({"noisy": noisy_truth}, Squares(), batch_size=2) for _ in range(2))
    assert first.results == second.results
    assert 0 < first.results["noisy"]["background/psnr" + STDERR_SUFFIX] < 1


def test_evaluate_keeps_the_value_of_every_image():
    values = evaluate({"base": do_nothing}, Squares(), batch_size=2).per_image["base"]
    assert values.keys() == METRICS.keys()
    for index, value in enumerate(values["foreground/alpha_iou"]):
        height = 12 + index
        assert value == pytest.approx((height - 6) / height if index % 2 == 0 else 1)
    assert [math.isnan(value) for value in values["foreground/hidden_iou"]] == [False, True, False, True, False]


def test_evaluate_shows_progress(capfd: pytest.CaptureFixture[str]):
    evaluate({"base": do_nothing}, Squares(), batch_size=2)
    shown = capfd.readouterr().err
    assert "5/5" in shown
    assert "image/s" in shown


def test_evaluate_refuses_a_diverged_model():
    def diverged(batch: Batch) -> Prediction:
        background, foreground = do_nothing(batch)
        return background * torch.nan, foreground

    with pytest.raises(ValueError, match="diverged"):
        evaluate({"adapted": diverged}, Squares())


def test_ranked_cases():
    values = [0.1 * index for index in (7, 0, 3, 9, 5, 2, 8, 1, 6, 4, 10)] + [math.nan]
    assert ranked_cases(values, higher_is_better=True) == {"good": 3, "median": 4, "worst": 1}
    assert ranked_cases(values, higher_is_better=False) == {"good": 7, "median": 4, "worst": 10}
    assert ranked_cases([math.nan, 2.0], higher_is_better=True) == {"good": 1, "median": 1, "worst": 1}


def test_metrics_json_is_valid_json_with_reasons_for_what_is_null(tmp_path: Path):
    results = {
        "adapted": {"background/psnr": 27.25, "foreground/hidden_iou": math.nan, "background/psnr_stderr": math.nan},
        "base": {"background/psnr": 25.5},
    }
    path = tmp_path / "run" / "metrics.json"
    write_metrics(path, results, {"count": 1})
    document = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert document["results"] == {
        "adapted": {"background/psnr": 27.25, "foreground/hidden_iou": None, "background/psnr_stderr": None},
        "base": {"background/psnr": 25.5},
    }
    assert document["protocol"]["count"] == 1
    reasons = document["protocol"]["undefined"]
    assert reasons.keys() == {"adapted"}
    assert "hidden part" in reasons["adapted"]["foreground/hidden_iou"]
    assert "two images" in reasons["adapted"]["background/psnr_stderr"]


def test_metrics_json_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"base": {"background/psnr": 25.5}}, {"count": 1})
    before = path.read_text()

    def interrupted(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(OSError, match="disk full"):
        write_metrics(path, {"base": {"background/psnr": 1.0}}, {"count": 2})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_json_refuses_a_protocol_that_is_not_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "metrics.json", {}, {"guidance": math.nan})
    assert not list(tmp_path.iterdir())


def test_format_table_is_aligned_markdown():
    results = {
        "adapted": {
            "background/psnr": 27.304, "background/psnr_stderr": 0.123, "foreground/rgb_l1": 0.05,
            "foreground/hidden_iou": math.nan, "background/sharpness": 0.75,
        },
        "base": {"background/psnr": 25.59, "background/psnr_stderr": 1.5, "foreground/rgb_l1": 0.25},
    }  # fmt: skip
    assert format_table(results).splitlines() == [
        "| metric                  |      adapted |         base |",
        "|-------------------------|-------------:|-------------:|",
        "| background/psnr dB ↑    | 27.30 ± 0.12 | 25.59 ± 1.50 |",
        "| background/sharpness →1 |       0.7500 |            - |",
        "| foreground/rgb_l1 ↓     |       0.0500 |       0.2500 |",
        "| foreground/hidden_iou ↑ |            - |            - |",
    ]


def tile(picture: np.ndarray, row: int, column: int, side: int = SIZE, left: int = GUTTER) -> np.ndarray:
    step = side + GAP
    top, left = HEADER + row * step, left + column * step
    return picture[top : top + side, left : left + side]


def to_levels(image: Tensor) -> np.ndarray:
    return ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


def test_comparison_grid_shows_input_mask_predictions_and_truth_in_order():
    batch = collate(1, 3)
    predictions = {"adapted": noisy_truth(batch), "base": do_nothing(batch)}
    picture = comparison_grid(batch, predictions, labels=["good", "worst"])
    assert picture.dtype == np.uint8
    step = SIZE + GAP
    assert picture.shape == (HEADER + 2 * step, GUTTER + 8 * step, 3)
    for row in range(2):
        shown = {0: batch["image"], 2: predictions["adapted"][0], 4: batch["image"], 6: batch["background"]}
        for column, images in shown.items():
            assert np.array_equal(tile(picture, row, column), to_levels(images[row]))
        inside = batch["mask"][row, 0].numpy() > 0
        outlined = tile(picture, row, 1)
        magenta = (outlined == (255, 0, 255)).all(axis=-1)
        height = 12 + (1, 3)[row]
        assert magenta.sum() == 2 * (height + 2) + 2 * 16
        assert np.array_equal(outlined[inside], tile(picture, row, 0)[inside])
        for column in (3, 5, 7):  # the object over a board of grey and white
            foreground = tile(picture, row, column)
            assert np.array_equal(foreground[inside], to_levels(batch["foreground"][row, :3])[inside])
            assert len(np.unique(foreground[~inside])) == 2
    header, gutter = picture[:HEADER], picture[HEADER:, :GUTTER]
    for column in range(8):  # every column has a name, every line a label
        assert (header[:, GUTTER + column * step :][:, :SIZE] < 128).sum() > 10
    assert (gutter[:SIZE] < 128).any()
    assert (gutter[step:] < 128).any()


def test_comparison_grid_reduces_large_samples():
    batch = {key: value.repeat_interleave(16, -1).repeat_interleave(16, -2) for key, value in
             collate(1).items() if key != "index"}  # fmt: skip
    picture = comparison_grid(batch, {})
    assert picture.shape[:2] == (
        HEADER + MAX_TILE + GAP,
        GAP + 4 * (MAX_TILE + GAP),
    )
    reduced = tile(picture, 0, 0, MAX_TILE, GAP)
    assert np.array_equal(reduced[::8, ::8], to_levels(collate(1)["image"][0]))
