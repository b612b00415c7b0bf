"""The diffusion transformer of FLUX.1 under its published parameter names, with optional fused context tokens.

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
    axes_dim: list[int] = field(default_factory=lambda: [16, 56, 56])  # head channels for layer, row, column
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


# The operators that scaled-dot-product attention dispatches to, by device and kernel.
ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing policy: saves the output of attention and recomputes everything else."""
    # The meta device has no attention kernel; there, a block's only batched products are its attention.
    saved = op in ATTENTION_OPS or (op is torch.ops.aten.bmm.default and args[0].is_meta)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_except_attention(block: nn.Module, *inputs: Tensor) -> Any:
    """Runs a block under activation checkpointing that recomputes everything but attention."""
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    # Eagerly, call the module: its hooks gather sharded weights. Under compilation, trace its forward alone.
    run = block.forward if torch.compiler.is_compiling() else block
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


class MMDiT(nn.Module):
    """Predicts the velocity of packed image tokens, given text tokens, time, guidance and a pooled text vector."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = 0  # activation checkpointing of every n-th block in training: 1 all, 0 none
        self.recompute_attention = True  # in those blocks; False: its output is saved
        self._checkpoint_except_attention = checkpoint_except_attention
        self._rope_cache: tuple[tuple[Tensor, Tensor, int] | None, Tensor] = None, torch.empty(0)
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
            txt_ids: positions of the text tokens, all zero in FLUX, (T, 3) or (B, T, 3) to match `img_ids`.
            timesteps: time in [0, 1], 1 = pure noise, (B,).
            y: pooled text embedding, (B, vec_in_dim).
            guidance: guidance scale, (B,); required with `guidance_embed`, otherwise ignored.
            fused: context tokens, (B, N, hidden_size), appended to the text at position (0, 0, 0).

        Returns:
            (B, L, out_channels).

        Raises:
            InputError: the model has `guidance_embed`, but `guidance` is missing.
        """
        vec = self.embed_condition(timesteps, y, guidance)  # (B, D)
        pe = self._rotary_table(img_ids, txt_ids, 0 if fused is None else fused.shape[1])
        img = self.img_in(img)  # (B, L, D)
        txt = self.txt_in(txt)  # (B, T, D)
        if fused is not None:
            txt = torch.cat([txt, fused.to(txt.dtype)], dim=1)  # (B, T + N, D)

        for index, block in enumerate(self.double_blocks):
            img, txt = self._run_block(index, block, img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)  # (B, T + N + L, D)
        for index, block in enumerate(self.single_blocks):
            x = self._run_block(index, block, x, vec, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _run_block(self, index: int, block: nn.Module, *inputs: Tensor) -> Any:
        """The output of a block, with activation checkpointing if `recompute` selects the block."""
        if not (self.recompute and index % self.recompute == 0 and torch.is_grad_enabled()):
            return block(*inputs)
        if self.recompute_attention:
            return checkpoint(block, *inputs, use_reentrant=False)
        return self._checkpoint_except_attention(block, *inputs)

    def _rotary_table(self, img_ids: Tensor, txt_ids: Tensor, fused: int) -> Tensor:
        """Rotary embedding of all tokens, cached for as long as the same position tensors are passed."""
        key, table = self._rope_cache
        if key is None or not (key[0] is img_ids and key[1] is txt_ids and key[2] == fused):
            with torch.inference_mode(False):
                ids = torch.cat([F.pad(txt_ids, (0, 0, 0, fused)), img_ids], dim=-2)
                table = rope(ids, self.config.axes_dim, self.config.theta)
            self._rope_cache = (img_ids, txt_ids, fused), table
        return table

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block in place, on first use; no parameter name changes.

        Blocks of a kind share compiled code. It is specialised to the first image size; from the second size on, one
        dynamic version serves all others. LoRA may be merged afterwards.
        """
        for block in (*self.double_blocks, *self.single_blocks):
            block.compile(backend=backend)
        # Attention is then part of the compiled graph, where only the compiler can save its output.
        self._checkpoint_except_attention = torch.compile(checkpoint_except_attention, backend=backend)

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
        """Initialises the weights for training from scratch.

        As in DiT (Peebles & Xie 2023, arXiv 2212.09748): Xavier-uniform linears with zero biases, modulations and last
        layer zero, so that every block starts as the identity and the initial velocity is zero.
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
