"""Learned queries that condense any number of cue maps (edges, segmentation, depth) into a few context tokens."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layerdecomp.errors import InputError
from layerdecomp.models.attention import attention
from layerdecomp.models.blocks import QKNorm, layer_norm, mlp, timestep_embedding


@dataclass
class ContextFusionConfig:
    """Size of the fusion module; the width is the transformer's hidden size."""

    enabled: bool = True
    num_queries: int = 256
    num_heads: int = 24
    depth: int = 1
    mlp_ratio: float = 4.0
    in_channels: int = 64  # channels of a packed cue latent
    cues: list[str] = field(default_factory=lambda: ["edge", "segmentation", "depth"])  # the cues that are used


class FusionBlock(nn.Module):
    """Pre-norm cross-attention from the queries to the cue tokens, then a feed-forward layer."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.mlp = mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D), normalised tokens (B, K, D), mask (B, 1, 1, K) -> x."""
        q = rearrange(self.q(layer_norm(x)), "B N (H D) -> B H N D", H=self.num_heads)
        k, v = rearrange(self.kv(tokens), "B K (S H D) -> S B H K D", S=2, H=self.num_heads)
        q, k = self.norm(q, k)
        x = x + self.proj(attention(q, k, v, mask=mask))
        return x + self.mlp(layer_norm(x))


class ContextFusion(nn.Module):
    """Condenses K = M * L cue tokens into N context tokens, at a cost linear in K.

    Any combination of cues may be absent, per sample. A learned null token is always present, so that the queries have
    something to attend to even when every cue is absent.
    """

    def __init__(self, config: ContextFusionConfig, hidden_size: int) -> None:
        super().__init__()
        check_fusion(config, hidden_size)
        self.config = config
        self.token_in = nn.Linear(config.in_channels, hidden_size)
        self.cue_embedding = nn.Parameter(0.02 * torch.randn(len(config.cues), hidden_size))
        self.null_token = nn.Parameter(0.02 * torch.randn(hidden_size))
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_queries, hidden_size))
        self.blocks = nn.ModuleList(
            FusionBlock(hidden_size, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def forward(self, cues: Tensor, present: Tensor, ids: Tensor) -> Tensor:
        """Context tokens per sample.

        Args:
            cues: packed latents of the cue maps in the order of `config.cues`, (B, M, L, in_channels).
            present: which cues each sample has, boolean (B, M); the values of absent cues are ignored.
            ids: positions (layer, row, column) of a map's tokens, (L, 3).

        Returns:
            (B, N, D).
        """
        batch, _, length, _ = cues.shape
        # An attention weight of 0 does not cancel a NaN or an infinity, so absent maps are zeroed as well.
        cues = cues.masked_fill(~present[:, :, None, None], 0)
        tokens = self.token_in(cues) + self.cue_embedding[:, None]  # (B, M, L, D)
        tokens = (tokens + position_embedding(ids, tokens.shape[-1]).to(tokens.dtype)).flatten(1, 2)  # (B, K, D)
        tokens = torch.cat([self.null_token.to(tokens.dtype).expand(batch, 1, -1), tokens], dim=1)
        tokens = layer_norm(tokens)
        mask = F.pad(present.repeat_interleave(length, dim=1), (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + K)

        x = self.queries.expand(batch, -1, -1)  # (B, N, D)
        for block in self.blocks:
            x = block(x, tokens, mask)
        return x


def position_embedding(ids: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of row and column, half the channels each: (L, 3) -> (L, dim), float32."""
    row, column = (timestep_embedding(ids[:, axis], dim // 2, time_factor=1.0) for axis in (1, 2))
    return torch.cat([row, column], dim=-1)


def check_fusion(config: ContextFusionConfig, hidden_size: int) -> None:
    """Raises `InputError` if a fusion module cannot be built for a transformer of this width."""
    if config.num_heads < 1 or hidden_size % config.num_heads:
        raise InputError(
            f"fusion.num_heads = {config.num_heads}: expected a divisor of the transformer's width, {hidden_size}"
        )
    if hidden_size % 4:
        raise InputError(f"hidden_size = {hidden_size}: expected a multiple of 4, for the position embedding")
    for key in ("num_queries", "depth"):
        if getattr(config, key) < 1:
            raise InputError(
                f"fusion.{key} = {getattr(config, key)}: expected at least 1; to leave the fusion module out, set "
                "fusion.enabled = false"
            )
    if not config.cues:
        raise InputError("fusion.cues is empty: name at least one cue, or set fusion.enabled = false")
