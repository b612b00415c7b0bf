"""The ablation: its switches, resuming, checks before training, and its table."""

import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PowerCutError
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from layerdecomp import ablation
from layerdecomp.ablation import AblationConfig, ablate, format_rows, plan, same_order, with_progress
from layerdecomp.comparison import EvaluateConfig, Models, methods
from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.config import RunConfig, changed_keys, load_config, save_config
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.imaging.cues import CUES
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.metrics.layers import METRICS
from layerdecomp.overrides import merge_config, read_yaml
from layerdecomp.tensor_files import file_sha256
from layerdecomp.training import runs
from layerdecomp.training.base import Job
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.inpainter import InpainterJob
from layerdecomp.training.runs import train
from layerdecomp.weights import load_mmdit, save_model

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "configs" / "tiny.yaml"
ROWS = {"full": [], "rank-1": ["lora.rank=1"]}
MASK_CHANNELS = slice(-256, None)  # of the input projection


def write(folder: Path, **changes: object) -> Path:
    described = {"base": str(TINY), "seeds": [0, 1], "rows": ROWS, "paper": {"full": 27.3, "rank-1": 26.3}, **changes}
    OmegaConf.save(OmegaConf.create(described), folder / "ablation.yaml")
    return folder / "ablation.yaml"


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    settings = ["train.steps=2", "train.checkpoint_every=1", "train.precision=32-true", "optim.warmup=0"]
    return [*tiny_overrides, *settings, "optim.lr=3e-2"]


def test_an_interrupted_ablation_resumes_without_repeating_finished_runs(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, curves={"lora.rank": ["rank-1", "full"]}), tmp_path / "out"
    original, trained = DecomposerJob.loss, []

    def failing(self: DecomposerJob, batch: dict) -> dict:
        if self.run.name == "full-1" and self.global_step == 1:
            raise PowerCutError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DecomposerJob, "loss", failing)
        with pytest.raises(PowerCutError):
            ablate(path, out, overrides)
    assert {row: list(seeds) for row, seeds in figures(out)["results"].items()} == dict.fromkeys(ROWS, ["0"])
    assert (out / "full-1" / "last.ckpt").is_file() and not (out / "full-1" / "metrics.json").exists()
    before = {row: (out / f"{row}-0" / "adapter.safetensors").stat().st_mtime_ns for row in ROWS}

    def recorded(config: object) -> None:
        trained.append(config.name)  # type: ignore[attr-defined]
        train(config)  # type: ignore[arg-type]

    monkeypatch.setattr(ablation, "train", recorded)
    capsys.readouterr()
    ablate(path, out, overrides)
    assert trained == ["full-1", "rank-1-1"]
    assert before == {row: (out / f"{row}-0" / "adapter.safetensors").stat().st_mtime_ns for row in ROWS}
    captured = capsys.readouterr().out
    # the interrupted run's progress bar may be redrawn when it is garbage-collected
    output = "\n".join(line for line in captured.split("\n") if not line.startswith("\r"))
    assert "2 of 4 runs finished; now full-1\nresuming from" in output and "3 of 4 runs finished, about 0:00:" in output
    assert (out / "table.md").read_text() in captured
    check_results(out)
    standalone = [*overrides, "lora.rank=1", "seed=1", f"run_dir={tmp_path}/alone"]
    train(load_config(TINY, standalone))
    assert figures(tmp_path / "alone", "metrics")["results"]["adapted"] == figures(out)["results"]["rank-1"]["1"]


def test_a_finished_run_is_freed_before_the_next_one(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, jobs = runs.build_job, list[weakref.ref[Job]]()

    def build(config: RunConfig) -> Job:
        assert not any(job() for job in jobs), "an earlier one is still in memory"
        job = original(config)
        jobs.append(weakref.ref(job))
        return job

    monkeypatch.setattr(runs, "build_job", build)
    gc.disable()
    try:
        ablate(write(tmp_path, seeds=[0]), tmp_path / "out", overrides)
    finally:
        gc.enable()
    assert len(jobs) == 2


def figures(folder: Path, name: str = "results") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def check_results(out: Path) -> None:
    """Checks the output of a finished ablation: metrics per row and seed, summary, table of all rows, figure."""
    found = figures(out)
    for row in ROWS:
        seeds = found["results"][row]
        for seed in ("0", "1"):
            assert seeds[seed] == figures(out / f"{row}-{seed}", "metrics")["results"]["adapted"]
        assert seeds["0"]["background/psnr"] != seeds["1"]["background/psnr"]
        for name, numbers in [(name, [seeds[seed][name] for seed in ("0", "1")]) for name in METRICS]:
            if None in numbers:  # undefined for so few scenes, or without its network
                continue
            np.testing.assert_allclose(found["summary"][row][name], [np.mean(numbers), np.std(numbers, ddof=1)])
    assert found["protocol"]["ablation"]["rows"] == ROWS and found["protocol"]["evaluation"]["count"] == 3
    protocols = [figures(out / f"{row}-{seed}", "metrics")["protocol"] for row in ROWS for seed in (0, 1)]
    for key, value in found["protocol"]["evaluation"].items():
        assert all(protocol[key] == value for protocol in protocols), f"{key} differs between runs"
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(ROWS)
    with Image.open(out / "out.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        (
            {"rows": {**ROWS, "last": ["lora.rnak=3"]}},
            "",
            "row last: .*unknown key lora.rnak; the nearest .* lora.rank",
        ),
        ({"rows": {**ROWS, "last": ["weights.transformer=absent"]}}, "", "row last: absent does not exist"),
        ({"rows": {**ROWS, "last": ["lora.targets=[nothing]"]}}, "", "row last: .*pattern 'nothing'"),
        (
            {"rows": {**ROWS, "last": ["seed=4"]}},
            "",
            "row last: argument 'seed=4': name, run_dir, seed, resume are set",
        ),
        ({"rwos": {}}, "", "ablation.yaml: unknown key rwos; the nearest known one is rows"),
        ({"rows": {}, "paper": {}}, "", "rows or seeds are empty"),
        ({"seeds": ["a"]}, "", "ablation.yaml: .*'a'"),
        ({"paper": {"fulll": 27.3}}, "", "name the row 'fulll'; expected some of full, rank-1"),
        ({"paper": {"rank-1": 27.3}}, "", "paper lacks full"),
        ({"curves": {"lora.targets": ["full"]}}, "", "curves has 'lora.targets'; expected a key .* number"),
        ({"base": str(REPOSITORY / "configs" / "tiny_autoencoder.yaml")}, "", "row full: .*unknown key weights.transf"),
        ({}, "train.steps=many", "row full: argument 'train.steps=many'"),
        ({"overrides": ["train.devices=1"]}, "train.devices=2", "trains in one process; leave train.devices"),
    ],
)
def test_invalid_settings_are_rejected_before_training(
    tmp_path: Path, overrides: list[str], changes: dict, argument: str, message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        ablate(path, tmp_path / "out", [*overrides, *([argument] if argument else [])])
    assert not (tmp_path / "out").exists()


def test_a_missing_plot_library_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"the plot needs the extra plots .*pip install -e '\.\[plots\]'"):
        ablate(write(tmp_path), tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_finished_runs_with_other_settings_or_weights_are_rejected(
    tmp_path: Path, overrides: list[str], tiny_weights: Path
) -> None:
    path, out = write(tmp_path, rows={"full": []}, paper={}, seeds=[3]), tmp_path / "out"
    ablate(path, out, overrides)
    (out / "full-3" / "metrics.json").rename(tmp_path / "metrics.json")  # as if interrupted
    with pytest.raises(InputError, match=r"full-3 holds a run with other settings or weights \(optim.lr\)"):
        ablate(path, out, [*overrides, "optim.lr=1"])
    (tmp_path / "metrics.json").rename(out / "full-3" / "metrics.json")
    with pytest.raises(InputError, match=r"full-3 holds a run .* \(evaluate.samples\).* again, its metrics.json"):
        ablate(path, out, [*overrides, "evaluate.samples=2"])
    before = figures(out)
    ablate(path, out, [*overrides, "evaluate.rows=[adapted]", "evaluate.batch_size=3"])
    assert figures(out)["results"] == before["results"]
    (out / "full-3" / "metrics.json").unlink()
    ablate(path, out, [*overrides, "evaluate.samples=2"])
    assert figures(out)["protocol"]["evaluation"]["count"] == 2 and figures(out)["results"] != before["results"]
    overrides += ["evaluate.samples=2"]
    (out / "full-3" / "last.ckpt").unlink()  # a finished run does not need it
    ablate(path, out, overrides)
    with pytest.raises(InputError, match=r"full-3 holds a run with other settings or weights \(optim.lr\)"):
        ablate(path, out, [*overrides, "optim.lr=1"])
    base = tmp_path / "transformer.safetensors"
    base.write_bytes((tiny_weights / "transformer.safetensors").read_bytes())
    overrides += [f"weights.transformer={base}"]
    ablate(path, tmp_path / "other", overrides)
    model = load_mmdit(base)
    model.img_in.bias.add_(1)
    save_model(base, model, {})
    file_sha256.cache_clear()
    with pytest.raises(InputError, match=r"full-3 holds a run with other settings or weights \(base_sha256\)"):
        ablate(path, tmp_path / "other", overrides)


@pytest.mark.parametrize("name", ["ablation", "curves"])
def test_rows_differ_only_in_their_switches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(ablation, "build_job", lambda config: None)  # one base checkpoint is not in the repository
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = merge_config(
        AblationConfig(), [(str(path), read_yaml(path))], ["seeds=[0,5]", "overrides=[train.steps=7]"]
    )
    runs = plan(config, tmp_path)
    assert [run.config.name for run in runs] == [f"{row}-{seed}" for seed in config.seeds for row in config.rows]
    save_config(tmp_path / "base.yaml", load_config(TINY, config.overrides))
    for run in runs:
        switches = {text.partition("=")[0] for text in config.rows[run.row]}
        assert set(changed_keys(run.config, tmp_path / "base.yaml")) - {"seed"} == switches | {"name"}
    assert {run.config.evaluate.seed for run in runs} == {1234}


def test_differences_are_paired_by_seed() -> None:
    config = AblationConfig(rows={**ROWS, "blind": []}, paper={"full": 27.3, "blind": 27.0})

    def results(*psnr: float) -> dict:
        return {str(seed): {"background/psnr": x, "foreground/hidden_iou": None} for seed, x in enumerate(psnr)}

    table = format_rows(config, {"full": results(20, 22), "rank-1": results(21), "blind": results(19.5, 21)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2] == ["full", "2", "21.00 ± 1.41", "-", "-", "-", "", "27.30", ""]
    assert cells[3] == ["rank-1", "1", "21.00", "-", "-", "-", "1.00", "", ""]
    assert cells[4] == ["blind", "2", "20.25 ± 1.06", "-", "-", "-", "-0.75 ± 0.35", "27.00 (-0.30)", "yes"]
    assert [same_order(x, -0.3) for x in ([-1, -2], [1, 2], [-1, 2], [])] == ["yes", "no", "seeds disagree", ""]


def test_the_estimated_time_left_is_proportional_to_steps(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"short": ["train.steps=10"], "long": ["train.steps=40"], "last": ["train.steps=100"]}
    config = AblationConfig(base=str(TINY), seeds=[0], rows=rows, overrides=overrides)
    clock = iter([100.0, 105.0, 125.0])  # at the start, and after 10 and 50 steps
    monkeypatch.setattr(ablation, "build_job", lambda config: None)
    runs = plan(config, tmp_path)
    monkeypatch.setattr(ablation.time, "monotonic", lambda: next(clock))
    assert [run.row for run in with_progress(runs)] == list(rows)
    output = capsys.readouterr().out.splitlines()
    assert output == [
        "0 of 3 runs finished; now short-0",
        "1 of 3 runs finished, about 0:01:10 left; now long-0",
        "2 of 3 runs finished, about 0:00:50 left; now last-0",
    ]


# conditioning.mask


def test_the_mask_switch_zeroes_only_the_mask_channels(
    tiny_config: DecomposerConfig, tiny_decomposer: Decomposer
) -> None:
    batch = scenes()
    img_cond = tiny_decomposer.encode(*batch.values()).img_cond
    maskless = build_decomposer(replace(tiny_config, conditioning=ConditioningConfig(mask=False)))
    other = maskless.encode(*batch.values()).img_cond
    assert img_cond[..., MASK_CHANNELS].any() and not other[..., MASK_CHANNELS].any()
    assert other[..., :64].equal(img_cond[..., :64]) and img_cond[..., :64].any()


def scenes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 9:21, 5:27] = 1
    cues = torch.rand(2, len(CUES), 3, 32, 32, generator=generator) * 2 - 1
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    return {"image": image, "mask": mask, "cues": cues, "cues_present": torch.ones(2, len(CUES), dtype=torch.bool)}


def test_the_frozen_base_is_evaluated_with_the_conditioning_of_the_adapter(tiny_config: DecomposerConfig) -> None:
    batch = {**scenes(), "index": torch.arange(2)}
    base = load_mmdit(tiny_config.weights.transformer)

    def inpainted(mask: bool) -> torch.Tensor:
        config = replace(tiny_config, conditioning=ConditioningConfig(mask=mask))
        return methods(Models(build_decomposer(config), base), EvaluateConfig())["base"].draw(batch)[0]

    masked, maskless = inpainted(True), inpainted(False)
    base.img_in.weight[:, MASK_CHANNELS] = 0
    assert not masked.equal(maskless) and inpainted(True).equal(maskless)


def test_a_maskless_base_never_sees_a_mask_in_pre_training_or_adaptation(
    tmp_path: Path, tiny_overrides: list[str], tiny_weights: Path
) -> None:
    settings = ["data.scenes.size=32", "data.validation=2", "data.workers=0", "evaluate.samples=2", "sample.steps=1"]
    settings += ["train.batch_size=2", "train.steps=2", "train.precision=32-true", "optim.warmup=0"]
    sizes = {"hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6], "depth": 1, "depth_single_blocks": 1}
    model = [f"model.{name}={value}" for name, value in sizes.items()]
    own = [f"weights.autoencoder={tiny_weights}/autoencoder.safetensors", f"run_dir={tmp_path}/base"]
    settings += ["conditioning.mask=false"]
    config = load_config(REPOSITORY / "configs" / "tiny_inpainter.yaml", [*settings, *model, *own])
    first = InpainterJob(config).transformer.img_in.weight
    train(config)
    last = torch.load(tmp_path / "base" / "last.ckpt", weights_only=True)["state_dict"]["transformer.img_in.weight"]
    assert last[:, MASK_CHANNELS].equal(first[:, MASK_CHANNELS]), "no gradient without an input"
    assert (last[:, :128] != first[:, :128]).all()

    base = tmp_path / "base" / "transformer.safetensors"
    chosen = [f"weights.transformer={base}", f"run_dir={tmp_path}/adapted", *settings]
    train(load_config(TINY, [*tiny_overrides, *chosen]))
    adapted = load_file(tmp_path / "adapted" / "adapter.safetensors")["img_in.weight"]
    before = load_file(base)["img_in.weight"].float()
    assert adapted[:, MASK_CHANNELS].equal(before[:, MASK_CHANNELS])
    assert (adapted[:, :128] != before[:, :128]).all()
