"""Distances between two sets of images in the feature space of the Inception network: FID and KID."""

import torch
from torch import Tensor, nn

FEATURES = 2048  # dimension of Inception's last pooling layer
_BLOCK = 4096  # rows of the kernel matrix computed at a time


def inception_features(network: nn.Module, images: Tensor) -> Tensor:
    """The features (B, 2048) of images (B, 3, H, W) in [-1, 1], which are rounded to 8 bits.

    The network takes levels 0 to 255 and returns a tuple of only the features. torch-fidelity's resizes images to
    299 x 299 pixels without antialiasing, as TensorFlow 1 did for the first published figures.
    """
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.autocast(images.device.type, enabled=False):
        (features,) = network(levels)
    return features


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """The Fréchet distance between Gaussians fitted to two sets of features; for Inception's features, FID.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The covariances are never formed: with C = R^T R, where R comes from a
    QR decomposition of the features, tr (C1 C2)^(1/2) is the sum of the singular values of R1 R2^T. This is exact and,
    unlike a matrix square root, well-behaved with fewer images than features.

    Args:
        first, second: (N, D) and (M, D).

    Returns:
        A float64 scalar; NaN if a set has fewer than two members. It is strongly biased upwards for few images: compare
        only figures of equal counts, and consider ``kernel_distance``.
    """
    if min(len(first), len(second)) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    (mean_1, root_1), (mean_2, root_2) = _mean_and_root(first), _mean_and_root(second)
    cross = torch.linalg.svdvals(root_1 @ root_2.T).sum()
    return (mean_1 - mean_2).square().sum() + root_1.square().sum() + root_2.square().sum() - 2 * cross


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and R (min(N, D), D), where R^T R is the covariance, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    return mean, root


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3; for Inception's features, KID.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018). It is unbiased for any number of images. This estimate uses
    all pairs; the usual mean over random subsets approaches it.

    Args:
        first, second: (N, D) and (M, D).

    Returns:
        A float64 scalar, which may be slightly negative; NaN if a set has fewer than two members.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    within = [(_kernel_sum(x, x) - _kernel(x, x).sum()) / (len(x) * (len(x) - 1)) for x in (first, second)]
    return within[0] + within[1] - 2 * _kernel_sum(first, second) / (n * m)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """The kernel between each row of x (N, D) and the same row of y: (N,)."""
    return ((x.double() * y.double()).sum(dim=1) / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the kernel over all pairs of rows of x (N, D) and y (M, D)."""
    blocks = [x[start : start + _BLOCK].double() for start in range(0, len(x), _BLOCK)]
    return torch.stack([((block @ y.double().T / x.shape[1] + 1) ** 3).sum() for block in blocks]).sum()
