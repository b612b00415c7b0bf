"""Ablation: trains config variants with several seeds each, and compares them in a table and a plot."""

import gc
import io
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from layerdecomp.config import DecomposerJobConfig, changed_keys, load_config
from layerdecomp.errors import InputError, needs_extra
from layerdecomp.files import atomic_write
from layerdecomp.manifest import SHA256_KEYS
from layerdecomp.metrics.layers import METRICS
from layerdecomp.overrides import merge_config, read_yaml
from layerdecomp.tables import markdown_table, metric_title, metric_value
from layerdecomp.tensor_files import read_metadata
from layerdecomp.training.runs import build_job, train

SHOWN = ("background/psnr", "background/psnr_mask", "foreground/alpha_iou", "foreground/hidden_iou")
PUBLISHED = "background/psnr"  # what the paper's ablation reports
Results = dict[str, dict[str, dict[str, float | None]]]  # row -> seed -> metric -> value, None where undefined


@dataclass
class AblationConfig:
    """The runs to compare: every row with every seed. The first row is the reference for the others."""

    base: str = "configs/tiny.yaml"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of training; held-out scenes use evaluate.seed
    overrides: list[str] = field(default_factory=list)  # for every run
    rows: dict[str, list[str]] = field(default_factory=dict)  # name -> the row's overrides
    paper: dict[str, float] = field(default_factory=dict)  # row -> its published background PSNR in dB
    curves: dict[str, list[str]] = field(default_factory=dict)  # key -> rows to draw as a curve over its values

    def __post_init__(self) -> None:
        named = [*self.paper, *(row for rows in self.curves.values() for row in rows)]
        if unknown := [row for row in named if row not in self.rows]:
            raise InputError(f"paper or curves name the row {unknown[0]!r}; expected some of {', '.join(self.rows)}")
        if self.paper and self.reference not in self.paper:
            raise InputError(f"paper lacks {self.reference}, the reference row; add its figure")

    @property
    def reference(self) -> str:
        return next(iter(self.rows))


@dataclass(frozen=True)
class Run:
    """One training run of a row."""

    row: str
    config: DecomposerJobConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").is_file()


def ablate(path: Path, out: Path, overrides: Sequence[str]) -> None:
    """Trains the runs that are not finished, and updates results.json, table.md and the plot in `out`.

    Args:
        path: YAML of an `AblationConfig`.
        out: has a folder <row>-<seed> for every run.
        overrides: `key=value` for every run; a row's own value for the same key takes precedence.

    Raises:
        InputError: files or overrides of any run cannot be used; nothing has been trained then.
    """
    with needs_extra("the plot", "plots"):
        import matplotlib.figure  # noqa: F401
    config = merge_config(AblationConfig(), [(str(path), read_yaml(path))], [])
    config.overrides += overrides
    runs = plan(config, out)
    if not runs:
        raise InputError(f"{path}: rows or seeds are empty; expected at least one of each")
    for run in with_progress(runs):
        train(run.config)
        # A finished job is in reference cycles, which Python frees at some later time: the next one needs its memory.
        gc.collect()
        torch.cuda.empty_cache()
        report(config, runs, out)
    print(report(config, runs, out))
    print(f"table, figures and plot: {out}/table.md, results.json and {out.name}.png")


def plan(config: AblationConfig, out: Path) -> list[Run]:
    """All runs, checked; ordered by seed, so that the first seed's table is complete early."""
    runs = [
        _run(config, row, seed, out / f"{row}-{seed}", [*config.overrides, *switches])
        for seed in config.seeds
        for row, switches in config.rows.items()
    ]
    for run in {run.row: run for run in runs if not run.finished}.values():
        with _naming(run.row):
            build_job(run.config)  # checks that the files exist and fit the settings
    return runs


def _run(config: AblationConfig, row: str, seed: int, folder: Path, overrides: Sequence[str]) -> Run:
    own = {"name": folder.name, "run_dir": folder, "seed": seed, "resume": "auto"}
    with _naming(row):
        if taken := [text for text in overrides if text.partition("=")[0] in own]:
            raise InputError(f"argument {taken[0]!r}: {', '.join(own)} are set for each run; leave it out")
        described = load_config(config.base, [*overrides, *(f"{key}={value}" for key, value in own.items())])
        if not isinstance(described, DecomposerJobConfig):
            raise InputError(f"{config.base} describes a {described.job} job; expected a decomposer job")
        if described.train.processes > 1:
            raise InputError("an ablation trains in one process; leave train.devices and train.nodes at 1")
        if "adapted" not in described.evaluate.rows:
            raise InputError(f"evaluate.rows is {described.evaluate.rows}; expected it to include adapted")
        for key in config.curves:
            number(described, key)
        run = Run(row, described)
        _check_kept(run)
    return run


def _check_kept(run: Run) -> None:
    """Raises `InputError` if the run's folder holds one with other settings or, if finished, weights or evaluation."""
    changed: list[str] = []
    resumable = (run.folder / "last.ckpt").is_file()
    if run.finished or resumable:  # a finished run may lack its checkpoint
        changed += changed_keys(run.config, run.folder / "config.yaml", evaluated=run.finished)
    if run.finished:
        kept, now = read_metadata(run.folder / "adapter.safetensors"), run.config.to_metadata()
        changed += [key for key in SHA256_KEYS.values() if kept.get(key) != now.get(key)]
    if changed:
        again = "; to only evaluate it again, its metrics.json" if resumable else ""
        raise InputError(
            f"{run.folder} holds a run with other settings or weights ({', '.join(changed[:5])}); choose another out=, "
            f"or move that folder away to train it again{again}"
        )


@contextmanager
def _naming(row: str) -> Iterator[None]:
    """Adds the row's name to an error."""
    try:
        yield
    except InputError as error:
        raise InputError(f"row {row}: {error}") from error


def number(config: DecomposerJobConfig, key: str) -> float:
    """The value of a dotted key."""
    try:
        return float(reduce(getattr, key.split("."), config))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"curves has {key!r}; expected a key of the config that has a number") from error


def with_progress(runs: Sequence[Run]) -> Iterator[Run]:
    """Yields the unfinished runs, printing progress and the estimated time left before each."""
    waiting = [run for run in runs if not run.finished]
    steps = [run.config.train.steps for run in waiting]
    started = time.monotonic()
    for done, run in enumerate(waiting):
        line = f"{len(runs) - len(waiting) + done} of {len(runs)} runs finished"
        if done:
            left = (time.monotonic() - started) * sum(steps[done:]) / sum(steps[:done])
            line += f", about {timedelta(seconds=round(left))} left"
        print(f"{line}; now {run.folder.name}", flush=True)
        yield run


def report(config: AblationConfig, runs: Sequence[Run], out: Path) -> str:
    """Writes results.json, table.md and the plot of the finished runs, of which there must be at least one."""
    finished = [run for run in runs if run.finished]
    documents = [json.loads((run.folder / "metrics.json").read_text()) for run in finished]
    results: Results = {}
    for run, document in zip(finished, documents, strict=True):
        results.setdefault(run.row, {})[str(run.config.seed)] = document["results"]["adapted"]
    summary = {row: {name: mean_and_spread(values(results, row, name)) for name in METRICS} for row in results}
    protocol = {
        "ablation": asdict(config),
        "summary": "mean and sample standard deviation over seeds",
        "evaluation": _shared([document["protocol"] for document in documents]),
    }
    document = {"protocol": protocol, "results": results, "summary": summary}
    atomic_write(out / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    table = format_rows(config, results)
    atomic_write(out / "table.md", table + "\n")
    atomic_write(out / f"{out.name}.png", draw(config, {run.row: run.config for run in runs}, results))
    return table


def _shared(protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The protocol entries that are equal for all runs, unlike an adapter's digest, timings, and a row's switches."""
    return {key: value for key, value in protocols[0].items() if all(other.get(key) == value for other in protocols)}


def values(results: Results, row: str, name: str) -> list[float]:
    """A metric's values for the seeds of a row, where it is defined."""
    return [value for figures in results[row].values() if (value := figures.get(name)) is not None]


def differences(results: Results, row: str, other: str, name: str) -> list[float]:
    """A row's difference from another, seed by seed: with the same seed, all rows have the same scenes and noise."""
    pairs = [
        (figures.get(name), results.get(other, {}).get(seed, {}).get(name)) for seed, figures in results[row].items()
    ]
    return [a - b for a, b in pairs if a is not None and b is not None]


def mean_and_spread(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None if there are too few numbers."""
    mean = statistics.fmean(numbers) if numbers else None
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else None


def format_rows(config: AblationConfig, results: Results) -> str:
    """A table: per row, mean ± standard deviation over seeds, and the paper's figures if the config has any."""
    table = [["row", "seeds", *map(metric_title, SHOWN)]]
    if config.paper:
        table[0] += [f"{PUBLISHED} − {config.reference}'s", "the paper's", "same order"]
    for row in results:
        table.append([row, str(len(results[row])), *(_cell(name, values(results, row, name)) for name in SHOWN)])
        if config.paper:
            table[-1] += _beside_the_paper(config, results, row)
    return markdown_table(table)


def _cell(name: str, numbers: Sequence[float]) -> str:
    mean, spread = (math.nan if number is None else number for number in mean_and_spread(numbers))
    return metric_value(name, mean, spread)


def _beside_the_paper(config: AblationConfig, results: Results, row: str) -> list[str]:
    """Our difference from the first row, the published figure and difference, and whether they have the same sign."""
    published = config.paper.get(row)
    if row == config.reference:
        return ["", f"{published:.2f}", ""]
    ours = differences(results, row, config.reference, PUBLISHED)
    if published is None:
        return [_cell(PUBLISHED, ours), "", ""]
    theirs = published - config.paper[config.reference]
    return [_cell(PUBLISHED, ours), f"{published:.2f} ({theirs:+.2f})", same_order(ours, theirs)]


def same_order(ours: Sequence[float], theirs: float) -> str:
    """Whether the differences from the first row, one per seed, have the published sign: all (yes) or none (no)."""
    found = {difference * theirs > 0 for difference in ours}
    return "seeds disagree" if len(found) > 1 else "yes" if True in found else "no" if found else ""


def draw(config: AblationConfig, settings: Mapping[str, DecomposerJobConfig], results: Results) -> bytes:
    """A PNG with a column per shown metric: the curves, then the other rows' differences from the first row.

    Error bars are standard deviations over seeds.
    """
    from matplotlib.figure import Figure  # here, because it is optional

    curves = {key: [row for row in rows if row in results] for key, rows in config.curves.items()}
    on_curves = {row for rows in curves.values() for row in rows}
    bars = [row for row in results if row != config.reference and (row in config.paper or row not in on_curves)]
    lines = len(curves) + bool(bars)
    figure = Figure(figsize=(3.5 * len(SHOWN), 3 * max(lines, 1)), layout="constrained")
    grid = figure.subplots(max(lines, 1), len(SHOWN), squeeze=False)
    for line, (key, rows) in zip(grid, curves.items(), strict=False):
        x = [number(settings[row], key) for row in rows]
        for panel, name in zip(line, SHOWN, strict=True):
            panel.errorbar(x, *_error_bars([values(results, row, name) for row in rows]), marker="o", capsize=3)
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.set(title=metric_title(name), xlabel=key)
    for panel, name in zip(grid[-1] if bars else [], SHOWN, strict=bool(bars)):
        means, spreads = _error_bars([differences(results, row, config.reference, name) for row in bars])
        panel.barh(bars, means, xerr=spreads, capsize=3)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.invert_yaxis()
        panel.tick_params(labelleft=panel is grid[-1][0])
        panel.set(title=metric_title(name), xlabel=f"minus {config.reference}'s")
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()


def _error_bars(series: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations of several series, NaN where there is none."""
    pairs = [[math.nan if number is None else number for number in mean_and_spread(numbers)] for numbers in series]
    return [mean for mean, _ in pairs], [spread for _, spread in pairs]
