"""Muon: orthogonalised steps for hidden matrices and convolutions, Adam for everything else."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

STACKED = 1 << 24  # elements of equally shaped matrices that are orthogonalised at once


class Muon(Optimizer):
    """Momentum that is orthogonalised before every step of a matrix (Jordan 2024, kellerjordan.github.io/posts/muon).

    All directions of a matrix thus learn at the same speed. `torch.optim.Muon` computes only in bf16, which is very
    slow on CPUs without bf16 instructions, and accepts only matrices; this one computes in the parameters' precision.

    Args:
        matrices: parameters (rows, columns), or convolution weights (out, in, height, width), treated as matrices of
            `out` rows. Their steps are scaled to the size of Adam's (Liu et al. 2025, arXiv 2502.16982), so that one
            learning rate suits all parameters.
        others: vectors, embeddings, and the first and last layers, updated by Adam with `betas`.
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
        """Takes one step, after calling `closure` to compute the gradients."""
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
        """The state of a parameter; averages are initialised to zero."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in averages}
        return state

    def _orthogonal_step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape together, with a few large products in place of many small ones."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self._state(matrix, "average")["average"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov momentum
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
    """Whether a parameter is a matrix inside a block, or a convolution other than the first and the last."""
    if parameter.dim() == 4:
        return ".conv_in." not in name and ".conv_out." not in name
    return parameter.dim() == 2 and "blocks." in name


def _stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of equally shaped matrices, each with at most `STACKED` elements, or a single matrix."""
    for shape, group in groupby(sorted(matrices, key=lambda matrix: matrix.shape), key=lambda matrix: matrix.shape):
        alike, count = list(group), max(1, STACKED // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix (..., rows, columns) with the same singular vectors, and all singular values near 1.

    A quintic Newton-Schulz iteration with Jordan's coefficients: the values end between about 0.7 and 1.2. Every step
    multiplies by a polynomial of x x^T, so that all products but the first and last involve only the smaller side.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)

    def polynomial(gram: Tensor) -> Tensor:
        return 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram

    product = factor = polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        product = factor @ product
    x = product @ x
    return x.mT if tall else x
