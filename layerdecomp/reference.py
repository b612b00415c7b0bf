"""The same transformer in diffusers, with LoRA by peft, measured against ours in one run.

Both are needed only by tests and by this comparison, so they are imported where they are used.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerdecomp.adapters import Change, to_diffusers
from layerdecomp.benchmark import (
    BenchmarkConfig,
    attention_backend,
    flop_counter,
    machine,
    random_transformer,
    stopwatch,
)
from layerdecomp.conditioning import TOKEN_FACTOR, position_ids
from layerdecomp.errors import InputError, needs_extra
from layerdecomp.inpainting import mixed_precision
from layerdecomp.layouts import diffusers_transformer
from layerdecomp.models.lora import LoRALinear, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tables import markdown_table

# Largest accepted difference of outputs and gradients, relative to the largest value.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# Names of our arguments and layers in diffusers.
NAMES = {
    "img": "hidden_states",
    "txt": "encoder_hidden_states",
    "y": "pooled_projections",
    "timesteps": "timestep",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
}
Inputs = dict[str, Tensor]


@dataclass
class Side:
    """One of the two implementations."""

    model: nn.Module
    names: dict[str, str] = field(default_factory=dict)  # its names of our arguments and layers, where they differ

    def __call__(self, inputs: Inputs) -> Tensor:
        with mixed_precision(self.layer("txt_in")):  # which is frozen
            output = self.model(**{self.names.get(name, name): tensor for name, tensor in inputs.items()})
        return output if isinstance(output, Tensor) else output[0]

    def layer(self, name: str) -> nn.Module:
        """The layer that has this name in our model."""
        return self.model.get_submodule(self.names.get(name, name))

    def train(self, inputs: Inputs) -> None:
        """Forward and backward."""
        torch.autograd.backward(self(inputs).float().square().mean())

    @torch.no_grad()
    def sample(self, inputs: Inputs) -> None:
        """One sampling step."""
        self(inputs)


def pair(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> tuple[MMDiT, Any]:
    """Our transformer and theirs, with non-zero LoRA and shared memory for the frozen weights."""
    torch.manual_seed(0)
    ours = random_transformer(config, device, dtype)
    for layer in ours.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B.weight, std=layer.out_features**-0.5)
    return ours, reference_transformer(ours, config.lora.scale)


def empty_reference(config: MMDiTConfig) -> Any:
    """diffusers' `FluxTransformer2DModel` of the same sizes, with its own initialisation.

    Raises:
        InputError: diffusers or peft is not installed.
    """
    with needs_extra("reference=diffusers", "dev"):
        import peft  # noqa: F401
        from diffusers import FluxTransformer2DModel
    return FluxTransformer2DModel(  # type: ignore[no-untyped-call]
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=tuple(config.axes_dim),
    )


def reference_transformer(ours: MMDiT, lora_scale: float) -> Any:
    """diffusers' `FluxTransformer2DModel` with the weights of `ours`, and its LoRA in peft.

    The same tensors are trained, in the same precision, as in `ours`. The frozen weights are views of ours. Errors are
    those of `empty_reference`.
    """
    with torch.device("meta"):
        theirs = empty_reference(ours.config)
    theirs.load_state_dict(_frozen(ours), assign=True)
    adapters = [(name, layer) for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)]
    changes = {name: Change(lora.lora_A.weight.data, lora.lora_B.weight.data, lora_scale) for name, lora in adapters}
    tensors = to_diffusers(changes, ours.config.hidden_size)
    theirs.load_lora_adapter(tensors, prefix="transformer")
    for name, parameter in theirs.named_parameters():
        adapted = ".lora_" in name
        parameter.requires_grad_(adapted or name.startswith("x_embedder."))
        if adapted:  # peft loaded it in the precision of the base
            module, _, adapter_and_kind = name.rpartition(".lora_")
            parameter.data = tensors[f"transformer.{module}.lora_{adapter_and_kind[0]}.weight"].clone()
    return theirs


def _frozen(ours: MMDiT) -> dict[str, Tensor]:
    """All of our weights but the LoRA, in diffusers' layout."""
    layout = diffusers_transformer(ours.config.hidden_size)
    tensors: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        if ".lora_" not in name:
            source = layout(name, tuple(tensor.shape))
            whole = tensor.roll(len(tensor) // 2, 0) if source.swapped else tensor
            rows = whole.split([shape[0] for shape in source.shapes.values()])
            tensors |= dict(zip(source.shapes, rows, strict=True))
    return tensors


def random_inputs(config: BenchmarkConfig, model: MMDiT) -> Inputs:
    """Tokens of both layers and of the text; fused tokens count as text."""
    side, text, batch = config.size // TOKEN_FACTOR, config.context_tokens, config.batch_size
    sizes = model.config
    weight = model.txt_in.weight
    with weight.device:
        ids = torch.cat([position_ids(side, side, layer, weight.device) for layer in (0, 1)])
        inputs = {
            "img": torch.randn(batch, len(ids), sizes.in_channels),
            "img_ids": ids,
            "txt": torch.randn(batch, text, sizes.context_in_dim).to(weight.dtype),
            "txt_ids": torch.zeros(text, 3),
            "timesteps": torch.full((batch,), 0.5),  # 1000 times this is exact in bf16, to which diffusers rounds it
            "y": torch.randn(batch, sizes.vec_in_dim).to(weight.dtype),
        }
        if sizes.guidance_embed:
            inputs["guidance"] = torch.full((batch,), 32.0)  # likewise exact
    return inputs


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disables the cuDNN attention kernel.

    In diffusers, gradients reach attention in several layouts, which cuDNN confuses in PyTorch 2.11: see `attention`.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def results(side: Side, inputs: Inputs) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of the input projection."""
    img = inputs["img"].clone().requires_grad_(True)
    output = side({**inputs, "img": img})
    weight: Any = side.layer("img_in").weight
    gradients = torch.autograd.grad(output.float().square().mean(), [img, weight])
    return dict(zip(("output", "gradient of the input", "gradient of img_in"), (output, *gradients), strict=True))


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences between `results`, relative to the largest value; NaN if either side has one."""
    pairs = {name: (tensor.float(), theirs[name].float()) for name, tensor in ours.items()}
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


@without_cudnn_attention()
def compare(config: BenchmarkConfig, device: str, dtype: torch.dtype) -> str:
    """Benchmarks both, eager and, with `config.compile`, compiled; returns the table.

    Raises:
        InputError: their results differ, so that comparing their speed would be meaningless.
    """
    place = torch.device(device)
    rows = []
    found: dict[str, float] = {}
    for compiled in (False, True) if config.compile else (False,):
        models = pair(config, place, dtype)
        ours, theirs = Side(models[0]), Side(models[1], NAMES)
        inputs = random_inputs(config, models[0])
        if compiled:
            models[0].compile_blocks()
            models[1].compile_repeated_blocks()
        found = differences(results(ours, inputs), results(theirs, inputs))
        if not all(difference <= TOLERANCES[dtype] for difference in found.values()):
            raise InputError(f"the two results differ by {_listed(found)} of the largest value")
        how = "compiled" if compiled else "eager"
        rows.append([f"forward + backward, {how}", *_measured(ours.train, theirs.train, inputs, config, place)])
        merge_lora(models[0])  # in place: their weights are views of ours
        models[1].unload_lora()
        rows.append([f"one sampling step, {how}", *_measured(ours.sample, theirs.sample, inputs, config, place)])
    header = ["", "TFLOP", "theirs", "seconds", "theirs", "ours / theirs"]
    sizes = models[0].config
    tokens = inputs["img"].shape[1], inputs["txt"].shape[1]
    from diffusers import __version__ as diffusers_version
    from peft import __version__ as peft_version

    summary = (
        f"{tokens[0]} + {tokens[1]} tokens, batch {config.batch_size}, {sizes.depth} + {sizes.depth_single_blocks} "
        f"blocks of width {sizes.hidden_size}, LoRA rank {config.lora.rank}, {str(dtype).removeprefix('torch.')}; "
        f"attention by {attention_backend(config, place, dtype)}; medians of {config.repeats} repeats in turn on "
        f"{machine(device)}, torch {torch.__version__}, diffusers "
        f"{diffusers_version}, peft {peft_version}"
    )
    return f"{summary}\n\n{markdown_table([header, *rows])}\n\nlargest differences: {_listed(found)}"


def _listed(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in found.items())


def _measured(
    ours: Callable[[Inputs], None],
    theirs: Callable[[Inputs], None],
    inputs: Inputs,
    config: BenchmarkConfig,
    device: torch.device,
) -> list[str]:
    """FLOPs and median seconds of both, and the ratio of the seconds; repeats alternate."""
    both = partial(ours, inputs), partial(theirs, inputs)
    operations = []
    for run in both:  # which also warms up
        with flop_counter() as counter:
            run()
        operations.append(counter.get_total_flops())
        run()
    times = [[stopwatch(run, device) for run in both] for _ in range(config.repeats)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return [*(f"{count / 1e12:.4g}" for count in operations), f"{a:.4g}", f"{b:.4g}", f"{a / b:.3f}"]
