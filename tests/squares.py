"""A data set of five samples and two predictors, for tests of what is done with any."""

from typing import Any

import torch
from torch.utils.data import default_collate

from layerdecomp.baselines import base_foreground
from layerdecomp.evaluation import Batch
from layerdecomp.predictions import Prediction

SIZE = 32


class Squares:
    """Squares on noise; the mask of even samples misses the top half of the object, odd ones are exact."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        background, rgb = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
        alpha = torch.zeros(1, SIZE, SIZE)
        alpha[:, 8 : 20 + index, 8:24] = 1
        mask = alpha.clone()
        mask[:, : 14 if index % 2 == 0 else 0] = 0
        return {
            "image": alpha * rgb + (1 - alpha) * background,
            "mask": mask,
            "foreground": torch.cat([rgb, alpha]),
            "background": background,
            "occluder": torch.zeros_like(alpha),
            "index": index,
        }


def do_nothing(batch: Batch) -> Prediction:
    return batch["image"], base_foreground(batch["image"], batch["mask"])


def noisy_truth(batch: Batch) -> Prediction:
    noise = [torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(int(i))) for i in batch["index"]]
    return (batch["background"] + 0.05 * torch.stack(noise)).clamp(-1, 1), batch["foreground"]


def collate(*indices: int) -> Batch:
    return default_collate([Squares()[index] for index in indices])
