"""Rotary position embedding and scaled-dot-product attention, in FLUX's conventions."""

from collections.abc import Sequence

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
    cos, sin = pe.unbind(-1)  # (..., L, head_dim / 2)
    cos, sin = torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    straight = x.float()
    # Whole rows, since picking out every other channel defeats vector units: ten times faster on a CPU.
    swapped = straight.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return (cos * straight + sin * swapped).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with the heads merged again.

    Args:
        q: (B, heads, L, head_dim).
        k, v: (B, heads, K, head_dim).
        mask: boolean, broadcastable to (B, heads, L, K), True = may be looked at; every query needs one True.

    Returns:
        (B, L, heads * head_dim).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # whose backward pass takes several times as long there
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(x, "B H L D -> B L (H D)")
