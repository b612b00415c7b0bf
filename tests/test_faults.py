"""Faults during training: non-finite values, unreadable files, full memory and disks, dead workers and ranks."""

import errno
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import alone, run
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from layerdecomp.cli import run_command
from layerdecomp.config import load_config
from layerdecomp.data.datamodule import RepeatedSamples
from layerdecomp.errors import InputError, RunError
from layerdecomp.training import checkpoints
from layerdecomp.training.base import Job
from layerdecomp.training.checkpoints import LAST, read_checkpoint
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.faults import (
    FaultCount,
    StepGuard,
    command_to_continue,
    end_with_parent,
    fitting_settings,
    nan_if_not_finite,
    readable_errors,
)
from layerdecomp.training.runs import StepBar, build_job, build_trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["train.precision=32-true", "optim.lr=1e-2", "optim.warmup=0", "sample.steps=1", "evaluate.samples=1"]


@pytest.fixture
def overrides(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    return [*tiny_overrides, *SMALL, "train.steps=6", "train.checkpoint_every=1", f"run_dir={tmp_path}/run"]


def scale_loss(monkeypatch: pytest.MonkeyPatch, positions: set[int], factor: float = math.nan) -> None:
    """Multiplies the loss of every batch that contains one of `positions`."""
    original = DecomposerJob.loss

    def loss(self: DecomposerJob, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = original(self, batch)
        return {**losses, "loss": losses["loss"] * factor} if positions & set(batch["position"]) else losses

    monkeypatch.setattr(DecomposerJob, "loss", loss)


# Non-finite values


def test_nan_if_not_finite_leaves_a_finite_loss_unchanged() -> None:
    for value in (1.5, -2.0, 0.0, 1e38):
        x = torch.tensor(value, requires_grad=True)
        nan_if_not_finite(x * 2).backward()
        assert x.grad is not None and x.grad.item() == 2
    for value in (math.inf, -math.inf, math.nan):
        x = torch.tensor(1.0, requires_grad=True)
        nan_if_not_finite(x * 0 + value).backward()  # the loss is not finite, its gradient is
        assert x.grad is not None and x.grad.isnan()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("muon", ["true", "false"])  # AdamW skips the step by itself; the host learns of it later
def test_a_step_with_a_non_finite_loss_changes_no_weights_and_names_its_sample(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, factor: float, muon: str
) -> None:
    weights: list[dict[str, Tensor]] = []
    original = Job.training_step

    def recording(self: Job, batch: dict[str, Any], index: int) -> Tensor:
        weights.append({name: value.detach().clone() for name, value in self.trained()})
        return original(self, batch, index)

    monkeypatch.setattr(Job, "training_step", recording)
    scale_loss(monkeypatch, {5}, factor)  # step 3 has positions 4 and 5
    run_dir = run("tiny", *overrides, f"optim.muon={muon}", "train.checkpoint_every=6")
    assert re.findall(r"step (\d+) is skipped: its (\w+) is not finite; samples: (.*)", caplog.text) == [
        ("3", "loss", "5 (scene 5)")
    ]
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [True, True, False, True, True]
    checkpoint = read_checkpoint(run_dir / LAST)
    assert checkpoint["skipped_steps"] == 1 and checkpoint["global_step"] == 6


def test_a_step_with_a_non_finite_gradient_is_skipped(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Job.configure_gradient_clipping

    def overflowing(self: Job, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        if self.global_step == 1:
            optimizer.param_groups[0]["params"][0].grad[0] = math.inf
        original(self, optimizer, *args, **kwargs)

    monkeypatch.setattr(Job, "configure_gradient_clipping", overflowing)
    run("tiny", *overrides, "train.steps=3")
    assert "step 2 is skipped: its gradient is not finite; samples: 2 (scene 2); 3 (scene 3)" in caplog.text


@pytest.mark.parametrize("muon", ["true", "false"])
def test_training_stops_after_consecutive_skipped_steps_and_keeps_the_last_good_checkpoint(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, muon: str
) -> None:
    scale_loss(monkeypatch, set(range(5, 100)))
    with pytest.raises(RunError, match=r"3 steps in a row, up to step 5, had a loss .* resume=FILE; .*run keeps what"):
        run("tiny", *overrides, "train.max_skipped=3", f"optim.muon={muon}")
    assert caplog.text.count("is skipped") == 3
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2  # skipped steps are not saved


def test_non_finite_weights_are_not_saved(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def overflow(self: StepBar, trainer: Any, job: Job, *outputs: Any) -> None:
        if job.global_step == 2:
            next(job.trained())[1].data.fill_(math.inf)

    monkeypatch.setattr(StepBar, "on_train_batch_end", overflow)  # runs before the callback that saves
    with pytest.raises(RunError, match="5 steps in a row, up to step 7"):
        run("tiny", *overrides, "train.steps=9")
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 1


def test_a_good_step_resets_the_count_of_skipped_steps() -> None:
    guard, names = StepGuard(limit=2), lambda positions: [str(position) for position in positions]
    for norm in (math.nan, 1.0, math.inf, 1.0, math.nan):
        guard.note([1], torch.tensor(1.0))
        assert guard.judge(torch.tensor(norm), 1, names) is math.isfinite(norm)
    assert (guard.skipped, guard.in_a_row) == (3, 1)
    with pytest.raises(RunError, match="2 steps in a row"):
        guard.judge(torch.tensor(math.nan), 2, names)


def test_found_inf_makes_a_fused_optimizer_skip_the_step() -> None:
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    states = []
    for scale in (1.0, math.nan, 1.0):
        layer.weight.grad, layer.bias.grad = torch.full((1, 3), scale), torch.full((1,), scale)
        optimizer.found_inf = (~torch.tensor(scale).isfinite()).float()
        optimizer.step()
        kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
        states.append([tensor.clone() for tensor in (*layer.parameters(), *kept)])
    assert all(a.equal(b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(a.equal(b) for a, b in zip(states[1], states[2], strict=True))


def test_judge_later_judges_a_step_at_the_next_one() -> None:
    guard, names = StepGuard(limit=2), lambda positions: [str(position) for position in positions]
    for step, (norm, skipped) in enumerate([(math.nan, 0), (1.0, 1), (math.inf, 1)], 1):
        guard.note([step], torch.tensor(norm))
        guard.judge_later(torch.tensor(norm), step, names)
        assert guard.skipped == skipped
    assert not guard.settle(names) and guard.skipped == 2
    assert not guard.settle(names) and guard.skipped == 2, "judged once"


@pytest.mark.parametrize(("own", "elsewhere", "named"), [(1.0, 1.0, []), (1.0, 0.0, [[5]]), (math.nan, 2.0, [[5]])])
def test_a_rank_names_only_its_own_culprits(
    own: float,
    elsewhere: float,
    named: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("layerdecomp.training.faults.all_reduce_sum", lambda values: values + elsewhere)
    asked: list[Sequence[int]] = []

    def names(positions: Sequence[int]) -> list[str]:
        asked.append(positions)  # on every rank: with a sharded base, the others compute together
        return [str(position) for position in positions]

    guard = StepGuard(limit=2)
    guard.note([5], torch.tensor(own))
    assert not guard.judge(torch.tensor(math.nan), 1, names) and guard.skipped == 1
    assert asked == (named or [[]]) and len(caplog.messages) == len(named)


# Unreadable samples


def make_unreadable(monkeypatch: pytest.MonkeyPatch, positions: set[int]) -> None:
    original = RepeatedSamples.__getitem__

    def get(self: RepeatedSamples, position: int) -> dict[str, Any]:
        faults = [f"/data/{position}.png cannot be read"] if position in positions else []
        return {**original(self, position), "faults": faults}

    monkeypatch.setattr(RepeatedSamples, "__getitem__", get)


def test_unreadable_samples_are_logged_and_counted(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_unreadable(monkeypatch, {1, 4})
    run("tiny", *overrides, "train.steps=3", "data.workers=1")
    assert re.findall(r"replaced by the next draw \((\d+) so far\): (\S+)", caplog.text) == [
        ("1", "/data/1.png"),
        ("2", "/data/4.png"),
    ]
    caplog.clear()
    with pytest.raises(RunError, match=r"2 of 6 training samples could not be read, more than data\.max_faulty=0\.001"):
        run("tiny", *overrides, "train.steps=3", "data.max_faulty=0.001", "resume=never")


def test_too_large_a_share_of_unreadable_samples_is_an_error() -> None:
    count = FaultCount(0.01)
    for _ in range(10):
        count.note([["a fault"]])
    with pytest.raises(RunError, match="11 of 11"):
        count.note([["another"]])
    count = FaultCount(0.01)
    for _ in range(30):  # one in a hundred is allowed
        count.note([["a fault"], *([[]] * 99)])
    assert (count.seen, count.faulty) == (3000, 30)


class AllUnreadable:
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 10

    def draw(self, index: int, attempt: int = 0) -> dict[str, Any]:
        raise InputError(f"/data/{index}.{attempt}.png cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_readable_file_is_an_error(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def unreadable(self: RepeatedSamples, samples: Any, cache: None) -> None:
        self.samples, self.cache = AllUnreadable(samples), cache

    monkeypatch.setattr(RepeatedSamples, "__init__", unreadable)
    with pytest.raises(InputError) as caught:
        run("tiny", *overrides, f"data.workers={workers}")
    message = "16 draws in a row for sample 0 cannot be used; the last: /data/0.15.png cannot be read"
    assert str(caught.value) == message


# Disk and memory


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space in"), (errno.EROFS, "make .* writable")]
)
def test_a_failed_checkpoint_write_is_an_error_with_a_remedy(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, remedy: str
) -> None:
    original = os.fsync
    calls: list[int] = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:  # two per checkpoint
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=rf"step 3 could not be saved .*{os.strerror(number)}.*; {remedy}.*resume with"):
        run("tiny", *overrides)
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2


@pytest.mark.parametrize("name", ["adapter.safetensors", "metrics.json"])
def test_a_disk_that_is_full_when_results_are_written_ends_the_run_with_the_command_to_resume(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(RunError, match=rf"{name} could not be written .*; free some space .*; resume with\n  "):
            run("tiny", *overrides, "train.steps=1")
    run("tiny", *overrides, "train.steps=1")
    assert (tmp_path / "run" / name).is_file()


@pytest.mark.parametrize(
    ("resume", "arguments", "saved", "expected"),
    [
        ("auto", [], True, []),  # set by an ablation, not on the command line
        ("auto", ["resume=auto"], True, ["resume=auto"]),  # overrides the YAML file
        ("never", ["resume=never"], False, ["resume=auto"]),
        ("never", [], True, ["resume=auto"]),  # from the YAML file
        ("a b.ckpt", ["resume=a b.ckpt"], False, ["resume=a b.ckpt"]),
        ("a b.ckpt", ["resume=a b.ckpt"], True, ["resume=auto"]),
    ],
)
def test_an_error_shows_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resume: str, arguments: list[str], saved: bool, expected: list[str]
) -> None:
    settings = [f"run_dir={tmp_path}/run", f"resume={resume}"]
    config = load_config(ROOT / "configs" / "tiny.yaml", settings)
    monkeypatch.setattr(sys, "argv", ["tools/train.py", *arguments, "train.steps=6"])
    one_rank = SimpleNamespace(world_size=1, global_rank=0)
    with pytest.raises(RunError) as caught, readable_errors(cast(Trainer, one_rank), config, str):
        if saved:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "previous.ckpt").touch()  # as after a power cut before the new checkpoint was renamed
        raise RunError("a fault")
    kept, command = str(caught.value).split("\n  ")
    assert kept == f"a fault; {tmp_path}/run keeps what was saved; resume with"
    given = shlex.split(command)
    assert given[1] == "tools/train.py" and sorted(given[2:]) == sorted([*expected, "train.steps=6"])


def test_the_resume_command_below_torchrun_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "config=a b.yaml", "resume=never"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    command = command_to_continue(load_config(ROOT / "configs" / "tiny.yaml", ["resume=never"]))
    assert command == "torchrun (options as before) tools/train.py 'config=a b.yaml' resume=auto"


def test_the_resume_command_has_the_shortest_interpreter_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["tools/train.py"])
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/.venv/bin/python")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/python")
    assert command_to_continue(config) == f"{tmp_path}/.venv/bin/python tools/train.py"
    monkeypatch.chdir(tmp_path)
    assert command_to_continue(config) == ".venv/bin/python tools/train.py"
    monkeypatch.setattr(shutil, "which", lambda _: sys.executable)
    assert command_to_continue(config) == "python tools/train.py"


@pytest.mark.parametrize(
    ("ending", "settings", "reached"),
    [
        ("the next step", ["train.steps=6", "train.validate_every=6"], 4),
        ("the last step", ["train.steps=3", "train.validate_every=3"], 3),
        ("signal in a step", ["train.steps=6", "train.validate_every=6"], 3),
        ("signal in a validation", ["train.steps=6", "train.validate_every=3"], 3),
    ],
)
def test_a_checkpoint_write_that_fails_in_the_background_ends_the_run(
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ending: str,
    settings: list[str],
    reached: int,
) -> None:
    """Training continues until the failure is noticed; then neither a further step nor the evaluation runs."""
    steps = list[int]()
    original = Job.training_step

    def write(*arguments: Any) -> None:
        time.sleep(0.5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def training_step(self: Job, batch: dict[str, Any], index: int) -> Tensor:
        steps.append(self.global_step + 1)
        if steps[-1] == 3 and ending == "signal in a step":
            os.kill(os.getpid(), signal.SIGTERM)
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            time.sleep(0.01)
        return original(self, batch, index)

    def validation(self: Job) -> None:
        if self.global_step and ending == "signal in a validation":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "_write", write)
    monkeypatch.setattr(Job, "training_step", training_step)
    monkeypatch.setattr(Job, "on_validation_start", validation)
    with pytest.raises(RunError, match=r"step 3 could not be saved .*No space left.*; resume with"):
        run("tiny", *overrides, *settings, "train.checkpoint_every=3")
    assert steps[-1] == reached and not (tmp_path / "run" / "adapter.safetensors").exists()


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    original = DecomposerJob.loss

    def loss(self: DecomposerJob, batch: dict[str, Any]) -> dict[str, Tensor]:
        if len(batch["position"]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd much more.")
        return original(self, batch)

    monkeypatch.setattr(DecomposerJob, "loss", loss)


def test_out_of_memory_suggests_settings_that_fit(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 2)
    message = (
        "CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "tried: train.batch_size=2 train.accumulate=4 fits, with the same samples per step"
    )
    with pytest.raises(RunError) as caught:
        run("tiny", *overrides, "train.batch_size=8")
    assert str(caught.value) == message
    suggested = ["train.batch_size=2", "train.accumulate=4"]
    run("tiny", *overrides, *suggested, "train.steps=1", "resume=never")


def test_out_of_memory_says_if_nothing_fits(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(RunError, match=r"not even train\.batch_size=1 fits .*recompute=1"):
        run("tiny", *overrides, "train.batch_size=2")


def test_only_batch_sizes_that_keep_the_samples_per_step_are_tried() -> None:
    layer, tried = nn.Linear(2, 1), list[int]()

    def loss(size: int) -> Tensor:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("full")
        return layer(torch.ones(size, 2)).sum()

    advice = fitting_settings(loss, list(layer.parameters()), batch_size=12, batches=2, otherwise="less")
    assert tried == [6, 3, 1] and "train.batch_size=1 train.accumulate=24 fits" in advice


def test_what_a_step_keeps_is_reserved_while_sizes_are_tried() -> None:
    layer = nn.Linear(2**20, 4, bias=False)
    layer.weight.grad = torch.zeros_like(layer.weight)

    def loss(size: int) -> Tensor:
        raise torch.OutOfMemoryError("full")

    for kept, shown in ((8.0, "0.03 GiB"), (2 * (1 + 4 / 256), "0.01 GiB")):  # moments in 32 or 8 bits
        assert shown in fitting_settings(loss, [layer.weight], batch_size=2, batches=1, otherwise="less", kept=kept)
        assert layer.weight.grad is None


# Processes


def die(self: RepeatedSamples, position: int) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_dead_worker_ends_the_run(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatedSamples, "__getitem__", die)
    started = time.monotonic()
    with pytest.raises(RunError, match=r"data worker died \(.*fewer data\.workers.*resume with"):
        run("tiny", *overrides, "data.workers=1")
    assert time.monotonic() - started < 60


PAIR = ["train.devices=2", "train.strategy=ddp", "train.batch_size=1", "train.steps=100000", "train.checkpoint_every=2"]


def _processes_of(group: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "-g", str(group)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.parametrize(
    ("second", "how", "code", "expected"),
    [
        (True, signal.SIGKILL, 1, "error: rank 0: rank 1 was killed by SIGKILL"),
        (False, signal.SIGTERM, 128 + signal.SIGTERM, "python tools/train.py config=configs/tiny.yaml"),
    ],
)
def test_two_ranks_end_together(
    overrides: list[str], tmp_path: Path, second: bool, how: signal.Signals, code: int, expected: str
) -> None:
    """With the real launcher: the second of two ranks is killed, or the first gets SIGTERM."""
    command = [sys.executable, "tools/train.py", "config=configs/tiny.yaml", *overrides, *PAIR]
    environment = alone() | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w+") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, stdout=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300  # long, because a busy machine starts slowly
            while not (tmp_path / "run" / LAST).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            both = _processes_of(first.pid)  # there are no data workers
            (child,) = (pid for pid in both if pid != first.pid)  # pids wrap around, so the child's may be smaller
            os.kill(child if second else first.pid, how)
            assert first.wait(60) == code
            deadline = time.monotonic() + 60
            while _processes_of(first.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not _processes_of(first.pid), "a process is left over"
        finally:
            for pid in _processes_of(first.pid):
                os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert expected in text and "Traceback" not in text, text[-3000:]


def test_a_termination_before_training_is_reported(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides)
    trainer = cast(Trainer, SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True))
    with pytest.raises(SystemExit) as stopped, readable_errors(trainer, config, str):
        raise SIGTERMException  # has no exit status of its own
    assert stopped.value.code == 143 and "resume with" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(InputError("wrong"), 2), (ValueError("a bug"), 1)])
def test_one_of_several_ranks_ends_at_once_after_an_error(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EndedError(Exception):
        """In place of the end of the process."""

    def ends(status: int) -> None:
        raise EndedError(status)

    def main(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("layerdecomp.cli.among_ranks", lambda: True)
    monkeypatch.setattr("os._exit", ends)
    with pytest.raises(EndedError, match=str(status)):
        run_command(main, [])
    assert str(error) in capsys.readouterr().err


def test_lightning_does_not_wait_for_the_device_before_every_batch(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides)
    loop = build_trainer(config, tmp_path / "run", build_job(config)).fit_loop.epoch_loop
    assert callable(type(loop)._broadcast_sigterm_tensor), "Lightning still has what is replaced here"
    assert "_broadcast_sigterm_tensor" in vars(loop)


def _start_a_rank(stderr: Connection) -> None:
    if not os.fork():  # the rank
        try:
            os.dup2(stderr.fileno(), sys.stderr.fileno())
            end_with_parent(3)
            time.sleep(60)
        finally:
            os._exit(0)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_ends_when_its_parent_process_is_gone() -> None:
    context = multiprocessing.get_context("forkserver")  # this process has threads
    context.set_forkserver_preload(["layerdecomp.training.runs"])
    reading, writing = context.Pipe(duplex=False)
    starter = context.Process(target=_start_a_rank, args=(writing,))
    starter.start()
    writing.close()
    try:
        starter.join(120)
        assert starter.exitcode == -signal.SIGKILL
    finally:
        starter.kill()
    started = time.monotonic()
    with open(os.dup(reading.fileno())) as stderr:  # ends when the rank does
        assert stderr.read() == "error: rank 3: the process that started it is gone; ending as well\n"
    assert time.monotonic() - started < 30
