"""Plain inpainting with this package's parts against diffusers' FluxFillPipeline."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from reference import build_reference_autoencoder, build_reference_transformer, randomize
from torch import Tensor

from layerdecomp.conditioning import inpainting_context, masked_images, pack, position_ids, unpack
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.sampling import euler, schedule

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
        "noise": pack(torch.randn(batch, 16, HEIGHT // 8, WIDTH // 8, generator=generator)),
        "txt": torch.randn(batch, 6, TRANSFORMER.context_in_dim, generator=generator),
        "y": torch.randn(batch, TRANSFORMER.vec_in_dim, generator=generator),
    }


@torch.no_grad()
def inpaint(mmdit: MMDiT, autoencoder: Autoencoder, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Packed latents and the image in [0, 1]."""
    masked_image, _ = masked_images(2 * x["image"] - 1, x["mask"])
    condition = inpainting_context(autoencoder.encode(masked_image), x["mask"])
    batch, tokens = x["noise"].shape[:2]

    def velocity(tokens: Tensor, t: Tensor) -> Tensor:
        return mmdit(
            img=torch.cat([tokens, condition], dim=-1),
            img_ids=position_ids(HEIGHT // 16, WIDTH // 16),
            txt=x["txt"],
            txt_ids=torch.zeros(x["txt"].shape[1], 3),
            timesteps=t,
            y=x["y"],
            guidance=torch.full((batch,), GUIDANCE),
        )

    latents = euler(velocity, x["noise"], schedule(STEPS, tokens))
    image = autoencoder.decode(unpack(latents, HEIGHT // 8, WIDTH // 8))
    return latents, (image / 2 + 0.5).clamp(0, 1)


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
            latents=x["noise"],
            prompt_embeds=x["txt"],
            pooled_prompt_embeds=x["y"],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            output_type=output_type,
        ).images

    latents, image = inpaint(mmdit, autoencoder, x)
    assert (latents - x["noise"]).abs().max() > 0.1  # the model did something
    assert 0.05 < image.std() < 0.5  # and the image is neither flat nor saturated
    assert (latents - expected("latent")).abs().max() < 1e-4
    assert (image - expected("pt")).abs().max() < 1e-4
