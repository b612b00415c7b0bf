"""The moving average of the trained tensors: its values, where it replaces them, and resuming with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PowerCutError, fill, power_cut_at, run
from safetensors.torch import load_file
from torch import Tensor

from layerdecomp.config import load_config
from layerdecomp.errors import InputError
from layerdecomp.tensor_files import read_metadata
from layerdecomp.training.average import RunningAverage
from layerdecomp.training.decomposer import DecomposerJob

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
DECAY = 0.25  # above 2 / 11, so that the first two steps use a smaller decay


@pytest.fixture
def settings(tiny_overrides: list[str]) -> list[str]:
    every = ["train.validate_every=2", "train.checkpoint_every=2"]
    return [*tiny_overrides, *every, "train.precision=32-true", "train.steps=5", "optim.lr=1e-2", f"train.ema={DECAY}"]


Tensors = dict[str, Tensor]


def _trained(job: DecomposerJob) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in job.trained()}


def _short(name: str) -> str:
    return name.removeprefix("decomposer.").removeprefix("transformer.")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensors]]:
    """A list that collects the trained tensors before the first step and after each."""
    seen: list[Tensors] = []
    start, end = RunningAverage.on_train_start, RunningAverage.on_train_batch_end

    def on_start(self: RunningAverage, trainer: Any, job: DecomposerJob) -> None:
        seen.append(_trained(job))
        start(self, trainer, job)

    def on_end(self: RunningAverage, trainer: Any, job: DecomposerJob, *rest: Any) -> None:
        seen.append(_trained(job))
        end(self, trainer, job, *rest)

    monkeypatch.setattr(RunningAverage, "on_train_start", on_start)
    monkeypatch.setattr(RunningAverage, "on_train_batch_end", on_end)
    yield seen


def test_the_average_is_validated_and_written(
    tmp_path: Path, settings: list[str], steps: list[Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[tuple[int, Tensors]] = []
    original = DecomposerJob.validation_step

    def spy(self: DecomposerJob, batch: dict[str, Any], batch_idx: int) -> None:
        validated.append((self.global_step, _trained(self)))
        original(self, batch, batch_idx)

    monkeypatch.setattr(DecomposerJob, "validation_step", spy)
    run_dir = run("tiny", *settings, f"run_dir={tmp_path}/run")
    assert len(steps) == 6
    averages = [steps[0]]
    for n, trained in enumerate(steps[1:]):
        decay = min(DECAY, (1 + n) / (10 + n))
        averages.append({name: decay * averages[-1][name] + (1 - decay) * trained[name] for name in trained})
    written = load_file(run_dir / "adapter.safetensors")
    for name, average in averages[-1].items():
        torch.testing.assert_close(written[_short(name)], average, rtol=1e-5, atol=1e-7)
    assert [step for step, _ in validated] == [0, 2, 4]  # 0: before training
    for step, tensors in validated:
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, averages[step][name], rtol=1e-5, atol=1e-7)
    state = torch.load(run_dir / "last.ckpt", weights_only=True)["state_dict"]
    assert all(state[name].equal(steps[-1][name]) for name in state)  # training continues from the last step's values
    assert any(not state[name].equal(written[_short(name)]) for name in state)
    assert json.loads(read_metadata(run_dir / "adapter.safetensors")["train"])["ema"] == DECAY


def test_a_resumed_run_has_the_same_average(tmp_path: Path, settings: list[str]) -> None:
    straight = run("tiny", *settings, f"run_dir={tmp_path}/straight")
    with power_cut_at(3):
        run("tiny", *settings, f"run_dir={tmp_path}/resumed")
    resumed = run("tiny", *settings, f"run_dir={tmp_path}/resumed")
    one, other = (load_file(path / "adapter.safetensors") for path in (straight, resumed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    again = run("tiny", *settings, f"run_dir={tmp_path}/resumed")  # a finished run is only evaluated again
    assert all(one[name].equal(tensor) for name, tensor in load_file(again / "adapter.safetensors").items())


def test_accumulated_batches_count_as_one_step(tiny_overrides: list[str]) -> None:
    class Clock:
        global_step = 3  # resumed

    job = DecomposerJob(load_config(CONFIG, tiny_overrides))
    average, clock = RunningAverage(0.5), Clock()
    average.on_train_start(clock, job)  # type: ignore[arg-type]
    fill(job.decomposer.transformer.img_in, seed=8)
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    average.on_train_batch_end(clock, job)  # type: ignore[arg-type]
    assert average.steps == 0 and all(average.tensors[name].equal(before[name]) for name in before)
    clock.global_step = 4
    for _ in range(2):  # one step, and a batch of the next
        average.on_train_batch_end(clock, job)  # type: ignore[arg-type]
    name = "decomposer.transformer.img_in.weight"
    expected = 0.1 * before[name] + 0.9 * dict(job.trained())[name]
    assert average.steps == 1 and torch.allclose(average.tensors[name], expected)


def test_an_interrupted_validation_restores_the_trained_tensors(tiny_overrides: list[str]) -> None:
    job = DecomposerJob(load_config(CONFIG, tiny_overrides))
    average, trained = RunningAverage(0.5), _trained(job)
    average.tensors = {name: tensor + 1 for name, tensor in trained.items()}
    average.on_validation_start(None, job)  # type: ignore[arg-type]
    assert all(tensor.equal(trained[name] + 1) for name, tensor in _trained(job).items())
    average.on_exception(None, job, PowerCutError())  # type: ignore[arg-type]
    assert all(tensor.equal(trained[name]) for name, tensor in _trained(job).items())
    fill(job.decomposer.transformer.img_in, seed=8)
    trained = _trained(job)
    average.on_exception(None, job, PowerCutError())  # type: ignore[arg-type]
    assert all(tensor.equal(trained[name]) for name, tensor in _trained(job).items())
    with pytest.raises(PowerCutError), average.applied(job):
        assert all(tensor.equal(average.tensors[name]) for name, tensor in _trained(job).items())
        raise PowerCutError
    assert all(tensor.equal(trained[name]) for name, tensor in _trained(job).items())


@pytest.mark.parametrize(
    ("decay", "message"), [("1.0", "keeps the initial weights"), ("-0.1", "train.ema"), ("2", "train.ema")]
)
def test_invalid_decays_are_rejected(tiny_overrides: list[str], decay: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(CONFIG, [*tiny_overrides, f"train.ema={decay}"])
