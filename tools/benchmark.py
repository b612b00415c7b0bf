"""Counts what training and sampling cost, and measures it with random weights; or compares with diffusers.

python tools/benchmark.py [device=cpu dtype=bfloat16 size=1024 scale=1 recompute=0 measure=true lora.rank=256 ...]
python tools/benchmark.py reference=diffusers [compile=true ...]
"""

import sys

from layerdecomp.benchmark import BenchmarkConfig, benchmark
from layerdecomp.cli import device_name, named_dtype, run_command, take
from layerdecomp.overrides import merge_config
from layerdecomp.reference import compare


def main(arguments: list[str]) -> None:
    own, settings = take(arguments, device="cpu", dtype="bfloat16")
    config = merge_config(BenchmarkConfig(), [], settings)
    run = benchmark if config.reference is None else compare
    print(run(config, device_name(own), named_dtype(own)))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
