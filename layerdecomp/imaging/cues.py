"""Cue maps (edges, segmentation, depth) of the whole image, which context fusion condenses into a few tokens.

A cue of your own is one function and one entry in `REGISTRY`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny
from skimage.segmentation import felzenszwalb
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.imaging.geometry import Box, ResizePicture, resize_picture, to_pixels, to_tensor
from layerdecomp.imaging.layers import Pixels

Compute = Callable[[Pixels], NDArray[np.float32]]  # (H, W, 3) -> (1 or 3, H, W) in [-1, 1]
SEGMENTED_SIDE = 384  # pixels


def edge_map(image: Pixels) -> NDArray[np.float32]:
    """Canny edges (1, H, W) of an RGB image (H, W, 3): 1 on an edge, -1 elsewhere."""
    return np.where(canny(rgb2gray(image), sigma=1.0), 1, -1).astype(np.float32)[None]


def segmentation_map(image: Pixels) -> NDArray[np.float32]:
    """Segments of an RGB image (H, W, 3), each painted with its mean colour: (3, H, W) in [-1, 1].

    Graph-based segmentation, which needs no weights (Felzenszwalb and Huttenlocher, IJCV 2004). It runs on an image
    downscaled to `SEGMENTED_SIDE`, since its cost grows faster than the number of pixels.
    """
    height, width = image.shape[:2]
    scale = min(1.0, SEGMENTED_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    segments = felzenszwalb(small, scale=200, sigma=0.8, min_size=small.shape[0] * small.shape[1] // 500)
    rows, columns = (np.arange(side) * of // side for side, of in zip((height, width), segments.shape, strict=True))
    labels = segments[rows[:, None], columns].ravel()
    pixels = image.reshape(-1, 3)
    counts = np.bincount(labels)
    means = np.stack([np.bincount(labels, pixels[:, channel]) / counts for channel in range(3)])
    return (means[:, labels].reshape(3, *image.shape[:2]) / 127.5 - 1).astype(np.float32)


def resize_lines(picture: Image.Image, size: tuple[int, int], box: Box | None) -> Image.Image:
    """A map of lines, or a crop of it, at (height, width): two levels, and no line is lost."""
    lines = picture.convert("L").point(lambda level: 255 * (level >= 128))
    shares = lines.resize(size[::-1], Image.Resampling.BOX, box)  # above 0 wherever a line passes
    return shares.point(lambda level: 255 * (level > 0)).convert("RGB")


def resize_segments(picture: Image.Image, size: tuple[int, int], box: Box | None) -> Image.Image:
    """A map of segments, or a crop of it, at (height, width): colours do not blend."""
    return picture.resize(size[::-1], Image.Resampling.NEAREST, box)


@dataclass(frozen=True)
class Cue:
    """How a cue is computed, and how maps of it in files are resized.

    Resized maps of edges are denser than those computed at that size, so a map is computed at the size it is used at.
    """

    compute: Compute | None  # None: it needs a network
    resize: ResizePicture  # of an RGB picture


REGISTRY = {  # new cues go last: `Decomposer.decompose` takes maps in this order, and cue dropout draws in it
    "edge": Cue(edge_map, resize_lines),
    "segmentation": Cue(segmentation_map, resize_segments),
    "depth": Cue(None, resize_picture),
}
CUES = tuple(REGISTRY)


def compute_cues(
    image: Pixels, maps: Mapping[str, NDArray[np.float32]] | None = None, kept: Iterable[bool] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Compute the cue maps of an RGB image.

    Args:
        image: (H, W, 3).
        maps: precomputed maps by name, (1 or 3, H, W) in [-1, 1]. Depth is absent unless given here, since computing it
            needs a network.
        kept: which cues to use, in the order of `CUES`; None: all.

    Returns:
        The maps (len(CUES), 3, H, W) in [-1, 1], zeros where absent, and which of them are present (len(CUES),).
    """
    wanted = CUES if kept is None else [name for name, used in zip(CUES, kept, strict=True) if used]
    found = {name: values for name, values in (maps or {}).items() if name in wanted}
    for name in wanted:
        compute = REGISTRY[name].compute
        if name not in found and compute is not None:
            found[name] = compute(image)
    cues = np.zeros((len(CUES), 3, *image.shape[:2]), dtype=np.float32)
    for name, values in found.items():
        cues[CUES.index(name)] = values
    return cues, np.array([name in found for name in CUES])


def resize_cues(cues: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps of all cues, (B, len(CUES), 3, H, W) in [-1, 1] -> (B, len(CUES), 3, *size).

    Each is resized as its cue requires, in 8 bits like maps in files; unchanged if they already have that size.
    """
    if cues.shape[-2:] == size:
        return cues
    pairs = [(cue, values) for maps in cues for cue, values in zip(REGISTRY.values(), maps, strict=True)]
    pictures = [cue.resize(Image.fromarray(to_pixels(values)), size, None) for cue, values in pairs]
    resized = torch.cat([to_tensor(np.asarray(picture)) for picture in pictures])
    return resized.view(*cues.shape[:-2], *size).to(cues)


def check_cues(cues: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Raises `InputError` unless `cues` is an array of floats in [-1, 1], of this shape."""
    if not isinstance(cues, np.ndarray):
        found = type(cues).__name__
    elif cues.shape != shape or cues.dtype.kind != "f":
        found = f"{cues.dtype} of shape {cues.shape}"
    elif not (np.abs(cues) <= 1).all():  # also finds NaN
        found = f"values from {cues.min():.4g} to {cues.max():.4g}"
    else:
        return
    raise InputError(
        f"cues: found {found}; expected an array of floats in [-1, 1] of shape {shape}, the maps {', '.join(CUES)} at "
        "the image's size"
    )
