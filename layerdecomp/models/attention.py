"""Rotary position embedding and scaled-dot-product attention, in FLUX's conventions."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def rope(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines of the rotation angle of every token and channel pair.

    Each axis of the position (layer, row, column) turns its own share of the head's channels.

    Args:
        ids: positions, (L, A) or (B, L, A) with A = len(axes_dim).
        axes_dim: channels of a head per axis, each even; their sum is the head's width.
        theta: the slowest pair turns by about 1 / theta radian per position.

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
    if torch.compiler.is_compiling():  # which fuses real numbers with what stands before and behind them
        (cos, sin), (first, second) = pe.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)
    else:  # one product of complex numbers: a fifth of the time on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(pe))
    return turned.flatten(-2).to(x.dtype)


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether attention had better compute bf16 in float32: its backward pass takes several times as long on CPUs."""
    return device.type == "cpu"


class _GradientInOneLayout(torch.autograd.Function):
    """The identity, whose gradient is contiguous.

    cuDNN's backward pass is built for the layout of the gradient that comes first, and taken again for another one of
    the same q, k and v: silently wrong gradients, or an illegal memory access (PyTorch 2.11; its pull request 191576).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with the heads merged again.

    Args:
        q: (B, heads, L, head_dim).
        k, v: (B, heads, K, head_dim).
        mask: boolean, broadcastable to (B, heads, L, K), True = may be looked at; every query needs one True.

    Returns:
        (B, L, heads * head_dim).
    """
    if slow_in_bfloat16(q.device) and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return cast(Tensor, _GradientInOneLayout.apply(rearrange(x, "B H L D -> B L (H D)")))
