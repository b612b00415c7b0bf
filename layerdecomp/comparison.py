"""Whether adapting helped: the adapted model, its frozen base, classical methods and any others on the same samples."""

import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from layerdecomp import __version__
from layerdecomp.baselines import base_foreground, classical, matted_foreground, matting_library
from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.data.datamodule import DataConfig, Samples, open_samples
from layerdecomp.data.scenes import Scenes
from layerdecomp.data.testset import OBJECTS, TestFolder, drawn_samples, export_samples, name_of, test_objects
from layerdecomp.decomposer import Decomposer, FrozenBase, build_decomposer, inpaint, latent_noise
from layerdecomp.errors import InputError, check_at_least
from layerdecomp.evaluation import (
    Evaluation,
    Method,
    Share,
    draw_layers,
    format_published,
    score,
    write_figures,
)
from layerdecomp.files import keep_settings, write_whole
from layerdecomp.imaging.layers import write_picture
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.metric_networks import MeasureConfig, Networks, open_networks
from layerdecomp.metrics.layers import METRICS
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.predictions import PredictionFolder, describe
from layerdecomp.report import case_grid, format_report
from layerdecomp.resizing import at_its_size
from layerdecomp.tensor_files import file_sha256, read_metadata, weight_files
from layerdecomp.weights import Adapter, load_mmdit

ROWS = ("adapted", "base", "classical", "matting", "maskless")
WITH_MODEL = ("adapted", "base", "maskless")
MASKLESS = "checkpoints/tiny/transformer_maskless.safetensors"  # which ships, for the ablation as well
SETTINGS = ".settings.json"  # among a row's layers, until their evaluation is finished: what they are drawn by
RESULTS = ("metrics.json", "table.md", "per_image.csv", "report.html", "published.md")
TestData = Samples | TestFolder


@dataclass
class EvaluateConfig:
    """What is compared, on what, and how it is measured."""

    samples: int = 64  # that are drawn, unless a folder of triplets is named
    batch_size: int = 16
    seed: int = 1234  # of the scenes and of the noise
    rows: list[str] = field(default_factory=lambda: ["adapted", "base", "classical"])  # of ROWS
    maskless: str | None = None  # of an image-to-image base, which takes no mask, for the row; null: MASKLESS
    objects: str = "drawn"  # of layered pictures: drawn as in training, or of the test split one or all of each picture
    stretch: bool = False  # whole pictures brought to the size, rather than a crop that holds the object
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # row -> metric -> figure to stand beside ours

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
    """What the rows with a model need."""

    decomposer: Decomposer
    base: MMDiT | FrozenBase
    files: Mapping[str, str] = field(default_factory=dict)  # what they come from: name -> sha256
    quantize: str | None = None  # the format of both transformers' frozen weights


def load_models(
    adapter: Adapter,
    path: str,
    config: DecomposerConfig,
    dtype: torch.dtype,
    device: str,
    quantize: str | None = None,
) -> Models:
    """The models of an adapter that was read from `path`; `config` is its own."""
    weights = config.weights
    decomposer = build_decomposer(config, dtype, device, quantize)
    decomposer.load_adapter(adapter, path)
    files = [path, *weights.named().values()]
    base = decomposer.frozen_base(weights.transformer)
    return Models(decomposer, base, {file: file_sha256(Path(file)) for file in files}, quantize)


def methods(models: Models | None, config: EvaluateConfig) -> dict[str, Method]:
    """The rows of a comparison; those that need models are left out where there are none.

    The frozen base is used as in the paper: it inpaints the background; its foreground is the image inside the mask.

    Raises:
        InputError: matting is asked for and its library is missing, or the weights of the maskless base are.
    """
    if "maskless" in config.rows:
        maskless_weights(config)  # now, not when all is trained
    found = {row: method for row, method in _plain_methods(config).items() if row in config.rows}
    if models is not None:
        found |= _model_methods(models, config)
    return {row: found[row] for row in config.rows if row in found}


def _plain_methods(config: EvaluateConfig) -> dict[str, Method]:
    if "matting" in config.rows:
        matting_library()  # now, not after the first batch of the other rows
    return {
        "classical": Method(lambda batch: classical(batch["image"], batch["mask"])),
        "matting": Method(lambda batch: (None, matted_foreground(batch["image"], batch["mask"])), ("foreground",)),
    }


def _model_methods(models: Models, config: EvaluateConfig) -> dict[str, Method]:
    decomposer = models.decomposer.eval()
    device = decomposer.prompt.vec.device

    def noise(batch: Mapping[str, Tensor], layers: int) -> Tensor:
        return latent_noise(decomposer.autoencoder, batch["image"], config.seed, batch["index"].tolist(), layers)

    def inpainting(base: MMDiT | FrozenBase, conditioning: ConditioningConfig) -> Method:
        base = base.to(device).eval()

        def draw(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            parts = (base, decomposer.autoencoder, decomposer.prompt)
            settings = (conditioning, decomposer.flow, decomposer.sample)
            painted = inpaint(*parts, batch["image"], batch["mask"], noise(batch, layers=1)[:, 0], *settings)
            return painted, base_foreground(batch["image"], batch["mask"])

        return Method(lambda batch: at_its_size(draw, batch, decomposer.sample))

    def decomposing(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decomposer.draw(batch, noise(batch, layers=2 * decomposer.sample.ensemble))

    found = {
        "adapted": Method(lambda batch: at_its_size(decomposing, batch, decomposer.sample)),
        "base": inpainting(models.base, decomposer.conditioning),
    }
    if "maskless" in config.rows:
        found["maskless"] = inpainting(_load_maskless(config, models), ConditioningConfig(mask=False))
    return found


def maskless_weights(config: EvaluateConfig) -> Path:
    """The file of the maskless base; `InputError` if it is not there, or cannot be read."""
    path = Path(config.maskless or MASKLESS)
    if not path.exists():
        raise InputError(
            f"{path} does not exist, which the row maskless needs: `make {MASKLESS}` trains the tiny one, which also "
            "ships, by config=configs/tiny_inpainter.yaml conditioning.mask=false; or name another with "
            "evaluate.maskless=FILE, or leave the row out of evaluate.rows"
        )
    for file in weight_files(path):
        read_metadata(file)
    return path


def _load_maskless(config: EvaluateConfig, models: Models) -> MMDiT:
    """The maskless base, if it goes with the autoencoder and the prompt of the base that was adapted."""
    path, base, weight = maskless_weights(config), models.base, next(models.decomposer.autoencoder.parameters())
    maskless = load_mmdit(path, dtype=weight.dtype, device=str(weight.device))
    for name in ("in_channels", "out_channels", "context_in_dim", "vec_in_dim"):
        found, expected = (getattr(model.config, name) for model in (maskless, base))
        if found != expected:
            raise InputError(
                f"{path} has {name} {found}, the base that was adapted {expected}; the row maskless needs a base of "
                "the same autoencoder and prompt: name it with evaluate.maskless=FILE"
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
    """Measures every row, prints the table, and writes figures, pictures and a report into `out`.

    An evaluation that was cut off goes on with the layers that are there in ``out / "layers"``; a finished one is made
    anew.

    Args:
        predictions: folders with the layers of other methods, a row each.
        share: of the samples that this process draws and measures.

    Returns:
        The figures, in the first process; None in the others.

    Raises:
        InputError: a file or folder is missing or does not fit, or `out` cannot be written.
    """
    share = share or Share()
    rows, names = methods(models, config), sample_names(data)
    others = {row: PredictionFolder(path, names) for row, path in row_names(predictions, rows)}
    own = {(out / "layers" / row).resolve() for row in rows}
    if overlapping := [path for path in predictions if path.resolve() in own]:
        raise InputError(f"predictions={overlapping[0]} is where layers are to be drawn; choose another out=")
    if not rows and not others:
        raise InputError("there is nothing to compare; name an adapter=, predictions= or evaluate.rows")
    networks, drawn = open_networks(config.measure), drawn_by(models, data, config)
    if share.rank == 0:
        open_folder(out, rows, drawn)
    share.wait()
    seconds = draw_layers(rows, data, names, out / "layers", batch_size=config.batch_size, device=device, share=share)
    share.wait()
    folders = {row: PredictionFolder(out / "layers" / row, names) for row in rows} | others
    evaluation = score(folders, data, names, networks, device=device, share=share)
    if evaluation is not None:
        if config.published:
            write_whole(out / "published.md", format_published(evaluation.results, config.published) + "\n")
        described = {row: found for row, folder in folders.items() if (found := describe(folder))}
        told = {
            **drawn,
            **measured_by(config.measure, networks),
            "seconds_per_image": seconds,
            **({"predictions": described} if described else {}),
        }
        _write(out, evaluation, folders, data, told)
        for settings in settings_files(out, rows):
            settings.unlink(missing_ok=True)
    return evaluation


def export(data: DataConfig, config: EvaluateConfig, folder: Path) -> int:
    """Writes the samples that a comparison is on into a folder, as a test set, and returns how many there are.

    Stopped at any point, the same call goes on. `InputError` if the folder has samples of other settings.
    """
    told: dict[str, Any] = {"objects": config.objects, "stretch": config.stretch}
    if config.objects == "drawn":
        drawn = open_samples(data, "test", config.seed, config.samples, with_cues=False)
        told |= {**describe_data(drawn), "count": config.samples}
        samples = drawn_samples(drawn)
    else:
        told |= {"settings": asdict(data.triplets)}
        samples = test_objects(data.triplets, config.objects, config.stretch)
    keep_settings(folder / "settings.json", told)
    return export_samples(samples, folder)


def sample_names(data: TestData) -> list[str]:
    """What the files of each sample's layers are called."""
    return data.names if isinstance(data, TestFolder) else [name_of(position) for position in range(len(data))]


def row_names(folders: Sequence[Path], taken: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The rows of prediction folders: each folder's name, or as much of its path as tells it from the others."""
    for path in folders:
        rivals = [other for other in folders if other.name == path.name and other != path]
        name = str(path) if rivals or path.name in taken else path.name
        if name in taken:
            raise InputError(f"predictions={path} is called like a row of ours; rename that folder")
        yield name, path


def open_folder(out: Path, rows: Iterable[str], told: Mapping[str, Any]) -> None:
    """Removes what is in `out` of an evaluation before: its results, and these rows' layers.

    Layers stay where the same settings drew them and their evaluation was cut off.
    """
    content = json.dumps(told, indent=2)
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        for settings in settings_files(out, rows):
            if not settings.is_file() or settings.read_text() != content:
                shutil.rmtree(settings.parent, ignore_errors=True)
                write_whole(settings, content)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); choose another folder") from error


def settings_files(out: Path, rows: Iterable[str]) -> list[Path]:
    """Where it stands what the layers of some rows are drawn by."""
    return [out / "layers" / row / SETTINGS for row in rows]


def _write(
    out: Path,
    evaluation: Evaluation,
    folders: Mapping[str, PredictionFolder],
    data: TestData,
    told: Mapping[str, Any],
) -> None:
    write_whole(out / "report.html", format_report(evaluation, folders, data, told))
    if (grid := case_grid(evaluation, folders, data)) is not None:
        write_picture(out / "samples" / "comparison.png", grid)
    table = write_figures(out, evaluation, told)  # last, since metrics.json says that all is there
    print(table)
    for reason in dict.fromkeys(told["not_measured"].values()):
        metrics = [metric for metric, why in told["not_measured"].items() if why == reason]
        print(f"not measured: {', '.join(metrics)}: {reason}")
    for row, found in told.get("predictions", {}).items():
        for what, which in found.items():
            some = ", ".join(which[:5]) + (", ..." if len(which) > 5 else "")
            print(f"{row}: {len(which)} {what.replace('_', ' ')}: {some}")
    few = f" of {told['pictures']} pictures" if told.get("pictures", len(data)) < len(data) else ""
    print(
        f"{len(data)} samples{few}; figures in {out / 'metrics.json'}, pictures of all kinds in {out / 'report.html'}"
    )


def drawn_by(models: Models | None, data: TestData, config: EvaluateConfig) -> dict[str, Any]:
    """What the layers depend on."""
    told = {**describe_data(data), "count": len(data), "seed": config.seed}
    if models is not None:
        precision = str(next(models.decomposer.autoencoder.parameters()).dtype).removeprefix("torch.")
        told |= {**asdict(models.decomposer.sample), "precision": precision, "weights": dict(models.files)}
        told |= {"quantize": models.quantize} if models.quantize else {}
    if "maskless" in config.rows:
        told["maskless"] = file_sha256(maskless_weights(config))
    return told | {"layers": "8-bit files", "versions": _versions(config.rows)}


def measured_by(config: MeasureConfig, networks: Networks) -> dict[str, Any]:
    """What the figures depend on besides."""
    return {
        "region": config.region,
        "measured_at": config.resolution or "the samples' own size",
        "lpips_net": config.lpips,
        "metric_weights": networks.files,
        "not_measured": networks.missing,
        "recomposition": "where nothing stands in front of the object",
    }


def describe_data(data: TestData) -> dict[str, Any]:
    """Where samples come from."""
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
