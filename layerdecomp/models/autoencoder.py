"""The FLUX autoencoder: images to 16-channel latents at an eighth of their size, and back.

One class serves both layers: three channels for the background, four for the foreground (see `extend_to_rgba`).
Parameter names are those of the published `ae.safetensors`, so an official file loads with no renaming.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layerdecomp.errors import InputError
from layerdecomp.models.blocks import autocast_disabled


@dataclass
class AutoencoderConfig:
    """Sizes of an `Autoencoder`; the defaults are FLUX's."""

    in_channels: int = 3  # 3: RGB in [-1, 1]; 4: RGB times alpha, and alpha, both in [-1, 1]
    ch: int = 128
    ch_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    scale_factor: float = 0.3611  # latents leave the encoder as scale_factor * (mean - shift_factor)
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        if self.in_channels not in (3, 4):
            raise InputError(f"autoencoder.in_channels is {self.in_channels}; expected 3 (RGB) or 4 (RGBA)")
        for width in (self.ch * mult for mult in self.ch_mult):
            if width % self.norm_groups:
                raise InputError(
                    f"autoencoder: a level is {width} channels wide, which norm_groups = {self.norm_groups} does not "
                    "divide; change autoencoder.ch, ch_mult or norm_groups"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class Tiling:
    """Tiled encoding and decoding of images larger than a tile, which bounds memory.

    Norms and the mid-block attention then see a single tile, so that the result approximates that of one pass.
    """

    size: int = 1024  # pixels along each side of a tile
    overlap: int = 256  # minimum number of pixels over which a tile is blended into the next


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the dtype of its weights: under autocast it would read and write twice the bytes.

    Sums are accumulated in float32; before PyTorch's pull request 183946, the CUDA kernel rounds the resulting
    statistics to bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        with autocast_disabled(x) if x.dtype == self.weight.dtype else nullcontext():
            return super().forward(x)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c").contiguous() for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as published


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """Middle of encoder and decoder, with attention between all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, followed by a resampling layer in all but the last level."""

    def __init__(self, widths: list[int], groups: int, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in pairwise(widths)))
        for name, module in resample.items():  # the published names are `downsample` and `upsample`
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 z_channels, H/8, W/8): mean and log variance of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        groups, last = config.norm_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.Sequential()
        for i, (before, width) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True)):
            resample = {"downsample": Downsample(width)} if i < last else {}
            self.down.append(Level([before] + [width] * config.num_res_blocks, groups, **resample))
        self.mid = Mid(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, H/8, W/8) -> (B, in_channels, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        groups = config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        levels = []
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            resample = {"upsample": Upsample(width)} if i > 0 else {}
            levels.append(Level([before] + [width] * (config.num_res_blocks + 1), groups, **resample))
        self.up = nn.ModuleList(levels)  # indexed by resolution, finest first; run in reverse
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Variational autoencoder with a fixed affine map of its latents to about unit variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.encode_batch_size = 0  # images per encoder call, to limit memory; 0: the whole batch

    def posterior(self, x: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (B, z_channels, H/8, W/8), of the unscaled latents of x (B, channels, H, W)."""
        mean, log_variance = self._in_tiles(self._encode, x, tiling, self.config.factor).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _encode(self, x: Tensor) -> Tensor:
        """Runs the encoder on chunks of `encode_batch_size` images; the encoder itself may be compiled."""
        return torch.cat([self.encoder(chunk) for chunk in x.split(self.encode_batch_size or len(x))])

    def encode(self, x: Tensor, *, noise: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
        """Scaled latents (B, z_channels, H/8, W/8) of x (B, in_channels, H, W) in [-1, 1], H and W multiples of 8.

        The posterior mean; with standard normal `noise` of the latents' shape, a sample of the posterior.
        """
        mean, log_variance = self.posterior(x, tiling)
        if noise is not None:
            mean = mean + torch.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, z: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Image (B, in_channels, H, W), approximately in [-1, 1], of scaled latents z (B, z_channels, H/8, W/8)."""
        return self._in_tiles(self.decoder, z / self.config.scale_factor + self.config.shift_factor, tiling, 1)

    def _in_tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling | None, cell: int) -> Tensor:
        """Applies `run` to x (B, C, H, W), which has `cell` elements per latent along each axis."""
        if tiling is None:
            return run(x)
        size, overlap = (cell * (pixels // self.config.factor) for pixels in (tiling.size, tiling.overlap))
        strip = partial(blend_tiles, run, dim=-1, size=size, overlap=overlap, grid=cell)
        return blend_tiles(strip, x, dim=-2, size=size, overlap=overlap, grid=cell)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises the weights for training from scratch.

        Residual branches start at zero and the layers between them close to orthogonal (over 2 x 2 pixels when
        downsampling), so that the network starts close to a linear map that preserves images and gradients.
        """
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                _zero(module.conv2)
            elif isinstance(module, AttnBlock):
                _zero(module.proj_out)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        shortcuts = [m.nin_shortcut for m in self.modules() if isinstance(m, ResnetBlock)]
        resamplers = [m.conv for m in self.modules() if isinstance(m, Downsample | Upsample)]
        ends = [self.encoder.conv_in, self.encoder.conv_out, self.decoder.conv_in, self.decoder.conv_out]
        for conv in (*shortcuts, *resamplers, *ends):
            if isinstance(conv, nn.Conv2d):
                _near_orthogonal(conv)


def blend_tiles(run: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, size: int, overlap: int, grid: int) -> Tensor:
    """Applies `run` to x tile by tile along `dim`, and blends each tile into the previous one.

    Tiles are evenly spaced and of equal size, so that none is too small for the norms.

    Args:
        run: maps a tile to one whose length is scaled by a fixed factor.
        dim: -1 or -2.
        size, overlap: of tiles, in elements of x; neighbours overlap by at least `overlap`.
        grid: tiles start at multiples of it; it divides `size` and x's length.
    """
    length = x.shape[dim]
    if length <= size:
        return run(x)
    last = math.ceil((length - size) / (size - overlap))
    starts = [grid * round(tile / last * (length - size) / grid) for tile in range(last + 1)]
    tile = run(x.narrow(dim, 0, size))
    end = tile.shape[dim]
    shape = list(tile.shape)
    shape[dim] = length * end // size
    out = tile.new_empty(shape)
    out.narrow(dim, 0, end).copy_(tile)
    for start in starts[1:]:
        tile = run(x.narrow(dim, start, size))
        place, extent = start * tile.shape[dim] // size, tile.shape[dim]
        shared = end - place
        ramp = (torch.arange(shared, device=tile.device) / shared).to(tile.dtype)
        if dim == -2:
            ramp = ramp[:, None]
        out.narrow(dim, place, shared).lerp_(tile.narrow(dim, 0, shared), ramp)
        out.narrow(dim, end, extent - shared).copy_(tile.narrow(dim, shared, extent - shared))
        end = place + extent
    return out


def _zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _near_orthogonal(conv: nn.Conv2d) -> None:
    """An orthogonal map of each pixel's channels (of 2 x 2 pixels' if it downsamples), plus a little noise."""
    weight, size = conv.weight, conv.kernel_size[0]
    taps = slice(0, 2) if conv.stride[0] == 2 else slice(size // 2, size // 2 + 1)
    weight.mul_(0.1)
    weight[:, :, taps, taps] += nn.init.orthogonal_(torch.empty_like(weight[:, :, taps, taps]))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


@torch.no_grad()
def extend_to_rgba(rgb: Autoencoder) -> Autoencoder:
    """Four-channel copy that matches `rgb` exactly on opaque images and decodes alpha as 1 everywhere.

    The new input channel starts with zero weights, the new output channel with zero weights and bias 1, as in AlphaVAE
    (arXiv 2507.09308). Fine-tuning thus starts in the latent space that the frozen transformer was trained on.
    """
    if rgb.config.in_channels != 3:
        raise InputError(
            f"an autoencoder with {rgb.config.in_channels} channels cannot be extended to RGBA; expected 3"
        )
    like = rgb.encoder.conv_in.weight
    rgba = Autoencoder(replace(rgb.config, in_channels=4)).to(device=like.device, dtype=like.dtype)
    state = {name: tensor.clone() for name, tensor in rgb.state_dict().items()}
    state["encoder.conv_in.weight"] = F.pad(state["encoder.conv_in.weight"], (0, 0, 0, 0, 0, 1))
    state["decoder.conv_out.weight"] = F.pad(state["decoder.conv_out.weight"], (0, 0, 0, 0, 0, 0, 0, 1))
    state["decoder.conv_out.bias"] = F.pad(state["decoder.conv_out.bias"], (0, 1), value=1.0)
    rgba.load_state_dict(state)
    return rgba


@torch.no_grad()
def rescale_latents(autoencoder: Autoencoder, factors: Tensor) -> None:
    """Multiplies each unscaled latent channel by its factor (z_channels,) > 0; the decoder inverts this."""
    last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    assert last.bias is not None
    last.weight[: len(factors)] *= factors.view(-1, 1, 1, 1)
    last.bias[: len(factors)] *= factors
    last.bias[len(factors) :] += 2 * factors.log()  # log variances
    first.weight /= factors.view(1, -1, 1, 1)
