"""The quantised base: precision, memory, gradients through it, and invalid settings."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError
from layerdecomp.models.lora import LoRAConfig, LoRALinear, dense, inject_lora, is_quantized, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import BITS, block_matrices, quantize_blocks, quantized, stored_bytes
from layerdecomp.weights import load_mmdit, save_model

# Relative errors of normal values: uniform steps relative to the largest of 256, a mantissa of 3 bits, 16 levels.
ERRORS = {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}
FORMATS = pytest.mark.parametrize("name", BITS)


def matrix(rows: int = 128, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_close_and_small(name: str, dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    found = quantized(weight, name)
    assert is_quantized(found) and not is_quantized(weight) and found.shape == weight.shape and found.dtype == dtype
    assert dense(found).dtype == dtype
    error = ((dense(found) - weight).norm() / weight.norm()).item()
    assert 0.3 * ERRORS[name] < error < ERRORS[name]
    bits = 8 * stored_bytes(found) / weight.numel()
    assert BITS[name] <= bits < 1.05 * BITS[name]


@FORMATS
def test_a_row_of_zeros_stays_zero(name: str) -> None:
    weight = matrix()
    weight[3] = 0
    found = dense(quantized(weight, name))
    assert found.isfinite().all() and not found[3].any() and found[4].any()


@FORMATS
def test_gradients_through_a_quantised_layer_equal_those_of_its_dense_weight(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128))
    plain = nn.Sequential(nn.Linear(256, 128))
    model[0].weight = nn.Parameter(quantized(matrix(), name), requires_grad=False)
    plain[0].weight = nn.Parameter(dense(model[0].weight).clone())
    plain[0].bias = model[0].bias
    layers = []
    for part in (model, plain):
        inject_lora(part, LoRAConfig(rank=2, alpha=3.0, targets=["0"]))
        fill(nn.ModuleList([part[0].lora_A, part[0].lora_B]), seed=1)  # type: ignore[list-item]
        layers.append(part[0])
    x = torch.randn(2, 3, 256, requires_grad=True)
    found = []
    for layer in layers:
        assert isinstance(layer, LoRALinear) and not layer.weight.requires_grad
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.lora_A.weight, layer.lora_B.weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@FORMATS
def test_autograd_keeps_no_dense_weight(name: str) -> None:
    kept: list[Tensor] = []
    layer = LoRALinear(nn.Linear(256, 128), rank=2, scale=1.0)
    layer.weight = nn.Parameter(quantized(matrix(), name), requires_grad=False)
    x = torch.randn(1, 3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept and max(tensor.numel() for tensor in kept if not is_quantized(tensor)) < 128 * 256


MODEL = MMDiTConfig(
    hidden_size=64, num_heads=2, axes_dim=[8, 12, 12], depth=1, depth_single_blocks=2, context_in_dim=8, vec_in_dim=8
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MMDiT(MODEL)
    fill(model, seed=0)
    path = tmp_path_factory.mktemp("base") / "transformer.safetensors"
    save_model(path, model, {}, torch.float32)
    return path


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    return {
        **{"img": normal(2, 12, 384), "img_ids": ids, "txt": normal(2, 5, 8), "txt_ids": torch.zeros(5, 3)},
        **{"timesteps": torch.tensor([0.3, 0.8]), "y": normal(2, 8), "guidance": torch.tensor([1.0, 30.0])},
    }


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_keeps_names_and_nearly_the_velocity(weights: Path, name: str, dtype: torch.dtype) -> None:
    model, plain = load_mmdit(weights, dtype=dtype, quantize=name), load_mmdit(weights)
    assert list(model.state_dict()) == list(plain.state_dict())
    found_quantised = {key for key, tensor in model.named_parameters() if is_quantized(tensor)}
    assert found_quantised == {k for k, p in plain.named_parameters() if "_blocks." in k and p.dim() == 2}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig(rank=2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = model(**inputs()).float(), plain(**inputs())
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < {"int8": 0.02, "fp8": 0.06, "nf4": 0.3}[name] + 0.02 * (dtype == torch.bfloat16)


@FORMATS
def test_autograd_keeps_no_dense_weight_of_layers_without_lora(weights: Path, name: str) -> None:
    """As in training: frozen parts in bf16, a trained input layer before all blocks, LoRA on some of their layers."""
    plain = load_mmdit(weights, dtype=torch.bfloat16)
    inject_lora(plain, LoRAConfig(rank=2, targets=["*_attn.qkv"]))
    quantize_blocks(plain, name)
    read = load_mmdit(weights, dtype=torch.bfloat16, quantize=name)
    inject_lora(read, LoRAConfig(rank=2, targets=["*_attn.qkv"]))
    for model in (plain, read):
        model.img_in.requires_grad_(True)
        own, kept = {parameter.data_ptr() for parameter in model.parameters() if not is_quantized(parameter)}, []

        def keep(tensor: Tensor, own: set[int] = own, kept: list[Tensor] = kept) -> Tensor:
            matrix = tensor.dim() == 2 and min(tensor.shape) >= MODEL.hidden_size  # there are fewer tokens
            if matrix and not is_quantized(tensor) and tensor.data_ptr() not in own:
                kept.append(tensor)
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            velocity = model(**inputs())
        assert [tensor.shape for tensor in kept] == []
        velocity.float().square().mean().backward()
        assert model.img_in.weight.grad is not None and model.img_in.weight.grad.abs().max() > 0


@FORMATS
def test_merging_leaves_quantised_layers_unmerged(weights: Path, name: str) -> None:
    model = load_mmdit(weights, quantize=name)
    adapted = inject_lora(model, LoRAConfig(rank=2, alpha=3.0))
    for seed, layer in enumerate(module for module in model.modules() if isinstance(module, LoRALinear)):
        fill(nn.ModuleList([layer.lora_A, layer.lora_B]), seed)
    with torch.no_grad():
        expected = model(**inputs())
        merge_lora(model)
        torch.testing.assert_close(model(**inputs()), expected, rtol=0, atol=0)
    assert all(is_quantized(module.weight) for module in model.modules() if isinstance(module, LoRALinear))
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == len(adapted)


def test_block_matrices_quantises_matrices_of_blocks_only() -> None:
    convert, alive = block_matrices("int8"), []
    for number in range(3):
        alive.append(stored_bytes(convert(f"single_blocks.{number}.linear1.weight", matrix())))
    assert sum(alive) < 4 * matrix().numel() and not is_quantized(convert("txt_in.weight", matrix()))


def test_adapters_are_saved_unchanged_with_a_quantised_base(tiny_weights: Path, tmp_path: Path) -> None:
    path = tiny_weights / "adapter.safetensors"
    decomposer = Decomposer.from_pretrained(path, quantize="int8")
    assert any(is_quantized(parameter) for parameter in decomposer.parameters())
    for name, parameter in decomposer.named_parameters():
        parameter.requires_grad_(".lora_" in name or "img_in" in name or name.startswith("context_fusion."))
    decomposer.adapter({}).save(tmp_path / "again.safetensors")
    again, before = load_file(tmp_path / "again.safetensors"), load_file(path)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_unknown_formats_and_a_missing_library_are_errors(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"quantize is 'int3'; expected null, int8, fp8, nf4"):
        load_mmdit(weights, quantize="int3")
    with pytest.raises(InputError, match=r"quantize=nf4: found a matrix of 30 numbers, expected a multiple of 64"):
        quantized(torch.ones(5, 6), "nf4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"quantize=int8 needs the extra quantize .*: pip install -e '\.\[quantize\]'"):
        load_mmdit(weights, quantize="int8")


def test_a_quantised_modulation_computes_with_its_dense_weight(weights: Path) -> None:
    model = load_mmdit(weights, quantize="fp8")
    linear = model.single_blocks[0].modulation.lin
    x = torch.randn(2, 64)
    torch.testing.assert_close(linear(x), F.linear(x, dense(linear.weight), linear.bias))
