"""Embeds one prompt with FLUX's text encoders, once, for `weights.prompt`; needs the `text` extra.

python tools/embed_prompt.py [root=checkpoints/flux1-fill-dev out=ROOT/prompt.safetensors prompt= tokens=512
    dtype=bfloat16 device=cpu]
"""

import sys
from pathlib import Path

from layerdecomp.cli import device_name, named_dtype, refuse_unknown, run_command, take, whole_number
from layerdecomp.errors import InputError
from layerdecomp.text import embed_prompt, save_prompt


def main(arguments: list[str]) -> None:
    defaults = {"root": "checkpoints/flux1-fill-dev", "out": "", "prompt": "", "tokens": "512", "dtype": "bfloat16"}
    own, rest = take(arguments, **defaults, device="cpu")
    refuse_unknown(rest, own)
    dtype, tokens = named_dtype(own), whole_number(own, "tokens")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: expected at least 1")
    root = Path(own["root"])
    out = Path(own["out"] or root / "prompt.safetensors")
    embedding = embed_prompt(root, own["prompt"], tokens, dtype, device_name(own))
    save_prompt(out, embedding, own["prompt"], root)
    print(f"wrote {out}; training takes it as weights.prompt={out}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
