"""Counted memory against the memory of a real step, and configs against the cards they are for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from layerdecomp.benchmark import META, BenchmarkConfig, Workload, count
from layerdecomp.config import load_config
from layerdecomp.dry_run import training_work
from layerdecomp.memory import (
    DENSE_BYTES,
    Peak,
    TrainingWork,
    _memory,
    blocks_are_alike,
    extrapolate_over_blocks,
    parameter_counts,
    training_memory,
    with_depths,
)
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.lora import LoRAConfig, dense
from layerdecomp.quantization import BITS, quantized

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = TrainingWork(
    size=64,
    text_tokens=5,
    lora=LoRAConfig(rank=4),
    model=replace(BenchmarkConfig(scale=0.08).transformer, depth=3, depth_single_blocks=4),
    rgb=AutoencoderConfig(ch=8, ch_mult=[1, 1, 2, 2], num_res_blocks=1, norm_groups=4),
)


def test_live_storages_are_counted_once_until_they_are_freed() -> None:
    before = torch.zeros(10)
    with Peak(before) as peak:
        a = torch.zeros(100)  # 400 bytes
        views = [a[:50], a.view(10, 10), before[2:], before.mul_(2)]
        b = a + 1
        del b
        c = torch.zeros(25)
    assert (peak.now, peak.peak) == (500, 800) and len(views) == 4 and c.nbytes == 100


def test_the_counted_peak_equals_the_allocators() -> None:
    """On a real step of a small model, whose allocations PyTorch's profiler records."""
    torch.manual_seed(0)
    workload = Workload(SMALL, torch.device("cpu"), torch.bfloat16)
    trained = workload.trained
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*workload.decomposer.parameters(), *workload.decomposer.buffers(), *(p.grad for p in trained)]
    known += [value for value in vars(workload).values() if isinstance(value, Tensor)]
    workload.train()
    with Peak(*known) as counted:
        workload.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        workload.train()
    events = sorted(
        (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"),  # type: ignore[union-attr]
        key=lambda e: e.start_ns(),
    )
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    assert counted.peak == pytest.approx(peak, rel=0.05)
    # on the meta device, with the attention of a GPU
    assert training_memory(SMALL).step == pytest.approx(counted.peak, rel=0.3)


@pytest.mark.parametrize(("recompute", "attention"), [(0, True), (2, True), (2, False)])
def test_memory_extrapolates_from_few_blocks_to_many(recompute: int, attention: bool) -> None:
    work = with_depths(replace(SMALL, recompute=recompute, recompute_attention=attention, size=32), (7, 6))
    extrapolated = training_memory(work)
    whole = _memory(work)
    assert (extrapolated.frozen, extrapolated.trained) == (whole.frozen, whole.trained)
    assert extrapolated.step == pytest.approx(whole.step, rel=0.01) and extrapolated.encode == whole.encode


@pytest.mark.parametrize(
    ("targets", "alike"),
    [
        (["double_blocks.*_attn.qkv", "*.linear1"], True),
        (["double_blocks.*_attn.qkv", "single_blocks.5.linear1"], False),  # a block that a small model lacks
        (["single_blocks.?.linear1", "single_blocks.??.linear1"], False),
        (["single_blocks.[0-3]*.linear1"], False),
        (["double_blocks.*[02468].img_mlp.0"], False),
    ],
)
def test_blocks_with_different_lora_targets_are_counted_one_by_one(targets: list[str], alike: bool) -> None:
    work = with_depths(replace(SMALL, size=32, lora=LoRAConfig(rank=4, targets=targets)), (7, 12))
    assert blocks_are_alike(work) == alike
    found, whole = training_memory(work), _memory(work)
    assert (found.frozen, found.trained) == (whole.frozen, whole.trained)
    assert found.step == (pytest.approx(whole.step, rel=0.01) if alike else whole.step)
    assert extrapolate_over_blocks(count, work) == pytest.approx(count(work))


def test_recomputation_and_encoding_one_image_at_a_time_save_memory() -> None:
    none, every, some = (training_memory(replace(SMALL, recompute=n)) for n in (0, 1, 2))
    assert every.step < some.step < none.step and every.step < 0.6 * none.step
    one = training_memory(replace(SMALL, encode_batch_size=1))
    assert one.encode < 0.5 * none.encode and one.step == none.step


def test_a_sharded_base_needs_its_shard_and_whole_blocks_while_they_run() -> None:
    whole, half = (training_memory(replace(SMALL, shards=n)) for n in (1, 2))
    decomposer = Workload(SMALL, META, torch.bfloat16).decomposer
    frozen = {name: p.nbytes for name, p in decomposer.transformer.named_parameters() if not p.requires_grad}
    assert whole.frozen - half.frozen == sum(frozen.values()) / 2
    block = sum(size for name, size in frozen.items() if name.startswith("double_blocks.0."))  # the largest
    outside = sum(size for name, size in frozen.items() if "_blocks." not in name)
    assert half.step - whole.step == 2 * block + outside and half.encode == whole.encode


def test_kept_attention_takes_its_output_in_bf16_and_a_float_per_head() -> None:
    """Counted as on a GPU; a CPU would compute and keep bf16 attention in float32."""
    recomputed, kept = (
        training_memory(replace(SMALL, size=256, recompute=1, recompute_attention=recompute)).step
        for recompute in (True, False)
    )
    model = SMALL.model
    tokens = SMALL.text_tokens + SMALL.fusion.num_queries + 2 * 16 * 16
    block = tokens * (2 * model.hidden_size + 4 * model.num_heads)
    # at the peak, the block being computed holds these tensors in either case
    blocks = model.depth + model.depth_single_blocks
    assert (blocks - 2) * block <= kept - recomputed <= blocks * block


def test_parameters_and_bytes_at_full_size() -> None:
    counts = parameter_counts(TrainingWork())
    assert counts["transformer, frozen"] + counts["img_in"] == 11_902_391_360  # the published count
    assert counts["LoRA"] == 896_532_480
    rgb, rgba = 83_819_683, 83_819_683 + 9 * 128 + 9 * 128 + 1
    assert counts["autoencoders"] == rgb + rgba


@pytest.mark.parametrize("name", BITS)
def test_dequantising_a_weight_takes_the_counted_memory(name: str) -> None:
    weight = torch.randn(512, 512).bfloat16()
    packed = quantized(weight, name)
    with Peak() as peak:
        assert dense(packed).shape == weight.shape
    assert peak.peak / weight.numel() == pytest.approx(DENSE_BYTES[name], rel=0.02)


@pytest.mark.parametrize("gigabytes", [80, 48, 24])
def test_configs_fit_their_cards(gigabytes: int) -> None:
    """With room for the CUDA context (half a gigabyte), kernel workspaces and allocator fragmentation."""
    config, paper = (load_config(CONFIGS / f"flux_fill{card}.yaml") for card in (f"_{gigabytes}gb", ""))
    work = training_work(config)
    assert (work.size, work.batch_size, work.lora.rank) == (1024, 1, 256)
    assert config.train == paper.train and config.lora == paper.lora and config.weights == paper.weights
    memory = training_memory(work)
    assert memory.total < 0.94 * gigabytes * 2**30  # nominal size
    comment, _, _ = (CONFIGS / f"flux_fill_{gigabytes}gb.yaml").read_text().partition("\nbase:")
    assert comment.endswith(f"Counted: {memory.total / 1e9:.1f} GB.")
