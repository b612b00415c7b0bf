"""Whether adapting helped: adapted model, frozen base and classical inpainting on the same held-out scenes."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from layerdecomp import __version__
from layerdecomp.baselines import base_foreground, classical, matting_library
from layerdecomp.data.datamodule import Samples
from layerdecomp.data.scenes import Scenes
from layerdecomp.decomposer import Decomposer, inpaint, keep_pixels, latent_noise
from layerdecomp.errors import InputError, check_at_least
from layerdecomp.evaluation import (
    Batch,
    Evaluation,
    Prediction,
    Predictor,
    comparison_grid,
    evaluate,
    format_table,
    ranked_cases,
    write_metrics,
)
from layerdecomp.metrics.layers import METRICS
from layerdecomp.models.mmdit import MMDiT

RANKED_BY = ("background/psnr", "foreground/alpha_iou")


@dataclass
class EvaluateConfig:
    """How models are compared."""

    samples: int = 64
    batch_size: int = 16
    seed: int = 1234  # of the scenes and of the noise
    matting: bool = False  # the classical foreground by closed-form matting, which needs the extra of that name

    def __post_init__(self) -> None:
        check_at_least(1, self, "evaluate.", "samples", "batch_size")
        check_at_least(0, self, "evaluate.", "seed")


def predictors(decomposer: Decomposer, base: MMDiT, config: EvaluateConfig) -> dict[str, Predictor]:
    """The rows of the comparison; every one draws the noise of a sample from (seed, its index).

    The frozen base is used as in the paper: it inpaints the background; its foreground is the image inside the mask.

    Raises:
        InputError: matting is asked for and its library is missing.
    """
    if config.matting:
        matting_library()  # now, not after the first batch of the other rows

    def noise(batch: Batch, layers: int) -> torch.Tensor:
        return latent_noise(decomposer.autoencoder, batch["image"], config.seed, batch["index"].tolist(), layers)

    def adapted(batch: Batch) -> Prediction:
        background, foreground = decomposer.draw(batch, noise(batch, layers=2))
        return keep_pixels(batch["image"], batch["mask"], background, decomposer.sample), foreground

    def frozen(batch: Batch) -> Prediction:
        image, mask = batch["image"], batch["mask"]
        parts = (base, decomposer.autoencoder, decomposer.prompt)
        settings = (decomposer.conditioning, decomposer.flow, decomposer.sample)
        painted = inpaint(*parts, image, mask, noise(batch, layers=1)[:, 0], *settings)
        return keep_pixels(image, mask, painted, decomposer.sample), base_foreground(image, mask)

    def without_learning(batch: Batch) -> Prediction:
        return classical(batch["image"], batch["mask"], config.matting)

    return {"adapted": adapted, "base": frozen, "classical": without_learning}


def compare(decomposer: Decomposer, base: MMDiT, data: Samples, config: EvaluateConfig, out: Path) -> Evaluation:
    """Measures every row, prints the table, and writes metrics.json and samples/comparison.png into `out`."""
    decomposer = decomposer.eval()
    rows = predictors(decomposer, base.to(decomposer.prompt.vec.device).eval(), config)
    picture = out / "samples" / "comparison.png"
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); choose another folder") from error
    device = decomposer.prompt.vec.device
    evaluation = evaluate(rows, data, batch_size=config.batch_size, device=device)
    write_metrics(out / "metrics.json", evaluation.results, protocol(decomposer, data, config))
    Image.fromarray(case_grid(rows, data, evaluation, device)).save(picture)
    print(format_table(evaluation.results))
    print(f"{len(data)} held-out samples; figures in {out / 'metrics.json'}, pictures in {picture}")
    return evaluation


def case_grid(rows: dict[str, Predictor], data: Samples, evaluation: Evaluation, device: torch.device) -> np.ndarray:
    """A good, the median and the worst case of the adapted model, by rank: in the background, then in the matte."""
    indices, labels = [], []
    for name in RANKED_BY:
        cases = ranked_cases(evaluation.per_image["adapted"][name], higher_is_better=METRICS[name].better == "↑")
        indices += list(cases.values())
        labels += [f"{case}\n{name.split('/')[1]}" for case in cases]
    batch = {k: v.to(device) for k, v in default_collate([data[i] for i in indices]).items()}
    with torch.inference_mode():
        return comparison_grid(batch, {row: predict(batch) for row, predict in rows.items()}, labels)


def protocol(decomposer: Decomposer, data: Samples, config: EvaluateConfig) -> dict[str, Any]:
    """What someone needs to know to get the same figures again."""
    return {
        "data": "scenes" if isinstance(data, Scenes) else "triplets",
        "split": data.split,
        "count": len(data),
        "resolution": data.config.size,
        "region": "full",
        "seed": config.seed,
        "steps": decomposer.sample.steps,
        "guidance": decomposer.sample.guidance,
        "keep_pixels": decomposer.sample.keep_pixels,
        "classical_foreground": "matting" if config.matting else "mask",
        "recomposition": "where nothing stands in front of the object",
        "versions": {
            "layerdecomp": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
            **({"pymatting": version("pymatting")} if config.matting else {}),
        },
    }
