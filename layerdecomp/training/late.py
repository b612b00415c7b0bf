"""Numbers that a step computes and the host reads a step later, when they have long arrived.

`tensor.item()` waits until the device has done all that it was told, and leaves it with nothing to do meanwhile.
"""

import torch
from torch import Tensor


class Late:
    """A vector on its way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers.detach()
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers; waits for no more than what computes them."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def summed(numbers: Tensor) -> Tensor:
    """The sum of a vector over all ranks, in place; in a process alone, the vector as it is.

    Lightning's `strategy.reduce` begins with a barrier, for which the host waits until the device has done all that it
    was told.
    """
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
    return numbers


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor, brought to a device without waiting for what that still does."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
