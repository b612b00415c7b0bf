"""Counts what training and sampling cost, and measures it with random weights.

python tools/benchmark.py [device=cpu dtype=bfloat16 size=1024 scale=1 recompute=0 measure=true lora.rank=256 ...]
"""

import sys

from layerdecomp.benchmark import BenchmarkConfig, benchmark
from layerdecomp.cli import device_name, named_dtype, run_command, take
from layerdecomp.config import merge_config


def main(arguments: list[str]) -> None:
    own, settings = take(arguments, device="cpu", dtype="bfloat16")
    print(benchmark(merge_config(BenchmarkConfig(), [], settings), device_name(own), named_dtype(own)))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
