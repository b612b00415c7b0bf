"""The built-in data set: synthetic scenes of one object over a background, generated on the fly without a download.

Each sample is a pure function of (seed, split, index), so workers, processes and runs agree. The scene, the mask, the
cue dropout and the inpainting mask draw from independent random streams: two configs that differ only in the masks
produce the same scenes.

From back to front, a scene has a background (photograph or procedural texture), optionally a bystander, the object, and
optionally an occluder. The bystander and the occluder are generated like the object, so a model cannot find the object
by its pasted look; both remain in the sample's background. The splits share no seeds and no photographs. The test split
uses different glyphs and adds shape families (crescents, silhouettes) and textures (chevrons, dots) absent from
training.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import maximum_filter
from torch import Tensor
from torch.utils.data import Dataset

from layerdecomp.data.sample import SPLITS, Scene, build_cues, build_sample, check_split, plane
from layerdecomp.data.shapes import Matte, draw_shape, inpainting_mask, placed, scaled, whole_shape
from layerdecomp.data.textures import Texture, many_coloured, material, photograph_crop, procedural
from layerdecomp.errors import InputError, check_probabilities
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.masks import MaskConfig


@dataclass
class SceneConfig:
    """Contents of the scenes."""

    size: int = 128  # pixels, a multiple of 16
    photograph_probability: float = 0.65  # of a photograph as background; otherwise it is procedural
    bystander_probability: float = 0.35  # of a second object behind the object
    occluder_probability: float = 0.35  # of a second object in front of the object
    many_coloured_probability: float = 0.0  # of a photograph's colours instead of shades of one; training split only
    truncated_shapes: bool = False  # ablation: foregrounds lack the part behind the occluder; training split only
    cue_dropout: float = 0.1  # probability that a cue is dropped; training split only
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        probabilities = [name for name in vars(self) if name.endswith("_probability")]
        check_probabilities(self, "data.scenes.", *probabilities, "cue_dropout")
        if self.size < 16 or self.size % 16:
            raise InputError(f"data.scenes.size: found {self.size}, expected a positive multiple of 16")


class Scenes(Dataset[dict[str, Any]]):
    """A map-style data set of `length` scenes.

    A sample holds the outputs of `build_sample` and `build_cues` (zeros unless `with_cues`), inpaint_mask (1, H, W) in
    {0, 1} (random shapes unrelated to the object) and index. Where occluder is 0, image = foreground over background.

    Raises InputError for an unknown split or a negative seed, and IndexError for an index outside [0, length).
    """

    def __init__(self, config: SceneConfig, split: str, seed: int, length: int, with_cues: bool = True) -> None:
        check_split(split)
        if seed < 0:
            raise InputError(f"seed: found {seed}, expected 0 or more")
        self.config, self.split, self.seed, self.length, self.with_cues = config, split, seed, length, with_cues

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """A sample's name in logs."""
        return f"scene {index}"

    def draw(self, index: int, attempt: int = 0) -> dict[str, Any]:
        """A sample; `attempt` is ignored, since no file is read that could be damaged."""
        return self[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        sequence = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])
        scene_rng, mask_rng, cue_rng, inpaint_rng = (np.random.default_rng(child) for child in sequence.spawn(4))
        scene = make_scene(scene_rng, self.config, self.split)
        training = self.split == "train"
        truncated = self.config.truncated_shapes and training
        sample = build_sample(scene, masks=self.config.masks, rng=mask_rng, truncated=truncated)
        dropout = self.config.cue_dropout if training else 0.0
        return {
            **sample,
            **build_cues(sample["image"], cue_rng, dropout=dropout, enabled=self.with_cues),
            "inpaint_mask": plane(inpainting_mask(inpaint_rng, self.config.size)),
            "index": index,
        }


def make_scene(rng: np.random.Generator, config: SceneConfig, split: str) -> Scene:
    """Draw a random scene."""
    size = config.size
    photograph = rng.random() < config.photograph_probability
    background = _colour(photograph_crop(rng, size, split) if photograph else procedural(rng, size, split))
    area = np.exp(rng.uniform(np.log(0.08), np.log(0.45)))  # log-uniform: as many small objects as large ones
    matte = whole_shape(rng, size, split, area)
    if rng.random() < config.bystander_probability:
        bystander = whole_shape(rng, size, split, rng.uniform(0.03, 0.2))
        if (bystander * matte).sum() < 0.5 * bystander.sum():  # a mostly hidden bystander could not be predicted
            background = over(_render(rng, bystander, config, split, background), background)
    foreground = _render(rng, matte, config, split, background)
    occluder = torch.zeros_like(foreground)
    if rng.random() < config.occluder_probability:
        occluder_matte = _occluder_matte(rng, split, foreground[3].numpy())
        if occluder_matte.any():
            behind = over(foreground, background)
            occluder = _render(rng, occluder_matte, config, split, behind, opaque=True)
    return Scene(background, foreground, occluder)


def _render(
    rng: np.random.Generator, matte: Matte, config: SceneConfig, split: str, behind: Tensor, opaque: bool = False
) -> Tensor:
    """Render a shape as a layer (4, H, W) that stands out from the image `behind` it.

    Unless `opaque`, it sometimes has a soft edge or is semi-transparent.
    """
    edge = (maximum_filter(matte, 9) > 0.5) & (matte < 0.5)
    surroundings = behind.permute(1, 2, 0).numpy()[edge] / 2 + 0.5
    share = config.many_coloured_probability if split == "train" else 0.0
    surface = many_coloured if share and rng.random() < share else material
    rgb = _shaded(surface(rng, len(matte), split, surroundings), matte, rng)
    kind = rng.random()
    if kind < 0.15 and not opaque:
        return _layer(rgb, _blurred(matte, rng.uniform(0.006, 0.025) * len(matte)))
    if kind < 0.25 and not opaque:
        return _layer(rgb, matte * np.float32(rng.uniform(0.4, 0.85)))
    return _layer(rgb, matte)


def _occluder_matte(rng: np.random.Generator, split: str, alpha: Matte) -> Matte:
    """Draw a shape (H, W) that covers 10 to 50 % of an object; empty if none of the tried positions does."""
    size = len(alpha)
    stamp = scaled(draw_shape(rng, size, split), float(alpha.mean()) * rng.uniform(0.4, 1.2), rng, size)
    for row, column in rng.choice(np.argwhere(alpha > 0.2), 12):
        # Align a random point of the stamp's box with this pixel of the object.
        left, top = np.round((column, row) - rng.random(2) * stamp.size).astype(int).tolist()
        matte = placed(stamp, left, top, size)
        if 0.1 <= (alpha * matte).sum() / alpha.sum() <= 0.5:
            return matte
    return np.zeros_like(alpha)


def _shaded(rgb: Texture, matte: Matte, rng: np.random.Generator) -> Texture:
    """Shade half of the textures as a shape with rounded edges, lit from one side; leave the others flat."""
    if rng.random() < 0.5:
        return rgb
    size = len(matte)
    height = _blurred(matte, rng.uniform(0.02, 0.06) * size)
    slope_y, slope_x = np.gradient(0.05 * size * height)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.0)
    light = np.cos(angle) * slope_x + np.sin(angle) * slope_y
    return np.asarray(np.clip(rgb * (1 + strength * light)[..., None], 0, 1), np.float32)


def _blurred(matte: Matte, radius: float) -> Matte:
    image = Image.fromarray(np.round(matte * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / np.float32(255)


def _layer(rgb: Texture, alpha: Matte) -> Tensor:
    return torch.cat([_colour(rgb), plane(alpha)])


def _colour(rgb: Texture) -> Tensor:
    """Map (H, W, 3) in [0, 1] to (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))) * 2 - 1
