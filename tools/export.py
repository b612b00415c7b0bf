"""Re-saves an adapter: python tools/export.py adapter=runs/tiny/adapter.safetensors format=adapter|merged out=FILE"""

import sys

from layerdecomp.cli import run_command, take
from layerdecomp.errors import InputError
from layerdecomp.export import export


def main(arguments: list[str]) -> None:
    own, rest = take(arguments, adapter=None, format="adapter", out=None)
    if rest:
        raise InputError(f"unknown argument {rest[0]}; expected adapter= format= out=")
    for path in export(own["adapter"], own["format"], own["out"]):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
