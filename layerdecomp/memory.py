"""What a training step takes of a device's memory, counted without the device: no file, no GPU, no numbers.

A step's forward and backward pass run on tensors that have shapes and no content (`FakeTensorMode`), while every
storage is counted from when it is made until it is given up: the peak is that of what autograd keeps and of all that is
needed for a moment. Blocks are alike, unless LoRA's targets tell them apart, so that a few tell what many take.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerdecomp.benchmark import META, BenchmarkConfig, Workload
from layerdecomp.decomposer import cached_token_ids
from layerdecomp.models import attention
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import BITS

# At the moment when a weight is made dense again: bytes per number, its dense form in bf16 among them.
DENSE_BYTES = {"int8": 7, "fp8": 10, "nf4": 14}
OPTIMIZER_BYTES = {32: 8.0, 8: 2 * (1 + 4 / 256)}  # of both averages, per number


@dataclass
class TrainingWork(BenchmarkConfig):
    """What a step of some training works on: a benchmark of the models that it names."""

    model: MMDiTConfig = field(default_factory=MMDiTConfig)
    rgb: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    shards: int = 1  # of the frozen transformer, each on another device

    @property
    def transformer(self) -> MMDiTConfig:
        return self.model

    def autoencoder(self, channels: int) -> AutoencoderConfig:
        return replace(self.rgb, in_channels=channels)


@dataclass(frozen=True)
class Memory:
    """Bytes on a device that computes in bf16."""

    frozen: float  # weights
    trained: float  # weights, float32
    gradients: float
    optimizer: float
    step: float  # at the peak of forward and backward pass, beside all that
    encode: float  # at the peak of the autoencoders' pass, which comes before it

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.gradients + self.optimizer + max(self.step, self.encode)


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on and alive at once; `but` were there before."""

    def __init__(self, *but: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in but}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not hasattr(tensor, "__tensor_flatten__"):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known[storage._cdata] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Attention computes bf16 as it comes, while a CPU has it, and keeps it, in float32."""
    slow_in_bfloat16 = attention.slow_in_bfloat16
    try:
        attention.slow_in_bfloat16 = lambda device: False
        yield
    finally:
        attention.slow_in_bfloat16 = slow_in_bfloat16


def parameter_counts(work: TrainingWork) -> dict[str, int]:
    """How many numbers each part has."""
    decomposer = Workload(work, META, torch.bfloat16).decomposer
    counts = dict.fromkeys(("transformer, frozen", "LoRA", "img_in", "fusion", "autoencoders"), 0)
    for name, parameter in decomposer.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts


def _part(name: str) -> str:
    if ".lora_" in name:
        return "LoRA"
    if name.startswith("transformer."):
        return "img_in" if ".img_in." in name else "transformer, frozen"
    return "fusion" if name.startswith("context_fusion.") else "autoencoders"


def training_memory(work: TrainingWork) -> Memory:
    """Counts a step's memory."""
    return Memory(**linear_in_blocks(lambda some: vars(_memory(some)), work))


def linear_in_blocks(values: Callable[[TrainingWork], dict[str, float]], work: TrainingWork) -> dict[str, float]:
    """Values by name that are linear in the numbers of both kinds of block, from three small models.

    Blocks of a kind are alike in groups of `work.recompute`. Where LoRA's targets tell them apart, all are counted.
    """
    if not blocks_are_alike(work):
        return values(work)
    full, period = (work.model.depth, work.model.depth_single_blocks), max(1, work.recompute)
    few = tuple(n if n <= 2 * period else period + n % period for n in full)
    first = values(with_depths(work, (few[0], few[1])))
    total = dict(first)
    for kind in (0, 1):
        if full[kind] > few[kind]:
            more = values(with_depths(work, (few[0] + period * (kind == 0), few[1] + period * (kind == 1))))
            times = (full[kind] - few[kind]) // period
            total = {name: total[name] + times * (more[name] - first[name]) for name in total}
    return total


def blocks_are_alike(work: TrainingWork) -> bool:
    """Whether each of LoRA's patterns takes the same layers of all blocks of a kind, or of none."""
    with META:
        modules = MMDiT(work.model).named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear) and "_blocks." in name]
    depths = {"double_blocks": work.model.depth, "single_blocks": work.model.depth_single_blocks}
    for pattern in work.lora.targets:
        parts = [name.split(".", 2) for name in linears if fnmatchcase(name, pattern)]  # kind, number, layer
        taken = Counter((kind, layer) for kind, _, layer in parts)
        if any(blocks < depths[kind] for (kind, _), blocks in taken.items()):
            return False
    return True


def with_depths(work: TrainingWork, depths: tuple[int, int]) -> TrainingWork:
    """The same with other numbers of double and single blocks."""
    return replace(work, model=replace(work.model, depth=depths[0], depth_single_blocks=depths[1]))


def _memory(work: TrainingWork) -> Memory:
    workload = Workload(work, META, torch.bfloat16)
    decomposer = workload.decomposer
    frozen, trained, blocks = 0.0, 0, dict[str, int]()
    for name, parameter in decomposer.named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif work.quantize and "_blocks." in name and parameter.dim() == 2:
            frozen += parameter.numel() * BITS[work.quantize] / 8
        elif work.shards > 1 and name.startswith("transformer."):
            frozen += parameter.nbytes / work.shards
            block = ".".join(name.split(".")[1:3]) if "_blocks." in name else "outside"
            blocks[block] = blocks.get(block, 0) + parameter.nbytes
        else:
            frozen += parameter.nbytes
    # Gathered at once: what stands outside the blocks, a block that runs and, ahead of it, the next one.
    gathered = blocks.pop("outside", 0) + 2 * max(blocks.values(), default=0)
    dense = 0
    if work.quantize:
        matrices = (p.numel() for n, p in decomposer.transformer.named_parameters() if "_blocks." in n)
        dense = DENSE_BYTES[work.quantize] * max(matrices)
    step, encode = _peaks(workload)
    return Memory(
        frozen, 4.0 * trained, 4.0 * trained, OPTIMIZER_BYTES[work.bits] * trained, step + dense + gathered, encode
    )


def _peaks(workload: Workload) -> tuple[int, int]:
    """Bytes at the peaks of a step of the transformer and of the autoencoders' work."""
    with FakeTensorMode(), position_cache_aside():
        known = _materialise(workload)
        peaks = []
        for run in (workload.train, workload.encode_sample):
            with as_on_gpu(), Peak(*known) as peak:
                run()
            peaks.append(peak.peak)
    return peaks[0], peaks[1]


@contextmanager
def position_cache_aside() -> Iterator[None]:
    """Positions that have numbers, and those that have none, are kept from each other's use."""
    cached_token_ids.cache_clear()
    try:
        yield
    finally:
        cached_token_ids.cache_clear()


def _materialise(workload: Workload) -> list[Tensor]:
    """Brings a workload from the meta device to the CPU, where autocast works; still without numbers.

    Gradients are there from the start, as they are while accumulating. Returns all tensors that it keeps.
    """

    def made(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    for module in workload.decomposer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(made(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made(buffer)
    for name, value in vars(workload).items():
        if isinstance(value, Tensor):
            setattr(workload, name, made(value))
    for parameter in workload.decomposer.parameters():
        if parameter.requires_grad:
            parameter.grad = made(parameter)
    kept = [*workload.decomposer.parameters(), *workload.decomposer.buffers()]
    kept += [parameter.grad for parameter in kept if parameter.grad is not None]
    return kept + [value for value in vars(workload).values() if isinstance(value, Tensor)]
