"""Golden losses: ten steps of the default training from the shipped base give the losses in golden.json.

They are computed in float32. Other processors differ in the last bits: with PyTorch, MKL, oneDNN and NumPy limited to
SSE4 and to AVX2 instructions, and with two threads, the losses were within 2.2e-6 of those in the file.

After an intended change of the losses or of the shipped weights: GOLDEN=write make test ARGS=tests/test_golden.py
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import curve
from safetensors.torch import load_file

from layerdecomp.config import load_config
from layerdecomp.tensor_files import file_sha256
from layerdecomp.training.runs import train

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden.json"
SETTINGS = [
    *(
        "train.steps=10",
        "train.batch_size=2",
        "latent_cache=null",
        "train.precision=32-true",
        "train.deterministic=true",
    ),
    *("data.scenes.size=64", "data.workers=0", "data.validation=1", "optim.warmup=0"),
    *("evaluate.samples=1", "sample.steps=1"),
]


@pytest.fixture(autouse=True)
def restore_determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def run(run_dir: Path) -> list[float]:
    train(load_config(ROOT / "configs" / "tiny.yaml", [*SETTINGS, f"run_dir={run_dir}"]))
    return list(curve(run_dir).values())


def test_ten_steps_reproduce_the_golden_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    losses = run(tmp_path / "one")
    assert torch.are_deterministic_algorithms_enabled()
    base = ROOT / "checkpoints" / "tiny"
    names = ("transformer", "autoencoder", "rgba_autoencoder")
    weights = {name: file_sha256(base / f"{name}.safetensors") for name in names}
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({"losses": losses, "weights": weights}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert golden["weights"] == weights, "the shipped weights have changed; see the module docstring"
    assert losses == pytest.approx(golden["losses"], rel=1e-5, abs=0) and len(losses) == 10
    assert run(tmp_path / "two") == losses
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
