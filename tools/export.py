"""Writes an adapter, or a weighted sum of several, in another format; docs/weights.md says what loads where.

python tools/export.py adapter=... format=diffusers|kohya|merged|decomposer|adapter|import out=...
    [adapter=a.safetensors,b.safetensors weights=0.7,0.3] [rank=64] [dtype=float32|bfloat16|float16|fp8]
    [base=true] [figures=metrics.json] [transformer=... autoencoder=... rgba_autoencoder=... prompt=...]
"""

import sys

from layerdecomp.cli import refuse_unknown, run_command, take, true_or_false, whole_number
from layerdecomp.errors import InputError
from layerdecomp.export import export
from layerdecomp.manifest import PARTS


def main(arguments: list[str]) -> None:
    optional = {**dict.fromkeys(("dtype", "weights", "rank", "base", "figures", *PARTS), ""), "base": "false"}
    own, rest = take(arguments, adapter=None, format="adapter", out=None, **optional)
    refuse_unknown(rest, ("adapter", "format", "out", *optional))
    written = export(
        own["adapter"].split(","),
        own["format"],
        own["out"],
        dtype=own["dtype"] or None,
        weights=_numbers(own["weights"]) if own["weights"] else None,
        rank=whole_number(own, "rank") if own["rank"] else None,
        with_base=true_or_false(own, "base"),
        figures=own["figures"] or None,
        **{part: own[part] for part in PARTS if own[part]},
    )
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"weights={text}: expected comma-separated numbers") from error


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
