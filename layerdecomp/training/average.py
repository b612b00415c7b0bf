"""An exponential moving average (EMA) of the trained tensors, which is validated and written in their place.

Lightning's own averaging would copy the whole module, including the frozen parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from layerdecomp.training.base import Job


class RunningAverage(Callback):
    """The average over steps; its state is part of a checkpoint.

    The decay ramps up as min(decay, (1 + n) / (10 + n)) over steps n, so that the initial weights are soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {}
        self.steps = 0  # averaged so far
        self._step = 0  # the trainer's step when last averaged
        self._trained: dict[str, Tensor] = {}  # saved while the averages replace them

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensors, self.steps = state_dict["tensors"], state_dict["steps"]

    def on_train_start(self, trainer: Trainer, job: Job) -> None:  # type: ignore[override]
        trained = dict(job.trained())
        known = self.tensors or trained
        self.tensors = {name: known[name].detach().to(p.device, copy=True) for name, p in trained.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, job: Job, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, parameter in job.trained():
            self.tensors[name].lerp_(parameter, 1 - decay)

    def on_validation_start(self, trainer: Trainer, job: Job) -> None:  # type: ignore[override]
        self._swap_in(job)

    def on_validation_end(self, trainer: Trainer, job: Job) -> None:  # type: ignore[override]
        self._swap_out(job)

    def on_exception(self, trainer: Trainer, job: Job, exception: BaseException) -> None:  # type: ignore[override]
        self._swap_out(job)

    @contextmanager
    def applied(self, job: Job) -> Iterator[None]:
        """Replaces the trained tensors by their averages within the context."""
        self._swap_in(job)
        try:
            yield
        finally:
            self._swap_out(job)

    @torch.no_grad()
    def _swap_in(self, job: Job) -> None:
        if not self.tensors:  # the validation before the first step
            return
        for name, parameter in job.trained():
            self._trained[name] = parameter.detach().clone()
            parameter.copy_(self.tensors[name])

    @torch.no_grad()
    def _swap_out(self, job: Job) -> None:
        for name, parameter in job.trained():
            if name in self._trained:
                parameter.copy_(self._trained.pop(name))
