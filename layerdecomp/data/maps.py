"""Precomputes the cue maps of an index, and writes them where training looks for them (`loading.map_path`)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from layerdecomp.data.folders import part_path
from layerdecomp.data.index import Index, Item
from layerdecomp.data.loading import WITH_MAPS, layer_paths, map_path
from layerdecomp.data.mulan import read_layers, recompose
from layerdecomp.data.prepare import parallel
from layerdecomp.errors import InputError
from layerdecomp.imaging.cues import REGISTRY
from layerdecomp.imaging.geometry import to_pixels, to_tensor
from layerdecomp.imaging.layers import Pixels, open_picture, read_image, write_picture
from layerdecomp.models.depth import DepthEstimator
from layerdecomp.weights import load_depth

DEPTH_FILE = Path("checkpoints/depth-anything-v2-small/model.safetensors")


def write_maps(index: Index, cues: Sequence[str], depth_file: Path = DEPTH_FILE, workers: int = 1) -> list[str]:
    """Computes the given cues for every item and writes each map as a PNG file of the picture's size.

    Existing maps are kept, so that the user's own take precedence and an interrupted run resumes.

    Args:
        cues: some of `REGISTRY`.
        depth_file: weights of Depth-Anything-V2-Small, needed for depth.

    Returns:
        A line per unreadable item.

    Raises:
        InputError: a cue is unknown, the index is not of layered pictures or triplets, the weights are missing or do
            not fit, or a map cannot be written.
    """
    if unknown := [cue for cue in cues if cue not in REGISTRY]:
        raise InputError(f"cues: found {unknown[0]!r}, expected some of {', '.join(REGISTRY)}")
    if external := [cue for cue in cues if REGISTRY[cue].compute is None and cue != "depth"]:
        raise InputError(f"cues: {external[0]} is not computed here; put its maps into {index.root / external[0]}")
    if index.kind not in WITH_MAPS:
        raise InputError(
            f"{index.path} is an index of {index.kind}; expected {' or '.join(WITH_MAPS)}: the image of a "
            "pasted cut-out is only composited during training"
        )
    estimator = open_estimator(depth_file) if "depth" in cues else None
    rows = [row for row, item in enumerate(index) if _missing(index, item, cues)]
    results = parallel(partial(_write_item, index, cues, estimator), rows, workers, chunk=1)
    progress = tqdm(results, total=len(index), initial=len(index) - len(rows), desc=index.path.name, unit="item")
    return [fault for fault in progress if fault is not None]


def open_estimator(path: Path) -> DepthEstimator:
    """Loads Depth-Anything-V2-Small; `InputError` names the file to download if it is missing."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; put model.safetensors of depth-anything/Depth-Anything-V2-Small-hf (99.2 MB, "
            "Apache-2.0) there, or set depth=FILE"
        )
    return load_depth(path)


def _missing(index: Index, item: Item, cues: Sequence[str]) -> list[str]:
    return [cue for cue in cues if not map_path(index.root, item, cue).is_file()]


def _write_item(index: Index, cues: Sequence[str], estimator: DepthEstimator | None, row: int) -> str | None:
    item = index[row]
    try:
        pixels = _read_picture(index, item)
    except InputError as error:
        return f"{item.id}: {error}"
    for cue in _missing(index, item, cues):
        _save(_compute(cue, pixels, estimator), map_path(index.root, item, cue))
    return None


def _read_picture(index: Index, item: Item) -> Pixels:
    """The image (H, W, 3) of an item."""
    if index.kind == "layered":
        return recompose(read_layers(layer_paths(index.root, item)))
    return read_image(open_picture(part_path(index.root, item, "image")))


def _compute(cue: str, pixels: Pixels, estimator: DepthEstimator | None) -> Tensor:
    """(1 or 3, H, W) in [-1, 1]."""
    if cue == "depth":
        assert estimator is not None
        return estimator.estimate(to_tensor(pixels))[0]
    compute = REGISTRY[cue].compute
    assert compute is not None, f"the cue {cue} has no function that computes it"
    return torch.from_numpy(compute(pixels))


def _save(values: Tensor, path: Path) -> None:
    levels = to_pixels(values)
    write_picture(path, levels[..., 0] if levels.shape[2] == 1 else levels)
