"""MMDiT against the published names and against diffusers' FluxTransformer2DModel."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import build_reference_transformer, randomize, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from layerdecomp.conditioning import position_ids
from layerdecomp.errors import InputError
from layerdecomp.models.attention import rope
from layerdecomp.models.lora import LoRAConfig, LoRALinear, inject_lora, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.quantization import quantize_blocks

TINY = MMDiTConfig(
    in_channels=24, out_channels=8, vec_in_dim=12, context_in_dim=20, hidden_size=64, num_heads=4, depth=2,
    depth_single_blocks=3, axes_dim=[4, 6, 6],
)  # fmt: skip

Inputs = dict[str, Tensor]
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ONE_EACH = {ATTENTION_ON_CPU: lambda *args, **kwargs: 1}  # makes FlopCounterMode count calls


def build(config: MMDiTConfig = TINY) -> MMDiT:
    model = MMDiT(config)
    randomize(model)
    return model.eval()


def inputs(config: MMDiTConfig = TINY, batch: int = 2, *, height: int = 3, width: int = 5, text: int = 7) -> Inputs:
    generator = torch.Generator().manual_seed(batch + height + width + text)
    layers = [position_ids(height, width, layer) for layer in (0, 1)]
    return {
        "img": torch.randn(batch, 2 * height * width, config.in_channels, generator=generator),
        "img_ids": torch.cat(layers),
        "txt": torch.randn(batch, text, config.context_in_dim, generator=generator),
        "txt_ids": torch.zeros(text, 3),
        "timesteps": torch.rand(batch, generator=generator),
        "y": torch.randn(batch, config.vec_in_dim, generator=generator),
        "guidance": 1 + 30 * torch.rand(batch, generator=generator),
    }


def test_full_size_has_the_published_names_and_shapes() -> None:
    published = json.loads((Path(__file__).parent / "published_keys.json").read_text())["transformer"]
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert len(published) == 780
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_902_391_360


@pytest.mark.parametrize("guidance_embed", [True, False])
@pytest.mark.parametrize(("batch", "height", "width", "text"), [(1, 2, 2, 1), (2, 3, 5, 7), (3, 1, 9, 16)])
def test_forward_and_input_gradient_equal_diffusers(
    batch: int, height: int, width: int, text: int, guidance_embed: bool
) -> None:
    config = replace(TINY, guidance_embed=guidance_embed)
    model, x = build(config), inputs(config, batch, height=height, width=width, text=text)
    reference = build_reference_transformer(model)
    img, reference_img = x["img"].clone().requires_grad_(), x["img"].clone().requires_grad_()

    velocity = model(**{**x, "img": img})
    expected = reference(
        hidden_states=reference_img,
        img_ids=x["img_ids"],
        encoder_hidden_states=x["txt"],
        txt_ids=x["txt_ids"],
        timestep=x["timesteps"],
        pooled_projections=x["y"],
        guidance=x["guidance"] if guidance_embed else None,
    ).sample
    assert relative_error(velocity, expected) < 1e-5

    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(velocity, img, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, reference_img, cotangent)
    assert relative_error(grad, expected_grad) < 1e-5


def test_position_ids_may_differ_per_sample() -> None:
    model, x = build(), inputs()
    batched = {**x, "img_ids": x["img_ids"].expand(2, -1, -1), "txt_ids": x["txt_ids"].expand(2, -1, -1)}
    torch.testing.assert_close(model(**batched), model(**x))
    moved = batched["img_ids"].clone()
    moved[1, 0, 2] += 3
    difference = (model(**{**batched, "img_ids": moved}) - model(**x)).abs().amax(dim=(1, 2))
    assert difference[0] < 1e-5 < 1e-3 < difference[1]


def test_fused_tokens_are_appended_text_tokens() -> None:
    model, x = build(), inputs()
    more_text = torch.randn(2, 4, TINY.context_in_dim, generator=torch.Generator().manual_seed(3))
    fused = model.txt_in(more_text)
    x["txt_ids"] = torch.arange(21.0).view(7, 3)  # not zero, so that the order of text and fused tokens matters
    ids = torch.cat([x["txt_ids"], torch.zeros(4, 3)])
    as_text = {**x, "txt": torch.cat([x["txt"], more_text], dim=1), "txt_ids": ids}
    torch.testing.assert_close(model(**x, fused=fused), model(**as_text))
    assert relative_error(model(**x, fused=fused), model(**x)) > 1e-2


def test_bf16_model_and_bf16_autocast_agree_with_float32() -> None:
    model, x = build(), inputs()
    expected = model(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(**x).float(), expected) < 0.1
    half = {name: tensor.bfloat16() if name in ("img", "txt", "y") else tensor for name, tensor in x.items()}
    velocity = model.bfloat16()(**half)
    assert velocity.dtype == torch.bfloat16
    assert relative_error(velocity.float(), expected) < 0.1
    assert model(**half, fused=torch.randn(2, 4, TINY.hidden_size)).dtype == torch.bfloat16


def test_model_compiles_to_one_graph() -> None:
    model, x = build(replace(TINY, depth=1, depth_single_blocks=1)), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    fused = torch.randn(2, 4, TINY.hidden_size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(compiled(**x, fused=fused), model(**x, fused=fused))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def adapted_gradients(model: MMDiT, x: Inputs, wrapped: nn.Module | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and of all LoRA weights."""
    img = x["img"].clone().requires_grad_()
    velocity = (wrapped or model)(**{**x, "img": img})
    velocity.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    model.zero_grad()
    assert img.grad is not None and len(gradients) == len(trained) > 0
    return [velocity.detach(), img.grad, *gradients]


@pytest.mark.parametrize("variant", ["plain", "recompute", "keep attention", "ddp", "int8", "nf4"])
def test_compiled_blocks_equal_eager_ones_at_any_size(fresh_compiler: None, variant: str) -> None:
    """Tests tracing and differentiation; `test_blocks` compiles one block to machine code."""
    model = build(replace(TINY, depth=2, depth_single_blocks=2)).requires_grad_(False)
    if variant in ("int8", "nf4"):
        quantize_blocks(model, variant)
    inject_lora(model, LoRAConfig(rank=2))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            randomize(layer.lora_B)
    sizes = [inputs(height=height, width=width, text=text) for height, width, text in ((3, 5, 7), (4, 6, 5), (2, 7, 3))]
    expected, names = [adapted_gradients(model, x) for x in sizes], list(model.state_dict())
    model.compile_blocks(backend="aot_eager" if variant == "plain" else "eager")  # eager only traces, which is quick
    model.recompute = int(variant not in ("plain", "ddp"))
    model.recompute_attention = variant == "recompute"
    wrapped: nn.Module = model
    if variant == "ddp":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    counts = []
    for x, eager in zip(sizes, expected, strict=True):
        for compiled, one in zip(adapted_gradients(model, x, wrapped), eager, strict=True):
            assert relative_error(compiled, one) < 1e-5
        counts.append(counters["stats"]["unique_graphs"])
    if model.recompute:
        with FlopCounterMode(display=False, custom_mapping=ONE_EACH) as runs:
            adapted_gradients(model, sizes[-1], wrapped)
        assert runs.get_flop_counts()["Global"][ATTENTION_ON_CPU] == (8 if model.recompute_attention else 4)
    assert 0 < counts[0] < counts[1] == counts[2], "one compilation for the first size, one more for all others"
    # One graph per kind of block, and one for the first block, whose text needs no gradient.
    assert counts[0] == 3 and list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(merge_lora(model)(**sizes[0]), expected[0][0], atol=1e-4, rtol=1e-4)


def test_the_rotary_table_is_computed_once_for_the_same_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def counting(ids: Tensor, axes_dim: list[int], theta: float) -> Tensor:
        assert (axes_dim, theta) == ([4, 6, 6], 500)
        computed.append(len(ids))
        return rope(ids, axes_dim, theta)

    monkeypatch.setattr("layerdecomp.models.mmdit.rope", counting)
    model, x = build(replace(TINY, theta=500)), inputs()
    first = model(**x)
    assert torch.equal(model(**x), first) and len(computed) == 1
    fused = torch.zeros(2, 4, TINY.hidden_size)
    model(**x, fused=fused)
    assert computed == [37, 41]
    moved = {**x, "img_ids": x["img_ids"] + torch.tensor([0, 0, 1]) * x["img_ids"][:, :1]}
    assert not torch.equal(model(**moved), first) and len(computed) == 3
    assert torch.equal(model(**x), first)
    assert not torch.equal(model(**{**x, "txt_ids": x["txt_ids"] + 1}), first) and len(computed) == 5


def test_a_rotary_table_computed_in_inference_mode_serves_training() -> None:
    model, x = build(), inputs()
    with torch.inference_mode():
        expected = model(**x)
    velocity = model(**x)
    velocity.sum().backward()
    torch.testing.assert_close(velocity, expected)


def test_initial_weights_give_zero_velocity_and_can_learn() -> None:
    model, x = build(), inputs()
    model.init_weights()
    assert not model(**x).any()
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            zero = name.startswith("final_layer.") or name.endswith(("_mod.lin", "modulation.lin"))
            bound = 0 if zero else (6 / (linear.in_features + linear.out_features)) ** 0.5  # Xavier-uniform
            assert 0.9 * bound <= linear.weight.abs().max() <= 1.001 * bound and not linear.bias.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # zero layers pass gradients on only once they are no longer zero
        optimizer.zero_grad()
        model(**x).sub(1).square().mean().backward()
        optimizer.step()
    learning = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert {"img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "single_blocks.0.linear1.weight"} <= learning


def test_missing_guidance_is_an_error() -> None:
    x = inputs()
    with pytest.raises(InputError, match="guidance"):
        build()(**{**x, "guidance": None})


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 66},
        {"num_heads": 0},
        {"axes_dim": [4, 6, 8]},
        {"axes_dim": [4, 6, 4]},
        {"axes_dim": [8, 8]},
        {"axes_dim": [5, 5, 6]},
    ],
)
def test_inconsistent_sizes_are_refused(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(InputError, match=key):
        replace(TINY, **wrong)


@pytest.mark.parametrize("recompute", [1, 2])
@pytest.mark.parametrize("recompute_attention", [True, False])
def test_attention_is_recomputed_or_kept(recompute: int, recompute_attention: bool) -> None:
    model, x = build().requires_grad_(False), inputs()
    inject_lora(model, LoRAConfig(rank=2))
    randomize(model)
    straight = adapted_gradients(model, x)
    model.recompute, model.recompute_attention = recompute, recompute_attention
    with FlopCounterMode(display=False, custom_mapping=ONE_EACH) as runs:
        recomputed = adapted_gradients(model, x)
    counts = runs.get_flop_counts()["Global"]
    blocks = 5 + (0 if not recompute_attention else 5 if recompute == 1 else 3)
    assert counts[ATTENTION_ON_CPU] == blocks
    assert all(torch.equal(a, b) for a, b in zip(straight, recomputed, strict=True))


@pytest.mark.parametrize(("recompute", "share"), [(1, 0.25), (2, 0.75)])
def test_recomputation_saves_memory_and_keeps_gradients(recompute: int, share: float) -> None:
    def gradients(every: int) -> tuple[list[Tensor], int]:
        """Gradients of the input and of a LoRA weight, and the bytes kept for the backward pass."""
        model, x = build().requires_grad_(False), inputs()
        inject_lora(model, LoRAConfig(rank=2))
        randomize(model)
        model.recompute = every
        x["img"].requires_grad_(True)
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(**x).square().sum()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved = sum(size for place, size in kept.items() if place not in weights)
        return list(torch.autograd.grad(loss, [x["img"], model.double_blocks[0].img_mlp[0].lora_A.weight])), saved

    straight, kept = gradients(0)
    recomputed, kept_with_recompute = gradients(recompute)
    assert all(a.equal(b) and a.any() for a, b in zip(straight, recomputed, strict=True))
    assert kept_with_recompute < share * kept


def test_nothing_is_recomputed_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerdecomp.models.mmdit.checkpoint", None)
    model = build()
    model.recompute = 1
    with torch.no_grad():
        assert model(**inputs()).any()
