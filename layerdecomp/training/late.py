"""Values that a step computes and the host reads one step later, without a synchronisation.

`tensor.item()` blocks until the device has finished all queued work, after which it idles until the host queues more.
"""

import torch
from torch import Tensor


class Late:
    """A vector that is copied to the host asynchronously."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers.detach()
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The values; waits only for the work that computes them."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def summed(numbers: Tensor) -> Tensor:
    """All-reduces a vector in place (sum over ranks); a single process returns it unchanged.

    Lightning's `strategy.reduce` starts with a barrier, which blocks the host until the device has finished all queued
    work.
    """
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
    return numbers


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device without waiting for the work queued there."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
