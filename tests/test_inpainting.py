"""Inpainting with the frozen base, and its prompt."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.inpainting import inpaint
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.weights import load_mmdit


def test_the_base_inpaints_with_and_without_a_mask(tiny_config: DecomposerConfig, tiny_decomposer: Decomposer) -> None:
    base, random = load_mmdit(tiny_config.weights.transformer), torch.Generator().manual_seed(5)
    image, noise = torch.rand(2, 3, 32, 32, generator=random) * 2 - 1, torch.randn(2, 16, 4, 4, generator=random)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 4:13, 8:20] = 1

    def filled(conditioning: ConditioningConfig) -> Tensor:
        return inpaint(
            transformer=base,
            autoencoder=tiny_decomposer.autoencoder,
            prompt=tiny_decomposer.prompt,
            image=image,
            mask=mask,
            noise=noise,
            conditioning=conditioning,
            flow=tiny_decomposer.flow,
            sample=replace(tiny_decomposer.sample, steps=2),
        )

    masked, maskless = filled(ConditioningConfig()), filled(ConditioningConfig(mask=False))
    assert masked.shape == (2, 3, 32, 32) and masked.std() > 0.05
    assert not maskless.equal(masked)
    with torch.no_grad():
        base.img_in.weight[:, -256:] = 0  # the mask's channels
    assert maskless.equal(filled(ConditioningConfig()))


def test_a_prompt_is_loaded_from_its_file(tiny_config: DecomposerConfig, tmp_path: Path) -> None:
    path = str(tmp_path / "prompt.safetensors")
    config = replace(tiny_config, weights=replace(tiny_config.weights, prompt=path))
    save_file({"txt": torch.ones(5, 8), "vec": torch.ones(8)}, path)
    prompt = build_decomposer(config).prompt
    assert prompt.inputs(2, torch.bfloat16)["txt"].dtype == torch.bfloat16
    inputs = prompt.inputs(2, torch.float32)
    assert inputs["txt"].dtype == inputs["y"].dtype == torch.float32
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "txt": (2, 5, 8),
        "txt_ids": (5, 3),
        "y": (2, 8),
    }
    assert inputs["txt"].min() == 1 and inputs["y"].min() == 1 and not inputs["txt_ids"].any()
    save_file({"txt": torch.ones(5, 9)}, path)
    with pytest.raises(InputError, match="does not fit a prompt embedding") as error:
        build_decomposer(config)
    assert "1 missing: vec" in str(error.value) and "txt [5, 9] for [5, 8]" in str(error.value)
