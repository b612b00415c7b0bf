"""Triplets from small data sets on disk: layered pictures, cut-outs over backgrounds, ready triplets."""

import json
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from layerdecomp.config import load_config
from layerdecomp.data.blending import BlendingConfig
from layerdecomp.data.datamodule import DataConfig, RepeatedSamples, SampleData, StepSampler, collate
from layerdecomp.data.folders import PARTS, BackgroundFolder, TripletFolder
from layerdecomp.data.index import Index
from layerdecomp.data.layerdiffuse import ForegroundFolder, pad_colours
from layerdecomp.data.loading import Crop, load_maps, map_path
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.data.prepare import prepare
from layerdecomp.data.triplets import Rows, TripletConfig, Triplets, scene_around
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.geometry import to_tensor
from layerdecomp.imaging.masks import MaskConfig
from layerdecomp.training.runs import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

NO_BLENDING = BlendingConfig(light=0, blur=0, grain=0, jpeg=0)
EXACT = MaskConfig(**{name: float(name == "exact") for name in vars(MaskConfig())})


def noise(rng: np.random.Generator, height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    """Smooth random colours, (height, width, 3)."""
    small = rng.integers(low, high, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return (np.clip(radius - distance + 0.5, 0, 1) * 255).astype(np.uint8)


def rgba(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=-1))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes of one data set per kind, with one third of the items in the test split."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name in ("layered", "cutouts", "backgrounds", *(f"triplets/{part}" for part in ("image", "mask"))):
        (root / name).mkdir(parents=True)
    for part in ("foreground", "background"):
        (root / "triplets" / part).mkdir()
    for i in range(12):
        wide = i % 2 == 0
        height, width = (80, 120) if wide else (120, 80)
        Image.fromarray(noise(rng, height, width)).save(root / "backgrounds" / f"{i}.jpg", quality=95)
        rgba(noise(rng, 70, 50), disc(70, 50, (30, 25), 20)).save(root / "cutouts" / f"{i}.png")
        opaque = np.full((height, width), 255, np.uint8)
        rgba(noise(rng, height, width), opaque).save(root / "layered" / f"{i}-layer_0.png")
        for k, centre in enumerate([(40, 40), (50, 55)], start=1):
            rgba(noise(rng, height, width), disc(height, width, centre, 18)).save(
                root / "layered" / f"{i}-layer_{k}.png"
            )
        clean, alpha = noise(rng, height, width), disc(height, width, (40, 40), 25)
        thing = noise(rng, height, width)
        image = thing * (alpha[..., None] / 255) + clean * (1 - alpha[..., None] / 255)
        Image.fromarray(image.round().astype(np.uint8)).save(root / "triplets/image" / f"{i}.png")
        Image.fromarray(alpha).save(root / "triplets/mask" / f"{i}.png")
        rgba(thing, alpha).save(root / "triplets/foreground" / f"{i}.png")
        Image.fromarray(clean).save(root / "triplets/background" / f"{i}.png")
    readers = {
        "layered": MulanLayers(root / "layered"),
        "foregrounds": ForegroundFolder(root / "cutouts", min_side=16),
        "backgrounds": BackgroundFolder(root / "backgrounds"),
        "folders": TripletFolder(root / "triplets"),
    }
    for name, reader in readers.items():
        prepare(reader, root / f"{name}.safetensors", test_share=0.34)
    return root


def config(sets: Path, *kinds: str, **changes: Any) -> TripletConfig:
    names = {"layered": ["layered"], "pasted": ["foregrounds", "backgrounds"], "folders": ["folders"]}
    files = {name: [str(sets / f"{name}.safetensors")] for kind in kinds for name in names[kind]}
    settings = {"size": 64, "masks": EXACT, "blending": NO_BLENDING, "flip": 0.0, **changes}
    return TripletConfig(**files, **settings)


def samples(settings: TripletConfig, count: int = 8, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    data = Triplets(settings, split, seed=3, length=count, with_cues=False, **options)
    return [data[i] for i in range(count)]


@pytest.mark.parametrize("kind", ["layered", "pasted", "folders"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_layers_composite_to_the_image(sets: Path, kind: str, split: str) -> None:
    for sample in samples(config(sets, kind), split=split):
        image, foreground, background = (sample[name] for name in ("image", "foreground", "background"))
        assert image.shape == background.shape == (3, 64, 64) and foreground.shape == (4, 64, 64)
        free = (sample["occluder"] == 0).expand_as(image)
        composite = over(foreground, background)
        difference = (image - composite)[free].abs()
        if kind == "folders":  # its image is an 8-bit file that is resized separately
            assert difference.mean() < 0.005 and difference.max() < 0.2
        else:
            assert difference.max() < 1e-5
        assert image.std() > 0.05 and not image.equal(background)
        visible = foreground[3:] * (1 - sample["occluder"])
        differ = sample["mask"].bool() != (visible > 0.5 * visible.max())
        assert differ.float().mean() < (0.01 if kind == "folders" else 1e-9)
        assert pad_colours(foreground).equal(foreground), "colours under alpha 0 are padded from visible ones"


def test_ready_triplets_keep_their_image_and_mask(tmp_path: Path) -> None:
    """The image has a shadow that no layer has, and the mask omits a hidden part."""
    for part in PARTS:
        (tmp_path / part).mkdir()
    rng = np.random.default_rng(0)
    clean, thing, alpha = noise(rng, 64, 64, 120), noise(rng, 64, 64), disc(64, 64, (32, 32), 14)
    image = np.where(alpha[..., None] > 127, thing, clean)
    image[50:, :32] //= 2
    mask = np.where(np.arange(64) < 40, alpha, 0).astype(np.uint8)
    for part, picture in zip(PARTS, (image, mask, None, clean), strict=True):
        if picture is not None:
            Image.fromarray(picture).save(tmp_path / part / "a.png")
    rgba(thing, alpha).save(tmp_path / "foreground" / "a.png")
    prepare(TripletFolder(tmp_path), tmp_path / "index.safetensors", test_share=0)
    settings = TripletConfig(folders=[str(tmp_path / "index.safetensors")], size=64, masks=EXACT, flip=0)
    plain = samples(replace(settings, blending=NO_BLENDING), 1)[0]
    assert plain["image"].equal(to_tensor(image)[0]) and plain["background"].equal(to_tensor(clean)[0])
    assert plain["mask"][0].numpy().astype(bool).tolist() == (mask >= 128).tolist()
    grainy = samples(replace(settings, flip=1, blending=replace(NO_BLENDING, grain=1)), 1)[0]
    for name in ("image", "background"):
        assert 0.003 < (grainy[name].flip(-1) - plain[name]).abs().mean() < 0.1
    assert grainy["mask"].flip(-1).equal(plain["mask"])


def test_an_object_that_is_faint_everywhere_is_skipped(tmp_path: Path) -> None:
    """Its exact mask would be the whole image, although its alpha covers less than `max_area`."""
    rng = np.random.default_rng(0)
    for k, alpha in enumerate((np.full((64, 64), 255, np.uint8), rng.integers(100, 160, (64, 64), dtype=np.uint8))):
        rgba(noise(rng, 64, 64), alpha).save(tmp_path / f"a-layer_{k}.png")
    prepare(MulanLayers(tmp_path), tmp_path / "index.safetensors", test_share=0)
    with pytest.raises(InputError, match="16 pictures in a row"):
        samples(TripletConfig(layered=[str(tmp_path / "index.safetensors")], size=64), 1)


def test_a_held_out_picture_without_a_large_enough_object_is_replaced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, radius in (("a", 1), ("b", 20)):
        Image.fromarray(noise(rng, 64, 64)).save(tmp_path / f"{name}-layer_0.png")
        rgba(noise(rng, 64, 64), disc(64, 64, (32, 32), radius)).save(tmp_path / f"{name}-layer_1.png")
    prepare(MulanLayers(tmp_path), tmp_path / "index.safetensors", test_share=1)
    settings = TripletConfig(layered=[str(tmp_path / "index.safetensors")], size=64)
    assert all(sample["mask"].mean() > 0.1 for sample in samples(settings, 2, split="test"))


@pytest.mark.parametrize("kind", ["layered", "folders"])
def test_cue_maps_in_folders_are_cropped_and_flipped_like_the_image(sets: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(sets, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / ("layered" if kind == "layered" else "triplets")
    reader = MulanLayers(folder) if kind == "layered" else TripletFolder(folder)
    prepare(reader, tmp_path / f"{kind}.safetensors", test_share=0.34)
    settings = config(tmp_path, kind, cue_dropout=0.0, flip=0.5)
    before = [Triplets(settings, "train", 3, 4)[i] for i in range(4)]
    assert not any(sample["cues_present"][2] or sample["cues"][2].any() for sample in before)
    index = Index(tmp_path / f"{kind}.safetensors")
    for item in index:  # the background as cue map, so that the crops can be compared
        part = item.path.format(layer=0) if kind == "layered" else json.loads(item.path)["background"]
        for cue in ("depth", "segmentation"):
            (folder / cue).mkdir(exist_ok=True)
            Image.open(folder / part).convert("RGB").save(map_path(folder, item, cue))
    data = Triplets(settings, "train", 3, 4)
    for i in range(4):
        sample = data[i]
        assert sample["cues_present"].all()
        for cue, limit in ((1, 0.03), (2, 0.01)):  # layers occlude some of it; segments use the nearest pixel
            assert (sample["cues"][cue] - sample["background"]).abs().median() < limit
            assert (sample["cues"][cue].flip(-1) - sample["background"]).abs().median() > 0.05
        assert sample["cues"][0].equal(before[i]["cues"][0]), "edges are computed"
        assert sample["image"].equal(before[i]["image"])


def test_a_16_bit_map_is_read_and_an_invalid_one_is_refused(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "triplets", tmp_path / "triplets")
    prepare(TripletFolder(tmp_path / "triplets"), tmp_path / "folders.safetensors", test_share=0)
    index = Index(tmp_path / "folders.safetensors")
    path = map_path(index.root, index[0], "depth")
    path.parent.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (index[0].height, index[0].width))
    Image.fromarray((levels * 257).astype(np.uint16)).save(path)
    crop = Crop((index[0].width, index[0].height), (0, 0, 64, 64), (64, 64))
    maps = load_maps(index, index[0], crop)
    assert maps.keys() == {"depth"}
    expected = torch.from_numpy(levels[:64, :64] / 127.5 - 1).float().expand(3, 64, 64)
    torch.testing.assert_close(maps["depth"], expected, atol=1e-6, rtol=0)
    Image.fromarray(levels[:-1].astype(np.uint8)).save(path)
    with pytest.raises(InputError, match=r"depth/.*its picture 120 x 80; expected equal sizes"):
        load_maps(index, index[0], crop)
    path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read as an image"):
        load_maps(index, index[0], crop)


def test_cues_are_dropped_only_in_training(sets: Path) -> None:
    settings = config(sets, "pasted", cue_dropout=0.5)
    present = torch.stack([Triplets(settings, "train", 3, 32)[i]["cues_present"] for i in range(32)])
    assert 8 < present[:, 0].sum() < 24 and 8 < present[:, 1].sum() < 24 and not present[:, 2].any()
    assert Triplets(settings, "test", 3, 1)[0]["cues_present"][:3].tolist() == [True, True, False]


def test_layers_above_the_chosen_one_cover_it_and_stay_in_the_background(sets: Path) -> None:
    covered = [sample for sample in samples(config(sets, "layered"), 16) if sample["occluder"].any()]
    assert 2 < len(covered) < 14
    for sample in covered:
        front = (sample["occluder"] == 1).expand_as(sample["image"])
        assert front.any() and (sample["image"] - sample["background"])[front].abs().max() < 1e-5
        hidden = sample["foreground"][3:] * sample["occluder"]
        assert hidden.sum() > 0, "the foreground is complete"


def test_cut_outs_are_complete_and_vary_in_place_and_size(sets: Path) -> None:
    mattes = torch.stack([sample["foreground"][3] for sample in samples(config(sets, "pasted"), 16)])
    assert (mattes.sum((1, 2)) > 0).all() and mattes.mean((1, 2)).std() > 0.02
    ring = torch.cat([mattes[:, 0], mattes[:, -1], mattes[:, :, 0], mattes[:, :, -1]], dim=1)
    assert ring.mean() < 0.05
    assert len({tuple(matte.flatten().argmax().reshape(1).tolist()) for matte in mattes}) > 8


def test_a_second_cut_out_sometimes_occludes_the_first(sets: Path) -> None:
    never, always = (config(sets, "pasted", occluder_probability=share) for share in (0.0, 1.0))
    assert not any(sample["occluder"].any() for sample in samples(never))
    covered = [sample for sample in samples(always, 16) if sample["occluder"].any()]
    assert len(covered) > 12, "nearly always, if asked for"
    for sample in covered:  # partly hidden: some of it has to be completed, from the rest
        alpha = sample["foreground"][3]
        assert 0.05 <= (alpha * sample["occluder"][0]).sum() / alpha.sum() <= 0.5


def test_kinds_are_mixed_by_weight(sets: Path) -> None:
    mixed = config(sets, "layered", "pasted", "folders", layered_weight=3, folders_weight=0, occluder_probability=0)
    kinds = Triplets(mixed, "train", 0, 1).kinds
    assert kinds == {"layered": 0.75, "pasted": 0.25}
    layered = sum(bool(sample["occluder"].any()) for sample in samples(mixed, 24))
    assert 3 < layered < 18  # about half of the layered ones


def test_a_sample_depends_only_on_seed_split_and_index(sets: Path) -> None:
    settings = config(sets, "layered", "pasted", blending=BlendingConfig(1, 1, 1, 1))
    data = Triplets(settings, "train", 5, 10, with_cues=True)
    again = pickle.loads(pickle.dumps(data))[4]
    assert all(torch.equal(again[name], value) for name, value in data[4].items() if name != "index")
    for other in (Triplets(settings, "train", 6, 10)[4], Triplets(settings, "test", 5, 10)[4], data[3]):
        assert not other["image"].equal(data[4]["image"])


def test_samples_do_not_depend_on_workers_or_resuming(sets: Path) -> None:
    settings = config(sets, "layered", "pasted", "folders", aspects=[1.0, 1.5], blending=BlendingConfig(1, 1, 1, 1))
    positions = RepeatedSamples(Triplets(settings, "train", 5, 1000, group=2))

    def batches(workers: int, **place: int) -> list[dict[str, Any]]:
        sampler = StepSampler(steps=4, batch_size=2, **place)
        return list(DataLoader(positions, batch_sampler=sampler, num_workers=workers, collate_fn=collate))

    alone = batches(0, first=0, rank=1, world_size=2)
    assert [batch["position"] for batch in alone] == [[2, 3], [6, 7], [10, 11], [14, 15]]
    for others in (batches(2, first=0, rank=1, world_size=2), batches(1, first=2, rank=1, world_size=2)):
        for batch, other in zip(alone[-len(others) :], others, strict=True):
            for name, values in batch.items():
                assert values.equal(other[name]) if isinstance(values, torch.Tensor) else values == other[name]


def test_every_index_has_items_in_both_splits(sets: Path) -> None:
    for name in ("layered", "foregrounds", "backgrounds", "folders"):
        index = Index(sets / f"{name}.safetensors")
        assert len(index.rows("test")) > 0 and len(index.rows("train")) > 0


@pytest.mark.parametrize(("kind", "name"), [("layered", "layered"), ("pasted", "backgrounds"), ("folders", "folders")])
def test_held_out_pictures_are_used_in_order(sets: Path, kind: str, name: str) -> None:
    index = Index(sets / f"{name}.safetensors")
    held_out = [index[row].id for row in index.rows("test")]
    data = Triplets(config(sets, kind, min_area=0.0), "test", seed=3, length=2 * len(held_out))
    assert [data.name(i).split(" + ")[0] for i in range(len(data))] == 2 * held_out
    assert data.pictures == len(held_out) > 1
    train = Triplets(config(sets, kind), "train", seed=3, length=8)
    assert [train.name(i) for i in range(8)] != [index[row].id for row in index.rows("train")][:8]


@pytest.mark.parametrize("kind", ["layered", "pasted"])
def test_the_samples_of_a_group_share_a_bucket_that_varies_between_groups(sets: Path, kind: str) -> None:
    settings = config(sets, kind, aspects=[1.5, 0.6667])
    assert settings.buckets() == [(48, 80), (80, 48)]
    shapes = [tuple(sample["image"].shape[1:]) for sample in samples(settings, 24, group=4)]
    groups = [set(shapes[start : start + 4]) for start in range(0, 24, 4)]
    assert all(len(group) == 1 for group in groups)
    assert set.union(*groups) == {(48, 80), (80, 48)}
    assert {tuple(sample["image"].shape[1:]) for sample in samples(settings, 6)} == {(48, 80)}
    data = Triplets(settings, "train", seed=3, length=24, with_cues=False, group=4)
    for index in range(0, 24, 2):  # pictures of even number are wide
        picture = int(data.name(index).split(" + ")[0])
        assert (picture % 2 == 0) is (shapes[index] == (48, 80)), "expected a picture that needs little cropping"


def test_loaders_give_batches_of_one_size(sets: Path) -> None:
    triplets = config(sets, "pasted", aspects=[1.5, 0.6667])
    data = DataConfig(source="triplets", samples=8, validation=2, workers=0, triplets=triplets)
    module = SampleData(data, seed=0, steps=4, batch_size=4, with_cues=False)
    trainer = {"global_step": 0, "global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1}
    module.trainer = type("Trainer", (), trainer)()
    assert [len(batch["image"]) for batch in module.train_dataloader()] == [4] * 4
    with pytest.raises(InputError, match=r"data\.samples is 9; expected a multiple of the samples per step, 4"):
        SampleData(replace(data, samples=9), seed=0, steps=4, batch_size=4, with_cues=False)


def test_all_samples_of_a_step_have_one_size(sets: Path) -> None:
    data = DataConfig(source="triplets", samples=64, workers=0, triplets=config(sets, "pasted", aspects=[1.5, 0.6667]))
    module = SampleData(data, seed=0, steps=8, batch_size=2, with_cues=False, global_batch=8)
    sizes = [module.training[index]["image"].shape for index in range(64)]
    assert all(len(set(sizes[step : step + 8])) == 1 for step in range(0, 64, 8)) and len(set(sizes)) == 2


@pytest.mark.parametrize("kinds", [["layered"], ["pasted"], ["folders"]])
def test_a_log_names_the_items_of_a_sample(sets: Path, kinds: list[str]) -> None:
    data = Triplets(config(sets, *kinds), "train", seed=0, length=4)
    names = [data.name(index) for index in range(4)]
    assert all(names) and len(set(names)) > 1
    assert all((" + " in name) is (kinds == ["pasted"]) for name in names)


def test_a_sample_with_unreadable_files_is_replaced_and_named(sets: Path, tmp_path: Path) -> None:
    settings = config(sets, "layered", size=32)
    whole = RepeatedSamples(Triplets(settings, "train", seed=0, length=12))
    before = [whole[position] for position in range(12)]
    assert not any(sample["faults"] for sample in before)
    rows = whole.samples.layered.indexes[0]
    damaged = whole.samples.name(3)
    item = next(item for item in rows if item.id == damaged)
    path = rows.root / item.path.format(layer=0)
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[: len(kept) // 2])
        after = [whole[position] for position in range(12)]
        with pytest.raises(InputError, match="cannot be read"):
            Triplets(settings, "train", seed=0, length=12)[3]
    finally:
        path.write_bytes(kept)
    for one, other in zip(before, after, strict=True):
        replaced = whole.samples.name(one["index"]) == damaged
        assert bool(other["faults"]) is replaced and all(str(path) in fault for fault in other["faults"])
        assert one["image"].equal(other["image"]) is not replaced
        assert one["image"].shape == other["image"].shape


@pytest.mark.parametrize("switch", ["light", "blur", "grain", "jpeg"])
def test_every_blending_step_changes_the_expected_parts(sets: Path, switch: str) -> None:
    plain = samples(config(sets, "pasted", occluder_probability=0))
    blended = samples(config(sets, "pasted", occluder_probability=0, blending=replace(NO_BLENDING, **{switch: 1.0})))
    for before, after in zip(plain, blended, strict=True):
        changed = {name for name in ("image", "foreground", "background") if not after[name].equal(before[name])}
        expected = {"grain": {"image", "foreground", "background"}, "jpeg": {"image"}}
        assert changed == expected.get(switch, {"image", "foreground"})
        assert 0.001 < (after["image"] - before["image"]).abs().mean() < 0.3


def test_flipping_mirrors_image_layers_and_occluder(sets: Path) -> None:
    plain, flipped = (samples(config(sets, "layered", flip=share)) for share in (0.0, 1.0))
    for before, after in zip(plain, flipped, strict=True):
        for name in ("image", "foreground", "background", "occluder"):
            assert after[name].equal(before[name].flip(-1))


def test_invalid_configs_are_refused() -> None:
    for wrong, message in (
        ({"aspects": []}, "aspects"),
        ({"aspects": [1, -2]}, "aspects"),
        ({"min_area": 0.9}, "min_area"),
        ({"size": 8}, "size"),
        ({"layered_weight": -1}, "layered_weight"),
        ({"flip": 1.5}, r"data\.triplets\.flip is 1\.5; expected a probability"),
        ({"cue_dropout": -0.1}, "cue_dropout"),
        ({"occluder_probability": float("nan")}, "occluder_probability"),
    ):
        with pytest.raises(InputError, match=message):
            TripletConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"blending\.jpeg is 2"):
        BlendingConfig(jpeg=2)
    with pytest.raises(InputError, match="names no index"):
        Triplets(TripletConfig(), "train", 0, 1)


def test_indexes_that_are_of_the_wrong_kind_unpaired_or_missing_are_refused(sets: Path) -> None:
    layered, cut_outs = str(sets / "layered.safetensors"), str(sets / "foregrounds.safetensors")
    with pytest.raises(InputError, match="is an index of layered; expected an index of backgrounds"):
        Triplets(TripletConfig(foregrounds=[cut_outs], backgrounds=[layered]), "train", 0, 1)
    with pytest.raises(InputError, match="need each other"):
        Triplets(TripletConfig(foregrounds=[cut_outs]), "train", 0, 1)
    with pytest.raises(InputError, match="does not exist"):
        Triplets(TripletConfig(layered=[str(sets / "missing.safetensors")]), "train", 0, 1)


@pytest.mark.parametrize("limit", [{"min_area": 0.7}, {"max_area": 0.02}])
def test_objects_that_are_too_small_or_too_large_are_skipped(sets: Path, limit: dict[str, float]) -> None:
    with pytest.raises(InputError, match="16 pictures in a row have no object"):
        samples(config(sets, "layered", **limit))


@pytest.mark.parametrize("kind", ["layered", "folders"])
def test_an_object_at_the_edge_of_a_wide_picture_is_complete_in_the_crop(tmp_path: Path, kind: str) -> None:
    rng, (height, width) = np.random.default_rng(0), (40, 160)
    clean, alpha = noise(rng, height, width), disc(height, width, (20, 145), 10)
    thing = rgba(noise(rng, height, width), alpha)
    if kind == "layered":
        Image.fromarray(clean).save(tmp_path / "a-layer_0.png")
        thing.save(tmp_path / "a-layer_1.png")
    else:
        for part, shown in zip(PARTS, (Image.fromarray(clean), Image.fromarray(alpha), thing), strict=False):
            (tmp_path / part).mkdir()
            shown.save(tmp_path / part / "a.png")
        shutil.copytree(tmp_path / "image", tmp_path / "background")
    reader = MulanLayers(tmp_path) if kind == "layered" else TripletFolder(tmp_path)
    prepare(reader, tmp_path / f"{kind}.safetensors", test_share=0)
    for sample in samples(config(tmp_path, kind, size=32), 6):
        assert sample["foreground"][3].sum() == pytest.approx(alpha.sum() / 255 * (32 / height) ** 2, rel=0.02)


def test_rows_of_several_indexes_are_drawn_uniformly(sets: Path, tmp_path: Path) -> None:
    prepare(BackgroundFolder(sets / "triplets" / "image"), tmp_path / "few.safetensors", test_share=0.6)
    paths = [str(sets / "backgrounds.safetensors"), str(tmp_path / "few.safetensors")]
    rows, rng = Rows(paths, "backgrounds", "train"), np.random.default_rng(0)
    drawn = Counter((index.path.name, item.id) for index, item in (rows.draw(rng) for _ in range(2000)))
    lengths = [len(index.rows("train")) for index in rows.indexes]
    assert min(lengths) > 1 and lengths[0] != lengths[1] and len(drawn) == sum(lengths)
    shares = [count / 2000 * len(drawn) for count in drawn.values()]
    assert min(shares) > 0.7 and max(shares) < 1.3


def test_layers_in_front_are_merged_into_one_occluder_exactly() -> None:
    back, thing, middle, front = torch.rand(4, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    back[3] = 1
    scene = scene_around([back, thing, middle, front], 1)
    expected = over(front, over(middle, over(thing, back[:3])))
    torch.testing.assert_close(scene.image, expected)


def test_a_split_without_items_is_an_error(sets: Path, tmp_path: Path) -> None:
    prepare(BackgroundFolder(sets / "backgrounds"), tmp_path / "all.safetensors", test_share=0)
    settings = replace(config(sets, "pasted"), backgrounds=[str(tmp_path / "all.safetensors")])
    assert len(samples(settings, 2)) == 2
    with pytest.raises(InputError, match="no items of the test split"):
        Triplets(settings, "test", 0, 1)


def test_a_picture_changed_after_indexing_is_an_error(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "backgrounds").mkdir()
    Image.fromarray(noise(np.random.default_rng(0), 80, 120)).save(tmp_path / "backgrounds" / "a.jpg")
    prepare(BackgroundFolder(tmp_path / "backgrounds"), tmp_path / "index.safetensors", test_share=0)
    settings = replace(config(sets, "pasted"), backgrounds=[str(tmp_path / "index.safetensors")])
    assert samples(settings, 1)
    Image.fromarray(noise(np.random.default_rng(0), 80, 80)).save(tmp_path / "backgrounds" / "a.jpg")
    with pytest.raises(InputError, match="run tools/prepare_data.py again"):
        samples(settings, 1)
    whole = (tmp_path / "backgrounds" / "a.jpg").read_bytes()
    (tmp_path / "backgrounds" / "a.jpg").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError, match=r"a\.jpg cannot be read as an image"):
        samples(settings, 1)


def test_an_adapter_is_trained_on_triplets(sets: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    files = {name: f"[{sets / name}.safetensors]" for name in ("layered", "foregrounds", "backgrounds", "folders")}
    settings = [
        *tiny_overrides,
        "data.source=triplets",
        *(f"data.triplets.{name}={value}" for name, value in files.items()),
        "data.triplets.size=32",
        "data.triplets.aspects=[1,1.5]",
        "train.steps=2",
        f"run_dir={tmp_path / 'run'}",
    ]
    config = load_config(CONFIGS / "tiny.yaml", settings)
    train(config)
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["protocol"]["data"] == "triplets"
    assert written["results"]["adapted"]["background/psnr"] > 0
    with pytest.raises(InputError, match=r"samples is 6; expected a multiple of the samples per step, 4"):
        train(load_config(CONFIGS / "tiny.yaml", [*settings, "data.samples=6", "train.accumulate=2", "resume=never"]))
