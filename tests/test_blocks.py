"""Blocks: conventions that a comparison of whole models in float32 does not cover."""

from collections.abc import Callable

import torch
from reference import randomize, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from layerdecomp.models.attention import rope
from layerdecomp.models.blocks import (
    DoubleStreamBlock,
    Modulation,
    RMSNorm,
    SingleStreamBlock,
    adaptive_layer_norm,
    timestep_embedding,
)
from layerdecomp.models.lora import LoRAConfig, inject_lora


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 0.5]), 4, time_factor=1000.0)
    angles = torch.tensor([500.0, 5.0])
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(embedding[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=1e-4)


def test_timestep_embedding_of_bf16_is_float32() -> None:
    t = torch.tensor([0.7109375], dtype=torch.bfloat16)  # 1000 times it is not a bf16 number
    embedding = timestep_embedding(t, 8)
    assert embedding.dtype == torch.float32 and torch.equal(embedding, timestep_embedding(t.float(), 8))


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64)
    randomize(norm)
    x = 300 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))  # squares that bf16 would round badly
    expected = norm(x.bfloat16().float())
    actual = norm.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=0)


def test_rms_norm_of_bf16_with_a_float32_gain_is_rounded_once() -> None:
    norm = RMSNorm(64)
    randomize(norm)
    x = 1e-3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.rms_norm(x.float(), (64,), norm.scale, eps=1e-6)  # as large as the mean square
    torch.testing.assert_close(norm(x.float()), expected)
    assert torch.equal(norm(x), expected.bfloat16()) and norm(x).dtype == torch.bfloat16


def test_modulation_gives_shift_scale_gate_per_branch() -> None:
    modulation = Modulation(8, branches=2)
    randomize(modulation)
    vec = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    chunks = modulation.lin(F.silu(vec)).chunk(6, dim=-1)
    found = [tensor[:, 0] for branch in modulation(vec) for tensor in (branch.shift, branch.scale, branch.gate)]
    assert all(torch.equal(a, b) for a, b in zip(found, chunks, strict=True))


def test_blocks_with_zero_gates_are_the_identity() -> None:
    img, txt = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    vec, pe = torch.randn(2, 16), torch.randn(1, 8, 4, 2)
    double, single = DoubleStreamBlock(16, 2, 4.0, qkv_bias=True), SingleStreamBlock(16, 2, 4.0)
    for modulation in (double.img_mod, double.txt_mod, single.modulation):
        torch.nn.init.zeros_(modulation.lin.weight)
        torch.nn.init.zeros_(modulation.lin.bias)
    assert all(torch.equal(a, b) for a, b in zip(double(img, txt, vec, pe), (img, txt), strict=True))
    x = torch.cat([txt, img], dim=1)
    assert torch.equal(single(x, vec, pe), x)


def test_a_block_compiled_by_inductor_equals_the_eager_one() -> None:
    block = adapted(SingleStreamBlock(D, H, 4.0), ["linear*"])
    randomize(block)
    x, vec, pe = torch.randn(1, IMG, D, generator=torch.Generator().manual_seed(0)), torch.ones(1, D), rope_table(IMG)

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        output = block(leaf, vec, pe)
        return [output, *torch.autograd.grad(output.square().mean(), [leaf, *trained])]

    eager, names = results(), list(block.state_dict())
    block.compile()
    for compiled, expected in zip(results(), eager, strict=True):
        assert relative_error(compiled, expected) < 1e-5
    assert len(eager) == 6 and list(block.state_dict()) == names
    torch.compiler.reset()


# What autograd saves for the backward pass, in numbers per token. D = width, H = heads.

D, H, RANK, IMG, TXT = 32, 2, 3, 20, 6
PER_TOKEN = D // H  # numbers of the rotary table


def saved_numbers(run: Callable[[], Tensor | tuple[Tensor, ...]], module: nn.Module) -> int:
    """The number of float32 values that autograd saves, excluding duplicates and parameters."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = run()  # keeps the saved tensors alive, so that no address is reused
    assert output is not None
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for address, size in kept.items() if address not in own) // 4


def adapted(block: nn.Module, targets: list[str]) -> nn.Module:
    block.requires_grad_(False)
    inject_lora(block, LoRAConfig(rank=RANK, targets=targets))
    return block


def rope_table(tokens: int) -> Tensor:
    return rope(torch.arange(3.0 * tokens).view(tokens, 3), [4, 6, 6], 100)


def test_a_single_stream_block_saves_only_what_its_gradients_need() -> None:
    block = adapted(SingleStreamBlock(D, H, 4.0), ["linear*"])
    x, vec = torch.randn(1, IMG, D, requires_grad=True), torch.randn(1, D)
    norm = D + 2  # its input, mean and deviation
    linears = (D + RANK) + (5 * D + RANK)  # for the gradients of A and B; nothing for the frozen weights
    projected = 7 * D  # queries, keys, values, and the input of GELU
    attention = 2 * H + 2 * D + D + H  # deviations of q and k; both rotated; the output and its log-sum-exp
    modulation = 3 * D + D  # once for all tokens: the tensor of gate, shift and scale; 1 + scale
    expected = IMG * (norm + linears + projected + attention + PER_TOKEN) + modulation
    pe = rope_table(IMG)
    assert saved_numbers(lambda: block(x, vec, pe), block) == expected


def test_a_double_stream_block_saves_only_what_its_gradients_need() -> None:
    block = adapted(DoubleStreamBlock(D, H, 4.0, qkv_bias=True), ["*attn.*", "*mlp.*"])
    img, txt = (torch.randn(1, tokens, D, requires_grad=True) for tokens in (IMG, TXT))
    norms = 2 * (D + 2)
    linears = (D + RANK) + RANK + (D + RANK) + (4 * D + RANK)  # attention saves proj's input anyway
    attention = 3 * D + 2 * H + 3 * D + D + H  # v is saved twice: within qkv, and concatenated with the text's
    stream = norms + linears + attention + 4 * D + PER_TOKEN  # 4 D: the input of GELU
    modulation = 2 * (6 * D + 2 * D)
    expected = (IMG + TXT) * stream + modulation
    vec, pe = torch.randn(1, D), rope_table(IMG + TXT)
    assert saved_numbers(lambda: block(img, txt, vec, pe), block) == expected


def test_autocast_saves_no_float32_copy_of_the_normalised_input() -> None:
    x = torch.randn(1, IMG, D).bfloat16().requires_grad_()
    shift, scale = torch.randn(2, 1, 1, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert adaptive_layer_norm(x, shift, scale).dtype == torch.bfloat16
        numbers = saved_numbers(lambda: adaptive_layer_norm(x, shift, scale), nn.Identity())
    assert numbers <= (IMG * D + D) // 2 + 2 * IMG  # bf16 counts half
