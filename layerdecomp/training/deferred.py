"""Values that a step computes and the host reads one step later, without a synchronisation.

`tensor.item()` blocks until the device has finished all queued work, after which it idles until the host queues more.
"""

import torch
from torch import Tensor


class Deferred:
    """A vector that is copied to the host asynchronously."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values.detach()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The values; waits only for the work that computes them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def all_reduce_sum(values: Tensor) -> Tensor:
    """All-reduces a vector in place (sum over ranks); a single process returns it unchanged.

    Lightning's `strategy.reduce` starts with a barrier, which blocks the host until the device has finished all queued
    work.
    """
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device without waiting for the work queued there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
