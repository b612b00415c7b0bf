"""Batches for training and validation, each a pure function of the seed and the step."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from layerdecomp.data.latents import LatentCache
from layerdecomp.data.scenes import SceneConfig, Scenes
from layerdecomp.data.triplets import TRIES, TripletConfig, Triplets
from layerdecomp.errors import InputError, check_at_least, check_probabilities
from layerdecomp.tensor_files import Metadata
from layerdecomp.weights import config_from, earlier_stages


@dataclass
class DataConfig:
    """The source of the samples, and how they are loaded."""

    source: str = "scenes"  # scenes: generated on the fly, no download; triplets: from data sets on disk
    samples: int = 10_000_000  # distinct training samples; then they repeat, with different noise
    validation: int = 16  # validation samples
    workers: int = 1  # data loader processes; 0: load in the training process
    max_faulty: float = 0.01  # fraction of unreadable training samples above which training stops
    scenes: SceneConfig = field(default_factory=SceneConfig)
    triplets: TripletConfig = field(default_factory=TripletConfig)

    def __post_init__(self) -> None:
        if self.source not in ("scenes", "triplets"):
            raise InputError(f"data.source is {self.source!r}; expected scenes or triplets")
        check_at_least(1, self, "data.", "samples", "validation")
        check_at_least(0, self, "data.", "workers")
        check_probabilities(self, "data.", "max_faulty")


def recorded_data(metadata: Metadata, path: str) -> DataConfig:
    """The data that an adapter at `path` was trained on, a sum's in its last stage; the defaults if it does not say."""
    stages = [*earlier_stages(metadata, path), metadata]
    texts = [text for stage in stages if (text := stage.get("data", "")).startswith("{")]
    return config_from(DataConfig, texts[-1] if texts else None, f"{path}: data")


DrawnSamples = Scenes | Triplets


def open_samples(
    config: DataConfig, split: str, seed: int, length: int, with_cues: bool = True, group: int | None = None
) -> DrawnSamples:
    """The samples of a split; each `group` of consecutive ones (a batch) shares one size; without groups, all do."""
    if config.source == "scenes":
        return Scenes(config.scenes, split, seed, length, with_cues)
    return Triplets(config.triplets, split, seed, length, with_cues, group)


class RepeatedSamples(Dataset[dict[str, Any]]):
    """An endlessly repeated data set, indexed by the `position` in the whole training run, which each sample holds.

    If the files of a sample cannot be read, it is replaced by the next draw for the same index; `faults` lists the
    errors. If the cache holds all samples of a batch, the batch is loaded from it, as latents.
    """

    def __init__(self, samples: DrawnSamples, cache: LatentCache | None = None) -> None:
        self.samples, self.cache = samples, cache

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = position % len(self.samples)
        faults: list[str] = []
        for attempt in range(TRIES):
            try:
                return {**self.samples.draw(index, attempt), "position": position, "faults": faults}
            except InputError as error:
                faults.append(str(error))
        raise InputError(f"{TRIES} draws in a row for sample {index} cannot be used; the last: {faults[-1]}")

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        indices = [position % len(self.samples) for position in positions]
        if self.cache is None or not self.cache.has(indices):
            return [self[position] for position in positions]
        places = zip(positions, indices, strict=True)
        return [{**self.cache.load(i), "index": i, "position": position, "faults": []} for position, i in places]


class StepSampler(Sampler[list[int]]):
    """The positions of each of this rank's batches, starting at step `first`.

    With gradient accumulation, a "step" here is one micro-batch on every rank. Consecutive steps use consecutive
    samples, so an optimizer step sees the same samples however they are divided into ranks and micro-batches.
    """

    def __init__(self, *, first: int, steps: int, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.steps, self.batch_size = first, steps, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps  # of the whole run, since Lightning also counts the steps before a resume

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors; `index`, `position` and `faults` stay lists, so they are not moved to the device."""
    names = ("index", "position", "faults")
    kept: dict[str, Any] = {name: [sample.pop(name) for sample in samples] for name in names if name in samples[0]}
    batch: dict[str, Tensor] = default_collate(samples)
    return {**batch, **kept}


class SampleData(LightningDataModule):
    """Training batches by step, and validation batches from the held-out split, with seed `seed + 1`.

    Args:
        batch_size: samples per process.
        global_batch: samples per step over all processes, which share one size; defaults to `batch_size`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        steps: int,
        batch_size: int,
        with_cues: bool,
        global_batch: int | None = None,
        cache: LatentCache | None = None,
    ) -> None:
        super().__init__()
        group = global_batch or batch_size
        if config.source == "triplets" and len(config.triplets.aspects) > 1 and config.samples % group:
            raise InputError(f"data.samples is {config.samples}; expected a multiple of the samples per step, {group}")
        self.workers, self.steps, self.batch_size, self.cache = config.workers, steps, batch_size, cache
        self.training = open_samples(config, "train", seed, config.samples, with_cues, group)
        self.held_out = open_samples(config, "test", seed + 1, config.validation, with_cues)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        batches = self.trainer.accumulate_grad_batches  # micro-batches per step
        sampler = StepSampler(
            first=self.trainer.global_step * batches,
            steps=self.steps * batches,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return DataLoader(
            RepeatedSamples(self.training, self.cache),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            worker_init_fn=leave_signals_to_parent,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Splits the samples over the ranks, without padding or repetition."""
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        # A rank without samples would make the others hang. The config is checked at once; an index may hold fewer.
        if len(self.held_out) < processes:
            raise InputError(
                f"data.validation is {len(self.held_out)}, but {processes} processes share them; expected one for each"
            )
        mine = Subset(self.held_out, range(rank, len(self.held_out), processes))
        return DataLoader(mine, batch_size=self.batch_size, num_workers=0, collate_fn=collate)


def leave_signals_to_parent(worker: int) -> None:
    """Makes a worker ignore signals, which the main process handles: its last step may still need the workers."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kills the workers that an error has left behind.

    At exit, Python sends them SIGTERM, which they ignore, and then waits for them forever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # otherwise torch raises that a worker was killed
    for worker in workers:
        worker.kill()
