"""Adapters read from files: this package's own, LoRA files in other layouts, and sums of several."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerdecomp.adapters import (
    INPUT,
    LAYOUTS,
    Changes,
    Tensors,
    adapter_from_changes,
    add_changes,
    add_whole,
    changes_from_adapter,
    peft_alphas,
    reduce_rank,
)
from layerdecomp.errors import InputError, first_few
from layerdecomp.inpainting import Prompt
from layerdecomp.manifest import (
    REPOSITORY,
    DecomposerConfig,
    WeightFiles,
    adapter_file,
    check_parts,
    config_of,
    open_adapter,
)
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import adapted_layers
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.tensor_files import Metadata, open_safetensors, read_metadata
from layerdecomp.weights import (
    HISTORY,
    TRAINING,
    Adapter,
    empty_mmdit,
    find_weights,
    history,
    latents_sha256,
    open_state,
)


def read_adapters(
    paths: Sequence[Path], weights: Sequence[float] | None, rank: int | None, files: dict[str, str]
) -> tuple[Adapter, DecomposerConfig]:
    """One adapter from one or several files in any layout, and the decomposer that it belongs to."""
    weights = [1.0] * len(paths) if weights is None else weights
    if not paths or len(weights) != len(paths):
        raise InputError(f"weights= has {len(weights)} numbers for {len(paths)} adapters; expected one for each")
    read = [read_adapter(path, files) for path in paths]
    adapter, config = read[0]
    untouched = len(paths) == 1 and weights[0] == 1 and rank is None
    if untouched:
        return adapter, config
    _, base = _frozen(config, adapter.tensors)
    taken = []
    expected = _shared(adapter, config)
    for path, (other, other_config) in zip(paths, read, strict=True):
        if differing := [what for what, value in _shared(other, other_config).items() if value != expected[what]]:
            raise InputError(
                f"{path} differs from {paths[0]} in its {', '.join(differing)}; expected adapters with the same frozen "
                "parts and settings"
            )
        taken.append(changes_from_adapter(other.tensors, other_config.lora, base))
    changes = add_changes([(changes, share) for (changes, _), share in zip(taken, weights, strict=True)])
    whole = [(rest, share) for (_, rest), share in zip(taken, weights, strict=True)]
    rest = add_whole(whole, base)
    metadata = {**adapter.metadata, "figures": "{}"}  # the recorded ones belong to another adapter
    if len(paths) > 1 or weights[0] != 1:
        shares = " + ".join(f"{share:g} x {path.name}" for path, share in zip(paths, weights, strict=True))
        of_one = (*TRAINING, "continues")  # of the first adapter only; the history tells those of all
        metadata = {key: text for key, text in metadata.items() if key not in of_one}
        metadata |= {"merged_from": shares, HISTORY: json.dumps(_joint_history(paths))}
    if rank is not None:
        changes, metadata["reduced"] = _reduce(changes, rank)
    return _adapter(changes, rest, base, config, metadata), config


def _shared(adapter: Adapter, config: DecomposerConfig) -> dict[str, Any]:
    """What adapters must have in common to be summed."""
    return {
        "base": adapter.metadata["base_sha256"],
        "autoencoder": latents_sha256(Path(config.weights.autoencoder)),
        "RGBA autoencoder": latents_sha256(Path(config.weights.rgba_autoencoder)),
        "prompt": adapter.metadata.get("prompt_sha256"),
        "fusion": config.fusion,
        "conditioning": config.conditioning,
    }


def _joint_history(paths: Sequence[Path]) -> list[dict[str, str]]:
    """The distinct training stages of several adapters, which may share their first ones."""
    stages = [stage for path in paths for stage in history(adapter_file(path))]
    return [stage for index, stage in enumerate(stages) if stage not in stages[:index]]


def _reduce(changes: Changes, rank: int) -> tuple[Changes, str]:
    if rank < 1:
        raise InputError(f"rank is {rank}; expected at least 1")
    before = max(change.rank for layer, change in changes.items() if layer != INPUT)
    if rank > before:
        raise InputError(f"rank is {rank}; expected at most the adapter's rank, {before}: ranks can only be reduced")
    reduced, errors = reduce_rank(changes, rank)
    worst = max(errors, key=lambda layer: errors[layer])
    text = f"rank {before} to {rank}: relative error {errors['all']:.2%} (worst: {worst} {errors[worst]:.2%})"
    print(text)
    return reduced, text


def _adapter(changes: Changes, rest: Tensors, base: Tensors, config: DecomposerConfig, metadata: Metadata) -> Adapter:
    """An adapter of these changes; its LoRA settings are written to `config` and to the metadata."""
    lora, tensors = adapter_from_changes(changes, base)
    model, _ = empty_mmdit(config.weights.transformer)
    if set(lora.targets) == set(adapted_layers(model, config.lora)):
        lora.targets = config.lora.targets
    config.lora = lora
    return Adapter({**tensors, **rest}, {**metadata, **config.lora_metadata()})


def read_adapter(path: Path, files: dict[str, str]) -> tuple[Adapter, DecomposerConfig]:
    """An adapter of this package, or a LoRA file in one of the `LAYOUTS`, and the decomposer that it belongs to.

    A LoRA file exported by this package describes itself, and the tensors that its layout cannot hold are read from the
    file beside it. For any other LoRA file, `files` must name the frozen parts, and there is no fusion module.
    """
    path = adapter_file(path)
    with open_safetensors(path) as file:
        names = set(file.keys())
        layout = next(
            (key for key, kind in LAYOUTS.items() if any(name.startswith(kind.prefix) for name in names)), None
        )
        if layout is None:
            return open_adapter(path, **files)
        tensors = {name: file.get_tensor(name) for name in names}
    metadata = read_metadata(path)
    if layout == "diffusers":
        tensors |= peft_alphas(tensors, metadata)
    if "lora" in metadata and "weights" in metadata:
        config = config_of(metadata, path, **files)
    else:
        config = _undescribed(path, files)
        metadata = {**config.to_metadata(), "origin": f"imported from {path.name}"}
    model, base = frozen_input(config)
    layers = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    changes = LAYOUTS[layout].read(tensors, layers, model.config.hidden_size)
    if tensors:
        raise InputError(
            f"{path}: {len(tensors)} of {len(names)} tensors belong to no linear layer of the transformer: "
            f"{first_few(sorted(tensors))}; expected LoRA pairs in {layout} layout"
        )
    _check_widths(path, changes, model)
    Prompt.load(config.weights.prompt, model)  # reports a missing one
    rest = _read_extras(path, changes, base, config.fusion.enabled)
    metadata = {key: text for key, text in metadata.items() if key not in ("format", "lora_adapter_metadata")}
    return _adapter(changes, rest, base, config, metadata), config


def _undescribed(path: Path, files: dict[str, str]) -> DecomposerConfig:
    needed = ("transformer", "autoencoder", "rgba_autoencoder")
    check_parts(files)
    if missing := [name for name in needed if name not in files]:
        raise InputError(
            f"{path} does not name its frozen parts; expected {' '.join(f'{name}=FILE' for name in missing)}"
        )
    found = {name: str(find_weights(file, [path.parent, REPOSITORY])) for name, file in files.items()}
    return DecomposerConfig(weights=WeightFiles(**found), fusion=ContextFusionConfig(enabled=False))


def _check_widths(path: Path, changes: Changes, model: MMDiT) -> None:
    for layer, change in changes.items():
        expected = tuple(model.get_parameter(f"{layer}.weight").shape)
        if (found := (change.b.shape[0], change.a.shape[1])) != expected or change.a.shape[0] != change.b.shape[1]:
            raise InputError(
                f"{path}: the LoRA changes {layer} by {found}, but the layer is {expected}: it belongs to another base"
            )


def _read_extras(path: Path, changes: Changes, base: Tensors, needed: bool) -> Tensors:
    """The tensors that an exported LoRA file cannot hold, from the file beside it."""
    file = extras_path(path)
    if not needed and not file.is_file():
        return {}
    with open_safetensors(file) as opened:
        extras: Tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    exact = {name: extras.pop(name) for name in base if name in extras}
    _, computed = adapter_from_changes({**changes}, base)
    # Base plus difference is not bit-exact: take the exact tensors, unless the pair was changed since the export.
    if all(torch.allclose(exact[name].float(), computed[name], rtol=1e-5, atol=1e-6) for name in exact):
        extras |= exact
    return extras


def frozen_input(config: DecomposerConfig) -> tuple[MMDiT, Tensors]:
    """The frozen transformer on the meta device, and its input projection in float32."""
    return _frozen(config, [f"{INPUT}.weight", f"{INPUT}.bias"])


def _frozen(config: DecomposerConfig, names: Iterable[str]) -> tuple[MMDiT, Tensors]:
    """The frozen transformer on the meta device, and those of the named tensors that it has, in float32."""
    path = config.weights.transformer
    model, layout = empty_mmdit(path)
    read = open_state(model, path, layout=layout)
    return model, {name: read[name]().float() for name in names if name in read}


def moved_adapter(adapter: Adapter, old: str, new: str) -> Adapter:
    """An adapter of the base in the file `old`, for the one in `new`; its metadata still describe the original.

    LoRA and fusion stay as they are; layers trained in full differ from the new base as they did from the old one.
    """
    before, now = (_frozen(DecomposerConfig(WeightFiles(path)), adapter.tensors)[1] for path in (old, new))
    moved = {name: adapter.tensors[name] - before[name] + now[name] for name in before}
    return Adapter(adapter.tensors | moved, adapter.metadata)


def extras_path(path: Path) -> Path:
    """The path of the trained tensors that an exported file in another layout cannot hold."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.extras.safetensors")
