"""Trains a small inpainting base, from scratch or from another: the tiny track's counterpart of FLUX.1-Fill-dev."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdecomp.conditioning import inpainting_context, masked_images, pack
from layerdecomp.config import InpainterJobConfig
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share
from layerdecomp.flow import flow_loss
from layerdecomp.grids import image_rows
from layerdecomp.inpainting import Context, Prompt, inpaint, latent_noise, predict_velocity, token_ids
from layerdecomp.metrics.background import psnr
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.training.base import every
from layerdecomp.training.flow import FlowJob
from layerdecomp.weights import latents_sha256, load_autoencoder, load_mmdit, save_model


class InpainterJob(FlowJob):
    """Flow matching on whole scenes with random holes; with `transformer`, from the weights in that file."""

    run: InpainterJobConfig

    def __init__(self, config: InpainterJobConfig) -> None:
        super().__init__(config)
        self.autoencoder = load_autoencoder(config.weights.autoencoder).to(memory_format=torch.channels_last)
        self.transformer = initial_transformer(config)
        self.transformer.recompute = config.recompute
        self.transformer.recompute_attention = config.recompute_attention
        if config.compile:
            self.transformer.compile_blocks()
            self.autoencoder.encoder.compile()
        self.prompt = Prompt.load(config.weights.prompt, self.transformer)

    @property
    def frozen_files(self) -> list[str]:
        return [path for path in (self.run.weights.autoencoder, self.run.transformer) if path is not None]

    @property
    def encoding(self) -> dict[str, Any]:
        return {"autoencoder": latents_sha256(Path(self.run.weights.autoencoder))}

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        # Half of the scenes lack their object, or the base would learn to paint one into every large hole. Every fourth
        # hole is inverted, since a decomposer outpaints foregrounds from small regions.
        places, mask = batch["index"], batch["inpaint_mask"]
        emptied = every(2, [place // 4 for place in places], mask)
        image = torch.where(emptied, batch["background"], batch["image"])
        hole = torch.where(every(4, places, mask), 1 - mask, mask)
        z, masked = self.autoencoder.encode(torch.cat([image, masked_images(image, hole)[0]])).float().chunk(2)
        return {"z": z, "masked": masked, "hole": hole.bool()}

    def flow_losses(self, latents: dict[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
        z, hole = pack(latents["z"]), latents["hole"].float()
        context = Context(inpainting_context(latents["masked"], hole, self.run.conditioning.mask), token_ids(hole, 0))
        x, t, target = self.noisy(z, z.shape[1], positions)
        velocity = predict_velocity(self.transformer, self.prompt, x, context, t, guidance=1.0)
        return {"loss": flow_loss(velocity, target)}

    def fill(self, batch: dict[str, Any]) -> Tensor:
        """The images of a batch with their holes filled, (B, 3, H, W)."""
        image, mask = batch["image"], batch["inpaint_mask"]
        noise = latent_noise(self.autoencoder, image, self.run.evaluate.seed, batch["index"], layers=1)[:, 0]
        filled = inpaint(
            transformer=self.transformer,
            autoencoder=self.autoencoder,
            prompt=self.prompt,
            image=image,
            mask=mask,
            noise=noise,
            conditioning=self.run.conditioning,
            flow=self.run.flow,
            sample=self.run.sample,
        )
        return image * (1 - mask) + filled * mask

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        filled = self.fill(batch)
        figures = hole_metrics(filled, batch)
        for name, value in figures.items():
            self.log(f"validation/{name}", value, prog_bar=True, sync_dist=True, batch_size=len(filled))
        if batch_idx == 0 and self.trainer.is_global_zero:
            self.show("validation/inpainting", image_rows(*filling(filled, batch)))

    def finish(self, run_dir: Path, share: Share) -> None:
        if share.rank > 0:  # one rank is enough for a few scenes
            return
        self.transformer.eval()
        save_model(run_dir / "transformer.safetensors", self.transformer, self.provenance({}))
        batch = self.held_out()
        filled = torch.cat([self.fill(part) for part in split(batch, self.run.evaluate.batch_size)])
        figures = {name: value.item() for name, value in hole_metrics(filled, batch).items()}
        save_model(run_dir / "transformer.safetensors", self.transformer, self.provenance(figures))
        self.report(run_dir, "inpainter", figures, image_rows(*filling(filled, batch)))


def initial_transformer(config: InpainterJobConfig) -> MMDiT:
    """A new transformer, or the one in the file `config.transformer`; `InputError` if its architecture is another."""
    if config.transformer is None:
        model = MMDiT(config.model)
        model.init_weights()
        return model
    model = load_mmdit(config.transformer)
    for key, value in asdict(model.config).items():
        if value != (found := getattr(config.model, key)):
            raise InputError(f"transformer={config.transformer} has model.{key}={value}; found {found}, set {value}")
    return model.requires_grad_(True).train()


def split(batch: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Splits a batch into parts of at most `size` samples."""
    count = len(batch["index"])
    for start in range(0, count, size):
        yield {name: values[start : start + size] for name, values in batch.items()}


def filling(filled: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Images with holes, filled, and original, each (B, 3, H, W)."""
    image = batch["image"]
    return image * (1 - batch["inpaint_mask"]), filled, image


def hole_metrics(filled: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Mean PSNR inside the holes in dB, of the model and, for comparison, of the mean colour around each hole."""
    image, mask = batch["image"], batch["inpaint_mask"]
    hole = mask > 0.5
    mean = (image * (1 - mask)).sum(dim=(2, 3), keepdim=True) / (1 - mask).sum(dim=(2, 3), keepdim=True)
    return {
        "psnr_hole": psnr(filled, image, hole).mean(),
        "psnr_mean_colour": psnr(mean.expand_as(image), image, hole).mean(),
    }
