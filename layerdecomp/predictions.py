"""Folders of predicted layers, written by this package's methods or by any other method to be scored.

background/<name>.png (RGB) and foreground/<name>.png (straight RGBA; or grey, an alpha for the image's own colours).
Either folder may be missing. Every method, including ours, is scored from such 8-bit files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerdecomp.data.folders import by_stem
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import resize_straight, with_pixel_alpha, with_unit_alpha
from layerdecomp.imaging.geometry import resize, to_pixels, to_tensor
from layerdecomp.imaging.layers import open_picture, read_image, to_srgb, write_picture

LAYERS = ("background", "foreground")
MAX_STRETCH = 0.02  # maximum relative difference in aspect between a prediction and its image
Prediction = tuple[Tensor | None, Tensor | None]  # background (B, 3, H, W), straight foreground (B, 4, H, W)


class PredictionFolder:
    """A method's layers for the samples of a test set.

    Attributes:
        parts: layer -> name -> file, for the layers that have a folder.
        given: layers that at least one sample has.
        missing: layer -> names of samples without it.
        extra: layer -> names of files that match no sample.
        resized: names of the samples that `read` has resized so far.

    Raises:
        InputError: there is no folder of layers, or no file is named like a sample.
    """

    def __init__(self, root: str | Path, names: Sequence[str]) -> None:
        self.root, known = Path(root), set(names)
        self.parts = {layer: by_stem(self.root / layer) for layer in LAYERS if (self.root / layer).is_dir()}
        if not self.parts:
            raise InputError(f"{root} has neither background/ nor foreground/; expected one of them, or both")
        self.missing = {layer: [name for name in names if name not in files] for layer, files in self.parts.items()}
        self.extra = {layer: sorted(files.keys() - known) for layer, files in self.parts.items()}
        self.given = {layer for layer, files in self.parts.items() if files.keys() & known}
        self.resized: set[str] = set()
        if not self.given:
            found = next(iter(next(iter(self.parts.values())).values()))
            raise InputError(
                f"{root}: no file is named like a sample; found {found}, expected {names[0]}.png: name the files like "
                "the exported images (tools/evaluate.py export=FOLDER)"
            )

    def read(self, name: str, image: Tensor) -> Prediction:
        """The background (1, 3, H, W) and foreground (1, 4, H, W) of a sample with the image (1, 3, H, W).

        Raises:
            InputError: a file is damaged, differs in aspect from the image, or is a foreground without alpha.
        """
        found = {layer: self._read(layer, name, image) for layer in LAYERS}
        return found["background"], found["foreground"]

    def _read(self, layer: str, name: str, image: Tensor) -> Tensor | None:
        file = self.parts.get(layer, {}).get(name)
        if file is None:
            return None
        path = self.root / layer / file
        values = to_tensor(read_image(path)) if layer == "background" else _read_foreground(path, image)
        size = (image.shape[-2], image.shape[-1])
        if values.shape[-2:] == size:
            return values
        self._check_shape(path, values, size)
        self.resized.add(name)
        if layer == "background":
            return resize(values, size)
        return resize_straight(values, size)

    def _check_shape(self, path: Path, values: Tensor, size: tuple[int, int]) -> None:
        height, width = values.shape[-2:]
        if abs(width * size[0] / (height * size[1]) - 1) > MAX_STRETCH:
            raise InputError(
                f"{path} is {width} x {height} pixels, its image {size[1]} x {size[0]}; expected the same aspect: crop "
                "or stretch it back, as its method requires"
            )


def _read_foreground(path: Path, image: Tensor) -> Tensor:
    """A foreground (1, 4, h, w); a grey file is an alpha for the image's own colours."""
    picture = open_picture(path, upright=True)
    if picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;16"):
        alpha = (to_tensor(read_image(picture)[..., :1]) + 1) / 2
        return torch.cat([resize(image.cpu(), (alpha.shape[-2], alpha.shape[-1])), alpha], dim=1)
    if not picture.has_transparency_data:
        raise InputError(f"{path} has no alpha channel (its mode is {picture.mode}); expected RGBA, or a grey matte")
    return with_unit_alpha(to_tensor(np.asarray(to_srgb(picture).convert("RGBA"))))


def is_written(root: Path, name: str, layers: Sequence[str]) -> bool:
    """Whether the files of a sample's layers exist."""
    return all((root / layer / f"{name}.png").is_file() for layer in layers)


def write_prediction(root: Path, names: Sequence[str], prediction: Prediction) -> None:
    """Writes the layers of a batch, each file atomically.

    Raises:
        ValueError: the layers contain NaN or infinity.
    """
    if any(values is not None and not torch.isfinite(values).all() for values in prediction):
        raise ValueError(f"{root.name}: the layers contain NaN or infinity: the model has diverged.")
    for layer, values in zip(LAYERS, prediction, strict=True):
        for name, value in zip(names, values if values is not None else (), strict=values is not None):
            write_picture(root / layer / f"{name}.png", to_pixels(with_pixel_alpha(value.float())))


def describe(folder: PredictionFolder) -> Mapping[str, object]:
    """Missing, extra and resized files of a folder, for the protocol; empty if there are none."""
    found: dict[str, object] = {
        f"{kind}_{layer}s": names
        for kind, by_layer in (("missing", folder.missing), ("extra", folder.extra))
        for layer, names in by_layer.items()
        if names
    }
    return found | ({"resized": sorted(folder.resized)} if folder.resized else {})
