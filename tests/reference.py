"""Reference implementations from diffusers that carry the weights of this package's models."""

import re

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.reference import empty_reference

TRANSFORMER_PREFIXES = {
    "img_in.": "x_embedder.",
    "txt_in.": "context_embedder.",
    "time_in.in_layer.": "time_text_embed.timestep_embedder.linear_1.",
    "time_in.out_layer.": "time_text_embed.timestep_embedder.linear_2.",
    "vector_in.in_layer.": "time_text_embed.text_embedder.linear_1.",
    "vector_in.out_layer.": "time_text_embed.text_embedder.linear_2.",
    "guidance_in.in_layer.": "time_text_embed.guidance_embedder.linear_1.",
    "guidance_in.out_layer.": "time_text_embed.guidance_embedder.linear_2.",
    "final_layer.linear.": "proj_out.",
    "double_blocks.": "transformer_blocks.",
    "single_blocks.": "single_transformer_blocks.",
}
BLOCK_PARTS = {
    ".img_mod.lin.": ".norm1.linear.",
    ".txt_mod.lin.": ".norm1_context.linear.",
    ".img_attn.proj.": ".attn.to_out.0.",
    ".txt_attn.proj.": ".attn.to_add_out.",
    ".img_attn.norm.query_norm.scale": ".attn.norm_q.weight",
    ".img_attn.norm.key_norm.scale": ".attn.norm_k.weight",
    ".txt_attn.norm.query_norm.scale": ".attn.norm_added_q.weight",
    ".txt_attn.norm.key_norm.scale": ".attn.norm_added_k.weight",
    ".img_mlp.0.": ".ff.net.0.proj.",
    ".img_mlp.2.": ".ff.net.2.",
    ".txt_mlp.0.": ".ff_context.net.0.proj.",
    ".txt_mlp.2.": ".ff_context.net.2.",
    ".modulation.lin.": ".norm.linear.",
    ".linear2.": ".proj_out.",
    ".norm.query_norm.scale": ".attn.norm_q.weight",
    ".norm.key_norm.scale": ".attn.norm_k.weight",
}
FUSED_LINEARS = {
    ".img_attn.qkv.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v."),
    ".txt_attn.qkv.": (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."),
    ".linear1.": (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp."),
}


def flux_to_diffusers(state_dict: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """Renames published transformer tensors to the layout of FluxTransformer2DModel, and splits the fused ones."""
    converted = {}
    for name, tensor in state_dict.items():
        if name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = tensor.chunk(2)
            converted[name.replace("final_layer.adaLN_modulation.1.", "norm_out.linear.")] = torch.cat([scale, shift])
            continue
        prefix = next(prefix for prefix in TRANSFORMER_PREFIXES if name.startswith(prefix))
        renamed = TRANSFORMER_PREFIXES[prefix] + name.removeprefix(prefix)
        fused = next((part for part in FUSED_LINEARS if part in renamed), None)
        if fused is None:
            part = next((part for part in BLOCK_PARTS if part in renamed), "")
            converted[renamed.replace(part, BLOCK_PARTS[part]) if part else renamed] = tensor
        else:
            sizes = [config.hidden_size] * 3 + [tensor.shape[0] - 3 * config.hidden_size]
            for new, rows in zip(FUSED_LINEARS[fused], tensor.split(sizes), strict=False):
                converted[renamed.replace(fused, new)] = rows
    return converted


def build_reference_transformer(mmdit: MMDiT) -> FluxTransformer2DModel:
    """A FluxTransformer2DModel with a copy of the weights of `mmdit`."""
    config = mmdit.config
    assert (config.mlp_ratio, config.theta, config.qkv_bias) == (4.0, 10_000, True)  # fixed in diffusers
    reference: FluxTransformer2DModel = empty_reference(config)
    reference.load_state_dict(flux_to_diffusers(mmdit.state_dict(), config))
    return reference.eval()


AUTOENCODER_PATTERNS = [
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
]


def autoencoder_to_diffusers(state_dict: dict[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """Renames published autoencoder tensors to the layout of AutoencoderKL, whose decoder counts levels backwards."""
    last = len(config.ch_mult) - 1
    converted = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"(?<=decoder\.up\.)\d+", lambda level: str(last - int(level[0])), name)
        for pattern, replacement in AUTOENCODER_PATTERNS:
            name = re.sub(pattern, replacement, name)
        is_attention_linear = ".attentions.0.to_" in name and name.endswith("weight")
        converted[name] = tensor[:, :, 0, 0] if is_attention_linear else tensor
    return converted


def build_reference_autoencoder(autoencoder: Autoencoder) -> AutoencoderKL:
    """An AutoencoderKL with a copy of the weights of `autoencoder`."""
    config = autoencoder.config
    levels = len(config.ch_mult)
    reference = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale_factor,
        shift_factor=config.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    reference.load_state_dict(autoencoder_to_diffusers(autoencoder.state_dict(), config))
    return reference.eval()


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Draws every parameter at random, at a size that keeps activations near one: no gain is 1, no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1 + 0.2 * noise if bool((parameter == 1).all()) else 0.2 * noise)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; fails on an expectation that is all zero."""
    assert actual.shape == expected.shape
    largest = expected.abs().max().item()
    assert largest > 1e-3, "the reference is (almost) zero: this comparison would prove nothing"
    return (actual - expected).abs().max().item() / largest


def flux_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "img": torch.randn(2, 6, 384, generator=generator),
        "txt": torch.randn(2, 3, 8, generator=generator),
        "y": torch.randn(2, 8, generator=generator),
    }
    ids = {"img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(3, 3)}
    return {**drawn, **ids, "timesteps": torch.tensor([0.2, 0.9])}


@torch.no_grad()
def diffusers_output(model: nn.Module) -> Tensor:
    """What diffusers' transformer makes of the inputs."""
    x = flux_inputs()
    return model(
        hidden_states=x["img"], img_ids=x["img_ids"], encoder_hidden_states=x["txt"], txt_ids=x["txt_ids"],
        timestep=x["timesteps"], pooled_projections=x["y"], guidance=None,
    ).sample  # fmt: skip


@torch.no_grad()
def output_error(model: MMDiT | Tensor, reference: MMDiT) -> float:
    expected = reference(**flux_inputs())
    actual = model if isinstance(model, Tensor) else model(**flux_inputs())
    return ((actual - expected).norm() / expected.norm()).item()
