"""No file, name or config may run code or reach outside the given folders."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from layerdecomp.config import load_config
from layerdecomp.data.folders import BackgroundFolder, RoremFolder, TripletFolder, part_path
from layerdecomp.data.index import Index, Item
from layerdecomp.data.loading import layer_paths
from layerdecomp.data.maps import write_maps
from layerdecomp.data.mulan import MulanAnnotations
from layerdecomp.data.prepare import prepare
from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import read_image
from layerdecomp.tensor_files import read_metadata
from layerdecomp.weights import config_from

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "layerdecomp").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
# Calls that run programs, or code found in data; a dotted name matches if it ends in one of these.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "cloudpickle.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle", "torch.hub.load"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "pty.spawn", "subprocess.getoutput"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "OmegaConf.register_new_resolver"),
    *("importlib.import_module", "hydra.utils.instantiate", "runpy.run_path", "shutil.unpack_archive"),
    *("tarfile.extractall", "extractall", "tempfile.mktemp", "torch.jit.load", "numpy.fromfile"),
}
# Exceptions, and why they are safe.
ALLOWED = {
    "layerdecomp/data/annotation.py": {"pickle.Unpickler"},  # a base; the subclass builds nothing that a file names
}


def calls(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Dotted names of everything that a file calls, derives from or imports by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.ClassDef):
            yield from ((ast.unparse(base), node) for base in node.bases)
        elif isinstance(node, ast.ImportFrom):  # may be called by another name
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def dangerous_calls(path: Path) -> list[str]:
    found, allowed = [], ALLOWED.get(str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "", set())
    for name, node in calls(path):
        options = {word.arg: ast.unparse(word.value) for word in getattr(node, "keywords", [])}
        bare = "." not in name
        risky = name in FORBIDDEN or (not bare and any(name.endswith(f".{end}") for end in FORBIDDEN if "." in end))
        if name.endswith("torch.load"):
            risky = options.get("weights_only") != "True"
        if name in ("np.load", "numpy.load"):
            risky = options.get("allow_pickle", "False") != "False"
        if options.get("shell", "False") != "False":
            risky = True
        if risky and name not in allowed:
            found.append(f"{path.name}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_dangerous_is_called(path: Path) -> None:
    assert dangerous_calls(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(text)",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "class Reader(pickle.Unpickler): pass",
        "importlib.import_module(name)",
    ],
)
def test_dangerous_calls_are_detected(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.py").write_text(f"def f(path, text, name):\n    {line}\n")
    assert len(dangerous_calls(tmp_path / "a.py")) == 1


@pytest.mark.parametrize("text", ["torch.load(p, weights_only=True)", "model.eval()", "re.compile(p)", "np.load(p)"])
def test_harmless_calls_are_not_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(text)
    assert dangerous_calls(tmp_path / "a.py") == []


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:os"])
def test_a_config_runs_nothing(tmp_path: Path, tag: str) -> None:
    (tmp_path / "a.yaml").write_text(f"job: decomposer\nname: {tag} ['{tmp_path}/owned']\n")
    with pytest.raises(InputError, match="is not readable YAML"):
        load_config(tmp_path / "a.yaml")
    assert not (tmp_path / "owned").exists()


def test_a_downloaded_file_cannot_read_the_environment() -> None:
    from layerdecomp.data.datamodule import DataConfig

    with pytest.raises(InputError, match="interpolation"):
        config_from(DataConfig, '{"source": "${oc.env:HOME}"}', "a.safetensors")


def test_reading_an_image_starts_no_program(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")  # Pillow would hand it to Ghostscript
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(path)


# Paths

OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", ".."]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of three triplets."""
    for part in ("image", "mask", "foreground", "background"):
        (tmp_path / "data" / part).mkdir(parents=True)
    half = np.zeros((8, 8), np.uint8)
    half[2:5, 2:5] = 255
    for stem in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/image/{stem}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/background/{stem}.png")
        Image.fromarray(half).save(tmp_path / f"data/mask/{stem}.png")
        Image.fromarray(np.dstack([half] * 4)).save(tmp_path / f"data/foreground/{stem}.png")
    prepare(TripletFolder(tmp_path / "data"), tmp_path / "a.safetensors", test_share=0)
    return tmp_path / "a.safetensors"


def forge(index: Path, column: str, text: str) -> Index:
    """The same index with other text in the first row of a column."""
    columns = load_file(index)
    rest = columns[f"{column}.text"][columns[f"{column}.ends"][0] :]
    added = len(text.encode()) - columns[f"{column}.ends"][0]
    columns[f"{column}.text"] = np.concatenate([np.frombuffer(text.encode(), np.uint8), rest])
    columns[f"{column}.ends"] = columns[f"{column}.ends"] + added
    save_file(columns, index, read_metadata(index))
    return Index(index)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_name_files_outside_its_folder(index: Path, tmp_path: Path, name: str) -> None:
    forged = forge(index, "id", name)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=r"a\.safetensors: row 0: .* is not a path below a folder"):
        forged[0]
    with pytest.raises(InputError, match="not a path below"):
        write_maps(forged, ["edge"], Path("none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert forged[1].id == "b"
    forged = forge(index, "path", json.dumps({"image": name, "mask": "mask/a.png"}))
    with pytest.raises(InputError, match="row 0"):
        forged[0]


@pytest.mark.parametrize("text", ["[]", "{", '{"image": 3}', "\udcff", "null"])
def test_an_index_with_invalid_paths_is_one_error(index: Path, text: str) -> None:
    columns = load_file(index)
    raw = text.encode("utf-8", "surrogateescape")
    columns["path.text"] = np.frombuffer(raw * 3, np.uint8)
    columns["path.ends"] = np.arange(1, 4, dtype=np.int64) * len(raw)
    save_file(columns, index, read_metadata(index))
    with pytest.raises(InputError, match="row 0: "):
        Index(index)[0]


def test_a_layer_template_is_not_evaluated_as_a_format_string(tmp_path: Path) -> None:
    item = Item("a", "{layer.__class__}-{layer}.png", 8, 8, layers=2)
    assert [path.name for path in layer_paths(tmp_path, item)] == ["{layer.__class__}-0.png", "{layer.__class__}-1.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_rorem_records_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "meta.json").write_text(json.dumps([{"source": name, "mask": "m.png", "GT": "g.png"}]))
    with pytest.raises(InputError, match="expected a path below|a path"):
        RoremFolder(tmp_path).read(RoremFolder(tmp_path).candidates()[0])


def test_annotations_cannot_name_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.jpg")
    for name in ("...p.zl", "..p.zl"):  # the id would be "..", or "."
        (tmp_path / "annotations" / name).write_bytes(b"")
    reader = MulanAnnotations(tmp_path / "annotations", tmp_path / "images", tmp_path / "layers")
    with pytest.raises(InputError, match="holds no pictures"):
        reader.candidates()


def test_unusual_but_valid_names_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a..b.png", "ünï.png", "x y.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name)
    prepare(BackgroundFolder(tmp_path / "data"), tmp_path / "a.safetensors")
    assert [item.path for item in Index(tmp_path / "a.safetensors")] == ["a..b.png", "x y.png", "ünï.png"]


def test_a_part_is_looked_up_by_its_name(tmp_path: Path) -> None:
    item = Item("a", json.dumps({"image": "image/a.png"}), 8, 8)
    assert part_path(tmp_path, item, "image") == tmp_path / "image/a.png"
    with pytest.raises(InputError, match="has no mask"):
        part_path(tmp_path, item, "mask")


def test_a_pickled_weight_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a pickled checkpoint or archive, not safetensors"):
        read_metadata(tmp_path / "a.safetensors")
