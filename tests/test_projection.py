"""The best linear autoencoder: against NumPy's singular values, and its units."""

import numpy as np
import torch
from skimage.util import view_as_blocks
from torch import Tensor

from layerdecomp.training.projection import BlockProjection

FACTOR, CHANNELS = 4, 5


def pictures(seed: int = 0) -> Tensor:
    """Smooth ones and rough ones, whose blocks have unequal variances in every direction; (6, 3, 16, 24)."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(6, 3, 16, 24, generator=generator)
    return torch.nn.functional.avg_pool2d(rough, 3, 1, 1) + 0.1 * rough + torch.tensor([0.3, -0.2, 0.1]).view(3, 1, 1)


def blocks(x: Tensor) -> np.ndarray:
    """(N, C * FACTOR * FACTOR) float64."""
    cut = [view_as_blocks(picture, (3, FACTOR, FACTOR)).reshape(-1, 3 * FACTOR**2) for picture in x.double().numpy()]
    return np.concatenate(cut)


def decoded(projection: BlockProjection, z: Tensor) -> np.ndarray:
    """Blocks from latents: with orthogonal rows, the transpose of the projection undoes its scale."""
    weight = projection.weight.flatten(1).double().numpy()
    rows = (z - projection.bias.view(-1, 1, 1)).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    return rows @ weight / (weight[0] @ weight[0])


def test_what_is_lost_is_what_the_smallest_singular_values_hold() -> None:
    x = pictures()
    projection = BlockProjection.fit(x, CHANNELS, FACTOR)
    mean = blocks(x).mean(axis=0)
    singular = np.linalg.svd(blocks(x) - mean, compute_uv=False)
    kept = decoded(projection, projection(x))
    # the mean's part outside the basis is not in the latents; it is the same for every block
    lost = ((blocks(x) - kept) - (blocks(x) - kept).mean(axis=0)).__pow__(2).sum()
    np.testing.assert_allclose(lost, (singular[CHANNELS:] ** 2).sum(), rtol=1e-4)


def test_latents_have_mean_zero_mean_variance_one_and_are_uncorrelated() -> None:
    x = pictures()
    z = BlockProjection.fit(x, CHANNELS, FACTOR)(x).permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(z, correction=0)
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(CHANNELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance.trace() / CHANNELS, torch.tensor(1.0), atol=1e-4, rtol=0)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    assert (covariance.diag().diff() < 0).all()


def test_error_is_in_pixels() -> None:
    x = pictures()
    projection = BlockProjection.fit(x, CHANNELS, FACTOR)
    z = projection(x)
    moved = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    expected = np.square(decoded(projection, moved) - decoded(projection, z)).mean()
    np.testing.assert_allclose(projection.error(moved, x).item(), expected, rtol=1e-4)
    assert projection.error(z, x) == 0


def test_rotation_finds_the_axes_of_given_latents() -> None:
    x = pictures()
    projection = BlockProjection.fit(x, CHANNELS, FACTOR)
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(2)))[0]
    wanted = torch.einsum("yz,bzhw->byhw", rotation, projection(x))
    torch.testing.assert_close(projection.rotated_towards(wanted, x)(x), wanted, atol=1e-4, rtol=1e-4)


def test_rotation_loses_nothing() -> None:
    x, other = pictures(), pictures(seed=3)
    projection = BlockProjection.fit(x, CHANNELS, FACTOR)
    rotated = projection.rotated_towards(BlockProjection.fit(other, CHANNELS, FACTOR)(other), x)
    assert not torch.allclose(rotated.weight, projection.weight, atol=0.01)
    np.testing.assert_allclose(decoded(rotated, rotated(x)), decoded(projection, projection(x)), atol=1e-4)
