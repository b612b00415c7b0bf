"""Estimates the device memory of a training step without a GPU or weight files.

A step's forward and backward pass run on fake tensors, which have shapes but no data (`FakeTensorMode`), while every
storage is counted from allocation to release. The peak thus includes what autograd saves and all temporaries. Blocks
are alike unless LoRA's targets distinguish them, so that a few are measured and the rest is extrapolated.
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
from layerdecomp.inpainting import cached_token_ids
from layerdecomp.models import attention
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import BITS

# Peak bytes per number while a weight is dequantised, including the dense bf16 copy.
DENSE_BYTES = {"int8": 7, "fp8": 10, "nf4": 14}
OPTIMIZER_BYTES = {32: 8.0, 8: 2 * (1 + 4 / 256)}  # of both moments, per number


@dataclass
class TrainingWork(BenchmarkConfig):
    """The workload of a training step: a benchmark with explicit model configs."""

    model: MMDiTConfig = field(default_factory=MMDiTConfig)
    rgb: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    shards: int = 1  # of the frozen transformer, one per device

    @property
    def transformer(self) -> MMDiTConfig:
        return self.model

    def autoencoder(self, channels: int) -> AutoencoderConfig:
        return replace(self.rgb, in_channels=channels)


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, in bf16 training."""

    frozen: float  # weights
    trained: float  # weights, float32
    gradients: float
    optimizer: float
    step: float  # peak of the forward and backward pass, on top of the above
    encode: float  # peak of the autoencoders' pass, which precedes it

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.gradients + self.optimizer + max(self.step, self.encode)


class Peak(TorchDispatchMode):
    """Counts the bytes of live storages allocated while it is active, other than those of `existing`."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

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
def attention_as_on_gpu() -> Iterator[None]:
    """Makes attention run in bf16, as on a GPU; a CPU would compute, and save, it in float32."""
    slow_in_bfloat16 = attention.slow_in_bfloat16
    try:
        attention.slow_in_bfloat16 = lambda device: False
        yield
    finally:
        attention.slow_in_bfloat16 = slow_in_bfloat16


def parameter_counts(work: TrainingWork) -> dict[str, int]:
    """Number of parameters of each part."""
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
    """Memory of a training step."""
    return Memory(**extrapolate_over_blocks(lambda some: vars(_memory(some)), work))


def extrapolate_over_blocks(values: Callable[[TrainingWork], dict[str, float]], work: TrainingWork) -> dict[str, float]:
    """Values by name that are linear in the numbers of both kinds of block, extrapolated from three small models.

    Groups of `work.recompute` blocks of a kind are alike. If LoRA's targets distinguish blocks, all are evaluated.
    """
    if not blocks_are_alike(work):
        return values(work)
    full, period = (work.model.depth, work.model.depth_single_blocks), max(1, work.recompute)
    few = tuple(n if n <= 2 * period else period + n % period for n in full)
    first = values(with_depths(work, (few[0], few[1])))
    total = dict(first)
    for kind in (0, 1):
        if full[kind] > few[kind]:
            depths = list(few)
            depths[kind] += period
            more = values(with_depths(work, (depths[0], depths[1])))
            times = (full[kind] - few[kind]) // period
            total = {name: total[name] + times * (more[name] - first[name]) for name in total}
    return total


def blocks_are_alike(work: TrainingWork) -> bool:
    """Whether each LoRA pattern matches the same layers in all blocks of a kind."""
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
    """`work` with other numbers of double and single blocks."""
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
    # Gathered at the same time: the weights outside the blocks, the running block and the prefetched next one.
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
    """Peak bytes of the transformer's step and of the autoencoders' pass."""
    with FakeTensorMode(), separate_position_cache():
        known = _materialise(workload)
        peaks = []
        for run in (workload.train, workload.encode_sample):
            with attention_as_on_gpu(), Peak(*known) as peak:
                run()
            peaks.append(peak.peak)
    return peaks[0], peaks[1]


@contextmanager
def separate_position_cache() -> Iterator[None]:
    """Keeps fake position tensors out of real runs, and real ones out of fake runs."""
    cached_token_ids.cache_clear()
    try:
        yield
    finally:
        cached_token_ids.cache_clear()


def _materialise(workload: Workload) -> list[Tensor]:
    """Moves a workload from the meta device to the CPU, where autocast works, as fake tensors without data.

    Gradients are allocated in advance, as during accumulation. Returns all tensors that persist.
    """

    def allocate(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    for module in workload.decomposer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(allocate(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = allocate(buffer)
    for name, value in vars(workload).items():
        if isinstance(value, Tensor):
            setattr(workload, name, allocate(value))
    for parameter in workload.decomposer.parameters():
        if parameter.requires_grad:
            parameter.grad = allocate(parameter)
    kept = [*workload.decomposer.parameters(), *workload.decomposer.buffers()]
    kept += [parameter.grad for parameter in kept if parameter.grad is not None]
    return kept + [value for value in vars(workload).values() if isinstance(value, Tensor)]
