"""Trains every row of an ablation with several seeds, or resumes it, and compares them.

python tools/ablate.py [config=configs/ablation.yaml out=runs/ablation train.steps=50 evaluate.samples=8 ...]
"""

import sys
from pathlib import Path

from layerdecomp.ablation import ablate
from layerdecomp.cli import run_command, take


def main(arguments: list[str]) -> None:
    own, overrides = take(arguments, config="configs/ablation.yaml", out="")
    config = Path(own["config"])
    ablate(config, Path(own["out"] or f"runs/{config.stem}"), overrides)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
