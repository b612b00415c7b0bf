"""Compares an adapter, its frozen base, classical methods and other methods' layers under one protocol.

python tools/evaluate.py [adapter=FILE predictions=FOLDER,FOLDER data=FOLDER config=FILE out=FOLDER device=cpu ...]
python tools/evaluate.py export=FOLDER [the same settings]    # inputs and ground truth as files, for other methods

data= names a folder of triplets; without it, samples are drawn as in the adapter's (last) training. fill= names a
Markdown file with a table of published figures, to which ours are added (docs/evaluation.md). quantize= (int8, fp8,
nf4) quantises the frozen transformer.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from layerdecomp.cli import device_name, run_command, take
from layerdecomp.comparison import WITH_MODEL, EvaluateConfig, TestData, compare, export_test_set, load_models
from layerdecomp.data.datamodule import DataConfig, open_samples, recorded_data
from layerdecomp.data.testset import TestFolder
from layerdecomp.errors import InputError
from layerdecomp.evaluation import Share
from layerdecomp.manifest import REPOSITORY, open_adapter
from layerdecomp.overrides import merge_config, read_yaml
from layerdecomp.sampling import SampleConfig
from layerdecomp.tables import check_fill, fill, format_published

PATHS = dict.fromkeys(("adapter", "predictions", "data", "config", "export", "fill"), "")
SHIPPED = f"{REPOSITORY}/checkpoints/tiny/adapter.safetensors"
PUBLISHED = "published"  # name of the markers around the table that fill= replaces


@dataclass
class EvaluationConfig:
    """What a config and the command line may override; `sample` and `data` default to the adapter's."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def main(arguments: list[str]) -> None:
    own, overrides = take(arguments, **PATHS, out="runs/evaluate", device="cpu", quantize="")
    path = own["adapter"] or ("" if own["predictions"] or own["export"] else SHIPPED)
    defaults, fused = EvaluationConfig(), False
    if path:
        adapter, described = open_adapter(path)
        defaults = EvaluationConfig(described.sample, recorded_data(adapter.metadata, path))
        fused = described.fusion.enabled
    files = [(own["config"], read_yaml(Path(own["config"])))] if own["config"] else []
    config = merge_config(defaults, files, overrides)
    if own["export"]:
        print(f"{export_test_set(config.data, config.evaluate, Path(own['export']))} samples in {own['export']}")
        return
    if config.evaluate.objects != "drawn" and not own["data"]:
        raise InputError("evaluate.objects is for making a test set: export=FOLDER first, then evaluate data=FOLDER")
    if own["fill"]:
        check_fill(Path(own["fill"]), PUBLISHED, config.evaluate.published)  # now, not after measuring
    share = Share.join()
    if own["device"] == "cuda" and share.world_size > 1:
        own["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    device, models = device_name(own), None
    if path:
        described.sample = config.sample
        models = load_models(adapter, path, described, device, own["quantize"] or None)
    else:
        config.evaluate.rows = [row for row in config.evaluate.rows if row not in WITH_MODEL]
    settings = config.evaluate
    if own["data"]:
        data: TestData = TestFolder(own["data"], fused, config.sample.max_side)
    else:
        data = open_samples(config.data, "test", settings.seed, settings.samples, fused)
    predictions = [Path(folder) for folder in own["predictions"].split(",") if folder]
    evaluation = compare(models, data, settings, Path(own["out"]), predictions=predictions, device=device, share=share)
    if own["fill"] and evaluation is not None:
        fill(Path(own["fill"]), PUBLISHED, format_published(evaluation.results, settings.published))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
