"""The base class of the two flow-matching jobs: latents, optionally cached, and the noise added to them."""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from layerdecomp.config import FlowJobConfig
from layerdecomp.data.index import Index
from layerdecomp.data.latents import LatentCache
from layerdecomp.flow import interpolate, sample_times, velocity_target
from layerdecomp.tensor_files import file_sha256
from layerdecomp.training.base import Job, resolve_precision


class FlowJob(Job):
    """Trains a transformer on latents from frozen autoencoders; with `latent_cache`, each sample is encoded once."""

    run: FlowJobConfig

    def __init__(self, config: FlowJobConfig) -> None:
        super().__init__(config)
        self.cache = None if config.latent_cache is None else LatentCache(config.latent_cache, self._description())

    @abstractmethod
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Everything that the loss needs from a batch, one row per sample, as computed by the frozen parts."""

    @abstractmethod
    def flow_losses(self, latents: dict[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
        """The losses, as returned by `loss`.

        Args:
            latents: the output of `encode`.
            positions: positions of the samples in the whole training run.
        """

    @property
    @abstractmethod
    def encoding(self) -> dict[str, Any]:
        """What the output of `encode` depends on besides the samples, as JSON-compatible values."""

    @property
    def memory_advice(self) -> str:
        return f"set recompute=1 recompute_attention=true, {super().memory_advice}"

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        latents = batch
        if "image" in batch:  # else it holds latents from the cache
            latents = self.encode(batch)
            if self.cache is not None and not any(batch.get("faults", [])):  # no replacements of faulty samples
                latents = self.cache.add(batch["index"], latents)
        return self.flow_losses(latents, batch["position"])

    def noisy(self, z: Tensor, tokens: int, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Adds noise to packed latents z (B, S, 64) at random times: a pure function of the seed and the positions.

        Args:
            tokens: tokens of one layer, which determine the timestep shift.
            positions: positions of the samples in the whole training run.

        Returns:
            noisy latents (B, S, 64), times (B,) and the velocities to predict (B, S, 64).
        """
        noise = self.seeded_noise(positions, z.shape[1:], z)
        normal = self.seeded_noise(positions, (1,), z, stream=1).flatten()
        t = sample_times(normal, tokens, self.run.flow)
        return interpolate(z, noise, t), t, velocity_target(z, noise)

    def _description(self) -> dict[str, Any]:
        """What a sample's latents depend on, apart from the package's code that makes and encodes it."""
        run, sample = self.run, self.run.sample
        described = {
            "job": run.job,
            "seed": run.seed,
            "code": inspect.getsource(type(self).encode),
            **self.encoding,
            "precision": resolve_precision(run.train.precision),
            "tiles": [sample.tile, sample.tile_overlap],
        }
        data = asdict(run.data)
        if run.data.source == "scenes":  # a function of the seed and index alone
            return described | {"scenes": data["scenes"]}
        names = ("source", "samples", "scenes", "triplets")
        indexes = {path: file_sha256(Index(path).path) for path in run.data.triplets.indexes}
        described |= {"step": run.train.global_batch, "indexes": indexes}  # all samples of a step share one size
        return described | {name: data[name] for name in names}
