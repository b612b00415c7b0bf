"""The sample format that all data sets share, and its construction from a scene."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.cues import CUES, compute_cues
from layerdecomp.imaging.geometry import to_pixels
from layerdecomp.imaging.masks import MaskConfig, imperfect_mask

SPLITS = ("train", "test")


def check_split(split: str) -> None:
    """Raises `InputError` unless a split is one of `SPLITS`."""
    if split not in SPLITS:
        raise InputError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")


class Scene(NamedTuple):
    """The layers of a scene, back to front, in the value ranges of a sample."""

    background: Tensor  # (3, H, W)
    foreground: Tensor  # (4, H, W), the complete object
    occluder: Tensor  # (4, H, W), fully transparent if there is none

    @property
    def image(self) -> Tensor:
        """(3, H, W), all layers composited."""
        return over(self.occluder, over(self.foreground, self.background))

    @property
    def visible(self) -> Tensor:
        """(1, H, W), alpha of the visible part of the object."""
        return self.foreground[3:] * (1 - self.occluder[3:])


def build_sample(
    scene: Scene,
    *,
    masks: MaskConfig,
    rng: np.random.Generator,
    image: Tensor | None = None,
    visible: Tensor | None = None,
    truncated: bool = False,
) -> dict[str, Any]:
    """Make the tensors of a sample.

    Args:
        masks: distribution of the imperfect mask, which is drawn from `rng`.
        image: (3, H, W); defaults to the composited scene.
        visible: (1, H, W) in [0, 1], alpha of the visible part of the object; defaults to the scene's.
        truncated: remove the part of the foreground that the occluder hides.

    Returns:
        image (3, H, W) in [-1, 1]; mask (1, H, W) in {0, 1}, imperfect, 1 = object; foreground (4, H, W), straight RGB
        in [-1, 1] and alpha in [0, 1]; background (3, H, W), the scene without the object, occluder included; occluder
        (1, H, W), the occluder's alpha.
    """
    foreground = scene.foreground
    if truncated:  # colour under alpha 0 is arbitrary, but it must not reveal the hidden part
        foreground = torch.cat([foreground[:3] * (scene.visible > 0), scene.visible])
    return {
        "image": scene.image if image is None else image,
        "mask": plane(imperfect_mask((scene.visible if visible is None else visible)[0].numpy(), rng, masks)),
        "foreground": foreground,
        "background": over(scene.occluder, scene.background),
        "occluder": scene.occluder[3:],
    }


def build_cues(
    image: Tensor,
    rng: np.random.Generator,
    *,
    dropout: float,
    enabled: bool = True,
    maps: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the cue maps of an image (3, H, W), each dropped with probability `dropout`.

    `maps` holds precomputed ones by name, each (3, H, W) in [-1, 1].

    Returns:
        cues (M, 3, H, W) in [-1, 1], zeros where absent, and cues_present (M,) bool, in the order of `CUES`. Unless
        `enabled`, all are absent.
    """
    if not enabled:
        return {
            "cues": torch.zeros(len(CUES), *image.shape),
            "cues_present": torch.zeros(len(CUES), dtype=torch.bool),
        }
    given = {name: values.numpy() for name, values in (maps or {}).items()}
    kept = rng.random(len(CUES)) >= dropout
    cues, present = compute_cues(to_pixels(image), given, kept)
    return {"cues": torch.from_numpy(cues), "cues_present": torch.from_numpy(present)}


def plane(values: NDArray[np.float32] | NDArray[np.bool_]) -> Tensor:
    """(H, W) -> (1, H, W) float32."""
    return torch.from_numpy(values[None].astype(np.float32))
