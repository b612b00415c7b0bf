"""The transformer as an inpainting model: its prompt, context and velocity, and inpainting with the frozen base."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerdecomp.conditioning import (
    LATENT_FACTOR,
    TOKEN_FACTOR,
    ConditioningConfig,
    inpainting_context,
    masked_images,
    pack,
    position_ids,
    unpack,
)
from layerdecomp.errors import InputError
from layerdecomp.flow import FlowConfig, seeded_normal
from layerdecomp.models.autoencoder import Autoencoder
from layerdecomp.models.blocks import autocast_device
from layerdecomp.models.lora import without_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.sampling import SampleConfig, euler, schedule
from layerdecomp.tensor_files import open_safetensors
from layerdecomp.weights import check_keys


@dataclass(frozen=True)
class Context:
    """What the transformer is conditioned on, besides time, guidance and prompt."""

    img_cond: Tensor  # inpainting context (B, layers * L, 320): the background's tokens, then the foreground's
    ids: Tensor  # (layers * L, 3)
    fused: Tensor | None = None  # (B, N, D)

    def repeat(self, count: int) -> "Context":
        """The context of a batch in which every sample is repeated `count` times in a row."""
        fused = None if self.fused is None else self.fused.repeat_interleave(count, 0)
        return Context(self.img_cond.repeat_interleave(count, 0), self.ids, fused)


class Prompt(nn.Module):
    """The frozen embedding of the one (empty) prompt that all samples share."""

    txt: Tensor
    vec: Tensor

    def __init__(self, txt: Tensor, vec: Tensor) -> None:
        super().__init__()
        self.register_buffer("txt", txt, persistent=False)  # (T, context_in_dim)
        self.register_buffer("vec", vec, persistent=False)  # (vec_in_dim,)
        self._inputs: dict[tuple[int, torch.dtype, torch.device], dict[str, Tensor]] = {}

    @classmethod
    def load(cls, path: str | None, transformer: MMDiT) -> "Prompt":
        """Loads a safetensors file with the tensors txt and vec; without a path, the embedding is zero.

        Raises:
            InputError: the file cannot be read or does not fit, or there is none and the transformer is FLUX's.
        """
        config = transformer.config
        if path is None and config == MMDiTConfig():
            raise InputError(
                "there is no prompt, but the transformer is FLUX.1-Fill-dev's; expected weights.prompt= "
                "(of tools/export.py: prompt=) to name the file that make embed-prompt writes, "
                "checkpoints/flux1-fill-dev/prompt.safetensors"
            )
        if path is None:
            return cls(torch.zeros(1, config.context_in_dim), torch.zeros(config.vec_in_dim))
        with open_safetensors(path) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            tokens = found.get("txt", (512,))[0]
            expected = {"txt": (tokens, config.context_in_dim), "vec": (config.vec_in_dim,)}
            check_keys(path, found, expected, "a prompt embedding for this transformer")
            return cls(file.get_tensor("txt"), file.get_tensor("vec"))

    def inputs(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The transformer's text arguments for a batch, cached by batch size, dtype and device."""
        key = batch, dtype, self.txt.device
        if key not in self._inputs:
            with torch.inference_mode(False):
                txt, vec = self.txt.to(dtype), self.vec.to(dtype)
                ids = txt.new_zeros(len(txt), 3)
                self._inputs[key] = {"txt": txt.expand(batch, -1, -1), "txt_ids": ids, "y": vec.expand(batch, -1)}
        return self._inputs[key]


class FrozenBase(nn.Module):
    """The transformer as it was before adaptation: without its LoRA, and with the `original` values of other tensors.

    It shares all remaining weights with the adapted transformer, whether they are quantised or sharded. Must not be
    used while that transformer runs, nor after its LoRA has been merged.
    """

    def __init__(self, adapted: MMDiT, original: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = adapted.config
        self.adapted = adapted
        self.original = original

    def forward(self, **inputs: Tensor) -> Tensor:
        """As `MMDiT.forward`."""
        # Eagerly, or compiled blocks would be recompiled.
        with without_lora(self.adapted), torch.compiler.set_stance("force_eager"):
            velocity: Tensor = functional_call(self.adapted, self.original, kwargs=inputs)
        return velocity


def mixed_precision(frozen: nn.Module) -> torch.autocast:
    """Autocast if the frozen parts are in bf16, since the trained ones are in float32."""
    weight = next(frozen.parameters())
    return torch.autocast(autocast_device(weight), torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def token_ids(image: Tensor, *layers: int) -> Tensor:
    """Positions (layers * L, 3) of the tokens of the given layers of an image (B, C, H, W), cached by size."""
    rows, columns = (side // TOKEN_FACTOR for side in image.shape[-2:])
    return cached_token_ids(rows, columns, layers, image.device)


@lru_cache(maxsize=64)
def cached_token_ids(rows: int, columns: int, layers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.cat([position_ids(rows, columns, layer, device=device) for layer in layers])


def latent_noise(autoencoder: Autoencoder, image: Tensor, seed: int, positions: Sequence[int], layers: int) -> Tensor:
    """Noise (B, layers, C, h, w) for the latents of images (B, 3, H, W); each row depends on (seed, position) alone."""
    height, width = (side // LATENT_FACTOR for side in image.shape[-2:])
    shape = (layers, autoencoder.config.z_channels, height, width)
    return seeded_normal(seed, positions, shape).to(image.device)


def predict_velocity(
    transformer: MMDiT | FrozenBase, prompt: Prompt, x: Tensor, context: Context, timesteps: Tensor, guidance: float
) -> Tensor:
    """Velocity (B, S, 64) of noisy tokens x (B, S, 64), given their context."""
    # The transformer keeps its rotary table for as long as img_ids and txt_ids are the same objects, since comparing
    # their values would wait for the GPU. Hence the caches of `token_ids` and `Prompt.inputs`: without either, every
    # call computes the table anew.
    return transformer(
        img=torch.cat([x, context.img_cond.to(x.dtype)], dim=-1),
        img_ids=context.ids,
        timesteps=timesteps,
        guidance=torch.full_like(timesteps, guidance),
        fused=context.fused,
        **prompt.inputs(x.shape[0], x.dtype),
    )


@torch.no_grad()
def inpaint(
    *,
    transformer: MMDiT | FrozenBase,
    autoencoder: Autoencoder,
    prompt: Prompt,
    image: Tensor,
    mask: Tensor,
    noise: Tensor,
    conditioning: ConditioningConfig,
    flow: FlowConfig,
    sample: SampleConfig,
) -> Tensor:
    """Inpaints the mask with the frozen base.

    Args:
        image: (B, 3, H, W) in [-1, 1], H and W multiples of 16.
        mask: (B, 1, H, W) in {0, 1}, 1 = to be inpainted.
        noise: standard normal (B, 16, H/8, W/8).

    Returns:
        The inpainted image (B, 3, H, W) in [-1, 1], decoded by the autoencoder outside the mask as well.
    """
    hole, _ = masked_images(image, mask)
    x = pack(noise)
    timesteps = schedule(sample.steps, x.shape[1], flow).to(x)
    with mixed_precision(autoencoder):
        latents = autoencoder.encode(hole, tiling=sample.tiling)
        context = Context(inpainting_context(latents, mask, conditioning.mask), token_ids(image, 0))
        x = euler(lambda x, t: predict_velocity(transformer, prompt, x, context, t, sample.guidance), x, timesteps)
        painted = autoencoder.decode(unpack(x, *noise.shape[-2:]), tiling=sample.tiling)
    return painted.float().clamp(-1, 1)
