"""Splits a picture.

python tools/decompose.py adapter=... image=a.jpg mask=a.png out=layers/ [format=png,ora,psd steps=28 seed=0 device=cpu
    compile=true depth=WEIGHTS transformer=... autoencoder=... rgba_autoencoder=... prompt=...]

adapter= is a file or a published folder. format=ora also writes layers.ora (Krita, GIMP), format=psd layers.psd. depth=
names Depth-Anything-V2-Small's weights, for adapters that were trained with depth maps; transformer= and so on other
places for the frozen parts.
"""

import sys

from layerdecomp.cli import device_name, frozen_dtype, run_command, take, truth, whole_number
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import FORMATS, check_formats
from layerdecomp.weights import load_depth

PARTS = ("transformer", "autoencoder", "rgba_autoencoder", "prompt")


def main(arguments: list[str]) -> None:
    own, rest = take(
        arguments,
        adapter="checkpoints/tiny/adapter.safetensors",
        image=None,
        mask=None,
        out="layers",
        format="png",
        steps="",
        seed="0",
        device="cpu",
        compile="false",
        depth="",
        **dict.fromkeys(PARTS, ""),
    )
    if rest:
        known = ("adapter", "image", "mask", "out", "format", "steps", "seed", "device", "compile", "depth", *PARTS)
        raise InputError(f"unknown argument {rest[0]}; expected {' '.join(f'{key}=' for key in known)}")
    check_formats(formats := own["format"].split(","))
    seed, steps = whole_number(own, "seed"), whole_number(own, "steps") if own["steps"] else None
    device, compiled = device_name(own), truth(own, "compile")
    files = {part: own[part] for part in PARTS if own[part]}
    decomposer = Decomposer.from_pretrained(own["adapter"], dtype=frozen_dtype(device), device=device, **files)
    if compiled:
        decomposer.transformer.compile_blocks()
    depth = load_depth(own["depth"]) if own["depth"] else None
    layers = decomposer.merge().decompose(own["image"], own["mask"], steps=steps, seed=seed, depth=depth)
    names = [name for format in formats for name in FORMATS[format]]
    print(f"wrote {', '.join(names)} into {layers.save(own['out'], formats)}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
