"""The rows of a comparison, and the files that it writes."""

import copy
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PowerCutError
from PIL import Image
from torch.utils.data import default_collate

from layerdecomp.baselines import base_foreground, classical, matted_foreground
from layerdecomp.comparison import (
    MASKLESS,
    RESULTS,
    EvaluateConfig,
    Models,
    compare,
    export_test_set,
    layer_settings,
    methods,
    row_names,
)
from layerdecomp.data.datamodule import DataConfig
from layerdecomp.data.scenes import SceneConfig, Scenes
from layerdecomp.data.testset import TestFolder
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError
from layerdecomp.metric_networks import FILES, MeasureConfig
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.weights import load_mmdit, save_model

SCENES = Scenes(SceneConfig(size=32), "test", 1234, 3)
DATA = DataConfig(scenes=SceneConfig(size=32))


@pytest.fixture(scope="module")
def models(tiny_weights: Path) -> Models:
    decomposer = Decomposer.from_pretrained(tiny_weights / "adapter.safetensors")
    decomposer.sample = replace(decomposer.sample, steps=2)
    return Models(decomposer, load_mmdit(tiny_weights / "transformer.safetensors"), {"adapter": "a sum"})


def config(**changes: object) -> EvaluateConfig:
    return replace(EvaluateConfig(samples=3, batch_size=2, measure=MeasureConfig(weights="absent")), **changes)


def test_rows_are_the_requested_ones_in_the_requested_order(models: Models, tiny_weights: Path) -> None:
    maskless = str(tiny_weights / "transformer.safetensors")
    rows = ["matting", "maskless", "base", "classical", "adapted"]
    found = methods(models, config(rows=rows, maskless=maskless))
    assert list(found) == rows and found["matting"].layers == ("foreground",)
    assert list(methods(None, config(rows=rows, maskless=maskless))) == ["matting", "classical"]
    batch = default_collate([SCENES[index] for index in range(2)])
    image, mask = batch["image"], batch["mask"]
    drawn = {row: method.draw(batch) for row, method in found.items()}
    assert drawn["matting"][0] is None and torch.equal(drawn["matting"][1], matted_foreground(image, mask))
    assert torch.equal(drawn["classical"][0], classical(image, mask)[0])
    for row in ("base", "maskless", "classical"):
        assert torch.equal(drawn[row][1], base_foreground(image, mask))
    assert not torch.equal(drawn["base"][0], drawn["maskless"][0])
    assert not torch.equal(drawn["base"][0], drawn["adapted"][0])
    reseeded = methods(models, config(rows=["adapted", "base"], seed=5))
    assert not any(torch.equal(method.draw(batch)[0], drawn[row][0]) for row, method in reseeded.items())


def test_a_maskless_base_of_another_text_width_is_rejected(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "transformer.safetensors"
    save_model(path, MMDiT(replace(models.base.config, context_in_dim=20)), {})
    with pytest.raises(
        InputError, match=r"transformer.safetensors has context_in_dim 20, .* adapted base \d+; .*maskless"
    ):
        methods(models, config(rows=["maskless"], maskless=str(path)))


def test_layers_have_the_size_of_their_image(models: Models) -> None:
    sample = {**SCENES[0], "index": 7}
    odd = {k: v[..., :27, :30] if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in sample.items()}
    batch = default_collate([odd])
    for row, method in methods(models, config(rows=["adapted", "base"])).items():
        background, foreground = method.draw(batch)
        assert background is not None and foreground is not None
        assert background.shape == (1, 3, 27, 30) and foreground.shape == (1, 4, 27, 30), row
        near = torch.maximum(batch["mask"], foreground[:, 3:].gt(0.5).float())
        far = torch.nn.functional.max_pool2d(near, 9, 1, 4) == 0
        assert far.any()
        torch.testing.assert_close(background * far, batch["image"] * far)
    small = replace(models.decomposer.sample, max_side=16)
    models.decomposer.sample, before = small, models.decomposer.sample
    try:
        background, foreground = methods(models, config(rows=["adapted"]))["adapted"].draw(batch)
    finally:
        models.decomposer.sample = before
    assert background is not None and foreground is not None
    assert background.shape == (1, 3, 27, 30) and foreground.shape == (1, 4, 27, 30)
    assert background.abs().max() <= 1 and foreground[:, 3].min() >= 0 and foreground[:, 3].max() <= 1


def test_a_comparison_writes_figures_layers_and_a_report_without_network_access(
    models: Models,
    tmp_path: Path,
    metric_weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("expected no network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    squeeze = MeasureConfig(weights=str(tmp_path / "metrics"), lpips="squeeze", region="mask")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / FILES["squeeze"]).symlink_to(metric_weights / FILES["squeeze"])
    evaluation = compare(models, SCENES, config(measure=squeeze), tmp_path / "out")
    printed = capsys.readouterr().out
    assert evaluation is not None and list(evaluation.results) == ["adapted", "base", "classical"]
    assert "background/lpips ↓" in printed and "not measured: background/fid, background/kid: " in printed
    names = {"metrics.json", "per_image.csv", "table.md", "report.html", "samples", "layers"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "samples" / "comparison.png").is_file()
    protocol = json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]
    assert {"data": "scenes", "split": "test", "count": 3, "resolution": 32, "seed": 1234}.items() <= protocol.items()
    assert {"region": "mask", "lpips_net": "squeeze", "steps": 2, "guidance": 30.0}.items() <= protocol.items()
    assert protocol["metric_weights"].keys() == {FILES["squeeze"]} and protocol["weights"] == {"adapter": "a sum"}
    assert protocol["precision"] == "float32"
    assert protocol["versions"].keys() >= {"layerdecomp", "torch", "python", "torchmetrics"}
    assert list(protocol["seconds_per_image"]) == ["adapted", "base", "classical"]
    assert 0 < min(protocol["seconds_per_image"].values()) < 60
    assert INCEPTION_REASON in protocol["undefined"]["base"]["background/kid"]


INCEPTION_REASON = "weights-inception-2015-12-05-6726825d.pth does not exist; checkpoints/README.md"


def test_external_predictions_are_scored_as_drawn_layers_are(models: Models, tmp_path: Path) -> None:
    first = compare(models, SCENES, config(), tmp_path / "first")
    layers = tmp_path / "first" / "layers"
    again = compare(
        None, SCENES, config(rows=[]), tmp_path / "second", predictions=[layers / "adapted", layers / "base"]
    )
    assert first is not None and again is not None and list(again.results) == ["adapted", "base"]
    assert all(str(again.results[row]) == str(first.results[row]) for row in again.results)
    protocol = json.loads((tmp_path / "second" / "metrics.json").read_text())["protocol"]
    assert "weights" not in protocol and "steps" not in protocol
    with pytest.raises(InputError, match="layers/adapted is where this evaluation writes layers"):
        compare(models, SCENES, config(), tmp_path / "first", predictions=[layers / "adapted"])
    assert (layers / "adapted" / "background" / "00000.png").is_file()
    mixed = compare(models, SCENES, config(rows=["base"]), tmp_path / "third", predictions=[layers / "classical"])
    assert mixed is not None and list(mixed.results) == ["base", "classical"]


def test_missing_and_extra_files_are_reported(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(models, SCENES, config(rows=["classical"]), tmp_path / "first")
    folder = tmp_path / "first" / "layers" / "classical"
    (folder / "background" / "00001.png").rename(folder / "background" / "1.png")
    capsys.readouterr()
    found = compare(None, SCENES, config(rows=[]), tmp_path / "second", predictions=[folder])
    printed = capsys.readouterr().out
    assert "classical: 1 missing backgrounds: 00001" in printed and "classical: 1 extra backgrounds: 1" in printed
    protocol = json.loads((tmp_path / "second" / "metrics.json").read_text())["protocol"]
    assert protocol["predictions"] == {"classical": {"missing_backgrounds": ["00001"], "extra_backgrounds": ["1"]}}
    assert found is not None
    values = found.per_image["classical"]
    assert [value != value for value in values["background/psnr"]] == [False, True, False]
    assert not any(value != value for value in values["foreground/alpha_sad"])


def test_an_interrupted_evaluation_resumes_and_a_finished_one_is_redone(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original, cut = Decomposer.draw, [True]

    def recorded(self: Decomposer, batch: dict, noise: torch.Tensor) -> object:
        drawn.append(len(noise))
        if cut[0] and len(drawn) == 2:
            raise PowerCutError
        return original(self, batch, noise)

    monkeypatch.setattr(Decomposer, "draw", recorded)
    settings = config(rows=["adapted"], batch_size=2)
    with pytest.raises(PowerCutError):
        compare(models, SCENES, settings, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    cut[0] = False
    resumed = compare(models, SCENES, settings, tmp_path / "out")
    assert drawn == [2, 1, 1]
    straight = compare(models, SCENES, settings, tmp_path / "straight")
    assert str(resumed) == str(straight) and drawn[3:] == [2, 1]
    compare(models, SCENES, settings, tmp_path / "out")
    assert drawn[5:] == [2, 1]
    cut[0] = True
    drawn.clear()
    with pytest.raises(PowerCutError):
        compare(models, SCENES, settings, tmp_path / "out")
    cut[0] = False
    other = replace(models, files={"adapter": "another"})
    compare(other, SCENES, settings, tmp_path / "out")
    assert drawn == [2, 1, 2, 1], "expected no layers of another adapter to be reused"
    cut[0] = True
    drawn.clear()
    with pytest.raises(PowerCutError):
        compare(models, SCENES, settings, tmp_path / "out")
    cut[0] = False
    monkeypatch.setattr("layerdecomp.comparison.ROWS_SHA256", "of changed files")
    compare(models, SCENES, settings, tmp_path / "out")
    assert drawn == [2, 1, 2, 1], "expected no layers of other code to be reused"


def test_layers_of_other_settings_are_not_reused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise PowerCutError

    other = Scenes(SceneConfig(size=32), "test", 99, 3)
    out, both = tmp_path / "out", config(rows=["base", "classical"])
    compare(models, SCENES, both, out)
    monkeypatch.setattr("layerdecomp.comparison.draw_layers", cut)
    with pytest.raises(PowerCutError):
        compare(models, other, config(rows=["classical"]), out)
    assert not [name for name in RESULTS if (out / name).exists()], "expected no results that the layers do not match"
    monkeypatch.undo()
    mixed, clean = (compare(models, other, both, folder) for folder in (out, tmp_path / "clean"))
    assert mixed is not None and clean is not None and str(mixed.results) == str(clean.results)


def test_the_settings_of_layers_cover_what_they_depend_on(models: Models, tiny_weights: Path) -> None:
    def settings(models: Models = models, data: Scenes = SCENES, **changes: object) -> dict[str, object]:
        return layer_settings(models, data, config(**changes))

    shorter = copy.deepcopy(models.decomposer)
    shorter.sample = replace(shorter.sample, steps=1)
    maskless = [str(tiny_weights / f"{name}.safetensors") for name in ("transformer", "autoencoder")]
    found = [
        settings(),
        settings(seed=5),
        settings(data=Scenes(SceneConfig(size=32), "test", 5, 3)),
        settings(replace(models, files={"adapter": "another"})),
        settings(replace(models, quantize="int8")),
        settings(replace(models, decomposer=copy.deepcopy(models.decomposer).bfloat16())),
        settings(replace(models, decomposer=shorter)),
        *(settings(rows=["maskless"], maskless=file) for file in maskless),
    ]
    assert len({json.dumps(one) for one in found}) == len(found)


def test_exported_scenes_give_the_same_figures(models: Models, tmp_path: Path) -> None:
    assert export_test_set(DATA, config(), tmp_path / "inputs") == 3
    straight = compare(models, SCENES, config(), tmp_path / "straight")
    exported = compare(models, TestFolder(tmp_path / "inputs"), config(), tmp_path / "exported")
    assert straight is not None and exported is not None
    for row, figures in straight.results.items():
        for name in ("background/psnr", "background/ssim", "foreground/alpha_iou", "foreground/hidden_iou"):
            assert exported.results[row][name] == pytest.approx(figures[name], rel=2e-2, nan_ok=True), (row, name)
    protocol = json.loads((tmp_path / "exported" / "metrics.json").read_text())["protocol"]
    assert (
        protocol["data"] == str(tmp_path / "inputs") and protocol["sha256"] == TestFolder(tmp_path / "inputs").digest()
    )


def test_one_folder_may_hold_images_of_several_sizes(models: Models, tmp_path: Path) -> None:
    export_test_set(DATA, config(), tmp_path / "inputs")
    for path in (tmp_path / "inputs").glob("*/00001.png"):
        Image.open(path).crop((0, 0, 32, 20)).save(path)
    found = compare(models, TestFolder(tmp_path / "inputs"), config(), tmp_path / "out")
    assert found is not None and not any(value != value for value in found.per_image["adapted"]["background/psnr"])
    assert Image.open(tmp_path / "out" / "layers" / "base" / "foreground" / "00001.png").size == (32, 20)
    assert (tmp_path / "out" / "samples" / "comparison.png").is_file()


@pytest.mark.parametrize(("images", "source"), [(1, "1 image"), (2, "2 images"), (3, None)])
def test_samples_from_fewer_images_are_reported_as_such(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: int,
    source: str | None,
) -> None:
    protocol = {"split": "test", "resolution": 32, "data": "triplets", "pictures": images}
    monkeypatch.setattr("layerdecomp.comparison.describe_data", lambda _: protocol)
    compare(None, SCENES, config(rows=["classical"]), tmp_path / "out")
    drawn = f" drawn from {source} (± is over samples, and says little about other images)" if source else ""
    assert f"3 samples{drawn}; metrics in" in capsys.readouterr().out


def test_row_names_distinguish_folders() -> None:
    folders = [Path("x/layers"), Path("y/layers"), Path("z/base"), Path("z/other/")]
    assert [name for name, _ in row_names(folders, {"base": None})] == ["x/layers", "y/layers", "z/base", "other"]
    with pytest.raises(InputError, match="predictions=base has the name of another row"):
        list(row_names([Path("base")], {"base": None}))


def test_invalid_settings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # which has no weights
    for change, message in {
        ("rows", ("adpated",)): "evaluate.rows has 'adpated'; expected some of adapted, base",
        ("objects", "every"): "evaluate.objects is 'every'; expected one of drawn, one, all",
        ("samples", 0): "evaluate.samples is 0",
    }.items():
        with pytest.raises(InputError, match=message):
            EvaluateConfig(**{change[0]: list(change[1]) if isinstance(change[1], tuple) else change[1]})
    for absent in (None, "absent.safetensors"):
        expected = f"{absent or MASKLESS} does not exist, .*make {MASKLESS}.*conditioning.mask=false"
        with pytest.raises(InputError, match=expected):  # also without a model
            compare(None, SCENES, config(rows=["maskless"], maskless=absent), tmp_path / "out")
    with pytest.raises(InputError, match="there is nothing to compare"):
        compare(None, SCENES, config(rows=[]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
