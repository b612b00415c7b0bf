"""Failures during training: skipped steps, and errors turned into messages that say what to do."""

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
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from layerdecomp.config import RunConfig
from layerdecomp.errors import InputError, RunError, WriteError
from layerdecomp.training.checkpoints import LAST, PREVIOUS, StoppedError
from layerdecomp.training.deferred import Deferred, all_reduce_sum

logger = logging.getLogger(__name__)
MIN_SAMPLES = 1000  # samples: the faulty share is relative to at least this many
Names = Callable[[Sequence[int]], list[str]]  # positions -> names of their samples


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, with a NaN gradient if it is not finite itself: all ranks then see that in the reduced gradient."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


class StepGuard:
    """Skips steps whose gradient is not finite, logs their samples, and stops the run after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self._seen: list[tuple[Sequence[int], Tensor]] = []  # positions and loss of each batch of the step
        self._waiting: tuple[list[tuple[Sequence[int], Tensor]], int, torch.device, Deferred] | None = None

    def note(self, positions: Sequence[int], loss: Tensor) -> None:
        """Records a batch of the current step."""
        self._seen.append((positions, loss.detach()))

    def judge(self, norm: Tensor, step: int, names: Names) -> bool:
        """Whether a gradient of this norm, which is the same on every rank, may be used.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        self.judge_later(norm, step, names)
        return self.settle(names)

    def judge_later(self, norm: Tensor, step: int, names: Names) -> None:
        """Judges the previous step; this one is judged with the next, when its norm has reached the host.

        For an optimizer that skips steps by itself. Raises as `judge` does.
        """
        self.settle(names)
        self._waiting, self._seen = (self._seen, step, norm.device, Deferred(norm[None])), []

    def settle(self, names: Names) -> bool:
        """Judges the pending step, if there is one; returns and raises as `judge` does."""
        if self._waiting is None:
            return self.in_a_row == 0
        (seen, step, device, norm), self._waiting = self._waiting, None
        if math.isfinite(norm.read()[0]):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        culprits = [positions for positions, loss in seen if not math.isfinite(loss.item())]
        ranks = all_reduce_sum(torch.tensor(float(bool(culprits)), device=device)).item()
        # None of this rank's samples, if only other ranks have a loss that is not finite.
        suspects = culprits if ranks else [positions for positions, _ in seen]
        found = names([position for positions in suspects for position in positions])
        if suspects:
            what = "loss" if culprits else "gradient"
            logger.warning("step %d is skipped: its %s is not finite; samples: %s", step, what, "; ".join(found))
        if self.in_a_row >= self.limit:
            raise RunError(
                f"{self.in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite; they "
                "left the trained tensors unchanged. Lower optim.lr or try train.precision=32-true, and resume "
                "from the checkpoint with resume=FILE"
            )
        return False


class FaultCount:
    """Counts the unreadable training samples of this process, and stops the run above a `share` of all."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.seen = self.faulty = 0

    def note(self, faults: Sequence[Sequence[str]]) -> None:
        """Counts the samples of a batch by their faults; raises `RunError` if too many have one."""
        self.seen += len(faults)
        for found in faults:
            self.faulty += bool(found)
            for fault in found:
                logger.warning("a training sample is replaced by the next draw (%d so far): %s", self.faulty, fault)
        if self.faulty > self.share * max(self.seen, MIN_SAMPLES):
            raise RunError(
                f"{self.faulty} of {self.seen} training samples could not be read, more than data.max_faulty="
                f"{self.share:g} allows; tools/prepare_data.py check=INDEX lists what is wrong"
            )


def command_to_continue(config: RunConfig) -> str:
    """The given command, with `resume=auto` in place of a `resume=` that would discard what the run has saved.

    If nothing has been saved yet, resume=FILE stays: that checkpoint is still the one to resume from.
    """
    saved = any((Path(config.run_dir) / name).is_file() for name in (LAST, PREVIOUS))
    given = sys.argv
    if config.resume != "auto" and (config.resume == "never" or saved):
        given = [*(part for part in given if not part.startswith("resume=")), "resume=auto"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which does not tell the ranks its own options
        return f"torchrun (options as before) {shlex.join(given)}"
    return shlex.join([_python(), *given])


def _python() -> str:
    """The interpreter as the user would type it; `make` uses one that is not on PATH."""
    if shutil.which("python") == sys.executable:
        return "python"
    interpreter = Path(sys.executable)
    return str(interpreter.relative_to(Path.cwd()) if interpreter.is_relative_to(Path.cwd()) else interpreter)


@contextmanager
def readable_errors(trainer: Trainer, config: RunConfig, settings_that_fit: Callable[[], str]) -> Iterator[None]:
    """Turns an error that is not a bug into one message that names the rank and says how to resume.

    A run that was stopped by a signal exits with 128 + the signal's number, as in a shell.

    Args:
        settings_that_fit: returns settings that need less memory; called once the memory of the failed step is free.
    """
    rank = f"rank {trainer.global_rank}: " if trainer.world_size > 1 else ""
    try:
        yield
    except StoppedError as stopped:
        _leave(trainer, stopped, command_to_continue(config))
    except SystemExit as ended:  # by Lightning, which prints nothing; SIGTERM arrived before training began
        terminated = isinstance(ended, SIGTERMException)
        if not terminated and not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        if trainer.is_global_zero:
            print(f"\ninterrupted{_kept(config)}", file=sys.stderr, flush=True)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    except WriteError as error:  # of the results: the settings are right, and the run goes on from its checkpoint
        raise RunError(rank + str(error) + _kept(config)) from error
    except InputError as error:
        raise InputError(rank + _without_traceback(str(error))) from error
    except RunError as error:
        raise RunError(rank + str(error) + _kept(config)) from error
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        _free(error)
        raise RunError(f"{rank}{reason}\n{settings_that_fit()}") from None
    except OSError as error:
        raise RunError(f"{rank}a file could not be read or written ({error}){_kept(config)}") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            died = f"a data worker died ({_first_line(error)}), often for lack of memory; try fewer data.workers"
            raise RunError(rank + died + _kept(config)) from error
        if fault := _dead_rank(trainer, error):
            raise RunError(rank + fault + _kept(config)) from error
        raise


def _kept(config: RunConfig) -> str:
    """The end of an error message; made when the run has ended, since it depends on what was saved."""
    return f"; {config.run_dir} keeps what was saved; resume with\n  {command_to_continue(config)}"


def _leave(trainer: Trainer, stopped: StoppedError, command: str) -> None:
    if not trainer.is_global_zero:
        sys.exit(0)  # rank 0 reports for all
    print(f"\n{stopped}; resume with\n  {command}", file=sys.stderr, flush=True)
    if stopped.alone and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)  # the others wait for this one
        os._exit(128 + stopped.reason)  # before Lightning notices and kills this one too
    sys.exit(128 + stopped.reason)


def _without_traceback(message: str) -> str:
    """An error's message without the traceback that PyTorch adds to it in a data worker."""
    return message.rpartition("InputError: ")[2].strip() if "Original Traceback" in message else message


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _free(error: BaseException) -> None:
    """Frees the memory held by the frames of an error."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dead_rank(trainer: Trainer, error: RuntimeError) -> str | None:
    """What happened to another rank, if the error is a lost connection to it."""
    lost = re.search("connection|socket|peer|gloo|nccl|Broken pipe", str(error), re.IGNORECASE)
    if trainer.world_size == 1 or not lost:
        return None
    children: list[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", [])
    for _ in range(40):  # a process may close its connections before it exits
        for number, child in enumerate(children, 1):
            if (status := child.poll()) is not None:
                ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                return f"rank {trainer.node_rank * trainer.num_devices + number} {ended}; see its output above"
        if not children:
            break
        time.sleep(0.25)
    return f"the connection to another rank was lost ({_first_line(error)})"


def end_with_parent(rank: int) -> None:
    """Exits when the parent process is gone; otherwise this one would wait for the other ranks forever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print(f"error: rank {rank}: the process that started it is gone; ending as well", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fitting_settings(
    loss: Callable[[int], Tensor],
    parameters: Sequence[Tensor],
    batch_size: int,
    batches: int,
    otherwise: str,
    kept: float = 8.0,
) -> str:
    """Finds, by trying, settings that fit on the device and keep the number of samples per step.

    Args:
        loss: computes the loss of a batch of a given size.
        parameters: the trained ones, on the device.
        batch_size: the size that did not fit.
        batches: batches per step and process.
        otherwise: what to change if not even one sample fits.
        kept: bytes per trained number that are in memory during a step, besides the tensors and their gradients: the
            optimizer's moments, and DDP's buckets while gradients are accumulated.
    """
    for parameter in parameters:
        parameter.grad = None
    sizes = [math.ceil(kept * parameter.numel()) for parameter in parameters]
    reserved = [
        torch.empty(size, dtype=torch.uint8, device=p.device) for size, p in zip(sizes, parameters, strict=True)
    ]
    size = batch_size // 2
    while size:
        if batch_size % size == 0 and _fits(loss, parameters, size):
            del reserved
            accumulate = batches * batch_size // size
            return f"tried: train.batch_size={size} train.accumulate={accumulate} fits, with the same samples per step"
        size //= 2
    return (
        f"tried: not even train.batch_size=1 fits beside {_gibibytes(reserved)} of optimizer state and buckets; "
        f"{otherwise}, or use a device with more memory"
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
