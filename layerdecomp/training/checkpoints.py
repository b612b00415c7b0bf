"""Checkpoints: written so that one can always be read, and what happens when a run is told to stop.

A file is written beside its name, forced to the disk, and renamed, while training goes on; the one before it is kept.
Both are zip archives, as `torch.save` makes them, in which every record has a checksum.
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
from layerdecomp.training.late import Late, summed, to_device

logger = logging.getLogger(__name__)
LAST, PREVIOUS, DAMAGED = "last.ckpt", "previous.ckpt", "damaged.ckpt"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; kill and preemption; what SLURM sends beforehand
WORTH_SAYING = 1.0  # seconds that a save waits for the one before
# Seconds that a checkpoint may still take when an error ends a run: alone, that of 12 GB at 200 MB/s. Of several ranks,
# Lightning kills all within five seconds of one's end, and what became of that one must be said before.
GRACE, GRACE_AMONG_RANKS = 60.0, 2.0


class StoppedError(Exception):
    """A run was told to stop, by a signal, and has left a checkpoint; `alone`, where other ranks do not know yet."""

    def __init__(self, reason: signal.Signals, step: int, alone: bool = False) -> None:
        super().__init__(f"stopped by {reason.name} after step {step}")
        self.reason, self.alone = reason, alone


def read_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint, once the checksums of all its records have been found right.

    Raises:
        InputError: it is damaged, or none of this package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (record := archive.testzip()) is not None:
                raise ValueError(f"{record} has another checksum than when it was written")
        checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        _ = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is no checkpoint of this package, or is damaged: {error}") from error
    return checkpoint


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint of a run, or the one before it where the last is damaged; None if there are none.

    Raises:
        InputError: there are some, none of which can be read.
    """
    faults = []
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        if path.is_file():
            try:
                read_checkpoint(path, device="meta")
            except InputError as error:
                faults.append(str(error))
            else:
                if faults:
                    logger.warning("%s; going on from the one before it, %s", faults[0], path)
                    _put_aside(run_dir / LAST)
                return path
    if faults:
        raise InputError(f"{'; '.join(faults)}; resume=never starts anew and keeps the old run aside")
    return None


@rank_zero_only
def _put_aside(path: Path) -> None:
    """Keeps a damaged checkpoint from becoming the one before the next."""
    os.replace(path, path.with_name(DAMAGED))


class CheckpointFiles(CheckpointIO):
    """Where Lightning's checkpoints go: a new one is complete on the disk before an old one is given up.

    Training waits for no more than a copy in the host's memory, which a thread then writes. So that there is one such
    copy, one checkpoint is written at a time: a save that comes meanwhile waits. What the thread finds wrong is raised
    by whichever method is called next.
    """

    def __init__(self) -> None:
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = False
        self._renaming = threading.Lock()  # so that giving up comes before or after it
        atexit.register(self.give_up, GRACE)  # Python's end, met within `torch.save`, aborts the process

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begins to write; later changes of what is saved make no difference. Raises as `wait` does."""
        began = time.monotonic()
        self.wait()
        if (waited := time.monotonic() - began) > WORTH_SAYING:
            logger.warning(
                "step %d was saved %.0f s late, since the checkpoint before it was still being written; raise "
                "train.checkpoint_every, or take a faster disk",
                checkpoint["global_step"],
                waited,
            )
        self._given_up = False
        # A daemon: a disk that does not answer must not keep the process from ending.
        written = on_host(checkpoint), Path(path)
        self._writer = threading.Thread(target=self._put, args=written, name="checkpoint", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raises `RunError` if a checkpoint could not be written; what was there before still is, then."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when what was saved is on the disk; raises as `check` does."""
        if self._writer is not None:
            self._writer.join()
        self.check()

    def give_up(self, after: float) -> None:
        """Gives what is being written so many seconds more, and leaves what was there before if they are too few.

        Raises nothing, since the run ends with another error, but logs that a checkpoint is missing.
        """
        if self._writer is not None:
            self._writer.join(after)
            with self._renaming:
                self._given_up = True
            self._writer.join(1.0)  # the next part of the file is the last
        error, self._error = self._error, None
        if error is not None:
            logger.warning("%s", error)

    def _put(self, checkpoint: dict[str, Any], path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            _write(partial, checkpoint, self._still_wanted)
            with self._renaming:
                self._still_wanted()
                if path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
                os.replace(partial, path)
            _sync_folder(path.parent)
        except OSError as error:
            fault = f"step {checkpoint['global_step']} could not be saved ({error}); {remedy(error, path.parent)}"
            self._error = RunError(fault)
            self._error.__cause__ = error
        except Exception as error:  # of ours, for the thread that trains
            self._error = error
        finally:
            with suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)

    def _still_wanted(self) -> None:
        if self._given_up:
            raise RunError("the last checkpoint was still being written and is not kept; the one before it is")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy with every tensor in the memory of this machine, which nothing that trains will change."""
    copied: dict[str, Any] = apply_to_collection(checkpoint, Tensor, _on_host)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor; of one on a GPU, in pinned memory, where it is once the GPU has done what it was told."""
    if is_traceable_wrapper_subclass(tensor):  # an optimizer's average in 8 bits: what it is made of, one by one
        names, context = tensor.__tensor_flatten__()
        parts = {name: _on_host(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    pinned = tensor.is_cuda
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return copy.copy_(tensor.detach(), non_blocking=pinned)


def _write(path: Path, checkpoint: dict[str, Any], still_wanted: Callable[[], None]) -> None:
    """Writes a file that is on the disk when this returns; `OSError` if it cannot be."""
    with path.open("wb", buffering=0) as file:  # no buffer that a process forked meanwhile would write as well
        watched = _Watched(file, still_wanted)
        try:
            torch.save(checkpoint, cast(IO[bytes], watched))  # it needs no more of a file than this
        except RuntimeError as error:
            raise (watched.error or error) from None
        os.fsync(file.fileno())


class _Watched:
    """A file that remembers why writing failed, which `torch.save` replaces by an error of its own."""

    def __init__(self, file: FileIO, still_wanted: Callable[[], None]) -> None:
        self.file, self.still_wanted = file, still_wanted
        self.error: OSError | RunError | None = None

    def write(self, content: bytes) -> int:
        try:
            left = memoryview(content)
            while left:  # one call writes 2 GB at most
                self.still_wanted()
                left = left[self.file.write(left) :]
            return len(content)
        except (OSError, RunError) as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """There is nothing to do, but `torch.save` asks."""


def _sync_folder(folder: Path) -> None:
    """Forces names to the disk; file systems that cannot do so keep them by themselves."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Checkpoints(Checkpoint):
    """Saves a run every `every` steps, before every validation, at its end, and when it is told to stop.

    A signal is acted on when the step is finished, by several ranks when the next one is, by all after the same. During
    a validation there is nothing to save, so that the first rank leaves at once, but for what is being written. A
    second Ctrl-C ends the process there and then.

    Args:
        files: what writes them.
        sound: whether what is trained is worth keeping.
    """

    def __init__(
        self, files: CheckpointFiles, run_dir: Path, *, every: int, validate_every: int, sound: Callable[[], bool]
    ) -> None:
        self.files, self.path, self.sound = files, run_dir / LAST, sound
        self.every, self.validate_every = every, validate_every
        self._signal: signal.Signals | None = None
        self._trainer: Trainer | None = None
        self._asked: Late | None = None  # how many ranks had a signal when the last step ended

    def on_validation_start(self, trainer: Trainer, job: LightningModule) -> None:
        self._listen(trainer)  # the first one is before training

    def on_train_start(self, trainer: Trainer, job: LightningModule) -> None:
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:  # after Lightning's own, which it takes back with them at the end
                signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        self._signal = signal.Signals(number)
        if self._signal is signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._trainer.is_global_zero and not self._trainer.validating:
                # Not by `print`, which may be at work.
                os.write(2, b"\nfinishing the step, then saving it; Ctrl-C again stops at once\n")
        if self._trainer.validating and self._trainer.is_global_zero:
            self.files.wait()
            raise StoppedError(self._signal, self._trainer.global_step, alone=self._trainer.world_size > 1)

    def on_train_batch_end(
        self, trainer: Trainer, job: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.files.check()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # in the middle of a step
            return
        step = trainer.global_step
        stop = self._told_to_stop(trainer)
        due = stop or step == trainer.max_steps or step % self.every == 0 or step % self.validate_every == 0
        if due and self.sound():
            trainer.save_checkpoint(self.path, weights_only=False)  # the optimizer and loops as well
        if stop:  # the first rank, whose exit status counts, may not have heard it yet
            self.files.wait()  # the others wait below
            heard = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            raise StoppedError(signal.Signals(int(trainer.strategy.reduce(heard, reduce_op="max"))), step)

    def on_train_end(self, trainer: Trainer, job: LightningModule) -> None:
        self.files.wait()

    def on_exception(self, trainer: Trainer, job: LightningModule, exception: BaseException) -> None:
        grace = GRACE if trainer.world_size == 1 else GRACE_AMONG_RANKS
        self.files.give_up(after=0.0 if isinstance(exception, KeyboardInterrupt) else grace)

    def _told_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank has a signal: of several, whether one had when the step before ended, which is known now."""
        if trainer.world_size == 1:
            return self._signal is not None
        told = to_device(torch.tensor([float(self._signal is not None)]), trainer.strategy.root_device)
        asked, self._asked = self._asked, Late(summed(told))
        return asked is not None and asked.read()[0] > 0


def loops_at(fresh: dict[str, Any], *, step: int, steps: int, batches: int, validates: bool) -> dict[str, Any]:
    """The state of Lightning's fit loop after a step, as `Checkpoints` saves it: a function of the step alone.

    So a run goes on in the same place when its batches are spread otherwise, and makes up for a validation that was cut
    off, which Lightning would pass over.

    Args:
        fresh: the state of a loop that has not run.
        steps: of the whole run.
        batches: of a process in a step.
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
    # counted up once as the loop begins, and once more if it begins with a validation
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
