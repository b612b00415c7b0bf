"""The decomposer: splits an image and an object mask into a clean background and a complete foreground."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from layerdecomp.conditioning import (
    LATENT_FACTOR,
    PATCH,
    TOKEN_FACTOR,
    ConditioningConfig,
    bidirectional_context,
    masked_images,
    pack,
    unpack,
)
from layerdecomp.errors import InputError, check_whole_number
from layerdecomp.files import source_sha256
from layerdecomp.flow import FlowConfig
from layerdecomp.imaging.compositing import from_autoencoder, to_autoencoder, with_pixel_alpha
from layerdecomp.imaging.cues import CUES, check_cues, compute_cues
from layerdecomp.imaging.geometry import resize, to_pixels, to_tensor
from layerdecomp.imaging.layers import ImageSource, Layers, Pixels, read_pair
from layerdecomp.inpainting import Context, FrozenBase, Prompt, mixed_precision, predict_velocity, token_ids
from layerdecomp.manifest import DecomposerConfig, open_adapter
from layerdecomp.models.autoencoder import Autoencoder, AutoencoderConfig
from layerdecomp.models.context_fusion import ContextFusion, check_fusion
from layerdecomp.models.depth import DepthEstimator
from layerdecomp.models.lora import LoRAConfig, inject_lora, merge_lora
from layerdecomp.models.mmdit import MMDiT, MMDiTConfig
from layerdecomp.resizing import model_size, to_model_size, to_original_size
from layerdecomp.sampling import Progress, SampleConfig, euler, schedule
from layerdecomp.tensor_files import Metadata, check_device, check_present, frozen_dtype
from layerdecomp.weights import Adapter, copy_tensors, empty_mmdit, load_autoencoder, load_mmdit, open_state

# The source files of the package that decide which layers are drawn.
SOURCES = (
    *("conditioning.py", "decomposer.py", "flow.py", "imaging/*.py", "inpainting.py", "layouts.py", "manifest.py"),
    *("models/*.py", "quantization.py", "resizing.py", "sampling.py", "tensor_files.py", "weights.py"),
)
SHA256_BY_SOURCE = {f"layerdecomp/{pattern}": source_sha256(pattern) for pattern in SOURCES}


@dataclass(frozen=True)
class Prepared:
    """An image that has been read and prepared for the model."""

    pixels: Pixels  # (H, W, 3)
    mask: NDArray[np.bool_]  # (H, W)
    full: dict[str, Tensor]  # image and mask, (1, C, H, W) each
    inputs: dict[str, Tensor]  # the model's inputs, by `to_model_size`: image, mask, cues and cues_present

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) at which the layers are sampled."""
        return self.inputs["image"].shape[-2], self.inputs["image"].shape[-1]

    def layers(self, background: Tensor, foreground: Tensor) -> Layers:
        """`Layers` in pixels from a background (1, 3, H, W) and a straight foreground (1, 4, H, W)."""
        return Layers(self.pixels, self.mask, to_pixels(background[0]), to_pixels(with_pixel_alpha(foreground[0])))


class Decomposer(nn.Module):
    """Samples the background by inpainting inside the mask and the foreground by outpainting outside it, jointly.

    After "From Inpainting to Layer Decomposition" (arXiv 2511.20996). The tokens of both layers form one sequence for
    the adapted transformer and are distinguished by their positions and their inpainting contexts.

    Parameters that require gradients when it is made are its trained ones, which adapter files hold, even if they are
    frozen later.
    """

    def __init__(
        self,
        *,
        transformer: MMDiT,
        autoencoder: Autoencoder,
        rgba_autoencoder: Autoencoder,
        context_fusion: ContextFusion | None,
        prompt: Prompt,
        conditioning: ConditioningConfig,
        flow: FlowConfig,
        sample: SampleConfig,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.rgba_autoencoder = rgba_autoencoder
        self.context_fusion = context_fusion
        self.prompt = prompt
        self.conditioning = conditioning
        self.flow = flow
        self.sample = sample
        self._trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compiles the parts that every training step runs, on first use: transformer blocks and both encoders."""
        self.transformer.compile_blocks(backend)
        for autoencoder in (self.autoencoder, self.rgba_autoencoder):
            autoencoder.encoder.compile(backend=backend)

    @torch.no_grad()
    def encode_sample(
        self, image: Tensor, mask: Tensor, cues: Tensor | None, background: Tensor, foreground: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes a training batch; its RGB images pass through their autoencoder in one batch.

        Args:
            image, mask, cues: as in `encode`.
            background: (B, 3, H, W) in [-1, 1].
            foreground: straight, (B, 4, H, W).

        Returns:
            The result of `encode_images`, and both layers' packed latents (B, 2L, 64).
        """
        latents = self.encode_images(image, mask, cues, background)
        z_f = self.rgba_autoencoder.encode(to_autoencoder(foreground), tiling=self.sample.tiling)
        return latents[:, :-1], torch.cat([pack(latents[:, -1]), pack(z_f)], dim=1)

    def encode(
        self, image: Tensor, mask: Tensor, cues: Tensor | None = None, cues_present: Tensor | None = None
    ) -> Context:
        """The context of a batch.

        Args:
            image: (B, 3, H, W) in [-1, 1], H and W multiples of 16.
            mask: (B, 1, H, W) in {0, 1}, 1 = object.
            cues: maps of all `CUES`, (B, len(CUES), 3, H, W) in [-1, 1]; not needed without context fusion.
            cues_present: which cues each sample has, (B, len(CUES)) bool.

        If the frozen parts are in bf16, the default on GPUs, call this and `velocity` within
        `mixed_precision(decomposer.autoencoder)`, as `draw` does.
        """
        return self.condition(self.encode_images(image, mask, cues), mask, cues_present)

    @torch.no_grad()
    def encode_images(self, image: Tensor, mask: Tensor, cues: Tensor | None = None, *more: Tensor) -> Tensor:
        """Latents of the two masked images, then of the cues that the fusion uses: (B, 2 + M, 16, H/8, W/8).

        Arguments as in `encode`; the latents of `more` images (B, 3, H, W) follow. All are encoded as one batch.
        """
        images = [*masked_images(image, mask), *self._select_cues(cues), *more]
        latents = self.autoencoder.encode(torch.stack(images, dim=1).flatten(0, 1), tiling=self.sample.tiling)
        return rearrange(latents, "(B M) C h w -> B M C h w", M=len(images))

    def _select_cues(self, cues: Tensor | None) -> list[Tensor]:
        """The slices of `cues` (B, len(CUES), ...) that the fusion uses, one per cue."""
        if self.context_fusion is None:
            return []
        assert cues is not None
        # One by one: indexing with a list would synchronise with the GPU.
        return [cues[:, CUES.index(name)] for name in self.context_fusion.config.cues]

    def condition(self, latents: Tensor, mask: Tensor, cues_present: Tensor | None = None) -> Context:
        """The context of a batch from the `latents` of `encode_images`; other arguments as in `encode`."""
        img_cond = bidirectional_context(latents[:, 0], latents[:, 1], mask, self.conditioning)
        ids = token_ids(mask, 0, 1)
        if self.context_fusion is None:
            return Context(img_cond, ids)
        tokens = torch.stack([pack(cue) for cue in latents[:, 2:].unbind(1)], dim=1)  # (B, M, L, 64)
        present = torch.stack(self._select_cues(cues_present), dim=1)
        return Context(img_cond, ids, self.context_fusion(tokens, present, token_ids(mask, 0)))

    def velocity(self, x: Tensor, context: Context, timesteps: Tensor, guidance: float | None = None) -> Tensor:
        """Velocity (B, 2L, 64) of both layers' tokens.

        Args:
            x: noisy packed latents (B, 2L, 64): the background's, then the foreground's.
            timesteps: (B,) in [0, 1], 1 = pure noise.
            guidance: scale, for models that embed it; default `sample.guidance`.
        """
        guidance = self.sample.guidance if guidance is None else guidance
        return predict_velocity(self.transformer, self.prompt, x, context, timesteps, guidance)

    @torch.no_grad()
    def draw(
        self, batch: Mapping[str, Tensor], noise: Tensor, steps: int | None = None, progress: Progress = iter
    ) -> tuple[Tensor, Tensor]:
        """Samples both layers of a batch.

        Args:
            batch: image, mask, cues, cues_present as in `encode`.
            noise: standard normal (B, 2 E, 16, H/8, W/8): the background's, then the foreground's, for each of E draws.
            steps: Euler steps; default `sample.steps`.
            progress: wraps the steps to show progress, as `tqdm` does.

        Returns:
            Background (B, 3, H, W) in [-1, 1] of the first draw, and straight foreground (B, 4, H, W), the median of
            all draws (test-time ensembling: Ke et al. 2024, arXiv 2312.02145).
        """
        draws = noise.shape[1] // 2
        pairs = rearrange(noise, "B (E S) C h w -> S (B E) C h w", S=2)
        x = torch.cat([pack(pairs[0]), pack(pairs[1])], dim=1)
        timesteps = schedule(steps or self.sample.steps, x.shape[1] // 2, self.flow).to(x)
        with mixed_precision(self.autoencoder):
            context = self.encode(batch["image"], batch["mask"], batch.get("cues"), batch.get("cues_present"))
            context = context.repeat(draws)
            x = euler(lambda x, t: self.velocity(x, context, t), x, timesteps, progress)
            z_b, z_f = (unpack(tokens, *noise.shape[-2:]) for tokens in x.chunk(2, dim=1))
            background = self.autoencoder.decode(z_b[::draws], tiling=self.sample.tiling)
            foregrounds = self.rgba_autoencoder.decode(z_f, tiling=self.sample.tiling)
        ranked = rearrange(foregrounds.float().clamp(-1, 1), "(B E) C H W -> E B C H W", E=draws).sort(dim=0).values
        # Not `Tensor.median`, which takes the lower of two middle values and is not deterministic on GPUs.
        foreground = (ranked[(draws - 1) // 2] + ranked[draws // 2]) / 2
        return background.float().clamp(-1, 1), from_autoencoder(foreground, margin=self.sample.alpha_margin)

    def decompose(
        self,
        image: ImageSource,
        mask: ImageSource,
        steps: int | None = None,
        seed: int = 0,
        cues: NDArray[np.float32] | None = None,
        depth: DepthEstimator | None = None,
        progress: Progress = iter,
    ) -> Layers:
        """Decomposes an image of any size.

        Args:
            image: path, PIL image or uint8 array (H, W, 3).
            mask: likewise, of the image's size; see `read_mask`.
            steps: Euler steps; default `sample.steps`.
            seed: of the noise; the same seed gives the same layers.
            cues: maps (M, 3, H, W) of the image's size in [-1, 1], in the order of `CUES`, all present; by default,
                computed from the image.
            depth: estimator on the CPU for the depth cue, which is absent without it.
            progress: wraps the steps to show progress, as `tqdm` does.

        Returns:
            `Layers` at the image's size.

        Raises:
            InputError: a file cannot be read, the mask or the cues do not fit the image, or another argument cannot be
                used.
        """
        return self.decompose_batch([self.prepare(image, mask, cues, depth)], steps, seed, progress)[0]

    def prepare(
        self,
        image: ImageSource,
        mask: ImageSource,
        cues: NDArray[np.float32] | None = None,
        depth: DepthEstimator | None = None,
    ) -> Prepared:
        """Reads an image for `decompose_batch`; arguments and errors as in `decompose`."""
        pixels, object_mask = read_pair(image, mask)
        full = {"image": to_tensor(pixels), "mask": torch.from_numpy(object_mask).float()[None, None]}
        inputs = to_model_size({**full, **self._cues(full, cues, depth)}, self.sample)
        return Prepared(pixels, object_mask, full, inputs)

    def decompose_batch(
        self, images: Sequence[Prepared], steps: int | None = None, seed: int = 0, progress: Progress = iter
    ) -> list[Layers]:
        """Decomposes images of equal `Prepared.size` in one batch; arguments as in `decompose`.

        All get the same noise, so that the layers of each are those it would have alone, up to rounding.
        """
        steps = None if steps is None else check_whole_number("steps", steps, 1)
        seed = check_whole_number("seed", seed)
        height, width = common_size(images)
        device = self.prompt.vec.device
        inputs = [image.inputs for image in images]
        batch = {name: torch.cat([one[name] for one in inputs]).to(device) for name in inputs[0]}
        channels = self.autoencoder.config.z_channels
        shape = (2 * self.sample.ensemble, channels, height // LATENT_FACTOR, width // LATENT_FACTOR)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
        background, foreground = self.draw(batch, noise.expand(len(images), *shape).to(device), steps, progress)
        return [
            image.layers(*to_original_size(background[i : i + 1], foreground[i : i + 1], image.full, self.sample))
            for i, image in enumerate(images)
        ]

    def _cues(
        self, full: Mapping[str, Tensor], given: NDArray[np.float32] | None, depth: DepthEstimator | None
    ) -> dict[str, Tensor]:
        if self.context_fusion is None:
            return {}
        if given is None:  # at the model's size, those that the fusion uses
            image, used = resize(full["image"], model_size(full["image"], self.sample)), self.context_fusion.config.cues
            estimated = {"depth": depth.estimate(image)[0].numpy()} if depth is not None and "depth" in used else {}
            computed, present = compute_cues(to_pixels(image[0]), estimated, [name in used for name in CUES])
            return {"cues": torch.from_numpy(computed)[None], "cues_present": torch.from_numpy(present)[None]}
        check_cues(given, (len(CUES), *full["image"].shape[1:]))
        maps = torch.from_numpy(np.ascontiguousarray(given, np.float32))[None]
        return {"cues": maps, "cues_present": torch.ones(1, len(CUES), dtype=torch.bool)}

    def adapter(self, metadata: Metadata) -> Adapter:
        """The trained tensors, under their names in the adapter file; `InputError` if some have been merged."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad or name in self._trained}
        if self._trained - trained.keys():
            raise InputError("the LoRA of this decomposer has been merged into its base; load the adapter again")
        return Adapter({name.removeprefix("transformer."): p for name, p in trained.items()}, metadata)

    def digest(self) -> str:
        """A checksum of the trained tensors, independent of the file they come from."""
        sha256 = hashlib.sha256()
        for tensor in self.adapter({}).tensors.values():
            sha256.update(tensor.detach().cpu().contiguous().numpy().data)
        return sha256.hexdigest()

    def load_adapter(self, adapter: Adapter, path: str | Path) -> None:
        """Loads the trained tensors; `InputError` unless they are exactly those of this model."""
        what = (
            "this decomposer, whose code or settings are not those that the adapter was trained with (training without "
            "adapter= starts anew)"
        )
        copy_tensors(path, adapter.tensors, self.adapter({}).tensors, what)

    def frozen_base(self, path: str | Path) -> FrozenBase:
        """The base at `path` before adaptation; it shares all weights except those trained in full, as img_in is."""
        base, layout = empty_mmdit(path, self.transformer.config)
        readers = open_state(base, path, str(self.prompt.vec.device), layout)
        dtype = next(self.autoencoder.parameters()).dtype
        original = {name: readers[name]().to(dtype) for name in self.adapter({}).tensors if name in readers}
        return FrozenBase(self.transformer, original)

    def merge(self) -> "Decomposer":
        """Merges the LoRA into the transformer's weights, so that a sampling step costs no more than the base's.

        In place and irreversible: afterwards, the adapter can be neither trained nor saved, nor the frozen base used.
        Layers with quantised weights keep their LoRA.
        """
        merge_lora(self.transformer)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        **files: str,
    ) -> "Decomposer":
        """Loads the decomposer described by an adapter file, ready to sample.

        Args:
            path: adapter.safetensors, or the folder that it was published in.
            dtype: of the frozen parts, float32 or bfloat16; by default, float32 on a CPU and bfloat16 elsewhere.
            quantize: int8, fp8 or nf4, for the frozen transformer.
            files: other paths of the frozen parts (transformer=, autoencoder=, rgba_autoencoder=, prompt=).

        Raises:
            InputError: a file is missing or does not fit, the base is not the one that was adapted, or the device
                cannot be used.
        """
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise InputError(
                f"dtype is {dtype!r}; expected torch.float32 or torch.bfloat16, in which the base is trained"
            )
        check_device(device)
        adapter, config = open_adapter(path, **files)
        decomposer = build_decomposer(config, dtype=dtype or frozen_dtype(device), device=device, quantize=quantize)
        decomposer.load_adapter(adapter, path)
        return decomposer.requires_grad_(False).eval()


def build_decomposer(
    config: DecomposerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize: str | None = None,
    mapped: bool = False,
) -> Decomposer:
    """Builds the whole architecture: frozen parts from their files, trained parts in float32.

    For `mapped`, see `load_mmdit`.
    """
    check_present(*config.weights.named().values())
    check_adaptation(config)
    path = config.weights.transformer
    transformer = load_mmdit(path, dtype=dtype, device=device, quantize=quantize, mapped=mapped)
    adapt(transformer, config.lora)
    autoencoder = load_autoencoder(config.weights.autoencoder, dtype=dtype, device=device)
    rgba_autoencoder = load_autoencoder(config.weights.rgba_autoencoder, dtype=dtype, device=device)
    check_parts(config, transformer.config, autoencoder.config, rgba_autoencoder.config)
    prompt = Prompt.load(config.weights.prompt, transformer)
    return assemble(config, transformer, autoencoder, rgba_autoencoder, prompt).to(device)


def assemble(
    config: DecomposerConfig,
    transformer: MMDiT,
    autoencoder: Autoencoder,
    rgba_autoencoder: Autoencoder,
    prompt: Prompt,
) -> Decomposer:
    """A decomposer of these frozen parts, whose transformer is adapted already; its context fusion is new."""
    fusion = ContextFusion(config.fusion, transformer.config.hidden_size) if config.fusion.enabled else None
    return Decomposer(
        transformer=transformer,
        autoencoder=autoencoder,
        rgba_autoencoder=rgba_autoencoder,
        context_fusion=fusion,
        prompt=prompt,
        conditioning=config.conditioning,
        flow=config.flow,
        sample=config.sample,
    )


def adapt(transformer: MMDiT, lora: LoRAConfig) -> None:
    """Makes the transformer's trained parameters, in place, in float32: LoRA and the input projection.

    Whatever requires gradients here is trained, saved and loaded. The frozen base gets back the original values of its
    own parameters. A new layer needs a flag `adapted`, and must do nothing while `without_lora` has set it to False.
    """
    inject_lora(transformer, lora)
    transformer.img_in.requires_grad_(True)
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # in bf16, most steps of a usual learning rate would be rounded away
            parameter.data = parameter.data.float()


def common_size(images: Sequence[Prepared]) -> tuple[int, int]:
    """(height, width) of the images of a batch; `InputError` unless they are results of `prepare` and of one size."""
    wrong = [image for image in images if not isinstance(image, Prepared)] if isinstance(images, Sequence) else [images]
    if wrong or not images:
        found = type(wrong[0]).__name__ if wrong else "nothing"
        raise InputError(f"images holds {found}; expected a list of one or more results of `prepare`")
    height, width = images[0].size
    for image in images:
        if image.size != (height, width):
            other = f"{image.size[1]} x {image.size[0]}"
            raise InputError(f"images of {width} x {height} and of {other} pixels; expected one size for a batch")
    return height, width


def check_adaptation(config: DecomposerConfig) -> None:
    """Raises `InputError` for mistakes that can be found before 24 GB are read, and without them."""
    if config.fusion.enabled and (unknown := [name for name in config.fusion.cues if name not in CUES]):
        raise InputError(f"fusion.cues names {unknown[0]!r}; expected some of {', '.join(CUES)}")
    if config.lora.adapts("img_in"):
        raise InputError(
            f"lora.targets {config.lora.targets} match img_in, which is trained in full; expected patterns that "
            "exclude it, such as *_blocks.*"
        )


def check_parts(
    config: DecomposerConfig, transformer: MMDiTConfig, autoencoder: AutoencoderConfig, rgba: AutoencoderConfig
) -> None:
    """Raises `InputError` if the transformer is not an inpainting model, or the parts do not fit together."""
    _check_autoencoder(config.weights.autoencoder, autoencoder, 3, autoencoder.z_channels)
    _check_autoencoder(config.weights.rgba_autoencoder, rgba, 4, autoencoder.z_channels)
    path, packed = config.weights.transformer, PATCH**2 * autoencoder.z_channels
    found, expected = transformer.in_channels, 2 * packed + TOKEN_FACTOR**2
    if found != expected:
        what = "this is FLUX.1-dev (or -schnell or -Kontext), not Fill; " if found == 64 else ""
        raise InputError(
            f"{path} takes {found} input channels; {what}expected {expected}: noise, the masked image's latents and "
            "the mask"
        )
    if not config.fusion.enabled:
        return
    check_fusion(config.fusion, transformer.hidden_size)
    if config.fusion.in_channels != packed:
        raise InputError(
            f"fusion.in_channels is {config.fusion.in_channels}; expected {packed}, the channels of a packed latent"
        )


def _check_autoencoder(path: str, found: AutoencoderConfig, channels: int, z_channels: int) -> None:
    if found.in_channels != channels:
        raise InputError(
            f"{path} is an autoencoder of {found.in_channels} channels, expected {channels}: 3 for RGB, 4 for RGBA"
        )
    if found.factor != LATENT_FACTOR:
        raise InputError(
            f"{path} is an autoencoder of {found.factor} pixels per latent, expected {LATENT_FACTOR}: four levels in "
            "ch_mult"
        )
    if found.z_channels != z_channels:
        raise InputError(
            f"{path} is an autoencoder of {found.z_channels} latent channels, expected {z_channels}: those of the RGB "
            "autoencoder, from which it is to be fine-tuned"
        )
