"""Compares the adapted model with its frozen base, classical baselines and any other methods on the same samples."""

import json
import logging
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from layerdecomp import __version__
from layerdecomp.baselines import base_foreground, classical, matted_foreground, matting_library
from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.data.datamodule import DataConfig, DrawnSamples, open_samples
from layerdecomp.data.scenes import Scenes
from layerdecomp.data.testset import OBJECTS, TestFolder, drawn_samples, export_samples, name_of, test_objects
from layerdecomp.decomposer import SOURCES, Decomposer, build_decomposer
from layerdecomp.errors import InputError, WriteError, check_at_least, first_few
from layerdecomp.evaluation import Evaluation, Method, Share, draw_layers, score, write_figures
from layerdecomp.files import atomic_write, keep_settings, source_sha256
from layerdecomp.imaging.layers import write_picture
from layerdecomp.inpainting import FrozenBase, inpaint, latent_noise
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.metric_networks import MeasureConfig, Networks, open_networks
from layerdecomp.metrics.layers import METRICS
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.predictions import PredictionFolder, describe
from layerdecomp.report import case_grid, format_report
from layerdecomp.resizing import at_original_size
from layerdecomp.tables import format_published
from layerdecomp.tensor_files import file_sha256, frozen_dtype, read_metadata, weight_files
from layerdecomp.weights import Adapter, load_mmdit

logger = logging.getLogger(__name__)
ROWS = ("adapted", "base", "classical", "matting", "maskless")
WITH_MODEL = ("adapted", "base", "maskless")
MASKLESS = "checkpoints/tiny/transformer_maskless.safetensors"  # ships with the repository; the ablation uses it too
SETTINGS = ".settings.json"  # the settings of a row's layers, in their folder until the evaluation is finished
RESULTS = ("metrics.json", "table.md", "per_image.csv", "report.html", "published.md")
ROW_SOURCES = (*SOURCES, "baselines.py", "comparison.py", "data/*.py", "evaluation.py", "predictions.py")
ROWS_SHA256 = source_sha256(*ROW_SOURCES)  # of the code that draws the layers of all rows
TestData = DrawnSamples | TestFolder


@dataclass
class EvaluateConfig:
    """The methods to compare, the samples and the measurement."""

    samples: int = 64  # number of samples, unless data= names a folder of triplets
    batch_size: int = 16
    seed: int = 1234  # for the scenes and the noise
    rows: list[str] = field(default_factory=lambda: ["adapted", "base", "classical"])  # some of ROWS
    maskless: str | None = None  # weights of the row maskless, an image-to-image base without mask; null: MASKLESS
    objects: str = "drawn"  # drawn: as in training; one or all: per layered image of the test split
    stretch: bool = False  # with one or all: resize whole images instead of cropping around the object
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # row -> metric -> published figure

    def __post_init__(self) -> None:
        check_at_least(1, self, "evaluate.", "samples", "batch_size")
        check_at_least(0, self, "evaluate.", "seed")
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise InputError(f"evaluate.rows has {unknown[0]!r}; expected some of {', '.join(ROWS)}")
        if unknown := [name for figures in self.published.values() for name in figures if name not in METRICS]:
            raise InputError(f"evaluate.published has {unknown[0]!r}; expected some of {', '.join(METRICS)}")
        if self.objects not in OBJECTS:
            raise InputError(f"evaluate.objects is {self.objects!r}; expected one of {', '.join(OBJECTS)}")


@dataclass(frozen=True)
class Models:
    """The models that the rows with a model need."""

    decomposer: Decomposer
    base: MMDiT | FrozenBase
    files: Mapping[str, str] = field(default_factory=dict)  # their weight files: name -> sha256
    quantize: str | None = None  # format of the frozen weights of both transformers


def load_models(
    adapter: Adapter, path: str, config: DecomposerConfig, device: str, quantize: str | None = None
) -> Models:
    """Loads the models for an adapter read from `path`; `config` is the adapter's."""
    weights = config.weights
    decomposer = build_decomposer(config, dtype=frozen_dtype(device), device=device, quantize=quantize)
    decomposer.load_adapter(adapter, path)
    files = [path, *weights.named().values()]
    base = decomposer.frozen_base(weights.transformer)
    return Models(decomposer, base, {file: file_sha256(Path(file)) for file in files}, quantize)


def check_rows(config: EvaluateConfig) -> None:
    """Raises `InputError` if the library of the row matting is missing, or the weights of the row maskless."""
    if "matting" in config.rows:
        matting_library()
    if "maskless" in config.rows:
        maskless_weights(config)


def methods(models: Models | None, config: EvaluateConfig) -> dict[str, Method]:
    """The rows of a comparison; without `models`, rows that need them are omitted.

    The frozen base is used as in the paper: it inpaints the background, and its foreground is the image inside the
    mask. `InputError` if the weights of the row maskless cannot be used.
    """
    found = {
        "classical": Method(lambda batch: classical(batch["image"], batch["mask"])),
        "matting": Method(lambda batch: (None, matted_foreground(batch["image"], batch["mask"])), ("foreground",)),
    }
    if models is not None:
        found |= _model_methods(models, config)
    return {row: found[row] for row in config.rows if row in found}


def _model_methods(models: Models, config: EvaluateConfig) -> dict[str, Method]:
    decomposer, seed = models.decomposer.eval(), config.seed
    draws = {
        "adapted": partial(_draw_adapted, decomposer, seed),
        "base": partial(_draw_inpainted, decomposer, models.base.eval(), decomposer.conditioning, seed),
    }
    if "maskless" in config.rows:
        maskless = _load_maskless(config, models).eval()
        draws["maskless"] = partial(_draw_inpainted, decomposer, maskless, ConditioningConfig(mask=False), seed)
    return {row: Method(partial(at_original_size, draw, sample=decomposer.sample)) for row, draw in draws.items()}


def _draw_adapted(decomposer: Decomposer, seed: int, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    noise = _noise(decomposer, seed, batch, layers=2 * decomposer.sample.ensemble)
    return decomposer.draw(batch, noise)


def _draw_inpainted(
    decomposer: Decomposer,
    base: MMDiT | FrozenBase,
    conditioning: ConditioningConfig,
    seed: int,
    batch: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    painted = inpaint(
        transformer=base,
        autoencoder=decomposer.autoencoder,
        prompt=decomposer.prompt,
        image=batch["image"],
        mask=batch["mask"],
        noise=_noise(decomposer, seed, batch, layers=1)[:, 0],
        conditioning=conditioning,
        flow=decomposer.flow,
        sample=decomposer.sample,
    )
    return painted, base_foreground(batch["image"], batch["mask"])


def _noise(decomposer: Decomposer, seed: int, batch: Mapping[str, Tensor], layers: int) -> Tensor:
    return latent_noise(decomposer.autoencoder, batch["image"], seed, batch["index"].tolist(), layers)


def maskless_weights(config: EvaluateConfig) -> Path:
    """The path of the maskless base's weights; `InputError` if it is missing or cannot be read."""
    path = Path(config.maskless or MASKLESS)
    if not path.exists():
        raise InputError(
            f"{path} does not exist, but the row maskless needs it; restore the tiny one, which ships with the "
            f"repository, or train it with `make {MASKLESS}` (config=configs/tiny_inpainter.yaml "
            "conditioning.mask=false), or set evaluate.maskless=FILE, or remove the row from evaluate.rows"
        )
    for file in weight_files(path):
        read_metadata(file)
    return path


def _load_maskless(config: EvaluateConfig, models: Models) -> MMDiT:
    """Loads the maskless base; `InputError` if it does not fit the autoencoder and prompt of the adapted base."""
    path = maskless_weights(config)
    weight = next(models.decomposer.autoencoder.parameters())
    maskless = load_mmdit(path, dtype=weight.dtype, device=str(weight.device))
    for name in ("in_channels", "out_channels", "context_in_dim", "vec_in_dim"):
        found, expected = (getattr(model.config, name) for model in (maskless, models.base))
        if found != expected:
            raise InputError(
                f"{path} has {name} {found}, the adapted base {expected}; the row maskless needs a base with the same "
                "autoencoder and prompt: set evaluate.maskless=FILE"
            )
    return maskless


def compare(
    models: Models | None,
    data: TestData,
    config: EvaluateConfig,
    out: Path,
    *,
    predictions: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    share: Share | None = None,
) -> Evaluation | None:
    """Evaluates every row, prints the table, and writes metrics, images and a report into `out`.

    An interrupted evaluation resumes with the existing layers in ``out / "layers"``; a finished one starts over.

    Args:
        predictions: folders with the layers of other methods, one row each.
        share: the samples for this process to predict and score.

    Returns:
        The results, on rank 0; None on the others.

    Raises:
        InputError: a file or folder is missing or does not fit, or `out` cannot be written.
    """
    check_rows(config)
    share = share or Share()
    rows, names = methods(models, config), sample_names(data)
    others = {row: PredictionFolder(path, names) for row, path in row_names(predictions, rows)}
    own = {(out / "layers" / row).resolve() for row in rows}
    if overlapping := [path for path in predictions if path.resolve() in own]:
        raise InputError(f"predictions={overlapping[0]} is where this evaluation writes layers; choose another out=")
    if not rows and not others:
        raise InputError("there is nothing to compare; set adapter=, predictions= or evaluate.rows")
    networks = open_networks(config.measure)
    settings = layer_settings(models, data, config)
    if share.rank == 0:
        open_folder(out, rows, settings)
    share.wait()
    seconds = draw_layers(rows, data, names, out / "layers", batch_size=config.batch_size, device=device, share=share)
    share.wait()
    folders = {row: PredictionFolder(out / "layers" / row, names) for row in rows} | others
    evaluation = score(folders, data, names, networks, device=device, share=share)
    if evaluation is not None:
        if config.published:
            atomic_write(out / "published.md", format_published(evaluation.results, config.published) + "\n")
        described = {row: found for row, folder in folders.items() if (found := describe(folder))}
        protocol = {
            **settings,
            **metric_settings(config.measure, networks),
            "seconds_per_image": seconds,
            **({"predictions": described} if described else {}),
        }
        _write(out, evaluation, folders, data, protocol)
        for file in settings_files(out, rows):
            file.unlink(missing_ok=True)
    return evaluation


def export_test_set(data: DataConfig, config: EvaluateConfig, folder: Path) -> int:
    """Writes the samples of a comparison into a folder, as a test set, and returns their number.

    An interrupted export resumes when called again. `InputError` if the folder has samples of other settings.
    """
    settings: dict[str, Any] = {"objects": config.objects, "stretch": config.stretch}
    if config.objects == "drawn":
        mapped = data.source == "triplets"  # a scene's cues are computed from its image
        drawn = open_samples(data, "test", config.seed, config.samples, with_cues=mapped)
        settings |= {**describe_data(drawn), "count": config.samples}
        samples = drawn_samples(drawn)
    else:
        settings |= {"settings": asdict(data.triplets)}
        samples = test_objects(data.triplets, config.objects, config.stretch)
    keep_settings(folder / "settings.json", settings)
    return export_samples(samples, folder)


def sample_names(data: TestData) -> list[str]:
    """The file stems of each sample's layers."""
    return data.names if isinstance(data, TestFolder) else [name_of(position) for position in range(len(data))]


def row_names(folders: Sequence[Path], taken: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """(row, folder) pairs of prediction folders: the row is the folder's name, or its path if the name is ambiguous."""
    for path in folders:
        rivals = [other for other in folders if other.name == path.name and other != path]
        name = str(path) if rivals or path.name in taken else path.name
        if name in taken:
            raise InputError(f"predictions={path} has the name of another row; rename that folder")
        yield name, path


def open_folder(out: Path, rows: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Removes the results of an earlier evaluation from `out`, and the layers of these rows.

    Layers are kept if they belong to an interrupted evaluation with the same settings and the same code.
    """
    content = json.dumps(settings, indent=2)
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        for file in settings_files(out, rows):
            if not file.is_file() or file.read_text() != content:
                if file.is_file():
                    logger.warning("%s: its layers were made with other settings or code; starting over", file.parent)
                shutil.rmtree(file.parent, ignore_errors=True)
                atomic_write(file, content)
    except OSError as error:
        raise WriteError(f"{out} cannot be written ({error}); choose another folder") from error


def settings_files(out: Path, rows: Iterable[str]) -> list[Path]:
    """The files with the settings of the layers of each row."""
    return [out / "layers" / row / SETTINGS for row in rows]


def _write(
    out: Path,
    evaluation: Evaluation,
    folders: Mapping[str, PredictionFolder],
    data: TestData,
    protocol: Mapping[str, Any],
) -> None:
    atomic_write(out / "report.html", format_report(evaluation, folders, data, protocol))
    if (grid := case_grid(evaluation, folders, data)) is not None:
        write_picture(out / "samples" / "comparison.png", grid)
    table = write_figures(out, evaluation, protocol)  # last, since metrics.json marks the evaluation as complete
    print(table)
    for reason in dict.fromkeys(protocol["not_measured"].values()):
        metrics = [metric for metric, why in protocol["not_measured"].items() if why == reason]
        print(f"not measured: {', '.join(metrics)}: {reason}")
    for row, found in protocol.get("predictions", {}).items():
        for what, which in found.items():
            print(f"{row}: {len(which)} {what.replace('_', ' ')}: {first_few(which, 5)}")
    repeated = _repeated(len(data), protocol.get("pictures", len(data)))
    print(f"{len(data)} samples{repeated}; metrics in {out / 'metrics.json'}, report in {out / 'report.html'}")


def _repeated(samples: int, images: int) -> str:
    """Says what ± means if several samples are drawn from an image; empty otherwise."""
    if images >= samples:
        return ""
    many = f"{images} images" if images > 1 else "1 image"
    return f" drawn from {many} (± is over samples, and says little about other images)"


def layer_settings(models: Models | None, data: TestData, config: EvaluateConfig) -> dict[str, Any]:
    """The settings that the predicted layers depend on, and the code."""
    settings = {**describe_data(data), "count": len(data), "seed": config.seed}
    if models is not None:
        precision = str(next(models.decomposer.autoencoder.parameters()).dtype).removeprefix("torch.")
        settings |= {**asdict(models.decomposer.sample), "precision": precision, "weights": dict(models.files)}
        settings |= {"quantize": models.quantize} if models.quantize else {}
    if "maskless" in config.rows:
        settings["maskless"] = file_sha256(maskless_weights(config))
    return settings | {"layers": "8-bit files", "versions": _versions(config.rows), "source_sha256": ROWS_SHA256}


def metric_settings(config: MeasureConfig, networks: Networks) -> dict[str, Any]:
    """The settings of the measurement, which the metrics also depend on."""
    return {
        "region": config.region,
        "measured_at": config.resolution or "the samples' own size",
        "lpips_net": config.lpips,
        "metric_weights": networks.files,
        "not_measured": networks.missing,
        "recomposition": "pixels where nothing occludes the object",
    }


def describe_data(data: TestData) -> dict[str, Any]:
    """The source of the samples, for the protocol."""
    if isinstance(data, TestFolder):
        where = {"data": str(data.root), "sha256": data.digest()}
        return {**where, "split": "test", "resolution": "each picture's own"}
    described: dict[str, Any] = {"split": data.split, "resolution": data.config.size}
    described |= {"data": "scenes"} if isinstance(data, Scenes) else {"data": "triplets", "pictures": data.pictures}
    return described | {"settings": asdict(data.config), "data_seed": data.seed}


def _versions(rows: Sequence[str]) -> dict[str, str]:
    libraries = ["torchmetrics", "torch-fidelity", "scikit-image", *(["pymatting"] if "matting" in rows else [])]
    return {
        "layerdecomp": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }
