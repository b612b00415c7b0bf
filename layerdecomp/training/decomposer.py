"""Adapts the frozen inpainting base to layer decomposition: LoRA, input projection and context fusion."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerdecomp.comparison import Models, check_rows, compare, methods
from layerdecomp.config import DecomposerJobConfig
from layerdecomp.data.datamodule import open_samples
from layerdecomp.decomposer import build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share
from layerdecomp.flow import flow_loss
from layerdecomp.grids import comparison_grid
from layerdecomp.incoming import moved_adapter
from layerdecomp.manifest import DecomposerConfig, open_adapter
from layerdecomp.metric_networks import open_networks
from layerdecomp.metrics.layers import LayerMetrics
from layerdecomp.models.lora import inject_lora
from layerdecomp.sharding import ShardedBase
from layerdecomp.training.base import local_device, resolve_precision
from layerdecomp.training.flow import FlowJob
from layerdecomp.weights import Adapter, empty_mmdit, latents_sha256

logger = logging.getLogger(__name__)


class DecomposerJob(FlowJob):
    """Flow matching on both layers at a shared time t: the mean squared error of their velocities."""

    run: DecomposerJobConfig

    def __init__(self, config: DecomposerJobConfig) -> None:
        super().__init__(config)
        # On a GPU, frozen weights are stored in the compute precision; on a CPU, casting float32 ones is faster.
        mixed = torch.cuda.is_available() and resolve_precision(config.train.precision) == "bf16-mixed"
        dtype = torch.bfloat16 if mixed else torch.float32
        # A base to be sharded need not fit on this device: the ranks of a machine memory-map one copy of the file.
        device, mapped = ("cpu", True) if config.shard_base else (local_device(), False)
        if not config.lora.targets:
            logger.warning("lora.targets is empty: no layer gets LoRA; only img_in and, if enabled, fusion are trained")
        start = fitting_adapter(config)  # checked first: the base may take minutes to load
        self.decomposer = build_decomposer(config, dtype=dtype, device=device, quantize=config.quantize, mapped=mapped)
        if start is not None:
            self.decomposer.load_adapter(start, str(config.adapter))
        self.sharded: ShardedBase | None = None
        check_rows(config.evaluate)  # now, not after training
        self.metrics = LayerMetrics(open_networks(config.evaluate.measure).measures)
        self.decomposer.transformer.recompute = config.recompute
        self.decomposer.transformer.recompute_attention = config.recompute_attention
        if config.compile:
            self.decomposer.compile_parts()
        for autoencoder in (self.decomposer.autoencoder, self.decomposer.rgba_autoencoder):
            autoencoder.encode_batch_size = config.encode_batch_size

    def configure_model(self) -> None:  # called before every validation and training
        if self.run.shard_base and self.sharded is None:
            self.sharded = ShardedBase(self.decomposer.transformer, self.trainer.strategy.root_device)

    @property
    def frozen_files(self) -> list[str]:
        return [*self.run.weights.named().values()]

    @property
    def encoding(self) -> dict[str, Any]:
        weights, fusion = self.run.weights, self.run.fusion
        files = (weights.autoencoder, weights.rgba_autoencoder)
        cues = fusion.cues if fusion.enabled else []
        return {"autoencoders": [latents_sha256(Path(file)) for file in files], "cues": cues}

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        cond, z = self.decomposer.encode_sample(
            batch["image"], batch["mask"], batch["cues"], batch["background"], batch["foreground"]
        )
        return {
            "cond": cond,  # masked images and cues, (B, 2 + M, 16, H/8, W/8)
            "z": z.float(),  # (B, 2L, 64)
            "mask": batch["mask"].bool(),
            "cues_present": batch["cues_present"],
        }

    def flow_losses(self, latents: dict[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
        z, mask = latents["z"], latents["mask"].float()
        context = self.decomposer.condition(latents["cond"], mask, latents["cues_present"])
        x, t, target = self.noisy(z, z.shape[1] // 2, positions)
        velocity = self.decomposer.velocity(x, context, t, self.run.training_guidance)
        velocity_b, velocity_f = velocity.chunk(2, dim=1)
        target_b, target_f = target.chunk(2, dim=1)
        background, foreground = flow_loss(velocity_b, target_b), flow_loss(velocity_f, target_f)
        return {"loss": (background + foreground) / 2, "background": background, "foreground": foreground}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Until the first step LoRA adds zero, unless training starts from an adapter: this is the frozen base's row.
        row = "adapted" if self.global_step or self.run.adapter else "base"
        models = Models(self.decomposer, self.decomposer.transformer)
        method = methods(models, replace(self.run.evaluate, rows=[row]))[row]
        background, foreground = method.draw({**batch, "index": torch.tensor(batch["index"])})
        self.metrics.update(background, foreground, batch)
        if batch_idx == 0 and self.trainer.is_global_zero:
            self.show("validation/layers", comparison_grid(batch, {row: (background, foreground)}))

    def on_validation_epoch_end(self) -> None:
        self._join_remaining_gathers()
        figures = {name: value for name, value in self.metrics.compute().items() if not torch.isnan(value)}
        # Every rank already has the same values; `sync_dist` only silences Lightning's warning.
        self.log_dict({f"validation/{name}": value for name, value in figures.items()}, sync_dist=True)
        self.metrics.reset()

    def sample_names(self, positions: Sequence[int]) -> list[str]:
        names = super().sample_names(positions)
        self._join_remaining_gathers()  # ranks may run different numbers of samples
        return names

    def _join_remaining_gathers(self) -> None:
        if self.sharded is not None:
            self.sharded.join_remaining_gathers()

    @property
    def memory_advice(self) -> str:
        return f"{super().memory_advice} or lora.rank"

    def settings_that_fit(self) -> str:
        if self.sharded is None:
            return super().settings_that_fit()
        return (
            "no settings were tried, since with shard_base=true every rank would have to: set recompute=1, or a "
            "smaller train.batch_size and a larger train.accumulate"
        )

    def finish(self, run_dir: Path, share: Share) -> None:
        share = replace(share, before_waiting=self._join_remaining_gathers)
        if share.rank == 0:
            self._save_adapter(run_dir, {})
        if not self.run.evaluate.rows:
            return
        base = self.decomposer.frozen_base(self.run.weights.transformer)
        config = self.run.evaluate
        data = open_samples(self.run.data, "test", config.seed, config.samples)
        # The adapter by its content: layers left by an interrupted evaluation may come from another step.
        files = self.frozen_sha256() | {"adapter": self.decomposer.digest()}
        models = Models(self.decomposer, base, files, self.run.quantize)
        evaluation = compare(models, data, config, run_dir, device=self.device, share=share)
        if evaluation is not None:
            self._save_adapter(run_dir, evaluation.results.get("adapted", {}))

    def _save_adapter(self, run_dir: Path, figures: Mapping[str, float]) -> None:
        metadata = {**self.run.to_metadata(), **self.provenance(figures)}
        if self._provenance.history:
            metadata["continues"] = self._provenance.history[-1]["sha256"]
        self.decomposer.adapter(metadata).save(run_dir / "adapter.safetensors")


def fitting_adapter(config: DecomposerJobConfig) -> Adapter | None:
    """The adapter to continue training, if any; `InputError` unless it matches the run's frozen files and settings.

    With `adapter_base`, it must match that base in place of the run's, to which it is then moved.
    """
    if config.adapter is None:
        return None
    transformer = config.weights.transformer
    files = {**config.weights.named(), "transformer": config.adapter_base or transformer}
    adapter, described = open_adapter(config.adapter, **files)
    _check_prompt(config, adapter)
    now, then = fixed_settings(config), fixed_settings(described)
    if config.lora.targets != described.lora.targets and adapted_layers(config) == adapted_layers(described):
        now["lora.targets"] = then["lora.targets"]  # other patterns for the same layers
    for key, value in then.items():
        if value != (found := now.get(key)):
            raise InputError(
                f"adapter={config.adapter} was trained with {key}={value}; found {found}, set {key}={value}"
            )
    if config.adapter_base is None:
        return adapter
    return moved_adapter(adapter, described.weights.transformer, transformer)


def adapted_layers(config: DecomposerConfig) -> list[str]:
    """The names of the layers with LoRA."""
    model, _ = empty_mmdit(config.weights.transformer)
    return inject_lora(model, config.lora)


def _check_prompt(config: DecomposerJobConfig, adapter: Adapter) -> None:
    """Raises `InputError` if only one of adapter and run has a prompt; differing checksums were refused before."""
    then: str | None = json.loads(adapter.metadata["weights"]).get("prompt")
    now = config.weights.prompt
    if (then is None) != (now is None):
        found, expected = ("null" if path is None else path for path in (now, then))
        raise InputError(
            f"adapter={config.adapter} was trained with weights.prompt={expected}; found {found}, set the same one"
        )


def fixed_settings(config: DecomposerConfig) -> dict[str, Any]:
    """The settings that an adapter's tensors depend on, by key."""
    lora = {**asdict(config.lora), "alpha": config.lora.scale * config.lora.rank}
    fusion = asdict(config.fusion) if config.fusion.enabled else {"enabled": False}
    parts = {"lora": lora, "fusion": fusion, "conditioning": asdict(config.conditioning)}
    return {f"{part}.{key}": value for part, settings in parts.items() for key, value in settings.items()}
