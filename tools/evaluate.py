"""Compares an adapter with the frozen base and classical inpainting on held-out scenes.

python tools/evaluate.py adapter=runs/tiny/adapter.safetensors [out=folder device=cpu evaluate.samples=256 ...]
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from layerdecomp.cli import run_command, take
from layerdecomp.comparison import EvaluateConfig, compare
from layerdecomp.config import merge_config
from layerdecomp.data.datamodule import DataConfig, scene_data
from layerdecomp.decomposer import Decomposer, SampleConfig, describe_adapter
from layerdecomp.weights import load_mmdit


@dataclass
class EvaluationConfig:
    """What the command line may change; `sample` starts as the adapter has it."""

    sample: SampleConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    data: DataConfig = field(default_factory=DataConfig)


def main(arguments: list[str]) -> None:
    own, overrides = take(arguments, adapter="checkpoints/tiny/adapter.safetensors", out="", device="cpu")
    _, described = describe_adapter(own["adapter"])
    config = merge_config(EvaluationConfig(sample=described.sample), [], overrides)
    decomposer = Decomposer.from_pretrained(own["adapter"], device=own["device"])
    decomposer.sample = config.sample
    base = load_mmdit(described.weights.transformer, device=own["device"])
    data = scene_data(config.data, "test", config.evaluate.seed, config.evaluate.samples)
    compare(decomposer, base, data, config.evaluate, Path(own["out"] or Path(own["adapter"]).parent))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
