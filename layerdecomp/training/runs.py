"""Runs: their directory, resuming, and the Lightning trainer."""

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from layerdecomp.config import (
    AutoencoderJobConfig,
    DecomposerJobConfig,
    InpainterJobConfig,
    RunConfig,
    TrainConfig,
    changed_keys,
    save_config,
)
from layerdecomp.data.datamodule import SampleData
from layerdecomp.dry_run import dry_run
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share
from layerdecomp.training.autoencoder import AutoencoderJob
from layerdecomp.training.average import RunningAverage
from layerdecomp.training.base import Job, resolve_precision
from layerdecomp.training.checkpoints import (
    LAST,
    PREVIOUS,
    CheckpointFiles,
    Checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.faults import end_with_parent, readable_errors
from layerdecomp.training.flow import FlowJob
from layerdecomp.training.inpainter import InpainterJob


def build_job(config: RunConfig) -> Job:
    """The LightningModule of a config."""
    if isinstance(config, DecomposerJobConfig):
        return DecomposerJob(config)
    if isinstance(config, AutoencoderJobConfig):
        return AutoencoderJob(config)
    assert isinstance(config, InpainterJobConfig)
    return InpainterJob(config)


def train(config: RunConfig) -> None:
    """Trains or resumes a run, and writes weights, metrics and images into its directory.

    Raises:
        InputError: the config, or a file that it names, cannot be used.
        RunError: a full disk, a dead process, too little memory, a non-finite loss; saved checkpoints are kept.
        SystemExit: a signal stopped the run, which has printed how to resume.
    """
    if config.train.dry_run:
        print(dry_run(config))
        return
    check_devices(config.train)  # before 24 GB are loaded
    run_dir = Path(config.run_dir)
    quiet_lightning()
    job = build_job(config)  # before open_run, so that a missing file or device leaves no directory behind
    data = SampleData(
        config.data,
        seed=config.seed,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        with_cues=isinstance(config, DecomposerJobConfig) and config.fusion.enabled,
        global_batch=config.train.global_batch,
        cache=job.cache if isinstance(job, FlowJob) else None,
    )
    trainer = build_trainer(config, run_dir, job)
    checkpoint = open_run(run_dir, config, job.input_files)
    if checkpoint is not None and trainer.is_global_zero:
        print(f"resuming from {checkpoint}; a finished run is only evaluated again (resume=never starts over)")
    if trainer.local_rank > 0:
        end_with_parent(trainer.global_rank)
    with readable_errors(trainer, config, job.settings_that_fit):
        if checkpoint is None:
            trainer.validate(job, data, verbose=False)  # metrics before training
        trainer.fit(job, data, ckpt_path=checkpoint, weights_only=True)
        with averaged(trainer, job):
            job.finish(run_dir, Share.join() if trainer.world_size > 1 else Share())


def check_devices(train: TrainConfig) -> None:
    """Raises `InputError` if this machine has too few GPUs, or a launcher started another number of processes."""
    started = started_processes()
    if started is not None and started != train.processes:
        raise InputError(
            f"the number of processes that torchrun, SLURM or another launcher has started is {started}, but "
            f"train.devices={train.devices} and train.nodes={train.nodes} make {train.processes}; set "
            "train.nodes, and train.devices per node, to what is started, or start as many (on SLURM, with srun)"
        )
    available = torch.cuda.device_count()
    if available and train.devices > available:
        raise InputError(
            f"train.devices is {train.devices}, but there are {available} GPUs; set train.devices={available}, and "
            "train.accumulate so that a step has as many samples as before"
        )


def started_processes() -> int | None:
    """The number of processes that a launcher has started for this run; None if Lightning starts them itself."""
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun, or Lightning in a process it started
        return int(os.environ["WORLD_SIZE"])
    return _srun_tasks() if on_slurm() else None


def _srun_tasks() -> int:
    # Only srun sets this; SLURM_NTASKS is also set in a batch script, which runs once.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def on_slurm() -> bool:
    """Whether SLURM assigns the ranks: always below a srun of several tasks, else where Lightning would say so."""
    if TorchElasticEnvironment.detect():  # torchrun, which is also used inside SLURM jobs
        return False
    in_shell = os.environ.get("SLURM_JOB_NAME") == "bash"  # srun --pty bash: its tasks are shells
    return (_srun_tasks() > 1 and not in_shell) or SLURMEnvironment.detect()


def averaged(trainer: Trainer, job: Job) -> AbstractContextManager[None]:
    """Replaces the trained tensors by their exponential moving average within the context, if there is one."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, RunningAverage)]  # type: ignore[attr-defined]
    return averages[0].applied(job) if averages else nullcontext()


def open_run(run_dir: Path, config: RunConfig, input_files: Iterable[str] = ()) -> Path | None:
    """Creates the run's directory and returns the checkpoint to resume from.

    An earlier run's directory is kept under another name, unless this run resumes from a checkpoint in it.

    Raises:
        InputError: as `find_checkpoint`, the directory cannot be written, or holds one of the run's `input_files` and
            would have to be renamed.
    """
    checkpoint = find_checkpoint(run_dir, config)
    if config.resume != "auto":
        if checkpoint is not None and run_dir.resolve() in checkpoint.parents:
            _abandon_later(run_dir.resolve(), checkpoint)
        else:
            _check_outside(run_dir, input_files, config.resume)
            _move_aside(run_dir)
    _write_config(run_dir, config)
    return checkpoint


def find_checkpoint(run_dir: Path, config: RunConfig) -> Path | None:
    """The checkpoint to resume from.

    With `resume=auto`, the last readable one of an earlier run of the same config; with `never`, none; else the given
    file.

    Raises:
        InputError: the directory holds a run of another config, or neither its checkpoints nor the given file can be
            read.
    """
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return _given_checkpoint(config.resume)
    checkpoint = newest_checkpoint(run_dir)
    described = run_dir / "config.yaml"
    if checkpoint is not None and described.is_file():
        _check_unchanged(checkpoint, changed_keys(config, described))
    return checkpoint


def _given_checkpoint(name: str) -> Path:
    checkpoint = Path(name)
    if not checkpoint.is_file():
        raise InputError(f"resume={checkpoint}: no such checkpoint; expected auto, never or an existing file")
    read_checkpoint(checkpoint, device="meta")
    return checkpoint.resolve()  # a symlink may be renamed along with its folder


def _check_unchanged(checkpoint: Path, changed: Mapping[str, str]) -> None:
    if changed:
        listed = "; ".join(f"{key}: {values}" for key, values in [*changed.items()][:5])
        raise InputError(
            f"{checkpoint.parent} holds a run with other settings ({listed}); choose another name=, or "
            f"resume={checkpoint} to continue from there with the new settings, or resume=never to start over and "
            "move the old run aside"
        )


def _check_outside(run_dir: Path, input_files: Iterable[str], resume: str) -> None:
    """Raises `InputError` if a file is in a directory that is to be moved: other ranks, and resuming, need it there."""
    for file in input_files:
        if run_dir.resolve() in Path(file).resolve().parents:
            raise InputError(
                f"resume={resume} moves {run_dir} aside, which holds {file}, an input of this run; choose another "
                "name=, or copy that file to another place and name it there"
            )


@rank_zero_only
def _move_aside(run_dir: Path) -> None:
    """Renames an earlier run's directory, if there is one."""
    if run_dir.exists():
        try:
            run_dir.rename(_first_free(run_dir.with_name(f"{run_dir.name}.{n}") for n in count(1)))
        except (OSError, ValueError) as error:  # ValueError: "." has no name
            raise InputError(f"run_dir {run_dir} cannot be moved aside ({error}); choose another run_dir=") from error


@rank_zero_only
def _abandon_later(run_dir: Path, checkpoint: Path) -> None:
    """Renames checkpoints later than the given one, so that they are not taken for those of the resumed run."""
    newest_first = [run_dir / LAST, run_dir / PREVIOUS]
    later_ones = newest_first[: newest_first.index(checkpoint)] if checkpoint in newest_first else newest_first
    for later in later_ones:
        if later.is_file():
            names = chain([f"abandoned-{later.name}"], (f"abandoned-{n}-{later.name}" for n in count(2)))
            later.rename(_first_free(map(run_dir.joinpath, names)))


def _first_free(paths: Iterable[Path]) -> Path:
    return next(path for path in paths if not path.exists())


@rank_zero_only
def _write_config(run_dir: Path, config: RunConfig) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(run_dir / "config.yaml", config)
    except OSError as error:
        raise InputError(f"run_dir {run_dir} cannot be written ({error}); choose another run_dir=") from error


def quiet_lightning() -> None:
    """Silences Lightning's warnings about what this package does on purpose."""
    expected = (
        "Checkpoint directory .* exists",  # the config is written before the first checkpoint
        "Found .* in eval mode",  # the frozen parts
        "You're resuming from a checkpoint that ended before the epoch",  # StepSampler starts at the right step
        "`broadcast_buffers` is deprecated",  # its replacement is newer than the oldest supported PyTorch
        "FSDP2-wrapped module .* returned a view tensor",  # the view is not modified in-place
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # called by Lightning itself
        "The '.*_dataloader' does not have many workers",  # `data.workers` is the user's choice
    )
    for message in expected:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


class StepBar(TQDMProgressBar):
    """A progress bar with a total, whose rate counts only the steps of this process if the run was resumed."""

    def get_metrics(self, trainer: Trainer, job: Job) -> dict[str, Any]:  # type: ignore[override]
        return {**super().get_metrics(trainer, job), **{name: f"{value:.4g}" for name, value in job.shown.items()}}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_start(trainer)
        bar = self.train_progress_bar
        batches = trainer.accumulate_grad_batches
        bar.total, bar.initial = trainer.max_steps * batches, trainer.global_step * batches
        bar.n = bar.initial


def build_strategy(train: TrainConfig) -> str | DDPStrategy:
    """DDP if there are several processes: it all-reduces gradients in buckets during the backward pass.

    Gradients are views of the buckets, which would otherwise hold a second copy of them.
    """
    if train.strategy == "auto" and train.processes == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def build_trainer(config: RunConfig, run_dir: Path, job: Job) -> Trainer:
    """The Lightning trainer: one epoch of `train.steps` steps, with validation and checkpoints at fixed steps."""
    train = config.train
    validate_every = min(train.validate_every, train.steps)
    files = CheckpointFiles()
    checkpoints = Checkpoints(
        files, run_dir, every=train.checkpoint_every, validate_every=validate_every, sound=job.sound
    )
    trainer = Trainer(
        default_root_dir=run_dir,
        max_steps=train.steps,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",  # metrics sum in float64, which mps lacks
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=build_strategy(train),
        precision=resolve_precision(train.precision),  # type: ignore[arg-type]
        accumulate_grad_batches=train.accumulate,
        deterministic=train.deterministic,
        val_check_interval=validate_every * train.accumulate,  # in batches
        num_sanity_val_steps=0,
        inference_mode=False,  # tensors made in the validation before training could not be trained
        log_every_n_steps=1,
        use_distributed_sampler=False,  # StepSampler distributes the batches
        logger=TensorBoardLogger(run_dir.parent, name=run_dir.name, version=""),
        # On SLURM, Lightning would write a checkpoint of its own, prefer it to ours, and requeue the job.
        plugins=[files, *([SLURMEnvironment(auto_requeue=False)] if on_slurm() else [])],
        callbacks=[checkpoints, StepBar(refresh_rate=5), *([RunningAverage(train.ema)] if train.ema else [])],
        enable_model_summary=False,
    )
    # With several ranks, it would wait for the device before every batch. `Checkpoints` reduces its own flag instead.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer
