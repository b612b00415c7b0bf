"""The cache of encoded samples on disk: round trips, and when entries are not reused."""

from pathlib import Path

import pytest
import torch

from layerdecomp.data import latents
from layerdecomp.data.datamodule import DataConfig, RepeatedSamples, open_samples
from layerdecomp.data.latents import LatentCache
from layerdecomp.data.scenes import SceneConfig
from layerdecomp.errors import InputError
from layerdecomp.files import source_sha256


def _batch(count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"z": torch.randn(count, 4, 3, generator=generator), "hole": torch.rand(count, 1, 5) > 0.5}


def test_loaded_latents_equal_the_added_ones(tmp_path: Path) -> None:
    cache, batch = LatentCache(tmp_path, {"seed": 0}), _batch()
    assert not cache.has([7])
    added = cache.add([7, 3], batch)
    assert cache.has([3, 7]) and not cache.has([3, 4])
    assert added["z"].equal(batch["z"].half().float()) and added["hole"].equal(batch["hole"])
    for row, index in enumerate([7, 3]):
        loaded = LatentCache(tmp_path, {"seed": 0}).load(index)
        assert all(loaded[name].equal(added[name][row]) and loaded[name].dtype == added[name].dtype for name in added)


def test_other_settings_or_code_do_not_reuse_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LatentCache(tmp_path, {"seed": 0}).add([0, 1], _batch())
    assert LatentCache(tmp_path, {"seed": 0}).has([0, 1])
    assert not LatentCache(tmp_path, {"seed": 1}).has([0])
    monkeypatch.setattr(latents, "ENCODING_SHA256", "of changed files")
    assert not LatentCache(tmp_path, {"seed": 0}).has([0])


def test_the_cache_key_covers_the_code_that_makes_and_encodes_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, read_bytes = [""], Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read_bytes(path) + changed[0].encode() * (path.name in changed)
    )
    before = source_sha256(*latents.SOURCES)
    for name in ("scenes.py", "masks.py", "conditioning.py", "decomposer.py", "autoencoder.py"):
        changed[:] = [name]
        assert source_sha256(*latents.SOURCES) != before, name
    changed[:] = ["flow.py"]
    assert source_sha256(*latents.SOURCES) == before


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"latent_cache: .*file.* could not be written .*latent_cache=null"):
        LatentCache(tmp_path / "file", {}).add([0, 1], _batch())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, {})
    cache.add([0, 1], _batch())
    (damaged,) = cache.folder.glob("*1.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(InputError, match=f"{damaged}: truncated.*delete {damaged}"):
        cache.load(1)


def test_batches_come_from_the_cache_only_if_all_their_samples_are_there(tmp_path: Path) -> None:
    samples = open_samples(DataConfig(scenes=SceneConfig(size=32)), "train", seed=0, length=4, with_cues=False)
    cache = LatentCache(tmp_path, {})
    positions = RepeatedSamples(samples, cache)
    cache.add([2, 3], _batch())
    assert [set(sample) >= {"image", "position"} for sample in positions.__getitems__([5, 6])] == [True, True]
    found = positions.__getitems__([6, 7])
    assert [sample.keys() for sample in found] == [{"z", "hole", "index", "position", "faults"}] * 2
    assert [(sample["index"], sample["position"]) for sample in found] == [(2, 6), (3, 7)]
