"""How fast triplets are made, and where the time goes."""

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

from layerdecomp.data import blending, layerdiffuse
from layerdecomp.data.folders import BackgroundFolder, open_picture
from layerdecomp.data.index import Reader
from layerdecomp.data.layerdiffuse import ForegroundFolder
from layerdecomp.data.prepare import prepare
from layerdecomp.data.shapes import whole_shape
from layerdecomp.data.textures import photograph_crop
from layerdecomp.data.triplets import TripletConfig, Triplets
from layerdecomp.imaging.cues import compute_cues
from layerdecomp.imaging.masks import imperfect_mask

# What the table tells apart. A stage's time is that of its functions with all that they call.
STAGES: dict[str, tuple[Callable[..., Any], ...]] = {
    "decode": (open_picture, Image.Image.load, Image.Image.draft),
    "resize": (Image.Image.resize,),
    "pad colours": (layerdiffuse.pad_colours,),
    "blend": (blending.match_light, blending.soften, blending.draw_grain, blending.through_jpeg),
    "mask": (imperfect_mask,),
    "cues": (compute_cues,),
}


def benchmark(config: TripletConfig, count: int) -> None:
    """Makes `count` triplets in this process, on one thread as a worker does, and prints the rate and the stages.

    Without indexes, of a data set of its own in a temporary folder.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not (config.layered or config.foregrounds or config.folders):
            config.foregrounds, config.backgrounds = make_data(Path(folder))
        data = Triplets(config, "train", 0, count + 1)
        data[0]  # opens what stays open
        start, profile = time.perf_counter(), cProfile.Profile()
        for index in range(1, len(data)):
            profile.runcall(data.__getitem__, index)
        report(profile, count, time.perf_counter() - start, config.size)
    torch.set_num_threads(threads)


def make_data(folder: Path) -> tuple[list[str], list[str]]:
    """Indexes of six cut-outs of 1024 x 1024 and six JPEGs of 1536 x 1536."""
    rng = np.random.default_rng(0)
    for name in ("cutouts", "backgrounds"):
        (folder / name).mkdir()
    for i in range(6):
        background, colours = (photograph_crop(rng, size, "train") * 255 for size in (1536, 1024))
        alpha = whole_shape(rng, 1024, "train", 0.3) * 255
        Image.fromarray(background.astype(np.uint8)).save(folder / "backgrounds" / f"{i}.jpg", quality=92)
        rgba = np.dstack([colours, alpha]).astype(np.uint8)
        Image.fromarray(rgba).save(folder / "cutouts" / f"{i}.png")
    readers: tuple[Reader, ...] = (ForegroundFolder(folder / "cutouts"), BackgroundFolder(folder / "backgrounds"))
    names = [str(folder / f"{reader.kind}.safetensors") for reader in readers]
    for reader, name in zip(readers, names, strict=True):
        prepare(reader, Path(name), test_share=0)
    return names[:1], names[1:]


def report(profile: cProfile.Profile, count: int, seconds: float, size: int) -> None:
    """Prints the rate and the milliseconds of each stage."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    print(f"{count / seconds:.2f} triplets/s per worker at {size} x {size}, {1000 * seconds / count:.0f} ms each:")
    rest = seconds
    for stage, functions in STAGES.items():
        codes = [function.__code__ for function in functions]
        keys = [(code.co_filename, code.co_firstlineno, code.co_name) for code in codes]
        spent = sum(stats[key][3] for key in keys if key in stats)
        rest -= spent
        print(f"  {stage:12} {1000 * spent / count:6.0f} ms {spent / seconds:6.0%}")
    print(f"  {'the rest':12} {1000 * rest / count:6.0f} ms {rest / seconds:6.0%}  (compositing, placing)")
