"""The best linear autoencoder, which a small one is drawn to while it trains."""

from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class BlockProjection(nn.Module):
    """Principal components of square blocks of pixels: no linear map keeps more of a picture in as many channels.

    Its latents suit a small transformer as well as the decoder: the channels' variances fall off, so that errors in
    the many faint ones hardly show, and the mean of several latents is the latent of a blurred picture.
    """

    weight: Tensor  # (z_channels, C, factor, factor), orthogonal rows
    bias: Tensor  # (z_channels,)

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def fit(cls, pictures: Tensor, channels: int, factor: int) -> Self:
        """The projection of pictures (B, C, H, W) that keeps most of them, with mean 0 and mean variance 1."""
        blocks = rearrange(pictures.double(), "b c (h p) (w q) -> (b h w) (c p q)", p=factor, q=factor)
        mean = blocks.mean(dim=0)
        variances, vectors = torch.linalg.eigh(torch.cov(blocks.T, correction=0))  # ascending
        basis = vectors[:, -channels:].flip(1).T / variances[-channels:].mean().sqrt()
        weight = rearrange(basis, "z (c p q) -> z c p q", p=factor, q=factor)
        return cls(weight.float(), (-basis @ mean).float())

    def rotated_towards(self, latents: Tensor, pictures: Tensor) -> Self:
        """The same projection in other axes: those in which it comes nearest to given latents of the same pictures."""
        own = rearrange(self(pictures), "b z h w -> (b h w) z").double()
        wanted = rearrange(latents, "b z h w -> (b h w) z").double()
        left, _, right = torch.linalg.svd(wanted.T @ own)  # orthogonal Procrustes
        rotation = (left @ right).float()
        return type(self)(torch.einsum("yz,zcpq->ycpq", rotation, self.weight), rotation @ self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, z_channels, H/factor, W/factor) of pictures x (B, C, H, W)."""
        return F.conv2d(x, self.weight, self.bias, stride=self.weight.shape[-1])

    def error(self, latents: Tensor, pictures: Tensor) -> Tensor:
        """The squared error per pixel and channel that latents make by not being the projection's: a scalar."""
        size = self.weight[0].numel() * self.weight[0].square().sum()  # a step of 1 in a latent is this many pixels
        return F.mse_loss(latents.float(), self(pictures.float())) * len(self.weight) / size
