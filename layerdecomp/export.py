"""An adapter in the forms that others take: LoRA files, one merged checkpoint, a folder to publish; and back."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from layerdecomp import __version__
from layerdecomp.adapters import (
    INPUT,
    LAYOUTS,
    Changes,
    Tensors,
    add_changes,
    average,
    give_tensors,
    peft_settings,
    reduce_rank,
    take_changes,
)
from layerdecomp.decomposer import (
    ADAPTER,
    REPOSITORY,
    DecomposerConfig,
    WeightFiles,
    describe_adapter,
    described_config,
)
from layerdecomp.errors import InputError
from layerdecomp.modelcard import model_card, notice
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.weights import (
    Adapter,
    Metadata,
    empty_mmdit,
    find_weights,
    open_safetensors,
    open_state,
    read_metadata,
    save_tensors,
    write_tensors,
)


@dataclass(frozen=True)
class Outgoing:
    """An adapter on its way out."""

    adapter: Adapter
    config: DecomposerConfig
    out: Path
    dtype: str | None  # of the tensors; None: as they are
    with_base: bool = False

    def cast(self, tensors: Tensors) -> Tensors:
        """In the wished dtype, but for single numbers, which might not survive it."""
        if self.dtype is None:
            return tensors
        return {name: tensor.to(FLOATS[self.dtype]) if tensor.dim() else tensor for name, tensor in tensors.items()}


def beside(path: Path, ending: str) -> Path:
    """The file with another ending beside a .safetensors file."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.{ending}")


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8"
EXTRAS = "extras.safetensors"


def export(
    adapters: str | Path | Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    with_base: bool = False,
    **files: str,
) -> list[Path]:
    """Writes an adapter, or the weighted sum of several, in another form. The same input gives the same bytes.

    Args:
        adapters: files of this package, or LoRA files in one of the `LAYOUTS`.
        format: one of `FORMATS`, which says what each is.
        out: the file to write, or the folder for "decomposer".
        dtype: float32, bfloat16, float16, and fp8 for "merged"; each format has its own if none is given.
        weights: one per adapter; 1 each unless given.
        rank: what the LoRA layers are cut down to, by singular values; the error that it costs is printed.
        with_base: whether a "decomposer" folder holds the frozen base too.
        files: other places for the frozen parts (transformer=, autoencoder=, rgba_autoencoder=, prompt=).

    Returns:
        The files written.

    Raises:
        InputError: an unknown format, or an adapter whose frozen parts are missing or do not fit.
    """
    if format not in FORMATS:
        raise InputError(f"format={format}: expected one of {', '.join(FORMATS)}")
    write, default = FORMATS[format]
    known = [*FLOATS, *([FP8] if write is _write_merged else [])]
    if (dtype or default or known[0]) not in known:
        raise InputError(f"dtype={dtype}: expected one of {', '.join(known)} for format={format}")
    paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    adapter, config = read_adapters([Path(path) for path in paths], weights, rank, files)
    return write(Outgoing(adapter, config, Path(out), dtype or default, with_base))


# In


def read_adapters(
    paths: Sequence[Path], weights: Sequence[float] | None, rank: int | None, files: dict[str, str]
) -> tuple[Adapter, DecomposerConfig]:
    """One adapter from one or several, in whatever layout, and the decomposer that it belongs to."""
    weights = [1.0] * len(paths) if weights is None else weights
    if not paths or len(weights) != len(paths):
        raise InputError(f"weights= has {len(weights)} numbers for {len(paths)} adapters; expected one for each")
    read = [read_adapter(path, files) for path in paths]
    adapter, config = read[0]
    untouched = len(paths) == 1 and weights[0] == 1 and rank is None
    if untouched:
        return adapter, config
    _, base = _base(config)
    taken = []
    for path, (other, other_config) in zip(paths, read, strict=True):
        if other.metadata["base_sha256"] != adapter.metadata["base_sha256"] or other_config.fusion != config.fusion:
            raise InputError(f"{path} has another base or fusion than {paths[0]}; expected adapters of one kind")
        taken.append(take_changes(other.tensors, other_config.lora, base))
    changes = add_changes([(changes, share) for (changes, _), share in zip(taken, weights, strict=True)])
    rest = average([(rest, share) for (_, rest), share in zip(taken, weights, strict=True)]) if taken[0][1] else {}
    notes = {}
    if len(paths) > 1 or weights[0] != 1:
        shares = (f"{share:g} x {path.name}" for path, share in zip(paths, weights, strict=True))
        notes["merged_from"] = " + ".join(shares)
    if rank is not None:
        changes, notes["reduced"] = _reduce(changes, rank)
    figures = {"figures": "{}"}  # they were another adapter's
    return _adapter(changes, rest, base, config, {**adapter.metadata, **notes, **figures}), config


def _reduce(changes: Changes, rank: int) -> tuple[Changes, str]:
    if rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    before = max(change.rank for layer, change in changes.items() if layer != INPUT)
    reduced, errors = reduce_rank(changes, rank)
    worst = max(errors, key=lambda layer: errors[layer])
    text = f"rank {before} to {rank}: relative error {errors['all']:.2%} (worst: {worst} {errors[worst]:.2%})"
    print(text)
    return reduced, text


def _adapter(changes: Changes, rest: Tensors, base: Tensors, config: DecomposerConfig, metadata: Metadata) -> Adapter:
    """An adapter of these changes, whose `config` and metadata tell its LoRA settings."""
    lora, tensors = give_tensors(changes, base)
    model, _ = empty_mmdit(config.weights.transformer)
    if set(lora.targets) == set(_targeted(model, config.lora)):
        lora.targets = config.lora.targets
    config.lora = lora
    return Adapter({**tensors, **rest}, {**metadata, **config.lora_metadata()})


def _targeted(model: MMDiT, lora: LoRAConfig) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and lora.adapts(name)]


def read_adapter(path: Path, files: dict[str, str]) -> tuple[Adapter, DecomposerConfig]:
    """An adapter of this package, or a LoRA file in one of the `LAYOUTS`, and the decomposer that it belongs to.

    A LoRA file that was exported from here carries its description, and finds beside it what it had no room for; of
    one from elsewhere, `files` must name the frozen parts, and there is no fusion module.
    """
    if path.is_dir():
        return describe_adapter(path, **files)
    with open_safetensors(path) as file:
        names = set(file.keys())
        layout = next((n for n, (start, *_) in LAYOUTS.items() if any(name.startswith(start) for name in names)), None)
        if layout is None:
            return describe_adapter(path, **files)
        tensors = {name: file.get_tensor(name) for name in names}
    metadata = read_metadata(path)
    if "lora" in metadata and "weights" in metadata:
        config = described_config(metadata, path, **files)
    else:
        config = _undescribed(path, files)
        metadata = {**config.to_metadata(), "origin": f"imported from {path.name}"}
    model, base = _base(config)
    layers = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changes = LAYOUTS[layout][2](tensors, layers, model.config.hidden_size)
    if tensors:
        raise InputError(
            f"{path}: {len(tensors)} of {len(names)} tensors belong to no linear layer of the transformer: "
            f"{', '.join(sorted(tensors)[:10])}; expected LoRA pairs in {layout} layout"
        )
    _check_widths(path, changes, model)
    rest = _read_extras(path, changes, base, config.fusion.enabled)
    metadata = {key: text for key, text in metadata.items() if key not in ("format", "lora_adapter_metadata")}
    return _adapter(changes, rest, base, config, metadata), config


def _undescribed(path: Path, files: dict[str, str]) -> DecomposerConfig:
    needed = ("transformer", "autoencoder", "rgba_autoencoder")
    if unknown := [name for name in files if name not in asdict(WeightFiles())]:
        raise InputError(f"{unknown[0]}= names no weight file; expected some of {', '.join(asdict(WeightFiles()))}")
    if missing := [name for name in needed if name not in files]:
        raise InputError(
            f"{path} does not say what it belongs to; expected {' '.join(f'{name}=FILE' for name in missing)}"
        )
    found = {name: str(find_weights(file, [path.parent, REPOSITORY])) for name, file in files.items()}
    return DecomposerConfig(weights=WeightFiles(**found), fusion=ContextFusionConfig(enabled=False))


def _check_widths(path: Path, changes: Changes, model: MMDiT) -> None:
    for layer, change in changes.items():
        expected = tuple(model.get_parameter(f"{layer}.weight").shape)
        if (found := (change.b.shape[0], change.a.shape[1])) != expected or change.a.shape[0] != change.b.shape[1]:
            raise InputError(f"{path}: {layer} is changed by {found}, but has {expected}; the LoRA is for another base")


def _read_extras(path: Path, changes: Changes, base: Tensors, needed: bool) -> Tensors:
    """The tensors that an exported LoRA file had no room for, from the file beside it."""
    file = beside(path, EXTRAS)
    if not needed and not file.is_file():
        return {}
    with open_safetensors(file) as opened:
        extras: Tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    exact = {name: extras.pop(name) for name in base if name in extras}
    _, computed = give_tensors({**changes}, base)
    # A difference cannot give every last bit back; where the pair was changed elsewhere, it counts.
    if all(torch.allclose(exact[name], computed[name], rtol=1e-5, atol=1e-6) for name in exact):
        extras |= exact
    return extras


def _base(config: DecomposerConfig) -> tuple[MMDiT, Tensors]:
    """The frozen transformer on the meta device, and its input projection, float32."""
    path = config.weights.transformer
    model, layout = empty_mmdit(path)
    with open_state(model, path, layout=layout) as read:
        return model, {f"{INPUT}.{kind}": read(f"{INPUT}.{kind}").float() for kind in ("weight", "bias")}


# Out


def _write_adapter(parcel: Outgoing) -> list[Path]:
    save_tensors(parcel.out, parcel.cast(parcel.adapter.tensors), _metadata(parcel, "adapter"))
    return [parcel.out]


def _write_lora(layout: str) -> Callable[[Outgoing], list[Path]]:
    def write(parcel: Outgoing) -> list[Path]:
        model, base = _base(parcel.config)
        changes, rest = take_changes(parcel.adapter.tensors, parcel.config.lora, base)
        tensors = LAYOUTS[layout][1](changes, model.config.hidden_size)
        told = peft_settings(tensors) if layout == "diffusers" else {}
        save_tensors(parcel.out, parcel.cast(tensors), {**_metadata(parcel, layout), **told})
        if INPUT in changes:
            rest |= {name: parcel.adapter.tensors[name] for name in base}
        return [parcel.out, *_write_beside(parcel, layout, model, rest)]

    return write


def _write_beside(parcel: Outgoing, format: str, model: MMDiT, rest: Tensors) -> list[Path]:
    """The trained tensors for which a host's file has no room, and the notice."""
    files = [beside(parcel.out, "NOTICE.txt")]
    files[0].write_text(notice(_is_flux(model), _metadata(parcel, format)))
    if rest:
        files.append(beside(parcel.out, EXTRAS))
        save_tensors(files[-1], rest, _metadata(parcel, "extras"))
    return files


@torch.no_grad()
def _write_merged(parcel: Outgoing) -> list[Path]:
    """One tensor in memory at a time, beside the adapter."""
    path, adapted = parcel.config.weights.transformer, parcel.adapter.tensors
    model, layout = empty_mmdit(path)
    changes, rest = take_changes(adapted, parcel.config.lora, {name: adapted[name] for name in _input_names()})
    dtype = FLOATS.get(parcel.dtype or "", torch.bfloat16)
    like = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in model.state_dict().items()}
    scales: dict[str, str] = {}
    if parcel.dtype == FP8:
        scales = {f"{name.removesuffix('weight')}scale_weight": name for name in like if _is_matrix(name, like[name])}
        like |= {name: like[name].to(torch.float8_e4m3fn) for name in scales.values()}
        like |= {scale: torch.empty((), device="meta") for scale in scales}
        like["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn, device="meta")  # how ComfyUI tells such a file
    facts = {**_metadata(parcel, "merged"), "merged": "yes", "config": json.dumps(asdict(model.config))}
    with open_state(model, path, layout=layout) as read:

        def merged(name: str) -> Tensor:
            layer, _, kind = name.rpartition(".")
            if name == "scaled_fp8":
                return torch.zeros(2).to(torch.float8_e4m3fn)
            if name in scales:
                return merged_float(scales[name]).abs().max().clamp(min=1e-12) / FP8_MAX
            if like[name].dtype == torch.float8_e4m3fn:
                return (merged_float(name) / merged(f"{layer}.scale_weight")).to(torch.float8_e4m3fn)
            return merged_float(name).to(like[name].dtype)

        def merged_float(name: str) -> Tensor:
            if name in _input_names():
                return adapted[name].float()
            layer, _, kind = name.rpartition(".")
            tensor = read(name).float()
            return tensor + changes[layer].weight if kind == "weight" and layer in changes else tensor

        write_tensors(parcel.out, like, merged, facts)
    return [parcel.out, *_write_beside(parcel, "merged", model, rest)]


FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is one of the many large matrices, and not of the few sensitive ones at both ends."""
    return "blocks." in name and tensor.dim() == 2


def _input_names() -> list[str]:
    return [f"{INPUT}.weight", f"{INPUT}.bias"]


def _write_folder(parcel: Outgoing) -> list[Path]:
    """A folder that is written under another name and renamed when it is complete."""
    if parcel.out.exists() and (not parcel.out.is_dir() or any(parcel.out.iterdir())):
        raise InputError(f"{parcel.out} exists and is not empty; choose another out= or remove it")
    model, _ = empty_mmdit(parcel.config.weights.transformer)
    licence = _licence(_is_flux(model), Path(parcel.config.weights.transformer))
    partial = parcel.out.with_name(f".{parcel.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        names = _copy_parts(parcel, partial)
        metadata = {**_metadata(parcel, "adapter"), "weights": json.dumps(names)}
        save_tensors(partial / ADAPTER, parcel.cast(parcel.adapter.tensors), metadata)
        described = {**asdict(parcel.config), "weights": names}
        (partial / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(described)))
        (partial / "NOTICE").write_text(notice(_is_flux(model), metadata))
        shutil.copyfile(licence, partial / licence.name)
        files = {name: what for name, what in FOLDER_FILES.items() if (partial / name).exists()}
        (partial / "README.md").write_text(model_card(_is_flux(model), metadata, files))
        os.replace(partial, parcel.out)
    except OSError as error:
        raise InputError(
            f"{parcel.out} could not be written ({error}); free some space or choose another out="
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(parcel.out.iterdir())


FOLDER_FILES = {
    ADAPTER: "LoRA, input projection and context fusion",
    "rgba_autoencoder.safetensors": "the RGBA autoencoder, which draws the foreground",
    "prompt.safetensors": "the embedding of the one (empty) prompt",
    "transformer.safetensors": "the frozen base",
    "autoencoder.safetensors": "the frozen RGB autoencoder",
    "config.yaml": "the settings, as in the adapter's metadata",
}


def _copy_parts(parcel: Outgoing, folder: Path) -> dict[str, str | None]:
    """Copies the parts that go with an adapter, and says by what names each is to be found."""
    names: dict[str, str | None] = {**json.loads(parcel.adapter.metadata["weights"])}
    for name, path in asdict(parcel.config.weights).items():
        if path is None or (name in ("transformer", "autoencoder") and not parcel.with_base):
            continue
        names[name] = f"{name}.safetensors" if Path(path).is_file() else name
        (shutil.copyfile if Path(path).is_file() else shutil.copytree)(path, folder / str(names[name]))
    return names


def _licence(flux: bool, base: Path) -> Path:
    """The licence to pass on: FLUX's lies with the base, that of weights trained from nothing is the repository's."""
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
    "extras": "yes: what was trained beside the base and has no room in the layout of others",
}


def _metadata(parcel: Outgoing, format: str) -> Metadata:
    """The adapter's metadata, and whatever an older one may lack of what every file tells."""
    metadata = {**parcel.config.lora_metadata(), **parcel.adapter.metadata}
    metadata["date"] = _date(metadata.get("date", "unknown"))
    metadata["tool_version"] = f"layerdecomp {__version__}"
    metadata["modified"] = MODIFIED.get(format, metadata.get("modified", "yes"))
    if format in LAYOUTS:
        return {**metadata, "format": format}
    adapter_only = () if format == "adapter" else ("lora", "weights")  # what only an adapter's file may have
    return {key: text for key, text in metadata.items() if key not in adapter_only}


def _date(of_adapter: str) -> str:
    """The adapter's own date, so that a file depends on its input alone, unless SOURCE_DATE_EPOCH says another."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return datetime.fromtimestamp(int(epoch), UTC).isoformat() if epoch else of_adapter


# What is written, and in which dtype unless another is asked for (None: the adapter's own).
FORMATS: dict[str, tuple[Callable[[Outgoing], list[Path]], str | None]] = {
    "adapter": (_write_adapter, "bfloat16"),  # the same tensors, for this package
    "import": (_write_adapter, None),  # the same, with every bit kept: for LoRA files that come from elsewhere
    "diffusers": (_write_lora("diffusers"), None),  # a LoRA for FluxFillPipeline.load_lora_weights
    "kohya": (_write_lora("kohya"), None),  # a LoRA for ComfyUI and sd-scripts
    "merged": (_write_merged, "bfloat16"),  # the whole transformer in the published layout
    "decomposer": (_write_folder, None),  # a folder to publish, which Decomposer.from_pretrained takes
}
