"""The commands: what they write, and one plain error with status 2 for every invalid input."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import TRANSFORMER
from PIL import Image
from safetensors.torch import load_file, save_file

from layerdecomp.cli import run_command, take
from layerdecomp.comparison import EvaluateConfig
from layerdecomp.data.index import Index
from layerdecomp.decomposer import Decomposer
from layerdecomp.errors import InputError, RunError
from layerdecomp.overrides import merge_config, read_yaml
from layerdecomp.tables import format_published
from layerdecomp.tensor_files import file_sha256, read_metadata
from layerdecomp.weights import REFINES, Adapter

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = (
    *("train", "decompose", "evaluate", "export", "embed_prompt"),
    *("prepare_data", "benchmark_data", "benchmark_load"),
)
TOOLS = {name: _tool(name) for name in NAMES}
Fails = Callable[..., str]


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Returns a function that runs a tool in a temporary folder, expects a plain failure and returns its message."""
    monkeypatch.chdir(tmp_path)

    def run(tool: str, *arguments: str) -> str:
        before = _files(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            run_command(TOOLS[tool].main, list(arguments))
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err
        assert _files(tmp_path) == before, "something was written"
        return err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """An image and its mask, as arguments."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = np.zeros((40, 56), np.uint8)
    mask[10:22, 20:36] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    return [f"image={tmp_path / 'a.png'}", f"mask={tmp_path / 'm.png'}"]


@pytest.fixture
def own_weights(tmp_path: Path, tiny_weights: Path) -> Path:
    """A copy of `tiny_weights` that a test may damage; its adapter finds the other files in its own folder."""
    folder = shutil.copytree(tiny_weights, tmp_path / "weights")
    adapter = Adapter.load(folder / "adapter.safetensors")
    names = {name: f"gone/{name}.safetensors" for name in ("transformer", "autoencoder", "rgba_autoencoder")}
    Adapter(adapter.tensors, {**adapter.metadata, "weights": json.dumps(names)}).save(folder / "adapter.safetensors")
    return folder


# Output


def test_decompose_writes_layers(
    tiny_weights: Path, tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers"
    adapter = f"adapter={tiny_weights / 'adapter.safetensors'}"
    run_command(TOOLS["decompose"].main, [adapter, *pictures, f"out={out}", "steps=2", "seed=7"])
    assert str(out) in capsys.readouterr().out
    layers = Decomposer.from_pretrained(tiny_weights / "adapter.safetensors").decompose(
        tmp_path / "a.png", tmp_path / "m.png", steps=2, seed=7
    )
    np.testing.assert_array_equal(np.asarray(Image.open(out / "foreground.png")), layers.foreground)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "background.png")), layers.background)


def test_decompose_quantises_the_base(tiny_weights: Path, tmp_path: Path, pictures: list[str]) -> None:
    adapter, out = tiny_weights / "adapter.safetensors", tmp_path / "layers"
    run_command(TOOLS["decompose"].main, [f"adapter={adapter}", *pictures, f"out={out}", "steps=1", "quantize=nf4"])
    layers = Decomposer.from_pretrained(adapter, quantize="nf4").decompose(
        tmp_path / "a.png", tmp_path / "m.png", steps=1
    )
    np.testing.assert_array_equal(np.asarray(Image.open(out / "foreground.png")), layers.foreground)
    whole = Decomposer.from_pretrained(adapter).decompose(tmp_path / "a.png", tmp_path / "m.png", steps=1)
    assert (layers.foreground != whole.foreground).any()


def test_decompose_processes_folders(
    tiny_weights: Path, tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = f"adapter={tiny_weights / 'adapter.safetensors'}", tmp_path / "out"
    for folder, source in (("images", "a.png"), ("masks", "m.png")):
        for stem in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(tmp_path / source, tmp_path / folder / f"{stem}.png")
    (tmp_path / "images" / "two.png").write_bytes(b"no picture")
    where = [adapter, f"image={tmp_path / 'images'}", f"mask={tmp_path / 'masks'}", f"out={out}", "batch_size=2"]
    run = partial(run_command, TOOLS["decompose"].main, [*where, "steps=1", "sample.max_side=32", "format=png,ora"])
    with pytest.raises(SystemExit) as stopped:
        run()
    output = capsys.readouterr()
    assert stopped.value.code == 1 and output.out == "" and output.err.endswith("1 of 2 images have no layers: two\n")
    shutil.copy(tmp_path / "a.png", tmp_path / "images" / "two.png")
    run()
    assert capsys.readouterr().out == f"2 images split into {out}\n"
    assert all((out / stem / "layers.ora").is_file() for stem in ("one", "two"))
    settings = json.loads((out / "settings.json").read_text())
    assert settings["max_side"] == 32 and settings["steps"] == 1 and len(settings["adapter"]) == 64


@pytest.mark.parametrize("part", ["rgba_autoencoder", "prompt", "depth", "precision"])
def test_decompose_does_not_mix_models_in_a_folder(
    tiny_weights: Path,
    tmp_path: Path,
    pictures: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: Fails,
    part: str,
) -> None:
    def write(value: float) -> None:
        """A refined autoencoder, or a prompt embedding, under the same name."""
        original = tiny_weights / "rgba_autoencoder.safetensors"
        tensors, metadata = load_file(original), {**read_metadata(original), REFINES: file_sha256(original)}
        if part != "rgba_autoencoder":
            tensors = {"txt": torch.ones(1, TRANSFORMER.context_in_dim), "vec": torch.ones(TRANSFORMER.vec_in_dim)}
        save_file({name: value * tensor for name, tensor in tensors.items()}, "other.safetensors", metadata)
        file_sha256.cache_clear()

    monkeypatch.setattr(TOOLS["decompose"], "load_depth", lambda path: None)
    for folder, source in (("images", "a.png"), ("masks", "m.png")):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / source, tmp_path / folder / "one.png")
    arguments = [f"adapter={tiny_weights / 'adapter.safetensors'}", "image=images", "mask=masks", "steps=1"]
    arguments += [] if part == "precision" else [f"{part}=other.safetensors"]
    write(0.5)
    run_command(TOOLS["decompose"].main, arguments)
    capsys.readouterr()
    if part == "precision":
        monkeypatch.setattr(TOOLS["decompose"], "frozen_dtype", lambda device: torch.bfloat16)
    else:
        write(0.6)
    assert f"settings.json: existing files were made with {part}=" in fails("decompose", *arguments)


def test_decompose_loads_a_published_folder_and_writes_layered_files(
    tiny_weights: Path, tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder, out = tiny_weights / "adapter.safetensors", tmp_path / "published", tmp_path / "layers"
    run_command(TOOLS["export"].main, [f"adapter={source}", "format=decomposer", f"out={folder}"])
    base = f"transformer={tiny_weights / 'transformer.safetensors'}"
    run_command(
        TOOLS["decompose"].main, [f"adapter={folder}", base, *pictures, f"out={out}", "format=ora,psd", "steps=1"]
    )
    assert {path.name for path in out.iterdir()} == {"layers.ora", "layers.psd"}
    assert "wrote layers.ora, layers.psd into" in capsys.readouterr().out


def test_evaluate_writes_metrics_and_images(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["data.scenes.size=32", "evaluate.samples=3", "evaluate.batch_size=2", "sample.steps=2"]
    adapter = f"adapter={tiny_weights / 'adapter.safetensors'}"
    rows = "evaluate.rows=[adapted,base,classical,matting]"
    run_command(TOOLS["evaluate"].main, [adapter, f"out={tmp_path / 'new'}", *small, rows])
    document = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert list(document["results"]) == ["adapted", "base", "classical", "matting"]
    assert document["results"]["adapted"]["background/psnr"] > 0
    assert document["protocol"]["count"] == 3 and document["protocol"]["steps"] == 2
    assert document["protocol"]["versions"]["pymatting"] and len(document["protocol"]["weights"]) == 4
    sad = {row: values["foreground/alpha_sad"] for row, values in document["results"].items()}
    assert sad["matting"] != sad["base"] == sad["classical"]  # both have the alpha of the mask
    assert Image.open(tmp_path / "new" / "samples" / "comparison.png").size[0] > 32
    assert "adapted" in capsys.readouterr().out
    assert {path.name for path in tiny_weights.iterdir()} == {
        f"{name}.safetensors" for name in ("transformer", "autoencoder", "rgba_autoencoder", "adapter")
    }


def test_an_exported_adapter_holds_the_figures_of_its_own_evaluation(tmp_path: Path, tiny_weights: Path) -> None:
    adapter = f"adapter={tiny_weights / 'adapter.safetensors'}"
    small = ["data.scenes.size=32", "evaluate.samples=1", "sample.steps=1", "evaluate.rows=[adapted]"]
    run_command(TOOLS["evaluate"].main, [adapter, f"out={tmp_path}", *small])
    measured = json.loads((tmp_path / "metrics.json").read_text())["results"]["adapted"]
    export = ["format=adapter", f"figures={tmp_path}/metrics.json", f"out={tmp_path}/out.safetensors"]
    run_command(TOOLS["export"].main, [adapter, *export])
    figures = json.loads(read_metadata(tmp_path / "out.safetensors")["figures"])
    assert figures and figures == {name: value for name, value in measured.items() if value is not None}
    other = f"adapter={tmp_path}/out.safetensors"
    with pytest.raises(InputError, match=r"metrics.json has no row adapted that was measured with .*out.safetensors"):
        TOOLS["export"].main([other, *export[:2], f"out={tmp_path}/other.safetensors"])


def test_evaluate_exports_inputs_and_scores_predictions_of_another_method(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, inputs = f"adapter={tiny_weights / 'adapter.safetensors'}", tmp_path / "inputs"
    small = ["data.scenes.size=32", "evaluate.samples=3"]
    run_command(TOOLS["evaluate"].main, [f"export={inputs}", *small])
    assert capsys.readouterr().out == f"3 samples in {inputs}\n"
    parts = ("image", "mask", "foreground", "background", "occluder")
    assert {path.name for path in inputs.iterdir()} == {*parts, "settings.json"}
    for name in ("00000", "00002"):  # a method that returns its input, and fails once
        for part in ("background", "foreground"):
            (tmp_path / "other" / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(inputs / "image" / f"{name}.png", tmp_path / "other" / "background")
        shutil.copy(inputs / "mask" / f"{name}.png", tmp_path / "other" / "foreground")
    others = [f"predictions={tmp_path / 'other'}", f"data={inputs}", f"out={tmp_path / 'out'}"]
    run_command(TOOLS["evaluate"].main, others)
    output = capsys.readouterr().out
    assert "other: 1 missing backgrounds: 00001" in output
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]) == ["classical", "other"]
    (tmp_path / "protocol.yaml").write_text("sample: {steps: 2}\nevaluate: {rows: [adapted], measure: {region: mask}}")
    both = [adapter, f"config={tmp_path / 'protocol.yaml'}", *others]
    run_command(TOOLS["evaluate"].main, both)
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(document["results"]) == ["adapted", "other"] and document["protocol"]["region"] == "mask"
    assert document["protocol"]["steps"] == 2 and document["protocol"]["data"] == str(inputs)


def test_the_mulan_protocol_exports_a_test_set_and_fills_the_table(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands of docs/evaluation.md, on generated layers, at a smaller size."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs" / "results.md", "results.md")
    (tmp_path / "layers").mkdir()
    rng = np.random.default_rng(0)
    for picture in range(3):
        for layer in range(2):
            rgba = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
            rgba[..., 3] = 255 if layer == 0 else 0
            rgba[10:30, 10:40, 3] = 255
            Image.fromarray(rgba).save(tmp_path / "layers" / f"{picture}-layer_{layer}.png")
    index = ["source=mulan", "root=layers", "out=data/mulan.safetensors", "workers=1", "test_share=1"]
    run_command(TOOLS["prepare_data"].main, index)
    setting = [f"config={CONFIGS / 'mulan.yaml'}", "data.triplets.size=32"]
    run_command(TOOLS["evaluate"].main, [*setting, "export=data/mulan-test"])
    assert "3 samples in data/mulan-test" in capsys.readouterr().out
    assert Image.open("data/mulan-test/image/0-1.png").size == (32, 32)
    model = [f"adapter={tiny_weights / 'adapter.safetensors'}", "sample.steps=1"]
    run_command(TOOLS["evaluate"].main, [*setting, *model, "data=data/mulan-test", "fill=results.md", "out=out"])
    table = Path("results.md").read_text().partition("<!-- published -->")[2].partition("<!-- /published -->")[0]
    assert table.strip() == (tmp_path / "out" / "published.md").read_text().strip()
    assert len(re.findall(r"\d ± \d", table)) == 4 and table.count("35.96 |") == 1  # PSNR and SSIM of two rows
    protocol = json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]
    assert protocol["count"] == 3 and protocol["data"] == "data/mulan-test" and protocol["guidance"] == 30.0


def test_the_published_table_of_the_docs_matches_the_protocol() -> None:
    config = merge_config(EvaluateConfig(), [("", read_yaml(CONFIGS / "mulan.yaml").evaluate)], [])
    table = (ROOT / "docs" / "results.md").read_text().partition("<!-- published -->")[2].strip()
    ours = [line.split("|")[1:4] for line in format_published({}, config.published).splitlines()]
    theirs = [line.split("|")[1:4] for line in table.partition("<!-- /published -->")[0].strip().splitlines()]
    assert theirs == ours


def test_prepare_data_writes_and_checks_indexes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    index = tmp_path / "index.safetensors"
    where = [f"root={tmp_path / 'pictures'}", f"out={index}"]
    run_command(TOOLS["prepare_data"].main, ["source=backgrounds", "licence=CC0", "workers=2", *where])
    assert [(item.id, item.width, item.height) for item in Index(index)] == [("a", 30, 20), ("b", 30, 20)]
    assert Index(index).licence == "CC0"
    run_command(TOOLS["prepare_data"].main, [f"check={index}", "workers=1"])
    assert "no faults" in capsys.readouterr().out
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        run_command(TOOLS["prepare_data"].main, [f"check={index}", "workers=1"])
    assert stopped.value.code == 1 and "a.jpg cannot be read" in capsys.readouterr().out


def test_prepare_data_writes_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "layers").mkdir()
    for layer, alpha in enumerate((np.full((20, 30), 255), 255 * (rng.random((20, 30)) < 0.5))):
        rgba = np.dstack([rng.integers(0, 256, (20, 30, 3)), alpha]).astype(np.uint8)
        Image.fromarray(rgba).save(tmp_path / "layers" / f"a-layer_{layer}.png")
    index = tmp_path / "index.safetensors"
    run_command(
        TOOLS["prepare_data"].main, ["source=mulan", f"root={tmp_path / 'layers'}", f"out={index}", "workers=1"]
    )
    maps = [f"maps={index}", "cues=edge,segmentation", "workers=1"]
    run_command(TOOLS["prepare_data"].main, maps)
    assert capsys.readouterr().out.endswith(f"{index}: 1 items with maps of edge, segmentation, 0 faulty\n")
    assert all(Image.open(tmp_path / "layers" / cue / "a.png").size == (30, 20) for cue in ("edge", "segmentation"))
    with pytest.raises(SystemExit) as stopped:
        run_command(TOOLS["prepare_data"].main, [f"maps={index}", f"depth={tmp_path}/model.safetensors"])
    assert stopped.value.code == 2
    assert f"{tmp_path}/model.safetensors does not exist; put model.safetensors of" in capsys.readouterr().err
    (tmp_path / "layers" / "a-layer_0.png").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "layers" / "edge")
    with pytest.raises(SystemExit) as stopped:
        run_command(TOOLS["prepare_data"].main, maps)
    assert stopped.value.code == 1 and "a-layer_0.png cannot be read" in capsys.readouterr().out


def test_benchmark_data_prints_the_share_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(TOOLS["benchmark_data"].main, ["count=2", "size=64"])
    rate, *stages = capsys.readouterr().out.splitlines()[3:]
    assert "triplets/s per worker at 64 x 64" in rate
    shares = {line[:14].strip(): int(line.split("%")[0].split()[-1]) for line in stages}
    assert list(shares) == [
        *("decode", "resize", "composite", "pad colours", "blend", "mask", "cue edges", "cue segments", "the rest"),
    ]
    assert 95 <= sum(shares.values()) <= 105 and shares["cue segments"] > 0 and shares["resize"] > 0


def test_export_names_the_files_it_wrote(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_weights / "adapter.safetensors", tmp_path / "merged.safetensors"
    run_command(TOOLS["export"].main, [f"adapter={source}", "format=merged", f"out={out}"])
    output = capsys.readouterr().out
    assert f"wrote {out}" in output and "merged.extras.safetensors" in output and "merged.NOTICE.txt" in output
    assert load_file(out).keys() == load_file(tiny_weights / "transformer.safetensors").keys()


def test_benchmark_load_prints_rate_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["hidden_size=64", "num_heads=4", "axes_dim=[4,6,6]", "depth=1"]
    run_command(TOOLS["benchmark_load"].main, [f"folder={tmp_path}", "dtype=float32", *small])
    output = capsys.readouterr().out
    assert "GB/s, the disk alone" in output and "above the model's" in output
    assert not list(tmp_path.iterdir())  # the generated file is removed


# Invalid input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mask=absent.png", "absent.png does not exist; expected an image file"),
        ("image=text.png", "text.png cannot be read as an image"),
        ("image=cut.png", "cut.png cannot be read as an image"),
        ("mask=small.png", "small.png is 28 x 20 pixels, the image 56 x 40; expected equal sizes"),
        ("mask=empty.png", "empty.png is empty: no pixel is 128 or brighter; expected white"),
        ("mask=full.png", "full.png is full: it marks every pixel; expected white"),
        ("mask=a.png", "a.png is in colour; expected grey levels"),
        ("steps=many", "steps=many: expected a whole number"),
        ("steps=0", "steps is 0; expected at least 1"),
        ("seed=-1", "seed is -1; expected a whole number from 0"),
        (f"seed={10**30}", "expected a whole number from 0 to 2^63 - 1"),
        ("device=gpu", "device=gpu: Expected one of cpu, cuda"),
        ("quantize=int4", "quantize is 'int4'; expected null, int8, fp8, nf4"),
        ("depth=absent.safetensors", "absent.safetensors does not exist; put the file there"),
        ("sample.maxside=64", "unknown key sample.maxside; the nearest known one is sample.max_side"),
        ("sample.tile=8", "sample.tile is 8; expected at least 64"),
        ("batch_size=none", "batch_size=none: expected a whole number"),
        ("mask=.", "a.png is not a folder, but . is; expected two folders, or two files"),
        ("stpes=3", "unknown argument stpes=3; expected adapter= image= mask="),
        ("format=xcf", "format=xcf: expected some of png, ora, psd"),
        ("transformer=absent", "absent does not exist"),
        ("out=text.png", "text.png is a file; expected a folder: choose another out="),
        ("out=text.png/below", "text.png is a file; expected a folder: choose another out="),
    ],
)
def test_decompose_reports_invalid_input(
    fails: Fails, tiny_weights: Path, tmp_path: Path, pictures: list[str], change: str, message: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    mask = Image.open(tmp_path / "m.png")
    mask.resize((28, 20)).save(tmp_path / "small.png")
    Image.new("L", mask.size, 0).save(tmp_path / "empty.png")
    Image.new("L", mask.size, 255).save(tmp_path / "full.png")
    adapter = f"adapter={tiny_weights / 'adapter.safetensors'}"
    assert message in fails("decompose", adapter, *pictures, "steps=1", "out=layers", change)


def test_decompose_checks_its_folder_and_images_before_loading_weights(
    fails: Fails, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["adapter=absent.safetensors", *pictures]
    assert "gone.png does not exist" in fails("decompose", *given, "mask=gone.png")
    assert "absent.safetensors does not exist" in fails("decompose", *given, "out=new/layers")
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)  # mocked, because root may write anywhere
    output = fails("decompose", *given, "out=new/layers")
    assert f"out=new/layers: {Path.cwd()} cannot be written to; make it writable" in output


def test_the_default_adapter_is_found_from_any_folder(fails: Fails, pictures: list[str]) -> None:
    assert "absent.png does not exist" in fails("decompose", *pictures, "image=absent.png")


def test_the_default_adapter_is_evaluated_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TOOLS["evaluate"].main(["evaluate.samples=1", "evaluate.rows=[adapted]", "sample.steps=1", "sample.ensemble=1"])
    assert (tmp_path / "runs/evaluate/metrics.json").is_file()


def test_decompose_needs_an_image(fails: Fails) -> None:
    assert "image= is missing; expected image=... mask=..." in fails("decompose", "steps=1")


@pytest.mark.parametrize("name", ["adapter", "transformer", "autoencoder", "rgba_autoencoder"])
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("tool", ["decompose", "evaluate", "export"])
def test_missing_and_truncated_weights_are_named(
    fails: Fails, own_weights: Path, pictures: list[str], tool: str, name: str, missing: bool
) -> None:
    path = own_weights / f"{name}.safetensors"
    path.unlink() if missing else path.write_bytes(path.read_bytes()[:-100])
    arguments = {"decompose": pictures, "evaluate": [], "export": ["format=merged", "out=merged.safetensors"]}[tool]
    output = fails(tool, f"adapter={own_weights / 'adapter.safetensors'}", *arguments)
    assert (f"{path.name} does not exist" if missing else f"{path}: truncated: ") in output
    assert ("checkpoints/README.md" if missing else "download or export it again") in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate.smaples=3"], "unknown key evaluate.smaples; the nearest known one is evaluate.samples"),
        (["evaluate.samples=few"], "argument 'evaluate.samples=few': Value 'few'"),
        (["evaluate.samples=0"], "evaluate.samples is 0; expected at least 1"),
        (["sample=3"], "sample is a section"),
        (["32"], "argument '32': expected key=value"),
        (["device=tpu"], "device=tpu: "),
        (["evaluate.samples=1", "data.scenes.size=32", "sample.steps=1", "out=taken"], "taken"),
        (["data=absent"], "data=absent is not a folder; expected one with image/, mask/"),
        (["config=absent.yaml"], "config absent.yaml does not exist"),
        (["predictions=taken"], "taken has neither background/ nor foreground/"),
        (["evaluate.rows=[frozen]"], "evaluate.rows has 'frozen'; expected some of adapted, base"),
        (["evaluate.measure.region=hole"], "evaluate.measure.region is 'hole'; expected one of full, mask, outside"),
        (["evaluate.objects=one"], "export=FOLDER first"),
        (["evaluate.published.base.psnr=1"], "evaluate.published has 'psnr'; expected some of background/psnr"),
        (["export=inputs", "evaluate.objects=one"], "data.triplets.layered names no index"),
        (["fill=results.md"], "expected config= with evaluate.published"),
    ],
)
def test_evaluate_reports_invalid_input(
    fails: Fails, tiny_weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert message in fails("evaluate", f"adapter={tiny_weights / 'adapter.safetensors'}", *arguments)


def test_evaluate_names_a_missing_matting_library(
    fails: Fails, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymatting", None)
    small = ["evaluate.samples=1", "data.scenes.size=32", "sample.steps=1", "evaluate.rows=[matting]"]
    output = fails("evaluate", f"adapter={tiny_weights / 'adapter.safetensors'}", *small)
    assert "evaluate.rows" in output and "pip install -e '.[matting]'" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=merged"], "out= is missing; expected out=..."),
        (["out=a.safetensors", "format=onnx"], "format=onnx: expected one of adapter, import"),
        (["out=a.safetensors", "fromat=merged"], "unknown argument fromat=merged; expected adapter= format= out="),
        (["out=a.safetensors", "weights=1,x"], "weights=1,x: expected comma-separated numbers"),
        (["out=a.safetensors", "base=maybe"], "base=maybe: expected true or false"),
        (["out=taken/a.safetensors"], "taken/a.safetensors could not be written"),
        (["out=a.safetensors", "rank=3"], "rank is 3; expected at most the adapter's rank, 2"),
        (["out=a.safetensors", "adapter=run"], "run is an unfinished run without adapter.safetensors; resume it"),
        (
            ["out=a.safetensors", "adapter=run/last.ckpt"],
            "run/last.ckpt is a training checkpoint; expected the adapter that its run writes at the end, run/adapter",
        ),
    ],
)
def test_export_reports_invalid_input(
    fails: Fails, tiny_weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"PK\x03\x04")
    assert message in fails("export", f"adapter={tiny_weights / 'adapter.safetensors'}", *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rnak=3", "argument 'lora.rnak=3': unknown key lora.rnak; the nearest known one is lora.rank"),
        ("train.steps=many", "argument 'train.steps=many': Value 'many'"),
        ("config=absent.yaml", "config absent.yaml does not exist"),
        ("lora.targets=[double_blocks.*.qvk]", "lora.targets: pattern 'double_blocks.*.qvk' matches no linear layer"),
        ("weights.transformer=absent.safetensors", "absent.safetensors does not exist; put the file there"),
        ("weights.transformer=cut.safetensors", "cut.safetensors: truncated: "),
        (
            "weights.rgba_autoencoder={}/autoencoder.safetensors",
            "autoencoder.safetensors is an autoencoder of 3 channels, expected 4",
        ),
        ("weights.autoencoder={}/transformer.safetensors", "its metadata do not describe a AutoencoderConfig"),
        ("weights.transformer=bare.safetensors", "bare.safetensors does not fit this MMDiT: 48 tensors found, 780"),
        ("fusion.num_heads=5", "fusion.num_heads = 5: expected a divisor of the transformer's width"),
        ("fusion.num_heads=0", "fusion.num_heads = 0: expected a divisor of the transformer's width"),
        ("run_dir=taken/run", "run_dir taken/run cannot be written"),
        ("resume=absent.ckpt", "resume=absent.ckpt: no such checkpoint"),
        ("train.devices=0", "train.devices is 0; expected at least 1"),
        ("data.scenes.size=100", "data.scenes.size: found 100, expected a positive multiple of 16"),
        ("data.source=triplets", "data.triplets names no index with a weight above 0"),
    ],
)
def test_train_reports_invalid_input(
    fails: Fails, tiny_weights: Path, tiny_overrides: list[str], tmp_path: Path, change: str, message: str
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "cut.safetensors").write_bytes((tiny_weights / "transformer.safetensors").read_bytes()[:-100])
    save_file(load_file(tiny_weights / "transformer.safetensors"), tmp_path / "bare.safetensors")
    change = change.replace("{}", str(tiny_weights))
    assert message in fails("train", f"config={CONFIGS / 'tiny.yaml'}", *tiny_overrides, "train.steps=1", change)


def test_missing_gated_weights_are_named_with_instructions(fails: Fails) -> None:
    output = fails("train", f"config={CONFIGS / 'flux_fill.yaml'}", "train.devices=1")
    assert "checkpoints/flux1-fill-dev/flux1-fill-dev.safetensors does not exist" in output
    assert "checkpoints/README.md" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected check=FILES, maps=FILES, or out=FILE and source= one of mulan, "),
        (["source=mulam", "out=a.safetensors"], "source=mulam: expected one of mulan, "),
        (["source=mulan", "root=."], "out= is missing; expected out=FILE"),
        (["source=backgrounds", "out=a.safetensors"], "root= is missing"),
        (["source=backgrounds", "out=a.safetensors", "rot=x"], "unknown key rot; the nearest known one is root"),
        (["source=backgrounds", "out=a.safetensors", "root=absent"], "absent is not a folder"),
        (["source=backgrounds", "out=a.safetensors", "root=.", "workers=two"], "workers=two: expected a whole number"),
        (["source=backgrounds", "out=a.safetensors", "root=.", "test_share=2"], "test_share=2; expected a number"),
        (["check=absent.safetensors"], "absent.safetensors does not exist"),
        (["check=absent.safetensors", "root=."], "unknown argument root=."),
        (["maps=absent.safetensors"], "absent.safetensors does not exist"),
        (["maps=absent.safetensors", "out=maps", "cue=depth"], "unknown argument cue=depth; expected check= or maps="),
    ],
)
def test_prepare_data_reports_invalid_input(fails: Fails, arguments: list[str], message: str) -> None:
    assert message in fails("prepare_data", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoints/flux1-fill-dev has no folder text_encoder, text_encoder_2, tokenizer, tokenizer_2"),
        (["tokens=0"], "tokens=0: expected at least 1"),
        (["dtype=int8"], "dtype=int8: expected one of float32, bfloat16"),
        (["promt=x"], "unknown argument promt=x; expected root= out= prompt="),
    ],
)
def test_embed_prompt_reports_invalid_input(fails: Fails, arguments: list[str], message: str) -> None:
    assert message in fails("embed_prompt", *arguments)


# The command line itself


def test_take_splits_arguments() -> None:
    own, rest = take(["a=1", "x.y=2", "a=3", "b", "c=d=e"], a="0", b="7", c=None)
    assert own == {"a": "3", "b": "7", "c": "d=e"} and rest == ["x.y=2", "b"]
    with pytest.raises(InputError, match="a= is missing; expected a=... c=..."):
        take([], a=None, b="1", c=None)


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["help"], ["image=absent.png", "--help"]])
def test_help_prints_the_module_docstring(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    run_command(TOOLS["decompose"].main, arguments)
    output = capsys.readouterr()
    assert output.out.startswith("Splits an image, or a folder of images") and "format=png,ora,psd" in output.out
    assert output.err == ""


def test_make_help_lists_every_target() -> None:
    # Within `make test`, the inner make would also print its folder.
    command = ["make", "--no-print-directory", "help"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    assert {line.split()[0] for line in listed.splitlines()} == {*targets[1].split()}


@pytest.mark.parametrize("target", ["train", "decompose", "embed-prompt", "evaluate", "export"])
def test_make_passes_paths_with_spaces(target: str) -> None:
    keys = ("CONFIG", "ADAPTER", "IMAGE", "MASK", "OUT", "ROOT", "LAYERS")
    command = ["make", "-n", "--no-print-directory", target, *(f"{key}=my {key.lower()}" for key in keys)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = {"train": 1, "decompose": 5, "embed-prompt": 1, "evaluate": 1, "export": 2}
    found = shlex.split(printed[printed.index(f"tools/{target.replace('-', '_')}.py") :])
    assert sum(" " in argument for argument in found) == expected[target]


@pytest.mark.parametrize("source", TOOLS["prepare_data"].READERS)
def test_the_settings_of_every_reader_are_documented(source: str) -> None:
    documented = (ROOT / "docs" / "data.md").read_text()
    for setting in fields(TOOLS["prepare_data"].READERS[source]):
        assert f"{setting.name}=" in documented or f"`{setting.name}`" in documented, setting.name


def test_a_run_error_exits_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> None:
        raise RunError("the disk is full")

    with pytest.raises(SystemExit) as stopped:
        run_command(full, [])
    assert stopped.value.code == 1 and capsys.readouterr().err == "error: the disk is full\n"


def test_an_out_of_memory_error_suggests_settings_that_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(SystemExit) as stopped:
        run_command(full, [])
    output = capsys.readouterr().err
    assert stopped.value.code == 1 and output.startswith("error: CUDA out of memory") and "sample.max_side" in output


def test_bugs_keep_their_traceback_and_interrupts_exit_with_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def bug(arguments: list[str]) -> None:
        raise ValueError("a bug")

    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="a bug"):
        run_command(bug, [])
    with pytest.raises(SystemExit) as stopped:
        run_command(interrupt, [])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_tool_run_as_a_process_prints_a_plain_error(tmp_path: Path, tiny_weights: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "decompose.py"), "image=absent.png", "mask=m.png"]
    adapter = f"adapter={tiny_weights / 'adapter.safetensors'}"
    done = subprocess.run([*command, adapter], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.png does not exist; expected an image file\n"
    assert not list(tmp_path.iterdir())
