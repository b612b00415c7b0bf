"""What goes wrong while a run trains: steps that are left out, and errors said in words that help."""

import gc
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from layerdecomp.config import RunConfig
from layerdecomp.errors import InputError, RunError
from layerdecomp.training.checkpoints import LAST, PREVIOUS, StoppedError
from layerdecomp.training.late import Late

logger = logging.getLogger(__name__)
FAULTS_FROM = 1000  # samples on, the share of those that cannot be read is taken as it is
Names = Callable[[Sequence[int]], list[str]]  # of the samples at some positions


def poisoned(loss: Tensor) -> Tensor:
    """A loss whose gradient is NaN where it is not finite itself: then all ranks see it in the gradient they share."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


class StepGuard:
    """Leaves out steps whose gradient is not finite, names their samples, and stops after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self._seen: list[tuple[Sequence[int], Tensor]] = []  # positions and loss of the batches of a step
        self._waiting: tuple[list[tuple[Sequence[int], Tensor]], int, Late] | None = None

    def note(self, positions: Sequence[int], loss: Tensor) -> None:
        """Remembers a batch of the step that is being made."""
        self._seen.append((positions, loss.detach()))

    def judge(self, norm: Tensor, step: int, names: Names) -> bool:
        """Whether a gradient of this norm, the same on every rank, may be used.

        Raises:
            RunError: it is one too many in a row that may not.
        """
        self.judge_later(norm, step, names)
        return self.settle(names)

    def judge_later(self, norm: Tensor, step: int, names: Names) -> None:
        """Judges the step before, and this one when the next comes: by then, its norm is known without waiting.

        For an optimizer that leaves a step out by itself. Raises as `judge` does.
        """
        self.settle(names)
        self._waiting, self._seen = (self._seen, step, Late(norm[None])), []

    def settle(self, names: Names) -> bool:
        """Judges the step that waits to be judged, if there is one; as `judge`."""
        if self._waiting is None:
            return self.in_a_row == 0
        (seen, step, norm), self._waiting = self._waiting, None
        if math.isfinite(norm.read()[0]):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        culprits = [positions for positions, loss in seen if not math.isfinite(loss.item())]
        found = names([position for part in culprits or [part for part, _ in seen] for position in part])
        what = "loss" if culprits else "gradient"
        logger.warning("step %d is left out: its %s is not finite; samples: %s", step, what, "; ".join(found))
        if self.in_a_row >= self.limit:
            raise RunError(
                f"{self.in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite; what "
                "is trained is as it was before them. Lower optim.lr or try train.precision=32-true, and go on from "
                "the checkpoint with resume=FILE"
            )
        return False


class FaultCount:
    """Counts the training samples of this process whose files cannot be read, and stops above a `share` of all."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.seen = self.faulty = 0

    def note(self, faults: Sequence[Sequence[str]]) -> None:
        """Takes what is known of the samples of a batch; `RunError` if too many have a fault."""
        self.seen += len(faults)
        for found in faults:
            self.faulty += bool(found)
            for fault in found:
                logger.warning("a training sample is replaced by the next draw (%d so far): %s", self.faulty, fault)
        if self.faulty > self.share * max(self.seen, FAULTS_FROM):
            raise RunError(
                f"{self.faulty} of {self.seen} training samples could not be read, more than data.max_faulty="
                f"{self.share:g} allows; tools/prepare_data.py check=INDEX lists what is wrong"
            )


def command_to_continue(config: RunConfig) -> str:
    """The command that was given, with `resume=auto` in place of what would start anew, or again from a checkpoint.

    Where the run has saved nothing yet, that checkpoint is still the one to go on from.
    """
    saved = any((Path(config.run_dir) / name).is_file() for name in (LAST, PREVIOUS))
    if config.resume == "auto" or (config.resume != "never" and not saved):
        return shlex.join([_python(), *sys.argv])
    return shlex.join([_python(), *(part for part in sys.argv if not part.startswith("resume=")), "resume=auto"])


def _python() -> str:
    """What this interpreter is called where the command was given: "make" uses one that is on no path."""
    if shutil.which("python") == sys.executable:
        return "python"
    interpreter = Path(sys.executable)
    return str(interpreter.relative_to(Path.cwd()) if interpreter.is_relative_to(Path.cwd()) else interpreter)


@contextmanager
def explained(trainer: Trainer, config: RunConfig, what_fits: Callable[[], str]) -> Iterator[None]:
    """Turns what ends a run, and is no bug, into one message that names the rank and says how to go on.

    A run that was told to stop exits with 128 and the number of the signal, as a shell would say.

    Args:
        what_fits: says which settings need less memory, once what the failed step held has been freed.
    """
    rank = f"rank {trainer.global_rank}: " if trainer.world_size > 1 else ""
    try:
        yield
    except StoppedError as stopped:
        _leave(trainer, stopped, command_to_continue(config))
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        if trainer.is_global_zero:  # Lightning says nothing of it
            print(f"\ninterrupted{_kept(config)}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except InputError as error:
        raise InputError(rank + _of_worker(str(error))) from error
    except RunError as error:
        raise RunError(rank + str(error) + _kept(config)) from error
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        _free(error)
        raise RunError(f"{rank}{reason}\n{what_fits()}") from None
    except OSError as error:
        raise RunError(f"{rank}a file could not be read or written ({error}){_kept(config)}") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            why = "often it is memory: fewer data.workers need less"
            died = f"a process that makes samples died ({_first_line(error)}); {why}"
            raise RunError(rank + died + _kept(config)) from error
        if fault := _dead_rank(trainer, error):
            raise RunError(rank + fault + _kept(config)) from error
        raise


def _kept(config: RunConfig) -> str:
    """The end of an error's message; asked for when the run has ended, since what was saved by then counts."""
    return f"; {config.run_dir} keeps what was saved, and this command goes on:\n  {command_to_continue(config)}"


def _leave(trainer: Trainer, stopped: StoppedError, command: str) -> None:
    if not trainer.is_global_zero:
        sys.exit(0)  # the first rank speaks for all
    print(f"\n{stopped}; go on with\n  {command}", file=sys.stderr, flush=True)
    if stopped.alone and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)  # the others wait for this one
        os._exit(128 + stopped.reason)  # before Lightning finds them dead, and kills this one too
    sys.exit(128 + stopped.reason)


def _of_worker(message: str) -> str:
    """The message of an error, without the traceback that a data worker's comes in."""
    return message.rpartition("InputError: ")[2].strip() if "Original Traceback" in message else message


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _free(error: BaseException) -> None:
    """Gives up what the frames of an error hold."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dead_rank(trainer: Trainer, error: RuntimeError) -> str | None:
    """What became of another rank, if that is what an error is about."""
    lost = re.search("connection|socket|peer|gloo|nccl|Broken pipe", str(error), re.IGNORECASE)
    if trainer.world_size == 1 or not lost:
        return None
    children: list[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
    for _ in range(40):  # a process may close its connections some time before it is gone
        for number, child in enumerate(children, 1):
            if (status := child.poll()) is not None:
                ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"rank {trainer.node_rank * trainer.num_devices + number} {ended}; what it said stands above"
        if not children:
            break
        time.sleep(0.25)
    return f"the connection to another rank is lost ({_first_line(error)})"


def end_with_parent(rank: int) -> None:
    """Ends this process when the one that started it is gone, where it would wait for others for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print(f"error: rank {rank}: the process that started it is gone; ending as well", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fitting_settings(
    loss: Callable[[int], Tensor], parameters: Sequence[Tensor], batch_size: int, batches: int, otherwise: str
) -> str:
    """Which settings leave a step its samples and fit the device: found by trying.

    Args:
        loss: of a batch of so many samples.
        parameters: what is trained, on the device.
        batch_size: what did not fit.
        batches: of a process in a step.
        otherwise: what to set where not even one sample fits.
    """
    # The averages of the optimizer, and the buckets that ranks share gradients in, stay beside a step.
    beside = [torch.empty_like(parameter) for parameter in parameters for _ in range(3)]
    size = batch_size // 2
    while size:
        if batch_size % size == 0 and _fits(loss, parameters, size):
            del beside
            accumulate = batches * batch_size // size
            return f"tried: train.batch_size={size} train.accumulate={accumulate} fits, with the same samples in a step"
        size //= 2
    return (
        f"tried: not even train.batch_size=1 fits beside what is kept ({_gibibytes(beside)} of optimizer); "
        f"{otherwise}, or take a device with more memory"
    )


def _fits(loss: Callable[[int], Tensor], parameters: Sequence[Tensor], size: int) -> bool:
    try:
        torch.autograd.grad(loss(size), list(parameters), allow_unused=True)
    except torch.OutOfMemoryError as error:
        _free(error)
        return False
    return True


def _gibibytes(tensors: Sequence[Tensor]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors) / 2**30:.2f} GiB"
