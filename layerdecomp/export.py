"""An adapter in the forms that others take: LoRA files, one merged checkpoint, a folder to publish; and back."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from layerdecomp.adapters import INPUT, LAYOUTS, Tensors, peft_settings, take_changes
from layerdecomp.errors import InputError
from layerdecomp.files import written_whole
from layerdecomp.incoming import extras_beside, frozen_input, read_adapters
from layerdecomp.manifest import ADAPTER, REPOSITORY, DecomposerConfig
from layerdecomp.modelcard import model_card, notice
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tensor_files import Metadata, save_tensors, write_tensors
from layerdecomp.weights import TOOL_VERSION, Adapter, date_of_writing, empty_mmdit, open_state


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


def _write_adapter(parcel: Outgoing) -> list[Path]:
    save_tensors(parcel.out, parcel.cast(parcel.adapter.tensors), _metadata(parcel, "adapter"))
    return [parcel.out]


def _write_lora(layout: str) -> Callable[[Outgoing], list[Path]]:
    def write(parcel: Outgoing) -> list[Path]:
        model, base = frozen_input(parcel.config)
        changes, rest = take_changes(parcel.adapter.tensors, parcel.config.lora, base)
        tensors = LAYOUTS[layout][1](changes, model.config.hidden_size)
        if INPUT in changes:
            rest |= {name: parcel.adapter.tensors[name] for name in base}
        others = _write_beside(parcel, layout, model, rest)
        told = peft_settings(tensors) if layout == "diffusers" else {}
        save_tensors(parcel.out, parcel.cast(tensors), {**_metadata(parcel, layout), **told})
        return [parcel.out, *others]

    return write


def _write_beside(parcel: Outgoing, format: str, model: MMDiT, rest: Tensors) -> list[Path]:
    """The trained tensors for which a host's file has no room, and the notice; before the file itself."""
    extras = extras_beside(parcel.out)
    text = extras.with_name(extras.name.replace(".extras.safetensors", ".NOTICE.txt"))
    with written_whole(text) as partial:
        partial.write_text(notice(_is_flux(model), _metadata(parcel, format)))
    if rest:
        save_tensors(extras, rest, _metadata(parcel, "extras"))
    return [text, extras] if rest else [text]


def _write_merged(parcel: Outgoing) -> list[Path]:
    """The base with the adapter folded in: one tensor in memory at a time, beside the adapter."""
    path, adapted = parcel.config.weights.transformer, parcel.adapter.tensors
    model, layout = empty_mmdit(path)
    trained = {name: adapted[name].float() for name in (f"{INPUT}.weight", f"{INPUT}.bias")}
    changes, rest = take_changes(adapted, parcel.config.lora, trained)
    others = _write_beside(parcel, "merged", model, rest)
    facts = {**_metadata(parcel, "merged"), "merged": "yes", "config": json.dumps(asdict(model.config))}
    read = open_state(model, path, layout=layout)

    def merged(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        layer, _, kind = name.rpartition(".")
        changed = kind == "weight" and layer in changes
        return read[name]().float() + changes[layer].weight if changed else read[name]().float()

    like, give = _in_dtype(model.state_dict(), merged, parcel.dtype or "bfloat16")
    write_tensors(parcel.out, like, give, facts)
    return [parcel.out, *others]


Read = Callable[[str], Tensor]


def _in_dtype(like: Mapping[str, Tensor], read: Read, dtype: str) -> tuple[dict[str, Tensor], Read]:
    """What `write_tensors` needs to write the tensors that `read` gives in a dtype."""
    if dtype == FP8:
        return _in_fp8(like, read)
    return {n: t.to(FLOATS[dtype]) for n, t in like.items()}, lambda name: read(name).to(FLOATS[dtype])


def _in_fp8(like: Mapping[str, Tensor], read: Read) -> tuple[dict[str, Tensor], Read]:
    """The blocks' matrices in e4m3 with a scale each, laid out as ComfyUI expects; the rest in bf16.

    What lies outside the blocks is little, and sensitive.
    """
    small = torch.float8_e4m3fn
    matrices = {
        f"{n.removesuffix('weight')}scale_weight": n for n, t in like.items() if "blocks." in n and t.dim() == 2
    }
    mark = torch.zeros(2).to(small)  # of two elements: multiply in full precision

    @cache  # scales are written first, and needed again
    def scale(name: str) -> Tensor:
        return read(name).abs().max().clamp(min=1e-12) / torch.finfo(small).max

    def give(name: str) -> Tensor:
        if name == "scaled_fp8":
            return mark
        if name in matrices:
            return scale(matrices[name])
        if name in matrices.values():
            return (read(name) / scale(name)).to(small)
        return read(name).bfloat16()

    written = {name: tensor.to(small if name in matrices.values() else torch.bfloat16) for name, tensor in like.items()}
    scales = {name: torch.empty((), device="meta") for name in matrices}
    return {**written, **scales, "scaled_fp8": mark}, give


def _write_folder(parcel: Outgoing) -> list[Path]:
    """A folder that is written under another name and renamed when it is complete."""
    if parcel.out.exists() and (not parcel.out.is_dir() or any(parcel.out.iterdir())):
        raise InputError(f"{parcel.out} exists and is not empty; choose another out= or remove it")
    model, _ = empty_mmdit(parcel.config.weights.transformer)
    licence = _licence(_is_flux(model), Path(parcel.config.weights.transformer))
    with written_whole(parcel.out) as partial:
        partial.mkdir()
        names = _copy_parts(parcel, partial)
        metadata = {**_metadata(parcel, "adapter"), "weights": json.dumps(names)}
        save_tensors(partial / ADAPTER, parcel.cast(parcel.adapter.tensors), metadata)
        described = {**asdict(parcel.config), "weights": names}
        (partial / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(described)))
        (partial / "NOTICE").write_text(notice(_is_flux(model), metadata))
        shutil.copyfile(licence, partial / licence.name)
        files = {name: what for name, what in FOLDER_FILES.items() if (partial / name).exists()}
        (partial / "README.md").write_text(model_card(_is_flux(model), metadata, files))
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
    metadata = {"data": "unknown", **parcel.config.lora_metadata(), **parcel.adapter.metadata}
    metadata["date"] = date_of_writing(metadata.get("date", "unknown"))  # so that a file depends on its input alone
    metadata["tool_version"] = TOOL_VERSION
    metadata["modified"] = MODIFIED.get(format, metadata.get("modified", "yes"))
    if format in LAYOUTS:
        return {**metadata, "format": format}
    adapter_only = () if format == "adapter" else ("lora", "weights")  # what only an adapter's file may have
    return {key: text for key, text in metadata.items() if key not in adapter_only}


# What is written, and in which dtype unless another is asked for (None: the adapter's own).
FORMATS: dict[str, tuple[Callable[[Outgoing], list[Path]], str | None]] = {
    "adapter": (_write_adapter, "bfloat16"),  # the same tensors, for this package
    "import": (_write_adapter, None),  # the same, with every bit kept: for LoRA files that come from elsewhere
    "diffusers": (_write_lora("diffusers"), None),  # a LoRA for FluxFillPipeline.load_lora_weights
    "kohya": (_write_lora("kohya"), None),  # a LoRA for ComfyUI and sd-scripts
    "merged": (_write_merged, "bfloat16"),  # the whole transformer in the published layout
    "decomposer": (_write_folder, None),  # a folder to publish, which Decomposer.from_pretrained takes
}
