"""The optimal linear autoencoder: against NumPy's singular values, and its units."""

import numpy as np
import torch
from skimage.util import view_as_blocks
from torch import Tensor

from layerdecomp.training.projection import BlockProjection

FACTOR, CHANNELS = 4, 5


def images(seed: int = 0) -> Tensor:
    """Images (6, 3, 16, 24) whose blocks have a different variance in every direction."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(6, 3, 16, 24, generator=generator)
    return torch.nn.functional.avg_pool2d(rough, 3, 1, 1) + 0.1 * rough + torch.tensor([0.3, -0.2, 0.1]).view(3, 1, 1)


def blocks(x: Tensor) -> np.ndarray:
    """(N, C * FACTOR * FACTOR) float64."""
    size = x.shape[1] * FACTOR**2
    cut = [view_as_blocks(picture, (len(picture), FACTOR, FACTOR)).reshape(-1, size) for picture in x.double().numpy()]
    return np.concatenate(cut)


def decoded(projection: BlockProjection, z: Tensor) -> np.ndarray:
    """Blocks from latents, by the transpose of the projection, whose rows are orthogonal, divided by its scale."""
    weight = projection.weight.flatten(1).double().numpy()
    rows = (z - projection.bias.view(-1, 1, 1)).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    return rows @ (weight / np.square(weight).sum(axis=1, keepdims=True))


def test_the_reconstruction_error_is_that_of_the_smallest_singular_values() -> None:
    x = images()
    projection = BlockProjection.fit(x, CHANNELS, FACTOR)
    mean = blocks(x).mean(axis=0)
    singular = np.linalg.svd(blocks(x) - mean, compute_uv=False)
    kept = decoded(projection, projection(x))
    # latents lack the part of the mean outside the basis, which is the same for every block
    lost = np.square((blocks(x) - kept) - (blocks(x) - kept).mean(axis=0)).sum()
    np.testing.assert_allclose(lost, (singular[CHANNELS:] ** 2).sum(), rtol=1e-4)


def test_latents_have_mean_zero_mean_variance_one_and_are_uncorrelated() -> None:
    x = images()
    z = BlockProjection.fit(x, CHANNELS, FACTOR)(x).permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(z, correction=0)
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(CHANNELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance.trace() / CHANNELS, torch.tensor(1.0), atol=1e-4, rtol=0)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    assert (covariance.diag().diff() < 0).all()


def test_error_is_measured_in_pixels() -> None:
    x = images()
    fitted = BlockProjection.fit(x, CHANNELS, FACTOR)
    scales = torch.arange(1.0, CHANNELS + 1)
    projection = BlockProjection(fitted.weight * scales.view(-1, 1, 1, 1), fitted.bias * scales)
    z = projection(x)
    noisy = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    expected = np.square(decoded(projection, noisy) - decoded(projection, z)).mean()
    np.testing.assert_allclose(projection.error(noisy, x).item(), expected, rtol=1e-4)
    assert projection.error(z, x) == 0
    np.testing.assert_allclose(projection.error(noisy.bfloat16(), x.bfloat16()).item(), expected, rtol=0.05)


def with_alpha(rgb: Tensor, seed: int = 4) -> Tensor:
    """RGBA images in autoencoder space (6, 4, 16, 24): premultiplied colours, and a slowly varying alpha."""
    coarse = torch.rand(6, 1, 4, 6, generator=torch.Generator().manual_seed(seed))
    alpha = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    return torch.cat([rgb * alpha, 2 * alpha - 1], dim=1)


def test_opaque_images_have_the_latents_of_their_colours() -> None:
    x = with_alpha(images())
    colours = BlockProjection.fit(x[:, :3], CHANNELS, FACTOR)
    colours.bias += 0.4  # a mean other than zero
    projection = BlockProjection.fit_alpha(x, colours(x[:, :3]))
    opaque = torch.cat([x[:, :3], torch.ones_like(x[:, 3:])], dim=1)
    kept = projection.weight[:, :3].flatten(1).any(dim=1)
    assert 0 < kept.sum() < CHANNELS and not projection.weight[kept, 3].any()
    torch.testing.assert_close(projection(opaque)[:, kept], colours(x[:, :3])[:, kept], atol=1e-3, rtol=0)
    others = projection(opaque)[:, ~kept]
    replaced = colours(x[:, :3])[:, ~kept].mean(dim=(0, 2, 3)).view(-1, 1, 1)
    torch.testing.assert_close(others, replaced.expand_as(others), atol=1e-4, rtol=0)


def test_the_number_of_alpha_channels_minimises_the_squared_error() -> None:
    x = with_alpha(images())
    colours = BlockProjection.fit(x[:, :3], CHANNELS, FACTOR)
    given = ~BlockProjection.fit_alpha(x, colours(x[:, :3])).weight[:, :3].flatten(1).any(dim=1)
    count = int(given.sum())
    assert given[CHANNELS - count :].all()  # the faintest

    rows = blocks(x[:, :3]), blocks(x[:, 3:])
    colour, alpha = (np.linalg.svd(r - r.mean(axis=0), compute_uv=False) ** 2 for r in rows)
    lost = [colour[CHANNELS - n : CHANNELS].sum() + alpha[n:].sum() for n in range(CHANNELS)]
    assert count == int(np.argmin(lost))


def test_alpha_has_the_spectrum_of_the_colours() -> None:
    """A channel twice as strong in pixels has sqrt(2) times the deviation, for colour and alpha alike."""
    x = with_alpha(images())
    plain = BlockProjection.fit(x[:, :3], CHANNELS, FACTOR)
    deviations = plain(x[:, :3]).std(dim=(0, 2, 3)).view(-1, 1, 1, 1)
    equalised = BlockProjection(plain.weight * deviations**-0.5, plain.bias * deviations.flatten() ** -0.5)
    projection = BlockProjection.fit_alpha(x, equalised(x[:, :3]))
    latents, weight = projection(x).std(dim=(0, 2, 3)), projection.weight.flatten(1).norm(dim=1)
    ratio = latents / (latents / weight).sqrt()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=0.02, atol=0)
