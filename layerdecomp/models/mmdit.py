"""The diffusion transformer of FLUX.1 under its published parameter names, with room for fused context tokens.

Architecture: https://github.com/black-forest-labs/flux and Esser et al. 2024 (arXiv 2403.03206).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from layerdecomp.errors import InputError
from layerdecomp.models.attention import rope
from layerdecomp.models.blocks import (
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    SingleStreamBlock,
    timestep_embedding,
)

TIME_CHANNELS = 256


@dataclass
class MMDiTConfig:
    """Size of an MMDiT; the defaults are FLUX.1-Fill-dev's."""

    in_channels: int = 384  # 64 noise + 64 latents of the masked image + 256 mask
    out_channels: int = 64
    vec_in_dim: int = 768  # pooled text embedding
    context_in_dim: int = 4096  # text tokens
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: list[int] = field(default_factory=lambda: [16, 56, 56])  # channels of a head for layer, row, column
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size = {self.hidden_size} cannot be split into num_heads = {self.num_heads} heads of equal "
                "width: make hidden_size a multiple of num_heads"
            )
        head_dim = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head_dim or len(self.axes_dim) != 3 or any(dim % 2 for dim in self.axes_dim):
            raise InputError(
                f"axes_dim = {list(self.axes_dim)} does not describe a head: expected three even numbers (layer, row, "
                f"column) whose sum is hidden_size / num_heads = {head_dim}"
            )


# What scaled-dot-product attention is on a device, whichever kernel it takes.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which operations' results a block keeps for the backward pass, where it computes all others again."""
    # The meta device has no such kernel; its attention is a block's only batched products.
    kept = operation in ATTENTION or (operation is torch.ops.aten.bmm.default and args[0].is_meta)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed_but_attention(block: nn.Module, *inputs: Tensor) -> Any:
    """A block's output; the backward pass will compute again what it needs of the block, but not attention."""
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    # With a module's hooks, which gather its weights where they are shared out, unless it is being compiled with this.
    run = block.forward if torch.compiler.is_compiling() else block
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


class MMDiT(nn.Module):
    """Predicts the velocity of packed image tokens, given text tokens, time, guidance and a pooled text vector."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = 0  # every how many blocks activations are recomputed in training: 1 all, 0 none
        self.recompute_attention = True  # with the rest of such a block; False: what attention gives is kept
        self._but_attention = recomputed_but_attention
        self._rotary: tuple[tuple[Tensor, Tensor, int] | None, Tensor] = None, torch.empty(0)
        size = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, size)
        self.txt_in = nn.Linear(config.context_in_dim, size)
        self.time_in = MLPEmbedder(TIME_CHANNELS, size)
        self.vector_in = MLPEmbedder(config.vec_in_dim, size)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_CHANNELS, size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(size, config.num_heads, config.mlp_ratio, config.qkv_bias) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(size, config.num_heads, config.mlp_ratio) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(size, config.out_channels)

    def forward(
        self,
        *,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        fused: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the image tokens.

        Args:
            img: noisy tokens and their context, (B, L, in_channels).
            img_ids: positions (layer, row, column), (L, 3) or (B, L, 3).
            txt: text tokens, (B, T, context_in_dim).
            txt_ids: their positions, all zero in FLUX, (T, 3) or (B, T, 3) as `img_ids`.
            timesteps: time in [0, 1], 1 = pure noise, (B,).
            y: pooled text embedding, (B, vec_in_dim).
            guidance: guidance scale, (B,); needed if and only if the model has `guidance_embed`, else ignored.
            fused: further context tokens, (B, N, hidden_size), placed behind the text at position (0, 0, 0).

        Returns:
            (B, L, out_channels).

        Raises:
            InputError: a model with `guidance_embed` gets no guidance.
        """
        vec = self.embed_condition(timesteps, y, guidance)  # (B, D)
        pe = self._rotary_table(img_ids, txt_ids, 0 if fused is None else fused.shape[1])
        img = self.img_in(img)  # (B, L, D)
        txt = self.txt_in(txt)  # (B, T, D)
        if fused is not None:
            txt = torch.cat([txt, fused.to(txt.dtype)], dim=1)  # (B, T + N, D)

        for number, block in enumerate(self.double_blocks):
            img, txt = self._run(number, block, img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)  # (B, T + N + L, D)
        for number, block in enumerate(self.single_blocks):
            x = self._run(number, block, x, vec, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _run(self, number: int, block: nn.Module, *inputs: Tensor) -> Any:
        """A block's output; where it is one of those, the backward pass will compute it again instead of keeping it."""
        if not (self.recompute and number % self.recompute == 0 and torch.is_grad_enabled()):
            return block(*inputs)
        if self.recompute_attention:
            return checkpoint(block, *inputs, use_reentrant=False)
        return self._but_attention(block, *inputs)

    def _rotary_table(self, img_ids: Tensor, txt_ids: Tensor, fused: int) -> Tensor:
        """What `rope` makes of the positions of all tokens; made once for as long as the same tensors come."""
        made_for, table = self._rotary
        if made_for is None or not (made_for[0] is img_ids and made_for[1] is txt_ids and made_for[2] == fused):
            with torch.inference_mode(False):
                ids = torch.cat([F.pad(txt_ids, (0, 0, 0, fused)), img_ids], dim=-2)
                table = rope(ids, self.config.axes_dim, self.config.theta)
            self._rotary = (img_ids, txt_ids, fused), table
        return table

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block in place, on first use, so that no name changes.

        The blocks of a kind share what is compiled. The first size of picture has code of its own, from the second on
        all share code for any size. LoRA may be merged afterwards.
        """
        for block in (*self.double_blocks, *self.single_blocks):
            block.compile(backend=backend)
        # Within compiled code, which attention is a part of, it is for the compiler to keep what attention gives.
        self._but_attention = torch.compile(recomputed_but_attention, backend=backend)

    def embed_condition(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Sum of the embeddings of time (B,), pooled text (B, vec_in_dim) and guidance (B,): (B, D)."""
        dtype = self.time_in.in_layer.weight.dtype
        vec = self.time_in(timestep_embedding(timesteps, TIME_CHANNELS).to(dtype)) + self.vector_in(y)
        if self.config.guidance_embed:
            if guidance is None:
                raise InputError("guidance is missing: a model with guidance_embed = true needs a scale per sample")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_CHANNELS).to(dtype))
        return vec

    def init_weights(self) -> None:
        """Draws weights for training from scratch; published weights make it needless.

        As in DiT (Peebles & Xie 2023, arXiv 2212.09748): Xavier-uniform linears with zero biases, modulations and last
        layer zero, so that every block starts as the identity and the first velocity is zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.lin.weight)
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)
