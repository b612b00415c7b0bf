"""The benchmark against diffusers and peft: both sides do the same work, or an error is raised."""

import re

import pytest
import torch

from layerdecomp.benchmark import BenchmarkConfig
from layerdecomp.errors import InputError
from layerdecomp.models.lora import LoRALinear
from layerdecomp.overrides import merge_config
from layerdecomp.reference import NAMES, Side, compare, differences, pair, random_inputs, results

CPU = torch.device("cpu")
SMALL = BenchmarkConfig(size=32, scale=0.04, text_tokens=2, repeats=1, reference="diffusers")
SMALL.lora.rank, SMALL.lora.alpha, SMALL.fusion.num_queries = 4, 6.0, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_train_the_same_weights_and_compute_the_same(dtype: torch.dtype) -> None:
    ours, theirs = pair(SMALL, CPU, dtype)
    inputs = random_inputs(SMALL, ours)
    found = differences(results(Side(ours), inputs), results(Side(theirs, NAMES), inputs))
    assert all(0 < value < (1e-5 if dtype == torch.float32 else 0.1) for value in found.values())
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {"x_embedder.weight", "x_embedder.bias"} < trained
    assert all(".lora_" in name or name.startswith("x_embedder.") for name in trained)
    adapted = [name for name in trained if ".lora_A." in name]
    layers = [name for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)]
    split = sum(2 if "qkv" in name else 3 if "linear1" in name else 0 for name in layers)  # q, k and v are split there
    assert len(adapted) == len(layers) + split
    assert {parameter.dtype for parameter in theirs.parameters() if parameter.requires_grad} == {torch.float32}


def test_the_table_has_both_sides_and_their_ratio() -> None:
    printed = compare(SMALL, "cpu", torch.float32)
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == ["forward + backward, eager", "one sampling step, eager"]
    for row in rows:
        ours, theirs, ratio = (float(cell) for cell in row[4:7])
        assert ours > 0 and ratio == pytest.approx(ours / theirs, abs=2e-3)
    counted = [float(cell) for cell in rows[1][2:4]]
    assert counted[0] == counted[1] > 0, "with LoRA merged, both run the plain base"
    assert re.search(r"diffusers [0-9.]+, peft [0-9.]+", printed)


@pytest.mark.parametrize(
    ("setting", "neutral"),
    [
        ("quantize=int8", "None"),
        ("bits=8", "32"),
        ("recompute=1", "0"),
        ("recompute_attention=false", "True"),
        ("encode_batch_size=1", "0"),
        ("steps=4", "28"),
        ("measure=false", "True"),
        ("sync_debug=warn", "default"),
    ],
)
def test_settings_that_the_reference_lacks_are_refused(setting: str, neutral: str) -> None:
    merge_config(BenchmarkConfig(), [], [setting])
    with pytest.raises(InputError, match=f"{setting.split('=')[0]} is .*; expected {neutral} with reference=diff"):
        merge_config(BenchmarkConfig(), [], ["reference=diffusers", setting])


@pytest.mark.parametrize("gain", [2.0, float("nan")])
def test_models_that_compute_different_results_are_not_compared(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def differing(*args: object) -> object:
        ours, theirs = pair(*args)  # type: ignore[arg-type]
        with torch.no_grad():
            theirs.transformer_blocks[0].attn.norm_q.weight = torch.nn.Parameter(gain * torch.ones(128))
        return ours, theirs

    monkeypatch.setattr("layerdecomp.reference.pair", differing)
    with pytest.raises(InputError, match="the two results differ by"):
        compare(SMALL, "cpu", torch.float32)
