"""Indexes a data set that has been downloaded, or checks indexes. docs/data.md lists the sources and their settings.

python tools/prepare_data.py source=openimages root=FOLDER out=data/openimages.safetensors [workers=8 test_share=0.02]
python tools/prepare_data.py check=data/openimages.safetensors,data/mulan.safetensors [workers=8]
"""

import os
import sys
from pathlib import Path
from typing import Any

from layerdecomp.cli import run_command, take, whole_number
from layerdecomp.config import merge_config
from layerdecomp.data.check import check_indexes
from layerdecomp.data.folders import BackgroundFolder, RoremFolder, TripletFolder
from layerdecomp.data.index import TEST_SHARE, Reader
from layerdecomp.data.layerdiffuse import ForegroundFolder
from layerdecomp.data.mulan import MulanAnnotations, MulanLayers
from layerdecomp.data.openimages import OpenImages
from layerdecomp.data.prepare import prepare
from layerdecomp.errors import InputError

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
    defaults = {"workers": str(os.cpu_count()), "test_share": str(TEST_SHARE)}
    own, settings = take(arguments, check="", source="", out="", **defaults)
    workers = whole_number(own, "workers")
    if own["check"]:
        if settings:
            raise InputError(f"unknown argument {settings[0]}; expected check= and workers=")
        if check_indexes([Path(path) for path in own["check"].split(",")], workers):
            sys.exit(1)
        return
    if own["source"] not in READERS or not own["out"]:
        raise InputError(f"expected check=FILES, or out=FILE and source= one of {', '.join(READERS)}")
    reader: Reader = merge_config(READERS[own["source"]], [], settings)
    prepare(reader, Path(own["out"]), workers, _share(own["test_share"]))


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
