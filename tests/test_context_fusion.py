"""Context fusion: absent cues, linear cost, gradients and precision."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from reference import randomize
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from layerdecomp.conditioning import position_ids
from layerdecomp.errors import InputError
from layerdecomp.models.context_fusion import ContextFusion, ContextFusionConfig

TINY = ContextFusionConfig(num_queries=4, num_heads=2, depth=2, mlp_ratio=3.0, in_channels=6)


def build(config: ContextFusionConfig = TINY) -> ContextFusion:
    model = ContextFusion(config, hidden_size=16)
    randomize(model)
    return model


def draw_cues(batch: int = 1, height: int = 3, width: int = 4) -> Tensor:
    return torch.randn(batch, 3, height * width, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("present", list(product([True, False], repeat=3)))
def test_absent_cues_have_exactly_no_influence(present: tuple[bool, ...]) -> None:
    model, cues, mask = build(), draw_cues(), torch.tensor([present])
    ids = position_ids(3, 4)
    expected = model(cues, mask, ids)
    assert expected.shape == (1, 4, 16)
    for garbage in (0.0, 1e4, float("nan"), float("inf")):
        other = torch.where(mask[:, :, None, None], cues, garbage)
        assert torch.equal(model(other, mask, ids), expected)
    for cue in torch.nonzero(mask[0]).flatten():  # but each present cue has some
        other = cues.clone()
        other[:, cue] += 1
        assert (model(other, mask, ids) - expected).abs().max() > 1e-3


def test_each_sample_may_have_another_subset_of_cues() -> None:
    model, cues, ids = build(), draw_cues(batch=4), position_ids(3, 4)
    present = torch.tensor([[True, True, True], [False, True, False], [False, False, False], [True, False, True]])
    one_by_one = [model(cues[i : i + 1], present[i : i + 1], ids) for i in range(4)]
    torch.testing.assert_close(model(cues, present, ids), torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_and_absent_cues_get_none() -> None:
    model, ids = build(), position_ids(3, 4)
    cues = draw_cues(batch=2).requires_grad_()
    present = torch.tensor([[False, False, False], [False, True, False]])
    model(cues, present, ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert cues.grad is not None
    touched = cues.grad.abs().amax(dim=(2, 3)) > 0
    assert torch.equal(touched, present)
    assert model.cue_embedding.grad is not None
    assert (model.cue_embedding.grad.abs().amax(dim=1) > 0).tolist() == [False, True, False]


def test_position_and_kind_of_a_cue_matter() -> None:
    model, cues, ids, present = build(), draw_cues(), position_ids(3, 4), torch.ones(1, 3, dtype=torch.bool)
    expected = model(cues, present, ids)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert (model(cues[:, :, order], present, ids) - expected).abs().max() > 1e-3
    assert (model(cues.flip(1), present, ids) - expected).abs().max() > 1e-3
    torch.testing.assert_close(model(cues[:, :, order], present, ids[order]), expected, atol=1e-5, rtol=1e-5)


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def test_fusion_equals_its_definition() -> None:
    model, cues, height, width = build(), draw_cues()[0], 3, 4
    assert len(model.blocks) == 2 and model.blocks[0].mlp[0].out_features == 3 * 16
    waves = 10_000 ** -(torch.arange(4.0) / 4)  # a quarter of the width: cosines and sines, of row and column
    tokens = [model.null_token]
    for cue in (0, 2):  # the second is absent
        for row, column in product(range(height), range(width)):
            place = [wave(at * waves) for at in (row, column) for wave in (torch.cos, torch.sin)]
            token = model.token_in(cues[cue, row * width + column]) + model.cue_embedding[cue] + torch.cat(place)
            tokens.append(token)
    k_v = [block.kv(normed(torch.stack(tokens))).view(-1, 2, 2, 8).unbind(1) for block in model.blocks]
    x = model.queries
    for block, (k, v) in zip(model.blocks, k_v, strict=True):
        q, k = block.norm(block.q(normed(x)).view(-1, 2, 8), k)
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / 8**0.5, dim=-1)
        x = x + block.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.mlp(normed(x))
    found = model(cues[None], torch.tensor([[True, False, True]]), position_ids(height, width, layer=5))
    torch.testing.assert_close(found[0], x, atol=1e-5, rtol=1e-5)


def cost(size: int) -> tuple[int, int]:
    """FLOPs of forward and backward, and bytes saved for the backward pass, with K = 3 * size * size cue tokens."""
    model, ids = build(), position_ids(size, size)
    cues, present = draw_cues(1, size, size), torch.tensor([[True, False, True]])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        model(cues, present, ids).sum().backward()
    return counter.get_total_flops(), sum(kept.values())


def test_flops_and_memory_grow_linearly_with_the_cue_tokens() -> None:
    (flops, memory), (flops_4, memory_4), (flops_16, memory_16) = (cost(size) for size in (8, 16, 32))
    assert flops > 0 and memory > 0
    # Four times the tokens cost four times as much; differences cancel the part that does not depend on them.
    assert flops_16 - flops_4 == pytest.approx(4 * (flops_4 - flops), rel=0.01)
    assert memory_16 - memory_4 == pytest.approx(4 * (memory_4 - memory), rel=0.05)
    tokens = 3 * 32 * 32
    assert memory_16 < 4 * tokens * tokens  # less than one float32 K x K matrix


def test_compiles_to_one_graph() -> None:
    model, cues, ids = build(), draw_cues(), position_ids(3, 4)
    present = torch.tensor([[True, False, True]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(cues, present, ids), model(cues, present, ids))


def test_bf16_and_bf16_autocast_are_near_float32() -> None:
    model, cues, ids = build(), draw_cues(), position_ids(3, 4)
    present = torch.tensor([[True, False, True]])
    expected = model(cues, present, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(cues, present, ids)
    half = model.bfloat16()(cues.bfloat16(), present, ids)
    assert half.dtype == torch.bfloat16
    for actual in (autocast, half):
        torch.testing.assert_close(actual.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 5}, {"num_heads": 0}, {"num_queries": 0}, {"depth": 0}, {"cues": []}], ids=str
)
def test_invalid_sizes_are_rejected_by_name(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(InputError, match=key):
        build(replace(TINY, **wrong))


def test_a_width_without_room_for_both_position_axes_is_rejected() -> None:
    with pytest.raises(InputError, match="hidden_size = 18: expected a multiple of 4"):
        ContextFusion(TINY, hidden_size=18)


def test_fresh_queries_and_cues_differ_and_are_small() -> None:
    model = ContextFusion(TINY, hidden_size=16)  # equal ones would get equal gradients for ever
    assert len(model.queries.unique(dim=0)) == 4 and len(model.cue_embedding.unique(dim=0)) == 3
    for parameter in (model.queries, model.cue_embedding, model.null_token):
        assert 0.01 < parameter.std() < 0.04
