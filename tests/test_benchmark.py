"""Counted operations against closed formulas, and the benchmark of a small model."""

import re
from dataclasses import replace

import pytest
import torch

from layerdecomp.benchmark import (
    ENCODING,
    FUSION,
    STEP,
    TRAINING,
    BenchmarkConfig,
    Workload,
    benchmark,
    count,
    flop_counter,
    stopwatch,
)
from layerdecomp.errors import InputError
from layerdecomp.models.context_fusion import ContextFusionConfig
from layerdecomp.models.lora import LoRAConfig
from layerdecomp.overrides import merge_config

# two heads of 128, two double blocks and three single ones; 2 * 16 image tokens
SMALL = BenchmarkConfig(size=64, scale=0.08, text_tokens=5, lora=LoRAConfig(rank=2))


def forward_products(config: BenchmarkConfig, rank: int) -> int:
    """The multiplications of a forward pass with LoRA of a rank, 0 if merged, from a closed formula."""
    model = config.transformer
    D, mlp = model.hidden_size, 4 * model.hidden_size
    image, text = 2 * (config.size // 16) ** 2, config.text_tokens + config.fusion.num_queries
    both = image + text
    adapted = lambda i, o, tokens: tokens * (i * o + rank * (i + o))  # noqa: E731
    stream = lambda tokens: sum(  # noqa: E731
        adapted(i, o, tokens) for i, o in ((D, 3 * D), (D, D), (D, mlp), (mlp, D))
    )
    attention = 2 * both * both * D
    double = stream(image) + stream(text) + 2 * 6 * D * D + attention
    single = adapted(D, 3 * D + mlp, both) + adapted(D + mlp, D, both) + 3 * D * D + attention
    ends = image * D * (model.in_channels + model.out_channels) + config.text_tokens * model.context_in_dim * D
    condition = 2 * (256 * D + D * D) + model.vec_in_dim * D + D * D + 2 * D * D
    return model.depth * double + model.depth_single_blocks * single + ends + condition


def test_counts_equal_the_formulas() -> None:
    counts = count(SMALL)
    assert (SMALL.transformer.depth, SMALL.transformer.depth_single_blocks) == (2, 3)
    assert counts["one sampling step"] == 2 * forward_products(SMALL, rank=0)
    assert counts["of which recomputed"] == 0
    assert 2 * counts["one sampling step"] < counts[TRAINING] < 3 * counts["one sampling step"], "frozen weights"
    assert 0 < counts[FUSION] < counts[TRAINING]


@pytest.mark.parametrize("rank", [2, 400])  # of width 256; a large rank is added to the weight first
def test_the_count_of_lora_is_what_training_without_it_saves(rank: int) -> None:
    config = replace(SMALL, lora=LoRAConfig(rank=rank))
    none = replace(SMALL, lora=LoRAConfig(rank=rank, targets=[]))
    counts = count(config)
    assert counts["of which LoRA"] == counts[TRAINING] - count(none)[TRAINING] > 0


def test_cpu_and_meta_device_counts_are_equal() -> None:
    found = []
    for device in ("meta", "cpu"):
        workload = Workload(SMALL, torch.device(device), torch.float32)
        with flop_counter() as counter:
            workload.train()
        found.append(counter.get_total_flops())
        assert any("attention" in str(name) for name in counter.get_flop_counts()["Global"]) == (device == "cpu")
    assert found[0] == found[1]


def test_recomputing_costs_no_more_than_another_forward_pass() -> None:
    counts = count(BenchmarkConfig(**{**vars(SMALL), "recompute": 1}))
    forward = 2 * forward_products(SMALL, SMALL.lora.rank)
    assert 0.5 * forward < counts["of which recomputed"] < forward


def test_attention_that_is_not_recomputed_is_not_counted_again() -> None:
    recomputed, kept = (
        count(BenchmarkConfig(**{**vars(SMALL), "recompute": 1, "recompute_attention": attention}))
        for attention in (True, False)
    )
    model, tokens = SMALL.transformer, 2 * (SMALL.size // 16) ** 2 + SMALL.text_tokens + SMALL.fusion.num_queries
    forward = 2 * 2 * tokens**2 * model.hidden_size * (model.depth + model.depth_single_blocks)
    assert recomputed["of which recomputed"] - kept["of which recomputed"] == forward


def test_disabled_fusion_costs_nothing() -> None:
    config = BenchmarkConfig(**{**vars(SMALL), "fusion": ContextFusionConfig(enabled=False)})
    counts, full = count(config), count(SMALL)
    assert counts[FUSION] == 0 and counts["encode image, mask, cues"] < full["encode image, mask, cues"]


def test_a_small_model_is_measured() -> None:
    report = benchmark(BenchmarkConfig(size=32, scale=0.04, text_tokens=2, repeats=1), "cpu", torch.float32)
    assert (
        "measured on" in report and "attention by FLASH_ATTENTION" in report and "1 + 2 blocks of width 128" in report
    )
    rows = [line.split("|") for line in report.splitlines() if line.startswith("|")][2:]
    measured = [row for row in rows if row[3].strip()]
    assert len(rows) == 11 and len(measured) == 7
    assert all(float(row[3]) > 0 and not row[6].strip() for row in measured)  # no memory of a part on a CPU
    assert "a training step, the optimizer included" in report
    assert re.search(r"a decomposition in 28 steps: [0-9.]+ TFLOP", report)


def test_a_training_step_counts_its_parts_and_updates_the_weights() -> None:
    counts = count(SMALL)
    parts = (counts[f"of which {part}"] for part in ("linear, without LoRA", "LoRA", "attention"))
    assert sum(parts) == counts[TRAINING]
    assert counts[STEP] == counts[ENCODING] + counts[TRAINING] and counts[ENCODING] > counts["encode image, mask, cues"]
    torch.manual_seed(0)
    few_bits = replace(SMALL, quantize="int8", bits=8, encode_batch_size=1)
    workload = Workload(few_bits, torch.device("cpu"), torch.bfloat16)
    parameters = dict(workload.decomposer.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad}
    frozen = {name for name in parameters if name not in before}
    quantised = {name for name in frozen if type(parameters[name].data) not in (torch.Tensor, torch.nn.Parameter)}
    assert quantised == {name for name in frozen if "_blocks." in name and parameters[name].dim() == 2}
    workload.step()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, parameters[name])}
    assert changed == {name for name in before if "lora_A" not in name}  # the gradient of A is zero while B = 0
    assert all(parameter.grad is None for parameter in parameters.values())


def test_sync_debug_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="sync_debug=error needs a GPU"):
        benchmark(BenchmarkConfig(size=32, scale=0.04, sync_debug="error"), "cpu", torch.float32)


def test_the_stopwatch_synchronises_every_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", calls.append)
    for name in ("cpu", "mps", "cuda"):
        stopwatch(lambda: calls.append("run"), torch.device(name))
    assert calls == ["run", *(x for name in ("mps", "cuda") for x in (torch.device(name), "run", torch.device(name)))]


def test_fusion_of_three_cues_takes_less_than_3_percent_of_a_step() -> None:
    counts = count(BenchmarkConfig())
    assert 0 < counts[FUSION] < 0.03 * counts[TRAINING]


@pytest.mark.parametrize(
    "setting",
    ["size=40", "scale=0", "scale=2", "batch_size=0", "recompute=-1", "sync_debug=yes", "bits=4", "quantize=no"],
)
def test_invalid_settings_are_rejected_by_name(setting: str) -> None:
    with pytest.raises(InputError, match=setting.split("=")[0]):
        merge_config(BenchmarkConfig(), [], [setting])
