"""Strict loading of models in every published layout, and the adapter file.

Every name and shape must fit; mismatches are listed in one `InputError`. Nothing here unpickles.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from layerdecomp import __version__
from layerdecomp.errors import InputError, first_few
from layerdecomp.layouts import (
    Layout,
    Shape,
    Source,
    autoencoder_config,
    diffusers_autoencoder,
    diffusers_transformer,
    mmdit_config,
    published,
    recognise,
)
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.depth import DepthConfig, DepthEstimator, published_names
from layerdecomp.models.lora import freeze_quantized
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import block_matrices
from layerdecomp.tensor_files import (
    Metadata,
    TensorFile,
    empty,
    file_sha256,
    open_safetensors,
    read_json,
    read_metadata,
    save_tensors,
    weight_files,
)

FORMAT_VERSION = "1"
TOOL_VERSION = f"layerdecomp {__version__}"
REFINES = "refines"  # metadata key of a fine-tuned autoencoder: `checksums` of the one it started from
HISTORY = "history"  # metadata key: the stages that trained what a file was made from, as JSON
TRAINING = ("steps", "seed", "data", "train", "precision", "optim", "commit")  # metadata keys: how a file was trained
STAGE = (*TRAINING, "date", "figures")  # metadata keys of a stage in the history
LICENCE = (
    "Weights derived from FLUX.1-Fill-dev are governed by the FLUX.1 [dev] Non-Commercial License and are marked as "
    "modified; weights of the tiny track were trained from scratch and are Apache-2.0."
)
ConfigT = TypeVar("ConfigT")


def checksums(path: Path) -> list[str]:
    """The checksum of a file or folder, then those of the autoencoders whose decoder was refined to make it.

    All of them have the same latents, so that what was trained on one works with the others.
    """
    refined = read_metadata(weight_files(path)[0]).get(REFINES, "").split()  # first, since it raises the clearer errors
    return [file_sha256(path), *refined]


def latents_sha256(path: Path) -> str:
    """Identifies an autoencoder's latents: the checksum of the file, or of the original that it refines."""
    return checksums(path)[-1]


def history(path: Path) -> list[dict[str, str]]:
    """The training stages that made a weight file, oldest first: each one's entries `STAGE`, and its file's checksum.

    Raises:
        InputError: the file is missing or damaged, or its own history is no such list.
    """
    metadata = read_metadata(weight_files(path)[0])
    own = {key: metadata[key] for key in STAGE if key in metadata}
    return [*earlier_stages(metadata, path), {"sha256": file_sha256(path), **own}]


def earlier_stages(metadata: Metadata, path: str | Path) -> list[dict[str, str]]:
    """The history in the metadata of the file at `path`; `InputError` if it is no list of stages."""
    try:
        return [dict(stage) for stage in json.loads(metadata.get(HISTORY, "[]"))]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {HISTORY} in its metadata is not a JSON list of objects ({error})") from error


def creation_date(otherwise: str | None = None) -> str:
    """SOURCE_DATE_EPOCH, if it is set (https://reproducible-builds.org); else `otherwise`, or the current time; UTC."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None and otherwise is not None:
        return otherwise
    try:
        return datetime.fromtimestamp(int(epoch or time.time()), UTC).isoformat()
    except ValueError as error:
        raise InputError(f"SOURCE_DATE_EPOCH={epoch}: expected seconds since 1970") from error


def check_keys(path: str | Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raises one `InputError` that lists every mismatch between a file's tensors and a model's."""
    mismatches = [
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {list(found[name])} for {list(expected[name])}"
                for name in expected
                if name in found and found[name] != expected[name]
            ],
        ),
    ]
    lines = [f"  {len(names)} {kind}: {first_few(names)}" for kind, names in mismatches if names]
    if lines:
        if hint := recognise(found, expected):
            lines.append(f"  {hint}")
        raise InputError(
            f"{path} does not fit {what}: {len(found)} tensors found, {len(expected)} expected\n" + "\n".join(lines)
        )


def _check_floating(path: str | Path, dtypes: Mapping[str, str]) -> None:
    """Raises `InputError` if a tensor is not floating-point."""
    if wrong := [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]:
        raise InputError(f"{path}: {len(wrong)} tensors are not of floating-point numbers: {first_few(wrong)}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_tensors(path: str | Path, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> None:
    """Copies a file's tensors into parameters of the same names; `InputError` unless names and shapes match."""
    check_keys(path, shapes_of(found), shapes_of(parameters), what)
    for name, parameter in parameters.items():
        parameter.copy_(found[name])


def open_state(
    module: nn.Module, path: str | Path, device: str = "cpu", layout: Layout = published, mapped: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Readers for the tensors of `module`, by name, from files that hold exactly those tensors.

    They are sorted by position in the files.

    Args:
        module: may be on the meta device.
        layout: of the files.
        mapped: as in `TensorFile`.
    """
    shapes = shapes_of(module.state_dict())
    sources = {name: layout(name, shape) for name, shape in shapes.items()}
    file = TensorFile(path, device, mapped)
    expected = {part: shape for source in sources.values() for part, shape in source.shapes.items()}
    shown = f"{path} (in fp8)" if file.in_fp8 else path
    check_keys(shown, file.shapes, expected, f"this {type(module).__name__}")
    _check_floating(path, {name: file.places[name].dtype for name in file.shapes})

    def reader(name: str) -> Callable[[], Tensor]:
        source = sources[name]
        return lambda: source.join([file.read(part) for part in source.shapes], shapes[name])

    def place(name: str) -> tuple[int, int]:
        first = file.places[next(iter(sources[name].shapes))]
        return first.number, first.start

    return {name: reader(name) for name in sorted(sources, key=place)}


def load_state(
    module: nn.Module,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: Layout = published,
    convert: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    mapped: bool = False,
) -> None:
    """Materialises `module`, built on the meta device, tensor by tensor; see `open_state`.

    Args:
        convert: maps a name and its tensor in `dtype` to the tensor to keep, before the next one is read.
    """
    readers = open_state(module, path, device, layout, mapped)
    state = {name: convert(name, _in_dtype(reader(), dtype)) for name, reader in readers.items()}
    module.load_state_dict(state, assign=True)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.device.type != "cpu" or tensor.dtype == dtype:
        return tensor.to(dtype)
    return empty(tuple(tensor.shape), dtype).copy_(tensor)


def config_from(kind: type[ConfigT], text: str | None, where: str) -> ConfigT:
    """A config dataclass from the JSON in a file's metadata; fields that are missing keep their defaults."""
    if "${" in (text or ""):  # a downloaded file must not read environment variables
        raise InputError(f"{where}: its metadata contain an interpolation, which no {kind.__name__} needs")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), json.loads(text or "{}")))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]  # OmegaConf's own keys follow
        raise InputError(f"{where}: its metadata do not describe a {kind.__name__}: {reason}") from error
    assert isinstance(config, kind)
    return config


def load_mmdit(
    path: str | Path,
    config: MMDiTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize: str | None = None,
    mapped: bool = False,
) -> MMDiT:
    """Loads the transformer of a single file or a diffusers folder, in `dtype`, frozen.

    The default `config` is the one in the file's metadata or the folder's config.json; a file without one is
    FLUX.1-Fill-dev. `quantize` (int8, fp8, nf4) quantises the matrices of the blocks as they are read. If `mapped`,
    tensors that need no conversion are memory-mapped.
    """
    convert = block_matrices(quantize)
    model, layout = empty_mmdit(path, config)
    load_state(model, path, dtype, device, layout, convert=convert, mapped=mapped)
    freeze_quantized(model)
    return model.requires_grad_(False).eval()


def empty_mmdit(path: str | Path, config: MMDiTConfig | None = None) -> tuple[MMDiT, Layout]:
    """The transformer in a file or folder, on the meta device, and the layout of its tensors there."""
    config = config or _described(Path(path), MMDiTConfig, mmdit_config)
    with torch.device("meta"):
        model = MMDiT(config)
    is_diffusers = "x_embedder.weight" in TensorFile(path).shapes
    return model, diffusers_transformer(config.hidden_size) if is_diffusers else published


def load_autoencoder(
    path: str | Path, config: AutoencoderConfig | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Autoencoder:
    """Loads the autoencoder of a single file or a diffusers folder, in `dtype`, frozen.

    The default `config` is the one in the file's metadata or the folder's config.json; a file without one is FLUX's.
    """
    config = config or _described(Path(path), AutoencoderConfig, autoencoder_config)
    with torch.device("meta"):
        model = Autoencoder(config)
    is_diffusers = "encoder.conv_norm_out.weight" in TensorFile(path).shapes
    layout = diffusers_autoencoder(len(config.ch_mult)) if is_diffusers else published
    load_state(model, path, dtype, device, layout)
    return model.requires_grad_(False).eval()


def _described(path: Path, kind: type[ConfigT], from_diffusers: Callable[[Mapping[str, Any]], ConfigT]) -> ConfigT:
    """The config of the model in a file, by its metadata, or in a diffusers folder, by its config.json."""
    if not path.is_dir():
        return config_from(kind, read_metadata(path).get("config"), str(path))
    weight_files(path)  # the clearer error, if it is not a model's folder
    try:
        return from_diffusers(read_json(path / "config.json"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'config.json'} does not describe a {kind.__name__}: {error!r}") from error


def load_depth(
    path: str | Path, config: DepthConfig | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DepthEstimator:
    """Loads the depth estimator of a published file, in `dtype`, frozen.

    The default `config` is Depth-Anything-V2-Small's.
    """
    with torch.device("meta"):
        model = DepthEstimator(config or DepthConfig())
    load_state(model, path, dtype, device, _published_depth)
    return model.requires_grad_(False).eval()


def _published_depth(name: str, shape: Shape) -> Source:
    names = published_names(name)
    return Source({part: (shape[0] // len(names), *shape[1:]) if shape else shape for part in names})


def save_model(
    path: str | Path, model: MMDiT | Autoencoder, metadata: Metadata, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a single-file checkpoint under the published names, with the config in its metadata."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    common = {"format_version": FORMAT_VERSION, "tool_version": TOOL_VERSION, "licence": LICENCE}
    save_tensors(path, tensors, {**common, "config": json.dumps(asdict(model.config)), **metadata})


@dataclass(frozen=True)
class Adapter:
    """What training adds to the frozen parts: tensors by name, and metadata that describe them."""

    tensors: dict[str, Tensor]
    metadata: Metadata

    def save(self, path: str | Path) -> None:
        save_tensors(path, self.tensors, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Reads an adapter file; `InputError` if it is not one, or of a format unknown to this version."""
        metadata = read_metadata(path)
        if "lora" not in metadata or "weights" not in metadata:
            foreign = any(".lora_" in name for name in TensorFile(path).shapes)
            hint = "; expected names of a foreign LoRA to start with transformer. or lora_unet_" if foreign else ""
            raise InputError(f"{path} is not an adapter: its metadata lack lora or weights{hint}")
        if metadata.get("format_version") != FORMAT_VERSION:
            found = metadata.get("format_version")
            raise InputError(f"{path}: adapter format {found}, expected {FORMAT_VERSION}; update layerdecomp")
        if "format" in metadata:
            layout = metadata["format"]
            raise InputError(f"{path} is an adapter in {layout} layout; tools/export.py format=import converts it back")
        with open_safetensors(path) as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118


def find_weights(name: str, folders: Iterable[Path]) -> Path:
    """The path of a weight file that an adapter names: as given, or in one of `folders`."""
    places = [Path(name), *(folder / Path(name).name for folder in folders), *(folder / name for folder in folders)]
    candidates = dict.fromkeys(places)  # some may be the same
    for candidate in candidates:
        if candidate.exists():
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"{name} does not exist (tried {tried}); checkpoints/README.md says which file to put where")
