"""Muon: steps of hidden matrices and convolutions in orthogonal directions; everything else by Adam."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

STACKED = 1 << 24  # numbers of matrices of one shape that are made orthogonal at once


class Muon(Optimizer):
    """Momentum, made orthogonal before every step of a matrix (Jordan 2024, kellerjordan.github.io/posts/muon).

    All directions of a matrix learn at the same speed. `torch.optim.Muon` computes in bf16 alone, which a CPU without
    instructions for it does very slowly, and takes nothing but matrices; this one computes in the parameters' own
    precision.

    Args:
        matrices: parameters (rows, columns), or those of convolutions (out, in, height, width), which count as
            matrices of `out` rows. Their steps are scaled to the size of Adam's (Liu et al. 2025, arXiv 2502.16982),
            so that one learning rate serves all.
        others: vectors, embeddings, and the first and last layer, for Adam with `betas`.
    """

    def __init__(
        self,
        matrices: Iterable[Parameter],
        others: Iterable[Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        groups = [{"params": list(matrices), "update": "muon"}, {"params": list(others), "update": "adam"}]
        super().__init__(
            [group for group in groups if group["params"]], {"lr": lr, "betas": betas, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; calls `closure`, which computes the gradients, first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["update"] == "muon":
                for alike in _stacks(moved):
                    self._orthogonal_step(alike, group)
            else:
                for parameter in moved:
                    parameter.sub_(self._adam(parameter, parameter.grad, group), alpha=group["lr"])
        return loss

    def _state(self, parameter: Tensor, *averages: str) -> dict[str, Any]:
        """What is kept of a parameter; the averages start at zero."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in averages}
        return state

    def _orthogonal_step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Steps matrices of one shape, whose many small products become a few large ones."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self._state(matrix, "average")["average"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's look ahead
        directions = orthogonalized(torch.stack([direction.flatten(1) for direction in ahead]))
        size = 0.2 * math.sqrt(max(directions.shape[1:]))
        shaped = [direction.view(matrices[0].shape) for direction in directions]
        torch._foreach_sub_(matrices, shaped, alpha=group["lr"] * size)

    def _adam(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self._state(parameter, "average", "squares")
        state["step"] = state.get("step", 0) + 1
        average, squares, (beta1, beta2) = state["average"], state["squares"], group["betas"]
        average.lerp_(gradient, 1 - beta1)
        squares.lerp_(gradient.square(), 1 - beta2)
        deviation = (squares / (1 - beta2 ** state["step"])).sqrt() + 1e-8
        return average / (1 - beta1 ** state["step"]) / deviation


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix inside a block, or a convolution's between the first and the last one."""
    if parameter.dim() == 4:
        return ".conv_in." not in name and ".conv_out." not in name
    return parameter.dim() == 2 and "blocks." in name


def _stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of matrices of one shape, each of which has at most `STACKED` numbers or one matrix."""
    for shape, group in groupby(sorted(matrices, key=lambda matrix: matrix.shape), key=lambda matrix: matrix.shape):
        alike, count = list(group), max(1, STACKED // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix (..., rows, columns) with the singular vectors of the given one and all singular values near 1.

    A quintic Newton-Schulz iteration with Jordan's coefficients: values end between about 0.7 and 1.2. Every step
    multiplies by a polynomial of x x^T, so that all but the first and the last product are of the smaller side only.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype).expand_as(gram)
    for _ in range(steps):
        factor = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x
