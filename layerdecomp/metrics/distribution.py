"""Distances of two sets of images in the features of the Inception network: FID and KID."""

import torch
from torch import Tensor, nn

FEATURES = 2048  # of Inception's last pooling
_BLOCK = 4096  # rows of the kernel matrix at a time


def inception_features(network: nn.Module, images: Tensor) -> Tensor:
    """The features (B, 2048) of images (B, 3, H, W) in [-1, 1], rounded to 8 bits.

    The network takes levels 0 to 255, and its only output are the features. torch-fidelity's brings images to 299 x 299
    pixels as TensorFlow 1 did for the first published figures, without antialiasing.
    """
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.autocast(images.device.type, enabled=False):
        (features,) = network(levels)
    return features


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """The Fréchet distance of the normal distributions of two sets of features; FID, if they are Inception's.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The covariances are never formed: with C = R^T R, R triangular and from
    the features themselves, the last trace is the sum of the singular values of R1 R2^T. That is exact, and unlike a
    matrix root well-behaved where there are fewer images than features.

    Args:
        first, second: (N, D) and (M, D).

    Returns:
        A float64 scalar; NaN if a set has fewer than two members. With few images it is far too large: compare only
        figures of equal counts, and look at ``kernel_distance``.
    """
    if min(len(first), len(second)) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    (mean_1, root_1), (mean_2, root_2) = _mean_and_root(first), _mean_and_root(second)
    cross = torch.linalg.svdvals(root_1 @ root_2.T).sum()
    return (mean_1 - mean_2).square().sum() + root_1.square().sum() + root_2.square().sum() - 2 * cross


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and R (min(N, D), D) with R^T R the covariance, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    return mean, root


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of two sets of features, kernel (x.y / D + 1)^3; KID, if Inception's.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018). It is unbiased whatever the count. This is the estimate from
    all pairs, which the usual mean over random subsets approaches.

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
    """The kernel of each row of x (N, D) with the same row of y: (N,)."""
    return ((x.double() * y.double()).sum(dim=1) / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the kernel over all pairs of rows of x (N, D) and y (M, D)."""
    blocks = [x[start : start + _BLOCK].double() for start in range(0, len(x), _BLOCK)]
    return torch.stack([((block @ y.double().T / x.shape[1] + 1) ** 3).sum() for block in blocks]).sum()
