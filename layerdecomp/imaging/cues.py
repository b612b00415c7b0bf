"""Cue maps (edges, segmentation, depth) of the whole image, which context fusion condenses into a few tokens."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2gray
from skimage.feature import canny
from skimage.segmentation import felzenszwalb

SEGMENTED_SIDE = 384  # pixels
CUES = ("edge", "segmentation", "depth")


def compute_cues(
    image: NDArray[np.uint8], maps: Mapping[str, NDArray[np.float32]] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Compute the cue maps of an RGB image.

    Args:
        image: (H, W, 3).
        maps: precomputed maps by name, (1 or 3, H, W) in [-1, 1]. Depth is absent unless given here, since computing it
            needs a network.

    Returns:
        The maps (len(CUES), 3, H, W) in [-1, 1], zeros where absent, and which of them are present (len(CUES),).
    """
    found = dict(maps or {})
    for cue, compute in (("edge", edge_map), ("segmentation", segmentation_map)):
        if cue not in found:
            found[cue] = compute(image)
    cues = np.zeros((len(CUES), 3, *image.shape[:2]), dtype=np.float32)
    for cue, values in found.items():
        cues[CUES.index(cue)] = values
    return cues, np.array([cue in found for cue in CUES])


def edge_map(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Canny edges (1, H, W) of an RGB image (H, W, 3): 1 on an edge, -1 elsewhere."""
    return np.where(canny(rgb2gray(image), sigma=1.0), 1, -1).astype(np.float32)[None]


def segmentation_map(image: NDArray[np.uint8]) -> NDArray[np.float32]:
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
