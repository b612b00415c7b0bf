"""Compares an adapter with the frozen base and classical inpainting on held-out scenes.

python tools/evaluate.py adapter=runs/tiny/adapter.safetensors [out=runs/evaluate device=cpu evaluate.samples=256 ...]
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from layerdecomp.cli import device_name, frozen_dtype, run_command, take
from layerdecomp.comparison import EvaluateConfig, compare
from layerdecomp.config import merge_config
from layerdecomp.data.datamodule import DataConfig, open_samples
from layerdecomp.decomposer import SampleConfig, build_decomposer, describe_adapter
from layerdecomp.weights import config_from, load_mmdit


@dataclass
class EvaluationConfig:
    """What the command line may change; `sample` and `data` start as the adapter has them."""

    sample: SampleConfig
    data: DataConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def main(arguments: list[str]) -> None:
    own, overrides = take(arguments, adapter="checkpoints/tiny/adapter.safetensors", out="runs/evaluate", device="cpu")
    adapter, described = describe_adapter(own["adapter"])
    trained_on = config_from(DataConfig, adapter.metadata.get("data"), own["adapter"])
    config = merge_config(EvaluationConfig(described.sample, trained_on), [], overrides)
    device = device_name(own)
    dtype = frozen_dtype(device)
    described.sample = config.sample
    decomposer = build_decomposer(described, dtype, device)
    decomposer.load_adapter(adapter, own["adapter"])
    base = load_mmdit(described.weights.transformer, dtype=dtype, device=device)
    data = open_samples(config.data, "test", config.evaluate.seed, config.evaluate.samples)
    compare(decomposer, base, data, config.evaluate, Path(own["out"]))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
