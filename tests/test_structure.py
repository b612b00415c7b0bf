"""The order of the package's modules: which of them, and which libraries, each may import."""

import ast
from pathlib import Path

import pytest

from layerdecomp.comparison import ROW_SOURCES
from layerdecomp.decomposer import SOURCES

ROOT = Path(__file__).resolve().parent.parent
# A module may only import modules listed before it.
ORDER = [
    # level 0: tensors and images
    *("__init__", "errors", "files", "overrides"),
    *("models.__init__", "models.attention", "models.blocks", "models.mmdit", "models.lora"),
    *("models.context_fusion", "models.autoencoder", "models.depth"),
    *("conditioning", "flow", "sampling"),
    *(
        "imaging.__init__",
        "imaging.compositing",
        "imaging.masks",
        "imaging.layered",
        "imaging.layers",
        "imaging.geometry",
        "imaging.cues",
    ),
    "resizing",
    *("metrics.__init__", "metrics.region", "metrics.background", "metrics.foreground", "metrics.perceptual"),
    *("metrics.distribution", "metrics.recomposition", "metrics.layers"),
    # level 1: the assembled model, files, data and metrics
    *("quantization", "layouts", "tensor_files", "cli", "weights", "manifest", "inpainting", "decomposer", "sharding"),
    *("adapters", "incoming", "modelcard", "export", "text"),
    *("data.__init__", "data.index", "data.prepare", "data.alpha"),
    *("data.folders", "data.layerdiffuse", "data.openimages", "data.annotation", "data.mulan"),
    *("data.sample", "data.textures", "data.shapes", "data.scenes"),
    *("data.loading", "data.check", "data.maps", "data.blending", "data.triplets", "data.benchmark"),
    *("data.latents", "data.datamodule", "data.testset"),
    *(
        "baselines",
        "metric_networks",
        "predictions",
        "grids",
        "tables",
        "evaluation",
        "report",
        "comparison",
        "bulk",
        "benchmark",
        "reference",
        "memory",
    ),
    # level 2: configuration
    *("config", "dry_run"),
    # level 3: training
    *(
        "training.__init__",
        "training.muon",
        "training.deferred",
        "training.checkpoints",
        "training.faults",
        "training.provenance",
        "training.base",
        "training.average",
        "training.projection",
        "training.autoencoder",
        "training.flow",
        "training.inpainter",
        "training.decomposer",
    ),
    *("training.runs", "ablation"),
]
FILES = {
    ".".join(path.relative_to(ROOT / "layerdecomp").with_suffix("").parts): path
    for path in sorted((ROOT / "layerdecomp").rglob("*.py"))
}
TOOLS = sorted((ROOT / "tools").glob("*.py"))
MODELS = [name for name in FILES if name.startswith("models.")]


def imported(path: Path) -> set[str]:
    """Dotted names of the modules, and of the names in them, that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    inside = {name.removeprefix("layerdecomp").lstrip(".") or "__init__" for name in imported(path) if _ours(name)}
    return {found for name in inside for found in (name, f"{name}.__init__") if found in FILES}


def _ours(name: str) -> bool:
    return name.split(".")[0] == "layerdecomp"


def test_every_module_is_listed() -> None:
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_modules_import_only_modules_listed_before_them(name: str) -> None:
    later = own(FILES[name]) - set(ORDER[: ORDER.index(name)])
    assert not later, f"{name} imports modules listed after it: {sorted(later)}"


def reached(*names: str) -> set[str]:
    """The modules that the given ones import, directly or not, and themselves."""
    found, left = set[str](), {*names}
    while left:
        found |= left
        left = set.union(*(own(FILES[name]) for name in left)) - found
    return found


def test_the_hashed_sources_cover_all_imports_that_affect_layers() -> None:
    neutral = {"__init__", "errors", "files"}
    scoring = {"metric_networks", "grids", "report", "tables"}
    scoring |= {name for name in FILES if name.startswith("metrics.")}
    for name, patterns in (("decomposer", SOURCES), ("comparison", ROW_SOURCES)):
        matched = {path for pattern in patterns for path in (ROOT / "layerdecomp").glob(pattern)}
        assert {FILES[found] for found in reached(name) - neutral - scoring} <= matched
        assert not matched & {FILES[other] for other in scoring | {"config", "training.base"}}


@pytest.mark.parametrize("tool", ["decompose", "export", "embed_prompt", "prepare_data"])
def test_tools_that_do_not_train_start_without_the_training_framework(tool: str) -> None:
    """Importing lightning and torchmetrics takes longer than all else."""
    path = ROOT / "tools" / f"{tool}.py"
    libraries = set.union(*(imported(file) for file in (path, *(FILES[name] for name in reached(*own(path))))))
    assert not {name for name in libraries if name.split(".")[0] in {"lightning", "torchmetrics", "torchvision"}}


def test_imports_are_detected() -> None:
    assert {"models.mmdit", "weights", "imaging.layers"} <= own(FILES["decomposer"])
    assert {"metrics.background", "metrics.__init__"} <= own(FILES["metrics.layers"])


@pytest.mark.parametrize("name", MODELS)
def test_models_import_no_framework(name: str) -> None:
    allowed = {"torch", "einops", "timm", "layerdecomp"}
    allowed |= {
        "collections",
        "contextlib",
        "dataclasses",
        "difflib",
        "fnmatch",
        "functools",
        "itertools",
        "math",
        "typing",
    }
    assert {module.split(".")[0] for module in imported(FILES[name])} <= allowed


@pytest.mark.parametrize("path", [*FILES.values(), *TOOLS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_reference_implementation_is_imported(path: Path) -> None:
    # Optional extras: the prompt embedding, and the benchmark against diffusers.
    needed = {FILES["text"]: {"transformers"}, FILES["reference"]: {"diffusers", "peft"}}.get(path, set())
    foreign = {"diffusers", "transformers", "accelerate", "peft", "tests"}
    assert {name.split(".")[0] for name in imported(path)} & foreign == needed


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_tools_are_short_and_print_errors_plainly(path: Path) -> None:
    assert "cli" in own(path) and "run_command(main, sys.argv[1:])" in path.read_text()
    assert len(path.read_text().splitlines()) <= 80
