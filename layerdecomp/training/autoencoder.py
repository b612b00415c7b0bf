"""Trains an autoencoder: RGB from scratch, RGBA from a trained RGB one, or only the decoder of either."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdecomp.config import AutoencoderJobConfig, check_holes
from layerdecomp.data.datamodule import collate, open_samples
from layerdecomp.evaluation import Share
from layerdecomp.grids import image_rows
from layerdecomp.imaging.compositing import from_autoencoder, on_checkerboard, to_autoencoder
from layerdecomp.metrics.background import psnr
from layerdecomp.models.autoencoder import Autoencoder, extend_to_rgba, rescale_latents
from layerdecomp.tensor_files import stored_dtype
from layerdecomp.training.base import Job, every
from layerdecomp.training.deferred import to_device
from layerdecomp.training.projection import SPECTRUM, BlockProjection
from layerdecomp.weights import REFINES, checksums, load_autoencoder, save_model

# Per-channel mean and mean square of natural images in [-1, 1], which stand for random backgrounds (AlphaVAE,
# arXiv 2507.09308).
BACKGROUND_MEAN = (-0.0357, -0.0811, -0.1797)
BACKGROUND_SQUARE = (0.3163, 0.3060, 0.3634)


def composite_error(decoded: Tensor, target: Tensor) -> Tensor:
    """The expected squared error of a foreground composited over a random background, in closed form: a scalar.

    Both are (B, 4, H, W) in autoencoder space. Over a background b they give rgb + (1 - a) b, with rgb premultiplied.
    With d the error of rgb and e that of a, the result is the mean of d^2 - 2 E[b] d e + E[b^2] e^2 (AlphaVAE).
    """
    d = decoded[:, :3] - target[:, :3]
    e = (decoded[:, 3:] - target[:, 3:]) / 2  # alpha from [-1, 1] to [0, 1]
    moments = to_device(torch.tensor([BACKGROUND_MEAN, BACKGROUND_SQUARE]), decoded.device)
    mean, square = moments.to(decoded.dtype).view(2, 3, 1, 1)
    return (d.square() - 2 * mean * d * e + square * e.square()).mean()


class AutoencoderJob(Job):
    """Reconstruction error plus a small KL term; RGBA latents are also kept close to the RGB autoencoder's.

    With `refine`, only the decoder is trained, on the reconstruction error, and latents do not change.
    """

    run: AutoencoderJobConfig

    def __init__(self, config: AutoencoderJobConfig) -> None:
        super().__init__(config)
        self.teacher: Autoencoder | None = None
        if config.refine is not None:
            self.autoencoder = load_autoencoder(config.refine)
            self.autoencoder.decoder.requires_grad_(True)
        elif config.extend is not None:
            self.teacher = load_autoencoder(config.extend)
            self.autoencoder = extend_to_rgba(self.teacher).requires_grad_(True)
        else:
            self.autoencoder = Autoencoder(config.model)
            self.autoencoder.init_weights()
        self.rgba = self.autoencoder.config.in_channels == 4
        if not self.rgba:
            check_holes(config)
        self.projection = self._fit_projection() if config.projection and config.refine is None else None
        self.to(memory_format=torch.channels_last)

    @property
    def frozen_files(self) -> list[str]:
        return [path for path in (self.run.extend, self.run.refine) if path is not None]

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """The images to reconstruct, (B, 3 or 4, H, W) in [-1, 1]."""
        rare = self._rare(batch)
        if not self.rgba:  # some with a hole, as in the transformer's conditioning
            images = batch["image"] * (1 - batch["inpaint_mask"] * rare)
        else:  # some fully opaque
            opaque = F.pad(batch["image"], (0, 0, 0, 0, 0, 1), value=1.0)
            images = torch.where(rare, opaque, to_autoencoder(batch["foreground"]))
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _rare(batch: dict[str, Any]) -> Tensor:
        return every(4, batch.get("position", batch["index"]), batch["image"])

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = self.images(batch)
        with torch.set_grad_enabled(self.run.refine is None and torch.is_grad_enabled()):
            mean, log_variance = self.autoencoder.posterior(images)
        decoded = self.autoencoder.decoder(mean + self._deviation(mean, log_variance, batch["position"])).float()
        losses = self._reconstruction_losses(decoded, images)
        if self.run.refine is not None:
            return losses
        losses["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).float().mean()
        losses["loss"] = losses["loss"] + self.run.kl * losses["kl"]
        if self.projection is not None:
            losses["projection"] = self.projection.error(mean, images)
            losses["loss"] = losses["loss"] + self.run.projection * losses["projection"]
        elif self.rgba:
            losses["anchor"] = self._anchor(images, mean, self._rare(batch).flatten())
            losses["loss"] = losses["loss"] + losses["anchor"]
        return losses

    def _reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        if not self.rgba:
            error = F.mse_loss(decoded, images)
            return {"loss": error, "mse": error}
        composite = composite_error(decoded, images)
        alpha = F.l1_loss(decoded[:, 3], images[:, 3])
        return {"loss": composite + 0.5 * alpha, "composite": composite, "alpha": alpha}

    def _deviation(self, mean: Tensor, log_variance: Tensor, positions: Sequence[int]) -> Tensor:
        """The offset of the decoded latents from their mean: posterior noise, plus `noise` of a random level."""
        noise = self.seeded_noise(positions, mean.shape[1:], mean)
        level = self.seeded_noise(positions, (1, 1, 1), mean, stream=1).abs()
        return (torch.exp(0.5 * log_variance) + level * self.run.noise / self.autoencoder.config.scale_factor) * noise

    def _fit_projection(self) -> BlockProjection:
        images = self.images(self._training_scenes(256))
        config = self.autoencoder.config
        if self.teacher is None:
            return BlockProjection.fit(images, config.z_channels, config.factor)
        with torch.no_grad():
            return BlockProjection.fit_alpha(images, self.teacher.posterior(images[:, :3])[0])

    def _training_scenes(self, count: int) -> dict[str, Any]:
        data = open_samples(self.run.data, "train", self.run.seed, count, with_cues=False)
        return self.on_device(collate([data[i] for i in range(count)]))

    def _anchor(self, images: Tensor, mean: Tensor, opaque: Tensor) -> Tensor:
        """The weighted squared distance from the RGB autoencoder's latents of the same colours: a scalar."""
        assert self.teacher is not None
        with torch.no_grad():
            anchor, _ = self.teacher.posterior(images[:, :3])
        distance = (mean - anchor).float().square().mean(dim=(1, 2, 3))  # (B,)
        return (torch.where(opaque, self.run.anchor, self.run.foreground_anchor) * distance).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = self.images(batch)
        decoded = self.autoencoder.decode(self.autoencoder.encode(images)).float().clamp(-1, 1)
        for name, value in reconstruction_metrics(decoded, images).items():
            self.log(f"validation/{name}", value, prog_bar=True, sync_dist=True, batch_size=len(images))
        if batch_idx == 0 and self.trainer.is_global_zero:
            self.show("validation/reconstruction", image_rows(colours(images), colours(decoded)))

    def finish(self, run_dir: Path, share: Share) -> None:
        if share.rank > 0:  # one rank is enough for a few scenes
            return
        self.autoencoder.eval()
        if self.run.extend is None and self.run.refine is None:
            self.normalise_latents()
        images = self.images(self.held_out())
        with torch.no_grad():
            decoded = torch.cat(
                [
                    self.autoencoder.decode(self.autoencoder.encode(x))
                    for x in images.split(self.run.evaluate.batch_size)
                ]
            ).clamp(-1, 1)
        figures = {name: value.item() for name, value in reconstruction_metrics(decoded, images).items()}
        metadata = self.provenance(figures)
        dtype = torch.bfloat16
        if self.run.refine is not None:
            metadata |= {REFINES: " ".join(checksums(Path(self.run.refine)))}
            dtype = stored_dtype(self.run.refine)  # keeps the encoder's weights bit-identical
        save_model(run_dir / "autoencoder.safetensors", self.autoencoder, metadata, dtype)
        self.report(run_dir, "autoencoder", figures, image_rows(colours(images), colours(decoded)))

    @torch.no_grad()
    def normalise_latents(self) -> None:
        """Normalises latents to mean 0 and variance 1 on training scenes, with channel variances as `SPECTRUM` sets."""
        mean, _ = self.autoencoder.posterior(self._training_scenes(64)["image"])
        factors = mean.std(dim=(0, 2, 3)) ** (SPECTRUM - 1)
        rescale_latents(self.autoencoder, factors)
        mean = mean * factors.view(-1, 1, 1)
        self.autoencoder.config = replace(
            self.autoencoder.config,
            shift_factor=round(mean.mean().item(), 4),
            scale_factor=round(1 / mean.std().item(), 4),
        )


def reconstruction_metrics(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Mean PSNR of the colours in dB, of (B, C, H, W) in [-1, 1]; with alpha, also its mean error in [0, 1]."""
    metrics = {"psnr": psnr(decoded[:, :3], images[:, :3]).mean()}
    if images.shape[1] == 4:
        metrics["alpha_l1"] = (decoded[:, 3] - images[:, 3]).abs().mean() / 2
    return metrics


def colours(images: Tensor) -> Tensor:
    """Images (B, 3 or 4, H, W) of an autoencoder as (B, 3, H, W), with what is transparent on a checkerboard."""
    return images if images.shape[1] == 3 else on_checkerboard(from_autoencoder(images))
