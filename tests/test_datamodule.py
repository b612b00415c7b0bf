"""The samples of a step: the same ones however they are distributed over ranks and restarts."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerdecomp.data.datamodule import DataConfig, RepeatedSamples, SampleData, StepSampler, collate, open_samples
from layerdecomp.data.scenes import SceneConfig
from layerdecomp.errors import InputError

CONFIG = DataConfig(samples=5, validation=3, workers=0, scenes=SceneConfig(size=32))


def _batches(first: int = 0, batch_size: int = 4, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    return list(StepSampler(first=first, steps=6, batch_size=batch_size, rank=rank, world_size=world_size))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_batch_of_one_process(world_size: int) -> None:
    shares = [_batches(batch_size=8 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [sum(step, []) for step in zip(*shares, strict=True)]
    assert joined == _batches(batch_size=8)
    assert sum(joined, []) == list(range(48))


def test_a_restart_continues_with_the_next_step() -> None:
    assert _batches(first=4) == _batches()[4:] and len(_batches(first=4)) == 2
    assert _batches(first=4, rank=1, world_size=2) == _batches(rank=1, world_size=2)[4:]
    assert len(StepSampler(first=4, steps=6, batch_size=2, rank=0, world_size=1)) == 6


def test_repeated_samples_wrap_around() -> None:
    samples = open_samples(CONFIG, "train", seed=0, length=5)
    positions = RepeatedSamples(samples)
    for position in (3, 8, 103):
        sample = positions[position]
        assert sample["position"] == position and sample["index"] == 3
        assert sample["image"].equal(samples[3]["image"])


def test_collate_stacks_tensors_and_keeps_numbers() -> None:
    samples = [{"image": torch.full((3, 2, 2), float(i)), "index": i, "position": 7 * i} for i in range(3)]
    batch = collate(samples)
    assert batch["index"] == [0, 1, 2] and batch["position"] == [0, 7, 14]
    assert batch["image"].shape == (3, 3, 2, 2) and batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert collate([{"image": torch.ones(1), "index": 4}]).keys() == {"image", "index"}


def _module(**trainer: Any) -> SampleData:
    module = SampleData(CONFIG, seed=3, steps=4, batch_size=2, with_cues=True)
    module.trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    return module


def test_loaders_follow_the_trainer() -> None:
    batches = list(_module(global_step=2, global_rank=1, world_size=2, accumulate_grad_batches=1).train_dataloader())
    assert [batch["position"] for batch in batches] == [[10, 11], [14, 15]]
    assert [batch["index"] for batch in batches] == [[0, 1], [4, 0]]
    assert batches[0]["image"][0].equal(batches[1]["image"][1]), "expected sample 0 again"
    validation = list(_module(global_rank=0, world_size=1).val_dataloader())
    assert [batch["index"] for batch in validation] == [[0, 1], [2]]
    assert not validation[0]["image"].equal(batches[0]["image"])


def test_validation_and_evaluation_with_the_same_seed_use_different_samples() -> None:
    found = next(iter(_module(global_rank=0, world_size=1).val_dataloader()))["image"][0]
    evaluated, expected = (open_samples(CONFIG, "test", seed, 3)[0]["image"] for seed in (3, 4))
    assert found.equal(expected) and not found.equal(evaluated)


def test_validation_is_split_over_ranks_without_repeating_a_sample() -> None:
    shares = [list(_module(global_rank=rank, world_size=2).val_dataloader()) for rank in (0, 1)]
    assert [[batch["index"] for batch in share] for share in shares] == [[[0, 2]], [[1]]]
    with pytest.raises(InputError, match="data.validation is 3, but 4 processes share them"):
        _module(global_rank=0, world_size=4).val_dataloader()


def test_cues_are_computed_only_if_needed() -> None:
    assert open_samples(CONFIG, "test", 0, 1)[0]["cues"].any()
    assert not open_samples(CONFIG, "test", 0, 1, with_cues=False)[0]["cues"].any()


def test_accumulated_batches_split_the_samples_of_a_step_in_order() -> None:
    trainer = {"global_step": 1, "global_rank": 1, "world_size": 2, "accumulate_grad_batches": 2}
    positions = [batch["position"] for batch in _module(**trainer).train_dataloader()]
    assert positions[:2] == [[10, 11], [14, 15]]  # step 1 has 8 to 15
    assert len(positions) == 6


def test_workers_ignore_the_signals_that_stop_training() -> None:
    trainer = {"global_step": 0, "global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1}
    module = _module(**trainer)
    module.workers = 1
    batches = iter(module.train_dataloader())
    positions = [next(batches)["position"]]
    for worker in batches._workers:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, name)
    assert positions + [batch["position"] for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]


LEFTOVER_WORKER = """
from types import SimpleNamespace
from layerdecomp.data.datamodule import DataConfig, SampleData
from layerdecomp.data.scenes import SceneConfig
data = SampleData(DataConfig(workers=1, scenes=SceneConfig(size=32)), seed=3, steps=400, batch_size=2, with_cues=False)
data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1)
batches = iter(data.train_dataloader())
next(batches)
print(batches._workers[0].pid)
"""


def test_a_leftover_worker_does_not_keep_the_process_from_exiting() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFTOVER_WORKER], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)
