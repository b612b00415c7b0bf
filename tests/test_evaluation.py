"""Drawing layers into files, scoring files, and writing the figures."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from squares import SIZE, Squares, collate, do_nothing, noisy_truth
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.evaluation import (
    Batch,
    Evaluation,
    Method,
    Share,
    draw_layers,
    score,
    write_figures,
    write_metrics,
)
from layerdecomp.metric_networks import Networks
from layerdecomp.metrics.layers import METRICS, PER_IMAGE, STDERR_SUFFIX, LayerMetrics, Measures
from layerdecomp.predictions import Prediction, PredictionFolder
from layerdecomp.tables import format_csv

NAMES = [f"{position:05d}" for position in range(5)]
METHODS = {"noisy": Method(noisy_truth), "base": Method(do_nothing)}


class Colours(torch.nn.Module):
    """Stands in for Inception: three of the 2048 features are the mean colours, the others are 0."""

    def forward(self, levels: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.pad(levels.float().mean(dim=(2, 3)), (0, 2045)),)


MEASURES = Measures(inception=Colours())


def evaluated(folder: Path, methods: Mapping[str, Method] = METHODS, batch_size: int = 2) -> Evaluation:
    draw_layers(methods, Squares(), NAMES, folder, batch_size=batch_size)
    folders = {row: PredictionFolder(folder / row, NAMES) for row in methods}
    evaluation = score(folders, Squares(), NAMES, Networks(MEASURES))
    assert evaluation is not None
    return evaluation


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_figures_equal_layer_metrics_of_8_bit_layers_and_do_not_depend_on_the_batch_size(tmp_path: Path):
    found = evaluated(tmp_path / "two")
    again = evaluated(tmp_path / "five", dict(reversed(METHODS.items())), batch_size=5)
    assert files(tmp_path / "two") == files(tmp_path / "five") and len(files(tmp_path / "two")) == 20
    batch = collate(*range(5))
    for row, method in METHODS.items():
        metric = LayerMetrics(MEASURES)
        background, foreground = method.draw(batch)
        metric.update(in_8_bits(background, 2), in_8_bits(foreground, 2), batch)
        for name, value in metric.compute().items():
            assert found.results[row][name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5, nan_ok=True), name
        assert found.results[row] == pytest.approx(again.results[row], rel=1e-9, nan_ok=True)
    assert 0 < found.results["noisy"]["background/psnr" + STDERR_SUFFIX] < 1
    assert 0 < found.results["noisy"]["background/fid"] < found.results["base"]["background/fid"]


def in_8_bits(values: Tensor | None, span: float) -> Tensor:
    assert values is not None
    return (values * 255 / span).round() * span / 255 if values.shape[1] == 1 else _rounded(values)


def _rounded(values: Tensor) -> Tensor:
    colours = ((values[:, :3] + 1) * 127.5).round() / 127.5 - 1
    return torch.cat([colours, (values[:, 3:] * 255).round() / 255], dim=1)


def test_per_image_values_are_kept(tmp_path: Path):
    values = evaluated(tmp_path).per_image["base"]
    assert list(values) == PER_IMAGE
    for index, value in enumerate(values["foreground/alpha_iou"]):
        height = 12 + index
        assert value == pytest.approx((height - 6) / height if index % 2 == 0 else 1)
    assert [math.isnan(value) for value in values["foreground/hidden_iou"]] == [False, True, False, True, False]


def test_existing_layers_are_not_drawn_again(tmp_path: Path):
    drawn: list[list[int]] = []

    def recorded(batch: Batch) -> Prediction:
        drawn.append(batch["index"].tolist())
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return noisy_truth(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "cut", {"noisy": Method(recorded)})
    assert len(files(tmp_path / "cut")) == 4
    found = evaluated(tmp_path / "cut", {"noisy": Method(recorded)})
    assert drawn == [[0, 1], [2, 3], [2, 3], [4]]
    assert str(found) == str(evaluated(tmp_path / "straight", {"noisy": Method(noisy_truth)}))  # NaN != NaN
    evaluated(tmp_path / "cut", {"noisy": Method(recorded)})
    assert len(drawn) == 4
    (tmp_path / "cut" / "noisy" / "foreground" / "00003.png").unlink()
    assert str(found) == str(evaluated(tmp_path / "cut", {"noisy": Method(recorded)})) and drawn[4:] == [[2, 3]]


def test_shares_of_processes_are_disjoint_and_complete(tmp_path: Path):
    for rank in range(3):
        draw_layers(METHODS, Squares(), NAMES, tmp_path / "shared", batch_size=2, share=Share(rank, 3))
        assert len(files(tmp_path / "shared")) == 4 * len([p for r in range(rank + 1) for p in range(r, 5, 3)])
    evaluated(tmp_path / "alone")
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


TWO = """
import sys
from pathlib import Path
import torch
from layerdecomp.evaluation import Share, draw_layers, score
from layerdecomp.predictions import PredictionFolder
from squares import Squares
from layerdecomp.metric_networks import Networks
from test_evaluation import MEASURES, METHODS, NAMES
torch.set_num_threads(1)
folder, share = Path(sys.argv[1]), Share.join()
draw_layers(METHODS, Squares(), NAMES, folder, batch_size=2, share=share)
share.wait()
folders = {row: PredictionFolder(folder / row, NAMES) for row in METHODS}
found = score(folders, Squares(), NAMES, Networks(MEASURES), share=share)
assert (found is None) == (share.rank == 1)
if found is not None:
    torch.save([found.results, found.per_image], folder / "found.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_figures_of_one(tmp_path: Path):
    (tmp_path / "two.py").write_text(TWO)
    root = Path(__file__).resolve().parent.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = {**os.environ, **meeting, "PYTHONPATH": f"{root}:{root}/tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    results, per_image = torch.load(tmp_path / "found.pt")
    expected = evaluated(tmp_path / "alone")
    assert str(per_image) == str(expected.per_image) and str(results) == str(expected.results)


def test_progress_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    evaluated(tmp_path)
    shown = capfd.readouterr().err
    assert "draw: 100%" in shown and "score: 100%" in shown and "image/s" in shown


def test_a_diverged_model_is_rejected_before_anything_is_written(tmp_path: Path):
    def diverged(batch: Batch) -> Prediction:
        background, foreground = do_nothing(batch)
        assert background is not None
        return background * torch.nan, foreground

    with pytest.raises(ValueError, match="adapted: .*diverged"):
        evaluated(tmp_path, {"adapted": Method(diverged)})
    assert not files(tmp_path)


def test_samples_are_batched_by_size(tmp_path: Path):
    class Mixed(Squares):
        def __getitem__(self, index: int, /) -> dict:
            sample = super().__getitem__(index)
            return {k: v[..., : 16 if index % 2 else SIZE] if isinstance(v, Tensor) else v for k, v in sample.items()}

    shapes: list[tuple[int, int]] = []

    def recorded(batch: Batch) -> Prediction:
        shapes.append((len(batch["image"]), batch["image"].shape[-1]))
        return do_nothing(batch)

    draw_layers({"base": Method(recorded)}, Mixed(), NAMES, tmp_path, batch_size=4)
    assert shapes == [(2, SIZE), (2, 16), (1, SIZE)]
    evaluation = score({"base": PredictionFolder(tmp_path / "base", NAMES)}, Mixed(), NAMES)
    assert evaluation is not None and evaluation.results["base"]["background/psnr"] > 0


def test_an_error_of_a_method_names_the_row_and_the_sample(tmp_path: Path):
    def refuse(batch: Batch) -> Prediction:
        raise InputError("its mask is full")

    expected = f"classical, of {NAMES[0]}: its mask is full; or remove classical from evaluate.rows"
    with pytest.raises(InputError, match=expected):
        draw_layers({"classical": Method(refuse)}, Squares(), NAMES, tmp_path, batch_size=1)


def test_every_undefined_figure_has_a_reason(tmp_path: Path):
    def matte(batch: Batch) -> Prediction:
        return None, do_nothing(batch)[1]

    plain = {row: Method(do_nothing) for row in ("base", "stray")}
    draw_layers({"matting": Method(matte, ("foreground",)), **plain}, Squares(), NAMES, tmp_path)
    folders = {row: PredictionFolder(tmp_path / row, NAMES) for row in ("base", "matting")}

    class Exact(Squares):
        def __getitem__(self, index: int, /) -> dict:
            return super().__getitem__(index - index % 2 + 1)  # nothing hidden

    class Unknown(Squares):
        def __getitem__(self, index: int, /) -> dict:
            return {key: value for key, value in super().__getitem__(index).items() if key != "foreground"}

    networks = Networks(missing={"background/lpips": "no such file"})
    found = score(folders, Exact(), NAMES, networks)
    assert found is not None
    for row, figures in found.results.items():
        assert found.reasons[row].keys() == {name for name, value in figures.items() if not math.isfinite(value)}
    assert found.reasons["matting"]["background/psnr"] == "this row has no backgrounds"
    assert found.reasons["matting"]["recomposition/psnr"] == "this row has no backgrounds"
    assert found.reasons["base"]["background/lpips"] == "no such file"
    assert "hidden part" in found.reasons["base"]["foreground/hidden_iou"]
    assert "two images" in found.reasons["base"]["foreground/hidden_iou" + STDERR_SUFFIX]
    for file in (tmp_path / "stray" / "foreground").iterdir():
        file.rename(file.with_name(f"other-{file.name}"))
    astray = score({"stray": PredictionFolder(tmp_path / "stray", NAMES)}, Exact(), NAMES, networks)
    assert astray is not None and "background/psnr" not in astray.reasons["stray"]
    for name in ("foreground/alpha_sad", "recomposition/psnr"):
        assert astray.reasons["stray"][name] == "this row has no foregrounds"
    unknown = score(folders, Unknown(), NAMES, networks)
    assert unknown is not None
    assert unknown.reasons["base"]["boundary/rgb_l1"] == "the data set has no true foregrounds"
    assert unknown.results["base"]["recomposition/psnr"] > 0


def test_metrics_json_is_valid_json_with_reasons_for_what_is_null(tmp_path: Path):
    results = {
        "adapted": {"background/psnr": 27.25, "foreground/hidden_iou": math.nan, "background/psnr_stderr": math.nan},
        "base": {"background/psnr": 25.5},
    }
    path = tmp_path / "run" / "metrics.json"
    reasons = {"adapted": {"foreground/hidden_iou": "the hidden part is small"}}
    write_metrics(path, results, {"count": 1}, reasons)
    document = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert document["results"] == {
        "adapted": {"background/psnr": 27.25, "foreground/hidden_iou": None, "background/psnr_stderr": None},
        "base": {"background/psnr": 25.5},
    }
    assert document["protocol"]["count"] == 1
    reasons = document["protocol"]["undefined"]
    assert reasons.keys() == {"adapted"}
    assert "hidden part" in reasons["adapted"]["foreground/hidden_iou"]
    assert reasons["adapted"]["background/psnr_stderr"] == "not finite"


def test_metrics_json_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"base": {"background/psnr": 25.5}}, {"count": 1})
    before = path.read_text()

    def interrupted(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(InputError, match=r"metrics.json could not be written \(disk full\)"):
        write_metrics(path, {"base": {"background/psnr": 1.0}}, {"count": 2})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_json_refuses_a_protocol_that_is_not_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "metrics.json", {}, {"guidance": math.nan})
    assert not list(tmp_path.iterdir())


def test_figures_are_written_as_json_csv_and_markdown(tmp_path: Path):
    evaluation = evaluated(tmp_path / "layers")
    table = write_figures(tmp_path / "out", evaluation, {"count": 5})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "per_image.csv", "table.md"}
    assert (tmp_path / "out" / "table.md").read_text() == table + "\n" and "| metric " in table
    assert (tmp_path / "out" / "per_image.csv").read_text() == format_csv(NAMES, evaluation.per_image)
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["results"]["noisy"].keys() >= METRICS.keys() and document["protocol"]["count"] == 5
    assert document["protocol"]["undefined"]["noisy"]["background/lpips"].startswith("undefined for every image")
