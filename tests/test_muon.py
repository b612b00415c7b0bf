"""Muon: orthogonalised steps for matrices, Adam's for the rest, and exact restarts."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.training import muon
from layerdecomp.training.muon import Muon, is_hidden, orthogonalized

RATE = 3e-3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        mse_loss(model(normal(16, 6, seed=seed)), normal(16, 4, seed=seed + 1000)).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (24, 24)])
def test_orthogonalization_keeps_singular_vectors_and_brings_values_close_to_one(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    result = left.T @ orthogonalized(matrix) @ right.T
    assert values.max() / values.min() > 3
    assert result.diag().min() > 0.6 and result.diag().max() < 1.25
    torch.testing.assert_close(result, result.diag().diag(), atol=1e-4, rtol=0)


def test_orthogonalization_is_independent_of_scale() -> None:
    torch.testing.assert_close(orthogonalized(1e-4 * normal(8, 32)), orthogonalized(normal(8, 32)), atol=1e-3, rtol=0)
    assert not orthogonalized(torch.zeros(4, 5)).any()


def test_stacked_matrices_get_the_same_steps_as_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(stacked: int) -> list[Tensor]:
        monkeypatch.setattr(muon, "STACKED", stacked)
        weights = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([(8, 24), (24, 8), (8, 24), (8, 24)])]
        optimizer = Muon(weights, [], RATE)
        for seed in range(3):
            for i, weight in enumerate(weights):
                weight.grad = normal(*weight.shape, seed=10 * seed + i) if i < 4 - seed else None
            optimizer.step()
        return weights

    for a, b in zip(stepped(1 << 24), stepped(1), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_convolution_is_stepped_like_its_flattened_matrix() -> None:
    kernel = nn.Parameter(normal(8, 3, 5, 5).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(normal(8, 3, 5, 5).flatten(1))
    optimizer = Muon([kernel, matrix], [], RATE)
    for seed in range(3):
        gradient = normal(8, 3, 5, 5, seed=seed + 1)
        kernel.grad, matrix.grad = gradient.contiguous(memory_format=torch.channels_last), gradient.flatten(1)
        optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert (kernel - normal(8, 3, 5, 5)).abs().min() > 0


def test_first_and_last_layers_are_not_hidden() -> None:
    decoder = Autoencoder(AutoencoderConfig(ch=8, norm_groups=4)).decoder
    hidden = {name for name, parameter in decoder.named_parameters(prefix="decoder") if is_hidden(name, parameter)}
    assert {
        "decoder.mid.block_1.conv1.weight",
        "decoder.mid.attn_1.q.weight",
        "decoder.up.1.upsample.conv.weight",
    } < hidden
    assert not hidden & {"decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.norm_out.weight"}
    assert not is_hidden("img_in.weight", normal(4, 4)) and is_hidden("double_blocks.0.img_mlp.0.weight", normal(4, 4))


@pytest.mark.parametrize("shape", [(128, 512), (512, 128)])
def test_the_step_of_a_matrix_is_as_large_as_adams(shape: tuple[int, int]) -> None:
    model = nn.Linear(*shape, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = normal(*model.weight.shape)
    Muon(model.parameters(), [], RATE).step()
    step = (model.weight.detach() - before).square().mean().sqrt()
    assert 0.1 < step / RATE < 0.3
    assert ((before - model.weight) * model.weight.grad).sum() > 0  # downhill


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_matrix_is_stepped_like_torch_muon_in_float32(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # which torch's iteration calls
    ours, theirs = nn.Parameter(normal(*shape)), nn.Parameter(normal(*shape))
    optimizers = (
        Muon([ours], [], RATE),
        torch.optim.Muon([theirs], RATE, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
    )
    for seed in range(5):
        ours.grad = theirs.grad = normal(*shape, seed=seed + 1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-3 * RATE, rtol=0)


def test_other_parameters_are_stepped_like_torch_adam() -> None:
    ours = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    theirs = copy.deepcopy(ours)
    steps(ours, Muon([], ours.parameters(), RATE, betas=(0.9, 0.99)), range(20))
    steps(theirs, torch.optim.Adam(theirs.parameters(), RATE, betas=(0.9, 0.99)), range(20))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_restart_from_a_saved_state_is_exact() -> None:
    def build() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        return model, Muon([model.weight], [model.bias], RATE)

    straight, optimizer = build()
    steps(straight, optimizer, range(8))
    first, optimizer = build()
    steps(first, optimizer, range(5))
    second, resumed = build()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, resumed, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_training_reduces_the_loss_well_below_the_variance() -> None:
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(2))
    optimizer = Muon([model[0].weight, model[2].weight], [model[0].bias, model[2].bias], 0.02)
    x = normal(64, 6)
    y = teacher(x).detach()
    for _ in range(200):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: (value := mse_loss(model(x), y)).backward() or value)
    assert loss < 0.02 * y.var()
