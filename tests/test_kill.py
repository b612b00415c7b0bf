"""A run that is killed repeatedly loses nothing: `make test-kill` kills it fifty times, the plain suite a few times.

Every attempt is a process that SIGKILL ends at a random (seeded) moment: during startup, while it trains, while it
writes a checkpoint, or between the operations (fsync, rename) that put the checkpoint in its place.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layerdecomp.config import load_config
from layerdecomp.training import checkpoints
from layerdecomp.training.checkpoints import DAMAGED, LAST, PREVIOUS, Checkpoints, newest_checkpoint, read_checkpoint
from layerdecomp.training.runs import train

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
KILLS = int(os.environ.get("KILLS", "4"))
LIMIT = 120 + 20 * KILLS  # seconds for all attempts
# Upper limits of the draws: operations in about three checkpoints of the smallest run, or seconds.
MOMENTS = {"renaming": 12, "training": 1.0, "writing": 1500, "start": 2.0}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, number: int) -> None:
    """Kills this process before one of the operations that write checkpoints."""
    counter = count()

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(counter) == number:
                die()
            return operation(*arguments, **options)

        return wrapped

    if moment == "writing":
        checkpoints._Watched.write = counted(checkpoints._Watched.write)  # type: ignore[method-assign]
    else:
        os.replace, os.fsync = counted(os.replace), counted(os.fsync)


def die_while_training(seconds: float) -> None:
    original = Checkpoints.on_train_start

    def started(self: Checkpoints, *arguments: Any) -> None:
        original(self, *arguments)
        threading.Timer(seconds, die).start()

    Checkpoints.on_train_start = started  # type: ignore[method-assign]


def attempt(settings: list[str], moment: str, when: float) -> None:
    """One attempt of the run, in its own process."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in an ordinary process
    if moment == "training":
        die_while_training(when)
    elif moment in ("writing", "renaming"):
        die_at(moment, int(when))
    train(load_config(TINY, settings))


def run_attempt(settings: list[str], moment: str = "", when: float = 0.0) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layerdecomp.training.runs"])
    process = context.Process(target=attempt, args=(settings, moment, when))
    process.start()
    try:
        if moment == "start":
            process.join(when)
            process.kill()
        process.join(LIMIT)
        assert process.exitcode is not None, "an attempt does not end"
        return process.exitcode
    finally:
        process.kill()


def test_a_repeatedly_killed_run_ends_with_the_same_weights(tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings = [
        *(*tiny_overrides, "train.precision=32-true", "optim.lr=1e-2", f"train.steps={12 * KILLS}"),
        *("train.checkpoint_every=1", f"train.validate_every={12 * KILLS}", "sample.steps=1", "evaluate.samples=1"),
    ]
    rng, began, run_dir = random.Random(0), time.monotonic(), tmp_path / "killed"
    killed, reached, found = dict.fromkeys(MOMENTS, 0), [0], {LAST: 0, PREVIOUS: 0}
    for number in range(KILLS):
        moment = [*MOMENTS][number % 4]
        workers = f"data.workers={number % 3 % 2}"
        code = run_attempt([*settings, workers, f"run_dir={run_dir}"], moment, rng.random() * MOMENTS[moment])
        killed[moment] += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        newest = newest_checkpoint(run_dir)
        assert newest is not None or reached[-1] == 0, "there was a checkpoint, and now there is none"
        reached.append(read_checkpoint(newest)["global_step"] if newest else 0)
        if newest:
            found[newest.name] += 1
    assert reached == sorted(reached), "a run went backwards"
    assert not (run_dir / DAMAGED).exists()
    assert run_attempt([*settings, f"run_dir={run_dir}"]) == 0
    assert run_attempt([*settings, f"run_dir={tmp_path}/straight"]) == 0
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("straight", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    print(f"killed {killed}; steps reached {reached}; newest checkpoint {found}; {time.monotonic() - began:.0f} s")
    assert sum(killed.values()) == KILLS, "an attempt finished before it was killed"
    assert time.monotonic() - began < LIMIT
