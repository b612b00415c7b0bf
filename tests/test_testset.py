"""Test sets: export, reading back, and samples from the objects of layered images."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerdecomp.comparison import EvaluateConfig, export_test_set
from layerdecomp.data.datamodule import DataConfig
from layerdecomp.data.index import write_index
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.data.scenes import SceneConfig, Scenes
from layerdecomp.data.testset import TestFolder, drawn_samples, export_samples, seed_of, test_objects
from layerdecomp.data.triplets import TripletConfig, Triplets
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.cues import CUES, REGISTRY, compute_cues, resize_cues
from layerdecomp.imaging.geometry import resize, to_pixels, to_tensor
from layerdecomp.imaging.masks import MaskConfig
from layerdecomp.resizing import to_model_size
from layerdecomp.sampling import SampleConfig

SCENES = Scenes(SceneConfig(size=32), "test", 0, 3, with_cues=False)
EXACT = MaskConfig(**{kind: float(kind == "exact") for kind in vars(MaskConfig())})


def test_exported_scenes_are_read_back(tmp_path: Path) -> None:
    assert export_samples(drawn_samples(SCENES), tmp_path) == 3
    data = TestFolder(tmp_path)
    assert len(data) == 3 and data.names == ["00000", "00001", "00002"]
    for index in range(3):
        found, expected = data[index], SCENES[index]
        assert found["index"] == index
        for part in ("image", "mask", "background", "foreground", "occluder"):
            torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0.5 / 127.5 + 1e-6)
        assert found["cues"].shape == (len(CUES), 3, 32, 32)
        assert found["cues_present"].equal(torch.tensor([REGISTRY[cue].compute is not None for cue in CUES]))
    assert not TestFolder(tmp_path, with_cues=False)[0]["cues"].any()


def test_an_interrupted_export_resumes(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    kept, lost = tmp_path / "image" / "00000.png", tmp_path / "mask" / "00001.png"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    export_samples(drawn_samples(SCENES), tmp_path)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    assert len(list(tmp_path.rglob("*"))) == 5 + 15


def test_an_export_does_not_mix_test_sets(tmp_path: Path) -> None:
    data, config = DataConfig(scenes=SceneConfig(size=32)), EvaluateConfig(samples=2)
    assert export_test_set(data, config, tmp_path) == 2 == export_test_set(data, config, tmp_path)
    with pytest.raises(InputError, match="existing files were made with data_seed=1234, now it is 5"):
        export_test_set(data, replace(config, seed=5), tmp_path)
    with pytest.raises(InputError, match="made with count=2, now it is 1"):
        export_test_set(data, replace(config, samples=1), tmp_path)


def test_digests_distinguish_test_sets(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    digest = TestFolder(tmp_path / "one").digest()
    assert TestFolder(tmp_path / "copy").digest() == digest and len(digest) == 64
    shutil.copy(tmp_path / "one" / "mask" / "00000.png", tmp_path / "copy" / "mask" / "00001.png")
    assert TestFolder(tmp_path / "copy").digest() != digest
    for cue in CUES:
        (tmp_path / "one" / cue).mkdir()
        shutil.copy(tmp_path / "one" / "mask" / "00002.png", tmp_path / "one" / cue / "00002.png")
        assert (changed := TestFolder(tmp_path / "one").digest()) != digest
        digest = changed


def test_seeds_depend_only_on_the_name(tmp_path: Path) -> None:
    assert seed_of("00012") == 12 and seed_of("cat") == seed_of("cat") != seed_of("dog")
    assert 0 <= seed_of("a/b") < 2**32 and 0 <= seed_of("1" * 30) < 2**32
    export_samples(drawn_samples(SCENES), tmp_path)
    for path in tmp_path.glob("*/00000.png"):
        path.unlink()
    assert TestFolder(tmp_path, with_cues=False)[0]["index"] == 1


def test_a_folder_may_lack_foregrounds_and_occluders_but_nothing_else(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    shutil.rmtree(tmp_path / "foreground")
    shutil.rmtree(tmp_path / "occluder")
    sample = TestFolder(tmp_path)[0]
    assert "foreground" not in sample and not sample["occluder"].any()
    (tmp_path / "mask" / "00001.png").unlink()
    with pytest.raises(InputError, match="00001 has no mask"):
        TestFolder(tmp_path)
    shutil.rmtree(tmp_path / "mask")
    with pytest.raises(InputError, match="mask is not a folder"):
        TestFolder(tmp_path)
    with pytest.raises(InputError, match=r"data=absent is not a folder; expected one with image/, mask/"):
        TestFolder("absent")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    for path in tmp_path.glob("*/00001.png"):
        path.rename(path.with_name(os.fsdecode(b"\xe9.png")))
    with pytest.raises(InputError, match=r"'\\udce9' is not UTF-8; rename"):
        TestFolder(tmp_path)


def test_parts_of_another_size_are_named(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    path = tmp_path / "background" / "00002.png"
    Image.open(path).resize((20, 32)).save(path)
    with pytest.raises(InputError, match=r"00002.png is 20 x 32 pixels, its image 32 x 32"):
        TestFolder(tmp_path)[2]


def test_maps_of_the_folder_are_the_cues(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    levels = np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
    for cue in ("depth", "edge"):
        (tmp_path / cue).mkdir()
        Image.fromarray(levels).save(tmp_path / cue / "00000.png")
    sample = TestFolder(tmp_path)[0]
    assert sample["cues_present"].all()
    np.testing.assert_array_equal(
        sample["cues"][CUES.index("depth")], to_tensor(levels[..., None])[0].expand(3, 32, 32)
    )
    np.testing.assert_array_equal(
        sample["cues"][CUES.index("edge")][0], np.where(levels >= 128, 1, -1)
    )  # as in training


def test_cues_are_computed_at_the_size_that_a_model_sees(tmp_path: Path) -> None:
    for part, mode in (("image", "RGB"), ("background", "RGB"), ("mask", "L")):
        (tmp_path / part).mkdir()
        size = (96, 60, 3) if mode == "RGB" else (96, 60)
        levels = np.random.default_rng(3).integers(0, 256, size, np.uint8)
        Image.fromarray(levels).resize((120, 192)).save(tmp_path / part / "a.png")
    sample, whole = TestFolder(tmp_path, max_side=64)[0], TestFolder(tmp_path)[0]
    assert sample["image"].shape == (3, 192, 120) and sample["cues"].shape[-2:] == (64, 40)
    computed = torch.from_numpy(compute_cues(to_pixels(resize(whole["image"], (64, 40))))[0])
    assert sample["cues"].equal(computed)
    assert not resize_cues(whole["cues"][None], (64, 40))[0].equal(computed)
    (tmp_path / "edge").mkdir()
    Image.fromarray(np.eye(192, 120, dtype=np.uint8) * 255).save(tmp_path / "edge" / "a.png")
    shares = TestFolder(tmp_path, max_side=64)[0]["cues"][CUES.index("edge"), 0]
    assert shares.diagonal().min() == 1 and (shares == -1).float().mean() > 0.9
    model_sees = to_model_size(
        {name: values[None] for name, values in sample.items() if name != "index"}, SampleConfig(max_side=64)
    )
    assert model_sees["cues"][0, :, :, :64, :40].equal(sample["cues"])


def test_the_layout_of_rorem_is_read(tmp_path: Path) -> None:
    export_samples(drawn_samples(SCENES), tmp_path)
    for ours, theirs in (("image", "source"), ("background", "GT")):
        (tmp_path / ours).rename(tmp_path / theirs)
    names = [f"{position:05d}.png" for position in range(3)]
    records = [{"source": f"source/{name}", "mask": f"mask/{name}", "GT": f"GT/{name}"} for name in names]
    (tmp_path / "meta.json").write_text(json.dumps(records))
    data = TestFolder(tmp_path)
    assert data.names == ["00000", "00001", "00002"] and "foreground" not in data[0]
    torch.testing.assert_close(data[1]["background"], SCENES[1]["background"], rtol=0, atol=0.5 / 127.5 + 1e-6)
    other = {part: path.replace("/", "-too/") for part, path in records[1].items()}
    (tmp_path / "meta.json").write_text(json.dumps([*records, other]))
    with pytest.raises(InputError, match="share the name '00001'"):
        TestFolder(tmp_path)


@pytest.fixture
def mulan(tmp_path: Path) -> Path:
    """An index of three images with three layers, all in the test split; the second object of the last is tiny."""
    root = tmp_path / "mulan"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        for layer in range(3):
            rgba = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
            rgba[..., 3] = 255 if layer == 0 else 0
            if layer == 1:
                rgba[5:25, 5:35, 3] = 255
            if layer == 2:
                side = 1 if name == "c" else 20
                rgba[20 : 20 + side, 30 : 30 + side, 3] = 255
            Image.fromarray(rgba).save(root / f"{name}-layer_{layer}.png")
    reader = MulanLayers(root=root)
    items = [item for candidate in reader.candidates() if (item := reader.read(candidate)) is not None]
    assert len(items) == 3
    write_index(tmp_path / "index.safetensors", reader, items, test_share=1.0)
    return tmp_path / "index.safetensors"


def test_objects_of_the_right_area_are_used_all_or_one_per_image(mulan: Path) -> None:
    config = TripletConfig(layered=[str(mulan)], size=32, min_area=0.01, max_area=0.8, masks=EXACT)
    every = dict(test_objects(config, "all", stretch=True))
    assert sorted(every) == ["a-1", "a-2", "b-1", "b-2", "c-1"]
    single = dict(test_objects(config, "one", stretch=True))
    assert sorted(name[0] for name in single) == ["a", "b", "c"] and single.keys() <= every.keys()
    again = dict(test_objects(config, "one", stretch=True))
    assert list(again) == list(single) and all(again[name]["image"].equal(single[name]["image"]) for name in single)
    large = TripletConfig(layered=[str(mulan)], size=32, min_area=0.2, max_area=0.8, masks=EXACT)
    assert {name[2] for name, _ in test_objects(large, "all", stretch=True)} == {"1"}


def test_every_image_has_its_own_crop(mulan: Path) -> None:
    config = TripletConfig(layered=[str(mulan)], size=32, masks=EXACT)
    found = dict(test_objects(config, "all", stretch=False))
    for layer in (1, 2):  # a and b differ only in their colours
        assert not found[f"a-{layer}"]["foreground"][3].equal(found[f"b-{layer}"]["foreground"][3])


def test_a_sample_separates_an_object_from_its_image(mulan: Path) -> None:
    config = TripletConfig(layered=[str(mulan)], size=32, masks=EXACT)
    for stretch in (True, False):
        sample = dict(test_objects(config, "all", stretch))["a-1"]
        assert sample["image"].shape == (3, 32, 32)
        visible = sample["foreground"][3:] * (1 - sample["occluder"])
        assert torch.equal(sample["mask"] > 0, visible > 0.5 * visible.max())
        assert sample["occluder"].any() and sample["foreground"][3].mean() > visible.mean()
        unoccluded = sample["occluder"] == 0
        whole = over(sample["foreground"], sample["background"])
        torch.testing.assert_close((whole * unoccluded), (sample["image"] * unoccluded), rtol=0, atol=1e-5)
    cropped, stretched = (dict(test_objects(config, "all", stretch))["a-1"] for stretch in (False, True))
    assert not cropped["image"].equal(stretched["image"])


@pytest.mark.parametrize("objects", ["drawn", "one"])
def test_exported_objects_keep_their_cue_maps(mulan: Path, tmp_path: Path, objects: str) -> None:
    for cue in ("depth", "edge"):
        (tmp_path / "mulan" / cue).mkdir()
        for name in ("a", "b", "c"):
            levels = np.random.default_rng(ord(name)).integers(0, 256, (40, 60), dtype=np.uint8)
            Image.fromarray(levels).save(tmp_path / "mulan" / cue / f"{name}.png")
    config = TripletConfig(layered=[str(mulan)], size=32, masks=EXACT)
    samples = list(dict(test_objects(config, "one", stretch=False)).values())
    if objects == "drawn":
        samples = [Triplets(config, "test", 5, 3)[index] for index in range(3)]
    evaluate = EvaluateConfig(objects=objects, samples=3, seed=5)
    assert export_test_set(DataConfig(source="triplets", triplets=config), evaluate, tmp_path / "out") == len(samples)
    for found, expected in zip(TestFolder(tmp_path / "out"), samples, strict=True):
        assert found["cues_present"].all() and expected["cues_present"].all()
        torch.testing.assert_close(found["cues"], expected["cues"], rtol=0, atol=0.5 / 127.5 + 1e-6)


def test_missing_indexes_are_refused(mulan: Path) -> None:
    with pytest.raises(InputError, match="data.triplets.layered names no index"):
        next(test_objects(TripletConfig(), "one", stretch=False))
    with pytest.raises(InputError, match="does not exist"):
        next(test_objects(TripletConfig(layered=["absent.safetensors"]), "one", stretch=False))
