"""The cost of training and sampling: counted on the meta device, then measured with random weights.

Counts are of multiplications and additions in matrix products, attention and convolutions (`torch.utils.flop_counter`).
The rest (norms, gates, the optimizer) is limited by bandwidth, and shows in the distance from the largest product.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from layerdecomp.conditioning import LATENT_FACTOR, PATCH, TOKEN_FACTOR
from layerdecomp.decomposer import Decomposer, adapt, assemble
from layerdecomp.errors import InputError, check_at_least
from layerdecomp.flow import flow_loss
from layerdecomp.imaging.cues import CUES
from layerdecomp.inpainting import Context, Prompt, mixed_precision
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig, merge_lora, without_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import adamw, check_format, check_optimizer, check_optimizer_bits, quantize_blocks
from layerdecomp.tables import markdown_table

META = torch.device("meta")
# Keys that cannot be set with reference=: the reference has no such feature, or the comparison does not use it.
OURS_ONLY = (
    "quantize",
    "bits",
    "recompute",
    "recompute_attention",
    "encode_batch_size",
    "steps",
    "measure",
    "sync_debug",
)


@dataclass
class BenchmarkConfig:
    """What is counted and measured; the defaults are the recipe of arXiv 2511.20996 at full size."""

    size: int = 1024  # pixels along each side, a multiple of 16
    batch_size: int = 1
    scale: float = 1.0  # of the transformer: the fraction of its blocks and heads
    text_tokens: int = 512
    steps: int = 28  # of sampling
    recompute: int = 0
    recompute_attention: bool = True
    encode_batch_size: int = 0
    quantize: str | None = None  # the frozen base's blocks: int8, fp8, nf4
    bits: int = 32  # of the optimizer's moments: 32 or 8
    repeats: int = 5  # medians are over these, after one warm-up
    measure: bool = True  # False: only count, which takes no memory
    compile: bool = False  # the transformer's blocks and the encoders
    sync_debug: str = "default"  # on a GPU: warn of, or error on, operations that block the host
    reference: str | None = None  # diffusers: its transformer with peft's LoRA is measured next to ours
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    fusion: ContextFusionConfig = field(default_factory=ContextFusionConfig)

    def __post_init__(self) -> None:
        check_at_least(1, self, "", "batch_size", "text_tokens", "steps", "repeats")
        check_at_least(0, self, "", "recompute", "encode_batch_size")
        check_format(self.quantize)
        check_optimizer_bits("bits", self.bits)
        if self.size < 16 or self.size % 16:
            raise InputError(f"size is {self.size}; expected a positive multiple of 16")
        if not 0 < self.scale <= 1:
            raise InputError(f"scale is {self.scale}; expected more than 0 and at most 1")
        if self.sync_debug not in ("default", "warn", "error"):
            raise InputError(f"sync_debug is {self.sync_debug!r}; expected default, warn or error")
        if self.reference not in (None, "diffusers"):
            raise InputError(f"reference is {self.reference!r}; expected diffusers, or null for none")
        for key in OURS_ONLY if self.reference else ():
            found, neutral = getattr(self, key), getattr(BenchmarkConfig, key)
            if found != neutral:
                raise InputError(f"{key} is {found}; expected {neutral} with reference=diffusers; leave it out")

    @property
    def context_tokens(self) -> int:
        """Tokens before those of the image: of the text, and fused ones."""
        return self.text_tokens + (self.fusion.num_queries if self.fusion.enabled else 0)

    @property
    def transformer(self) -> MMDiTConfig:
        """FLUX.1-Fill-dev's config, with `scale` of its blocks and heads."""
        full = MMDiTConfig()
        heads, *depths = (max(1, round(self.scale * n)) for n in (full.num_heads, full.depth, full.depth_single_blocks))
        width = full.hidden_size // full.num_heads * heads
        return replace(full, hidden_size=width, num_heads=heads, depth=depths[0], depth_single_blocks=depths[1])

    def autoencoder(self, channels: int) -> AutoencoderConfig:
        """The config of FLUX's autoencoder, for RGB or RGBA."""
        return AutoencoderConfig(in_channels=channels)


def recomputed(config: BenchmarkConfig) -> str:
    """The activation checkpointing settings, as config keys."""
    attention = f" recompute_attention={config.recompute_attention}".lower() if config.recompute else ""
    return f"recompute={config.recompute}{attention}"


@contextmanager
def made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Makes `device` and `dtype` the defaults for new tensors: a float32 copy of the transformer would not fit."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def random_transformer(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> MMDiT:
    """The adapted transformer with random weights: frozen parts in `dtype`, trained ones in float32."""
    with made_as(device, dtype):
        transformer = MMDiT(config.transformer).requires_grad_(False)
    adapt(transformer, config.lora)
    transformer.recompute, transformer.recompute_attention = config.recompute, config.recompute_attention
    return transformer


def build(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> Decomposer:
    """A decomposer with random weights, created on its device."""
    transformer = random_transformer(config, device, dtype)
    if config.quantize and device != META:
        quantize_blocks(transformer, config.quantize)
    with made_as(device, dtype):
        rgb, rgba = (Autoencoder(config.autoencoder(n)).requires_grad_(False) for n in (3, 4))
        prompt = Prompt(
            torch.randn(config.text_tokens, transformer.config.context_in_dim),
            torch.randn(transformer.config.vec_in_dim),
        )
    heads = min(config.fusion.num_heads, transformer.config.num_heads)  # fewer in a scaled transformer
    settings = DecomposerConfig(fusion=replace(config.fusion, num_heads=heads))
    with device:
        decomposer = assemble(settings, transformer, rgb, rgba, prompt)
    for autoencoder in (rgb, rgba):
        autoencoder.encode_batch_size = config.encode_batch_size
    if config.compile and device != META:
        decomposer.compile_parts()
    return decomposer


class Workload:
    """The pieces of a step on one batch of random images; the inputs of each piece are computed in advance."""

    def __init__(self, config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.decomposer = build(config, device, dtype)
        B, size = config.batch_size, config.size
        with device:
            self.image = torch.rand(B, 3, size, size) * 2 - 1
            self.mask = (torch.rand(B, 1, size, size) > 0.5).float()
            self.cues = torch.rand(B, len(CUES), 3, size, size) * 2 - 1
            self.present = torch.ones(B, len(CUES), dtype=torch.bool)
            self.t = torch.rand(B)
        self.foreground = torch.cat([self.image, self.mask], dim=1)
        latent, channels = size // LATENT_FACTOR, config.autoencoder(3).z_channels
        images = 2 + (len(config.fusion.cues) if config.fusion.enabled else 0)
        with device:
            self.latents = torch.randn(B, images, channels, latent, latent)
            self.z = torch.randn(B, 2 * (latent // PATCH) ** 2, PATCH**2 * channels)  # both layers' tokens
        with torch.no_grad():
            self.context = self.condition()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.decomposer.parameters() if parameter.requires_grad]

    @cached_property
    def optimizer(self) -> Optimizer:
        return adamw(self.trained, self.config.bits)

    def condition(self) -> Context:
        """The transformer's conditioning."""
        with mixed_precision(self.decomposer.autoencoder):
            return self.decomposer.condition(self.latents, self.mask, self.present)

    def encode(self) -> None:
        """Encodes the masked images and the cues."""
        with mixed_precision(self.decomposer.autoencoder):
            self.decomposer.encode_images(self.image, self.mask, self.cues)

    def encode_sample(self) -> None:
        """Encodes the masked images, the cues and both target layers."""
        with mixed_precision(self.decomposer.autoencoder):
            self.decomposer.encode_sample(self.image, self.mask, self.cues, self.image, self.foreground)

    def fuse(self) -> None:
        """Context fusion of the cues, forward and backward."""
        fused = self.condition().fused
        if fused is not None:
            torch.autograd.backward(fused.float().square().mean())

    def train(self) -> None:
        """Fusion and transformer, forward and backward."""
        context = self.condition()
        with mixed_precision(self.decomposer.autoencoder):
            velocity = self.decomposer.velocity(self.z, context, self.t)
        torch.autograd.backward(flow_loss(velocity, self.z))

    def step(self) -> None:
        """A whole training step: encoding, forward and backward, gradient clipping and AdamW."""
        self.encode_sample()
        self.train()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def merge(self) -> None:
        """Merges LoRA into the base, as sampling does first, unless the base is quantised; ends training."""
        vars(self).pop("optimizer", None)  # frees its moments
        if self.config.quantize is None:  # from the config: on the meta device, the base is never quantised
            merge_lora(self.decomposer.transformer)

    @torch.no_grad()
    def sample(self) -> None:
        """One Euler step of both layers."""
        with mixed_precision(self.decomposer.autoencoder):
            self.decomposer.velocity(self.z, self.context, self.t)

    @torch.no_grad()
    def decode(self) -> None:
        """Decodes both layers from latents to pixels."""
        with mixed_precision(self.decomposer.autoencoder):
            self.decomposer.autoencoder.decode(self.latents[:, 0])
            self.decomposer.rgba_autoencoder.decode(self.latents[:, 1])


TRAINING = "fusion + transformer, forward + backward"
FUSION = "of which fusion"
STEP = "a training step, the optimizer included"
ENCODING = "encode image, mask, cues, targets"
TRAINING_PIECES: dict[str, Callable[[Workload], None]] = {
    ENCODING: Workload.encode_sample,
    TRAINING: Workload.train,
    FUSION: Workload.fuse,
}
SAMPLING_PIECES: dict[str, Callable[[Workload], None]] = {  # of a merged model
    "encode image, mask, cues": Workload.encode,
    "one sampling step": Workload.sample,
    "decode": Workload.decode,
}


def count(config: BenchmarkConfig) -> dict[str, float]:
    """Operations of each piece; those of parts of a training step are differences between two counts."""
    workload = Workload(config, META, torch.float32)
    counts = {name: float(_operations(workload, piece)) for name, piece in TRAINING_PIECES.items()}
    with without_lora(workload.decomposer.transformer):
        counts["of which LoRA"] = counts[TRAINING] - _operations(workload, Workload.train)
    by_operation = _by_operation(workload, Workload.train)
    linear = sum(n for name, n in by_operation.items() if name.startswith(("aten.mm", "aten.addmm")))
    counts["of which linear, without LoRA"] = linear - counts["of which LoRA"]
    counts["of which attention"] = sum(n for name, n in by_operation.items() if "bmm" in name or "attention" in name)
    once = Workload(replace(config, recompute=0), META, torch.float32)
    counts["of which recomputed"] = counts[TRAINING] - _operations(once, Workload.train)
    counts[STEP] = counts[ENCODING] + counts[TRAINING]
    workload.merge()
    counts |= {name: float(_operations(workload, piece)) for name, piece in SAMPLING_PIECES.items()}
    return counts


def flop_counter() -> FlopCounterMode:
    """Counts multiplications and additions, including in-place products and every attention kernel."""
    aten = torch.ops.aten
    backward = (
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    )
    formulas: dict[Any, Callable[..., int]] = {
        aten.addmm_: _added_in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # missing from PyTorch's own table
        **dict.fromkeys(backward, _attention_backward),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Four products for the two of the forward pass; scores that kernels recompute are not counted."""
    return 2 * _attention(*args, **kwargs)


def _added_in_place(out: Sequence[int], a: Sequence[int], b: Sequence[int], **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _by_operation(workload: Workload, piece: Callable[[Workload], None]) -> dict[str, int]:
    """Multiplications and additions of a piece by the operation's name, such as aten.mm."""
    with flop_counter() as counter:
        piece(workload)
    return {str(operation): n for operation, n in counter.get_flop_counts().get("Global", {}).items()}


def _operations(workload: Workload, piece: Callable[[Workload], None]) -> int:
    return sum(_by_operation(workload, piece).values())


def largest_product(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of the fastest of several square matrix products: what this machine can reach."""
    best = 0.0
    for side in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * side**3 / min(_seconds(partial(torch.mm, a, b), device, repeats)))
    return best


def measure(workload: Workload, device: torch.device) -> dict[str, tuple[float, float | None]]:
    """Median seconds of each piece and, on a GPU, its peak memory in bytes."""
    measured = _measured(workload, {**TRAINING_PIECES, STEP: Workload.step}, device)
    workload.merge()
    return measured | _measured(workload, SAMPLING_PIECES, device)


def _measured(
    workload: Workload, pieces: dict[str, Callable[[Workload], None]], device: torch.device
) -> dict[str, tuple[float, float | None]]:
    measured = {}
    for name, piece in pieces.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with watched(workload.config.sync_debug, device):
            seconds = statistics.median(_seconds(partial(piece, workload), device, workload.config.repeats))
        measured[name] = seconds, _peak_memory(device)
        for parameter in workload.decomposer.parameters():
            parameter.grad = None
    return measured


@contextmanager
def watched(sync_debug: str, device: torch.device) -> Iterator[None]:
    """Warns of, or rejects, operations that block the host until a GPU is done, except those of `stopwatch`."""
    if device.type != "cuda":
        if sync_debug != "default":
            raise InputError(f"sync_debug={sync_debug} needs a GPU; expected device=cuda with it")
        yield
        return
    torch.cuda.set_sync_debug_mode(sync_debug)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def attention_backend(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The scaled-dot-product attention backend for the tokens of a step: FLASH_ATTENTION, CUDNN_ATTENTION, ..."""
    model = config.transformer
    tokens = config.context_tokens + 2 * (config.size // TOKEN_FACTOR) ** 2
    shape = (config.batch_size, model.num_heads, tokens, model.hidden_size // model.num_heads)
    if device.type == "cpu":
        dtype = torch.float32  # as `attention` casts
    q, k, v = (torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name


def stopwatch(function: Callable[[], Tensor | None], device: torch.device) -> float:
    """Seconds that a call takes; CPU time on a single CPU thread, which other processes disturb less."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize(device)
    start = clock()
    function()
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    """Waits for an accelerator's queued work; CPU calls are synchronous."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds(function: Callable[[], Tensor | None], device: torch.device, repeats: int) -> list[float]:
    stopwatch(function, device)
    return [stopwatch(function, device) for _ in range(repeats)]


def _peak_memory(device: torch.device) -> float | None:
    """Bytes allocated on a GPU since the last reset; a CPU does not tell what one piece took."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def benchmark(config: BenchmarkConfig, device: str, dtype: torch.dtype) -> str:
    """Counts and measures, and returns a Markdown table below a line that describes the setup."""
    if config.bits == 8:
        check_optimizer("bits=8")
    counts = count(config)
    header = ["", "TFLOP", "seconds", "TFLOP/s", "of the largest product", "peak memory GB"]
    measured: dict[str, tuple[float, float | None]] = {}
    limit = float("nan")
    backend = ""
    if config.measure:
        place = torch.device(device)
        backend = f", attention by {attention_backend(config, place, dtype)}"
        limit = largest_product(place, dtype)
        measured = measure(Workload(config, place, dtype), place)
    rows = [
        [name, f"{operations / 1e12:.4g}", *_cells(operations, limit, measured.get(name))]
        for name, operations in counts.items()
    ]
    transformer = config.transformer
    setup = (
        f"{config.size} x {config.size}, batch {config.batch_size}, {transformer.depth} + "
        f"{transformer.depth_single_blocks} blocks of width {transformer.hidden_size}, LoRA rank {config.lora.rank}, "
        f"{recomputed(config)}, {'compiled, ' if config.compile else ''}{str(dtype).removeprefix('torch.')}"
    )
    if config.quantize:
        setup += f", blocks in {config.quantize}"
    if config.bits != 32:
        setup += f", optimizer in {config.bits} bits"
    largest = f"largest product {limit / 1e12:.3g} TFLOP/s"
    where = f"measured on {machine(device)}, {largest}{backend}" if config.measure else "counted"
    sample = counts["encode image, mask, cues"] + config.steps * counts["one sampling step"] + counts["decode"]
    return "\n".join(
        [
            f"{setup}; {where}, torch {torch.__version__}",
            "",
            markdown_table([header, *rows]),
            "",
            f"a decomposition in {config.steps} steps: {sample / 1e12:.4g} TFLOP",
        ]
    )


def _cells(operations: float, limit: float, measured: tuple[float, float | None] | None) -> list[str]:
    if measured is None:
        return [""] * 4
    seconds, memory = measured
    rate = operations / seconds
    peak = "" if memory is None else f"{memory / 1e9:.3g}"
    return [f"{seconds:.3g}", f"{rate / 1e12:.3g}", f"{rate / limit:.0%}", peak]


def machine(device: str) -> str:
    """The name of a device for a table."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
