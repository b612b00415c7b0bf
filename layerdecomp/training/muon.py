"""Muon: steps of hidden matrices in orthogonal directions; everything else by Adam."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class Muon(Optimizer):
    """Momentum, made orthogonal before every step of a matrix (Jordan 2024, kellerjordan.github.io/posts/muon).

    All directions of a matrix learn at the same speed. `torch.optim.Muon` computes in bf16 alone, which a CPU without
    instructions for it does very slowly, and takes nothing but matrices; this one computes in the parameters' own
    precision.

    Args:
        matrices: parameters (rows, columns). Their steps are scaled to the size of Adam's (Liu et al. 2025, arXiv
            2502.16982), so that one learning rate serves all.
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
            update = self._orthogonal if group["update"] == "muon" else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(update(parameter, parameter.grad, group), alpha=group["lr"])
        return loss

    def _state(self, parameter: Parameter, *averages: str) -> dict[str, Any]:
        """What is kept of a parameter; the averages start at zero."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in averages}
        return state

    def _orthogonal(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        average = self._state(parameter, "average")["average"]
        average.lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalized(gradient.lerp(average, group["momentum"]))  # Nesterov's look ahead
        return 0.2 * math.sqrt(max(parameter.shape)) * direction

    def _adam(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self._state(parameter, "average", "squares")
        state["step"] = state.get("step", 0) + 1
        average, squares, (beta1, beta2) = state["average"], state["squares"], group["betas"]
        average.lerp_(gradient, 1 - beta1)
        squares.lerp_(gradient.square(), 1 - beta2)
        deviation = (squares / (1 - beta2 ** state["step"])).sqrt() + 1e-8
        return average / (1 - beta1 ** state["step"]) / deviation


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix (rows, columns) with the singular vectors of the given one and all singular values near 1.

    A quintic Newton-Schulz iteration with Jordan's coefficients: values end between about 0.7 and 1.2. Every step
    multiplies by a polynomial of x x^T, so that all but the first and the last product are of the smaller side only.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    for _ in range(steps):
        factor = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
