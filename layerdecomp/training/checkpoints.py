"""Checkpoints that survive a crash at any moment, and a clean stop on a signal.

A checkpoint is written to a temporary file while training continues, synced to disk and renamed; the previous one is
kept. Both are zip archives, as written by `torch.save`, with a checksum for every record.
"""

import atexit
import logging
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layerdecomp.errors import InputError, RunError
from layerdecomp.files import remedy
from layerdecomp.training.deferred import Deferred, all_reduce_sum, to_device

logger = logging.getLogger(__name__)
LAST, PREVIOUS, DAMAGED = "last.ckpt", "previous.ckpt", "damaged.ckpt"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; kill and preemption; SLURM's warning
SLOW_SAVE = 1.0  # seconds: a save that waits longer for the previous one logs a warning
# Seconds that a pending checkpoint gets when an error ends the run. Alone: enough for 12 GB at 200 MB/s. Among several
# ranks: Lightning kills all within five seconds of one exiting, and the outcome must be logged before that.
GRACE, GRACE_AMONG_RANKS = 60.0, 2.0


class StoppedError(Exception):
    """A signal stopped the run, which has left a checkpoint; `alone` if the other ranks do not know of it yet."""

    def __init__(self, reason: signal.Signals, step: int, alone: bool = False) -> None:
        super().__init__(f"stopped by {reason.name} after step {step}")
        self.reason, self.alone = reason, alone


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Loads a checkpoint after verifying the checksums of all its records.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {record} does not match")
        # Memory-mapped: the ranks of a machine share one copy.
        checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True, mmap=True)
        _ = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a checkpoint of this package, or is damaged: {error}") from error
    return checkpoint


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint of a run, or the previous one if the last is damaged; None if there are none.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    faults = []
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        if not path.is_file():
            continue
        try:
            read_checkpoint(path, device="meta")
        except InputError as error:
            faults.append(str(error))
            continue
        if faults:
            logger.warning("%s; resuming from the previous one, %s", faults[0], path)
            _put_aside(run_dir / LAST)
        return path
    if faults:
        raise InputError(f"{'; '.join(faults)}; resume=never starts over and moves the old run aside")
    return None


@rank_zero_only
def _put_aside(path: Path) -> None:
    """Moves a damaged checkpoint aside, so that the next save does not keep it as the previous one."""
    os.replace(path, path.with_name(DAMAGED))


class CheckpointFiles(CheckpointIO):
    """Lightning's checkpoint I/O: an old checkpoint is dropped only when the new one is complete on disk.

    Training waits only for a copy to host memory, which a background thread then writes. To limit this to one copy, a
    save waits until the previous one has been written. An error in the thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = False
        self._renaming = threading.Lock()  # a save is never given up between its renames
        atexit.register(self.give_up, GRACE)  # exiting during `torch.save` would abort the process

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Starts writing; later changes to the tensors do not affect the file. Raises as `wait` does."""
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > SLOW_SAVE:
            logger.warning(
                "step %d was saved %.0f s late, since the previous checkpoint was still being written; raise "
                "train.checkpoint_every, or use a faster disk",
                checkpoint["global_step"],
                waited,
            )
        self._given_up = False
        # A daemon thread, so that an unresponsive disk cannot keep the process alive.
        snapshot = on_host(checkpoint), Path(path)
        self._writer = threading.Thread(target=self._put, args=snapshot, name="checkpoint", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raises `RunError` if a checkpoint could not be written; the existing ones are then unchanged."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits until the last save is on disk; raises as `check` does."""
        if self._writer is not None:
            self._writer.join()
        self.check()

    def give_up(self, after: float) -> None:
        """Gives a pending save `after` seconds to finish, then abandons it and keeps the existing checkpoints.

        Logs errors instead of raising them, since the run is already ending with another one.
        """
        if self._writer is not None:
            self._writer.join(after)
            with self._renaming:
                self._given_up = True
            self._writer.join(1.0)  # it stops at the next chunk
        error, self._error = self._error, None
        if error is not None:
            logger.warning("%s", error)

    def _put(self, checkpoint: dict[str, Any], path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            _write(partial, checkpoint, self._check_wanted)
            with self._renaming:
                self._check_wanted()
                if path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
                os.replace(partial, path)
            _sync_folder(path.parent)
        except OSError as error:
            fault = f"step {checkpoint['global_step']} could not be saved ({error}); {remedy(error, path.parent)}"
            self._error = RunError(fault)
            self._error.__cause__ = error
        except Exception as error:  # raised again in the training thread, by `check`
            self._error = error
        finally:
            with suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)

    def _check_wanted(self) -> None:
        if self._given_up:
            raise RunError("the last checkpoint was still being written and is discarded; the previous one is kept")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint with all tensors in host memory, unaffected by further training."""
    copied: dict[str, Any] = apply_to_collection(checkpoint, Tensor, _on_host)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor in host memory; from a GPU, to pinned memory and asynchronous until a synchronisation."""
    if is_traceable_wrapper_subclass(tensor):  # an 8-bit optimizer moment: copy the tensors inside it
        names, context = tensor.__tensor_flatten__()
        parts = {name: _on_host(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    pinned = tensor.is_cuda
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return copy.copy_(tensor.detach(), non_blocking=pinned)


def _write(path: Path, checkpoint: dict[str, Any], check_wanted: Callable[[], None]) -> None:
    """Writes a checkpoint and syncs it to disk; raises `OSError` on failure."""
    with path.open("wb", buffering=0) as file:  # unbuffered: a forked process would flush its copy of a buffer
        watched = _Watched(file, check_wanted)
        try:
            torch.save(checkpoint, cast(IO[bytes], watched))  # which needs only `write` and `flush`
        except RuntimeError as error:
            raise (watched.error or error) from None
        os.fsync(file.fileno())


class _Watched:
    """A file that keeps the original write error, which `torch.save` replaces by its own."""

    def __init__(self, file: FileIO, check_wanted: Callable[[], None]) -> None:
        self.file, self.check_wanted = file, check_wanted
        self.error: OSError | RunError | None = None

    def write(self, content: bytes) -> int:
        try:
            left = memoryview(content)
            while left:  # one call writes at most 2 GB
                self.check_wanted()
                left = left[self.file.write(left) :]
            return len(content)
        except (OSError, RunError) as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Does nothing; called by `torch.save`."""


def _sync_folder(folder: Path) -> None:
    """Syncs a folder's file names to disk; file systems that do not support this persist them anyway."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Checkpoints(Checkpoint):
    """Saves a run every `every` steps, before every validation, at its end, and when a signal stops it.

    A signal takes effect at the end of the current step; with several ranks at the end of the next one, which is the
    same for all, unless a validation or nothing follows the current one. During validation there is nothing to save:
    rank 0 stops as soon as any pending write is done. A second Ctrl-C ends the process immediately.

    Args:
        files: writes the checkpoints.
        sound: returns whether the trained tensors are worth saving.
    """

    def __init__(
        self, files: CheckpointFiles, run_dir: Path, *, every: int, validate_every: int, sound: Callable[[], bool]
    ) -> None:
        self.files, self.path, self.sound = files, run_dir / LAST, sound
        self.every, self.validate_every = every, validate_every
        self._signal: signal.Signals | None = None
        self._trainer: Trainer | None = None
        self._signalled: Deferred | None = None  # number of ranks that had a signal at the end of the last step

    def on_validation_start(self, trainer: Trainer, job: LightningModule) -> None:
        self._listen(trainer)  # the first validation precedes training

    def on_train_start(self, trainer: Trainer, job: LightningModule) -> None:
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:  # after Lightning's handlers; Lightning restores the originals at the end
                signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        self._signal = signal.Signals(number)
        if self._signal is signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._trainer.is_global_zero and not self._trainer.validating:
                # Not `print`, which is not reentrant.
                os.write(2, b"\nfinishing the step, then saving it; Ctrl-C again stops at once\n")
        if self._trainer.validating and self._trainer.is_global_zero:
            self.files.wait()
            raise StoppedError(self._signal, self._trainer.global_step, alone=self._trainer.world_size > 1)

    def on_train_batch_end(
        self, trainer: Trainer, job: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.files.check()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # still accumulating
            return
        step = trainer.global_step
        pauses = step == trainer.max_steps or step % self.validate_every == 0
        stop = self._should_stop(trainer, at_once=pauses)
        due = stop or pauses or step % self.every == 0
        if due and self.sound():
            trainer.save_checkpoint(self.path, weights_only=False)  # with the optimizer and loops
        if stop:
            self.files.wait()  # the other ranks wait in the reduction below
            # Rank 0, whose exit status counts, may not have received the signal itself.
            received = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            raise StoppedError(signal.Signals(int(trainer.strategy.reduce(received, reduce_op="max"))), step)

    def on_train_end(self, trainer: Trainer, job: LightningModule) -> None:
        self.files.wait()

    def on_exception(self, trainer: Trainer, job: LightningModule, exception: BaseException) -> None:
        grace = GRACE if trainer.world_size == 1 else GRACE_AMONG_RANKS
        self.files.give_up(after=0.0 if isinstance(exception, KeyboardInterrupt) else grace)

    def _should_stop(self, trainer: Trainer, at_once: bool) -> bool:
        """Whether any rank has a signal; with several ranks, whether one had at the end of the previous step.

        Args:
            at_once: also wait for what the ranks have now, because no other step follows soon.
        """
        if trainer.world_size == 1:
            return self._signal is not None
        own = to_device(torch.tensor([float(self._signal is not None)]), trainer.strategy.root_device)
        previous, self._signalled = self._signalled, Deferred(all_reduce_sum(own))
        readings = [previous, self._signalled if at_once else None]
        return any(reading is not None and reading.read()[0] > 0 for reading in readings)


def loops_at(fresh: dict[str, Any], *, step: int, steps: int, batches: int, validates: bool) -> dict[str, Any]:
    """The state of Lightning's fit loop when `Checkpoints` saves a step: a function of the step alone.

    A run can thus resume with its batches distributed differently, and repeats an interrupted validation, which
    Lightning would skip.

    Args:
        fresh: the state of a loop that has not run.
        steps: steps of the whole run.
        batches: batches per step and process.
        validates: whether a validation follows the step.
    """
    done = step * batches
    unfinished = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    numbers = {"ready": done, "started": done, "processed": done, "completed": done - 1}
    progress = {
        "epoch_progress": unfinished,
        "epoch_loop.batch_progress": numbers,
        "epoch_loop.scheduler_progress": {"ready": step, "completed": step},
        "epoch_loop.val_loop.batch_progress": unfinished if validates else dict.fromkeys(unfinished, 0),
    }
    loops = dict(fresh)
    for name, counts in progress.items():
        loops[name] = {**loops[name], "total": counts, "current": counts}
    loops["epoch_loop.batch_progress"]["is_last_batch"] = step == steps
    # Lightning increments it when the loop starts, and again if it starts with a validation.
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": step - 1 - validates}
    taken = {"ready": step, "completed": step}
    zeroed = {**taken, "started": step}
    loops["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {"total": taken, "current": taken},
            "zero_grad": {"total": zeroed, "current": zeroed},
        }
    }
    return loops
