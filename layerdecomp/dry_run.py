"""Estimates what a training run needs, without a GPU or weight files, and without writing anything."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from layerdecomp.benchmark import ENCODING, STEP, count, recomputed
from layerdecomp.config import DecomposerJobConfig, RunConfig
from layerdecomp.decomposer import check_adaptation, check_parts
from layerdecomp.errors import InputError
from layerdecomp.memory import TrainingWork, extrapolate_over_blocks, parameter_counts, training_memory
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiTConfig
from layerdecomp.tables import markdown_table
from layerdecomp.tensor_files import read_metadata
from layerdecomp.weights import config_from

ModelT = TypeVar("ModelT", MMDiTConfig, AutoencoderConfig)
FLUX_TEXT_TOKENS = 512
MAKE = {
    "weights.rgba_autoencoder": "made by tools/train.py config=configs/flux_rgba_autoencoder.yaml; copy its result",
    "weights.prompt": "made by make embed-prompt",
    "adapter": "written by a run, or published; null starts from the base",
    "data.triplets": "an index, written by tools/prepare_data.py",
}


def dry_run(config: RunConfig) -> str:
    """The parameters, memory and operations of a training step, and the missing files.

    Models are as the weight files describe them, or FLUX.1-Fill-dev's if a file is missing.

    Raises:
        InputError: the job trains no adapter, keeps its frozen parts in float32, or has settings that do not fit them.
    """
    if not isinstance(config, DecomposerJobConfig):
        raise InputError(f"train.dry_run counts a decomposer job; found job={config.job}")
    if config.train.precision == "32-true":
        raise InputError(
            "train.dry_run counts a step in bf16; found train.precision=32-true, expected auto or bf16-mixed"
        )
    check_adaptation(config)
    work = training_work(config)
    rgba = _described(config.weights.rgba_autoencoder, replace(work.rgb, in_channels=4))
    check_parts(config, work.model, work.rgb, rgba)
    counts = extrapolate_over_blocks(count, work)
    samples = config.train.global_batch
    encode, per_sample = (counts[name] / work.batch_size for name in (ENCODING, STEP))
    return "\n".join(
        [
            f"{config.name}: {work.size} x {work.size}, batch {work.batch_size} on each of "
            f"{config.train.processes} devices, {work.model.depth} + "
            f"{work.model.depth_single_blocks} blocks of width {work.model.hidden_size}, LoRA rank {work.lora.rank}",
            "",
            markdown_table([["part", "parameters"], *([k, f"{n:,}"] for k, n in parameter_counts(work).items())]),
            "",
            markdown_table([["memory of a device", "GB", "in"], *memory_rows(work, config)]),
            "",
            f"a step of {samples} samples: {samples * per_sample / 1e12:.4g} TFLOP, "
            f"{encode / 1e12:.4g} of a sample's {per_sample / 1e12:.4g} in the autoencoders, "
            f"{counts['of which recomputed'] / work.batch_size / 1e12:.4g} recomputed",
            "",
            *missing_files(config),
        ]
    )


def memory_rows(work: TrainingWork, config: DecomposerJobConfig) -> list[list[str]]:
    """Rows of the memory table: what is in a device's memory, its size in GB, and how it is stored."""
    memory = training_memory(work)
    train = config.train
    average = memory.trained if train.ema else 0
    # While DDP accumulates, gradients are summed beside its buckets.
    accumulated = memory.gradients if train.processes > 1 and train.accumulate > 1 else 0
    rows = [
        ("frozen weights", memory.frozen, _frozen_storage(config)),
        ("trained weights", memory.trained, "float32"),
        ("gradients", memory.gradients + accumulated, "float32; twice while several devices accumulate"),
        ("optimizer", memory.optimizer, f"two moments in {config.optim.bits} bits; Muon has fewer"),
        ("moving average", average, f"train.ema={train.ema:g}"),
        ("activations", memory.step, "; ".join(_recomputing(work))),
        ("or encoding", memory.encode, f"encode_batch_size={config.encode_batch_size}; before the step"),
        (
            "total",
            memory.total + average + accumulated,
            "with the larger of the last two; CUDA itself takes about 0.5 more",
        ),
    ]
    return [[part, f"{size / 1e9:.1f}", how] for part, size, how in rows]


def _recomputing(work: TrainingWork) -> list[str]:
    """What is recomputed, and the size of the activations with other settings."""
    others = (replace(work, recompute=n, recompute_attention=again) for n, again in ((0, True), (1, False), (1, True)))
    return [recomputed(work)] + [
        f"{training_memory(other).step / 1e9:.1f} with {recomputed(other)}"
        for other in others
        if recomputed(other) != recomputed(work)
    ]


def _frozen_storage(config: DecomposerJobConfig) -> str:
    """How the frozen weights are stored."""
    if config.shard_base:
        devices = config.train.processes
        return f"bf16, 1/{devices} of the transformer; gathered blocks count as activations"
    return f"bf16, blocks in {config.quantize}" if config.quantize else "bf16"


def training_work(config: DecomposerJobConfig) -> TrainingWork:
    """The work of one process in a step."""
    found = config.weights
    triplets = config.data.source == "triplets"
    return TrainingWork(
        size=config.data.triplets.size if triplets else config.data.scenes.size,
        batch_size=config.train.batch_size,
        text_tokens=1 if found.prompt is None else FLUX_TEXT_TOKENS,
        recompute=config.recompute,
        recompute_attention=config.recompute_attention,
        lora=config.lora,
        fusion=config.fusion,
        model=_described(found.transformer, MMDiTConfig()),
        rgb=_described(found.autoencoder, AutoencoderConfig()),
        quantize=config.quantize,
        bits=config.optim.bits,
        encode_batch_size=config.encode_batch_size,
        shards=config.train.processes if config.shard_base else 1,
    )


def _described(path: str, default: ModelT) -> ModelT:
    """The model config in a file's metadata, or the default if there is no file."""
    if not Path(path).is_file():
        return default
    return config_from(type(default), read_metadata(path).get("config"), path)


def missing_files(config: DecomposerJobConfig) -> list[str]:
    """A line for each missing file, with where it comes from; or one that says that all are there."""
    places = [(f"weights.{name}", path) for name, path in config.weights.named().items()]
    started = {"adapter": config.adapter, "adapter_base": config.adapter_base}
    places += [(key, path) for key, path in started.items() if path is not None]
    if config.data.source == "triplets":
        places += [("data.triplets", path) for path in config.data.triplets.indexes]
    lines = [
        f"missing: {path} ({key}); {MAKE.get(key, 'checkpoints/README.md says where to get it')}"
        for key, path in places
        if not Path(path).exists()
    ]
    return lines or ["no file is missing"]
