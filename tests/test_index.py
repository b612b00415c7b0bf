"""Indexes: round trips, splits, pickling, and files that are no indexes."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from layerdecomp.data.index import Index, Item, split_of, write_index
from layerdecomp.errors import InputError
from layerdecomp.tensor_files import save_tensors


@dataclass(frozen=True)
class _Reader:
    root: Path
    source: str = "somewhere"
    kind: str = "foregrounds"
    licence: str = "CC0"

    def candidates(self) -> list[str]:
        return []

    def read(self, candidate: str) -> Item | None:
        return None


def _items(count: int) -> list[Item]:
    rng = np.random.default_rng(0)
    return [
        Item(f"{i:05d}", f"a/ü{'x' * (i % 7)}/{i}.png", *rng.integers(1, 5000, 2).tolist(), i % 5, 90 * (i % 4))
        for i in range(count)
    ]


def test_a_round_trip_keeps_everything_sorted_by_id(tmp_path: Path) -> None:
    items = _items(50)
    assert write_index(tmp_path / "a.safetensors", _Reader(tmp_path), reversed(items)) == 50
    index = Index(tmp_path / "a.safetensors")
    assert list(index) == items and len(index) == 50
    assert (index.source, index.kind, index.licence, index.root) == ("somewhere", "foregrounds", "CC0", tmp_path)
    assert index.sizes.tolist() == [[item.width, item.height] for item in items]


def test_splits_partition_the_rows_by_id(tmp_path: Path) -> None:
    write_index(tmp_path / "a.safetensors", _Reader(tmp_path), _items(3000))
    index = Index(tmp_path / "a.safetensors")
    test, train = index.rows("test"), index.rows("train")
    assert sorted([*test, *train]) == list(range(3000))
    assert 0.01 < len(test) / 3000 < 0.03  # 2 %
    assert all(split_of(index[row].id) == "test" for row in test.tolist())
    write_index(tmp_path / "b.safetensors", _Reader(tmp_path), [index[int(row)] for row in test])
    assert len(Index(tmp_path / "b.safetensors").rows("train")) == 0
    write_index(tmp_path / "c.safetensors", _Reader(tmp_path), _items(10), test_share=0.5)
    # the same in every process and version: another split of prepared data would leak
    assert Index(tmp_path / "c.safetensors").rows("test").tolist() == [2, 5, 6, 9]


def test_an_index_can_be_opened_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    write_index("a.safetensors", _Reader(Path("pictures")), _items(2))
    monkeypatch.chdir("pictures")
    assert Index("../a.safetensors").root == tmp_path / "pictures"


def test_a_pickled_index_leaves_out_its_columns(tmp_path: Path) -> None:
    write_index(tmp_path / "a.safetensors", _Reader(tmp_path), _items(3000))
    index = Index(tmp_path / "a.safetensors")
    assert index[7] == _items(8)[7] and len(index.sizes) == 3000  # memory-maps its columns
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[2999] == _items(3000)[2999]


def test_an_empty_index_is_valid(tmp_path: Path) -> None:
    assert write_index(tmp_path / "a.safetensors", _Reader(tmp_path), []) == 0
    index = Index(tmp_path / "a.safetensors")
    assert list(index) == [] and index.rows("train").tolist() == []
    with pytest.raises(IndexError):
        index[0]


def test_two_items_with_the_same_id_are_named(tmp_path: Path) -> None:
    twice = [Item("1", "a.png", 4, 4), Item("2", "b.png", 4, 4), Item("1", "c.jpg", 4, 4)]
    with pytest.raises(InputError, match=r"a\.png and c\.jpg have the same id 1"):
        write_index(tmp_path / "a.safetensors", _Reader(tmp_path), twice)
    assert not (tmp_path / "a.safetensors").exists()


def test_an_index_of_missing_data_is_refused(tmp_path: Path) -> None:
    gone = replace(_Reader(tmp_path), root=tmp_path / "gone")
    write_index(tmp_path / "a.safetensors", gone, _items(2))
    with pytest.raises(InputError, match=r"a\.safetensors: its data are not at .*gone; .*index them again"):
        Index(tmp_path / "a.safetensors")


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="index version none, expected 2"):
        Index(tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        Index(tmp_path / "missing.safetensors")
    write_index(tmp_path / "a.safetensors", _Reader(tmp_path), _items(20))
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="truncated"):
        Index(tmp_path / "a.safetensors")
