"""Counts what training and sampling cost, and measures it with random weights.

python tools/benchmark.py [device=cpu dtype=bfloat16 size=1024 scale=1 recompute=0 measure=true lora.rank=256 ...]
"""

import sys

from layerdecomp.benchmark import DTYPES, BenchmarkConfig, benchmark
from layerdecomp.cli import device_name, run_command, take
from layerdecomp.config import merge_config
from layerdecomp.errors import InputError


def main(arguments: list[str]) -> None:
    own, settings = take(arguments, device="cpu", dtype="bfloat16")
    if own["dtype"] not in DTYPES:
        raise InputError(f"dtype={own['dtype']}: expected one of {', '.join(DTYPES)}")
    print(benchmark(merge_config(BenchmarkConfig(), [], settings), device_name(own), DTYPES[own["dtype"]]))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
