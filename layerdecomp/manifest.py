"""How an adapter file describes itself: its settings, and the frozen files that it belongs to."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from layerdecomp.conditioning import ConditioningConfig
from layerdecomp.errors import InputError
from layerdecomp.flow import FlowConfig
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig
from layerdecomp.sampling import SampleConfig
from layerdecomp.tensor_files import Metadata, file_sha256, read_metadata, weight_files
from layerdecomp.weights import FORMAT_VERSION, LICENCE, TOOL_VERSION, Adapter, checksums, config_from, find_weights

# Keys of an adapter's metadata that hold the checksums of the frozen parts.
SHA256_KEYS = {
    "transformer": "base_sha256",
    "autoencoder": "autoencoder_sha256",
    "rgba_autoencoder": "rgba_autoencoder_sha256",
    "prompt": "prompt_sha256",
}
PARTS = tuple(SHA256_KEYS)
BASES = {"03e289f530df51d014f48e675a9ffa2141bc003259bf5f25d75b957e920a41ca": "black-forest-labs/FLUX.1-Fill-dev"}
ADAPTER = "adapter.safetensors"  # file name in a run directory and in a published folder
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class WeightFiles:
    """Paths of the frozen parts."""

    transformer: str = "checkpoints/tiny/transformer.safetensors"
    autoencoder: str = "checkpoints/tiny/autoencoder.safetensors"
    rgba_autoencoder: str = "checkpoints/tiny/rgba_autoencoder.safetensors"
    prompt: str | None = None  # tensors txt (T, context_in_dim) and vec (vec_in_dim); null: one token of zeros

    def named(self) -> dict[str, str]:
        """Paths by key, without those that are None."""
        return {name: path for name, path in vars(self).items() if path is not None}


@dataclass
class DecomposerConfig:
    """Everything that describes a decomposer; stored in an adapter's metadata as JSON, field by field."""

    weights: WeightFiles = field(default_factory=WeightFiles)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    fusion: ContextFusionConfig = field(default_factory=ContextFusionConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def to_metadata(self) -> Metadata:
        described = {f.name: json.dumps(asdict(getattr(self, f.name))) for f in fields(DecomposerConfig)}
        facts = {SHA256_KEYS[name]: file_sha256(Path(file)) for name, file in self.weights.named().items()}
        base = Path(self.weights.transformer).name
        return {
            "format_version": FORMAT_VERSION,
            "tool_version": TOOL_VERSION,
            "base_model": BASES.get(facts["base_sha256"], base),
            **facts,
            **described,
            **self.lora_metadata(),
            "modified": "yes: LoRA and input projection added to the base",
            "licence": LICENCE,
        }

    def lora_metadata(self) -> Metadata:
        """The LoRA settings, as one JSON entry and as separate entries."""
        alpha = self.lora.rank if self.lora.alpha is None else self.lora.alpha
        settings = {"rank": str(self.lora.rank), "alpha": str(alpha), "targets": " ".join(self.lora.targets)}
        return {"lora": json.dumps(asdict(self.lora)), **settings}


def adapter_file(path: str | Path) -> Path:
    """The adapter file for a path to it, or to the folder that it was published or trained in."""
    path = Path(path)
    if path.suffix == ".ckpt":
        adapter = path.with_name(ADAPTER)
        raise InputError(
            f"{path} is a training checkpoint; expected the adapter that its run writes at the end, {adapter}"
        )
    if not path.is_dir():
        return path
    if not (path / ADAPTER).is_file() and (path / "last.ckpt").is_file():
        raise InputError(f"{path} is an unfinished run without {ADAPTER}; resume it with the command that started it")
    return path / ADAPTER


def open_adapter(path: str | Path, **files: str) -> tuple[Adapter, DecomposerConfig]:
    """An adapter file, and the config of its decomposer with verified paths of the frozen parts.

    `path` may be a folder that holds `ADAPTER`. Paths of frozen parts are tried as given, beside the adapter and in the
    repository; `files` overrides them.

    Raises:
        InputError: a file is missing, or the base is not the one that was adapted.
    """
    path = adapter_file(path)
    adapter = Adapter.load(path)
    return adapter, config_of(adapter.metadata, path, **files)


def parts_sha256(path: str | Path, **files: str) -> dict[str, str]:
    """Checksums of an adapter and of its decomposer's frozen parts ("": no prompt); arguments as in `open_adapter`."""
    path = adapter_file(path)
    named = {"adapter": path, **vars(config_of(read_metadata(path), path, **files).weights)}
    return {name: file_sha256(Path(file)) if file else "" for name, file in named.items()}


def check_parts(files: Iterable[str]) -> None:
    """Raises `InputError` for the first of the keys that is not one of `PARTS`."""
    if unknown := [name for name in files if name not in PARTS]:
        raise InputError(f"{unknown[0]}= names no weight file; expected some of {', '.join(PARTS)}")


def config_of(metadata: Metadata, path: Path, **files: str) -> DecomposerConfig:
    """The decomposer config in the metadata of the adapter at `path`; see `open_adapter`."""
    config = DecomposerConfig()
    for part in fields(DecomposerConfig):
        kind: type[Any] = type(getattr(config, part.name))
        setattr(config, part.name, config_from(kind, metadata.get(part.name), f"{path}: {part.name}"))
    check_parts(files)
    for name, value in {**asdict(config.weights), **files}.items():
        if value is not None:
            setattr(config.weights, name, str(find_weights(value, [path.parent, REPOSITORY])))
    for name, file in config.weights.named().items():
        key = SHA256_KEYS[name]
        if name == "prompt" and key not in metadata:  # older adapters do not record it
            continue
        for part_file in weight_files(Path(file)):
            read_metadata(part_file)  # report a truncated file as such, not as another one
        found, expected = checksums(Path(file)), metadata.get(key, "unknown")
        if expected not in found:
            raise InputError(
                f"{file} is not the {name} that {path} was trained with: sha256 {found[0][:12]}..., expected "
                f"{expected[:12]}...; name the right file with {name}="
            )
    return config
