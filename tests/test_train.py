"""The training jobs end to end, at toy size: files, checkpoint contents, resuming, several processes."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import alone, curve, fill, power_cut_at, run, same
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from layerdecomp.comparison import EvaluateConfig, Models, methods
from layerdecomp.config import TrainConfig, load_config
from layerdecomp.data.datamodule import collate, open_samples
from layerdecomp.data.index import VERSION
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError
from layerdecomp.flow import sample_times, seeded_normal
from layerdecomp.imaging.compositing import to_autoencoder
from layerdecomp.manifest import open_adapter
from layerdecomp.metric_networks import open_networks
from layerdecomp.metrics.background import psnr
from layerdecomp.metrics.layers import METRICS, LayerMetrics
from layerdecomp.models.autoencoder import Autoencoder
from layerdecomp.models.context_fusion import ContextFusion
from layerdecomp.models.lora import is_quantized
from layerdecomp.tensor_files import file_sha256, read_metadata
from layerdecomp.training.autoencoder import (
    BACKGROUND_MEAN,
    BACKGROUND_SQUARE,
    AutoencoderJob,
    composite_error,
    reconstruction_metrics,
)
from layerdecomp.training.base import Job
from layerdecomp.training.checkpoints import newest_checkpoint
from layerdecomp.training.decomposer import DecomposerJob, fixed_settings
from layerdecomp.training.inpainter import InpainterJob
from layerdecomp.training.runs import build_strategy, build_trainer, check_devices, open_run
from layerdecomp.weights import TRAINING, history, load_autoencoder, load_mmdit, save_model

REPOSITORY = Path(__file__).resolve().parent.parent
AUTOENCODER = ["model.ch=8", "model.ch_mult=[1,1,2,2]", "model.norm_groups=4"]
INPAINTER = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.axes_dim=[4,6,6]",
    "model.depth=1",
    "model.depth_single_blocks=1",
]
SMALL = [
    "data.scenes.size=32",
    "data.validation=2",
    "data.workers=0",
    "evaluate.samples=2",
    "train.batch_size=2",
    "train.precision=32-true",
]


def losses(run_dir: Path) -> list[float]:
    return list(curve(run_dir).values())


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "train.precision=32-true", "train.validate_every=2", "train.checkpoint_every=2"]


def test_a_run_writes_its_checkpoint_adapter_metrics_and_samples(tmp_path: Path, overrides: list[str]) -> None:
    run_dir = run("tiny", *overrides, f"run_dir={tmp_path}/run", "train.steps=3", "seed=4")
    assert {"config.yaml", "last.ckpt", "adapter.safetensors", "metrics.json"} <= {p.name for p in run_dir.iterdir()}
    assert (run_dir / "samples" / "comparison.png").is_file()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert set(metrics["results"]) == {"adapted", "base", "classical"}
    assert set(METRICS) <= set(metrics["results"]["adapted"])
    assert metrics["protocol"]["count"] == 3
    assert (metrics["protocol"]["split"], metrics["protocol"]["data_seed"]) == ("test", 1234)
    assert len(losses(run_dir)) == 3
    metadata = read_metadata(run_dir / "adapter.safetensors")
    assert (metadata["steps"], metadata["seed"], json.loads(metadata["data"])["source"]) == ("3", "4", "scenes")
    assert re.fullmatch("[0-9a-f]{40}|([0-9a-f]{40}-dirty|unknown)-[0-9a-f]{8}", metadata["commit"])
    assert metadata["precision"] == "32-true"
    figures = json.loads(metadata["figures"])
    assert figures["background/psnr"] == metrics["results"]["adapted"]["background/psnr"]
    layers = Decomposer.from_pretrained(run_dir / "adapter.safetensors").decompose(*scene(40, 56), steps=2)
    assert layers.background.shape == (40, 56, 3)


def scene(height: int, width: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[8:24, 8:24] = 255
    return image, mask.numpy()


def test_checkpoints_contain_only_trained_tensors(tmp_path: Path, overrides: list[str]) -> None:
    run_dir = run("tiny", *overrides, f"run_dir={tmp_path}/run", "train.steps=2")
    state = torch.load(run_dir / "last.ckpt", weights_only=True)["state_dict"]
    kinds = ("lora_A.weight", "lora_B.weight", "img_in.weight", "img_in.bias")
    assert all(name.endswith(kinds) or ".context_fusion." in name for name in state)
    adapter = load_file(run_dir / "adapter.safetensors")
    assert {name.removeprefix("decomposer.").removeprefix("transformer.") for name in state} == set(adapter)
    for name, tensor in state.items():
        assert torch.equal(tensor, adapter[name.removeprefix("decomposer.").removeprefix("transformer.")])


def test_a_job_within_another_module_saves_its_trained_tensors(overrides: list[str]) -> None:
    class Composite(LightningModule):
        def __init__(self, job: Job) -> None:
            super().__init__()
            self.job, self.head = job, torch.nn.Linear(2, 2)

    outer = Composite(DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", overrides)))
    state = outer.state_dict()
    assert set(state) == {"head.weight", "head.bias", *(f"job.{name}" for name, _ in outer.job.trained())}
    assert all(value.data_ptr() == state[f"job.{name}"].data_ptr() for name, value in outer.job.trained())
    changed = {name: torch.ones_like(value) for name, value in state.items()}
    outer.load_state_dict(changed, strict=False)
    assert same(outer.job.state_dict(), {name: torch.ones_like(value) for name, value in outer.job.trained()})


def test_what_is_unfrozen_after_building_is_saved_too(overrides: list[str]) -> None:
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", overrides))
    job.decomposer.transformer.final_layer.requires_grad_(True)
    trained = {name.removeprefix("decomposer.").removeprefix("transformer.") for name, _ in job.trained()}
    assert trained == job.decomposer.adapter({}).tensors.keys() and "final_layer.linear.weight" in trained


def test_frozen_parts_are_not_among_the_trained_tensors(tmp_path: Path, overrides: list[str]) -> None:
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, f"run_dir={tmp_path}/run"]))
    trained = {name for name, _ in job.trained()}
    assert not any("autoencoder" in name or "modulation" in name or "txt_in" in name for name in trained)
    assert {"decomposer.transformer.img_in.weight", "decomposer.transformer.img_in.bias"} <= trained


def test_validation_starts_from_the_base_and_logs_every_metric_with_its_networks(
    tmp_path: Path, overrides: list[str], metric_weights: Path, tiny_weights: Path
) -> None:
    settings = [*overrides, "train.steps=2", "optim.lr=1e-2", "data.validation=3", "sample.keep_pixels=false"]
    settings += ["evaluate.samples=2", "evaluate.rows=[adapted,base]"]
    networks = [f"evaluate.measure.weights={metric_weights}", "evaluate.measure.lpips=squeeze"]
    run_dir = run("tiny", *settings, *networks, f"run_dir={tmp_path}/run")
    config = load_config(run_dir / "config.yaml")
    data = open_samples(config.data, "test", config.seed + 1, 3)
    batch = default_collate([data[index] for index in range(3)])
    models = Models(
        Decomposer.from_pretrained(run_dir / "adapter.safetensors"),
        load_mmdit(tiny_weights / "transformer.safetensors"),
    )
    measures = open_networks(config.evaluate.measure).measures
    for step, row in ((0, "base"), (1, "adapted")):  # steps are counted from 0: 1 is the last
        metric = LayerMetrics(measures)
        metric.update(*methods(models, EvaluateConfig(rows=[row]))[row].draw(batch), batch)
        for name, value in metric.compute().items():
            if name in METRICS and not value.isnan():
                found = curve(run_dir, f"validation/{name}")
                assert sorted(found) == [0, 1]
                assert found[step] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), (row, name)
    assert json.loads((run_dir / "metrics.json").read_text())["results"]["base"]["background/fid"] > 0
    state = torch.load(run_dir / "last.ckpt", weights_only=True)
    assert len(state["state_dict"]) == len(load_file(run_dir / "adapter.safetensors"))
    assert not any("lpips" in name or "inception" in name or "metrics" in name for name in state["state_dict"])
    assert len(state["optimizer_states"][0]["state"]) <= len(state["state_dict"])


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*overrides, "train.steps=5", "optim.lr=1e-2"]
    straight = run("tiny", *settings, f"run_dir={tmp_path}/straight")

    with power_cut_at(3):
        run("tiny", *settings, f"run_dir={tmp_path}/resumed")
    capsys.readouterr()
    resumed = run("tiny", *settings, f"run_dir={tmp_path}/resumed")
    assert re.search(r" 5/5 \[", capsys.readouterr().out)  # the progress bar ends at the right step

    one, other = (load_file(path / "adapter.safetensors") for path in (straight, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in one.items())


def test_weights_carry_the_commits_that_trained_them(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*overrides, f"run_dir={tmp_path}/run", "train.steps=4", "evaluate.rows=[]"]

    def continue_with(commit: str) -> tuple[str, str]:
        caplog.clear()
        monkeypatch.setattr("layerdecomp.training.provenance.source_commit", lambda: commit)
        monkeypatch.setattr("layerdecomp.training.provenance.PACKAGE_SHA256", f"the sources of {commit}")
        monkeypatch.setattr("layerdecomp.training.provenance.creation_date", lambda: f"the day of {commit}")
        metadata = read_metadata(run("tiny", *settings) / "adapter.safetensors")
        return metadata["commit"], metadata["date"]

    with power_cut_at(3):
        continue_with("first")
    assert continue_with("second") == ("first + second", "the day of second")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert warned[0].startswith("commit first trained this run up to step 2, from where commit second continues")
    assert continue_with("third") == ("first + second", "the day of second") and not caplog.records
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    del checkpoint["trained"]  # as in older checkpoints
    torch.save(checkpoint, tmp_path / "run" / "last.ckpt")
    assert continue_with("third")[0] == "unknown"


def test_a_commit_that_changed_no_source_does_not_warn(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*overrides, f"run_dir={tmp_path}/run", "train.steps=3", "evaluate.rows=[]"]
    monkeypatch.setattr("layerdecomp.training.provenance.source_commit", lambda: "first")
    with power_cut_at(2):
        run("tiny", *settings)
    monkeypatch.setattr("layerdecomp.training.provenance.source_commit", lambda: "of docs")
    caplog.clear()
    assert read_metadata(run("tiny", *settings) / "adapter.safetensors")["commit"] == "first"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_directory_with_other_settings_is_refused_or_renamed(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, f"run_dir={tmp_path}/run", "train.steps=1"]
    run_dir = run("tiny", *settings)
    first = (run_dir / "adapter.safetensors").read_bytes()
    with pytest.raises(InputError, match=rf"optim\.lr.*, or resume={run_dir}/last\.ckpt to continue .*resume=never"):
        run("tiny", *settings, "optim.lr=0.5")
    assert (run_dir / "adapter.safetensors").read_bytes() == first
    run("tiny", *settings, "optim.lr=0.5", "resume=never")
    assert (tmp_path / "run.1" / "adapter.safetensors").read_bytes() == first
    with pytest.raises(InputError, match="no such checkpoint"):
        run("tiny", *settings, "resume=nowhere.ckpt")


@pytest.mark.parametrize("run_dir", [".", "/", "/proc"])
def test_a_directory_that_cannot_be_renamed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str
) -> None:
    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [f"run_dir={run_dir}", "resume=never"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"run_dir {run_dir} cannot be moved aside .*; choose another run_dir="):
        open_run(Path(run_dir), config)


@pytest.mark.parametrize("muon", ["true", "false"])
def test_resuming_a_checkpoint_uses_the_new_learning_rate_and_betas(
    tmp_path: Path, overrides: list[str], muon: str
) -> None:
    settings = [*overrides, f"optim.muon={muon}", "optim.warmup=0", "optim.decay=false", "evaluate.rows=[]"]
    decay = [[], []] if muon == "true" else [["optim.weight_decay=0.1"], ["optim.weight_decay=0.2"]]
    first = run("tiny", *settings, *decay[0], "optim.lr=0.04", "train.steps=2", f"run_dir={tmp_path}/first")
    assert not (first / "metrics.json").exists()  # no rows, no comparison
    checkpoint = torch.load(first / "last.ckpt", weights_only=True)
    before, (group, *_) = checkpoint["state_dict"], checkpoint["optimizer_states"][0]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.99) and group.get("weight_decay", 0.1) == 0.1
    settings += [f"resume={first / 'last.ckpt'}", "train.steps=4", f"run_dir={tmp_path}/second"]
    second = run("tiny", *settings, *decay[1], "optim.lr=1e-9", "optim.betas=[0.5,0.6]")
    state = torch.load(second / "last.ckpt", weights_only=True)
    for name, tensor in state["state_dict"].items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)
    for group in state["optimizer_states"][0]["param_groups"]:
        assert group["lr"] == group["initial_lr"] == 1e-9 and tuple(group["betas"]) == (0.5, 0.6)
        assert group.get("weight_decay", 0.2) == 0.2
    with pytest.raises(InputError, match="the checkpoint's optimizer is .*resume with the original optim.muon"):
        run("tiny", *settings, f"optim.muon={'false' if muon == 'true' else 'true'}")


def test_resuming_an_earlier_checkpoint_abandons_the_later_ones(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "evaluate.rows=[]", f"run_dir={tmp_path}/run"]
    run_dir = run("tiny", *settings, "train.steps=4")
    later, earlier = ((run_dir / name).read_bytes() for name in ("last.ckpt", "previous.ckpt"))
    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, f"resume={run_dir / 'previous.ckpt'}"])
    assert open_run(run_dir, config) == run_dir / "previous.ckpt"
    assert newest_checkpoint(run_dir) == run_dir / "previous.ckpt"  # even if killed before the next checkpoint
    assert (run_dir / "previous.ckpt").read_bytes() == earlier
    assert (run_dir / "abandoned-last.ckpt").read_bytes() == later
    (run_dir / "abandoned-last.ckpt").rename(run_dir / "last.ckpt")
    config.resume = str(run_dir / "last.ckpt")  # the newest one: nothing is abandoned
    assert open_run(run_dir, config) == run_dir / "last.ckpt" and (run_dir / "previous.ckpt").is_file()


def save_step(checkpoint: Path, step: int) -> bytes:
    """Writes a minimal checkpoint of a step and returns its bytes."""
    checkpoint.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step, "state_dict": {}}, checkpoint)
    return checkpoint.read_bytes()


@pytest.mark.parametrize("by_link", [False, True])
def test_resuming_an_abandoned_checkpoint_repeatedly_loses_no_checkpoint(
    tmp_path: Path, overrides: list[str], by_link: bool
) -> None:
    run_dir = tmp_path / "run"
    chosen, link = run_dir / "abandoned-last.ckpt", tmp_path / "link.ckpt"
    link.symlink_to(chosen)
    settings = [*overrides, f"run_dir={run_dir}", f"resume={link if by_link else chosen}"]
    config = load_config(REPOSITORY / "configs" / "tiny.yaml", settings)
    files = {save_step(chosen, 9)}
    for steps in ((4, 5), (6, 7)):
        files |= {
            save_step(run_dir / f"{name}.ckpt", step) for name, step in zip(("previous", "last"), steps, strict=True)
        }
        assert open_run(run_dir, config) == chosen and torch.load(chosen)["global_step"] == 9
        assert newest_checkpoint(run_dir) is None
        assert {path.read_bytes() for path in run_dir.glob("*.ckpt")} == files


def test_a_checkpoint_in_a_subfolder_of_the_run_is_not_moved(tmp_path: Path, overrides: list[str]) -> None:
    run_dir = tmp_path / "run"
    last, inner = run_dir / "last.ckpt", run_dir / "kept" / "last.ckpt"
    save_step(last, 5)
    save_step(inner, 3)
    settings = [*overrides, f"run_dir={run_dir}", f"resume={inner}"]
    assert open_run(run_dir, load_config(REPOSITORY / "configs" / "tiny.yaml", settings)) == inner
    assert inner.is_file() and not last.exists() and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_frozen_files_may_move_but_not_change(tmp_path: Path, overrides: list[str], tiny_weights: Path) -> None:
    settings = [*overrides, "evaluate.rows=[]", "train.steps=2"]
    first = run("tiny", *settings, f"run_dir={tmp_path}/first")
    moved = shutil.copy(tiny_weights / "transformer.safetensors", tmp_path / "moved.safetensors")
    settings += [f"resume={first / 'last.ckpt'}", f"run_dir={tmp_path}/second"]
    run("tiny", *settings, f"weights.transformer={moved}")
    other = tiny_weights / "autoencoder.safetensors"
    error = (
        rf"frozen files: {other} \(sha256 \w{{8}}\) then, {tmp_path}/autoencoder.safetensors \(sha256 \w{{8}}\) now;"
    )
    with pytest.raises(InputError, match=error):
        save_file(
            load_file(other), tmp_path / "autoencoder.safetensors", safe_open(other, "pt").metadata() | {"a": "b"}
        )
        run("tiny", *settings, f"weights.autoencoder={tmp_path}/autoencoder.safetensors")


def test_layers_of_an_earlier_adapter_are_not_reused(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "evaluate.samples=1", "evaluate.rows=[adapted]", "optim.warmup=0"]
    checksums = []
    for steps in ("1", "2", "2"):
        run_dir = run("tiny", *settings, f"train.steps={steps}", "resume=never", f"run_dir={tmp_path}/run")
        checksums.append(json.loads((run_dir / "metrics.json").read_text())["protocol"]["weights"]["adapter"])
    assert checksums[0] != checksums[1] == checksums[2]


def test_a_run_does_not_resume_with_another_base(tmp_path: Path, overrides: list[str], tiny_weights: Path) -> None:
    base = tmp_path / "transformer.safetensors"
    base.write_bytes((tiny_weights / "transformer.safetensors").read_bytes())
    settings = [*overrides, f"weights.transformer={base}", f"run_dir={tmp_path}/run", "train.steps=2"]
    run_dir = run("tiny", *settings)
    checkpoint = torch.load(run_dir / "last.ckpt", weights_only=True)
    sha256 = file_sha256(base)
    for saved, message in (
        (checkpoint["frozen_sha256"] | {str(base): "0123456789"}, rf"{base} \(sha256 01234567\) then, {base} .* now"),
        (checkpoint["frozen_sha256"] | {"/a/prompt": sha256}, rf": /a/prompt \(sha256 {sha256[:8]}\) then, none now;"),
        (
            {str(base): sha256},
            r": none then, \S*/autoencoder\.\S* \(.*\) now; none then, \S*/rgba_autoencoder\.\S* .* now;",
        ),
    ):
        torch.save({**checkpoint, "frozen_sha256": saved}, run_dir / "last.ckpt")
        with pytest.raises(InputError, match=f"started with other frozen files.*{message}.*resume=never"):
            run("tiny", *settings)


def test_saving_a_checkpoint_does_not_read_the_frozen_files(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = DecomposerJob.on_save_checkpoint

    def save(self: DecomposerJob, checkpoint: dict[str, Any]) -> None:
        before = file_sha256.cache_info().misses
        original(self, checkpoint)
        read.append(file_sha256.cache_info().misses - before)

    monkeypatch.setattr(DecomposerJob, "on_save_checkpoint", save)
    file_sha256.cache_clear()
    run("tiny", *overrides, "latent_cache=null", "evaluate.rows=[]", "train.steps=2", f"run_dir={tmp_path}/run")
    assert read == [0]


def test_invalid_settings_leave_no_run_directory(tmp_path: Path, overrides: list[str]) -> None:
    for setting in (
        "train.precision=bf61",
        "weights.transformer=nowhere.safetensors",
        "evaluate.rows=[adapted,maskless]",
        "resume=nowhere.ckpt",
    ):
        with pytest.raises(InputError):
            run("tiny", *overrides, "evaluate.maskless=nowhere.safetensors", f"run_dir={tmp_path}/run", setting)
        assert not (tmp_path / "run").exists()
    (tmp_path / "damaged.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="damaged"):
        run("tiny", *overrides, f"run_dir={tmp_path}/run", f"resume={tmp_path}/damaged.ckpt")
    assert not (tmp_path / "run").exists()


def test_training_fits_one_scene(tmp_path: Path, overrides: list[str]) -> None:
    settings = ["data.samples=1", "train.batch_size=8", "train.steps=60", "optim.lr=1e-2", "train.validate_every=60"]
    found = losses(run("tiny", *overrides, *settings, f"run_dir={tmp_path}/run", "evaluate.samples=1"))
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


@pytest.mark.parametrize("job", ["tiny", "tiny_inpainter"])
def test_a_latent_cache_only_changes_rounding(
    job: str, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if job == "tiny_inpainter":
        overrides = [*SMALL, *INPAINTER, overrides[1], "sample.steps=2"]
    settings = [*overrides, "data.samples=4", "train.steps=6", "train.batch_size=2"]
    without = losses(run(job, *settings, "latent_cache=null", f"run_dir={tmp_path}/without"))
    encoded: list[int] = []
    kind = DecomposerJob if job == "tiny" else InpainterJob
    encode = kind.encode

    def counted(self: Any, batch: dict) -> dict:
        encoded.extend(batch["index"])
        return encode(self, batch)

    monkeypatch.setattr(kind, "encode", counted)
    settings.append(f"latent_cache={tmp_path}/latents")
    first = losses(run(job, *settings, f"run_dir={tmp_path}/first"))
    assert encoded == [0, 1, 2, 3]
    again = losses(run(job, *settings, f"run_dir={tmp_path}/again"))
    assert encoded == [0, 1, 2, 3], "a second run finds all of them in the cache"
    assert first == again
    torch.testing.assert_close(first, without, rtol=2e-3, atol=0)
    other = run(job, *settings, "seed=1", f"run_dir={tmp_path}/other")
    assert encoded[4:] == [0, 1, 2, 3] and losses(other) != first, "another seed has other latents"
    one, two = (load_file(path)["z"] for path in (tmp_path / "latents").rglob("000000000.safetensors"))
    assert not one.equal(two), "another seed has other samples"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.precision=bf16-mixed", False),
        ("sample.tile=512", False),
        ("data.triplets.size=64", False),
        ("train.steps=9", True),
        ("train.batch_size=1 train.accumulate=2", True),
        ("train.batch_size=1", False),
        ("fusion.cues=[segmentation]", False),
        ("weights.autoencoder={other}", False),
        ("weights.rgba_autoencoder={other}", False),
    ],
)
def test_only_settings_that_affect_latents_change_the_cache_folder(
    tmp_path: Path, overrides: list[str], tiny_weights: Path, override: str, same: bool
) -> None:
    rgba, other = "rgba" in override, tmp_path / "autoencoder.safetensors"
    file = tiny_weights / f"{'rgba_' if rgba else ''}autoencoder.safetensors"
    save_file(load_file(file), other, {**read_metadata(file), "date": "later"})  # the same tensors, but another file
    index, metadata = tmp_path / "index.safetensors", {"source": "a", "kind": "triplets", "licence": "b"}
    metadata |= {"index_version": VERSION, "root": str(tmp_path)}
    save_file({"ends": torch.zeros(1)}, index, metadata)
    settings = [*overrides, f"latent_cache={tmp_path}/latents", "data.source=triplets"]
    settings.append(f"data.triplets.folders=[{index}]")

    def folder(*more: str) -> Path:
        job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, *more]))
        assert job.cache is not None
        return job.cache.folder

    before = folder()
    assert (folder(*override.format(other=other).split()) == before) is same
    save_file({"ends": torch.ones(1)}, index, metadata)  # as if rebuilt from other images
    file_sha256.cache_clear()
    assert folder() != before


@pytest.mark.parametrize("muon", ["true", "false"])
def test_learning_rate_and_gradient_norm_are_logged_for_each_step(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, muon: str
) -> None:
    found: list[tuple[float, float]] = []
    original = DecomposerJob.configure_gradient_clipping

    def norm(job: DecomposerJob) -> float:
        gradients = [parameter.grad for _, parameter in job.trained() if parameter.grad is not None]
        return sum(gradient.double().square().sum().item() for gradient in gradients) ** 0.5

    def recording(self: DecomposerJob, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        found.append((optimizer.param_groups[0]["lr"], norm(self)))
        original(self, optimizer, *args, **kwargs)
        assert norm(self) == pytest.approx(1e-3, rel=1e-2), "expected the gradient to be clipped"

    monkeypatch.setattr(DecomposerJob, "configure_gradient_clipping", recording)
    settings = [*overrides, "evaluate.rows=[]", "train.steps=5", "train.accumulate=2", f"optim.muon={muon}"]
    run_dir = run("tiny", *settings, "optim.warmup=3", "optim.clip=1e-3", f"run_dir={tmp_path}/run")
    rates, norms = (dict(enumerate(values)) for values in zip(*found, strict=True))
    assert curve(run_dir, "train/lr") == pytest.approx(rates) and len(set(rates.values())) == 5
    assert curve(run_dir, "train/grad_norm") == pytest.approx(norms, rel=1e-5)
    assert min(norms.values()) > 1e-3  # before clipping
    assert list(curve(run_dir, "validation/background/psnr")) == [0, 1, 3]  # at the start and after 2 and 4 steps


def test_gradients_are_freed_before_the_next_forward_pass(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def recording(
        job: DecomposerJob, batch: dict[str, Any], original: Any = DecomposerJob.loss
    ) -> dict[str, torch.Tensor]:
        held.append(sum(parameter.grad is not None for _, parameter in job.trained()))
        losses: dict[str, torch.Tensor] = original(job, batch)
        return losses

    monkeypatch.setattr(DecomposerJob, "loss", recording)
    run("tiny", *overrides, f"run_dir={tmp_path}", "train.steps=2", "train.accumulate=2", "evaluate.rows=[]")
    assert [count > 0 for count in held] == [False, True, False, True]  # kept while they accumulate


def test_the_learning_rate_warms_up_from_the_first_step_and_decays_to_2_percent(overrides: list[str]) -> None:
    settings = ["optim.warmup=4", "train.steps=100"]
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, *settings, "optim.decay=false"]))
    assert [job._rate(step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    job.run.optim.decay = True
    assert [job._rate(step) for step in (50, 100, 101)] == pytest.approx([0.51, 0.02, 0.02])


def test_too_many_devices_are_refused_before_weights_are_loaded(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("layerdecomp.training.runs.build_job", lambda config: pytest.fail("expected no model yet"))
    with pytest.raises(InputError, match="train.devices is 3, but there are 2 GPUs; set train.devices=2"):
        run("tiny", *overrides, "train.devices=3", "data.validation=3", f"run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SBATCH = {**FIRST, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
SALLOC = {**FIRST, "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "1"}  # named so by default


@pytest.mark.parametrize(
    ("variables", "started", "environment"),
    [
        ({}, None, "LightningEnvironment"),
        ({"WORLD_SIZE": "4"}, None, "LightningEnvironment"),  # set for a container, whose processes Lightning starts
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 2, "LightningEnvironment"),  # started by Lightning
        (TORCHRUN, 2, "TorchElasticEnvironment"),
        ({**SBATCH, **TORCHRUN}, 2, "TorchElasticEnvironment"),
        ({**SBATCH, "SLURM_STEP_NUM_TASKS": "1", **TORCHRUN}, 2, "TorchElasticEnvironment"),  # srun torchrun
        (SBATCH, 1, "SLURMEnvironment"),
        ({**SBATCH, "SLURM_STEP_NUM_TASKS": "2"}, 2, "SLURMEnvironment"),
        (SALLOC, None, "LightningEnvironment"),
        ({**SALLOC, "SLURM_STEP_NUM_TASKS": "1"}, None, "LightningEnvironment"),  # srun --pty bash
        ({**SALLOC, "SLURM_STEP_NUM_TASKS": "2"}, 2, "SLURMEnvironment"),
        ({**SALLOC, "SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "2"}, None, "LightningEnvironment"),  # two shells
    ],
)
def test_processes_of_a_launcher_are_counted_and_are_the_ranks_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], started: int | None, environment: str
) -> None:
    for name in [name for name in os.environ if name not in alone() or name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for devices in (1, 2, 3):
        if started in (None, devices):
            check_devices(TrainConfig(devices=devices))
        else:
            with pytest.raises(InputError, match=rf"is {started}, but train.devices={devices} and .* make {devices};"):
                check_devices(TrainConfig(devices=devices))
    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [f"train.devices={started or 1}", "train.strategy=ddp"])
    trainer = build_trainer(config, tmp_path, mock.Mock())
    assert type(trainer.strategy.cluster_environment).__name__ == environment


def test_several_processes_use_ddp_with_gradients_as_bucket_views() -> None:
    alone, several = TrainConfig(), TrainConfig(devices=2)
    assert build_strategy(alone) == "auto"
    for found in (several, TrainConfig(nodes=2), TrainConfig(devices=2, strategy="ddp")):
        strategy = build_strategy(found)
        assert isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs["gradient_as_bucket_view"]


def test_an_autoencoder_is_trained_then_extended_by_alpha(tmp_path: Path) -> None:
    rgb = run("tiny_autoencoder", *SMALL, *AUTOENCODER, f"run_dir={tmp_path}/rgb", "train.steps=60")
    found = losses(rgb)
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
    weights = rgb / "autoencoder.safetensors"
    config = load_autoencoder(weights).config
    assert config.in_channels == 3 and config.scale_factor != 1.0  # measured at the end
    rgba = run("tiny_rgba_autoencoder", *SMALL, f"extend={weights}", f"run_dir={tmp_path}/rgba", "train.steps=2")
    extended = load_autoencoder(rgba / "autoencoder.safetensors").config
    assert extended.in_channels == 4 and extended.scale_factor == config.scale_factor
    assert "alpha_l1" in json.loads((rgba / "metrics.json").read_text())["results"]["autoencoder"]


def test_an_autoencoder_is_evaluated_in_batches_of_the_set_size(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, sizes = Autoencoder.encode, list[int]()
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    few = ["train.steps=1", "data.validation=1", "evaluate.samples=3", "evaluate.batch_size=2"]
    settings = [f"refine={tiny_weights}/autoencoder.safetensors", "extend=null", *few, f"run_dir={tmp_path}/run"]
    run_dir = run("tiny_autoencoder", *SMALL, *settings)
    assert sizes[-2:] == [2, 1]
    config, refined = load_config(run_dir / "config.yaml"), load_autoencoder(run_dir / "autoencoder.safetensors")
    images = default_collate([open_samples(config.data, "test", config.evaluate.seed, 3)[i]["image"] for i in range(3)])
    figures = json.loads((run_dir / "metrics.json").read_text())["results"]["autoencoder"]
    expected = psnr(refined.decode(refined.encode(images)).clamp(-1, 1), images).mean().item()
    assert figures["psnr"] == pytest.approx(expected, rel=2e-3), "expected the figures of the held-out scenes"


@pytest.mark.parametrize("name", ["autoencoder", "rgba_autoencoder"])
def test_refining_an_autoencoder_keeps_its_latents(tmp_path: Path, tiny_weights: Path, name: str) -> None:
    weights = tiny_weights / f"{name}.safetensors"
    settings = [f"refine={weights}", "extend=null", "train.steps=4", "optim.warmup=0", f"run_dir={tmp_path}/refined"]
    file = run(f"tiny_{name}", *SMALL, *settings) / "autoencoder.safetensors"
    refined = load_file(file)
    changed = {key.split(".")[0] for key, tensor in load_file(weights).items() if not torch.equal(refined[key], tensor)}
    assert changed == {"decoder"}
    settings = [f"refine={file}", "extend=null", "train.steps=1", f"run_dir={tmp_path}/again"]
    again = run(f"tiny_{name}", *SMALL, *settings) / "autoencoder.safetensors"
    # a float32 file stays float32, so that its encoder is not rounded
    encoder = load_file(weights)
    exact = {key: tensor.float() + 1e-6 * torch.rand(tensor.shape) for key, tensor in encoder.items()}
    save_file(exact, tmp_path / "exact.safetensors", read_metadata(weights))
    settings = [f"refine={tmp_path}/exact.safetensors", "extend=null", "train.steps=1", f"run_dir={tmp_path}/exact"]
    kept = load_file(run(f"tiny_{name}", *SMALL, *settings) / "autoencoder.safetensors")
    assert all(kept[key].equal(tensor) for key, tensor in exact.items() if key.startswith("encoder."))
    stages = [stage["sha256"] for stage in history(again)]
    assert stages[1:] == [file_sha256(file), file_sha256(again)] and stages[0] == file_sha256(weights)
    for path in (file, again):  # the adapter accepts either
        _, config = open_adapter(tiny_weights / "adapter.safetensors", **{name: str(path)})
        assert getattr(config.weights, name) == str(path)


def test_an_autoencoder_cannot_be_both_extended_and_refined(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of them"):
        run("tiny_rgba_autoencoder", "refine=other.safetensors", f"run_dir={tmp_path}/none")


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_decoder_is_trained_on_samples_of_the_posterior(noise: float) -> None:
    settings = [*SMALL, *AUTOENCODER, "projection=0", f"noise={noise}", "model.scale_factor=0.5"]
    job = AutoencoderJob(load_config(REPOSITORY / "configs" / "tiny_autoencoder.yaml", settings))
    mean, log_variance = torch.zeros(2, 16, 4, 4), torch.full((2, 16, 4, 4), -3.0)
    drawn, level = (seeded_normal(job.run.seed, [7, 8], shape, n) for n, shape in enumerate(((16, 4, 4), (1, 1, 1))))
    expected = (math.exp(-1.5) + noise * level.abs() / 0.5) * drawn  # `noise` is of scaled latents
    torch.testing.assert_close(job._deviation(mean, log_variance, [7, 8]), expected)


def test_an_rgb_autoencoder_sees_holes_and_its_latents_are_normalised_on_training_scenes() -> None:
    settings = [*SMALL, *AUTOENCODER, "projection=0"]
    job = AutoencoderJob(load_config(REPOSITORY / "configs" / "tiny_autoencoder.yaml", settings))
    data = open_samples(job.run.data, "train", job.run.seed, 64, with_cues=False)
    batch = collate([data[index] for index in range(64)])
    seen, holes = job.images(batch), 1 - batch["inpaint_mask"]
    assert seen[2].equal(batch["image"][2]) and seen[3].equal((batch["image"] * holes)[3]), "every fourth has a hole"
    job.normalise_latents()
    with torch.no_grad():
        latents = job.autoencoder.encode(batch["image"])
    assert latents.mean().item() == pytest.approx(0, abs=1e-3) and latents.std().item() == pytest.approx(1, rel=1e-3)


def test_the_losses_of_an_rgba_autoencoder(tiny_weights: Path) -> None:
    weights = {"kl": 0.3, "anchor": 2.0, "foreground_anchor": 0.5}
    settings = [*SMALL, f"extend={tiny_weights}/autoencoder.safetensors", "projection=0", "noise=0"]
    settings += [f"{name}={weight}" for name, weight in weights.items()]
    job = AutoencoderJob(load_config(REPOSITORY / "configs" / "tiny_rgba_autoencoder.yaml", settings))
    fill(job.autoencoder, seed=1)  # else its latents are those of its teacher
    data = open_samples(job.run.data, "train", 0, 4, with_cues=False)
    batch = collate([{**data[index], "position": index} for index in range(4)])
    images, losses = job.images(batch), job.loss(batch)
    assert images[:3].equal(to_autoencoder(batch["foreground"])[:3])
    assert images[3, :3].equal(batch["image"][3]) and (images[3, 3] == 1).all(), "every fourth is opaque"
    assert job.teacher is not None
    (mean, log_variance), (anchor, _) = job.autoencoder.posterior(images), job.teacher.posterior(images[:, :3])
    posterior, standard = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0, 1)
    torch.testing.assert_close(losses["kl"], torch.distributions.kl_divergence(posterior, standard).mean())
    distances = (mean - anchor).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses["anchor"], (torch.tensor([0.5, 0.5, 0.5, 2.0]) * distances).mean())
    whole = losses["composite"] + 0.5 * losses["alpha"] + weights["kl"] * losses["kl"] + losses["anchor"]
    torch.testing.assert_close(losses["loss"], whole)
    half = torch.cat([images[:, :3], images[:, 3:] - 0.5], dim=1)  # alpha in [-1, 1]
    assert reconstruction_metrics(half, images)["alpha_l1"].item() == pytest.approx(0.25)


def test_composite_error_is_the_mean_over_backgrounds() -> None:
    decoded, target = torch.rand(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = torch.tensor(BACKGROUND_MEAN).view(3, 1, 1)
    spread = (torch.tensor(BACKGROUND_SQUARE).view(3, 1, 1) - mean.square()).sqrt()

    def over(layer: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        return layer[:, :3] + (1 - (layer[:, 3:] + 1) / 2) * background

    # two equally likely backgrounds with the mean and mean square of natural images
    errors = [(over(decoded, b) - over(target, b)).square().mean() for b in (mean - spread, mean + spread)]
    torch.testing.assert_close(composite_error(decoded, target), sum(errors) / 2)


def test_an_inpainter_is_trained_and_saved(tmp_path: Path, tiny_weights: Path) -> None:
    weights = f"weights.autoencoder={tiny_weights}/autoencoder.safetensors"
    settings = [*SMALL, *INPAINTER, weights, "sample.steps=2", "latent_cache=null", f"run_dir={tmp_path}/base"]
    settings += ["evaluate.samples=3", "evaluate.batch_size=2"]
    run_dir = run(
        "tiny_inpainter", *settings, "train.batch_size=8", "train.steps=60", "optim.lr=1e-2", "optim.warmup=0"
    )
    assert load_mmdit(run_dir / "transformer.safetensors").config.hidden_size == 32
    found = losses(run_dir)
    assert sum(found[-20:]) < 0.9 * sum(found[:20])


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "train.steps=4", "optim.lr=1e-2", "train.validate_every=4", "data.validation=3"]
    one = run("tiny", *settings, "train.batch_size=4", f"run_dir={tmp_path}/one")
    two = [*settings, "train.batch_size=2", "train.devices=2", "train.strategy=ddp", f"run_dir={tmp_path}/two"]
    command = [sys.executable, "tools/train.py", "config=configs/tiny.yaml", *two]
    environment = alone() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(one), rtol=1e-4, atol=0)
    validated = [curve(path, "validation/background/psnr") for path in (one, tmp_path / "two")]
    assert sorted(validated[0]) == sorted(validated[1]) == [0, 3]
    assert validated[1][0] == pytest.approx(validated[0][0], rel=1e-6)
    assert re.search(r"draw: 100%.* 2/2 ", done.stderr), "the first rank evaluates two of the three scenes"
    found = [json.loads((path / "metrics.json").read_text()) for path in (one, tmp_path / "two")]
    assert [document["protocol"]["count"] for document in found] == [3, 3]
    for row, figures in found[0]["results"].items():
        assert found[1]["results"][row]["background/psnr"] == pytest.approx(figures["background/psnr"], rel=1e-2), row
    adapters = [load_file(path / "adapter.safetensors") for path in (one, tmp_path / "two")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-2, atol=1e-4)
    assert losses(one)[0] != losses(one)[-1]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def run_ranks(folder: Path, overrides: list[str], nodes: int, devices: int) -> None:
    """Starts every rank through the environment, as torchrun and srun do, and kills any that remain."""
    command = [sys.executable, "tools/train.py", "config=configs/tiny.yaml", *overrides]
    command += [f"train.nodes={nodes}", f"train.devices={devices}", f"run_dir={folder}"]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nodes * devices)}
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(nodes * devices):
            place = {"RANK": rank, "NODE_RANK": rank // devices, "LOCAL_RANK": rank % devices}
            environment = alone() | world | {"OMP_NUM_THREADS": "1"} | {name: str(n) for name, n in place.items()}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes))
        for process in ranks:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def test_one_node_of_four_devices_equals_two_nodes_of_two(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "train.strategy=ddp", "train.batch_size=1", "train.accumulate=2", "train.steps=2"]
    settings += ["optim.lr=1e-2", "train.validate_every=2", "data.validation=4", "evaluate.samples=1"]
    settings += ["evaluate.rows=[adapted]"]
    run_ranks(tmp_path / "1x4", settings, nodes=1, devices=4)
    run_ranks(tmp_path / "2x2", settings, nodes=2, devices=2)
    one, two = tmp_path / "1x4", tmp_path / "2x2"
    assert len(losses(one)) == 2 and losses(one) == losses(two)
    assert curve(one, "validation/background/psnr") == curve(two, "validation/background/psnr")
    adapters = [load_file(path / "adapter.safetensors") for path in (one, two)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    single = run("tiny", *settings, "train.strategy=auto", "train.batch_size=4", f"run_dir={tmp_path}/alone")
    torch.testing.assert_close(losses(single), losses(one), rtol=1e-4, atol=0)


def test_gradients_are_all_reduced_once_per_step_while_accumulating(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    synced: list[bool] = []
    original = torch.nn.parallel.DistributedDataParallel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # otherwise it is a validation
            synced.append(self.require_backward_grad_sync)
        assert not self.broadcast_buffers and self.gradient_as_bucket_view
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "forward", forward)
    settings = ["train.strategy=ddp", "train.accumulate=3", "train.steps=2", "evaluate.samples=1"]
    settings += ["quantize=int8"]  # its tensors cannot be broadcast, which DDP does at the start by default
    try:
        run("tiny", *overrides, *settings, "evaluate.rows=[adapted]", f"run_dir={tmp_path}/run")
    finally:
        torch.distributed.destroy_process_group()
    assert synced == [False, False, True] * 2


def test_training_with_8_bit_moments_resumes_exactly(tmp_path: Path, overrides: list[str]) -> None:
    """Without torchao's compilation, which takes minutes on a CPU."""
    settings = [*overrides, "train.steps=4", "optim.lr=1e-2", "optim.muon=false", "evaluate.samples=1", "lora.rank=256"]
    settings += ["optim.warmup=0", "evaluate.rows=[adapted]"]
    torch.compiler.set_stance("force_eager")
    try:
        straight = run("tiny", *settings, "optim.bits=8", f"run_dir={tmp_path}/straight")
        with power_cut_at(3):
            run("tiny", *settings, "optim.bits=8", f"run_dir={tmp_path}/resumed")
        resumed = run("tiny", *settings, "optim.bits=8", f"run_dir={tmp_path}/resumed")
    finally:
        torch.compiler.set_stance("default")
    full = run("tiny", *settings, f"run_dir={tmp_path}/full")
    one, other = (load_file(path / "adapter.safetensors") for path in (straight, resumed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert losses(straight) != losses(full)
    torch.testing.assert_close(losses(straight), losses(full), rtol=0.02, atol=0)
    assert (straight / "last.ckpt").stat().st_size < 0.7 * (full / "last.ckpt").stat().st_size


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_an_adapter_trained_on_a_quantised_base_loads_with_the_full_one(
    tmp_path: Path, overrides: list[str], format: str
) -> None:
    settings = [*overrides, f"quantize={format}", "recompute=1", "encode_batch_size=1", "train.steps=2"]
    run_dir = run("tiny", *settings, "evaluate.samples=1", f"run_dir={tmp_path}/run")
    assert json.loads((run_dir / "metrics.json").read_text())["results"]["base"]
    assert len(losses(run_dir)) == 2
    Decomposer.from_pretrained(run_dir / "adapter.safetensors")


def test_a_run_continues_training_another_runs_adapter(
    tmp_path: Path, overrides: list[str], tiny_weights: Path
) -> None:
    settings = [*overrides, "optim.warmup=0", "optim.decay=false"]
    first = run("tiny", *settings, "train.steps=2", f"run_dir={tmp_path}/first") / "adapter.safetensors"
    settings += [f"adapter={first}", "train.steps=2"]
    second = run("tiny", *settings, "optim.lr=1e-9", f"run_dir={tmp_path}/second")
    trained = load_file(second / "adapter.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in trained.items())
    for name, tensor in load_file(first).items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-7)
    assert read_metadata(second / "adapter.safetensors")["continues"] == file_sha256(first)
    described = read_metadata(first)
    stage = {key: described[key] for key in (*TRAINING, "date", "figures")}
    assert json.loads(stage["train"])["steps"] == 2 and json.loads(stage["figures"]) and "history" not in described
    assert history(second / "adapter.safetensors")[:-1] == [{"sha256": file_sha256(first), **stage}]
    # its first validation uses the adapter, not the base
    config = load_config(second / "config.yaml")
    data = open_samples(config.data, "test", config.seed + 1, 2)
    batch, metric = default_collate([data[index] for index in range(2)]), LayerMetrics()
    decomposer = Decomposer.from_pretrained(first)
    row = methods(Models(decomposer, decomposer.transformer), EvaluateConfig(rows=["adapted"]))["adapted"]
    metric.update(*row.draw(batch), batch)
    expected = metric.compute()["foreground/alpha_iou"].item()
    assert curve(second, "validation/foreground/alpha_iou")[0] == pytest.approx(expected, rel=1e-4)


def test_a_directory_with_an_input_of_the_run_is_not_moved_aside(tmp_path: Path, overrides: list[str]) -> None:
    settings = [*overrides, "train.steps=1", f"run_dir={tmp_path}/run"]
    adapter = run("tiny", *settings) / "adapter.safetensors"
    with pytest.raises(InputError, match=r"resume=never moves .*run aside, which holds .*run/adapter.safetensors, an"):
        run("tiny", *settings, f"adapter={adapter}", "resume=never")
    assert adapter.is_file() and not (tmp_path / "run.1").exists()


def test_an_adapter_is_moved_to_another_base(tmp_path: Path, overrides: list[str], tiny_weights: Path) -> None:
    old, new = tiny_weights / "transformer.safetensors", tmp_path / "new.safetensors"
    model = load_mmdit(old)
    fill(model, seed=8)
    save_model(new, model, {}, torch.float32)
    file = tiny_weights / "adapter.safetensors"
    fitting = [f"{key}={value}" for key, value in fixed_settings(open_adapter(file)[1]).items()]
    settings = [*overrides, *fitting, f"weights.transformer={new}", f"adapter={file}"]
    with pytest.raises(InputError, match=r"new.safetensors is not the transformer that .*adapter.safetensors was"):
        DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", settings))
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, f"adapter_base={old}"]))
    adapted, before, now = load_file(file), load_file(old), load_file(new)
    whole = adapted.keys() & before.keys()
    assert whole == {"img_in.weight", "img_in.bias"}
    for name, tensor in job.decomposer.adapter({}).tensors.items():
        expected = adapted[name] - before[name].float() + now[name] if name in whole else adapted[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    wrong = f"adapter_base={new}"
    with pytest.raises(InputError, match="new.safetensors is not the transformer that"):
        DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, wrong]))
    with pytest.raises(InputError, match="adapter_base is .*new.safetensors, but adapter is null"):
        load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, wrong])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rank=4", "was trained with lora.rank=2; found 4, set lora.rank=2"),
        ("lora.alpha=6", "lora.alpha=3.0; found 6.0"),
        ("fusion.cues=[segmentation]", "fusion.cues=.*edge"),
        ("conditioning.foreground=false", "conditioning.foreground=True; found False"),
        (
            "lora.targets=[double_blocks.*_mlp.*]",
            r"with lora.targets=.*linear2'\]; found \['double_blocks.\*_mlp",
        ),
        ("adapter=nowhere.safetensors", "nowhere.safetensors does not exist"),
        (
            "weights.prompt={tmp_path}/prompt.safetensors",
            "weights.prompt=null; found .*prompt.safetensors, set",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_the_run_is_refused(
    tmp_path: Path, overrides: list[str], tiny_weights: Path, change: str, message: str
) -> None:
    file = tiny_weights / "adapter.safetensors"
    fitting = [f"{key}={value}" for key, value in fixed_settings(open_adapter(file)[1]).items()]
    settings = [*overrides, *fitting, f"adapter={file}", "train.steps=1", f"run_dir={tmp_path}/run"]
    same_layers = "lora.targets=[double_blocks.*_attn.*, double_blocks.*_mlp.?, single_blocks.*.linear?]"
    for targets in ([], [same_layers]):
        DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, *targets]))
    zeros = {"txt": torch.zeros(1, 8), "vec": torch.zeros(8)}
    save_file(zeros, tmp_path / "prompt.safetensors")
    with pytest.raises(InputError, match=message):
        run("tiny", *settings, change.format(tmp_path=tmp_path))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_an_adapter_of_other_code_is_refused(
    overrides: list[str], tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_weights / "adapter.safetensors"
    fitting = [f"{key}={value}" for key, value in fixed_settings(open_adapter(file)[1]).items()]
    config = load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, *fitting, f"adapter={file}"])
    build = ContextFusion.__init__

    def changed(self: ContextFusion, *arguments: Any) -> None:
        build(self, *arguments)
        self.extra = torch.nn.Linear(2, 2)

    monkeypatch.setattr(ContextFusion, "__init__", changed)
    with pytest.raises(InputError, match=r"code or settings are not .*training without adapter= starts anew\)"):
        DecomposerJob(config)


def test_settings_of_the_adapted_model_are_used(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*overrides, "quantize=int8", "recompute=2", "recompute_attention=false", "encode_batch_size=3"]
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*settings, "training_guidance=2.5"]))
    decomposer, found = job.decomposer, list[float]()
    assert any(is_quantized(parameter) for parameter in decomposer.transformer.parameters())
    assert decomposer.transformer.recompute == 2 and not decomposer.transformer.recompute_attention
    assert decomposer.autoencoder.encode_batch_size == decomposer.rgba_autoencoder.encode_batch_size == 3

    def velocity(x: torch.Tensor, context: Any, t: torch.Tensor, guidance: float) -> torch.Tensor:
        found.append(guidance)
        return torch.zeros_like(x)

    monkeypatch.setattr(decomposer, "velocity", velocity)
    data = open_samples(job.run.data, "train", 0, 1)
    job.loss(collate([{**data[0], "position": 0, "faults": []}]))
    assert found == [2.5]


def test_an_inpainter_sees_an_image_without_its_hole_and_fills_only_the_hole(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = f"weights.autoencoder={tiny_weights}/autoencoder.safetensors"
    settings = [*SMALL, *INPAINTER, weights, "latent_cache=null", "sample.steps=1"]
    job = InpainterJob(load_config(REPOSITORY / "configs" / "tiny_inpainter.yaml", settings))
    data = open_samples(job.run.data, "train", 0, 8, with_cues=False)
    batch = collate([data[index] for index in range(8)])
    encoded, mask = job.encode(batch), batch["inpaint_mask"]
    holes, inverted = encoded["hole"].float(), torch.arange(8) % 4 == 3
    assert holes[~inverted].equal(mask[~inverted]) and holes[inverted].equal(1 - mask[inverted])
    changed = job.encode({**batch, "background": torch.zeros_like(batch["image"])})["z"] != encoded["z"]
    assert not changed[:4].any() and changed[4:].any(), "the last four of eight scenes lack their object"
    images = {name: batch[name] * (1 - holes) for name in ("image", "background")}
    without = job.encode({**batch, **images})
    assert without["masked"].equal(encoded["masked"]) and not without["z"].equal(encoded["z"])
    filled = job.fill(batch)
    assert (filled * (1 - mask)).equal(batch["image"] * (1 - mask)) and not (filled * mask).equal(batch["image"] * mask)
    job.run.evaluate.seed += 1
    assert not job.fill(batch).equal(filled)

    def velocity(model: Any, prompt: Any, x: torch.Tensor, cond: Any, t: torch.Tensor, guidance: float) -> torch.Tensor:
        assert t.equal(sample_times(seeded_normal(job.run.seed, range(8), (1,), 1).flatten(), 4, job.run.flow))
        return torch.zeros_like(x)  # of 4 tokens, by which the times are shifted

    monkeypatch.setattr("layerdecomp.training.inpainter.predict_velocity", velocity)
    assert job.loss({**batch, "position": [*range(8)]})["loss"] > 0


def test_an_inpainter_continues_a_base(tmp_path: Path, tiny_weights: Path) -> None:
    first = f"{tiny_weights}/transformer.safetensors"
    model = asdict(load_mmdit(first).config)
    settings = [*SMALL, f"weights.autoencoder={tiny_weights}/autoencoder.safetensors", "latent_cache=null"]
    settings += [f"transformer={first}", "sample.steps=1", "train.steps=1", "optim.lr=1e-9", f"run_dir={tmp_path}/run"]
    described = [f"model.{name}={value}" for name, value in model.items()]
    run("tiny_inpainter", *settings, *described)
    continued = tmp_path / "run" / "transformer.safetensors"
    before, after = load_file(first), load_file(continued)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name].float(), tensor.float(), rtol=0, atol=1e-2, msg=name)
    assert [stage["sha256"] for stage in history(continued)[:1]] == [file_sha256(Path(first))]
    with pytest.raises(InputError, match=rf"transformer=.* has model.depth={model['depth']}; found 7, set"):
        InpainterJob(
            load_config(REPOSITORY / "configs" / "tiny_inpainter.yaml", [*settings, *described, "model.depth=7"])
        )


def test_training_without_lora_is_logged(overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, "lora.targets=[]"]))
    assert "lora.targets is empty: no layer gets LoRA; only img_in" in caplog.text
    assert not any("lora" in name for name in job.decomposer.adapter({}).tensors)


def test_global_random_numbers_depend_on_the_position_and_differ_from_the_noise(overrides: list[str]) -> None:
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, "seed=3"]))
    drawn = []
    for position in (5, 5, 6):
        job.on_train_batch_start({"position": [position], "faults": []}, 0)
        drawn.append(torch.randn(4))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert not any(drawn[0].equal(seeded_normal(3, [5], (4,), stream)[0]) for stream in (0, 1))


def test_the_loss_of_an_adapter_training_equals_its_definition(overrides: list[str]) -> None:
    settings = ["seed=3", "training_guidance=4.5", "flow.logit_mean=0.4", "train.precision=32-true"]
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", [*overrides, *settings]))
    z, velocity = torch.randn(2, 2, 8, 64)
    noise, normal = seeded_normal(3, [7, 9], (8, 64)), seeded_normal(3, [7, 9], (1,), stream=1)
    t = sample_times(normal.flatten(), 4, job.run.flow)
    latents = {"z": z, "cond": torch.randn(2, 4, 16, 4, 4), "mask": torch.rand(2, 1, 32, 32) > 0.5}
    present = {"cues_present": torch.ones(2, 3, dtype=torch.bool)}
    with mock.patch.object(job.decomposer.transformer, "forward", return_value=velocity) as forward:
        found = job.flow_losses(latents | present, [7, 9])
    inputs = forward.call_args.kwargs
    torch.testing.assert_close(inputs["img"][..., :64], z + t[:, None, None] * (noise - z))
    assert inputs["timesteps"].equal(t) and inputs["guidance"].tolist() == [4.5, 4.5]
    errors = (velocity - (noise - z)).square()
    parts = {"loss": errors, "background": errors[:, :4], "foreground": errors[:, 4:]}
    torch.testing.assert_close(found, {name: part.mean() for name, part in parts.items()})


def test_cpu_does_not_move_a_job(overrides: list[str]) -> None:
    job = DecomposerJob(load_config(REPOSITORY / "configs" / "tiny.yaml", overrides)).to("meta")
    job.cpu()  # Lightning calls it after a validation
    assert job.device.type == "meta" and all(parameter.is_meta for parameter in job.parameters())


def test_a_dry_run_prints_its_estimate_and_writes_nothing(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*overrides, f"run_dir={tmp_path}/run", "train.dry_run=true", "data.scenes.size=32", "recompute=1"]
    small += ["train.precision=auto"]
    run("tiny", *small)
    output = capsys.readouterr().out
    model = load_mmdit(overrides[0].partition("=")[2])
    frozen = sum(p.numel() for name, p in model.named_parameters() if "img_in" not in name)
    assert re.search(rf"transformer, frozen \| +{frozen:,} ", output) and "1 + 1 blocks of width 32" in output
    assert "no file is missing" in output and re.search(r"total +\| +\d", output)
    with pytest.raises(InputError, match="train.dry_run counts a decomposer job; found job=autoencoder"):
        run("tiny_autoencoder", *SMALL, "train.dry_run=true", f"run_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()
