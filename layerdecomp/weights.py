"""Weight files: strict reading, atomic writing, and the adapter file.

Every name and shape must fit; what does not is listed in one `InputError`. Nothing here unpickles.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from layerdecomp.errors import InputError
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.depth import DepthConfig, DepthEstimator, published_names
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig

FORMAT_VERSION = "1"
LICENCE = (
    "Weights derived from FLUX.1-Fill-dev are governed by the FLUX.1 [dev] Non-Commercial License and are marked as "
    "modified; weights of the tiny track were trained from nothing and are Apache-2.0."
)
Metadata = dict[str, str]
ConfigT = TypeVar("ConfigT")


def read_metadata(path: str | Path) -> Metadata:
    """The string metadata of a safetensors file; `InputError` if the file is missing, truncated or not safetensors."""
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def open_safetensors(path: str | Path, device: str = "cpu") -> Any:
    """`safetensors.safe_open`, with errors that name the file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected one .safetensors file")
    if not path.is_file():
        raise InputError(f"{path} does not exist; put the file there or name another (see checkpoints/README.md)")
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {_why_unreadable(path)} ({error}); download or export it again") from error


def _why_unreadable(path: Path) -> str:
    """What is wrong with a file that safetensors refuses."""
    size = path.stat().st_size
    if size < 8:
        return f"only {size} bytes long, not a safetensors file"
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, 100_000_000)))
        end = 8 + header_size + max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
    except OSError:
        return "cannot be opened"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"not a safetensors file, or its header is cut off ({size:,} bytes)"
    return f"truncated: {size:,} bytes found, {end:,} expected" if size < end else "damaged"


@cache
def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Writes a safetensors file beside its final name, then renames it, so that no half-written file is ever seen."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else can read
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written ({error}); free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)


@cache
def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def check_keys(
    path: str | Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
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


def load_state(
    module: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    sources: Callable[[str], list[str]] = lambda name: [name],
) -> None:
    """Materialises `module`, built on the meta device, from a file that holds exactly its tensors.

    Where the file has other names, `sources` gives those of the tensors that, one below the other, are a parameter.
    """
    parts = {name: sources(name) for name in module.state_dict()}
    expected = {
        part: tuple(chunk.shape)
        for name, tensor in module.state_dict().items()
        for part, chunk in zip(parts[name], tensor.chunk(len(parts[name])), strict=True)
    }
    with open_safetensors(path, device) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_keys(path, found, expected, f"this {type(module).__name__}")
        _check_floating(path, {name: file.get_slice(name).get_dtype() for name in found})
        state = {
            name: _join([file.get_tensor(part) for part in names]).to(dtype or torch.float32)
            for name, names in parts.items()
        }
    module.load_state_dict(state, assign=True)


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # a lone tensor stays where it is mapped


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
    path: str | Path, config: MMDiTConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> MMDiT:
    """The transformer of a single-file checkpoint, in `dtype` (float32 unless given), on `device`, frozen.

    Without a `config`, the file's metadata say what model it is; a file without any is FLUX.1-Fill-dev.
    """
    with torch.device("meta"):
        model = MMDiT(config or config_from(MMDiTConfig, read_metadata(path).get("config"), str(path)))
    load_state(model, path, dtype, device)
    return model.requires_grad_(False).eval()


def load_autoencoder(
    path: str | Path, config: AutoencoderConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Autoencoder:
    """The autoencoder of a single-file checkpoint, in `dtype` (float32 unless given), on `device`, frozen.

    Without a `config`, the file's metadata say what model it is; a file without any is FLUX's.
    """
    with torch.device("meta"):
        model = Autoencoder(config or config_from(AutoencoderConfig, read_metadata(path).get("config"), str(path)))
    load_state(model, path, dtype, device)
    return model.requires_grad_(False).eval()


def load_depth(
    path: str | Path, config: DepthConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DepthEstimator:
    """The depth estimator of a published file, in `dtype` (float32 unless given), on `device`, frozen.

    Without a `config`, it is Depth-Anything-V2-Small.
    """
    with torch.device("meta"):
        model = DepthEstimator(config or DepthConfig())
    load_state(model, path, dtype, device, published_names)
    return model.requires_grad_(False).eval()


def save_model(
    path: str | Path, model: MMDiT | Autoencoder, metadata: Metadata, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a single-file checkpoint under the published names, its config in the metadata."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    common = {"format_version": FORMAT_VERSION, "config": json.dumps(asdict(model.config)), "licence": LICENCE}
    save_tensors(path, tensors, {**common, **metadata})


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
        with open_safetensors(path) as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118


def find_weights(name: str, beside: Iterable[Path]) -> Path:
    """A weight file by the name an adapter gives it: as it stands, or in one of the folders `beside`."""
    candidates = [Path(name), *(folder / Path(name).name for folder in beside), *(folder / name for folder in beside)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(f"{name} does not exist (looked at {looked}); checkpoints/README.md says which file to put where")
