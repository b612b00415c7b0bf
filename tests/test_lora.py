"""LoRA: counts, names, equality with the base at the start, merging, precision, and invalid settings."""

import copy
from dataclasses import replace

import pytest
import torch
from reference import randomize, relative_error
from test_mmdit import TINY, build, inputs
from torch import nn
from torch.nn import functional as F

from layerdecomp.errors import InputError
from layerdecomp.models.lora import LoRAConfig, LoRALinear, inject_lora, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig

SMALL = LoRAConfig(rank=3, alpha=6.0)


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def randomize_lora(model: nn.Module) -> None:
    for seed, layer in enumerate(lora_layers(model)):
        randomize(layer.lora_A, seed=2 * seed)
        randomize(layer.lora_B, seed=2 * seed + 1)


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    names = inject_lora(model, LoRAConfig(rank=256))
    added = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert sum(p.numel() for p in added) == 896_532_480
    assert all(p.is_meta and p.dtype == torch.float32 and p.requires_grad for p in added)
    assert len(names) == 19 * 8 + 38 * 2


def test_injected_model_equals_the_base_bit_for_bit() -> None:
    model, x = build(), inputs()
    expected, before = model(**x), dict(model.named_parameters())
    names = inject_lora(model, SMALL)
    assert len(names) == len(lora_layers(model)) == TINY.depth * 8 + TINY.depth_single_blocks * 2
    assert torch.equal(model(**x), expected)

    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    assert after.keys() - before.keys() == added
    frozen = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert {name for name, parameter in after.items() if not parameter.requires_grad} == frozen


def test_default_targets_are_the_attention_and_feed_forward_linears() -> None:
    model = build()
    names = set(inject_lora(model, SMALL))
    for stream in ("img", "txt"):
        assert {f"double_blocks.1.{stream}_{part}" for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")} <= names
    assert {"single_blocks.2.linear1", "single_blocks.2.linear2"} <= names
    assert not any(part in name for name in names for part in ("_in", "final_layer", "mod"))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_scale_is_alpha_over_rank(alpha: float | None) -> None:
    base = nn.Linear(5, 4)
    model = nn.Sequential(copy.deepcopy(base))
    inject_lora(model, LoRAConfig(rank=3, alpha=alpha, targets=["0"]))
    randomize_lora(model)
    (layer,) = lora_layers(model)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    update = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(model(x) - base(x), update * (1.0 if alpha is None else 2.0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_and_a_high_rank_use_the_merged_weight_with_equal_results(bias: bool) -> None:
    base = nn.Linear(12, 10, bias=bias)
    model = nn.Sequential(base)
    inject_lora(model, LoRAConfig(rank=8, alpha=4.0, targets=["0"]))
    randomize_lora(model)
    (layer,) = lora_layers(model)
    x = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = [x, layer.lora_A.weight, layer.lora_B.weight]
    expected = base(x) + 0.5 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    assert layer._merged_is_cheaper(100) and not layer._merged_is_cheaper(1)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(y.square().sum(), weights) for y in (model(x), expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_the_merged_weight_is_not_used_at_full_size() -> None:
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(3072, 9216), rank=256, scale=1.0)
    assert not layer._merged_is_cheaper(2 * 4096 + 512 + 256)  # tokens at 1024 x 1024


def test_merging_keeps_the_output_and_restores_plain_layers() -> None:
    model, x = build(), inputs()
    names_before = model.state_dict().keys()
    base = model(**x)
    inject_lora(model, SMALL)
    randomize_lora(model)
    expected = model(**x)
    assert relative_error(expected, base) > 1e-2

    assert merge_lora(model) is model
    assert model.state_dict().keys() == names_before
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert relative_error(model(**x), expected) < 1e-5


def test_only_the_low_rank_weights_are_trained() -> None:
    model, x = build(), inputs()
    model.requires_grad_(False)
    inject_lora(model, SMALL)
    before = copy.deepcopy(model.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # B changes in the first step, A only from the second on
        optimizer.zero_grad()
        model(**x).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    added = {name for name in before if ".lora_" in name}
    assert changed == added


def test_bf16_base_with_float32_lora() -> None:
    model, x = build(), inputs()
    x = {name: tensor.bfloat16() if name in ("img", "txt", "y") else tensor for name, tensor in x.items()}
    model.bfloat16()
    base = model(**x)
    inject_lora(model, SMALL)
    assert all(layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32 for layer in lora_layers(model))
    for layer in lora_layers(model):  # per layer: on a CPU, bf16 rounding in the whole model depends on the batch
        rows = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))

    randomize_lora(model)
    adapted = model(**x)
    assert adapted.dtype == torch.bfloat16
    assert relative_error(adapted.float(), base.float()) > 0.1
    assert relative_error(merge_lora(model)(**x).float(), adapted.float()) < 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_merging_into_bf16_rounds_only_once() -> None:
    model = nn.Sequential(nn.Linear(32, 32).bfloat16())
    inject_lora(model, LoRAConfig(rank=4, targets=["0"]))
    randomize_lora(model)
    (layer,) = lora_layers(model)
    expected = (layer.weight.double() + layer.lora_B.weight.double() @ layer.lora_A.weight.double()).float().bfloat16()
    merge_lora(model)
    assert (model[0].weight == expected).float().mean() > 0.99  # float32 sums may round a tie the other way


def test_autocast_is_close_to_float32() -> None:
    model, x = build(), inputs()
    inject_lora(model, SMALL)
    randomize_lora(model)
    expected = model(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(**x).float(), expected) < 0.1


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("double_blocks.*.image_attn.qkv", "double_blocks.0.img_attn.qkv"),
        ("single_blocks.0", "single_blocks.0.*, single_blocks.0.linear"),  # a module, but not a linear layer
        ("double_blocks", "such as double_blocks.*, double_blocks."),
        ("single_blocks.*.linear", "single_blocks.2.linear2"),
    ],
)
def test_a_target_pattern_without_a_linear_layer_is_named(pattern: str, nearest: str) -> None:
    model = build()
    with pytest.raises(InputError) as error:
        inject_lora(model, replace(SMALL, targets=["single_blocks.*.linear1", pattern]))
    assert repr(pattern) in str(error.value)
    assert nearest in str(error.value)
    assert not lora_layers(model)  # no layer is replaced


def test_injecting_twice_is_refused() -> None:
    model = build()
    inject_lora(model, SMALL)
    with pytest.raises(InputError, match="already"):
        inject_lora(model, SMALL)


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="rank"):
        LoRAConfig(rank=0)


def test_autocast_saves_no_cast_of_a_and_b() -> None:
    """For the backward pass in bf16: the input and the low-rank product, beside the float32 parameters themselves."""
    layer = LoRALinear(nn.Linear(64, 32, dtype=torch.bfloat16), rank=16, scale=0.5)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        output = layer(x)
    assert sum(size for address, size in saved.items() if address not in parameters) == 2 * 2 * (64 + 16)
    torch.autograd.backward(output.float().square().mean())
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
def test_gradients_under_autocast_equal_those_in_float32(forward: bool, backward: bool) -> None:
    layer = LoRALinear(nn.Linear(64, 32), rank=16, scale=0.5)
    for seed, part in enumerate((layer.lora_A, layer.lora_B)):
        randomize(part, seed)
    x = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = [x, layer.lora_A.weight, layer.lora_B.weight]
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        found = layer(x).float()
    update = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    expected = F.linear(x, layer.weight, layer.bias) + 0.5 * update
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        gradients = torch.autograd.grad(found.square().sum(), leaves)
    assert relative_error(found, expected) < 1e-2
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        assert relative_error(ours, theirs) < 2e-2
