"""What a dry run reports about missing files and models; test_train.py runs the command itself."""

from pathlib import Path

import pytest

from layerdecomp.config import load_config
from layerdecomp.dry_run import dry_run, memory_rows, missing_files, training_work
from layerdecomp.errors import InputError
from layerdecomp.memory import Memory
from layerdecomp.models.autoencoder import AutoencoderConfig
from layerdecomp.models.mmdit import MMDiTConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_missing_files_are_listed_with_their_origin(tmp_path: Path) -> None:
    triplets = ["data.source=triplets", f"data.triplets.folders=[{tmp_path}/mine.safetensors]"]
    config = load_config(CONFIGS / "flux_fill.yaml", [f"adapter={tmp_path}/adapter.safetensors", *triplets])
    for name, path in vars(config.weights).items():
        setattr(config.weights, name, str(tmp_path / Path(path).name))
    lines = missing_files(config)
    assert len(lines) == 6 and all(line.startswith(f"missing: {tmp_path}") for line in lines)
    assert lines[0].endswith("transformer); checkpoints/README.md says where to get it")
    assert "made by tools/train.py config=configs/flux_rgba_autoencoder.yaml" in lines[2]
    assert lines[3].endswith("(weights.prompt); made by make embed-prompt")
    assert "adapter.safetensors (adapter); written by a run" in lines[4]
    assert lines[5].endswith("mine.safetensors (data.triplets); an index, written by tools/prepare_data.py")


def test_a_dry_run_rejects_frozen_models_in_float32() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["train.precision=32-true"])
    with pytest.raises(InputError, match=r"found train.precision=32-true, expected auto or bf16-mixed"):
        dry_run(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.targets=[img_in]", r"lora.targets \['img_in'\] match img_in, which is trained in full"),
        ("fusion.cues=[edges]", "fusion.cues names 'edges'; expected some of edge"),
        ("fusion.num_heads=5", "fusion.num_heads = 5: expected a divisor of the transformer's width, 3072"),
        ("fusion.in_channels=32", "fusion.in_channels is 32; expected 64"),
    ],
)
def test_a_dry_run_rejects_settings_that_a_run_rejects(change: str, message: str) -> None:
    config = load_config(CONFIGS / "flux_fill.yaml", [change])
    with pytest.raises(InputError, match=message):
        dry_run(config)


def test_the_total_counts_the_moving_average_and_the_larger_of_step_and_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(frozen=4e9, trained=2e9, gradients=2e9, optimizer=4e9, step=3e9, encode=5e9)
    monkeypatch.setattr("layerdecomp.dry_run.training_memory", lambda work: memory)
    for ema, average, total in (("0", "0.0", "17.0"), ("0.9", "2.0", "19.0")):
        config = load_config(CONFIGS / "tiny.yaml", [f"train.ema={ema}"])
        rows = {row[0]: row[1] for row in memory_rows(training_work(config), config)}
        assert (rows["moving average"], rows["total"]) == (average, total)


def test_gradients_count_twice_while_several_devices_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(frozen=4e9, trained=2e9, gradients=2e9, optimizer=4e9, step=3e9, encode=5e9)
    monkeypatch.setattr("layerdecomp.dry_run.training_memory", lambda work: memory)
    for devices, accumulate, expected in ((1, 2, ("2.0", "17.0")), (2, 1, ("2.0", "17.0")), (2, 2, ("4.0", "19.0"))):
        config = load_config(CONFIGS / "tiny.yaml", [f"train.devices={devices}", f"train.accumulate={accumulate}"])
        rows = {row[0]: row[1] for row in memory_rows(training_work(config), config)}
        assert (rows["gradients"], rows["total"]) == expected


def test_models_are_described_by_their_files_or_else_the_published_ones(tiny_weights: Path) -> None:
    config = load_config(CONFIGS / "flux_fill_24gb.yaml")
    config.weights.transformer = config.weights.autoencoder = "nowhere.safetensors"
    work = training_work(config)
    assert (work.model, work.rgb, work.text_tokens) == (MMDiTConfig(), AutoencoderConfig(), 512)
    assert work.size == config.data.scenes.size
    assert (work.quantize, work.bits, work.recompute, work.encode_batch_size) == ("nf4", 8, 1, 1)
    assert (
        work.recompute_attention and not training_work(load_config(CONFIGS / "flux_fill_80gb.yaml")).recompute_attention
    )
    config.quantize, config.shard_base, config.train.nodes = None, True, 2
    config.data.source, config.data.triplets.size = "triplets", 512
    assert (training_work(config).shards, training_work(config).size) == (16, 512)
    config.weights.transformer = str(tiny_weights / "transformer.safetensors")
    config.weights.autoencoder = str(tiny_weights / "autoencoder.safetensors")
    config.weights.prompt = None
    work = training_work(config)
    assert (work.model.hidden_size, work.rgb.ch, work.text_tokens) == (32, 8, 1)
