"""The base class of the three training jobs: checkpoint contents, optimizer, logging."""

import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from layerdecomp.config import RunConfig
from layerdecomp.data.datamodule import RepeatedSamples, collate, open_samples
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share, write_metrics
from layerdecomp.flow import seed_at, seeded_normal
from layerdecomp.imaging.layers import Pixels, write_picture
from layerdecomp.memory import OPTIMIZER_BYTES
from layerdecomp.quantization import adamw, check_optimizer
from layerdecomp.tensor_files import Metadata, file_sha256
from layerdecomp.training.checkpoints import loops_at
from layerdecomp.training.deferred import Deferred, all_reduce_sum, to_device
from layerdecomp.training.faults import FaultCount, StepGuard, fitting_settings, nan_if_not_finite
from layerdecomp.training.muon import Muon, is_hidden
from layerdecomp.training.provenance import UNKNOWN, Provenance
from layerdecomp.weights import copy_tensors


def resolve_precision(setting: str) -> str:
    """Lightning's name for `train.precision`; auto is bf16-mixed on devices with native bf16, else 32-true."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def local_device() -> str:
    """The device that this process trains on: the CPU, or the GPU that the launcher assigned by local rank."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or 0}"


def every(period: int, places: Sequence[int], like: Tensor) -> Tensor:
    """Selects the last of every `period` places: a bool mask (B, 1, 1, 1) on the device of `like`."""
    chosen = torch.tensor([place % period == period - 1 for place in places])
    return to_device(chosen, like.device).view(-1, 1, 1, 1)


def _like(old: Any, value: Any) -> Any:
    """An optimizer setting, as a tensor if the old value is one (as torchao's learning rates are)."""
    return torch.as_tensor(value).to(old) if isinstance(old, Tensor) else value


def _with_checksum(path: str, sha256: str) -> str:
    return f"{path} (sha256 {sha256[:8]})" if sha256 else path


class Job(LightningModule):
    """A training job. Its checkpoints hold only the trained tensors: frozen ones are loaded from their own files."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.run = config
        if config.optim.bits == 8:
            check_optimizer("optim.bits=8")  # imports torchao, without which its checkpoints do not load
        torch.manual_seed(config.seed)  # for the initial weights
        self._provenance = Provenance(config.start)
        self._step_started: float | None = None
        self._losses: list[Tensor] = []  # of the batches of the current step
        self._means: dict[str, Tensor] = {}  # losses of the last step, averaged over batches and ranks
        self._pending: tuple[int, list[str], Deferred] | None = None  # the step whose values are not logged yet
        self.shown: dict[str, float] = {}  # in the progress bar
        self.guard = StepGuard(config.train.max_skipped)
        self.faults = FaultCount(config.data.max_faulty)

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The scalar to minimise, as "loss", and any other losses to log."""

    @property
    def memory_advice(self) -> str:
        """What to change if not even one sample fits into memory."""
        return "reduce the image size"

    @abstractmethod
    def finish(self, run_dir: Path, share: Share) -> None:
        """Writes the run's results into its directory: weights, metrics, images. Called on every rank.

        Args:
            share: this rank's share of the work; rank 0 writes.
        """

    def cpu(self) -> Self:
        """Leaves the model on its device: Lightning calls this after validation and after training.

        Otherwise each rank would copy the frozen weights to host memory, only to move them back.
        """
        return self

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its tensors moved to the model's device."""
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def seeded_noise(self, positions: Sequence[int], shape: Sequence[int], like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal noise (B, *shape) with the device and dtype of `like`; see `seeded_normal`."""
        return to_device(seeded_normal(self.run.seed, positions, shape, stream), like.device).to(like.dtype)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seeds all other random draws, such as dropout, so that they depend only on the seed and the samples."""
        torch.manual_seed(seed_at(self.run.seed, batch["position"][0], stream=2))  # streams 0 and 1: noise and times
        self.faults.note(batch["faults"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.loss(batch)
        size = len(batch["position"])
        self.guard.note(batch["position"], losses["loss"])
        self._losses.append(torch.stack([value.detach() for value in losses.values()]))
        if len(self._losses) == self.trainer.accumulate_grad_batches:
            means = all_reduce_sum(torch.stack(self._losses).mean(dim=0)) / self.trainer.world_size
            self._means = dict(zip(losses, means, strict=True))
            self._losses = []
        self._rate_samples(size * self.trainer.world_size)
        return nan_if_not_finite(losses["loss"])

    def log_pending(self) -> None:
        """Logs the previous step, whose values have reached the host by now."""
        if self._pending is None:
            return
        (step, names, values), self._pending = self._pending, None
        figures = dict(zip(names, values.read(), strict=True))
        self.shown["loss"] = figures["loss"]
        figures |= {"lr": self.run.optim.lr * self._rate(step), "skipped": self.guard.skipped}
        rates = {name: value for name, value in self.shown.items() if name != "loss"}
        for writer in self.loggers:
            writer.log_metrics({f"train/{name}": value for name, value in figures.items()} | rates, step)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clips the gradient, or skips the step if it is not finite: without gradients, the optimizer changes nothing.

        A fused optimizer skips the step by itself (`found_inf`), so that the host need not wait for the backward pass.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip if self.run.optim.clip > 0 else math.inf)
        self.log_pending()
        figures = {**self._means, "grad_norm": norm}
        self._pending = self.global_step, [*figures], Deferred(torch.stack([*figures.values()]))
        step = self.trainer.global_step + 1
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # read by its kernel
            self.guard.judge_later(norm, step, self.sample_names)
        elif not self.guard.judge(norm, step, self.sample_names):
            for parameter in parameters:
                parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning frees the gradients (4 GB at full size) only after the next forward pass

    def sample_names(self, positions: Sequence[int]) -> list[str]:
        """Names for the log of the samples whose own loss is not finite, or of all of them if none is to blame."""
        data = self.trainer.datamodule.training  # type: ignore[attr-defined]
        with torch.no_grad():
            culprits = [position for position in positions if not math.isfinite(self._loss_of([position]).item())]
        return [f"{position} ({data.name(position % len(data))})" for position in culprits or positions]

    def _loss_of(self, positions: Sequence[int]) -> Tensor:
        """The loss of the samples at `positions`, which are loaded again in this process."""
        samples = RepeatedSamples(self.trainer.datamodule.training)  # type: ignore[attr-defined]
        batch = self.on_device(collate([samples[position] for position in positions]))
        with self.trainer.precision_plugin.forward_context():
            return self.loss(batch)["loss"]

    def settings_that_fit(self) -> str:
        """Settings that fit on the device, found by trying them after a step ran out of memory."""
        parameters = [parameter for _, parameter in self.trained()]
        train = self.run.train
        sizes = train.batch_size, train.accumulate
        kept = OPTIMIZER_BYTES[self.run.optim.bits] + (4.0 if train.processes > 1 else 0.0)
        return fitting_settings(lambda size: self._loss_of(range(size)), parameters, *sizes, self.memory_advice, kept)

    def sound(self) -> bool:
        """Whether the trained tensors are worth saving: the last step was not skipped, and all values are finite."""
        self.log_pending()
        self.guard.settle(self.sample_names)
        return self.guard.in_a_row == 0 and all(bool(value.isfinite().all()) for _, value in self.trained())

    def _rate_samples(self, samples: int) -> None:
        now = time.perf_counter()
        if self._step_started is not None:
            self.shown["samples/s"] = samples / (now - self._step_started)
        self._step_started = now

    def on_validation_start(self) -> None:
        self._step_started = None  # else the next step's rate would include the validation

    def trained(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Frozen parameters, which DDP need not broadcast at the start: all ranks read them from the same files."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The trained tensors; a module that contains this one passes a `destination`, and a `prefix` for names."""
        state = {} if destination is None else destination
        state |= {prefix + name: value if keep_vars else value.detach() for name, value in self.trained()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        copy_tensors("the checkpoint", state_dict, dict(self.trained()), "this run's model")

    @property
    def frozen_files(self) -> list[str]:
        """The frozen weight files that the trained tensors depend on."""
        return []

    @property
    def input_files(self) -> list[str]:
        """All weight files that the run reads."""
        return [*self.frozen_files, *([] if self.run.start is None else [str(self.run.start)])]

    def frozen_sha256(self) -> dict[str, str]:
        """Checksums of `frozen_files`; each file is read once per process."""
        return {path: file_sha256(Path(path)) for path in self.frozen_files}

    def on_fit_start(self) -> None:
        self.frozen_sha256()  # now, since reading 24 GB would delay the first save on every rank

    def on_train_start(self) -> None:  # not called if the run has finished
        self._provenance.begin(self.global_step, self.trainer.precision, warns=self.trainer.is_global_zero)

    def on_train_end(self) -> None:
        self.log_pending()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trained"] = self._provenance.state()
        checkpoint["frozen_sha256"] = self.frozen_sha256()
        checkpoint["optimizer"] = self._optimizer_kind
        checkpoint["skipped_steps"] = self.guard.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_frozen(checkpoint.get("frozen_sha256", {}))
        self._set_hyperparameters(checkpoint)
        self.guard.skipped = checkpoint.get("skipped_steps", 0)
        self._provenance.load(checkpoint.get("trained", {"by": [UNKNOWN]}))  # older checkpoints do not record it
        if self._trainer is None:  # `load_from_checkpoint`
            return
        train = self.run.train
        step = checkpoint["global_step"]
        checkpoint["loops"]["fit_loop"] = loops_at(
            self.trainer.fit_loop.state_dict(),
            step=step,
            steps=train.steps,
            batches=self.trainer.accumulate_grad_batches,
            validates=step % train.validate_every == 0 and step < train.steps,
        )

    def _check_frozen(self, saved: Mapping[str, str]) -> None:
        """Raises `InputError` if frozen files have changed; compared by content, since they may have been moved."""
        pairs = zip_longest(saved.items(), self.frozen_sha256().items(), fillvalue=("none", ""))
        changed = [
            f"{_with_checksum(*before)} then, {_with_checksum(*now)} now"
            for before, now in pairs
            if before[1] != now[1]
        ]
        if changed:
            raise InputError(
                f"this run was started with other frozen files: {'; '.join(changed)}; restore or name the original "
                "files, or start over with resume=never"
            )

    @property
    def _optimizer_kind(self) -> str:
        return "muon" if self.run.optim.muon else f"adamw, {self.run.optim.bits} bits"

    def _set_hyperparameters(self, checkpoint: dict[str, Any]) -> None:
        """Replaces the optimizer's hyperparameters by the config's, which may have changed; its moments stay."""
        config = self.run.optim
        found = checkpoint.get("optimizer", self._optimizer_kind)
        if found != self._optimizer_kind:
            raise InputError(
                f"the checkpoint's optimizer is {found}, but this run's is {self._optimizer_kind}; resume with "
                "the original optim.muon and optim.bits"
            )
        for scheduler, optimizer in zip(checkpoint["lr_schedulers"], checkpoint["optimizer_states"], strict=True):
            bases = [_like(base, config.lr) for base in scheduler["base_lrs"]]
            rates = [base * self._rate(scheduler["last_epoch"]) for base in bases]  # bit-identical to the scheduler's
            scheduler.update(base_lrs=bases, _last_lr=rates)
            for group, base, rate in zip(optimizer["param_groups"], bases, rates, strict=True):
                settings = {
                    "lr": rate,
                    "initial_lr": base,
                    "betas": tuple(config.betas),
                    "weight_decay": config.weight_decay,
                }
                group.update({key: _like(group[key], value) for key, value in settings.items() if key in group})

    def configure_optimizers(self) -> Any:
        config = self.run.optim
        betas = (config.betas[0], config.betas[1])
        optimizer: Optimizer
        if config.muon:
            matrices = [p for name, p in self.trained() if is_hidden(name, p)]
            others = [p for name, p in self.trained() if not is_hidden(name, p)]
            optimizer = Muon(matrices, others, config.lr, betas)
        else:
            optimizer = adamw([p for _, p in self.trained()], config.bits, config.lr, betas, config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """The learning rate of a step as a fraction of `optim.lr`."""
        config = self.run.optim
        warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        if not config.decay:
            return warmup
        return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.run.train.steps))))

    def provenance(self, figures: Mapping[str, float]) -> Metadata:
        """Metadata for a weight file on the run that produced it."""
        return {
            "steps": str(self.run.train.steps),
            "seed": str(self.run.seed),
            "data": json.dumps(asdict(self.run.data)),
            "train": json.dumps(asdict(self.run.train)),
            "optim": json.dumps(asdict(self.run.optim)),
            **self._provenance.metadata(),
            "figures": json.dumps({name: value for name, value in figures.items() if math.isfinite(value)}),
        }

    def report(self, run_dir: Path, row: str, figures: Mapping[str, float], grid: Pixels) -> None:
        """Prints the metrics of the held-out scenes and writes them, with an image, to the run's directory."""
        config = self.run.evaluate
        for name, value in figures.items():
            print(f"{name} {value:.4f}  ({config.samples} held-out scenes)")
        protocol = {"data": self.run.data.source, "split": "test", "count": config.samples, "seed": config.seed}
        write_metrics(run_dir / "metrics.json", {row: figures}, protocol)
        write_picture(run_dir / "samples.png", grid)

    def held_out(self) -> dict[str, Any]:
        """The held-out scenes as one batch, without cues."""
        config = self.run.evaluate
        data = open_samples(self.run.data, "test", config.seed, config.samples, with_cues=False)
        return self.on_device(collate([data[i] for i in range(len(data))]))

    def show(self, tag: str, grid: Pixels) -> None:
        """Logs an image (H, W, 3) uint8 to the run's TensorBoard loggers."""
        for writer in self.loggers:
            if isinstance(writer, TensorBoardLogger):
                writer.experiment.add_image(tag, grid, self.global_step, dataformats="HWC")
