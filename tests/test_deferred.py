"""Nothing in a training step makes the host wait for the device."""

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_ranks, become_rank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerdecomp.config import load_config
from layerdecomp.training.base import Job
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.deferred import Deferred, to_device
from layerdecomp.training.runs import train

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Waits(TorchDispatchMode):
    """Records the operations that need the value of a tensor, for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if func in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(f"{func} in\n" + "".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


def test_the_recorder_finds_operations_that_wait() -> None:
    x = torch.arange(3.0)
    for waiting in (lambda: x.sum().item(), lambda: x[x > 1], lambda: bool((x > 0).all()), lambda: x.nonzero()):
        with Waits() as waits:
            waiting()
        assert waits.found
    with Waits() as waits:
        torch.where(x > 1, x, 0).sum()
    assert not waits.found


@pytest.mark.parametrize("careless", [False, True])
def test_no_step_waits(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: bool
) -> None:
    waits, steps = Waits(), list[int]()
    starts, ends, loss = Job.on_train_batch_start, Job.on_train_batch_end, DecomposerJob.loss

    def start(self: Job, batch: dict[str, Any], index: int) -> None:
        waits.__enter__()
        starts(self, batch, index)

    def end(self: Job, *args: Any) -> None:
        ends(self, *args)
        waits.__exit__(None, None, None)
        steps.append(self.global_step)
        if self.global_step == 4:  # the next step is the last one; it is saved, which may wait
            assert bool(waits.found) is careless, waits.found[0]
            waits.found.clear()

    def reading(self: DecomposerJob, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = loss(self, batch)
        assert losses["loss"].item() > 0
        return losses

    monkeypatch.setattr(Job, "on_train_batch_start", start)
    monkeypatch.setattr(Job, "on_train_batch_end", end)
    if careless:
        monkeypatch.setattr(DecomposerJob, "loss", reading)
    settings = ["optim.muon=false", "train.steps=5", "train.validate_every=5", "train.checkpoint_every=5"]
    short = ["data.validation=1", "evaluate.samples=1", "sample.steps=1", "evaluate.rows=[adapted]"]
    train(load_config(ROOT / "configs" / "tiny.yaml", [*tiny_overrides, *settings, *short, f"run_dir={tmp_path}/run"]))
    assert steps == [1, 2, 3, 4, 5]


def test_deferred_values_and_tensors_on_other_devices_are_unchanged() -> None:
    assert Deferred(torch.tensor([1.5, -2.0])).read() == [1.5, -2.0]
    numbers = torch.arange(3)
    assert to_device(numbers, torch.device("cpu")).equal(numbers)
    assert to_device(numbers, torch.device("meta")).is_meta


def _train_and_count_barriers(rank: int, port: int, settings: list[str], folder: Path) -> None:
    become_rank(rank, port)
    barriers, found = list[None](), list[int]()
    barrier, start, end = torch.distributed.barrier, Job.on_train_batch_start, Job.on_train_batch_end

    def started(self: Job, *args: Any) -> None:
        barriers.clear()
        start(self, *args)

    def ended(self: Job, *args: Any) -> None:
        end(self, *args)
        found.append(len(barriers))

    torch.distributed.barrier = lambda *args, **more: (barriers.append(None), barrier(*args, **more))[1]
    Job.on_train_batch_start, Job.on_train_batch_end = started, ended  # type: ignore[method-assign]
    train(load_config(ROOT / "configs" / "tiny.yaml", settings))
    (folder / f"{rank}").write_text(str(found))


def test_no_step_of_several_ranks_has_a_barrier(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    settings = ["train.devices=2", "train.batch_size=1", "train.steps=3", "train.validate_every=3", "latent_cache=null"]
    short = ["data.validation=2", "evaluate.rows=[]", f"run_dir={tmp_path}/run"]
    assert as_ranks(_train_and_count_barriers, [*tiny_overrides, *settings, *short], tmp_path) == [0, 0]
    steps = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert steps == [[0, 0, 1]] * 2, "expected a barrier only in the last step, which is saved"
