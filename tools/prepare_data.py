"""Indexes a downloaded data set, checks indexes, or makes their cue maps. docs/data.md lists the settings.

python tools/prepare_data.py source=openimages root=FOLDER out=data/openimages.safetensors [workers=8 test_share=0.02]
python tools/prepare_data.py check=data/openimages.safetensors,data/mulan.safetensors [workers=8]
python tools/prepare_data.py maps=data/mulan.safetensors [cues=depth,segmentation depth=WEIGHTS workers=8]
"""

import os
import sys
from pathlib import Path
from typing import Any

from layerdecomp.cli import run_command, take, whole_number
from layerdecomp.data.check import check_indexes
from layerdecomp.data.folders import BackgroundFolder, RoremFolder, TripletFolder
from layerdecomp.data.index import TEST_SHARE, Index, Reader
from layerdecomp.data.layerdiffuse import ForegroundFolder
from layerdecomp.data.maps import DEPTH_FILE, write_maps
from layerdecomp.data.mulan import MulanAnnotations, MulanLayers
from layerdecomp.data.openimages import OpenImages
from layerdecomp.data.prepare import prepare, print_some
from layerdecomp.errors import InputError
from layerdecomp.overrides import merge_config

READERS: dict[str, Any] = {
    "mulan": MulanLayers,
    "mulan-annotations": MulanAnnotations,
    "layerdiffuse": ForegroundFolder,
    "openimages": OpenImages,
    "backgrounds": BackgroundFolder,
    "triplets": TripletFolder,
    "rorem": RoremFolder,
}


def main(arguments: list[str]) -> None:
    defaults = {"workers": str(os.cpu_count()), "test_share": str(TEST_SHARE), "depth": str(DEPTH_FILE)}
    own, settings = take(arguments, check="", maps="", cues="depth", source="", out="", **defaults)
    workers = whole_number(own, "workers")
    if own["check"] or own["maps"]:
        if settings:
            raise InputError(f"unknown argument {settings[0]}; expected check= or maps=, cues=, depth= and workers=")
        if check_indexes(_paths(own["check"]), workers) if own["check"] else _write_maps(own, workers):
            sys.exit(1)
        return
    if (source := own["source"]) not in READERS:
        wrong = f"source={source}: expected" if source else "expected check=FILES, maps=FILES, or out=FILE and source="
        raise InputError(f"{wrong} one of {', '.join(READERS)}")
    if not own["out"]:
        raise InputError("out= is missing; expected out=FILE, the index to write")
    reader: Reader = merge_config(READERS[source], [], settings)
    prepare(reader, Path(own["out"]), workers, _share(own["test_share"]))


def _write_maps(own: dict[str, str], workers: int) -> list[str]:
    indexes, cues, faults = [Index(path) for path in _paths(own["maps"])], own["cues"].split(","), []
    for index in indexes:
        faults += (found := write_maps(index, cues, Path(own["depth"]), workers))
        print(f"{index.path}: {len(index) - len(found)} items with maps of {', '.join(cues)}, {len(found)} faulty")
    print_some(faults, f"{len(faults)} in all")
    return faults


def _paths(names: str) -> list[Path]:
    return [Path(name) for name in names.split(",")]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"test_share={text}; expected a number from 0 to 1")
    return share


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
