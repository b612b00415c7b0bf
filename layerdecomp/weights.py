"""Weight files: strict reading in every layout that is published, atomic writing, and the adapter file.

Every name and shape must fit; what does not is listed in one `InputError`. Nothing here unpickles.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerdecomp import __version__
from layerdecomp.errors import InputError
from layerdecomp.files import written_whole
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
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import block_matrices

FORMAT_VERSION = "1"
TOOL_VERSION = f"layerdecomp {__version__}"
REFINES = "refines"  # in an autoencoder's metadata: `checksums` of the one whose decoder was trained further
LICENCE = (
    "Weights derived from FLUX.1-Fill-dev are governed by the FLUX.1 [dev] Non-Commercial License and are marked as "
    "modified; weights of the tiny track were trained from nothing and are Apache-2.0."
)
FOREIGN = {b"GGUF": "a GGUF file, not safetensors", b"PK\x03\x04": "a pickled checkpoint or archive, not safetensors"}
Metadata = dict[str, str]
ConfigT = TypeVar("ConfigT")


def read_metadata(path: str | Path) -> Metadata:
    """The string metadata of a safetensors file; `InputError` if the file is missing, truncated or not safetensors."""
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def open_safetensors(path: str | Path, device: str = "cpu", backend: str = "mmap") -> Any:
    """`safetensors.safe_open`, with errors that name the file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected one .safetensors file")
    if not path.is_file():
        raise InputError(f"{path} does not exist; put the file there or name another (see checkpoints/README.md)")
    try:
        return safe_open(path, framework="pt", device=device, backend=backend)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {_why_unreadable(path)} ({error}); download or export it again") from error


def _why_unreadable(path: Path) -> str:
    """What is wrong with a file that safetensors refuses."""
    size = path.stat().st_size
    with suppress(OSError), path.open("rb") as file:
        if (magic := file.read(4)) in FOREIGN:
            return FOREIGN[magic]
    if size < 8:
        return f"only {size} bytes long, not a safetensors file"
    try:
        entries, start = _read_header(path)
        end = start + max(entry["data_offsets"][1] for entry in entries.values())
    except OSError:
        return "cannot be opened"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"not a safetensors file, or its header is cut off ({size:,} bytes)"
    return f"truncated: {size:,} bytes found, {end:,} expected" if size < end else "damaged"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, by name, and where their bytes begin."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(min(size, 100_000_000)))
    entries.pop("__metadata__", None)
    return entries, 8 + size


@cache
def file_sha256(path: Path) -> str:
    """The checksum of a file; of a diffusers folder, that of its files' checksums, one a line, in order of names."""
    if path.is_dir():
        lines = "".join(f"{file_sha256(file)}\n" for file in weight_files(path))
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path: Path) -> list[str]:
    """The checksum of a file or folder, and those of the autoencoders whose decoder was refined to make it.

    Latents are the same in all of them, so that what was trained on one works with the others.
    """
    return [file_sha256(path), *read_metadata(weight_files(path)[0]).get(REFINES, "").split()]


def latents_sha256(path: Path) -> str:
    """What tells an autoencoder's latents: the checksum of the file, or of the first that it is a refinement of."""
    return checksums(path)[-1]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Writes a safetensors file, whole or not at all; the same tensors and metadata give the same bytes."""
    write_tensors(path, tensors, tensors.__getitem__, metadata)


def write_tensors(
    path: str | Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Metadata
) -> None:
    """Writes a safetensors file one tensor at a time, so that no more than one need be in memory.

    (`safetensors.save_file` takes all tensors at once, and orders metadata at random.)

    Args:
        like: shapes and dtypes of the tensors by name; they may be on the meta device.
        read: gives a tensor by its name, once.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))  # so that every tensor is aligned
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(_header({name: like[name] for name in names}, metadata))
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            assert (tensor.dtype, tensor.shape) == (like[name].dtype, like[name].shape), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def date_of_writing(otherwise: str | None = None) -> str:
    """What SOURCE_DATE_EPOCH says, if it is set (https://reproducible-builds.org); else `otherwise`, or now; UTC."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None and otherwise is not None:
        return otherwise
    try:
        return datetime.fromtimestamp(int(epoch or time.time()), UTC).isoformat()
    except ValueError as error:
        raise InputError(f"SOURCE_DATE_EPOCH={epoch}: expected seconds since 1970") from error


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}


def _header(tensors: Mapping[str, Tensor], metadata: Metadata) -> bytes:
    """The head of a safetensors file whose tensors follow one another as they are given."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return struct.pack("<Q", len(text)) + text


def check_keys(path: str | Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """Raises one `InputError` that lists every kind of misfit between a file's tensors and a model's."""
    misfits = [
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
    lines = [f"  {len(names)} {kind}: {_first(names)}" for kind, names in misfits if names]
    if lines:
        if looks := recognise(found, expected):
            lines.append(f"  {looks}")
        raise InputError(
            f"{path} does not fit {what}: {len(found)} tensors found, {len(expected)} expected\n" + "\n".join(lines)
        )


def _check_floating(path: str | Path, dtypes: Mapping[str, str]) -> None:
    """Raises `InputError` if a tensor holds anything but floating-point numbers."""
    if wrong := [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]:
        raise InputError(f"{path}: {len(wrong)} tensors are not of floating-point numbers: {_first(wrong)}")


def _first(names: list[str], count: int = 10) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_tensors(path: str | Path, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> None:
    """Copies the tensors of a file into parameters of the same names; `InputError` unless they are exactly those."""
    check_keys(path, shapes(found), shapes(parameters), what)
    for name, parameter in parameters.items():
        parameter.copy_(found[name])


class TensorFile:
    """The tensors of a safetensors file, or of a diffusers folder's shards, read one at a time.

    Read, not mapped: mapped pages would count as the process's memory until the last tensor is converted. Tensors in
    fp8 come out in float32, multiplied by their scales.

    Args:
        mapped: the file's own pages instead, which all processes of a machine share; not to be written to.
    """

    def __init__(self, path: str | Path, device: str = "cpu", mapped: bool = False) -> None:
        self.places: dict[str, Place] = {}
        for number, file in enumerate(weight_files(Path(path))):
            self.places |= _places(file, number)
        self._device, self._mapped = device, mapped
        self.in_fp8 = any(place.dtype in FP8 for place in self.places.values())
        self.shapes = {
            name: place.shape
            for name, place in self.places.items()
            if not (self.in_fp8 and name.endswith(FP8_COMPANIONS))
        }

    def read(self, name: str) -> Tensor:
        tensor = (self._map(name) if self._mapped else self.places[name].read()).to(self._device)
        if not tensor.dtype.is_floating_point or tensor.element_size() > 1:
            return tensor
        tensor, stem = tensor.float(), name.removesuffix("weight")
        for scale in (f"{stem}{kind}" for kind in FP8_SCALES if f"{stem}{kind}" in self.places):
            factors = self.places[scale].read().to(self._device).float()
            if factors.numel() not in (1, len(tensor)):
                raise InputError(
                    f"{self.places[scale].path}: {scale} has {factors.numel()} numbers; expected one, or one for each "
                    f"of the {len(tensor)} rows: scales of blocks are not read"
                )
            tensor *= factors.view(-1, *[1] * (tensor.dim() - 1)) if factors.numel() > 1 else factors.view(())
        return tensor

    def _map(self, name: str) -> Tensor:
        with open_safetensors(self.places[name].path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    number: int  # of the file, among several
    start: int
    path: Path
    dtype: str
    shape: Shape

    def read(self) -> Tensor:
        """The tensor, on the CPU; `InputError` if the file has become shorter, or holds what torch has no type for."""
        if self.dtype not in TYPES:
            raise InputError(f"{self.path}: tensors of {self.dtype} are not read; expected {', '.join(TYPES)}")
        tensor = empty(self.shape, TYPES[self.dtype])
        left = tensor.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:  # one call gives 2 GiB at most
                if not (count := file.readinto(left)):
                    raise InputError(f"{self.path}: {_why_unreadable(self.path)}; download or export it again")
                left = left[count:]
        return tensor


def _places(path: Path, number: int) -> dict[str, Place]:
    """Where the tensors of a file lie, once safetensors has found it sound."""
    with open_safetensors(path):
        entries, start = _read_header(path)
    return {
        name: Place(number, start + entry["data_offsets"][0], path, entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def empty(shape: Shape, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in huge pages where there are any.

    A page fault for every 4 KiB of a model takes longer than reading it does.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


HUGE = 1 << 21  # bytes of a huge page
FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SCALES = ("scale_weight", "weight_scale")  # beside a weight, as ComfyUI names them
FP8_COMPANIONS = (*FP8_SCALES, "scale_input", "input_scale", "scaled_fp8", "comfy_quant")


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's tensors: the one itself, or those of a diffusers folder, in order of names.

    A folder holds one file, or shards and an index that lists them.
    """
    if not path.is_dir():
        return [path]
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(
                f"{path} holds {len(files)} .safetensors files and no *.safetensors.index.json; expected a diffusers "
                "folder such as transformer/ or vae/, with one file or with shards and their index"
            )
        return files
    files = sorted({path / Path(str(name)).name for name in dict(_read_json(index).get("weight_map", {})).values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{path}: {index.name} lists {_first(absent)}, not in the folder; download what is missing")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is missing or no JSON object ({error}); download it again") from error


def open_state(
    module: nn.Module, path: str | Path, device: str = "cpu", layout: Layout = published, mapped: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Functions that read a tensor of `module` each, by its name there, from files that hold exactly its tensors.

    They are in the order in which the tensors lie in the files.

    Args:
        module: may be on the meta device.
        layout: where the files have the tensors.
        mapped: as in `TensorFile`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
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
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: Layout = published,
    convert: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    mapped: bool = False,
) -> None:
    """Materialises `module`, built on the meta device, tensor by tensor; see `open_state`.

    Args:
        convert: what becomes of a tensor of some name, in `dtype`, before the next one is read.
    """
    dtype = dtype or torch.float32
    read = open_state(module, path, device, layout, mapped)
    state = {name: convert(name, _in_dtype(one(), dtype)) for name, one in read.items()}
    module.load_state_dict(state, assign=True)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.device.type != "cpu" or tensor.dtype == dtype:
        return tensor.to(dtype)
    return empty(tuple(tensor.shape), dtype).copy_(tensor)


def config_from(kind: type[ConfigT], text: str | None, where: str) -> ConfigT:
    """A config dataclass from its JSON text in a file's metadata; the class's defaults where there is none."""
    if "${" in (text or ""):  # a downloaded file must not read environment variables
        raise InputError(f"{where}: its metadata hold an interpolation, which no {kind.__name__} needs")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), json.loads(text or "{}")))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise InputError(f"{where}: its metadata does not describe a {kind.__name__}: {error}") from error
    assert isinstance(config, kind)
    return config


def load_mmdit(
    path: str | Path,
    config: MMDiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quantize: str | None = None,
    mapped: bool = False,
) -> MMDiT:
    """The transformer of a single file or of a diffusers folder, in `dtype` (float32 unless given), frozen.

    Without a `config`, the file's metadata or the folder's config.json say what model it is; a file without any is
    FLUX.1-Fill-dev. With `quantize` (int8, fp8, nf4) the matrices of its blocks are kept so, each from when it is read.
    Where it is `mapped`, tensors that need no conversion stay the file's own pages.
    """
    convert = block_matrices(quantize)
    model, layout = empty_mmdit(path, config)
    load_state(model, path, dtype, device, layout, convert, mapped)
    return model.requires_grad_(False).eval()


def empty_mmdit(path: str | Path, config: MMDiTConfig | None = None) -> tuple[MMDiT, Layout]:
    """The transformer that a file or folder holds, on the meta device, and the layout it is kept in there."""
    config = config or _described(Path(path), MMDiTConfig, mmdit_config)
    with torch.device("meta"):
        model = MMDiT(config)
    elsewhere = "x_embedder.weight" in TensorFile(path).shapes
    return model, diffusers_transformer(config.hidden_size) if elsewhere else published


def load_autoencoder(
    path: str | Path, config: AutoencoderConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Autoencoder:
    """The autoencoder of a single file or of a diffusers folder, in `dtype` (float32 unless given), frozen.

    Without a `config`, the file's metadata or the folder's config.json say what model it is; a file without any is
    FLUX's.
    """
    config = config or _described(Path(path), AutoencoderConfig, autoencoder_config)
    with torch.device("meta"):
        model = Autoencoder(config)
    elsewhere = "encoder.conv_norm_out.weight" in TensorFile(path).shapes
    load_state(model, path, dtype, device, diffusers_autoencoder(len(config.ch_mult)) if elsewhere else published)
    return model.requires_grad_(False).eval()


def _described(path: Path, kind: type[ConfigT], from_diffusers: Callable[[Mapping[str, Any]], ConfigT]) -> ConfigT:
    """The config of the model in a file, by its metadata, or in a diffusers folder, by its config.json."""
    if not path.is_dir():
        return config_from(kind, read_metadata(path).get("config"), str(path))
    weight_files(path)  # says more about a folder that is none
    try:
        return from_diffusers(_read_json(path / "config.json"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'config.json'} describes no {kind.__name__}: {error!r}") from error


def load_depth(
    path: str | Path, config: DepthConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DepthEstimator:
    """The depth estimator of a published file, in `dtype` (float32 unless given), on `device`, frozen.

    Without a `config`, it is Depth-Anything-V2-Small.
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
    """Writes a single-file checkpoint under the published names, its config in the metadata."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    common = {"format_version": FORMAT_VERSION, "tool_version": TOOL_VERSION, "licence": LICENCE}
    save_tensors(path, tensors, {**common, "config": json.dumps(asdict(model.config)), **metadata})


def stored_dtype(path: str | Path) -> torch.dtype:
    """What the (first) tensor of a file or folder is kept in."""
    return TYPES[next(iter(TensorFile(path).places.values())).dtype]


@dataclass(frozen=True)
class Adapter:
    """What training adds to the frozen parts: tensors by name, and the strings that say what they are."""

    tensors: dict[str, Tensor]
    metadata: Metadata

    def save(self, path: str | Path) -> None:
        save_tensors(path, self.tensors, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Reads an adapter file; `InputError` if it is none, or of a format that this version does not know."""
        metadata = read_metadata(path)
        if "lora" not in metadata or "weights" not in metadata:
            raise InputError(f"{path} is not an adapter: its metadata name no lora and no weights")
        if metadata.get("format_version") != FORMAT_VERSION:
            found = metadata.get("format_version")
            raise InputError(f"{path}: adapter format {found}, expected {FORMAT_VERSION}; update layerdecomp")
        if "format" in metadata:
            layout = metadata["format"]
            raise InputError(f"{path} is an adapter in {layout} layout; tools/export.py format=import brings it back")
        with open_safetensors(path) as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118


def find_weights(name: str, beside: Iterable[Path]) -> Path:
    """A weight file by the name an adapter gives it: as it stands, or in one of the folders `beside`."""
    candidates = [Path(name), *(folder / Path(name).name for folder in beside), *(folder / name for folder in beside)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"{name} does not exist (looked at {looked}); checkpoints/README.md says which file to put where")
