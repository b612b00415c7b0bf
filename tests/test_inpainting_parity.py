"""Inpainting by the frozen base against diffusers' FluxFillPipeline."""

from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from reference import build_reference_autoencoder, build_reference_transformer, randomize
from torch import Tensor

from layerdecomp.conditioning import ConditioningConfig, pack
from layerdecomp.flow import FlowConfig
from layerdecomp.inpainting import Prompt, inpaint
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.sampling import SampleConfig

STEPS = 4
GUIDANCE = 30.0
HEIGHT, WIDTH = 64, 48
TRANSFORMER = MMDiTConfig(
    vec_in_dim=12, context_in_dim=20, hidden_size=64, num_heads=4, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6]
)
AUTOENCODER = AutoencoderConfig(ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1, norm_groups=4)


def draw_inputs(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.zeros(batch, 1, HEIGHT, WIDTH)
    mask[:, :, 13:45, 7:30] = 1
    return {
        "image": torch.rand(batch, 3, HEIGHT, WIDTH, generator=generator),  # in [0, 1], as the pipeline takes it
        "mask": mask,
        "noise": torch.randn(batch, 16, HEIGHT // 8, WIDTH // 8, generator=generator),
        "txt": torch.randn(6, TRANSFORMER.context_in_dim, generator=generator),
        "vec": torch.randn(TRANSFORMER.vec_in_dim, generator=generator),
    }


@pytest.mark.parametrize("batch", [1, 2])
def test_inpainting_equals_the_fill_pipeline(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mmdit, autoencoder, x = MMDiT(TRANSFORMER).eval(), Autoencoder(AUTOENCODER).eval(), draw_inputs(batch)
    randomize(mmdit)
    randomize(autoencoder)
    pipeline = FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build_reference_autoencoder(autoencoder),
        transformer=build_reference_transformer(mmdit),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline draws from the posterior; the package takes its mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def expected(output_type: str) -> Tensor:
        return pipeline(
            image=x["image"],
            mask_image=x["mask"],
            height=HEIGHT,
            width=WIDTH,
            latents=pack(x["noise"]),
            prompt_embeds=x["txt"].expand(batch, -1, -1),
            pooled_prompt_embeds=x["vec"].expand(batch, -1),
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            output_type=output_type,
        ).images

    with mock.patch.object(autoencoder, "decode", wraps=autoencoder.decode) as decode:
        found = inpaint(
            transformer=mmdit,
            autoencoder=autoencoder,
            prompt=Prompt(x["txt"], x["vec"]),
            image=2 * x["image"] - 1,
            mask=x["mask"],
            noise=x["noise"],
            conditioning=ConditioningConfig(),
            flow=FlowConfig(),
            sample=SampleConfig(steps=STEPS, guidance=GUIDANCE),
        )
    latents, image = pack(decode.call_args.args[0]), found / 2 + 0.5
    assert (latents - pack(x["noise"])).abs().max() > 0.1  # the model did something
    assert 0.05 < image.std() < 0.5  # and the image is neither flat nor saturated
    assert (latents - expected("latent")).abs().max() < 1e-4
    assert (image - expected("pt")).abs().max() < 1e-4
