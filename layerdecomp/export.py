"""Export of adapters: LoRA files in other layouts, a merged checkpoint, a folder to publish; and import back."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from layerdecomp.adapters import INPUT, LAYOUTS, Tensors, changes_from_adapter, peft_settings
from layerdecomp.errors import InputError
from layerdecomp.files import atomic_path
from layerdecomp.incoming import extras_path, frozen_input, read_adapters
from layerdecomp.manifest import ADAPTER, REPOSITORY, DecomposerConfig, adapter_file
from layerdecomp.modelcard import model_card, notice
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tensor_files import Metadata, file_sha256, read_json, save_tensors, write_tensors
from layerdecomp.weights import HISTORY, TOOL_VERSION, Adapter, creation_date, empty_mmdit, open_state


@dataclass(frozen=True)
class ExportJob:
    """An adapter and how to write it."""

    adapter: Adapter
    config: DecomposerConfig
    out: Path
    dtype: str | None  # of the tensors; None: unchanged
    with_base: bool = False

    def cast(self, tensors: Tensors) -> Tensors:
        """In the export's dtype, except for scalars, which might lose precision."""
        if self.dtype is None:
            return tensors
        return {name: tensor.to(FLOATS[self.dtype]) if tensor.dim() else tensor for name, tensor in tensors.items()}


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8"


def export(
    adapters: str | Path | Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    with_base: bool = False,
    figures: str | Path | None = None,
    **files: str,
) -> list[Path]:
    """Writes an adapter, or the weighted sum of several, in another format. The same input gives the same bytes.

    Args:
        adapters: this package's adapter files, or LoRA files in one of the `LAYOUTS`.
        format: one of `FORMATS`.
        out: the file to write, or the folder for "decomposer".
        dtype: float32, bfloat16, float16, and fp8 for "merged"; each format has its own default.
        weights: one per adapter; 1 each by default.
        rank: reduce the LoRA layers to this rank by truncated SVD; the resulting error is printed.
        with_base: whether to include the frozen base in a "decomposer" folder.
        figures: the metrics.json of an evaluation of the one adapter, whose figures the metadata then hold.
        files: other paths of the frozen parts (transformer=, autoencoder=, rgba_autoencoder=, prompt=).

    Returns:
        The files written.

    Raises:
        InputError: an unknown format, an adapter whose frozen parts are missing or do not fit, or another's figures.
    """
    if format not in FORMATS:
        raise InputError(f"format={format}: expected one of {', '.join(FORMATS)}")
    write, default = FORMATS[format]
    known = [*FLOATS, FP8] if format == "merged" else [*FLOATS]
    if dtype is not None and dtype not in known:
        raise InputError(f"dtype={dtype}: expected one of {', '.join(known)} for format={format}")
    paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    adapter, config = read_adapters([Path(path) for path in paths], weights, rank, files)
    if figures is not None:
        adapter.metadata["figures"] = _measured(Path(figures), adapter_file(paths[0]))
    return write(ExportJob(adapter, config, Path(out), dtype or default, with_base))


def _measured(path: Path, adapter: Path) -> str:
    """The figures of the row adapted in the metrics.json of an evaluation of `adapter`, as JSON."""
    document = read_json(path)
    files, row = document.get("protocol", {}).get("weights", {}), document.get("results", {}).get("adapted")
    if row is None or file_sha256(adapter) not in files.values():
        raise InputError(
            f"figures={path} has no row adapted that was measured with {adapter}; expected the metrics.json that "
            f"tools/evaluate.py adapter={adapter} writes"
        )
    return json.dumps({name: value for name, value in row.items() if value is not None})


def _write_adapter(job: ExportJob) -> list[Path]:
    save_tensors(job.out, job.cast(job.adapter.tensors), _metadata(job, "adapter"))
    return [job.out]


def _write_lora(layout: str) -> Callable[[ExportJob], list[Path]]:
    def write(job: ExportJob) -> list[Path]:
        model, base = frozen_input(job.config)
        changes, rest = changes_from_adapter(job.adapter.tensors, job.config.lora, base)
        tensors = LAYOUTS[layout].write(changes, model.config.hidden_size)
        if INPUT in changes:
            rest |= {name: job.adapter.tensors[name] for name in base}
        others = _write_extras(job, layout, model, rest)
        settings = peft_settings(tensors) if layout == "diffusers" else {}
        save_tensors(job.out, job.cast(tensors), {**_metadata(job, layout), **settings})
        return [job.out, *others]

    return write


def _write_extras(job: ExportJob, format: str, model: MMDiT, rest: Tensors) -> list[Path]:
    """Writes the trained tensors that the format cannot hold, and the notice; before the file itself."""
    extras = extras_path(job.out)
    text = extras.with_name(extras.name.replace(".extras.safetensors", ".NOTICE.txt"))
    with atomic_path(text) as partial:
        partial.write_text(notice(_is_flux(model), _metadata(job, format)))
    if rest:
        save_tensors(extras, rest, _metadata(job, "extras"))
    return [text, extras] if rest else [text]


def _write_merged(job: ExportJob) -> list[Path]:
    """Writes the base with the adapter merged; holds one tensor at a time in memory, besides the adapter."""
    path = job.config.weights.transformer
    adapted = job.adapter.tensors
    model, layout = empty_mmdit(path)
    trained = {name: adapted[name].float() for name in model.state_dict() if name in adapted}  # in full, as img_in is
    changes, rest = changes_from_adapter(adapted, job.config.lora, trained)
    others = _write_extras(job, "merged", model, {name: t for name, t in rest.items() if name not in trained})
    facts = {**_metadata(job, "merged"), "merged": "yes", "config": json.dumps(asdict(model.config))}
    read = open_state(model, path, layout=layout)

    def merged(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        layer, _, kind = name.rpartition(".")
        changed = kind == "weight" and layer in changes
        return read[name]().float() + changes[layer].weight if changed else read[name]().float()

    like, read_cast = _cast_lazily(model.state_dict(), merged, job.dtype or "bfloat16")
    write_tensors(job.out, like, read_cast, facts)
    return [job.out, *others]


Read = Callable[[str], Tensor]


def _cast_lazily(like: Mapping[str, Tensor], read: Read, dtype: str) -> tuple[dict[str, Tensor], Read]:
    """The `like` and `read` of `write_tensors` that convert the tensors of `read` to a dtype."""
    if dtype == FP8:
        return _cast_lazily_to_fp8(like, read)
    return {n: t.to(FLOATS[dtype]) for n, t in like.items()}, lambda name: read(name).to(FLOATS[dtype])


def _cast_lazily_to_fp8(like: Mapping[str, Tensor], read: Read) -> tuple[dict[str, Tensor], Read]:
    """As `_cast_lazily`: the blocks' matrices in e4m3 with a scale each, in ComfyUI's layout; the rest in bf16.

    The tensors outside the blocks are small, and sensitive to quantisation.
    """
    small = torch.float8_e4m3fn
    matrices = {
        f"{n.removesuffix('weight')}scale_weight": n for n, t in like.items() if "blocks." in n and t.dim() == 2
    }
    mark = torch.zeros(2).to(small)  # two elements: ComfyUI multiplies in full precision

    @cache  # scales are written first, and used again
    def scale(name: str) -> Tensor:
        return read(name).abs().max().clamp(min=1e-12) / torch.finfo(small).max

    def read_fp8(name: str) -> Tensor:
        if name == "scaled_fp8":
            return mark
        if name in matrices:
            return scale(matrices[name])
        if name in matrices.values():
            return (read(name) / scale(name)).to(small)
        return read(name).bfloat16()

    written = {name: tensor.to(small if name in matrices.values() else torch.bfloat16) for name, tensor in like.items()}
    scales = {name: torch.empty((), device="meta") for name in matrices}
    return {**written, **scales, "scaled_fp8": mark}, read_fp8


def _write_folder(job: ExportJob) -> list[Path]:
    """Writes a folder under a temporary name and renames it when it is complete."""
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise InputError(f"{job.out} exists and is not empty; choose another out= or remove it")
    model, _ = empty_mmdit(job.config.weights.transformer)
    licence = _licence(_is_flux(model), Path(job.config.weights.transformer))
    with atomic_path(job.out) as partial:
        partial.mkdir()
        names = _copy_parts(job, partial)
        metadata = {**_metadata(job, "adapter"), "weights": json.dumps(names)}
        save_tensors(partial / ADAPTER, job.cast(job.adapter.tensors), metadata)
        described = {**asdict(job.config), "weights": names}
        (partial / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(described)))
        (partial / "NOTICE").write_text(notice(_is_flux(model), metadata))
        shutil.copyfile(licence, partial / licence.name)
        files = {name: what for name, what in FOLDER_FILES.items() if (partial / name).exists()}
        (partial / "README.md").write_text(model_card(_is_flux(model), metadata, files))
    return sorted(job.out.iterdir())


FOLDER_FILES = {
    ADAPTER: "LoRA, input projection and context fusion",
    "rgba_autoencoder.safetensors": "the RGBA autoencoder, which decodes the foreground",
    "prompt.safetensors": "the embedding of the one (empty) prompt",
    "transformer.safetensors": "the frozen base",
    "autoencoder.safetensors": "the frozen RGB autoencoder",
    "config.yaml": "the settings, as in the adapter's metadata",
}


def _copy_parts(job: ExportJob, folder: Path) -> dict[str, str | None]:
    """Copies the frozen parts that accompany an adapter, and returns the path of each part."""
    names: dict[str, str | None] = {**json.loads(job.adapter.metadata["weights"])}
    for name, path in asdict(job.config.weights).items():
        if path is None or (name in ("transformer", "autoencoder") and not job.with_base):
            continue
        names[name] = f"{name}.safetensors" if Path(path).is_file() else name
        (shutil.copyfile if Path(path).is_file() else shutil.copytree)(path, folder / str(names[name]))
    return names


def _licence(flux: bool, base: Path) -> Path:
    """The licence to pass on: FLUX's, from the base's folder, or the repository's for weights trained from scratch."""
    if not flux:
        return REPOSITORY / "LICENSE"
    places = [folder / "LICENSE.md" for folder in (base, base.parent, base.parent.parent)]
    if (found := next((place for place in places if place.is_file()), None)) is None:
        raise InputError(
            f"{base.parent / 'LICENSE.md'} does not exist; an adapter of FLUX.1-Fill-dev is published with its "
            "licence: put the LICENSE.md of the gated repository there"
        )
    return found


def _is_flux(model: MMDiT) -> bool:
    return model.config == MMDiTConfig()


MODIFIED = {
    "merged": "yes: LoRA and input projection folded into the base",
    "extras": "yes: trained tensors that the exported layout cannot hold",
}


def _metadata(job: ExportJob, format: str) -> Metadata:
    """The adapter's metadata, completed with entries that older adapters lack."""
    data = f"see {HISTORY}" if HISTORY in job.adapter.metadata else "unknown"
    metadata = {"data": data, **job.config.lora_metadata(), **job.adapter.metadata}
    metadata["date"] = creation_date(metadata.get("date", "unknown"))  # so that a file depends on its input alone
    metadata["tool_version"] = TOOL_VERSION
    metadata["modified"] = MODIFIED.get(format, metadata.get("modified", "yes"))
    if format in LAYOUTS:
        return {**metadata, "format": format}
    adapter_only = () if format == "adapter" else ("lora", "weights")  # reserved for adapter files
    return {key: text for key, text in metadata.items() if key not in adapter_only}


# Writer and default dtype of each format (None: the adapter's own).
FORMATS: dict[str, tuple[Callable[[ExportJob], list[Path]], str | None]] = {
    "adapter": (_write_adapter, "bfloat16"),  # the same tensors, for this package
    "import": (_write_adapter, None),  # the same, bit for bit: for LoRA files from elsewhere
    "diffusers": (_write_lora("diffusers"), None),  # a LoRA for FluxFillPipeline.load_lora_weights
    "kohya": (_write_lora("kohya"), None),  # a LoRA for ComfyUI and sd-scripts
    "merged": (_write_merged, "bfloat16"),  # the whole transformer in the published layout
    "decomposer": (_write_folder, None),  # a folder to publish, for Decomposer.from_pretrained
}
