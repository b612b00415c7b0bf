"""Blocks: the conventions that a comparison of whole models in float32 does not show."""

import torch
from reference import randomize
from torch.nn import functional as F

from layerdecomp.models.blocks import DoubleStreamBlock, Modulation, RMSNorm, SingleStreamBlock, timestep_embedding


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 0.5]), 4, time_factor=1000.0)
    angles = torch.tensor([500.0, 5.0])
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(embedding[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=1e-4)


def test_timestep_embedding_of_bf16_is_float32() -> None:
    assert timestep_embedding(torch.ones(1, dtype=torch.bfloat16), 8).dtype == torch.float32


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64)
    randomize(norm)
    x = 300 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))  # squares that bf16 would round badly
    expected = norm(x.bfloat16().float())
    actual = norm.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=0)


def test_modulation_gives_shift_scale_gate_per_branch() -> None:
    modulation = Modulation(8, branches=2)
    randomize(modulation)
    vec = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    chunks = modulation.lin(F.silu(vec)).chunk(6, dim=-1)
    found = [tensor[:, 0] for branch in modulation(vec) for tensor in (branch.shift, branch.scale, branch.gate)]
    assert all(torch.equal(a, b) for a, b in zip(found, chunks, strict=True))


def test_blocks_with_closed_gates_are_the_identity() -> None:
    img, txt = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    vec, pe = torch.randn(2, 16), torch.randn(1, 8, 4, 2)
    double, single = DoubleStreamBlock(16, 2, 4.0, qkv_bias=True), SingleStreamBlock(16, 2, 4.0)
    for modulation in (double.img_mod, double.txt_mod, single.modulation):
        torch.nn.init.zeros_(modulation.lin.weight)
        torch.nn.init.zeros_(modulation.lin.bias)
    assert all(torch.equal(a, b) for a, b in zip(double(img, txt, vec, pe), (img, txt), strict=True))
    x = torch.cat([txt, img], dim=1)
    assert torch.equal(single(x, vec, pe), x)
