"""Checkpoints: exact resume from any step in every job, damaged and half-written files, and signals."""

import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PowerCutError, as_ranks, become_rank, curve, run, same
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

from layerdecomp.config import load_config
from layerdecomp.data.datamodule import SampleData
from layerdecomp.errors import InputError, RunError
from layerdecomp.training import checkpoints
from layerdecomp.training.autoencoder import AutoencoderJob
from layerdecomp.training.base import Job
from layerdecomp.training.checkpoints import (
    DAMAGED,
    LAST,
    PREVIOUS,
    CheckpointFiles,
    newest_checkpoint,
    on_host,
    read_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("data.scenes.size=32", "data.validation=2", "data.workers=0", "evaluate.samples=2"),
    *("train.batch_size=2", "train.precision=32-true", "train.steps=5", "optim.lr=1e-2", "optim.warmup=2"),
]
AUTOENCODER = ["model.ch=8", "model.ch_mult=[1,1,2,2]", "model.norm_groups=4"]
INPAINTER = [
    *("model.hidden_size=32", "model.num_heads=2", "model.axes_dim=[4,6,6]", "model.depth=1"),
    *("model.depth_single_blocks=1", "sample.steps=1"),
]
RESULTS = {"tiny": "adapter", "tiny_autoencoder": "autoencoder", "tiny_inpainter": "transformer"}


@pytest.fixture
def jobs(tiny_overrides: list[str], tiny_weights: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Overrides for the smallest run of every job, by config; one repeats cached samples."""
    cached = [f"weights.autoencoder={tiny_weights}/autoencoder.safetensors", f"latent_cache={tmp_path}/latents"]
    return {
        "tiny": [*tiny_overrides, *SMALL, "sample.steps=1"],
        "tiny_autoencoder": [*SMALL, *AUTOENCODER],
        "tiny_inpainter": [*SMALL, *INPAINTER, *cached, "data.samples=6"],
    }


def result(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"{RESULTS[name]}.safetensors")


def call_at(monkeypatch: pytest.MonkeyPatch, step: int, batch: int, act: Callable[[], None]) -> None:
    """Calls `act` before the loss of a batch (the index within its step) is computed, after `step` steps."""
    original = Job.training_step

    def failing(self: Job, found: dict[str, Any], index: int) -> torch.Tensor:
        if self.global_step == step and index % self.trainer.accumulate_grad_batches == batch:
            act()
        return original(self, found, index)

    monkeypatch.setattr(Job, "training_step", failing)


def power_cut() -> None:
    raise PowerCutError


@pytest.mark.parametrize(
    ("name", "step", "batch"),
    [("tiny", 1, 0), ("tiny", 3, 1), ("tiny", 4, 0), ("tiny_autoencoder", 2, 1), ("tiny_inpainter", 3, 1)],
)
def test_every_job_resumes_exactly_from_any_step(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, name: str, step: int, batch: int
) -> None:
    settings = [*jobs[name], "train.accumulate=2", "data.samples=7", "train.checkpoint_every=1"]  # 7: several epochs
    straight = run(name, *settings, f"run_dir={tmp_path}/straight", "train.validate_every=2")
    resumed = [*settings, f"run_dir={tmp_path}/resumed", "train.validate_every=2"]
    with monkeypatch.context() as patch:
        call_at(patch, step, batch, power_cut)
        with pytest.raises(PowerCutError):
            run(name, *resumed)
    assert read_checkpoint(tmp_path / "resumed" / LAST)["global_step"] == step
    run(name, *resumed, "data.workers=1")
    assert same(result(straight, name), result(tmp_path / "resumed", name))
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert curve(straight, tag) == curve(tmp_path / "resumed", tag) and len(curve(straight, tag)) == 5
    first, last = (torch.load(tmp_path / part / LAST, weights_only=True) for part in ("straight", "resumed"))
    assert str(first["optimizer_states"]) == str(last["optimizer_states"])
    assert first["lr_schedulers"] == last["lr_schedulers"] and first["global_step"] == last["global_step"]


def test_a_resumed_run_repeats_its_random_draws(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Job.on_train_batch_start

    def noisy(self: Job, batch: dict[str, Any], index: int) -> None:
        original(self, batch, index)
        batch["image"] = batch["image"] + 0.1 * torch.randn(batch["image"].shape)

    monkeypatch.setattr(Job, "on_train_batch_start", noisy)
    settings = [*jobs["tiny"], "train.checkpoint_every=2", "train.steps=4"]
    straight = run("tiny", *settings, f"run_dir={tmp_path}/straight")
    with monkeypatch.context() as patch:
        call_at(patch, 3, 0, power_cut)
        with pytest.raises(PowerCutError):
            run("tiny", *settings, f"run_dir={tmp_path}/resumed")
    torch.rand(7)
    assert same(result(straight, "tiny"), result(run("tiny", *settings, f"run_dir={tmp_path}/resumed"), "tiny"))


def test_an_interrupted_validation_is_repeated_on_resume(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*jobs["tiny_autoencoder"], "train.steps=4", "train.validate_every=2", "train.checkpoint_every=9"]
    straight = run("tiny_autoencoder", *settings, f"run_dir={tmp_path}/straight")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "on_validation_start", lambda self: power_cut() if self.global_step else None)
        with pytest.raises(PowerCutError):
            run("tiny_autoencoder", *settings, f"run_dir={tmp_path}/resumed")
    resumed = run("tiny_autoencoder", *settings, f"run_dir={tmp_path}/resumed")
    for tag in ("train/loss", "validation/psnr"):
        assert curve(straight, tag) == curve(resumed, tag)
    assert list(curve(straight, "validation/psnr")) == [0, 1, 3]  # before the first step and after every second one


@pytest.mark.parametrize("split", [["train.batch_size=1", "train.accumulate=4"], ["train.batch_size=4"]])
def test_a_run_resumes_with_another_split_of_its_global_batch(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, split: list[str]
) -> None:
    settings = [*jobs["tiny"], "train.checkpoint_every=1", "train.validate_every=2"]
    half = ["train.batch_size=2", "train.accumulate=2"]
    straight = run("tiny", *settings, *half, f"run_dir={tmp_path}/straight")
    with monkeypatch.context() as patch:
        call_at(patch, 2, 1, power_cut)
        with pytest.raises(PowerCutError):
            run("tiny", *settings, *half, f"run_dir={tmp_path}/resumed")
    seen: list[list[int]] = []
    original = Job.training_step

    def watching(self: Job, batch: dict[str, Any], index: int) -> torch.Tensor:
        seen.append(batch["position"])
        return original(self, batch, index)

    monkeypatch.setattr(Job, "training_step", watching)
    resumed = run("tiny", *settings, *split, f"run_dir={tmp_path}/resumed")
    assert sum(seen, []) == list(range(8, 20))
    for step, loss in curve(straight).items():
        assert curve(resumed)[step] == pytest.approx(loss, rel=1e-4)


def test_rerunning_a_finished_run_changes_nothing(tmp_path: Path, jobs: dict[str, list[str]]) -> None:
    settings = [*jobs["tiny"], "train.steps=2", "train.checkpoint_every=1", f"run_dir={tmp_path}/run"]
    run_dir = run("tiny", *settings)
    before, trained = {name: (run_dir / name).read_bytes() for name in (LAST, PREVIOUS)}, result(run_dir, "tiny")
    run("tiny", *settings)
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert same(result(run_dir, "tiny"), trained)


# Without this package's Trainer


def fit(overrides: list[str], resume: Path | None = None, **settings: Any) -> tuple[Trainer, AutoencoderJob]:
    """Trains an autoencoder with a Trainer of the caller's settings."""
    config = load_config(ROOT / "configs" / "tiny_autoencoder.yaml", overrides)
    data = SampleData(config.data, seed=0, steps=config.train.steps, batch_size=2, with_cues=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    fixed = {"accelerator": "cpu", "max_steps": config.train.steps, "use_distributed_sampler": False}
    trainer, job = Trainer(**quiet, **fixed, limit_val_batches=0, **settings), AutoencoderJob(config)  # type: ignore[arg-type]
    trainer.fit(job, data, ckpt_path=resume, weights_only=True)
    return trainer, job


def test_a_trainer_of_ones_own_resumes_exactly_with_its_own_accumulation(
    tmp_path: Path, jobs: dict[str, list[str]]
) -> None:
    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "logger": False}
    _, straight = fit(jobs["tiny_autoencoder"], callbacks=[saving("straight")], **settings)
    checkpoint = tmp_path / "straight" / "step=3.ckpt"
    trainer, resumed = fit(jobs["tiny_autoencoder"], checkpoint, callbacks=[saving("resumed")], **settings)
    assert trainer.global_step == 5 and same(straight.state_dict(), resumed.state_dict())


def test_every_logger_of_a_trainer_of_ones_own_gets_every_step(tmp_path: Path, jobs: dict[str, list[str]]) -> None:
    loggers = [TensorBoardLogger(tmp_path, name, version="") for name in ("one", "two")]
    fit(jobs["tiny_autoencoder"], logger=loggers, enable_checkpointing=False, log_every_n_steps=1)
    assert list(curve(tmp_path / "one")) == list(range(5)) and curve(tmp_path / "one") == curve(tmp_path / "two")


def test_a_checkpoint_is_loaded_without_a_trainer(tmp_path: Path, jobs: dict[str, list[str]]) -> None:
    run_dir = run("tiny_autoencoder", *jobs["tiny_autoencoder"], "train.steps=1", f"run_dir={tmp_path}/run")
    config = load_config(run_dir / "config.yaml")
    job = AutoencoderJob.load_from_checkpoint(run_dir / LAST, config=config, weights_only=True)
    assert same(job.state_dict(), read_checkpoint(run_dir / LAST)["state_dict"])


# Files


def _state(step: int) -> dict[str, Any]:
    values = torch.randn(64, 65, generator=torch.Generator().manual_seed(step))
    return {"global_step": step, "state_dict": {"a": values, "b": torch.arange(step)}, "loops": {}}


def _save(folder: Path, *steps: int) -> None:
    files = CheckpointFiles()
    for step in steps:
        files.save_checkpoint(_state(step), folder / LAST)
    files.wait()


def test_the_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    _save(tmp_path, 1, 2, 3)
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 3
    assert read_checkpoint(tmp_path / PREVIOUS)["global_step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    _save(tmp_path, 1, 2)
    assert calls == ["sync", "rename", "sync", "sync", "rename", "rename", "sync"]  # the file, then its folder


def test_resume_loads_the_previous_checkpoint_if_the_last_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, 2)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-3000])
    assert newest_checkpoint(tmp_path) == tmp_path / PREVIOUS
    assert re.search(r"last\.ckpt .*is damaged.*resuming from the previous one, .*previous\.ckpt", caplog.text)
    assert (tmp_path / DAMAGED).is_file()  # moved away, so that it does not become the previous one
    _save(tmp_path, 2)
    assert read_checkpoint(tmp_path / PREVIOUS)["global_step"] == 1
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"last\.ckpt .*damaged.*previous\.ckpt .*damaged.*resume=never"):
        newest_checkpoint(tmp_path)


def test_every_bit_flip_is_detected_or_harmless(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    whole, expected, rng = (tmp_path / LAST).read_bytes(), _state(5), random.Random(0)
    detected = 0
    for _ in range(300):
        place = rng.randrange(len(whole))
        corrupted = bytes([*whole[:place], whole[place] ^ (1 << rng.randrange(8)), *whole[place + 1 :]])
        (tmp_path / "corrupted.ckpt").write_bytes(corrupted)
        try:
            found = read_checkpoint(tmp_path / "corrupted.ckpt")
        except InputError:
            detected += 1
        else:  # the byte is padding between records
            assert same(found["state_dict"], expected["state_dict"]) and found["global_step"] == 5
    assert detected > 200


def test_loading_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"global_step": 1, "state_dict": Attack()}, tmp_path / LAST)
    with pytest.raises(InputError, match="not a checkpoint of this package"):
        read_checkpoint(tmp_path / LAST)
    assert not (tmp_path / "owned").exists()
    torch.save({"weights": torch.zeros(1)}, tmp_path / LAST)  # of another program
    with pytest.raises(InputError, match="not a checkpoint of this package"):
        read_checkpoint(tmp_path / LAST)


def test_a_full_disk_leaves_the_existing_checkpoint_intact(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # no file may grow beyond 10 kB
    try:
        with pytest.raises(RunError, match=r"step 2 could not be saved \(.*File too large.*allow larger files in"):
            _save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 1


# Background writes


class Gate:
    """Blocks every write before its first byte until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.held = threading.Event(), threading.Event()
        self.at_once = self.most_at_once = 0
        original = checkpoints._write

        def write(path: Path, checkpoint: dict[str, Any], still_wanted: Callable[[], None]) -> None:
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
            self.held.set()
            while not self.opened.wait(0.01):
                still_wanted()
            original(path, checkpoint, still_wanted)
            self.at_once -= 1

        monkeypatch.setattr(checkpoints, "_write", write)

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.opened.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def written(checkpoint: dict[str, Any]) -> bytes:
    """The bytes of a file that is written synchronously."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def values(file: bytes) -> bytes:
    """The contents of a file, serialised again so that shared objects make no difference."""
    return written(on_host(torch.load(io.BytesIO(file), weights_only=True)))


@pytest.mark.parametrize("optimizer", ["optim.muon=true", "optim.muon=false", "optim.bits=8"])
def test_a_checkpoint_excludes_steps_made_while_it_is_written(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, gate: Gate, optimizer: str
) -> None:
    expected: list[bytes] = []
    original = CheckpointFiles.save_checkpoint

    def save(self: CheckpointFiles, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        expected.append(written(checkpoint))
        original(self, checkpoint, path)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", save)
    # The first write is blocked during a validation, which swaps in the averages, and a step.
    call_at(monkeypatch, 3, 0, gate.opened.set)
    settings = [*jobs["tiny"], "optim.muon=false", optimizer, "lora.rank=256", "train.ema=0.9", "train.steps=4"]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its optimizer, which takes minutes
        run_dir = run("tiny", *settings, "train.validate_every=2", f"run_dir={tmp_path}/run")
    found = [values((run_dir / name).read_bytes()) for name in (PREVIOUS, LAST)]
    assert [values(file) for file in expected] == found and found[0] != found[1]
    assert read_checkpoint(run_dir / PREVIOUS)["global_step"] == 2


def test_on_host_copies_values() -> None:
    """Tensors in containers of any kind are copied, and numbers in containers do not change either."""
    whole = torch.arange(6.0)
    state = {"part": whole[2:4], "counts": {"step": 1}, "listed": [whole.view(2, 3).T]}
    copied = on_host(state)
    whole.zero_()
    state["counts"]["step"] = 2  # type: ignore[call-overload]
    assert copied["part"].tolist() == [2, 3] and copied["listed"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["counts"] == {"step": 1} and copied["listed"][0].stride() == state["listed"][0].stride()  # type: ignore[index]


def test_one_checkpoint_is_written_at_a_time(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SLOW_SAVE", 0.2)
    files, began = CheckpointFiles(), time.monotonic()
    files.save_checkpoint(_state(1), tmp_path / LAST)
    assert not (tmp_path / LAST).exists()
    gate.open_after(0.5)
    files.save_checkpoint(_state(2), tmp_path / LAST)
    assert time.monotonic() - began > 0.5 and read_checkpoint(tmp_path / LAST)["global_step"] == 1
    assert "step 2 was saved 1 s late" in caplog.text
    files.save_checkpoint(_state(3), tmp_path / LAST)
    files.wait()
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 3
    assert gate.most_at_once == 1 and caplog.text.count("late") == 1


def test_an_abandoned_write_leaves_the_existing_checkpoints_intact(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.opened.set()
    _save(tmp_path, 1, 2)
    gate.opened.clear()
    before, files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, CheckpointFiles()
    files.save_checkpoint(_state(3), tmp_path / LAST)
    gate.held.wait(10)
    began = time.monotonic()
    files.give_up(after=0.2)
    assert 0.2 < time.monotonic() - began < 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "the last checkpoint was still being written and is discarded" in caplog.text
    files.check()  # already reported
    gate.opened.set()
    files.save_checkpoint(_state(4), tmp_path / LAST)
    files.give_up(after=10)  # long enough
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 4


def test_giving_up_does_not_separate_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    renamed: list[float] = []
    original = os.replace

    def slow(*names: Path) -> None:
        original(*names)
        renamed.append(time.monotonic())
        time.sleep(1.5)  # longer than give_up takes

    monkeypatch.setattr(os, "replace", slow)
    files = CheckpointFiles()
    files.save_checkpoint(_state(2), tmp_path / LAST)
    while not renamed:
        time.sleep(0.01)
    files.give_up(after=0.0)
    assert [read_checkpoint(tmp_path / name)["global_step"] for name in (LAST, PREVIOUS)] == [2, 1]


def test_the_interpreter_exits_only_after_a_checkpoint_is_written(tmp_path: Path) -> None:
    program = f"""
import torch
from layerdecomp.training.checkpoints import CheckpointFiles
state = {{"global_step": 1, "state_dict": {{str(i): torch.zeros(10_000_000) for i in range(5)}}}}
CheckpointFiles().save_checkpoint(state, {str(tmp_path / LAST)!r})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and not ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [LAST] and read_checkpoint(tmp_path / LAST)["global_step"] == 1


def test_an_error_ends_the_run_only_after_a_checkpoint_is_written(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    def open_soon() -> None:
        gate.open_after(checkpoints.GRACE_AMONG_RANKS + 0.5)
        power_cut()

    call_at(monkeypatch, 2, 0, open_soon)
    with pytest.raises(PowerCutError):
        run("tiny", *jobs["tiny"], "train.checkpoint_every=2", f"run_dir={tmp_path}/run")
    assert gate.opened.is_set() and read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2


@pytest.mark.parametrize("validating", [False, True])
def test_a_run_stopped_by_a_signal_waits_for_its_checkpoint(
    tmp_path: Path,
    jobs: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gate: Gate,
    validating: bool,
) -> None:
    monkeypatch.setattr(checkpoints, "GRACE", 0.0)  # for errors only

    def send_sigterm() -> None:
        gate.open_after(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if validating:
        monkeypatch.setattr(Job, "on_validation_start", lambda self: send_sigterm() if self.global_step else None)
    else:
        call_at(monkeypatch, 1, 0, send_sigterm)
    settings = [*jobs["tiny"], "train.checkpoint_every=9", "train.validate_every=2", f"run_dir={tmp_path}/run"]
    with pytest.raises(SystemExit):
        run("tiny", *settings)
    assert gate.opened.is_set() and read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err


# Signals


@pytest.mark.parametrize("reason", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(
    tmp_path: Path,
    jobs: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    reason: signal.Signals,
) -> None:
    settings = [*jobs["tiny"], "train.accumulate=2", f"run_dir={tmp_path}/run"]
    monkeypatch.setattr(
        sys, "argv", ["tools/train.py", "config=configs/tiny.yaml", "resume=never", "optim.betas=[0, 1]"]
    )
    with monkeypatch.context() as patch:
        call_at(patch, 2, 0, lambda: os.kill(os.getpid(), reason))
        with pytest.raises(SystemExit) as stopped:
            run("tiny", *settings, "resume=never")
    assert stopped.value.code == 128 + reason
    printed = capfd.readouterr().err
    assert f"stopped by {reason.name} after step 3; resume with" in printed
    assert "python tools/train.py config=configs/tiny.yaml 'optim.betas=[0, 1]' resume=auto" in printed
    assert ("Ctrl-C again stops at once" in printed) is (reason == signal.SIGINT)
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 3
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None)  # restored
    straight = run("tiny", *settings[:-1], f"run_dir={tmp_path}/straight")
    assert same(result(run("tiny", *settings), "tiny"), result(straight, "tiny"))


def test_a_second_interrupt_stops_at_once_and_prints_how_to_resume(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # for Python to handle it

    monkeypatch.setattr(sys, "argv", ["tools/train.py", "resume=never"])
    with monkeypatch.context() as patch:
        call_at(patch, 3, 0, twice)
        with pytest.raises(SystemExit) as stopped:
            run("tiny", *jobs["tiny"], "train.checkpoint_every=2", "resume=never", f"run_dir={tmp_path}/run")
    assert stopped.value.code == 128 + signal.SIGINT
    printed = capfd.readouterr().err
    assert "interrupted; " in printed and printed.rstrip().endswith("python tools/train.py resume=auto")
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2, "expected to lose only the step in progress"


@pytest.mark.parametrize(("validation", "saved"), [(0, None), (1, 2)])
def test_a_signal_during_validation_stops_at_once(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, validation: int, saved: int | None
) -> None:
    settings = [*jobs["tiny"], "train.validate_every=2", "train.checkpoint_every=9", f"run_dir={tmp_path}/run"]
    begun: list[int] = []

    def begin(job: Job) -> None:
        begun.append(job.global_step)
        if len(begun) == validation + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Job, "on_validation_start", begin)
    with pytest.raises(SystemExit) as stopped:
        run("tiny", *settings)
    assert stopped.value.code == 128 + signal.SIGTERM and begun == [0, 2][: validation + 1]
    newest = newest_checkpoint(tmp_path / "run")
    assert (newest and read_checkpoint(newest)["global_step"]) == saved


def test_a_run_without_checkpoints_is_resumed_from_the_file_it_was_given(
    tmp_path: Path, jobs: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*jobs["tiny"], "train.validate_every=2", "train.checkpoint_every=9", "train.steps=4"]
    straight = run("tiny", *settings, f"run_dir={tmp_path}/straight")
    branch = f"resume={straight / PREVIOUS}"  # of step 2, so that it begins with a validation
    settings.append(f"run_dir={tmp_path}/branch")

    def send_sigterm() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped(*resume: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tools/train.py", *resume])
        with pytest.raises(SystemExit):
            run("tiny", *settings, *resume)
        return capsys.readouterr().err.splitlines()[-1].strip()

    with monkeypatch.context() as patch:
        patch.setattr(Job, "on_validation_start", lambda self: send_sigterm() if self.global_step else None)
        assert stopped(branch).endswith(f"python tools/train.py {branch}")
    with monkeypatch.context() as patch:
        call_at(patch, 2, 0, send_sigterm)
        assert stopped(branch).endswith("python tools/train.py resume=auto")
    resumed = run("tiny", *settings, "resume=auto")
    assert same(result(resumed, "tiny"), result(straight, "tiny"))


# Two processes


def _train_as(rank: int, port: int, settings: list[str], log: Path, kill_at: int | None) -> None:
    become_rank(rank, port)
    if kill_at is not None and rank == 1:
        call_at(pytest.MonkeyPatch(), kill_at, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with log.open("a") as file, redirect_stdout(file):
        run("tiny", *settings)


def test_two_processes_resume_bit_for_bit_after_one_is_killed(tmp_path: Path, jobs: dict[str, list[str]]) -> None:
    split = ["train.devices=2", "train.strategy=ddp", "train.batch_size=1", "train.accumulate=2"]
    settings = [*jobs["tiny"], *split, "train.checkpoint_every=2", "train.validate_every=4"]
    for name, kill_at in (("straight", None), ("resumed", 3), ("resumed", None)):
        codes = as_ranks(_train_as, [*settings, f"run_dir={tmp_path}/{name}"], tmp_path / "log", kill_at)
        assert codes == ([1, -signal.SIGKILL] if kill_at else [0, 0])
    assert (tmp_path / "log").read_text().count("resuming from") == 1  # by rank 0 only
    assert same(result(tmp_path / "straight", "tiny"), result(tmp_path / "resumed", "tiny"))
    one = run("tiny", *jobs["tiny"], "train.batch_size=4", f"run_dir={tmp_path}/one")
    assert list(curve(one).values()) == pytest.approx(list(curve(tmp_path / "straight").values()), rel=1e-4)
    # one process resumes the two-process run
    curves = shutil.ignore_patterns("events*")  # whose values depend on the order of summation
    shutil.copytree(tmp_path / "straight", tmp_path / "moved", ignore=curves)
    (tmp_path / "moved" / LAST).unlink()  # the previous one is of step 4
    alone = run(
        "tiny", *settings, "train.devices=1", "train.batch_size=4", "train.accumulate=1", f"run_dir={tmp_path}/moved"
    )
    assert curve(alone)[4] == pytest.approx(curve(tmp_path / "straight")[4], rel=1e-4)


def _train_on_slurm(rank: int, port: int, settings: list[str], seen_at: int) -> None:
    """A task of a SLURM job, according to its environment; only the second task gets SLURM's signal."""
    torch.set_num_threads(1)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NNODES": "1", "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    task = {**job, "STEP_NUM_TASKS": "2", "PROCID": str(rank), "LOCALID": str(rank)}
    os.environ.update({f"SLURM_{name}": value for name, value in task.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": ""})  # no scontrol
    if rank == 1:
        call_at(pytest.MonkeyPatch(), seen_at, 0, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    run("tiny", *settings)


@pytest.mark.parametrize(
    ("validate_every", "seen_at", "stopped_at"),
    [
        (5, 2, 4),  # the other task learns of the signal a step later, since steps do not wait for it
        (3, 2, 3),  # before the validation
        (5, 4, 5),  # in the last step
    ],
)
def test_the_tasks_of_a_slurm_job_stop_after_the_same_step(
    tmp_path: Path, jobs: dict[str, list[str]], validate_every: int, seen_at: int, stopped_at: int
) -> None:
    settings = [*jobs["tiny"], "train.devices=2", "train.strategy=ddp", "train.batch_size=1", f"run_dir={tmp_path}/run"]
    settings += ["train.checkpoint_every=9", f"train.validate_every={validate_every}"]
    codes = as_ranks(_train_on_slurm, settings, seen_at)
    assert codes == [128 + signal.SIGUSR1, 0]
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == [LAST], "expected no checkpoint of Lightning's own"
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == stopped_at
    assert not (tmp_path / "run" / PREVIOUS).exists()
