"""Adapters in other forms: the same tensors, or one transformer that does what base and adapter do together."""

from pathlib import Path

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file
from torch import Tensor

from layerdecomp.decomposer import Decomposer, DecomposerConfig, build_decomposer
from layerdecomp.errors import InputError
from layerdecomp.export import export
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import merge_lora
from layerdecomp.models.mmdit import MMDiT
from layerdecomp.weights import Adapter, load_mmdit, read_metadata


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "img": torch.randn(2, 6, 384, generator=generator),
        "txt": torch.randn(2, 3, 8, generator=generator),
        "y": torch.randn(2, 8, generator=generator),
        "fused": torch.randn(2, 4, 32, generator=generator),
    }
    ids = {"img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(3, 3)}
    return {**drawn, **ids, "timesteps": torch.tensor([0.2, 0.9])}


def _error(model: MMDiT, reference: MMDiT) -> float:
    with torch.no_grad():
        expected, actual = reference(**_inputs()), model(**_inputs())
    return ((actual - expected).norm() / expected.norm()).item()


def test_the_adapter_is_saved_again_in_bf16(tiny_weights: Path, tmp_path: Path) -> None:
    source, out = tiny_weights / "adapter.safetensors", tmp_path / "new" / "adapter.safetensors"
    assert export(source, "adapter", out) == [out]
    before, after = Adapter.load(source), Adapter.load(out)
    assert after.metadata == before.metadata and after.tensors.keys() == before.tensors.keys()
    assert all(after.tensors[name].equal(tensor.bfloat16()) for name, tensor in before.tensors.items())
    assert out.stat().st_size < 0.7 * source.stat().st_size
    loaded = Decomposer.from_pretrained(out)
    assert loaded.transformer.img_in.weight.dtype == torch.float32


def test_merged_weights_do_what_the_adapted_model_does(
    tiny_weights: Path, tiny_config: DecomposerConfig, tiny_decomposer: Decomposer, tmp_path: Path
) -> None:
    source, out = tiny_weights / "adapter.safetensors", tmp_path / "merged.safetensors"
    beside = tmp_path / "merged.context_fusion.safetensors"
    assert export(source, "merged", out) == [out, beside]
    base, merged = load_mmdit(tiny_config.weights.transformer), load_mmdit(out)
    assert merged.state_dict().keys() == base.state_dict().keys() and merged.config == base.config
    assert read_metadata(out)["merged"] == "yes" and read_metadata(out)["format_version"] == "1"

    folded = Decomposer.from_pretrained(source).transformer
    merge_lora(folded)
    assert _error(folded, tiny_decomposer.transformer) < 1e-5
    for name, tensor in folded.state_dict().items():
        assert merged.state_dict()[name].equal(tensor.bfloat16().float()), name
    assert _error(merged, tiny_decomposer.transformer) < 0.03 < 10 * 0.03 < _error(base, tiny_decomposer.transformer)

    assert tiny_decomposer.context_fusion is not None
    fusion, expected = load_file(beside), tiny_decomposer.context_fusion.state_dict()
    assert fusion.keys() == expected.keys() and all(fusion[name].equal(expected[name]) for name in expected)


def test_without_fusion_there_is_one_file(tiny_config: DecomposerConfig, tiny_weights: Path, tmp_path: Path) -> None:
    config = DecomposerConfig(tiny_config.weights, tiny_config.lora, ContextFusionConfig(enabled=False))
    decomposer = build_decomposer(config)
    fill(decomposer.transformer.img_in, seed=1)
    decomposer.adapter(config.to_metadata()).save(tmp_path / "adapter.safetensors")
    out = tmp_path / "merged.safetensors"
    assert export(tmp_path / "adapter.safetensors", "merged", out) == [out]
    assert load_mmdit(out).img_in.weight.equal(decomposer.transformer.img_in.weight.bfloat16().float())


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_an_adapter_can_replace_itself(tiny_weights: Path, tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((tiny_weights / "adapter.safetensors").read_bytes())
    assert path in export(path, format, path)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


@pytest.mark.parametrize(
    ("source", "format", "message"),
    [
        ("adapter", "kohya2", "format=kohya2: expected one of adapter, merged"),
        ("absent", "adapter", "absent.safetensors does not exist"),
        ("autoencoder", "merged", "autoencoder.safetensors is not an adapter"),
    ],
)
def test_what_cannot_be_exported(tiny_weights: Path, tmp_path: Path, source: str, format: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(tiny_weights / f"{source}.safetensors", format, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
