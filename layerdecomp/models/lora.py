"""Low-rank adaptation of linear layers, in place and without renaming (Hu et al. 2021, arXiv 2106.09685)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerdecomp.errors import InputError
from layerdecomp.models.blocks import autocast_device, autocast_disabled


@dataclass
class LoRAConfig:
    """Which linear layers of an `MMDiT` are adapted, and at which rank and scale.

    `targets` are shell-style patterns over module names, where `*` also matches dots; the default matches every
    attention and feed-forward linear of both kinds of block. An empty list adapts none.
    """

    rank: int = 256
    alpha: float | None = None  # None: equal to rank, so that the scale is 1
    targets: list[str] = field(
        default_factory=lambda: [
            "double_blocks.*_attn.qkv",
            "double_blocks.*_attn.proj",
            "double_blocks.*_mlp.*",
            "single_blocks.*.linear1",
            "single_blocks.*.linear2",
        ]
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank = {self.rank}: expected a positive whole number")
        if self.alpha == 0:
            raise InputError("lora.alpha = 0, at which LoRA adds nothing; expected another number, or null (the rank)")

    @property
    def scale(self) -> float:
        """Factor of the low-rank product B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the linear layer of this name is adapted."""
        return any(fnmatchcase(name, pattern) for pattern in self.targets)


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` is one of torchao's tensor subclasses."""
    # Asks the type: a compiler does not see attributes of the tensor.
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(type(weight), "__tensor_flatten__")


def dense(weight: Tensor) -> Tensor:
    """`weight`, dequantised if it is quantised."""
    if not is_quantized(weight):
        return weight
    nf4 = "get_original_weight"  # NF4Tensor's name for it
    plain: Tensor = getattr(weight, nf4 if hasattr(type(weight), nf4) else "dequantize")()
    return plain


class _QuantizedLinear(torch.autograd.Function):
    """x W^T + b with a quantised W, dequantised again in the backward pass so that autograd saves no dense copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dense(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ dense(ctx.weight).to(gradient.dtype), None, None


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained; if its weight is quantised, autograd saves no dense copy of it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not is_quantized(self.weight):
            return super().forward(x)
        out: Tensor = _QuantizedLinear.apply(x, self.weight, self.bias)
        return out


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T of rows x (N, in_features), with gradients for x, A and B.

    Autograd saves x, x A^T and the parameters themselves: neither casts of A and B, half as large as these, nor a dense
    copy of a quantised W. `addmm_` saves a separate pass for each sum: over the output, and over the gradient of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low_rank = F.linear(x, a.to(x.dtype))  # (N, rank)
        ctx.save_for_backward(x, low_rank, weight, a, b)
        ctx.scale = scale
        return F.linear(x, dense(weight), bias).addmm_(low_rank, b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, low_rank, weight, a, b = ctx.saved_tensors
        dtype, d_x = gradient.dtype, None
        with autocast_disabled(gradient):  # in-place operations do not cast
            d_low_rank = ctx.scale * (gradient @ b.to(dtype))  # (N, rank)
            d_a, d_b = d_low_rank.t() @ x, ctx.scale * (gradient.t() @ low_rank)
            if ctx.needs_input_grad[0]:
                d_x = (gradient @ dense(weight).to(dtype)).addmm_(d_low_rank, a.to(dtype))
        return d_x, None, None, d_a.to(a.dtype), d_b.to(b.dtype), None


def freeze_quantized(model: nn.Module) -> None:
    """Turns every plain linear layer of `model` with a quantised weight into a `FrozenLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and is_quantized(module.weight):
            module.__class__ = FrozenLinear  # same object and parameters, only another forward


class LoRALinear(FrozenLinear):
    """A frozen linear layer plus `scale * B A`.

    Reuses the `weight` and `bias` of the layer it replaces, under the same names, and adds `lora_A.weight` (rank, in)
    and `lora_B.weight` (out, rank). B starts at zero, so the initial output is the base's, bit for bit. The base weight
    may be quantised; A and B are float32 for the optimizer and are cast to the input's dtype.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")  # no memory: the parameters come from base
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = scale
        self.adapted = True  # False inside `without_lora`: the output is the base layer's
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)  # A keeps nn.Linear's Kaiming-uniform initialisation

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not self.adapted:
            return super().forward(x)
        if self._merged_is_cheaper(x.numel() // self.in_features):
            return F.linear(x, self._sum().to(x.dtype), self.bias)
        rows = x.flatten(0, -2)
        if torch.is_autocast_enabled(device := autocast_device(x)):
            rows = rows.to(torch.get_autocast_dtype(device))
        factors = self.lora_A.weight, self.lora_B.weight
        out: Tensor = _AdaptedLinear.apply(rows, self.weight, self.bias, *factors, self.scale)
        return out.view(*x.shape[:-1], self.out_features)

    def _merged_is_cheaper(self, tokens: int) -> bool:
        """Whether W + scale * B A, forward and backward, takes fewer multiplications than W and B A separately.

        It does where the rank is a large fraction of the width, as in small models.
        """
        rank = self.lora_A.out_features
        as_one = self.in_features * self.out_features * (tokens + 3 * rank)
        return as_one < 3 * rank * (self.in_features + self.out_features) * tokens

    def _sum(self) -> Tensor:
        """W + scale * B A, (out_features, in_features), in float32; autocast computes the product in bf16."""
        return dense(self.weight).float() + self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with weight W + scale * B A, which overwrites this layer's weight and reuses it."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        self.weight.copy_(self._sum())
        return linear


def adapted_layers(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the linear layers of `model` that a config adapts, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and config.adapts(name)]


def inject_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Replaces the targeted linear layers of `model` with `LoRALinear`, in place; also works on the meta device.

    The targeted weights are frozen; every other parameter is left unchanged.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        InputError: a pattern matches no linear layer, or the model already has LoRA layers.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, LoRALinear) for module in linears.values()):
        raise InputError("the model already has LoRA layers: merge them with merge_lora before injecting again")
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            wider = [f"{pattern}.*"] if any(fnmatchcase(name, f"{pattern}.*") for name in linears) else []
            nearest = [*wider, *get_close_matches(pattern, linears, n=4, cutoff=0.0)]
            raise InputError(
                f"lora.targets: pattern {pattern!r} matches no linear layer of the model; expected whole names, with * "
                f"for any part, such as {', '.join(nearest)}"
            )
    names = adapted_layers(model, config)
    for name in names:
        model.set_submodule(name, LoRALinear(linears[name], config.rank, config.scale))
    return names


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Disables every `LoRALinear` of `model` within the context: outputs are the base layers', bit for bit.

    To be precise, sets `adapted` to False on every module with such a flag, which any other new layer may have, too.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "adapted", None), bool)]
    for layer in layers:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapted = True


def merge_lora(model: nn.Module) -> nn.Module:
    """Folds every `LoRALinear` of `model` into a plain `nn.Linear`, in place, and returns the model.

    The sum is computed in float32 and rounded once to the weight's dtype. Layers with a quantised weight are kept:
    quantising the sum would lose precision, and storing it dense would undo the saving in memory.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear) and not is_quantized(module.weight):
            model.set_submodule(name, module.merged())
    return model
