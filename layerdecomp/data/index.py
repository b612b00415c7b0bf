"""The index of a data set on disk: a small table, written once by `tools/prepare_data.py` and opened by training.

It is a safetensors file of columns, since the project already uses that format and columns can be memory-mapped:
opening an index costs the same for a million items as for ten, and processes that read the same index share its pages.
A string column is stored as its concatenated bytes and the end of each string.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.tensor_files import Place, TensorFile, read_metadata, save_tensors

VERSION = "2"
KINDS = ("layered", "foregrounds", "backgrounds", "triplets")
TEST_SHARE = 0.02  # default fraction of items in the test split, chosen by a hash of their ids


@dataclass(frozen=True)
class Item:
    """One row: a validated file, or the files of one layered picture or triplet."""

    id: str  # unique in its index
    path: str  # relative to the root, with forward slashes; "{layer}" is a layer's number; JSON by part for a triplet
    width: int  # pixels, after rotation
    height: int
    layers: int = 1  # of a layered picture, including the background
    rotation: int = 0  # degrees, counter-clockwise, to rotate the picture upright


class Reader(Protocol):
    """Reads a downloaded data set into items. A dataclass of settings, so that it can be sent to worker processes."""

    @property
    def source(self) -> str:
        """Name of the data set."""
        ...

    @property
    def kind(self) -> str:
        """One of KINDS."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the files."""
        ...

    @property
    def root(self) -> Path:
        """The folder that item paths are relative to."""
        ...

    def candidates(self) -> list[str]:
        """Names of potential items, sorted, found without opening the picture files."""
        ...

    def read(self, candidate: str) -> Item | None:
        """Opens and checks a candidate; None if the settings exclude it, `InputError` if it is damaged."""
        ...


def split_of(item: str, test_share: float = TEST_SHARE) -> str:
    """The split of an item, "train" or "test", from a hash of its id: independent of the machine and of other items."""
    share = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") / 2**64
    return "test" if share < test_share else "train"


def check_name(name: str) -> None:
    """Raises `InputError` for the name of a file or folder that is not UTF-8, which no index or table can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name!r} is not UTF-8; rename that file or folder") from None


def write_index(path: str | Path, reader: Reader, items: Iterable[Item], test_share: float = TEST_SHARE) -> int:
    """Writes the items, sorted by id, and returns how many; `InputError` if two of them have the same id."""
    rows = sorted(items, key=lambda item: item.id)
    for before, after in pairwise(rows):
        if before.id == after.id:
            raise InputError(f"{reader.root}: {before.path} and {after.path} have the same id {after.id}; keep one")
    columns = {
        **_string_column("id", [row.id for row in rows]),
        **_string_column("path", [row.path for row in rows]),
        "size": torch.tensor([(row.width, row.height) for row in rows], dtype=torch.int32).reshape(-1, 2),
        "layers": torch.tensor([row.layers for row in rows], dtype=torch.int16),
        "rotation": torch.tensor([row.rotation for row in rows], dtype=torch.int16),
    }
    splits = [split_of(row.id, test_share) for row in rows]
    for split in ("train", "test"):  # stored, so that selecting a split does not scan all rows
        chosen = [row for row, found in enumerate(splits) if found == split]
        columns[f"{split}.rows"] = torch.tensor(chosen, dtype=torch.int32)
    root = str(reader.root.resolve())
    described = {"source": reader.source, "kind": reader.kind, "licence": reader.licence, "root": root}
    save_tensors(path, columns, {"index_version": VERSION, **described})
    return len(rows)


def _string_column(name: str, strings: list[str]) -> dict[str, Tensor]:
    encoded = [string.encode() for string in strings]
    ends = torch.tensor([len(string) for string in encoded], dtype=torch.int64).cumsum(0)
    # frombuffer rejects an empty buffer
    text = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
    return {f"{name}.text": text, f"{name}.ends": ends}


class Index:
    """An index file with memory-mapped columns: cheap to open and cheap to send to a worker process."""

    def __init__(self, path: str | Path) -> None:
        """Opens an index; `InputError` if it is missing, of another version, or its data are no longer at its root."""
        self.path = Path(path)
        metadata = read_metadata(path)
        if metadata.get("index_version") != VERSION:
            found = metadata.get("index_version", "none")
            raise InputError(f"{path}: index version {found}, expected {VERSION}; run tools/prepare_data.py again")
        if missing := [key for key in ("source", "kind", "licence", "root") if key not in metadata]:
            raise InputError(f"{path}: its metadata lack {missing[0]}; run tools/prepare_data.py again")
        self.source, self.kind, self.licence = (metadata[key] for key in ("source", "kind", "licence"))
        self.root = Path(metadata["root"])
        if not self.root.is_dir():
            raise InputError(f"{path}: its data are not at {self.root}; put them there, or index them again")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_columns"}  # each worker maps its own

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        columns = map_columns(self.path)
        count = len(columns["layers"]) if "layers" in columns else -1
        found = {name: (values.dtype.type, values.ndim) for name, values in columns.items()}
        lengths = {len(columns[name]) for name in _PER_ROW if name in columns}
        if found != _COLUMNS or lengths != {count} or columns["size"].shape[1] != 2:
            raise InputError(f"{self.path} does not have the columns of an index; run tools/prepare_data.py again")
        return columns

    def __len__(self) -> int:
        return len(self._columns["layers"])

    def __getitem__(self, row: int) -> Item:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        width, height = self._columns["size"][row].tolist()
        layers, rotation = (int(self._columns[name][row]) for name in ("layers", "rotation"))
        try:
            item = Item(self._string("id", row), self._string("path", row), width, height, layers, rotation)
            _check_item(item, self.kind)
        except (ValueError, TypeError, AttributeError) as error:  # includes invalid UTF-8 and JSON
            raise InputError(f"{self.path}: row {row}: {error}; run tools/prepare_data.py again") from error
        return item

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    def _string(self, name: str, row: int) -> str:
        ends = self._columns[f"{name}.ends"]
        start = int(ends[row - 1]) if row else 0
        return self._columns[f"{name}.text"][start : int(ends[row])].tobytes().decode()

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2), width and height."""
        return self._columns["size"]

    def rows(self, split: str) -> NDArray[np.int32]:
        """The rows of a split, "train" or "test", in ascending order."""
        return self._columns[f"{split}.rows"]


def _check_item(item: Item, kind: str) -> None:
    """Raises `ValueError` for an invalid size or layer count, or an id or path outside the data's folder."""
    paths = list(json.loads(item.path).values()) if kind == "triplets" else [item.path]
    for name in (item.id, *paths):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise ValueError(f"{name!r} is not a path below a folder")
    if min(item.width, item.height) < 1 or (kind == "layered" and item.layers < 2):
        raise ValueError(f"{item.width} x {item.height} pixels in {item.layers} layers")


def map_columns(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file as memory-mapped arrays."""
    places = TensorFile(path).places
    if unknown := [place.dtype for place in places.values() if place.dtype not in _DTYPES]:
        raise InputError(f"{path} holds numbers of type {unknown[0]}; expected one of {', '.join(_DTYPES)}")
    return {name: _map_tensor(place) for name, place in places.items()}


_DTYPES = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_PER_ROW = ("id.ends", "path.ends", "size", "layers", "rotation")
_COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "id.text": (np.uint8, 1),
    "id.ends": (np.int64, 1),
    "path.text": (np.uint8, 1),
    "path.ends": (np.int64, 1),
    "size": (np.int32, 2),
    "layers": (np.int16, 1),
    "rotation": (np.int16, 1),
    "train.rows": (np.int32, 1),
    "test.rows": (np.int32, 1),
}


def _map_tensor(place: Place) -> NDArray[Any]:
    dtype = _DTYPES[place.dtype]
    if not all(place.shape):  # nothing to map
        return np.zeros(place.shape, dtype)
    return np.memmap(place.path, dtype, "r", place.start, place.shape)
