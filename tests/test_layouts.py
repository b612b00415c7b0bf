"""Names and shapes of other tools' files at full size, and the recognition of unsuitable files."""

from pathlib import Path

import pytest
import torch
from conftest import RGB
from diffusers import FluxTransformer2DModel
from reference import build_reference_autoencoder
from safetensors.torch import save_file

from layerdecomp.errors import InputError
from layerdecomp.layouts import (
    autoencoder_config,
    diffusers_autoencoder,
    diffusers_modules,
    diffusers_transformer,
    kohya_module,
    mmdit_config,
)
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.weights import load_autoencoder, load_mmdit


def test_modules_are_named_as_in_diffusers_and_kohya() -> None:
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    assert diffusers_modules("single_blocks.37.linear1") == tuple(f"single_transformer_blocks.37.{p}" for p in parts)
    assert diffusers_modules("double_blocks.11.txt_mlp.2") == ("transformer_blocks.11.ff_context.net.2",)
    assert diffusers_modules("final_layer.adaLN_modulation.1") == ("norm_out.linear",)
    assert kohya_module("double_blocks.11.txt_mlp.2") == "lora_unet_double_blocks_11_txt_mlp_2"


def test_full_size_configs_come_from_published_descriptions() -> None:
    described = dict(
        num_attention_heads=24, attention_head_dim=128, in_channels=384, out_channels=64, pooled_projection_dim=768,
        joint_attention_dim=4096, num_layers=19, num_single_layers=38, guidance_embeds=True, patch_size=1,
    )  # fmt: skip
    assert mmdit_config(described) == MMDiTConfig()
    assert mmdit_config({**described, "in_channels": 64, "out_channels": None}).out_channels == 64
    described = dict(
        in_channels=3, block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
        norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    assert autoencoder_config(described) == AutoencoderConfig()


def test_full_size_names_and_shapes_equal_those_of_diffusers() -> None:
    """Every tensor of the two published models maps to a tensor of the same shape in the diffusers classes."""
    with torch.device("meta"):
        ours = (MMDiT(MMDiTConfig()), Autoencoder(AutoencoderConfig()))
        theirs = (
            FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True),
            build_reference_autoencoder(ours[1]),
        )
    for model, reference, layout in zip(
        ours, theirs, (diffusers_transformer(3072), diffusers_autoencoder(4)), strict=True
    ):
        found = {}
        for name, tensor in model.state_dict().items():
            found |= layout(name, tuple(tensor.shape)).shapes
        assert found == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


@pytest.mark.parametrize(
    ("tensors", "description"),
    [
        ({"img_in.weight": (32, 64)}, "64 input channels: this is FLUX.1-dev"),
        ({"x_embedder.weight": (32, 64)}, "64 input channels: this is FLUX.1-dev"),
        ({"img_in.weight": (32, 128)}, "128 input channels: this is FLUX.1-Canny or -Depth, not Fill"),
        ({"lora_unet_img_in.lora_down.weight": (4, 64)}, "this is a LoRA, not a model; tools/export.py format=import"),
        ({"transformer.x_embedder.lora_A.weight": (4, 64)}, "this is a LoRA"),
        ({"model.diffusion_model.img_in.weight": (32, 384)}, "this is an all-in-one checkpoint"),
        ({"img_in.weight.quant_state.bitsandbytes__nf4": (5,)}, "this file is quantised in a way that is not"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "this is a text encoder"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "this is an autoencoder"),
    ],
)
def test_unsuitable_files_are_recognised(tmp_path: Path, tensors: dict[str, tuple[int, ...]], description: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as error:
        load_mmdit(tmp_path / "a.safetensors")
    assert description in str(error.value).splitlines()[-1]


def test_a_transformer_is_not_loaded_as_an_autoencoder(tiny_weights: Path) -> None:
    with pytest.raises(InputError, match="this is a FLUX transformer"):
        load_autoencoder(tiny_weights / "transformer.safetensors", RGB)
