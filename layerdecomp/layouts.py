"""Other layouts of FLUX's weights: diffusers folders, kohya LoRA files, and hints that recognise common files.

Inside this package every tensor has its published (single-file) name. Nothing here opens a file.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiTConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Published module -> diffusers modules whose rows, concatenated, form it; # is the number of a block.
DIFFUSERS_MODULES: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "double_blocks.#.img_attn.qkv": tuple(f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
    "double_blocks.#.txt_attn.qkv": tuple(f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_attn.norm.query_norm": ("transformer_blocks.#.attn.norm_q",),
    "double_blocks.#.img_attn.norm.key_norm": ("transformer_blocks.#.attn.norm_k",),
    "double_blocks.#.txt_attn.norm.query_norm": ("transformer_blocks.#.attn.norm_added_q",),
    "double_blocks.#.txt_attn.norm.key_norm": ("transformer_blocks.#.attn.norm_added_k",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    "single_blocks.#.linear1": (
        *(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.norm.query_norm": ("single_transformer_blocks.#.attn.norm_q",),
    "single_blocks.#.norm.key_norm": ("single_transformer_blocks.#.attn.norm_k",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers keeps scale above shift, the published file shift above scale


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The modules of `FluxTransformer2DModel` whose rows, concatenated, form a published module."""
    number = re.match(r"(?:double|single)_blocks\.(\d+)\.", module)
    if number is None:
        return DIFFUSERS_MODULES[module]
    key = f"{module[: number.start(1)]}#{module[number.end(1) :]}"
    return tuple(name.replace("#", number[1]) for name in DIFFUSERS_MODULES[key])


def row_counts(rows: int, parts: int, hidden_size: int) -> list[int]:
    """Rows of each part of a fused linear: the hidden size, and the remainder for the last part."""
    return [hidden_size] * (parts - 1) + [rows - hidden_size * (parts - 1)]


def kohya_module(module: str) -> str:
    """The name that sd-scripts and ComfyUI give a published module in a LoRA file."""
    return f"lora_unet_{module.replace('.', '_')}"


@dataclass(frozen=True)
class Source:
    """The tensors of another layout whose rows, concatenated, form a published tensor."""

    shapes: dict[str, Shape]  # by their names there, in row order
    swapped: bool = False  # whether the upper and lower half of the rows are exchanged

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """The published tensor, (*shape); a single one is not copied."""
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return (tensor.roll(tensor.shape[0] // 2, 0) if self.swapped else tensor).view(shape)


Layout = Callable[[str, Shape], Source]


def published(name: str, shape: Shape) -> Source:
    """The layout of the single files, which is this package's own."""
    return Source({name: shape})


def diffusers_transformer(hidden_size: int) -> Layout:
    """The layout of `FluxTransformer2DModel`."""

    def source(name: str, shape: Shape) -> Source:
        module, _, kind = name.rpartition(".")
        names = [f"{part}.{'weight' if kind == 'scale' else kind}" for part in diffusers_modules(module)]
        rows = row_counts(shape[0], len(names), hidden_size)
        return Source({part: (n, *shape[1:]) for part, n in zip(names, rows, strict=True)}, module == SWAPPED)

    return source


# Patterns over published names, after the levels of the decoder have been renumbered.
AUTOENCODER_NAMES = [
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
]


def diffusers_autoencoder(levels: int) -> Layout:
    """The layout of `AutoencoderKL`, whose attention has linears where the published one has 1 x 1 convolutions."""

    def source(name: str, shape: Shape) -> Source:
        name = re.sub(r"(?<=decoder\.up\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
        for pattern, replacement in AUTOENCODER_NAMES:
            name = re.sub(pattern, replacement, name)
        return Source({name: shape[:2] if ".attentions.0.to_" in name else shape})

    return source


def mmdit_config(description: Mapping[str, Any]) -> MMDiTConfig:
    """The config of a transformer from the config.json of its diffusers folder."""
    heads, width = int(description["num_attention_heads"]), int(description["attention_head_dim"])
    return MMDiTConfig(
        in_channels=description["in_channels"],
        out_channels=description.get("out_channels") or description["in_channels"],
        vec_in_dim=description["pooled_projection_dim"],
        context_in_dim=description["joint_attention_dim"],
        hidden_size=heads * width,
        num_heads=heads,
        depth=description["num_layers"],
        depth_single_blocks=description["num_single_layers"],
        axes_dim=list(description.get("axes_dims_rope", [16, 56, 56])),
        guidance_embed=description["guidance_embeds"],
    )


def autoencoder_config(description: Mapping[str, Any]) -> AutoencoderConfig:
    """The config of an autoencoder from the config.json of its diffusers folder."""
    widths = description["block_out_channels"]
    return AutoencoderConfig(
        in_channels=description["in_channels"],
        ch=widths[0],
        ch_mult=[width // widths[0] for width in widths],
        num_res_blocks=description["layers_per_block"],
        z_channels=description["latent_channels"],
        norm_groups=description["norm_num_groups"],
        scale_factor=description["scaling_factor"],
        shift_factor=description["shift_factor"],
    )


def recognise(found: Shapes, expected: Shapes) -> str | None:
    """A hint at the kind of file that mismatching tensors come from, if it is a common one."""
    return next((hint for applies, hint in HINTS if applies(found, expected)), None)


Test = Callable[[Shapes, Shapes], bool]


def _named(pattern: str) -> Test:
    return lambda found, expected: any(re.search(pattern, name) for name in found)


def _takes(channels: int) -> Test:
    def test(found: Shapes, expected: Shapes) -> bool:
        both = [name for name in ("img_in.weight", "x_embedder.weight") if name in found and name in expected]
        return any(found[name][-1] == channels != expected[name][-1] for name in both)

    return test


def _instead(pattern: str) -> Test:
    """Whether the pattern matches a name that was found, but none that was expected."""
    return lambda found, expected: _named(pattern)(found, expected) and not _named(pattern)(expected, found)


HINTS: list[tuple[Test, str]] = [
    (
        _instead(r"\.(lora_(A|B|down|up)|lokr_\w+|hada_\w+)(\.|$)"),
        "this is a LoRA, not a model; tools/export.py format=import converts it to an adapter",
    ),
    (
        _named(r"quant_state|\.absmax$|\.qweight$|\.wscales$|\.weight_scale_inv$"),
        "this file is quantised in a way that is not supported; use the bf16 file, or one in fp8 (e4m3) with scales",
    ),
    (
        _named(r"^model\.diffusion_model\."),
        "this is an all-in-one checkpoint with text encoders and autoencoder; use the transformer's own file",
    ),
    (
        _instead(r"^(text_model\.|shared\.weight|encoder\.block\.)"),
        "this is a text encoder, which tools/embed_prompt.py reads",
    ),
    (_takes(64), "64 input channels: this is FLUX.1-dev (or -schnell or -Kontext), not Fill, which has 384"),
    (_takes(128), "128 input channels: this is FLUX.1-Canny or -Depth, not Fill, which has 384"),
    (_instead(r"^(encoder|decoder)\.conv_in\."), "this is an autoencoder"),
    (_instead(r"^(double_blocks|transformer_blocks)\."), "this is a FLUX transformer"),
]
