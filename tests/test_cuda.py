"""On a GPU: results equal the CPU's and diffusers', with every kernel, compiled or not; no step waits for the GPU.

Skipped without a GPU: run `make test ARGS=tests/test_cuda.py` on a machine that has one.
"""

import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RGB, curve, fill
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerdecomp.benchmark import BenchmarkConfig, Workload
from layerdecomp.config import load_config
from layerdecomp.inpainting import mixed_precision
from layerdecomp.memory import TrainingWork, _memory
from layerdecomp.models.attention import attention
from layerdecomp.models.autoencoder import Autoencoder
from layerdecomp.models.mmdit import MMDiTConfig
from layerdecomp.quantization import BITS, quantized
from layerdecomp.reference import NAMES, Side, differences, pair, random_inputs, results, without_cudnn_attention
from layerdecomp.training.base import Job
from layerdecomp.training.runs import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
WORK = BenchmarkConfig(size=256, scale=0.1, text_tokens=64, repeats=1)
WORK.lora.rank, WORK.fusion.num_queries = 16, 32
WIDE = TrainingWork(size=768, model=replace(MMDiTConfig(), depth=1, depth_single_blocks=2))
# Tolerances relative to the largest value: several times the rounding error of each precision.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
PRECISIONS = pytest.mark.parametrize("dtype", list(ROUNDING))


def max_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a.double().cpu() - b.double().cpu()).abs().max() / b.double().abs().max().cpu()).item()


def gradients(workload: Workload) -> list[Tensor]:
    """The gradients of all trained parameters."""
    workload.train()
    trained = workload.trained
    found = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    assert len(found) == len(trained)
    workload.decomposer.zero_grad()
    return found


@PRECISIONS
def test_the_transformer_equals_diffusers(dtype: torch.dtype) -> None:
    ours, theirs = pair(WORK, CUDA, dtype)
    inputs = random_inputs(WORK, ours)
    with without_cudnn_attention():
        expected = results(Side(theirs, NAMES), inputs)
    found = differences(results(Side(ours), inputs), expected)
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert all(0 < value < ROUNDING[dtype] for value in found.values())


@pytest.mark.parametrize("size", [256, 768])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_the_transformer_equals_diffusers_at_full_width(backend: str, size: int) -> None:
    work = replace(WIDE, size=size)
    ours, theirs = pair(work, CUDA, torch.bfloat16)
    inputs = random_inputs(work, ours)
    with without_cudnn_attention():
        expected = results(Side(theirs, NAMES), inputs)
    with sdpa_kernel(SDPBackend.__members__[backend]):
        found = differences(results(Side(ours), inputs), expected)
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert all(0 < value < ROUNDING[torch.bfloat16] for value in found.values())


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_attention_gradients_do_not_depend_on_the_layout_of_the_incoming_gradient(backend: str) -> None:
    """For the second of the two layouts, cuDNN's gradients were wrong."""
    q, k, v, wide = torch.randn(4, 1, 4, 200, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = torch.cat([wide.transpose(1, 2).flatten(2)] * 2, dim=-1)  # one half is the incoming gradient, non-contiguous
    expected, found = [], []
    for device, kept in (("cuda", found), ("cpu", expected)):
        with sdpa_kernel(SDPBackend.__members__[backend]) if device == "cuda" else nullcontext():
            for layout in (Tensor.contiguous, Tensor.detach):
                inputs = [x.to(device).requires_grad_(True) for x in (q, k, v)]
                gradient = layout(wide.to(device)[..., : wide.shape[-1] // 2])
                kept += torch.autograd.grad(attention(*inputs), inputs, gradient)
    assert max(max_error(a, b) for a, b in zip(found, expected, strict=True)) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, torch.bfloat16) for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION")),  # half precision only
        *((backend, dtype) for backend in ("EFFICIENT_ATTENTION", "MATH") for dtype in ROUNDING),
    ],
)
def test_every_attention_backend_equals_float64(backend: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 200, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    with sdpa_kernel(SDPBackend.__members__[backend]):
        found = attention(q.cuda(), k.cuda(), v.cuda())
    assert max_error(found, attention(q.double(), k.double(), v.double())) < ROUNDING[dtype]


@PRECISIONS
def test_the_autoencoder_equals_the_cpu(dtype: torch.dtype) -> None:
    model = Autoencoder(RGB)
    fill(model, 0)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = model.encode(x)
        expected = z, model.decode(z)
        model = model.cuda().to(dtype)
        found = model.encode(x.cuda().to(dtype)), model.decode(z.cuda().to(dtype))
    for a, b in zip(found, expected, strict=True):
        assert max_error(a, b) < ROUNDING[dtype]


@pytest.mark.parametrize("change", ["compiled", "recomputed", "both"])
def test_compiling_and_recomputing_do_not_change_gradients(change: str) -> None:
    torch.manual_seed(0)
    workload = Workload(WORK, CUDA, torch.bfloat16)
    for name, parameter in workload.decomposer.named_parameters():
        if name.endswith("lora_B.weight"):  # otherwise the gradients of A are zero
            torch.nn.init.normal_(parameter, std=0.02)
    expected = gradients(workload)
    if change != "recomputed":
        workload.decomposer.transformer.compile_blocks()
    workload.decomposer.transformer.recompute = int(change != "compiled")
    found = gradients(workload)
    assert max(max_error(a, b) for a, b in zip(found, expected, strict=True)) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("name", BITS)
def test_a_quantised_layer_equals_the_cpu(name: str) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = F.linear(x.cuda(), quantized(weight.cuda(), name))
    expected = F.linear(x, quantized(weight, name))
    assert max_error(found, expected) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("recompute", [0, 1])
def test_counted_memory_is_slightly_above_the_measured_peak(recompute: int) -> None:
    work = TrainingWork(
        size=512, scale=1.0, recompute=recompute, model=replace(WORK.transformer, hidden_size=1536, num_heads=12)
    )
    workload = Workload(work, CUDA, torch.bfloat16)
    for parameter in workload.trained:
        parameter.grad = torch.zeros_like(parameter)
    workload.train()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    workload.train()
    measured, counted = torch.cuda.max_memory_allocated() - before, _memory(work).step
    print(f"recompute={recompute}: counted {counted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB")
    assert measured < counted < 1.2 * measured


def settings(overrides: list[str], run_dir: Path, *more: str) -> list[str]:
    short = ["data.validation=1", "evaluate.samples=1", "sample.steps=1", "evaluate.rows=[adapted]"]
    return [*overrides, *short, "train.steps=6", "train.validate_every=6", f"run_dir={run_dir}", *more]


def test_training_losses_equal_the_cpu(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerdecomp.training.decomposer.local_device", lambda: "cpu")  # for equal initial weights
    exact = ("train.precision=32-true", "optim.muon=false")
    train(load_config(ROOT / "configs" / "tiny.yaml", settings(tiny_overrides, tmp_path / "cuda", *exact)))
    arguments = [f"config={ROOT}/configs/tiny.yaml", *settings(tiny_overrides, tmp_path / "cpu", *exact)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # for a new process: this one has initialised CUDA
    subprocess.run([sys.executable, ROOT / "tools" / "train.py", *arguments], env=hidden, cwd=ROOT, check=True)
    assert curve(tmp_path / "cuda") == pytest.approx(curve(tmp_path / "cpu"), rel=2e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_overrides: list[str], tmp_path: Path) -> None:
    def run(name: str, *more: str) -> dict[str, Tensor]:
        chosen = settings(
            tiny_overrides, tmp_path / name, "train.deterministic=true", "train.checkpoint_every=3", *more
        )
        train(load_config(ROOT / "configs" / "tiny.yaml", chosen))
        return load_file(tmp_path / name / "adapter.safetensors")

    straight = run("straight")
    checkpoint = tmp_path / "straight" / "previous.ckpt"  # of step 3
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    continued = run("continued", f"resume={checkpoint}")
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    torch.use_deterministic_algorithms(False)


def test_no_step_waits_for_the_device(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, ends, waits = Job.on_train_batch_start, Job.on_train_batch_end, list[str]()

    def start(self: Job, batch: dict[str, Any], index: int) -> None:
        if 1 <= self.global_step <= 4:  # not the first, which builds tables, nor the last, which is saved
            torch.cuda.set_sync_debug_mode("warn")
        starts(self, batch, index)

    def end(self: Job, *args: Any) -> None:
        ends(self, *args)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Job, "on_train_batch_start", start)
    monkeypatch.setattr(Job, "on_train_batch_end", end)
    chosen = settings(tiny_overrides, tmp_path / "run", "optim.muon=false", "train.checkpoint_every=6")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(load_config(ROOT / "configs" / "tiny.yaml", chosen))
    waits += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert not waits, waits


def test_sampling_in_bf16_is_near_float32() -> None:
    torch.manual_seed(0)
    workload = Workload(WORK, CUDA, torch.float32)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        workload.decomposer.autoencoder.to(dtype)
        with torch.no_grad(), mixed_precision(workload.decomposer.autoencoder):
            found.append(workload.decomposer.velocity(workload.z, workload.context, workload.t))
    assert 0 < max_error(found[1], found[0]) < ROUNDING[torch.bfloat16]
