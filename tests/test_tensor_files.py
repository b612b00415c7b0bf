"""Safetensors files: every kind of damage, and writes that leave no partial file."""

import os
import re
import struct
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import same
from safetensors.torch import load_file
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.tensor_files import DTYPES, TensorFile, empty, read_metadata, save_tensors, write_tensors
from layerdecomp.weights import load_autoencoder, load_mmdit


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _spans(part: str, address: int) -> bool:
    """Whether the last mapping described in a part of smaps contains an address."""
    (*_, (start, end)) = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", part, re.MULTILINE)
    return int(start, 16) <= address < int(end, 16)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 1000, 5000, 0.5, -1])
def test_truncated_files_are_refused(tiny_weights: Path, tmp_path: Path, length: float) -> None:
    content = (tiny_weights / "transformer.safetensors").read_bytes()
    length = int(length * len(content)) if 0 < length < 1 else int(length) % len(content)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[:length])
    with pytest.raises(InputError, match="only|cut off|truncated") as error:
        load_mmdit(path)
    assert str(path) in str(error.value) and f"{length:,} bytes" in str(error.value)
    if length > len(content) // 3:
        assert f"truncated: {length:,} bytes found, {len(content):,} expected" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 9,
        b"\x80\x02}q\x00." * 50,
        b"\xff" * 100,
        _with_header(b"[1, 2]"),
        _with_header(b"7"),
        _with_header(b'{"a": 1}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", "y"]}}'),
        _with_header(b'{"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    ],
    ids=["bytes", "pickle", "ff", "list", "number", "no entry", "offsets", "dtype"],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"a\.safetensors: (not a safetensors file|damaged).*download or export it again"
    ):
        read_metadata(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.safetensors does not exist; put the file there"):
        load_mmdit(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="is a folder; expected one .safetensors file"):
        read_metadata(tmp_path)
    with pytest.raises(InputError, match="holds 0 .safetensors files and no .*index.json; expected a diffusers folder"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(("content", "kind"), [(b"GGUF" + bytes(99), "a GGUF file"), (b"PK\x03\x04" * 99, "a pickled")])
def test_other_weight_formats_are_recognised(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"a.safetensors: {kind}"):
        load_mmdit(tmp_path / "a.safetensors")


def test_a_file_truncated_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(9)}, {})
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"a\.safetensors: truncated: .* bytes found"):
        file.read("x")


def test_dtypes_that_torch_lacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_with_header(b'{"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}') + bytes(3))
    with pytest.raises(InputError, match=r"a\.safetensors: tensors of F6_E2M3 are not supported; expected F64, F32"):
        TensorFile(path).read("x")


def test_large_tensors_request_huge_pages() -> None:
    """Tests only that they are requested: the mapping has the flag hg."""
    tensor = empty((1 << 23, 2), torch.uint8).fill_(1)
    assert tensor.shape == (1 << 23, 2) and tensor.sum() == 1 << 24
    parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (flags,) = [flags.splitlines()[0] for part, flags in pairwise(parts) if _spans(part, tensor.data_ptr())]
    assert " hg" in flags
    with mock.patch("layerdecomp.tensor_files.mmap.mmap", side_effect=AssertionError):  # not for a small tensor
        small = empty((1 << 16, 2), torch.uint8).fill_(1)
    assert small.shape == (1 << 16, 2) and small.sum() == 1 << 17


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path, new = tmp_path / "a.safetensors", {"x": torch.zeros(3), "y": torch.zeros(3)}
    save_tensors(path, {"x": torch.ones(3)}, {})
    before, read = path.read_bytes(), []

    def full_disk(name: str) -> Tensor:
        read.append(name)
        if name == "y":
            raise OSError(28, "No space left on device")
        return new[name]

    with pytest.raises(InputError, match=r"a\.safetensors could not be written .*free some space"):
        write_tensors(path, new, full_disk, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path] and read == ["x", "y"]


def test_written_files_are_read_by_safetensors_and_do_not_depend_on_order(tmp_path: Path) -> None:
    drawn = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0))
    tensors = {f"{dtype}": drawn.to(dtype) for dtype in DTYPES}
    tensors |= {"number": torch.tensor(2.5), "nothing": torch.zeros(0, 4), "z\u00fcg": torch.ones(7).half()}
    metadata = {"z": "1", "a": 'quote " and \u00fc'}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    assert read_metadata(tmp_path / "a.safetensors") == metadata
    shuffled = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    save_tensors(tmp_path / "b.safetensors", *shuffled)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "taken" / "a.safetensors", tmp_path / "taken" / "b" / "a.safetensors", tmp_path / "folder"):
        with pytest.raises(InputError, match="could not be written"):
            save_tensors(path, {"x": torch.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_views_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "a.safetensors", {"x": tensor.T, "y": tensor[:1]}, {})
    assert same(load_file(tmp_path / "a.safetensors"), {"x": tensor.T, "y": tensor[:1]})
