"""Scenes: determined by (seed, split, index), exact composites, hidden parts, and disjoint splits."""

import random
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from layerdecomp.data import shapes, textures
from layerdecomp.data.scenes import SceneConfig, Scenes
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.cues import CUES, compute_cues
from layerdecomp.imaging.masks import MaskConfig

COUNT = 120
Sample = dict[str, Any]


@cache
def _samples(split: str, truncated_shapes: bool, /) -> list[Sample]:
    scenes = Scenes(SceneConfig(truncated_shapes=truncated_shapes), split, seed=3, length=COUNT, with_cues=False)
    return [scenes[index] for index in range(COUNT)]


def _stacked(split: str, key: str) -> Tensor:
    return torch.stack([sample[key] for sample in _samples(split, False)])


def _same(first: Sample, second: Sample) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
    )


def test_shapes_types_and_ranges() -> None:
    sample = Scenes(SceneConfig(size=48), "train", seed=0, length=9)[8]
    shapes = {key: tuple(value.shape) for key, value in sample.items() if isinstance(value, Tensor)}
    assert shapes == {
        "image": (3, 48, 48),
        "mask": (1, 48, 48),
        "foreground": (4, 48, 48),
        "background": (3, 48, 48),
        "occluder": (1, 48, 48),
        "inpaint_mask": (1, 48, 48),
        "cues": (len(CUES), 3, 48, 48),
        "cues_present": (len(CUES),),
    }
    assert sample["index"] == 8 and sample["cues_present"].dtype == torch.bool
    assert all(sample[key].dtype == torch.float32 for key in shapes if key != "cues_present")


@pytest.mark.parametrize("split", ["train", "test"])
def test_values_are_in_range(split: str) -> None:
    for key, low in (("image", -1), ("background", -1), ("foreground", -1), ("occluder", 0)):
        values = _stacked(split, key)
        assert values.min() >= low and values.max() <= 1
    assert _stacked(split, "foreground")[:, 3].min() >= 0
    assert set(_stacked(split, "mask").unique().tolist()) == {0, 1}
    assert _stacked(split, "image").std(dim=(1, 2, 3)).median() > 0.2


def test_a_sample_depends_only_on_seed_split_and_index() -> None:
    scenes = Scenes(SceneConfig(), "train", seed=5, length=10)
    first = scenes[4]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert scenes[7]["index"] == 7
    assert _same(first, scenes[4])
    assert _same(first, Scenes(SceneConfig(), "train", seed=5, length=1000)[4])
    others = Scenes(SceneConfig(), "train", 6, 10)[4], Scenes(SceneConfig(), "test", 5, 10)[4], scenes[5]
    assert not any(torch.equal(first["image"], other["image"]) for other in others)


def test_the_splits_share_no_seed() -> None:
    train, test = (Scenes(SceneConfig(size=32), split, 5, 4, with_cues=False) for split in ("train", "test"))
    assert not any(train[index]["inpaint_mask"].equal(test[index]["inpaint_mask"]) for index in range(4))


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_a_scene_uses_no_photograph_texture_or_shape_of_the_other_split(
    split: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parts in (textures.PHOTOGRAPHS, textures._FIELDS, shapes.SHAPES):
        monkeypatch.delitem(parts, other)  # type: ignore[arg-type]
    names = ("photograph", "bystander", "occluder", "many_coloured")
    config = SceneConfig(size=32, **{f"{name}_probability": 0.5 for name in names})
    # masks for inpainting have the training shapes in both splits
    monkeypatch.setattr("layerdecomp.data.scenes.inpainting_mask", lambda rng, size: np.zeros((size, size), bool))
    scenes = Scenes(config, split, seed=0, length=12, with_cues=False)
    assert len([scenes[index] for index in range(12)]) == 12


def test_workers_make_the_same_samples() -> None:
    scenes = Scenes(SceneConfig(size=64), "train", seed=5, length=6)
    loader = DataLoader(scenes, batch_size=None, num_workers=2)
    assert all(_same(scenes[index], sample) for index, sample in enumerate(loader))


@pytest.mark.parametrize(("split", "truncated_shapes"), [("train", False), ("train", True), ("test", False)])
def test_recomposition_is_exact_where_nothing_occludes(split: str, truncated_shapes: bool) -> None:
    for sample in _samples(split, truncated_shapes):
        free = (sample["occluder"] == 0).expand(3, -1, -1)
        recomposed = over(sample["foreground"], sample["background"])
        torch.testing.assert_close(recomposed[free], sample["image"][free], atol=1e-6, rtol=0)


def test_the_occluder_stays_in_the_background() -> None:
    covered = (_stacked("train", "occluder") == 1).expand(-1, 3, -1, -1)
    assert covered.any()
    assert torch.equal(_stacked("train", "image")[covered], _stacked("train", "background")[covered])


def test_removing_the_object_changes_the_image() -> None:
    changed = (_stacked("train", "image") - _stacked("train", "background")).abs().amax(dim=1) > 0.05
    visible = _stacked("train", "foreground")[:, 3] * (1 - _stacked("train", "occluder")[:, 0]) > 0.5
    assert changed[visible].float().mean() > 0.9
    assert not changed[_stacked("train", "foreground")[:, 3] == 0].any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_objects_cover_4_to_45_percent(split: str) -> None:
    alpha = _stacked(split, "foreground")[:, 3]
    area = (alpha > alpha.amax(dim=(1, 2), keepdim=True) / 2).float().mean(dim=(1, 2))
    assert area.min() > 0.035 and area.max() < 0.47 and area.std() > 0.05
    assert 0.05 < (alpha.amax(dim=(1, 2)) < 0.9).float().mean() < 0.3  # some are half-transparent


@pytest.mark.parametrize("split", ["train", "test"])
def test_many_objects_are_partly_hidden(split: str) -> None:
    alpha, occluder, mask = (_stacked(split, key)[:, -1] for key in ("foreground", "occluder", "mask"))
    occluded = (alpha * occluder).sum(dim=(1, 2)) / alpha.sum(dim=(1, 2))
    assert 0.2 < (occluded > 0).float().mean() < 0.5
    assert occluded[occluded > 0].min() >= 0.1 and occluded.max() <= 0.501
    hidden = (alpha > 0.5) & ((occluder > 0.5) | (mask == 0))
    share = hidden.sum(dim=(1, 2)) / (alpha > 0.5).sum(dim=(1, 2)).clamp(min=1)
    assert (share > 0.05).float().mean() > 0.4


@pytest.mark.parametrize("split", ["train", "test"])
def test_masks_are_imperfect_but_useful(split: str) -> None:
    alpha, mask = _stacked(split, "foreground")[:, 3], _stacked(split, "mask")[:, 0]
    iou = torch.minimum(alpha, mask).sum(dim=(1, 2)) / torch.maximum(alpha, mask).sum(dim=(1, 2))
    assert 0.55 < iou.mean() < 0.75 and iou.std() > 0.1
    assert (mask.mean(dim=(1, 2)) > 0).all() and (mask.mean(dim=(1, 2)) < 1).all()


def test_truncated_shapes_differ_only_in_the_foreground() -> None:
    truncated = _samples("train", True)
    for whole, cut in zip(_samples("train", False), truncated, strict=True):
        assert torch.equal(whole["image"], cut["image"]) and torch.equal(whole["mask"], cut["mask"])
        assert torch.equal(cut["foreground"][3:], whole["foreground"][3:] * (1 - whole["occluder"]))
        assert not (cut["foreground"] * (cut["occluder"] == 1)).any()
    assert any(sample["occluder"].any() for sample in truncated)


def _many_coloured(split: str) -> list[Sample]:
    return [Scenes(SceneConfig(many_coloured_probability=1.0), split, 3, COUNT, with_cues=False)[i] for i in range(8)]


def test_many_coloured_objects_appear_only_in_training() -> None:
    def colours(samples: list[Sample]) -> float:
        """Mean spread of hues in objects: of red minus green, which shades of one colour share."""
        spreads = []
        for sample in samples:
            inside = sample["foreground"][:3, sample["foreground"][3] > 0.9]
            spreads.append((inside[0] - inside[1]).std() if inside.numel() else torch.tensor(0.0))
        return float(torch.stack(spreads).mean())

    assert colours(_many_coloured("train")) > 3 * colours(_samples("train", False)[:8])
    assert all(_same(*pair) for pair in zip(_many_coloured("test"), _samples("test", False), strict=False))
    with pytest.raises(InputError, match=r"data\.scenes\.many_coloured_probability is 1\.5"):
        SceneConfig(many_coloured_probability=1.5)


def test_held_out_shapes_are_never_truncated() -> None:
    pairs = zip(_samples("test", False), _samples("test", True), strict=True)
    assert all(_same(*pair) for pair in pairs)
    assert any((sample["foreground"][3:] * sample["occluder"]).any() for sample in _samples("test", True))


def test_masks_do_not_change_the_scene() -> None:
    exact_only = MaskConfig(**{kind.name: float(kind.name == "exact") for kind in fields(MaskConfig)})
    usual, exact = (Scenes(SceneConfig(size=64, masks=masks), "train", 0, 8) for masks in (MaskConfig(), exact_only))
    for index in range(8):
        assert all(torch.equal(usual[index][key], exact[index][key]) for key in ("image", "foreground", "cues"))
    assert any(not torch.equal(usual[index]["mask"], exact[index]["mask"]) for index in range(8))


def test_cues_are_computed_from_the_image() -> None:
    sample = Scenes(SceneConfig(size=64), "test", seed=0, length=2)[1]
    image = ((sample["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    cues, present = compute_cues(image)
    assert np.array_equal(sample["cues"].numpy(), cues) and np.array_equal(sample["cues_present"].numpy(), present)


def test_cue_dropout_clears_cues_only_in_training() -> None:
    config = SceneConfig(size=32, cue_dropout=0.5)
    train, test = (Scenes(config, split, seed=0, length=40) for split in ("train", "test"))
    present = torch.stack([train[index]["cues_present"] for index in range(40)])
    assert 0.3 < present[:, :2].float().mean() < 0.7
    for index in range(40):
        absent = train[index]["cues"][~present[index]]
        assert not absent.any()
    assert torch.stack([test[index]["cues_present"] for index in range(10)])[:, :2].all()


def test_without_cues_all_are_absent() -> None:
    sample = _samples("train", False)[0]
    assert not sample["cues"].any() and not sample["cues_present"].any()


def test_an_index_out_of_range_is_an_error() -> None:
    scenes = Scenes(SceneConfig(size=32), "train", seed=0, length=3)
    assert len(scenes) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            scenes[index]


@pytest.mark.parametrize(
    ("split", "size", "seed"), [("val", 64, 0), ("train", 60, 0), ("train", 0, 0), ("test", 64, -1)]
)
def test_invalid_arguments_are_named(split: str, size: int, seed: int) -> None:
    with pytest.raises(InputError, match=f"found '?{'val' if split == 'val' else size if seed == 0 else seed}"):
        Scenes(SceneConfig(size=size), split, seed, 10)
