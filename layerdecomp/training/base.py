"""What the three jobs share: what a checkpoint holds, the optimizer, the log."""

import json
import math
import os
import subprocess
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from layerdecomp.config import RunConfig
from layerdecomp.data.datamodule import Positions, collate, open_samples
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share, write_metrics
from layerdecomp.flow import seed_at, seeded_normal
from layerdecomp.quantization import adamw, check_optimizer
from layerdecomp.tensor_files import Metadata, file_sha256
from layerdecomp.training.checkpoints import loops_at
from layerdecomp.training.faults import FaultCount, StepGuard, fitting_settings, poisoned
from layerdecomp.training.late import Late, summed, to_device
from layerdecomp.training.muon import Muon, is_hidden
from layerdecomp.weights import copy_tensors, date_of_writing


def resolve_precision(setting: str) -> str:
    """`train.precision` as Lightning names it; auto is bf16-mixed where the device has instructions for it."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def local_device() -> str:
    """Where this process trains: of the GPUs of a node, the one that its launcher gave it by number."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or 0}"


def every_fourth(places: Sequence[int], like: Tensor) -> Tensor:
    """Which samples of a batch get a rarer treatment: a quarter of all places, (B, 1, 1, 1) bool, where `like` is."""
    return to_device(torch.tensor([place % 4 == 3 for place in places]), like.device).view(-1, 1, 1, 1)


def source_commit() -> str:
    """The commit of the code that runs, marked if files differ from it; "unknown" outside a git checkout."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _as(before: Any, value: Any) -> Any:
    """A setting of an optimizer, as a tensor where it was one (torchao's rates are)."""
    return torch.as_tensor(value).to(before) if isinstance(before, Tensor) else value


def _file(path: str, sha256: str) -> str:
    return f"{path} (sha256 {sha256[:8]})" if sha256 else path


class Job(LightningModule):
    """A training job. Its checkpoints hold the trained tensors only: the frozen ones have files of their own."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.run = config
        if config.optim.bits == 8:
            check_optimizer("optim.bits=8")  # now, so that checkpoints with its tensors can be read
        torch.manual_seed(config.seed)  # the first weights of whatever a job builds
        self._commit = source_commit()  # now: the files may move on while the run trains
        self._step_started: float | None = None
        self._losses: list[Tensor] = []  # of the batches of a step
        self._means: dict[str, Tensor] = {}  # of the losses of a step
        self._pending: tuple[int, list[str], Late] | None = None  # a step whose numbers are not logged yet
        self.shown: dict[str, float] = {}  # beside the progress bar
        self.guard, self.faults = StepGuard(config.train.max_skipped), FaultCount(config.data.max_faulty)

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The scalar to minimise, under "loss", and others worth a curve."""

    @property
    def less_memory(self) -> str:
        """What to set where not even one sample fits."""
        return "lower the size of the pictures"

    @abstractmethod
    def finish(self, run_dir: Path, share: Share) -> None:
        """Writes what the run is for into its directory: weights, metrics, pictures. Called on every rank.

        Args:
            share: of the work that this rank may do; the first one writes.
        """

    def cpu(self) -> Self:
        """Leaves everything where it is: Lightning calls this after validating and after training.

        Each rank of a machine would copy the frozen weights into its memory, before they go back to the same device.
        """
        return self

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its tensors where the model is."""
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def drawn_normal(self, positions: Sequence[int], shape: Sequence[int], like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal numbers (B, *shape), where and as precise as `like` is; see `seeded_normal`."""
        return to_device(seeded_normal(self.run.seed, positions, shape, stream), like.device).to(like.dtype)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Makes whatever else a model draws, such as dropout, a pure function of the seed and the samples as well."""
        torch.manual_seed(seed_at(self.run.seed, batch["position"][0], stream=2))  # 0 and 1 are noise and times
        self.faults.note(batch["faults"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.loss(batch)
        size = len(batch["position"])
        self.guard.note(batch["position"], losses["loss"])
        self._losses.append(torch.stack([value.detach() for value in losses.values()]))
        if len(self._losses) == self.trainer.accumulate_grad_batches:
            means = summed(torch.stack(self._losses).mean(dim=0)) / self.trainer.world_size
            self._losses, self._means = [], dict(zip(losses, means, strict=True))
        self._rate_samples(size * self.trainer.world_size)
        return poisoned(losses["loss"])

    def log_pending(self) -> None:
        """Logs the step before, whose numbers have arrived by now."""
        if self._pending is None:
            return
        (step, names, numbers), self._pending = self._pending, None
        figures = dict(zip(names, numbers.read(), strict=True))
        self.shown["loss"] = figures["loss"]
        figures |= {"lr": self.run.optim.lr * self._rate(step), "skipped": self.guard.skipped}
        rates = {name: value for name, value in self.shown.items() if name != "loss"}
        if self.logger is not None:
            self.logger.log_metrics({f"train/{name}": value for name, value in figures.items()} | rates, step)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the gradient of a step, or leaves the step out: without gradients, an optimizer changes nothing.

        A fused optimizer leaves it out by itself, so that the host does not wait for the backward pass to learn of it.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip if self.run.optim.clip > 0 else math.inf)
        self.log_pending()
        figures = {**self._means, "grad_norm": norm}
        self._pending = self.global_step, [*figures], Late(torch.stack([*figures.values()]))
        step = self.trainer.global_step + 1
        if all(group.get("fused") for group in optimizer.param_groups) and not isinstance(norm, DTensor):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # its kernel looks at it
            self.guard.judge_later(norm, step, self.sample_names)
        elif not self.guard.judge(norm, step, self.sample_names):
            for parameter in parameters:
                parameter.grad = None

    def sample_names(self, positions: Sequence[int]) -> list[str]:
        """How a log calls the samples at some positions: of those whose loss alone is not finite, or else of all."""
        data = self.trainer.datamodule.training  # type: ignore[attr-defined]
        with torch.no_grad():
            culprits = [position for position in positions if not math.isfinite(self._loss_of([position]).item())]
        return [f"{position} ({data.name(position % len(data))})" for position in culprits or positions]

    def _loss_of(self, positions: Sequence[int]) -> Tensor:
        """The loss of the samples at some positions, made anew in this process."""
        samples = Positions(self.trainer.datamodule.training)  # type: ignore[attr-defined]
        batch = self.on_device(collate([samples[position] for position in positions]))
        with self.trainer.precision_plugin.forward_context():
            return self.loss(batch)["loss"]

    def what_fits(self) -> str:
        """Which settings fit the device after a step did not, found by trying."""
        parameters = [parameter for _, parameter in self.trained()]
        train = self.run.train
        sizes = train.batch_size, train.accumulate
        return fitting_settings(lambda size: self._loss_of(range(size)), parameters, *sizes, self.less_memory)

    def sound(self) -> bool:
        """Whether what is trained is worth keeping: the last step counted, and all numbers are finite."""
        self.log_pending()
        self.guard.settle(self.sample_names)
        return self.guard.in_a_row == 0 and all(bool(value.isfinite().all()) for _, value in self.trained())

    def _rate_samples(self, samples: int) -> None:
        now = time.perf_counter()
        if self._step_started is not None:
            self.shown["samples/s"] = samples / (now - self._step_started)
        self._step_started = now

    def on_validation_start(self) -> None:
        self._step_started = None  # the next step's rate would count the validation

    def trained(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP does not send when it starts: frozen parts, which all ranks read from the same files."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: parameter.detach() for name, parameter in self.trained()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        copy_tensors("the checkpoint", state_dict, dict(self.trained()), "this run's model")

    @property
    def frozen_files(self) -> list[str]:
        """The weight files that what is trained belongs to."""
        return []

    def frozen_sha256(self) -> dict[str, str]:
        """The checksums of `frozen_files`, each read once in a process."""
        return {path: file_sha256(Path(path)) for path in self.frozen_files}

    def on_fit_start(self) -> None:
        self.frozen_sha256()  # now: reading 24 GB would hold up the step of the first save, on every rank

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["frozen_sha256"] = self.frozen_sha256()
        checkpoint["optimizer"] = self._optimizer_kind
        checkpoint["skipped_steps"] = self.guard.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_frozen(checkpoint.get("frozen_sha256", {}))
        self._take_own_rates(checkpoint)
        self.guard.skipped = checkpoint.get("skipped_steps", 0)
        step, train = checkpoint["global_step"], self.run.train
        checkpoint["loops"]["fit_loop"] = loops_at(
            self.trainer.fit_loop.state_dict(),
            step=step,
            steps=train.steps,
            batches=train.accumulate,
            validates=step % train.validate_every == 0 and step < train.steps,
        )

    def _check_frozen(self, then: Mapping[str, str]) -> None:
        """Compares files by content: they may lie elsewhere now."""
        pairs = zip_longest(then.items(), self.frozen_sha256().items(), fillvalue=("none", ""))
        changed = [f"{_file(*before)} then, {_file(*now)} now" for before, now in pairs if before[1] != now[1]]
        if changed:
            raise InputError(
                f"this run was started with other frozen files: {'; '.join(changed)}; put back or name the files of "
                "then, or start anew with resume=never"
            )

    @property
    def _optimizer_kind(self) -> str:
        return "muon" if self.run.optim.muon else f"adamw, {self.run.optim.bits} bits"

    def _take_own_rates(self, checkpoint: dict[str, Any]) -> None:
        """Of the optimizer, a checkpoint gives the averages; its settings are the config's, which may be others."""
        found, config = checkpoint.get("optimizer", self._optimizer_kind), self.run.optim
        if found != self._optimizer_kind:
            raise InputError(
                f"the checkpoint's optimizer is {found}, and this run's {self._optimizer_kind}; go on with optim.muon "
                "and optim.bits as they were"
            )
        for scheduler, optimizer in zip(checkpoint["lr_schedulers"], checkpoint["optimizer_states"], strict=True):
            bases = [_as(base, config.lr) for base in scheduler["base_lrs"]]
            rates = [base * self._rate(scheduler["last_epoch"]) for base in bases]  # to the bit what it had itself
            scheduler.update(base_lrs=bases, _last_lr=rates)
            for group, base, rate in zip(optimizer["param_groups"], bases, rates, strict=True):
                now = {
                    "lr": rate,
                    "initial_lr": base,
                    "betas": tuple(config.betas),
                    "weight_decay": config.weight_decay,
                }
                group.update({key: _as(group[key], value) for key, value in now.items() if key in group})

    def configure_optimizers(self) -> Any:
        config = self.run.optim
        trained = dict(self.trained())
        betas = (config.betas[0], config.betas[1])
        optimizer: Optimizer
        if config.muon:
            matrices, others = (
                [p for name, p in trained.items() if is_hidden(name, p) is kind] for kind in (True, False)
            )
            optimizer = Muon(matrices, others, config.lr, betas)
        else:
            optimizer = adamw(trained.values(), config.bits, config.lr, betas, config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """The learning rate of a step, as a share of `optim.lr`."""
        config, steps = self.run.optim, self.run.train.steps
        rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        if not config.decay:
            return rise
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    def provenance(self, figures: Mapping[str, float]) -> Metadata:
        """What a weight file says of the run that made it."""
        return {
            "steps": str(self.run.train.steps),
            "seed": str(self.run.seed),
            "data": json.dumps(asdict(self.run.data)),
            "commit": self._commit,
            "ema": str(self.run.train.ema),
            "date": date_of_writing(),
            "figures": json.dumps({name: value for name, value in figures.items() if math.isfinite(value)}),
        }

    def report(self, run_dir: Path, row: str, figures: Mapping[str, float], grid: np.ndarray) -> None:
        """Prints the figures of the held-out scenes and writes them and a picture into the run's directory."""
        config = self.run.evaluate
        for name, value in figures.items():
            print(f"{name} {value:.4f}  ({config.samples} held-out scenes)")
        protocol = {"data": self.run.data.source, "split": "test", "count": config.samples, "seed": config.seed}
        write_metrics(run_dir / "metrics.json", {row: figures}, protocol)
        Image.fromarray(grid).save(run_dir / "samples.png")

    def held_out(self) -> dict[str, Any]:
        """The scenes that `report` is about, as one batch without cues."""
        config = self.run.evaluate
        data = open_samples(self.run.data, "test", config.seed, config.samples, with_cues=False)
        return self.on_device(collate([data[i] for i in range(len(data))]))

    def show(self, tag: str, grid: np.ndarray) -> None:
        """Puts a picture (H, W, 3) uint8 on TensorBoard, if that is where the run logs."""
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_image(tag, grid, self.global_step, dataformats="HWC")
