"""Adapters as weight changes: round trips through other layouts, full-size names, sums and ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft import LoraConfig
from torch import Tensor, nn

from layerdecomp.adapters import (
    LAYOUTS,
    Change,
    Changes,
    adapter_from_changes,
    add_changes,
    add_whole,
    changes_from_adapter,
    from_diffusers,
    peft_settings,
    reduce_rank,
    to_diffusers,
    to_kohya,
)
from layerdecomp.errors import InputError
from layerdecomp.layouts import diffusers_modules
from layerdecomp.models.lora import LoRAConfig
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig

HIDDEN = 8
LAYERS = {  # output widths of a small model's layers
    "img_in": 8, "txt_in": 8, "double_blocks.0.img_attn.qkv": 24, "double_blocks.0.txt_attn.qkv": 24,
    "double_blocks.11.img_mlp.0": 32, "single_blocks.3.linear1": 56, "single_blocks.3.linear2": 8,
    "final_layer.adaLN_modulation.1": 16,
}  # fmt: skip


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _changes(rank: int = 3, scale: float = 1.0, seed: int = 0) -> Changes:
    """Changes of every layer, and of the input projection's bias."""
    return {
        name: Change(_draw(rank, 6, seed=seed + 2 * i), _draw(width, rank, seed=seed + 2 * i + 1), scale)
        if name != "img_in"
        else Change(torch.eye(6), _draw(width, 6, seed=seed), bias=_draw(width, seed=seed + 99))
        for i, (name, width) in enumerate(LAYERS.items())
    }


def _base() -> dict[str, Tensor]:
    return {"img_in.weight": _draw(8, 6, seed=1), "img_in.bias": _draw(8, seed=2)}


def _same(first: Changes, second: Changes) -> bool:
    def bias(change: Change) -> Tensor:
        return change.b.new_zeros(len(change.b)) if change.bias is None else change.bias

    return first.keys() == second.keys() and all(
        first[name].a.equal(second[name].a)
        and first[name].b.equal(second[name].b)
        and first[name].scale == second[name].scale
        and bias(first[name]).equal(bias(second[name]))
        for name in first
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_round_trips_through_every_layout_are_exact(layout: str, with_bias: bool) -> None:
    _, write, read = LAYOUTS[layout]
    changes = _changes()
    if not with_bias:
        changes["img_in"] = Change(changes["img_in"].a, changes["img_in"].b)
    tensors = write(changes, HIDDEN)
    assert any("bias" in name or "diff_b" in name for name in tensors) == with_bias
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    back = read(tensors, LAYERS, HIDDEN)
    assert not tensors and _same(back, changes)
    again = write(back, HIDDEN)
    assert again.keys() == before.keys() and all(again[name].equal(before[name]) for name in again)


def test_kohya_keeps_alpha_and_diffusers_folds_it_in() -> None:
    changes = _changes(scale=0.5)
    tensors = to_kohya(changes, HIDDEN)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 1.5  # of rank 3
    assert tensors["lora_unet_img_in.alpha"] == 6
    assert _same(LAYOUTS["kohya"].read(tensors, LAYERS, HIDDEN), changes)
    back = from_diffusers(to_diffusers(changes, HIDDEN), LAYERS, HIDDEN)
    assert all(change.scale == 1 for change in back.values())
    assert all(back[name].weight.equal(change.weight) for name, change in changes.items())


def test_separate_loras_of_a_fused_layer_are_stacked_exactly() -> None:
    """A LoRA may adapt q, k, v and the MLP separately, with different ranks, and leave some out."""
    names = diffusers_modules("single_blocks.3.linear1")
    assert names[-1] == "single_transformer_blocks.3.proj_mlp"
    pairs = {
        names[0]: (_draw(2, 6, seed=1), _draw(8, 2, seed=2)),
        names[3]: (_draw(4, 6, seed=3), _draw(32, 4, seed=4)),
    }
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    (change,) = from_diffusers(tensors, LAYERS, HIDDEN).values()
    expected = torch.zeros(56, 6)
    expected[:8], expected[24:] = (b @ a for a, b in pairs.values())
    assert change.rank == 6 and torch.allclose(change.weight, expected, atol=1e-6)
    shared = pairs[names[0]][0]  # one A for all parts, but different scales
    tensors = {f"transformer.{name}.lora_A.weight": shared for name in pairs}
    parts = {name: _draw(rows, 2, seed=rows) for name, rows in ((names[0], 8), (names[3], 32))}
    tensors |= {f"transformer.{name}.lora_B.weight": b for name, b in parts.items()}
    (change,) = from_diffusers({**tensors, f"transformer.{names[0]}.alpha": torch.tensor(1.0)}, LAYERS, HIDDEN).values()
    expected[:8], expected[24:] = 0.5 * parts[names[0]] @ shared, parts[names[3]] @ shared
    assert torch.allclose(change.weight, expected, atol=1e-6)


def test_an_adapter_round_trips_through_changes() -> None:
    lora, base = LoRAConfig(rank=3, alpha=4.5), _base()
    changes = _changes(scale=1.5)
    given, tensors = adapter_from_changes(changes, base)
    assert (given.rank, given.alpha, given.scale) == (3, 4.5, 1.5) and "img_in" not in given.targets
    tensors["context_fusion.queries"] = torch.ones(2)
    taken, rest = changes_from_adapter(tensors, lora, base)
    assert rest.keys() == {"context_fusion.queries"}
    assert taken["img_in"].a.equal(torch.eye(6)) and torch.allclose(taken["img_in"].b, changes["img_in"].b, atol=1e-6)
    assert _same({**taken, "img_in": changes["img_in"]}, changes)
    untrained, _ = changes_from_adapter({**tensors, **base}, lora, base)
    assert "img_in" not in untrained


def test_different_ranks_and_scales_are_unified() -> None:
    changes = {**_changes(rank=3), "txt_in": Change(_draw(2, 6, seed=3), _draw(8, 2, seed=4), 0.25)}
    lora, tensors = adapter_from_changes(changes, _base())
    assert (lora.rank, lora.alpha) == (3, None)
    assert {t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight")} == {3}
    taken, _ = changes_from_adapter(tensors, lora, _base())
    assert all(torch.allclose(taken[name].weight, changes[name].weight, atol=1e-6) for name in changes)


def test_changes_that_no_adapter_can_represent_are_rejected() -> None:
    changes = _changes()
    with pytest.raises(InputError, match="only the input projection is adapted"):
        adapter_from_changes({"img_in": changes["img_in"]}, _base())
    changes["txt_in"] = Change(changes["txt_in"].a, changes["txt_in"].b, bias=torch.ones(8))
    with pytest.raises(InputError, match="txt_in: the LoRA changes the layer's bias"):
        adapter_from_changes(changes, _base())


@pytest.fixture(scope="module")
def full_size() -> Changes:
    """A LoRA of rank 2 on every linear layer that flux_fill.yaml adapts, and the input projection's change."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    lora, changes = LoRAConfig(rank=2), {}
    for i, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and lora.adapts(name):
            a, b = _draw(2, module.in_features, seed=2 * i), _draw(module.out_features, 2, seed=2 * i + 1)
            changes[name] = Change(a, b, 1.0)
    changes["img_in"] = Change(torch.eye(384), _draw(3072, 384, seed=0), bias=_draw(3072, seed=1))
    return changes


def test_full_size_names_and_shapes_match_diffusers(full_size: Changes) -> None:
    with torch.device("meta"):
        reference = FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
    published = json.loads((Path(__file__).parent / "published_keys.json").read_text())["transformer"]
    assert len(full_size) == 19 * 8 + 38 * 2 + 1 and all(f"{name}.weight" in published for name in full_size)
    tensors, shapes = to_diffusers(full_size, 3072), {}
    for name in [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("transformer.")
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        shapes[module] = (b.shape[0], a.shape[1])
        assert shapes[module] == tuple(reference.get_submodule(module).weight.shape), module
        assert tensors[f"{name}.lora_B.bias"].shape == reference.get_submodule(module).bias.shape
    assert len(shapes) == 19 * (8 + 2 * 2) + 38 * 5 + 1


def test_diffusers_converts_the_kohya_export_to_the_diffusers_export(full_size: Changes) -> None:
    """Except img_in's three tensors, which diffusers drops (docs/weights.md)."""
    converted = _convert_kohya_flux_lora_to_diffusers(to_kohya(full_size, 3072))
    kept = {name: tensor for name, tensor in converted.items() if name.startswith("transformer.")}
    assert converted.keys() - kept.keys() == {"x_embedder.lora_A.weight", "x_embedder.lora_B.weight"}
    expected = {
        name: tensor
        for name, tensor in to_diffusers(full_size, 3072).items()
        if "x_embedder" not in name and not name.endswith("bias")
    }
    assert kept.keys() == expected.keys()
    assert all(kept[name].equal(expected[name]) for name in expected)


def test_sums_are_exact() -> None:
    first, second = _changes(rank=3, scale=2.0), _changes(rank=2, seed=50)
    del second["txt_in"]
    total = add_changes([(first, 0.75), (second, -0.5)])
    assert total["single_blocks.3.linear1"].rank == 5 and total["txt_in"].rank == 3
    for name, change in total.items():
        expected = 0.75 * first[name].weight - (0.5 * second[name].weight if name in second else 0)
        assert torch.allclose(change.weight, expected, atol=1e-5), name
    assert first["img_in"].bias is not None and second["img_in"].bias is not None and total["img_in"].bias is not None
    assert torch.allclose(total["img_in"].bias, 0.75 * first["img_in"].bias - 0.5 * second["img_in"].bias)


def test_sums_of_bf16_are_not_rounded_before_they_are_written() -> None:
    half = {
        name: replace(change, a=change.a.bfloat16(), b=change.b.bfloat16(), scale=0.3)
        for name, change in _changes(rank=3).items()
    }
    total = add_changes([(half, 0.7), (half, 0.3)])
    for name, change in half.items():
        torch.testing.assert_close(total[name].weight, change.weight, rtol=1e-5, atol=1e-6)
    mean = add_whole([({"x": torch.tensor([1.0]).bfloat16()}, 0.7), ({"x": torch.tensor([3.0]).bfloat16()}, 0.3)], {})
    assert mean["x"].item() == pytest.approx(1.6, rel=1e-6)


def test_new_tensors_are_averaged_and_those_of_the_base_change_by_a_sum() -> None:
    first, second = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 6.0])}
    assert add_whole([(first, 3.0), (second, 1.0)], {})["x"].tolist() == [1.5, 3.0]
    base = {"x": torch.tensor([1.0, 1.0]), "y": torch.ones(1)}
    assert add_whole([(first, 3.0), (second, -1.0)], base)["x"].tolist() == [-1.0, -1.0]
    assert add_whole([(first, 1.0), (second, -1.0)], base)["x"].tolist() == [-1.0, -3.0]
    with pytest.raises(InputError, match="sum up to 0"):
        add_whole([(first, 1.0), (second, -1.0)], {})
    with pytest.raises(InputError, match="differ in name or size"):
        add_whole([(first, 1.0), ({"x": torch.ones(3)}, 1.0)], {})
    with pytest.raises(InputError, match="differ in name or size"):
        add_whole([({}, 1.0), (first, 1.0)], base)


def test_rank_reduction_gives_the_best_approximation_and_reports_its_error() -> None:
    changes = _changes(rank=5, scale=0.7)
    reduced, errors = reduce_rank(changes, 2)
    assert reduced["img_in"] is changes["img_in"] and errors.keys() == (changes.keys() - {"img_in"}) | {"all"}
    lost = whole = 0.0
    for name in errors.keys() - {"all"}:
        weight = changes[name].weight
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
        nearest = u[:, :2] * values[:2] @ v[:2]
        assert reduced[name].rank == 2 and torch.allclose(reduced[name].weight, nearest, atol=1e-4), name
        error = (reduced[name].weight - weight).norm().item()
        assert errors[name] == pytest.approx(error / weight.norm().item(), rel=1e-4)
        lost, whole = lost + error**2, whole + weight.norm().item() ** 2
    assert errors["all"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    kept, errors = reduce_rank(changes, 5)
    assert errors["all"] < 1e-6 and all(torch.allclose(kept[n].weight, changes[n].weight, atol=1e-5) for n in changes)


def test_peft_settings_give_the_rank_of_every_layer() -> None:
    """Without them, diffusers 0.36 to 0.39 scale the input projection wrongly (observed relative error: 1.2)."""
    settings = json.loads(peft_settings(to_diffusers(_changes(), HIDDEN))["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 3
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == {"^x_embedder": 6}
    assert settings["transformer.lora_bias"] is True and "x_embedder" in settings["transformer.target_modules"]
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in settings.items()})
    assert config.r == 3 and config.target_modules == set(settings["transformer.target_modules"])
