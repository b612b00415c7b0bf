"""Quantisation by torchao: the frozen base in eight or four bits under unchanged names, and an 8-bit optimizer."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerdecomp.errors import InputError, needs_extra
from layerdecomp.models.lora import freeze_quantized

# Bits per weight: the code and its share of the scales (negligible for int8 and fp8, which have one per row).
BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4 + 8 / 64}


def check_format(name: str | None) -> None:
    """Raises `InputError` for an unknown format, or if torchao is missing; None is no quantisation."""
    if name is None:
        return
    if name not in BITS:
        raise InputError(f"quantize is {name!r}; expected null, {', '.join(BITS)}")
    with needs_extra(f"quantize={name}", "quantize"):
        import torchao.quantization  # noqa: F401


def quantized(tensor: Tensor, name: str) -> Tensor:
    """A matrix (out, in) quantised to one of the formats of `BITS`, on its device; its dtype stays that of computation.

    int8 and fp8 (e4m3): one scale per row. nf4: normal floats with one scale per 64 numbers, itself in int8 (Dettmers
    et al. 2023, arXiv 2305.14314).
    """
    if name == "nf4":
        with needs_extra("quantize=nf4", "quantize"):
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        if tensor.numel() % 64:
            raise InputError(f"quantize=nf4: found a matrix of {tensor.numel()} numbers, expected a multiple of 64")
        blocks = tensor.numel() // 64
        return to_nf4(tensor, 64, math.gcd(blocks, 256))
    with needs_extra(f"quantize={name}", "quantize"):
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    if name == "int8":
        found: Tensor = Int8Tensor.from_hp(tensor, granularity=PerRow())
    else:  # the lower bound avoids a division by zero for rows of zeros
        found = Float8Tensor.from_hp(tensor, granularity=PerRow(), hp_value_lb=1e-12)
    return found


def block_matrices(format: str | None) -> Callable[[str, Tensor], Tensor]:
    """A conversion for `load_state` that quantises the matrices inside the blocks and nothing else.

    Weights outside the blocks are half a percent of FLUX.1-Fill-dev and are not adapted by LoRA.
    """
    check_format(format)

    def convert(name: str, tensor: Tensor) -> Tensor:
        return quantized(tensor, format) if format and "_blocks." in name and tensor.dim() == 2 else tensor

    return convert


@torch.no_grad()
def quantize_blocks(transformer: nn.Module, format: str) -> None:
    """Quantises, in place, the frozen matrices inside a transformer's blocks."""
    convert = block_matrices(format)
    for path, module in transformer.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                module.register_parameter(name, nn.Parameter(convert(f"{path}.{name}", weight.data), False))
    freeze_quantized(transformer)


def check_optimizer_bits(key: str, bits: int) -> None:
    """Raises `InputError`, which names the config key, for a number of bits that `adamw` does not support."""
    if bits not in (32, 8):
        raise InputError(f"{key} is {bits}; expected 32 or 8")


def check_optimizer(key: str) -> None:
    """Raises `InputError`, which names the config key, if the 8-bit optimizer is not installed."""
    with needs_extra(key, "quantize"):
        import torchao.optim  # noqa: F401


def adamw(
    parameters: Iterable[nn.Parameter],
    bits: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Optimizer:
    """AdamW, fused where possible, or with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861; by torchao)."""
    trained = list(parameters)
    if bits == 8:
        from torchao.optim import AdamW8bit

        found: Optimizer = AdamW8bit(trained, lr=lr, betas=betas, weight_decay=weight_decay)
        return found
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor occupies, quantised or not."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.nbytes
    parts: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, part)) for part in parts)
