"""Adapters imported from files in any layout, their weighted sums, and rank reduction."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import fill, same
from reference import output_error
from safetensors.torch import load_file, save_file

from layerdecomp.adapters import INPUT, Changes, changes_from_adapter
from layerdecomp.data.datamodule import DataConfig, recorded_data
from layerdecomp.decomposer import Decomposer, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.export import export
from layerdecomp.incoming import frozen_input, read_adapter
from layerdecomp.inpainting import Prompt
from layerdecomp.manifest import DecomposerConfig
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.tensor_files import file_sha256, read_metadata
from layerdecomp.weights import Adapter, history, load_mmdit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_exported_adapter_is_imported_bit_for_bit(
    tiny_config: DecomposerConfig, adapter_file: Path, tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    adapter = Adapter.load(adapter_file)
    if dtype is torch.bfloat16:  # as adapters ship
        export(adapter_file, "adapter", tmp_path / "bf16.safetensors", dtype="bfloat16")
        adapter_file = tmp_path / "bf16.safetensors"
        adapter = Adapter.load(adapter_file)
        assert {tensor.dtype for tensor in adapter.tensors.values()} == {dtype}
    if layout == "diffusers":  # bakes the scale into B: 1 if alpha = rank, as in training
        config = replace(tiny_config, lora=replace(LoRAConfig(**json.loads(adapter.metadata["lora"])), alpha=None))
        adapter = Adapter(adapter.tensors, {**adapter.metadata, **config.lora_metadata()})
        adapter_file = tmp_path / "adapter.safetensors"
        adapter.save(adapter_file)
    export(adapter_file, layout, tmp_path / "lora.safetensors")
    export(tmp_path / "lora.safetensors", "import", tmp_path / "back.safetensors")
    back = Adapter.load(tmp_path / "back.safetensors")
    assert same(back.tensors, adapter.tensors)
    assert back.metadata == {**adapter.metadata, "tool_version": back.metadata["tool_version"]}
    export(tmp_path / "back.safetensors", layout, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "lora.safetensors").read_bytes()


def test_a_baked_in_scale_is_imported_with_the_same_effect(adapter_file: Path, adapted: MMDiT, tmp_path: Path) -> None:
    export(adapter_file, "diffusers", tmp_path / "lora.safetensors")
    export(tmp_path / "lora.safetensors", "import", tmp_path / "back.safetensors")
    back = Decomposer.from_pretrained(tmp_path / "back.safetensors")
    assert json.loads(read_metadata(tmp_path / "back.safetensors")["lora"])["alpha"] is None
    assert output_error(back.transformer, adapted) < 1e-6


def test_a_lora_without_metadata_needs_its_weight_files_named(
    adapter_file: Path, adapted: MMDiT, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    export(adapter_file, "diffusers", tmp_path / "exported.safetensors")
    path = tmp_path / "lora.safetensors"
    save_file(load_file(tmp_path / "exported.safetensors"), path)  # without metadata and without an extras file
    with pytest.raises(InputError, match="does not name its frozen parts; expected transformer=FILE autoencoder=FILE"):
        export(path, "import", tmp_path / "back.safetensors")
    weights = tiny_config.weights
    files = {name: getattr(weights, name) for name in ("transformer", "autoencoder", "rgba_autoencoder")}
    export(path, "import", tmp_path / "back.safetensors", **files)
    decomposer = Decomposer.from_pretrained(tmp_path / "back.safetensors")
    assert decomposer.context_fusion is None and output_error(decomposer.transformer, adapted) < 1e-5
    assert read_metadata(tmp_path / "back.safetensors")["origin"] == "imported from lora.safetensors"
    assert read_metadata(tmp_path / "back.safetensors")["data"] == "unknown"


def test_the_scale_of_a_peft_lora_comes_from_its_metadata(
    adapter_file: Path, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    export(adapter_file, "diffusers", tmp_path / "exported.safetensors")
    tensors, path = load_file(tmp_path / "exported.safetensors"), tmp_path / "lora.safetensors"
    weights = tiny_config.weights
    files = {name: getattr(weights, name) for name in ("transformer", "autoencoder", "rgba_autoencoder")}

    def changes(settings: dict[str, Any] | None) -> Changes:
        metadata = {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors, path, metadata)
        adapter, config = read_adapter(path, files)
        return changes_from_adapter(adapter.tensors, config.lora, frozen_input(config)[1])[0]

    plain = changes(None)
    (rank,) = {change.rank for name, change in plain.items() if name != INPUT and "qkv" not in name}
    one, other = "single_blocks.0.linear2", "double_blocks.0.img_attn.proj"
    own = {"single_transformer_blocks.0.proj_out": 5 * rank}
    found = changes({"transformer.lora_alpha": 2 * rank, "transformer.alpha_pattern": own})
    torch.testing.assert_close(found[one].weight, 5 * plain[one].weight)
    torch.testing.assert_close(found[other].weight, 2 * plain[other].weight)
    with pytest.raises(InputError, match="use_rslora"):
        changes({"transformer.use_rslora": True})
    save_file(tensors, path, {"lora_adapter_metadata": "{"})
    with pytest.raises(InputError, match="lora_adapter_metadata cannot be read"):
        read_adapter(path, files)
    half = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != half}, path)
    with pytest.raises(InputError, match="tensors belong to no linear layer.*lora_A.weight"):
        read_adapter(path, files)


def test_an_input_projection_changed_by_another_tool_is_imported(adapter_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    export(adapter_file, "kohya", path)
    tensors, metadata = load_file(path), read_metadata(path)
    tensors["lora_unet_img_in.lora_up.weight"] *= 0.5
    save_file(tensors, path, metadata)
    adapter, config = read_adapter(path, {})
    base = load_mmdit(config.weights.transformer).img_in.weight
    trained = Adapter.load(adapter_file).tensors["img_in.weight"]
    assert torch.allclose(adapter.tensors["img_in.weight"], (base + trained) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight", (96, 2), "1 of .* no linear layer .*_7_img"),
        ("lora_te1_text_model.lora_down.weight", (2, 8), "belong to no linear layer .*lora_te1"),
        ("lora_unet_single_blocks_0_linear2.lora_down.weight", (3, 160), "the LoRA changes single_blocks.0.linear2 by"),
        ("lora_unet_single_blocks_0_linear2.lora_up.weight", (64, 2), "changes single_blocks.0.linear2 by .64, 160."),
    ],
)  # fmt: skip
def test_loras_that_do_not_fit_the_base_are_refused(
    tiny_weights: Path, tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    path = tmp_path / "lora.safetensors"
    export(tiny_weights / "adapter.safetensors", "kohya", path)
    save_file({**load_file(path), name: torch.zeros(shape)}, path, read_metadata(path))
    with pytest.raises(InputError, match=message):
        export(path, "import", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def test_lora_files_are_not_loaded_as_adapters(tiny_weights: Path, tmp_path: Path) -> None:
    export(tiny_weights / "adapter.safetensors", "kohya", tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="is an adapter in kohya layout; tools/export.py format=import"):
        Decomposer.from_pretrained(tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="extras.safetensors is not an adapter"):
        Decomposer.from_pretrained(tmp_path / "lora.extras.safetensors")


# Sums and ranks


def test_adapters_are_summed_with_weights(adapter_file: Path, adapted: MMDiT, tmp_path: Path) -> None:
    files = [tmp_path / "adapter.safetensors", tmp_path / "other.safetensors"]
    first = Adapter.load(adapter_file)
    first.metadata.update(steps="2", continues="nothing", data=json.dumps(asdict(DataConfig(samples=7))))
    first.save(files[0])
    other = {name: tensor.flip(0) for name, tensor in first.tensors.items()}
    Adapter(other, {**first.metadata, "data": "others", "history": json.dumps(history(files[0]))}).save(files[1])
    export(files, "import", tmp_path / "sum.safetensors", weights=[0.75, 0.5])
    total = Decomposer.from_pretrained(tmp_path / "sum.safetensors")
    assert read_metadata(tmp_path / "sum.safetensors")["merged_from"] == (
        "0.75 x adapter.safetensors + 0.5 x other.safetensors"
    )
    assert read_metadata(tmp_path / "sum.safetensors")["figures"] == "{}" != first.metadata["figures"]
    described = read_metadata(tmp_path / "sum.safetensors")
    assert described["data"] == "see history" and not {"steps", "continues"} & described.keys()
    config = recorded_data(described, "sum.safetensors")
    assert config == recorded_data(first.metadata, "adapter.safetensors") and config.samples == 7
    stages = json.loads(read_metadata(tmp_path / "sum.safetensors")["history"])
    assert [stage["sha256"] for stage in stages] == [file_sha256(file) for file in files]
    assert [stage["data"] for stage in stages] == [first.metadata["data"], "others"]
    assert json.loads(read_metadata(tmp_path / "sum.safetensors")["lora"])["targets"] == lora_targets(first)
    parts = [merge_lora(Decomposer.from_pretrained(file).transformer).state_dict() for file in files]
    base = load_mmdit(json.loads(first.metadata["weights"])["transformer"]).state_dict()
    for name, tensor in merge_lora(total.transformer).state_dict().items():
        expected = base[name] + 0.75 * (parts[0][name] - base[name]) + 0.5 * (parts[1][name] - base[name])
        assert torch.allclose(tensor, expected, atol=1e-5), name
    name = "context_fusion.queries"
    assert total.context_fusion is not None
    assert torch.allclose(total.context_fusion.queries, 0.6 * first.tensors[name] + 0.4 * other[name], atol=1e-6)

    export(adapter_file, "import", tmp_path / "half.safetensors", weights=[0.5])
    half = merge_lora(Decomposer.from_pretrained(tmp_path / "half.safetensors").transformer).state_dict()
    assert all(torch.allclose(half[name], (base[name] + parts[0][name]) / 2, atol=1e-5) for name in half)


def lora_targets(adapter: Adapter) -> list[str]:
    targets: list[str] = json.loads(adapter.metadata["lora"])["targets"]
    return targets


def test_rank_reduction_prints_its_error(
    adapter_file: Path, adapted: MMDiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = json.loads(read_metadata(adapter_file)["lora"])["rank"]
    export(adapter_file, "import", tmp_path / "same.safetensors", rank=rank)
    assert f"rank {rank} to {rank}: relative error 0.00%" in capsys.readouterr().out
    assert output_error(Decomposer.from_pretrained(tmp_path / "same.safetensors").transformer, adapted) < 1e-5
    export(adapter_file, "diffusers", tmp_path / "small.safetensors", rank=1)
    printed = capsys.readouterr().out
    assert f"rank {rank} to 1: relative error" in printed and "worst: " in printed
    assert read_metadata(tmp_path / "small.safetensors")["reduced"] in printed
    tensors = load_file(tmp_path / "small.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name and "x_embedder" not in name} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, "weights= has 2 numbers for 1 adapters"),
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"dtype": "fp8"}, "dtype=fp8: expected one of float32, bfloat16, float16 for format=diffusers"),
        ({"transformers": "x"}, "transformers= names no weight file"),
    ],
)
def test_invalid_options_are_refused(tiny_weights: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(tiny_weights / "adapter.safetensors", "diffusers", tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_adapters_with_different_fusion_are_not_summed(
    tiny_config: DecomposerConfig, tiny_weights: Path, tmp_path: Path
) -> None:
    config = replace(tiny_config, fusion=ContextFusionConfig(enabled=False))
    build_decomposer(config).adapter(config.to_metadata()).save(tmp_path / "other.safetensors")
    files = [tiny_weights / "adapter.safetensors", tmp_path / "other.safetensors"]
    with pytest.raises(InputError, match="other.safetensors differs from .* in its fusion;"):
        export(files, "import", tmp_path / "sum.safetensors")


def test_adapters_of_different_bases_are_not_summed(
    adapter_file: Path, tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    source, base = tiny_config.weights.transformer, tmp_path / "transformer.safetensors"
    weights = load_file(source)
    save_file({**weights, "img_in.bias": weights["img_in.bias"] + 1}, base, read_metadata(source))
    first = Adapter.load(adapter_file)
    named = json.dumps({**json.loads(first.metadata["weights"]), "transformer": str(base)})
    metadata = {**first.metadata, "weights": named, "base_sha256": file_sha256(base)}
    Adapter(first.tensors, metadata).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="other.safetensors differs from .* in its base;"):
        export([adapter_file, tmp_path / "other.safetensors"], "import", tmp_path / "sum.safetensors")


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"conditioning": '{"foreground": false}'}, "conditioning"),
        ({"prompt_sha256": "0" * 64}, "prompt"),
    ],
)
def test_adapters_with_other_inputs_are_not_summed(
    adapter_file: Path, tmp_path: Path, changes: dict[str, str], differing: str
) -> None:
    first = Adapter.load(adapter_file)
    Adapter(first.tensors, {**first.metadata, **changes}).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"other.safetensors differs from .* in its {differing};"):
        export([adapter_file, tmp_path / "other.safetensors"], "import", tmp_path / "sum.safetensors")


def test_layers_trained_in_full_are_scaled_as_changes_of_the_base(
    tiny_config: DecomposerConfig, tmp_path: Path
) -> None:
    decomposer, path = build_decomposer(tiny_config), tmp_path / "adapter.safetensors"
    last = decomposer.transformer.final_layer.linear
    before = last.weight.clone()
    fill(last.requires_grad_(True), seed=1)
    decomposer.adapter(tiny_config.to_metadata()).save(path)
    export(path, "import", tmp_path / "scaled.safetensors", weights=[0.25])
    found = load_file(tmp_path / "scaled.safetensors")["final_layer.linear.weight"]
    torch.testing.assert_close(found, before + 0.25 * (last.weight - before))


def test_a_lora_of_flux_needs_a_prompt(tiny_weights: Path) -> None:
    flux: Any = SimpleNamespace(config=MMDiTConfig())
    with pytest.raises(InputError, match="there is no prompt, but .* expected weights.prompt= .* make embed-prompt"):
        Prompt.load(None, flux)


def test_other_layouts_of_lora_are_named_as_such(adapter_file: Path, tmp_path: Path) -> None:
    export(adapter_file, "diffusers", tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    renamed = {name.replace("transformer.", "diffusion_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="expected names of a foreign LoRA to start with transformer. or lora_unet_"):
        export(tmp_path / "renamed.safetensors", "import", tmp_path / "back.safetensors")
