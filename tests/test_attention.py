"""Rotary embedding and attention: properties that follow from their definitions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from layerdecomp.models.attention import apply_rope, attention, rope

AXES = [2, 4, 4]


def test_rope_rotates_channel_pairs_by_position_times_frequency() -> None:
    ids = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 301.0]])  # 301 is not a bf16 number
    x = torch.zeros(1, 1, 2, 10)
    x[..., 0::2] = 1.0  # every pair points along its first axis
    angles = torch.tensor([[0, 0, 0, 0, 0], [2.0, 0, 0, 301.0, 301.0 / 100**0.5]])  # theta = 100
    expected = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2)
    torch.testing.assert_close(apply_rope(x, rope(ids, AXES, theta=100))[0, 0], expected)


def test_rotated_products_depend_only_on_relative_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 10, generator=generator)
    positions = torch.randint(0, 30, (50, 3), generator=generator).float()
    shifted = positions + torch.tensor([1.0, 7.0, -4.0])
    products = []
    for a, b in ((positions[:25], positions[25:]), (shifted[:25], shifted[25:])):
        rotated_q = apply_rope(q.expand(1, 1, 25, 10), rope(a, AXES, theta=100))
        rotated_k = apply_rope(k.expand(1, 1, 25, 10), rope(b, AXES, theta=100))
        products.append((rotated_q * rotated_k).sum(-1))
    assert products[0].std() > 0.1
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=1e-4)


def test_rope_of_a_batch_is_the_rope_of_each_sample() -> None:
    ids = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    batched = rope(ids, AXES, theta=100)
    assert batched.shape == (3, 1, 5, 5, 2)
    torch.testing.assert_close(batched, torch.stack([rope(sample, AXES, theta=100) for sample in ids]))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_of_scaled_products_times_values(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    k, v = torch.randn(2, 2, 4, 6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 1, 5, 6, generator=generator) < 0.6 if masked else torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[..., 0] = True
    weights = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ v).transpose(1, 2).flatten(2)
    actual = attention(q, k, v, mask=mask if masked else None)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    for found, wanted in zip(*(torch.autograd.grad(x, (q, k, v), gradient) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_masked_attention_equals_attention_over_the_unmasked_keys() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, False, True, False, False]).expand(2, 1, 1, 6)
    kept = [0, 1, 3]
    torch.testing.assert_close(attention(q, k, v, mask=mask), attention(q, k[:, :, kept], v[:, :, kept]))
    assert attention(q, k, v).shape == (2, 6, 32)


def test_attention_in_bf16_on_a_cpu_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator).bfloat16()
    mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    mask[..., 0] = True
    expected = attention(q.float(), k.float(), v.float(), mask=mask).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v, mask=mask)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_gradients_reach_the_attention_kernel_in_one_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    seen: list[tuple[int, ...]] = []
    original = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(*args, **kwargs)
        out.register_hook(lambda gradient: seen.append(gradient.stride()))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    out = attention(q, k, v)
    for incoming in (torch.randn(2, 6, 32), torch.randn(2, 6, 100)[..., 10:42], torch.randn(6, 2, 32).transpose(0, 1)):
        torch.autograd.grad(out, q, incoming, retain_graph=True)
    assert seen == [(6 * 32, 8, 32, 1)] * 3
