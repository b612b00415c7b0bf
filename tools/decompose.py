"""Splits a picture.

python tools/decompose.py adapter=... image=a.jpg mask=a.png out=layers/ [steps=28 seed=0 device=cpu depth=WEIGHTS]

depth= names Depth-Anything-V2-Small's weights, for adapters that were trained with depth maps.
"""

import sys

from layerdecomp.cli import device_name, frozen_dtype, run_command, take, whole_number
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError
from layerdecomp.weights import load_depth


def main(arguments: list[str]) -> None:
    own, rest = take(
        arguments,
        adapter="checkpoints/tiny/adapter.safetensors",
        image=None,
        mask=None,
        out="layers",
        steps="",
        seed="0",
        device="cpu",
        depth="",
    )
    if rest:
        raise InputError(f"unknown argument {rest[0]}; expected adapter= image= mask= out= steps= seed= device= depth=")
    seed, steps = whole_number(own, "seed"), whole_number(own, "steps") if own["steps"] else None
    device = device_name(own)
    decomposer = Decomposer.from_pretrained(own["adapter"], dtype=frozen_dtype(device), device=device)
    depth = load_depth(own["depth"]) if own["depth"] else None
    layers = decomposer.decompose(own["image"], own["mask"], steps=steps, seed=seed, depth=depth)
    print(f"wrote background.png, foreground.png and preview.png into {layers.save(own['out'])}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
