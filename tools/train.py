"""Trains what a config describes: python tools/train.py config=configs/tiny.yaml [key=value ...]"""

import sys

from layerdecomp.cli import run_command, take
from layerdecomp.config import load_config
from layerdecomp.training.runs import train


def main(arguments: list[str]) -> None:
    named, overrides = take(arguments, config="configs/tiny.yaml")
    train(load_config(named["config"], overrides))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
