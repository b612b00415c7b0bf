"""Cache of encoded training samples on disk: for a small model, encoding is most of the cost of a step."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.files import source_sha256
from layerdecomp.tensor_files import open_safetensors, save_tensors

SOURCES = ("data/*.py", "imaging/*.py", "conditioning.py", "decomposer.py", "models/autoencoder.py")
ENCODING_SHA256 = source_sha256(*SOURCES)  # of the code that makes and encodes samples


class LatentCache:
    """A folder with one file per encoded sample, stored in half precision and loaded as float32.

    Runs, and the ranks of a run, may share it.

    Args:
        folder: parent of the cache, which has one subfolder per description.
        described: everything that the latents depend on, JSON-serialisable; a hash of the code in `SOURCES` is added.
    """

    def __init__(self, folder: str | Path, described: Mapping[str, Any]) -> None:
        text = json.dumps([described, ENCODING_SHA256], sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._known: set[int] = set()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:09d}.safetensors"

    def has(self, indices: Sequence[int]) -> bool:
        """Whether all of these samples are cached."""
        self._known |= {index for index in indices if index not in self._known and self._path(index).is_file()}
        return self._known.issuperset(indices)

    def load(self, index: int) -> dict[str, Tensor]:
        """The tensors of a sample; `InputError` if its file is damaged."""
        path = self._path(index)
        try:
            with open_safetensors(path) as file:
                return {name: _widened(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except InputError as error:
            raise InputError(f"latent_cache: {error}; or delete {path}, which will be encoded again") from error

    def add(self, indices: Sequence[int], encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Writes the samples of a batch, one row each, and returns the batch as `load` would.

        Raises `InputError` if the disk is full or not writable.
        """
        kept = {name: rows.half() if rows.is_floating_point() else rows for name, rows in encoded.items()}
        on_cpu = {name: rows.cpu() for name, rows in kept.items()}
        for row, index in enumerate(indices):
            try:
                save_tensors(self._path(index), {name: rows[row] for name, rows in on_cpu.items()}, {})
            except InputError as error:
                raise InputError(f"latent_cache: {error}, or train without one: latent_cache=null") from error
        return {name: _widened(rows) for name, rows in kept.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
