"""Rotary position embedding and scaled-dot-product attention, in FLUX's conventions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def rope(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines of the rotation angle of every token and channel pair.

    Each position axis (layer, row, column) rotates its own share of the head's channels.

    Args:
        ids: positions, (L, A) or (B, L, A) with A = len(axes_dim).
        axes_dim: channels of a head per axis, each even; their sum is the head's width.
        theta: frequency base; the slowest pair rotates by about 1 / theta radian per position.

    Returns:
        (1, L, head_dim / 2, 2) or (B, 1, L, head_dim / 2, 2) in float32: broadcasts over the heads.
    """
    angles = [_angles(ids[..., axis], dim, theta) for axis, dim in enumerate(axes_dim)]
    angle = torch.cat(angles, dim=-1)  # (..., L, head_dim / 2)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).unsqueeze(-4)


def _angles(position: Tensor, dim: int, theta: float) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    return position.float()[..., None] * theta**-exponent  # (..., L, dim / 2)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs (2i, 2i + 1) of `x` (B, heads, L, head_dim) by the angles of `rope`."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # in real arithmetic, which the compiler fuses with its neighbours
        (cos, sin), (first, second) = pe.unbind(-1), pairs.unbind(-1)
        rotated = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)
    else:  # one complex product, which takes a fifth of the time on a CPU
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(pe))
    return rotated.flatten(-2).to(x.dtype)


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether bf16 attention should run in float32: on CPUs, its bf16 backward pass is several times slower."""
    return device.type == "cpu"


class _ContiguousGradient(torch.autograd.Function):
    """Identity with a contiguous gradient.

    PyTorch 2.11 builds cuDNN's backward pass for the layout of the first incoming gradient and reuses it for other
    layouts with the same q, k and v, which gives silently wrong gradients or an illegal memory access (pull request
    191576).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, with the heads merged afterwards.

    Args:
        q: (B, heads, L, head_dim).
        k, v: (B, heads, K, head_dim).
        mask: boolean, broadcastable to (B, heads, L, K), True = attend; every query needs at least one True.

    Returns:
        (B, L, heads * head_dim).
    """
    if slow_in_bfloat16(q.device) and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _ContiguousGradient.apply(rearrange(x, "B H L D -> B L (H D)"))
