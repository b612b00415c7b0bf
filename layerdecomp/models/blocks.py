"""The parts of the transformer, under FLUX's published parameter names."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layerdecomp.models.attention import apply_rope, attention


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of a scalar per sample, cosines before sines.

    Args:
        t: (N,), for example the time in [0, 1] or the guidance scale.
        dim: width of the embedding, even.
        max_period: the period of the slowest wave approaches 2 pi * max_period.
        time_factor: scales `t` first.

    Returns:
        (N, dim) in float32, because bf16 cannot resolve neighbouring values of 1000 * t.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = time_factor * t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two-layer MLP that embeds a conditioning vector: (B, in_dim) -> (B, hidden_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def autocast_device(x: Tensor) -> str:
    """Device type for `torch.autocast` on `x`: the CPU for the meta device, which has no autocast of its own."""
    return "cpu" if x.is_meta else x.device.type


def autocast_disabled(x: Tensor) -> torch.autocast:
    """Disables autocast, under which a norm saves a float32 copy of its input for the backward pass.

    The norm kernels compute in float32 whatever the dtype of their input and output.
    """
    return torch.autocast(autocast_device(x), enabled=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32; its gain is published as `scale`."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.scale.dtype:
            with autocast_disabled(x):
                return F.rms_norm(x, self.scale.shape, self.scale, self.eps)
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), self.eps).to(x.dtype)


class QKNorm(nn.Module):
    """Separate norms of queries and keys, per head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one residual branch, each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """The branch's input: `x` (B, L, D), normalised and modulated."""
        return adaptive_layer_norm(x, self.shift, self.scale)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The residual stream `x` plus the gated output of the branch, both (B, L, D)."""
        return torch.addcmul(x, self.gate, branch)


class Modulation(nn.Module):
    """adaLN: shift, scale and gate for each of `branches` residual branches, from the vector (B, D)."""

    def __init__(self, dim: int, branches: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, 3 * branches * dim)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        chunks = self.lin(F.silu(vec))[:, None].unflatten(-1, (-1, 3, vec.shape[-1]))  # (B, 1, branches, 3, D)
        return [ModulationOut(*branch.unbind(-2)) for branch in chunks.unbind(-3)]


def layer_norm(x: Tensor) -> Tensor:
    """Parameter-free LayerNorm before every branch; the modulation supplies the affine map."""
    with autocast_disabled(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def adaptive_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of `x` (B, L, D) whose affine map is the modulation's `shift` and `scale`, (B, 1, D) each."""
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def mlp(dim: int, hidden_dim: int) -> nn.Sequential:
    """The feed-forward branch; its linears are published as `.0` and `.2`."""
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim))


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 * D) -> queries, keys and values, each (B, heads, L, head_dim)."""
    q, k, v = rearrange(qkv, "B L (S H D) -> S B H L D", S=3, H=num_heads)
    return q, k, v


def join(txt: Tensor, img: Tensor) -> Tensor:
    """(B, heads, T, head_dim) and (B, heads, L, head_dim) -> (B, heads, T + L, head_dim), text first.

    The memory layout is token-major. Attention preserves it, so that merging the heads needs no copy.
    """
    return torch.cat([txt.transpose(1, 2), img.transpose(1, 2)], dim=1).transpose(1, 2)


class SelfAttention(nn.Module):
    """Projections of one stream; the block runs joint attention over both streams."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> normalised queries, normalised keys and values, each (B, heads, L, head_dim)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(q, k)
        return q, k, v


class DoubleStreamBlock(nn.Module):
    """Separate weights for text and image tokens, joint attention over both."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        mlp_dim = int(hidden_size * mlp_ratio)
        self.img_mod = Modulation(hidden_size, branches=2)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_mlp = mlp(hidden_size, mlp_dim)
        self.txt_mod = Modulation(hidden_size, branches=2)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_mlp = mlp(hidden_size, mlp_dim)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, T, D), vec (B, D), pe of the T + L tokens -> img, txt."""
        img_attn_mod, img_mlp_mod = self.img_mod(vec)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)

        img_qkv = self.img_attn.project(img_attn_mod.apply(img))
        txt_qkv = self.txt_attn.project(txt_attn_mod.apply(txt))
        q, k, v = (join(*pair) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn = attention(apply_rope(q, pe), apply_rope(k, pe), v)  # (B, T + L, D)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        img = img_attn_mod.add(img, self.img_attn.proj(img_attn))
        img = img_mlp_mod.add(img, self.img_mlp(img_mlp_mod.apply(img)))
        txt = txt_attn_mod.add(txt, self.txt_attn.proj(txt_attn))
        txt = txt_mlp_mod.add(txt, self.txt_mlp(txt_mlp_mod.apply(txt)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Parallel attention and feed-forward over one sequence, with one fused linear before and one after them."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        mlp_dim = int(hidden_size * mlp_ratio)
        self.split_sizes = [3 * hidden_size, mlp_dim]
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + mlp_dim)
        self.linear2 = nn.Linear(hidden_size + mlp_dim, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, branches=1)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """x (B, T + L, D), text first; vec (B, D) -> x."""
        (mod,) = self.modulation(vec)
        qkv, hidden = self.linear1(mod.apply(x)).split(self.split_sizes, dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k)
        attn = attention(apply_rope(q, pe), apply_rope(k, pe), v)
        hidden = F.gelu(hidden, approximate="tanh")
        return mod.add(x, self.linear2(torch.cat([attn, hidden], dim=-1)))


class LastLayer(nn.Module):
    """Modulated projection of the image tokens (B, L, D) to (B, L, out_channels)."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(adaptive_layer_norm(x, shift, scale))
