"""The best linear autoencoder, which a small one is drawn to while it trains."""

from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# The deviations of a transformer's latents, as a power of those that the channels have in pixels. With 1, errors in the
# many faint channels hardly show, but so do the channels themselves: noise hides them long before the rest. With 0, all
# are alike, and the few that make the picture no longer count more than the others.
SPECTRUM = 0.5


class BlockProjection(nn.Module):
    """Principal components of square blocks of pixels: no linear map keeps more of a picture in as many channels."""

    weight: Tensor  # (z_channels, C, factor, factor), orthogonal rows
    bias: Tensor  # (z_channels,)

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def fit(cls, pictures: Tensor, channels: int, factor: int) -> Self:
        """The projection of pictures (B, C, H, W) that keeps most of them, with mean 0 and mean variance 1."""
        blocks = _blocks(pictures, factor)
        variances, basis = _principal_components(blocks)
        basis = basis[:channels] / variances[:channels].mean().sqrt()
        weight = rearrange(basis, "z (c p q) -> z c p q", p=factor, q=factor)
        return cls(weight.float(), (-basis @ blocks.mean(dim=0)).float())

    @classmethod
    def fit_alpha(cls, pictures: Tensor, latents: Tensor) -> Self:
        """A projection of pictures with alpha in which opaque ones have the latents that their colours have alone.

        The faintest channels give up their colours to the principal components of alpha: as many of them as lose the
        fewest squares. There, opaque blocks are at the mean of the colours that were.

        Args:
            pictures: (B, 4, H, W) in autoencoder space, alpha 1 = opaque.
            latents: (B, z_channels, H/factor, W/factor) of the colours (B, 3, H, W) alone, with the spectrum of
                `SPECTRUM`.
        """
        factor = pictures.shape[-1] // latents.shape[-1]
        colours, transparency = _blocks(pictures[:, :3], factor), _blocks(pictures[:, 3:] - 1, factor)
        z = rearrange(latents, "b z h w -> (b h w) z").double()
        fitted = torch.linalg.lstsq(F.pad(colours, (0, 1), value=1.0), z).solution.T  # (z_channels, 3 factor^2 + 1)
        weight, bias = fitted[:, :-1], fitted[:, -1].clone()

        deviations = z.std(dim=0)
        kept = (deviations / weight.norm(dim=1)).square()  # squares of the pixels, in each channel
        variances, basis = _principal_components(transparency)
        faintest = kept.argsort()
        lost = [kept[faintest[:n]].sum() + variances[n:].sum() for n in range(len(kept))]
        count = int(torch.stack(lost).argmin())  # of the channels that alpha gets
        given, colourful = faintest[:count], faintest[count:]
        scale = (deviations / kept ** (SPECTRUM / 2))[colourful].mean()

        weight = F.pad(weight, (0, transparency.shape[1])).index_fill(0, given, 0)
        alpha = basis[:count] * (scale * variances[:count, None] ** ((SPECTRUM - 1) / 2))
        weight[given, -transparency.shape[1] :] = alpha
        bias[given] = z.mean(dim=0)[given] - alpha.sum(dim=1)
        return cls(rearrange(weight, "z (c p q) -> z c p q", p=factor, q=factor).float(), bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, z_channels, H/factor, W/factor) of pictures x (B, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, stride=self.weight.shape[-1])

    def error(self, latents: Tensor, pictures: Tensor) -> Tensor:
        """The squared error per pixel and channel that latents make by not being the projection's: a scalar."""
        gain = self.weight.square().sum(dim=(1, 2, 3)).view(-1, 1, 1)  # of the squares, from pixels to latents
        squares = (latents.float() - self(pictures.float())).square() / gain
        return squares.mean() * len(self.weight) / self.weight[0].numel()


def _blocks(pictures: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B * H/factor * W/factor, C * factor * factor) in float64."""
    return rearrange(pictures.double(), "b c (h p) (w q) -> (b h w) (c p q)", p=factor, q=factor)


def _principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (N,), the largest first, and their orthonormal directions (N, N), of rows (R, N)."""
    variances, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))  # ascending
    return variances.flip(0).clamp_min(0), vectors.flip(1).T
