"""Measures how fast triplets are made and where the time goes, on a generated data set unless indexes are given.

python tools/benchmark_data.py [count=20 size=1024 layered=[data/mulan.safetensors] ...]
"""

import sys

from layerdecomp.cli import run_command, take, whole_number
from layerdecomp.data.benchmark import benchmark
from layerdecomp.data.triplets import TripletConfig
from layerdecomp.overrides import merge_config


def main(arguments: list[str]) -> None:
    own, settings = take(arguments, count="20")
    benchmark(merge_config(TripletConfig(), [], settings), whole_number(own, "count"))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
