"""The frozen base in eight or four bits, by torchao: its tensors take the place of weights, under the same names.

So may the optimizer's averages be kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerdecomp.errors import InputError
from layerdecomp.models.lora import freeze_quantized

# Bits that a number takes: the code, and its share of the scales (int8, fp8: one per row, which is next to nothing).
BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4 + 8 / 64}


def check_format(name: str | None) -> None:
    """Raises `InputError` for a format that nobody knows, or one whose library is missing; None is no quantisation."""
    if name is None:
        return
    if name not in BITS:
        raise InputError(f"quantize is {name!r}; expected null, {', '.join(BITS)}")
    with needs_torchao(f"quantize={name}"):
        import torchao.quantization  # noqa: F401


@contextmanager
def needs_torchao(what: str) -> Iterator[None]:
    """Turns a failed import of the library inside into an `InputError` that says what needs it."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs torchao, which cannot be imported ({error}); pip install -e '.[quantize]'"
        ) from error


def quantized(tensor: Tensor, name: str) -> Tensor:
    """A matrix (out, in) in one of the formats of `BITS`, where it is; its dtype stays what it computes in.

    int8 and fp8 (e4m3): a scale per row. nf4: normal floats with a scale per 64 numbers, which is in int8 itself
    (Dettmers et al. 2023, arXiv 2305.14314).
    """
    if name == "nf4":
        with needs_torchao("quantize=nf4"):
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        if tensor.numel() % 64:
            raise InputError(f"quantize=nf4: found a matrix of {tensor.numel()} numbers, expected a multiple of 64")
        blocks = tensor.numel() // 64
        return to_nf4(tensor, 64, math.gcd(blocks, 256))
    with needs_torchao(f"quantize={name}"):
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    if name == "int8":
        found: Tensor = Int8Tensor.from_hp(tensor, granularity=PerRow())
    else:  # a row of zeros would be divided by its largest number
        found = Float8Tensor.from_hp(tensor, granularity=PerRow(), hp_value_lb=1e-12)
    return found


def block_matrices(format: str | None) -> Callable[[str, Tensor], Tensor]:
    """What a transformer's weights become as they are read: matrices inside the blocks are quantised, all else is not.

    What stands outside the blocks is half a percent of FLUX.1-Fill-dev, and is not under LoRA.
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


def check_bits(key: str, bits: int) -> None:
    """Raises `InputError`, which names the key, for averages of another number of bits than `adamw` has."""
    if bits not in (32, 8):
        raise InputError(f"{key} is {bits}; expected 32 or 8")


def check_optimizer(key: str) -> None:
    """Raises `InputError`, which names the key that asks for it, where the optimizer of 8 bits is missing."""
    with needs_torchao(key):
        import torchao.optim  # noqa: F401


def adamw(
    parameters: Iterable[nn.Parameter],
    bits: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Optimizer:
    """AdamW, fused where it can be, or with averages in 8 bits (Dettmers et al. 2022, arXiv 2110.02861; torchao's)."""
    trained = list(parameters)
    if bits == 8:
        from torchao.optim import AdamW8bit

        found: Optimizer = AdamW8bit(trained, lr=lr, betas=betas, weight_decay=weight_decay)
        return found
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes, quantised or not."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.nbytes
    parts: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, part)) for part in parts)
