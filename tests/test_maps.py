"""Precomputed cue maps: their content, their paths, and that each is computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill
from PIL import Image
from safetensors.torch import save_file

from layerdecomp.data.folders import BackgroundFolder, TripletFolder
from layerdecomp.data.index import Index, Reader
from layerdecomp.data.loading import Crop, load_maps, map_path
from layerdecomp.data.maps import open_estimator, write_maps
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.data.prepare import prepare
from layerdecomp.errors import InputError
from layerdecomp.imaging.cues import REGISTRY, Cue, edge_map, resize_segments, segmentation_map
from layerdecomp.models.depth import DepthConfig, DepthEstimator, published_names

SMALL = DepthConfig(
    image_size=56, embed_dim=24, depth=6, num_heads=3, feature_blocks=[0, 2, 3, 4], neck_widths=[6, 8, 10, 12]
)


def write_depth_file(path: Path, config: DepthConfig) -> Path:
    """Random weights under the published names."""
    model = DepthEstimator(config)
    fill(model, seed=0)
    model.head.conv3.bias.data.fill_(5.0)  # a depth is never negative
    tensors = {}
    for name, tensor in model.state_dict().items():
        names = published_names(name)
        tensors |= {part: chunk.clone() for part, chunk in zip(names, tensor.chunk(len(names)), strict=True)}
    save_file(tensors, path)
    return path


@pytest.fixture
def depth_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a small estimator that replaces the published one."""
    monkeypatch.setattr("layerdecomp.weights.DepthConfig", lambda: SMALL)
    return write_depth_file(tmp_path / "depth.safetensors", SMALL)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def triplets(root: Path) -> tuple[Reader, dict[str, np.ndarray]]:
    """Nested triplets of different sizes, and their images by id."""
    rng, images = np.random.default_rng(0), {}
    for i in range(3):
        image = images[f"deep/{i}"] = picture(rng, 40 + i, 60)
        alpha = np.zeros(image.shape[:2], np.uint8)
        alpha[10:30, 10:30] = 255
        parts = {"image": image, "mask": alpha, "foreground": np.dstack([image, alpha]), "background": image[::-1]}
        for part, pixels in parts.items():
            (root / part / "deep").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(root / part / "deep" / f"{i}.png")
    return TripletFolder(root), images


def layered(root: Path) -> tuple[Reader, dict[str, np.ndarray]]:
    rng, images = np.random.default_rng(0), {}
    for i in range(3):
        behind, front = picture(rng, 40 + i, 60), picture(rng, 40 + i, 60)
        alpha = np.where(np.arange(60) < 30, 255, 0).astype(np.uint8) * np.ones((40 + i, 1), np.uint8)
        Image.fromarray(np.dstack([behind, np.full_like(alpha, 255)])).save(root / f"{i}-layer_0.png")
        Image.fromarray(np.dstack([front, alpha])).save(root / f"{i}-layer_1.png")
        images[str(i)] = np.where(alpha[..., None] > 0, front, behind)
    return MulanLayers(root), images


@pytest.fixture(params=["triplets", "layered"])
def indexed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Index, dict[str, np.ndarray]]:
    (tmp_path / "data").mkdir()
    reader, images = (triplets if request.param == "triplets" else layered)(tmp_path / "data")
    prepare(reader, tmp_path / "index.safetensors")
    return Index(tmp_path / "index.safetensors"), images


@pytest.mark.parametrize("workers", [1, 2])
def test_every_map_equals_its_estimate_and_is_computed_once(
    indexed: tuple[Index, dict[str, np.ndarray]], depth_file: Path, workers: int
) -> None:
    index, images = indexed
    items = list(index)
    kept = map_path(index.root, items[1], "edge")  # the user's own
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"mine")
    assert write_maps(index, ["edge", "segmentation", "depth"], depth_file, workers) == []
    assert kept.read_bytes() == b"mine"
    kept.unlink()
    estimator = open_estimator(depth_file)
    for item in (items[0], items[2]):
        image = images[item.id]
        tensor = torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None]
        depth = estimator.estimate(tensor)[0].numpy()
        expected = {"edge": edge_map(image), "segmentation": segmentation_map(image), "depth": depth}
        for cue, values in expected.items():
            with Image.open(map_path(index.root, item, cue)) as file:
                found = np.asarray(file.convert("RGB")).transpose(2, 0, 1) / 127.5 - 1
            assert file.size == (item.width, item.height) and np.abs(found - values).max() < 0.01
            assert np.ptp(found) > 0.1, f"{cue} shows nothing"
    before = {path: path.stat().st_mtime_ns for path in index.root.rglob("*.png")}
    assert write_maps(index, ("depth", "segmentation"), depth_file, workers) == []
    assert {path: path.stat().st_mtime_ns for path in index.root.rglob("*.png")} == before
    assert not list(index.root.rglob("*.partial"))


def test_a_cue_of_your_own_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(image: np.ndarray) -> np.ndarray:
        return (image[None, ..., 0] / 127.5 - 1).astype(np.float32)

    monkeypatch.setitem(REGISTRY, "red", Cue(red, resize_segments))
    reader, images = triplets(tmp_path / "data")
    prepare(reader, tmp_path / "index.safetensors")
    index = Index(tmp_path / "index.safetensors")
    assert write_maps(index, ["red"]) == []
    for item in index:
        maps = load_maps(index, item, Crop((item.width, item.height), (0, 0, 30, 30), (15, 15)))
        assert maps.keys() == {"red"}
        np.testing.assert_allclose(maps["red"].numpy(), red(images[item.id][1:30:2, 1:30:2]).repeat(3, 0), atol=1e-6)


def test_a_cue_without_a_function_must_be_supplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "normals", Cue(None, resize_segments))
    reader, _ = triplets(tmp_path / "data")
    prepare(reader, tmp_path / "index.safetensors")
    with pytest.raises(InputError, match="normals is not computed here; put its maps into .*data/normals"):
        write_maps(Index(tmp_path / "index.safetensors"), ["normals"])


def test_maps_are_not_indexed_as_pictures(indexed: tuple[Index, dict[str, np.ndarray]], tmp_path: Path) -> None:
    index, _ = indexed
    write_maps(index, ["edge", "segmentation"])
    reader = MulanLayers(index.root) if index.kind == "layered" else TripletFolder(index.root)
    prepare(reader, tmp_path / "again.safetensors")
    assert list(Index(tmp_path / "again.safetensors")) == list(index)


def test_an_unreadable_picture_does_not_stop_the_others(tmp_path: Path) -> None:
    reader, _ = triplets(tmp_path / "data")
    prepare(reader, tmp_path / "index.safetensors")
    (tmp_path / "data/image/deep/1.png").write_bytes(b"no picture")
    (fault,) = write_maps(Index(tmp_path / "index.safetensors"), ["edge"])
    assert fault.startswith("deep/1: ") and "cannot be read as an image" in fault
    assert sorted(path.name for path in (tmp_path / "data/edge/deep").iterdir()) == ["0.png", "2.png"]


def test_invalid_requests_are_refused(tmp_path: Path) -> None:
    reader, _ = triplets(tmp_path / "data")
    prepare(reader, tmp_path / "index.safetensors")
    prepare(BackgroundFolder(tmp_path / "data/image"), tmp_path / "backgrounds.safetensors")
    index = Index(tmp_path / "index.safetensors")
    with pytest.raises(InputError, match="found 'depths', expected some of edge, segmentation, depth"):
        write_maps(index, ["edge", "depths"])
    with pytest.raises(InputError, match="is an index of backgrounds; expected layered or triplets"):
        write_maps(Index(tmp_path / "backgrounds.safetensors"), ["edge"])
    missing = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors does not exist; put .*Depth-Anything-V2-Small-hf"):
        write_maps(index, ["depth"], missing)
    save_file({"head.conv1.weight": torch.zeros(1)}, missing)
    with pytest.raises(InputError, match="does not fit this DepthEstimator"):
        write_maps(index, ["depth"], missing)
    assert not (tmp_path / "data/depth").exists()
    (tmp_path / "data/edge").write_text("in the way")
    with pytest.raises(InputError, match="edge/deep/0.png could not be written"):
        write_maps(index, ["edge"])
