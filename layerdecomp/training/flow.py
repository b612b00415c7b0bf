"""What the two jobs that train by flow matching share: latents, perhaps from a cache, with noise."""

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
    """Frozen autoencoders encode every sample, once if `latent_cache` names a folder; then a transformer learns."""

    run: FlowJobConfig

    def __init__(self, config: FlowJobConfig) -> None:
        super().__init__(config)
        self.cache = None if config.latent_cache is None else LatentCache(config.latent_cache, self._description())

    @abstractmethod
    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """All that the loss needs of a batch of samples, one row each, as the frozen parts make it."""

    @abstractmethod
    def flow_losses(self, latents: dict[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
        """The losses, as `loss` gives them.

        Args:
            latents: from `encode`.
            positions: of the samples in the whole of training.
        """

    @property
    @abstractmethod
    def encoding(self) -> dict[str, Any]:
        """What `encode` depends on beside the samples, as JSON would have it."""

    @property
    def less_memory(self) -> str:
        return f"set recompute=1 recompute_attention=true, {super().less_memory}"

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        latents = batch
        if "image" in batch:  # else the latents of a batch, from the cache
            latents = self.encode(batch)
            if self.cache is not None and not any(batch.get("faults", [])):  # a replaced sample may come back
                latents = self.cache.add(batch["index"], latents)
        return self.flow_losses(latents, batch["position"])

    def noisy(self, z: Tensor, tokens: int, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Draws times and noise for packed latents z (B, S, 64), each a pure function of the seed and the position.

        Args:
            tokens: of one layer, which the shift of times goes by.
            positions: of the samples in the whole of training.

        Returns:
            noisy latents (B, S, 64), times (B,) and the velocities to predict (B, S, 64).
        """
        noise = self.drawn_normal(positions, z.shape[1:], z)
        normal = self.drawn_normal(positions, (1,), z, stream=1).flatten()
        t = sample_times(normal, tokens, self.run.flow)
        return interpolate(z, noise, t), t, velocity_target(z, noise)

    def _description(self) -> dict[str, Any]:
        """What the latents of a sample depend on, but for the package's code that makes and encodes it."""
        run, sample = self.run, self.run.sample
        described = {
            **{"job": run.job, "seed": run.seed, "code": inspect.getsource(type(self).encode), **self.encoding},
            **{"precision": resolve_precision(run.train.precision), "tiles": [sample.tile, sample.tile_overlap]},
        }
        data = asdict(run.data)
        if run.data.source == "scenes":  # functions of the seed and the index alone
            return {**described, "scenes": data["scenes"]}
        names = ("source", "samples", "scenes", "triplets")  # a step is of one size, which the samples go by
        indexes = {path: file_sha256(Index(path).path) for path in run.data.triplets.indexes}
        described |= {"step": run.train.global_batch, "indexes": indexes}
        return {**described, **{name: data[name] for name in names}}
