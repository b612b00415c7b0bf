"""The best linear autoencoder, used as a regularisation target when a small autoencoder is trained."""

from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Standard deviations of the latent channels, as a power of those that they have in pixel space. At 1, errors in many
# faint channels are hardly visible, but neither are the channels: noise hides them long before the others. At 0, all
# are equal, and the few channels that carry the image no longer count more than the others.
SPECTRUM = 0.5


class BlockProjection(nn.Module):
    """Principal components of square pixel blocks: no linear map to as many channels keeps more of an image."""

    weight: Tensor  # (z_channels, C, factor, factor), orthogonal rows
    bias: Tensor  # (z_channels,)

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def fit(cls, images: Tensor, channels: int, factor: int) -> Self:
        """Fits the projection to images (B, C, H, W); their latents have mean 0 and mean variance 1."""
        blocks = _blocks(images, factor)
        variances, basis = _principal_components(blocks)
        basis = basis[:channels] / variances[:channels].mean().sqrt()
        weight = rearrange(basis, "z (c p q) -> z c p q", p=factor, q=factor)
        return cls(weight.float(), (-basis @ blocks.mean(dim=0)).float())

    @classmethod
    def fit_alpha(cls, images: Tensor, latents: Tensor) -> Self:
        """Fits a projection of RGBA images that gives opaque ones the latents of their colours alone.

        The faintest channels hold principal components of alpha in place of colour; their number minimises the squared
        error. In these channels, opaque blocks have the mean of the latents that were replaced.

        Args:
            images: (B, 4, H, W) in autoencoder space, alpha 1 = opaque.
            latents: (B, z_channels, H/factor, W/factor) of the colours (B, 3, H, W) alone, with the spectrum of
                `SPECTRUM`.
        """
        factor = images.shape[-1] // latents.shape[-1]
        colours, transparency = _blocks(images[:, :3], factor), _blocks(images[:, 3:] - 1, factor)
        z = rearrange(latents, "b z h w -> (b h w) z").double()
        fitted = torch.linalg.lstsq(F.pad(colours, (0, 1), value=1.0), z).solution.T  # (z_channels, 3 factor^2 + 1)
        weight, bias = fitted[:, :-1], fitted[:, -1].clone()

        deviations = z.std(dim=0)
        kept = (deviations / weight.norm(dim=1)).square()  # squared pixel values captured by each channel
        variances, basis = _principal_components(transparency)
        faintest = kept.argsort()
        lost = [kept[faintest[:n]].sum() + variances[n:].sum() for n in range(len(kept))]
        count = int(torch.stack(lost).argmin())  # of channels given to alpha
        given, colourful = faintest[:count], faintest[count:]
        scale = (deviations / kept ** (SPECTRUM / 2))[colourful].mean()

        weight = F.pad(weight, (0, transparency.shape[1])).index_fill(0, given, 0)
        alpha = basis[:count] * (scale * variances[:count, None] ** ((SPECTRUM - 1) / 2))
        weight[given, -transparency.shape[1] :] = alpha
        bias[given] = z.mean(dim=0)[given] - alpha.sum(dim=1)
        return cls(rearrange(weight, "z (c p q) -> z c p q", p=factor, q=factor).float(), bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, z_channels, H/factor, W/factor) of images x (B, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, stride=self.weight.shape[-1])

    def error(self, latents: Tensor, images: Tensor) -> Tensor:
        """The squared error per pixel and channel due to the latents' distance from the projection's: a scalar."""
        gain = self.weight.square().sum(dim=(1, 2, 3)).view(-1, 1, 1)  # from squared pixels to squared latents
        squares = (latents.float() - self(images.float())).square() / gain
        return squares.mean() * len(self.weight) / self.weight[0].numel()


def _blocks(images: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B * H/factor * W/factor, C * factor * factor) in float64."""
    return rearrange(images.double(), "b c (h p) (w q) -> (b h w) (c p q)", p=factor, q=factor)


def _principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (N,), largest first, and orthonormal directions (N, N) of rows (R, N)."""
    variances, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))  # ascending
    return variances.flip(0).clamp_min(0), vectors.flip(1).T
