"""A frozen base sharded over two processes: identical results, half of the memory, and no deadlock.

In every run rank 0 has more samples to validate and to evaluate than rank 1, and fewer to check when a loss is NaN.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import as_ranks, become_rank, curve
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from layerdecomp.config import load_config
from layerdecomp.decomposer import Decomposer
from layerdecomp.evaluation import Share
from layerdecomp.training.checkpoints import LAST, PREVIOUS
from layerdecomp.training.decomposer import DecomposerJob
from layerdecomp.training.runs import train
from layerdecomp.weights import load_mmdit

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    *("train.devices=2", "train.strategy=ddp", "train.batch_size=1", "train.accumulate=2", "train.precision=32-true"),
    *("train.steps=4", "train.checkpoint_every=2", "train.validate_every=2", "optim.lr=1e-2", "optim.warmup=0"),
    *("data.validation=3", "evaluate.samples=3", "evaluate.batch_size=1", "evaluate.rows=[adapted,base]"),
]
BAD = 8  # a position of the first rank in the third step
losses, finish = DecomposerJob.flow_losses, DecomposerJob.finish


def nan_losses(self: DecomposerJob, latents: dict[str, Tensor], positions: list[int]) -> dict[str, Tensor]:
    """The losses, which are NaN at position `BAD`."""
    found = losses(self, latents, positions)
    return {name: loss * torch.nan for name, loss in found.items()} if BAD in positions else found


def _train_as(rank: int, port: int, settings: list[str], folder: Path, names: list[str]) -> None:
    """Trains the named runs as one of two ranks, sharded if the name says so; writes the bytes that the rank holds."""
    become_rank(rank, port)

    def record(self: DecomposerJob, run_dir: Path, share: Share) -> None:
        (folder / f"{run_dir.name}.{rank}.json").write_text(json.dumps(_held(self)))
        finish(self, run_dir, share)

    with (
        mock.patch.object(DecomposerJob, "flow_losses", nan_losses),
        mock.patch.object(DecomposerJob, "finish", record),
    ):
        for name in names:
            sharded = f"shard_base={str('sharded' in name).lower()}"
            train(load_config(ROOT / "configs" / "tiny.yaml", [*settings, sharded, f"run_dir={folder / name}"]))
    torch.distributed.destroy_process_group()


def _held(job: DecomposerJob) -> dict[str, int]:
    """Bytes of the transformer's parameters that this rank holds, and of the trained ones."""
    transformer = job.decomposer.transformer
    trained = sum(p.nbytes for p in transformer.parameters() if p.requires_grad)
    held = [p.to_local() if isinstance(p, DTensor) else p for p in transformer.parameters()]
    return {"all": sum(part.nbytes for part in held), "trained": trained}


def results(run_dir: Path) -> Any:
    return json.loads((run_dir / "metrics.json").read_text())["results"]


def same(one: Path, other: Path) -> bool:
    tensors, others = (load_file(path / "adapter.safetensors") for path in (one, other))
    assert tensors.keys() == others.keys() and any(t.any() for name, t in tensors.items() if "lora_B" in name)
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_training_with_a_sharded_base_is_bitwise_identical_in_half_of_the_memory(
    tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)  # left by an earlier training here; may be in use by now
    settings = [*tiny_overrides, *SETTINGS]
    assert as_ranks(_train_as, settings, tmp_path, ["whole", "sharded"]) == [0, 0]
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert same(whole, sharded) and results(whole) == results(sharded)
    for tag in ("train/loss", "validation/background/psnr"):
        torch.testing.assert_close(curve(sharded, tag), curve(whole, tag), rtol=0, atol=0, equal_nan=True)
    assert curve(sharded, "train/skipped")[3] == 1, "the step with NaN"
    held = {
        name: [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("whole", "sharded")
    }
    (everything, trained), halves = held["whole"][0].values(), [rank["all"] for rank in held["sharded"]]
    assert all(rank["trained"] == trained for rank in held["sharded"])
    frozen = everything - trained
    assert [half - trained for half in halves] == pytest.approx([frozen / 2, frozen / 2], rel=0.05)

    # Resumes with the base stored the other way, and on one device; a finished run is evaluated without a step.
    for name, before in (("then-sharded", whole), ("then-alone", sharded)):
        (tmp_path / name).mkdir()
        shutil.copy(before / PREVIOUS, tmp_path / name / LAST)
        shutil.copy(before / "config.yaml", tmp_path / name)
    assert as_ranks(
        _train_as, [*settings, "recompute=1", "recompute_attention=false"], tmp_path, ["then-sharded", "sharded"]
    ) == [0, 0]
    assert results(sharded) == results(whole)
    assert same(whole, tmp_path / "then-sharded") and sorted(curve(tmp_path / "then-sharded")) == [2, 3]
    one = ["train.devices=1", "train.batch_size=4", "train.accumulate=1", f"run_dir={tmp_path}/then-alone"]
    with mock.patch.object(DecomposerJob, "flow_losses", nan_losses):
        train(load_config(ROOT / "configs" / "tiny.yaml", [*settings, *one]))
    assert curve(tmp_path / "then-alone")[3] == pytest.approx(curve(sharded)[3], rel=1e-4)


def test_frozen_base_equals_its_file_and_leaves_the_adapted_model_unchanged(
    tiny_decomposer: Decomposer, tiny_weights: Path
) -> None:
    path = tiny_weights / "transformer.safetensors"
    base, expected = tiny_decomposer.frozen_base(path), load_mmdit(path)
    generator = torch.Generator().manual_seed(0)
    channels = expected.config.in_channels
    inputs = {
        **{"img": torch.randn(2, 4, channels, generator=generator), "img_ids": torch.zeros(4, 3)},
        **{"timesteps": torch.tensor([0.3, 0.9]), **tiny_decomposer.prompt.inputs(2, torch.float32)},
    }
    with torch.no_grad():
        adapted = tiny_decomposer.transformer(**inputs)
        assert torch.equal(base(**inputs), expected(**inputs))
        assert torch.equal(tiny_decomposer.transformer(**inputs), adapted) and not torch.equal(base(**inputs), adapted)
    assert base.original.keys() == {"img_in.weight", "img_in.bias"}
    shared = {p.data_ptr() for p in tiny_decomposer.transformer.parameters()}
    assert {p.data_ptr() for p in base.parameters()} == shared
