"""Splits an image, or a folder of images, into layers.

python tools/decompose.py adapter=... image=a.jpg mask=a.png out=layers/ [format=png,ora,psd steps=28 seed=0 device=cpu
    compile=true quantize=nf4 sample.KEY=... depth=FILE transformer=... autoencoder=... rgba_autoencoder=... prompt=...]
python tools/decompose.py adapter=... image=FOLDER mask=FOLDER out=FOLDER [batch_size=4 ...]

With folders, an image and the mask of the same name give out/<name>/; an interrupted command resumes where it stopped.
adapter= is a file or a published folder. format=ora also writes layers.ora (Krita, GIMP), format=psd layers.psd.
sample.KEY= overrides sampling, as in sample.max_side=2048; quantize= (int8, fp8, nf4) quantises the transformer. depth=
names Depth-Anything-V2-Small's weights, for adapters trained with depth maps; transformer= etc. replace frozen parts.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from layerdecomp.bulk import decompose_folder, pair_up
from layerdecomp.cli import device_name, out_folder, refuse_unknown, run_command, take, true_or_false, whole_number
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import RunError
from layerdecomp.imaging.layers import FORMATS, check_formats, read_pair
from layerdecomp.manifest import PARTS, REPOSITORY, parts_sha256
from layerdecomp.overrides import merge_config
from layerdecomp.sampling import SampleConfig
from layerdecomp.tensor_files import file_sha256, frozen_dtype
from layerdecomp.weights import load_depth

DEFAULTS = {"out": "layers", "format": "png", "seed": "0", "batch_size": "1", "device": "cpu", "compile": "false"}
ARGUMENTS = {"adapter": f"{REPOSITORY}/checkpoints/tiny/adapter.safetensors", "image": None, "mask": None, **DEFAULTS}
OPTIONAL = dict.fromkeys(("steps", "quantize", "depth", *PARTS), "")
STEPS = partial(tqdm, desc="sample", unit="step", leave=False, disable=None)  # a bar if stderr is a terminal


@dataclass
class Overrides:
    """The adapter's sampling settings that the command line may override."""

    sample: SampleConfig = field(default_factory=SampleConfig)


def main(arguments: list[str]) -> None:
    own, rest = take(arguments, **ARGUMENTS, **OPTIONAL)
    unknown = [argument for argument in rest if not argument.startswith("sample.")]
    refuse_unknown(unknown, [*ARGUMENTS, *OPTIONAL, "sample.*"])
    check_formats(formats := own["format"].split(","))
    seed, batch_size = whole_number(own, "seed"), whole_number(own, "batch_size")
    rest += [f"sample.steps={whole_number(own, 'steps')}"] if own["steps"] else []
    merge_config(Overrides(), [], rest)  # raises errors now, not after loading
    out = out_folder(own)
    folders = any(Path(own[key]).is_dir() for key in ("image", "mask"))
    pairs = pair_up(Path(own["image"]), Path(own["mask"]), out) if folders else []
    inputs = None if folders else read_pair(own["image"], own["mask"])
    device = device_name(own)
    compiled, quantize = true_or_false(own, "compile"), own["quantize"] or None
    depth = load_depth(own["depth"]) if own["depth"] else None
    files = {part: own[part] for part in PARTS if own[part]}
    decomposer = Decomposer.from_pretrained(own["adapter"], None, device, quantize, **files).merge()
    if compiled:
        decomposer.transformer.compile_blocks()
    decomposer.sample = merge_config(Overrides(decomposer.sample), [], rest).sample
    if inputs is not None:
        layers = decomposer.decompose(*inputs, seed=seed, depth=depth, progress=STEPS)
        print("wrote", ", ".join(name for one in formats for name in FORMATS[one]), "into", layers.save(out, formats))
        return
    settings = {"quantize": own["quantize"], "precision": str(frozen_dtype(device))}
    settings |= {**parts_sha256(own["adapter"], **files), "depth": own["depth"] and file_sha256(Path(own["depth"]))}
    failed = decompose_folder(
        decomposer, pairs, out, settings, formats=formats, seed=seed, depth=depth, batch_size=batch_size, progress=STEPS
    )
    if failed:
        raise RunError(f"{len(failed)} of {len(pairs)} images have no layers: {', '.join(failed)}")
    print(f"{len(pairs)} images split into {out}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
