"""Which code trained a run; test_train.py follows it through runs."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layerdecomp.errors import InputError
from layerdecomp.tensor_files import file_sha256
from layerdecomp.training import provenance
from layerdecomp.training.provenance import Provenance, source_commit
from layerdecomp.weights import history


def running(monkeypatch: pytest.MonkeyPatch, commit: str, source: str) -> Provenance:
    """The provenance in a process that runs this code."""
    monkeypatch.setattr(provenance, "source_commit", lambda: commit)
    monkeypatch.setattr(provenance, "PACKAGE_SHA256", source)
    return Provenance()


def test_a_resumed_run_names_every_commit_whose_sources_trained_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = running(monkeypatch, "first", source="a")
    first.begin(0, "32-true", warns=True)
    saved = first.state()
    docs = running(monkeypatch, "of docs", source="a")
    docs.load(saved)
    docs.begin(2, "32-true", warns=True)
    assert docs.metadata() == {"commit": "first", "date": saved["on"], "precision": "32-true"}
    assert not caplog.records
    second = running(monkeypatch, "second", source="b")
    second.load(saved)
    second.begin(2, "32-true", warns=False)
    assert second.metadata()["commit"] == "first + second" and not caplog.records
    saved = second.state()
    third = running(monkeypatch, "third", source="a")
    third.load(saved)
    third.begin(4, "32-true", warns=True)
    assert third.metadata()["commit"] == "first + second + third"
    assert "commit second trained this run up to step 4, from where commit third continues" in caplog.text


def test_a_resumed_run_names_every_precision_that_trained_it(caplog: pytest.LogCaptureFixture) -> None:
    run = Provenance()
    for step, precision in enumerate(["32-true", "32-true", "bf16-mixed"]):
        assert not caplog.records
        resumed = Provenance()
        resumed.load(run.state())
        resumed.begin(step, precision, warns=True)
        run = resumed
    assert "trained in 32-true up to step 2, from where bf16-mixed continues" in caplog.text
    assert run.metadata()["precision"] == "32-true + bf16-mixed"
    assert "precision" not in Provenance().metadata()
    older = Provenance()
    older.load({"by": ["first"]})
    older.begin(900, "bf16-mixed", warns=True)
    assert older.metadata()["precision"] == "unknown + bf16-mixed"


def test_the_stages_of_a_file_are_those_before_it_and_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_file({"a": torch.rand(2)}, first, {"steps": "10", "seed": "3", "licence": "none"})
    run = Provenance(first)
    first_stage = {"sha256": file_sha256(first), "steps": "10", "seed": "3"}
    assert json.loads(run.metadata()["history"]) == [first_stage]
    save_file({"a": torch.rand(2)}, second, {"steps": "20", **run.metadata()})
    *before, last = history(second)
    assert before == [first_stage]
    assert last["steps"] == "20" and last["sha256"] == file_sha256(second) and "history" not in last
    saved = run.state()
    resumed = Provenance(second)  # another file is now where the run started from
    resumed.load(saved)
    assert json.loads(resumed.metadata()["history"]) == [first_stage]


@pytest.mark.parametrize("value", ["{", "3", "[3]"])
def test_a_damaged_history_is_reported(tmp_path: Path, value: str) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"a": torch.rand(2)}, file, {"history": value})
    with pytest.raises(InputError, match="file.safetensors: history in its metadata is not a JSON list of objects"):
        Provenance(file)


def test_the_commit_of_a_repository_around_an_installed_package_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "of another project"], check=True)
    monkeypatch.setattr("layerdecomp.training.provenance.__file__", str(tmp_path / "provenance.py"))
    assert re.fullmatch("unknown-[0-9a-f]{8}", source_commit())
