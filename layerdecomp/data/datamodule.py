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


@dataclass
class DataConfig:
    """Where samples come from."""

    source: str = "scenes"  # scenes: made on the fly, no download; triplets: from data sets on disk
    samples: int = 10_000_000  # distinct training samples; after them the same ones come again, with other noise
    validation: int = 16  # samples that validation looks at
    workers: int = 1  # processes that make samples while the model trains; 0: the training process itself
    max_faulty: float = 0.01  # of training samples whose files cannot be read; above it, training stops
    scenes: SceneConfig = field(default_factory=SceneConfig)
    triplets: TripletConfig = field(default_factory=TripletConfig)

    def __post_init__(self) -> None:
        if self.source not in ("scenes", "triplets"):
            raise InputError(f"data.source is {self.source!r}; expected scenes or triplets")
        check_at_least(1, self, "data.", "samples", "validation")
        check_at_least(0, self, "data.", "workers")
        check_probabilities(self, "data.", "max_faulty")


Samples = Scenes | Triplets


def open_samples(
    config: DataConfig, split: str, seed: int, length: int, with_cues: bool = True, group: int | None = None
) -> Samples:
    """The samples of a split; every `group` of consecutive ones (a batch) is of one size, or all of them are."""
    if config.source == "scenes":
        return Scenes(config.scenes, split, seed, length, with_cues)
    return Triplets(config.triplets, split, seed, length, with_cues, group)


class Positions(Dataset[dict[str, Any]]):
    """The samples of a data set over and over, each with its `position` in the whole of training.

    A sample whose files cannot be read is replaced by the next draw for its place; its `faults` say why. A
    batch whose samples a cache has comes from there, as latents.
    """

    def __init__(self, samples: Samples, cache: LatentCache | None = None) -> None:
        self.samples, self.cache = samples, cache

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, faults = position % len(self.samples), list[str]()
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
    """The positions of every batch, from the one that training has reached: rank r takes the r-th share.

    Where gradients of several batches make one step, a "step" here is one of them; the samples of consecutive steps
    follow each other, so that it does not matter how many ranks and batches share them out.
    """

    def __init__(self, *, first: int, steps: int, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.steps, self.batch_size = first, steps, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps  # of the whole run, since Lightning counts the steps before a restart as well

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors; `index`, `position` and `faults` stay lists, which no device needs."""
    names = ("index", "position", "faults")
    kept: dict[str, Any] = {name: [sample.pop(name) for sample in samples] for name in names if name in samples[0]}
    batch: dict[str, Tensor] = default_collate(samples)
    return {**batch, **kept}


class SampleData(LightningDataModule):
    """Training batches by step, validation batches from the held-out split (with a seed that no evaluation uses).

    Args:
        batch_size: of a process.
        global_batch: samples of a step, over all processes, which are all of one size; `batch_size` unless given.
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
            raise InputError(f"data.samples is {config.samples}; expected a multiple of a step's samples, {group}")
        self.workers, self.steps, self.batch_size, self.cache = config.workers, steps, batch_size, cache
        self.training = open_samples(config, "train", seed, config.samples, with_cues, group)
        self.held_out = open_samples(config, "test", seed + 1, config.validation, with_cues)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        batches = self.trainer.accumulate_grad_batches  # of every process in a step
        sampler = StepSampler(
            first=self.trainer.global_step * batches,
            steps=self.steps * batches,
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return DataLoader(
            Positions(self.training, self.cache),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
            worker_init_fn=leave_signals_to_parent,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every rank has another share of the samples, none of them twice."""
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        if len(self.held_out) < processes:  # a rank without any would leave the others waiting
            raise InputError(
                f"data.validation is {len(self.held_out)}, but {processes} processes share them; expected one for each"
            )
        mine = Subset(self.held_out, range(rank, len(self.held_out), processes))
        return DataLoader(mine, batch_size=self.batch_size, num_workers=0, collate_fn=collate)


def leave_signals_to_parent(worker: int) -> None:
    """What asks a training to stop reaches its workers too, which the last step may still need."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Ends the workers that an error has left behind.

    At its end, Python asks them to end by SIGTERM, which they ignore, and waits for them for ever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a worker was killed
    for worker in workers:
        worker.kill()
