"""Benchmark of triplet generation: throughput, and time per stage."""

import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from layerdecomp.data import blending, layerdiffuse, loading
from layerdecomp.data.folders import BackgroundFolder
from layerdecomp.data.index import Index, Reader
from layerdecomp.data.layerdiffuse import ForegroundFolder
from layerdecomp.data.mulan import MulanLayers
from layerdecomp.data.prepare import prepare
from layerdecomp.data.shapes import whole_shape
from layerdecomp.data.textures import photograph_crop
from layerdecomp.data.triplets import TripletConfig, Triplets, stack
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.cues import edge_map, segmentation_map
from layerdecomp.imaging.geometry import resize_picture
from layerdecomp.imaging.layers import open_picture
from layerdecomp.imaging.masks import imperfect_mask

# The stages in the table. A stage's time is the cumulative time of its functions.
STAGES: dict[str, tuple[Callable[..., Any], ...]] = {
    "decode": (open_picture, loading.open_shrunk),
    "resize": (resize_picture,),
    "composite": (over, stack),
    "pad colours": (layerdiffuse.pad_colours,),
    "blend": (blending.match_light, blending.soften, blending.draw_grain, blending.through_jpeg),
    "mask": (imperfect_mask,),
    "cue edges": (edge_map,),
    "cue segments": (segmentation_map,),
}


def benchmark(config: TripletConfig, count: int) -> None:
    """Generates `count` triplets in this process, on one thread like a worker, and prints the throughput and stages.

    If the config names no indexes, it generates its own data sets in a temporary folder. `InputError` for a count
    below 1.
    """
    if count < 1:
        raise InputError(f"count is {count}; expected at least 1 triplet to time")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not (config.layered or config.foregrounds or config.folders):
            config.layered, config.foregrounds, config.backgrounds = make_data(Path(folder))
        data = Triplets(config, "train", 0, count + 1)
        data[0]  # warm-up: opens the files that stay open
        start, profile = time.perf_counter(), cProfile.Profile()
        for index in range(1, len(data)):
            profile.runcall(data.__getitem__, index)
        report(profile, count, time.perf_counter() - start, config.size)
    torch.set_num_threads(threads)


def make_data(folder: Path) -> list[list[str]]:
    """Indexes of four-layer pictures (1024 x 1024, with depth maps), of cut-outs (1024) and of JPEGs (1536).

    All contain sensor noise, without which the files would be smaller than those of real photographs.
    """
    rng = np.random.default_rng(0)
    readers: tuple[Reader, ...] = (
        MulanLayers(folder / "layers"),
        ForegroundFolder(folder / "cutouts"),
        BackgroundFolder(folder / "backgrounds"),
    )
    for reader in readers:
        reader.root.mkdir()
    for i in range(6):
        _photograph(rng, 1536).save(folder / "backgrounds" / f"{i}.jpg", quality=92)
        _cut_out(rng, 0.3).save(folder / "cutouts" / f"{i}.png")
        _photograph(rng, 1024).convert("RGBA").save(folder / "layers" / f"{i}-layer_0.png")
        for k in (1, 2, 3):
            _cut_out(rng, 0.15).save(folder / "layers" / f"{i}-layer_{k}.png")
    names = [str(folder / f"{reader.kind}.safetensors") for reader in readers]
    for reader, name in zip(readers, names, strict=True):
        prepare(reader, Path(name), test_share=0)
    for item in Index(names[0]):
        path = loading.map_path(folder / "layers", item, "depth")
        path.parent.mkdir(exist_ok=True)
        _photograph(rng, 1024).convert("L").save(path)
    return [[name] for name in names]


def _photograph(rng: np.random.Generator, size: int) -> Image.Image:
    levels = photograph_crop(rng, size, "train") * 255 + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _cut_out(rng: np.random.Generator, area: float) -> Image.Image:
    """RGBA, 1024 x 1024: a shape that covers a fraction `area`, black where alpha is 0."""
    alpha = Image.fromarray((whole_shape(rng, 1024, "train", area) * 255).astype(np.uint8))
    picture = Image.new("RGBA", (1024, 1024))
    picture.paste(_photograph(rng, 1024), mask=alpha.point(lambda level: 255 * (level > 0)))
    picture.putalpha(alpha)
    return picture


def report(profile: cProfile.Profile, count: int, seconds: float, size: int) -> None:
    """Prints the throughput and the milliseconds of each stage."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    print(f"{count / seconds:.2f} triplets/s per worker at {size} x {size}, {1000 * seconds / count:.0f} ms each:")
    rest = seconds
    for stage, functions in STAGES.items():
        codes = [function.__code__ for function in functions]
        keys = [(code.co_filename, code.co_firstlineno, code.co_name) for code in codes]
        spent = sum(stats[key][3] for key in keys if key in stats)
        rest -= spent
        print(f"  {stage:12} {1000 * spent / count:6.0f} ms {spent / seconds:6.0%}")
    print(f"  {'the rest':12} {1000 * rest / count:6.0f} ms {rest / seconds:6.0%}")
