"""Safetensors files: precise errors, reading one tensor at a time, atomic writing."""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerdecomp.errors import InputError, first_few
from layerdecomp.files import atomic_path
from layerdecomp.layouts import Shape

Metadata = dict[str, str]
FOREIGN = {b"GGUF": "a GGUF file, not safetensors", b"PK\x03\x04": "a pickled checkpoint or archive, not safetensors"}
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
FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SCALES = ("scale_weight", "weight_scale")  # of a weight, as ComfyUI names them
FP8_COMPANIONS = (*FP8_SCALES, "scale_input", "input_scale", "scaled_fp8", "comfy_quant")
HUGE = 1 << 21  # bytes of a huge page


def read_metadata(path: str | Path) -> Metadata:
    """The string metadata of a safetensors file; `InputError` if the file is missing, truncated or not safetensors."""
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def open_safetensors(path: str | Path) -> Any:
    """`safetensors.safe_open`, with errors that name the file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected one .safetensors file")
    check_present(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {_why_unreadable(path)} ({error}); download or export it again") from error


def check_present(*paths: str | Path) -> None:
    """Raises one `InputError` that lists the files and folders that do not exist."""
    if missing := [f"{path} does not exist" for path in paths if not Path(path).exists()]:
        raise InputError(f"{'; '.join(missing)}; put the file there or name another (see checkpoints/README.md)")


def check_device(device: str) -> None:
    """Raises `InputError` unless tensors can be allocated on a device."""
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={device}: {reason}; expected cpu, or cuda or mps if available") from error


def frozen_dtype(device: str) -> torch.dtype:
    """The default precision of the frozen parts: bf16 on accelerators; CPUs often have no fast bf16."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _why_unreadable(path: Path) -> str:
    """Why safetensors cannot read a file."""
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
    """The header entries of a safetensors file by tensor name, and the offset of its data."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(min(size, 100_000_000)))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's tensors: the file itself, or those of a diffusers folder, sorted by name.

    A folder holds one file, or shards and their index.
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
    files = sorted({path / Path(str(name)).name for name in dict(read_json(index).get("weight_map", {})).values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{path}: {index.name} lists {first_few(absent)}, not in the folder; download what is missing")
    return files


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is missing or no JSON object ({error}); download it again") from error


@cache
def file_sha256(path: Path) -> str:
    """The checksum of a file; for a diffusers folder, that of its files' checksums, one per line, sorted by name."""
    if path.is_dir():
        lines = "".join(f"{file_sha256(file)}\n" for file in weight_files(path))
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the first tensor in a file or folder."""
    return TYPES[next(iter(TensorFile(path).places.values())).dtype]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Writes a safetensors file atomically; the same tensors and metadata give the same bytes."""
    write_tensors(path, tensors, tensors.__getitem__, metadata)


def write_tensors(
    path: str | Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Metadata
) -> None:
    """Writes a safetensors file one tensor at a time, so that only one needs to be in memory.

    (`safetensors.save_file` takes all tensors at once, and orders metadata at random.)

    Args:
        like: shapes and dtypes of the tensors by name; they may be on the meta device.
        read: returns a tensor by name; called once per tensor.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))  # so that every tensor is aligned
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(_header({name: like[name] for name in names}, metadata))
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            assert (tensor.dtype, tensor.shape) == (like[name].dtype, like[name].shape), name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, Tensor], metadata: Metadata) -> bytes:
    """The header of a safetensors file whose tensors are stored in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """The tensors of a safetensors file, or of a diffusers folder's shards, read one at a time.

    By default files are not memory-mapped: mapped pages would count towards the process's memory until the last tensor
    is converted. fp8 tensors are returned in float32, multiplied by their scales.

    Args:
        mapped: memory-map the files; all processes on a machine share the pages, which must not be written to.
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
                    f"of the {len(tensor)} rows: block-wise scales are not supported"
                )
            tensor *= factors.view(-1, *[1] * (tensor.dim() - 1)) if factors.numel() > 1 else factors.view(())
        return tensor

    def _map(self, name: str) -> Tensor:
        with open_safetensors(self.places[name].path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Place:
    """The location of a tensor's bytes."""

    number: int  # index of the file, if there are several
    start: int
    path: Path
    dtype: str
    shape: Shape

    def read(self) -> Tensor:
        """The tensor, on the CPU; `InputError` if the file was truncated, or its dtype is unknown to torch."""
        if self.dtype not in TYPES:
            raise InputError(f"{self.path}: tensors of {self.dtype} are not supported; expected {', '.join(TYPES)}")
        tensor = empty(self.shape, TYPES[self.dtype])
        left = tensor.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:  # one call reads at most 2 GiB
                if not (count := file.readinto(left)):
                    raise InputError(f"{self.path}: {_why_unreadable(self.path)}; download or export it again")
                left = left[count:]
        return tensor


def _places(path: Path, number: int) -> dict[str, Place]:
    """The locations of a file's tensors, after safetensors has validated it."""
    with open_safetensors(path):
        entries, start = _read_header(path)
    return {
        name: Place(number, start + entry["data_offsets"][0], path, entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def empty(shape: Shape, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in huge pages where they are available.

    Page faults for every 4 KiB of a model take longer than reading it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
