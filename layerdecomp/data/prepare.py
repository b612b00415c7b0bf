"""Builds an index: worker processes open and check every candidate; an interrupted run resumes where it stopped."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from tqdm import tqdm

from layerdecomp.data.index import TEST_SHARE, Index, Item, Reader, check_name, write_index
from layerdecomp.errors import InputError, RunError
from layerdecomp.files import atomic_write, remedy

T = TypeVar("T")
R = TypeVar("R")
SHOWN = 10  # faults to print; the file lists all of them
CHUNK = 32  # inputs per task of a worker


@dataclass(frozen=True)
class Outcome:
    """The result for a candidate: an item, a fault, or neither if the reader's settings exclude it."""

    candidate: str
    item: Item | None = None
    fault: str | None = None  # names the file


def prepare(reader: Reader, out: Path, workers: int = 1, test_share: float = TEST_SHARE) -> list[Outcome]:
    """Opens every candidate of a reader and writes an index of the valid ones to `out`.

    Progress is recorded in a journal beside `out`, so that the same command resumes after an interruption. Faulty
    candidates are listed in a text file beside it and do not stop the run.

    Returns:
        The outcome of every candidate, in order.

    Raises:
        InputError: there are no candidates, none is valid, two have the same id, or `out` cannot be written.
        RunError: a worker was killed, or what a reader makes cannot be written; the journal is kept.
    """
    check_name(str(reader.root.resolve()))
    candidates = reader.candidates()
    if not candidates:
        raise InputError(f"{reader.root}: nothing for source={reader.source}; docs/data.md shows the expected layout")
    journal = out.with_name(f".{out.name}.journal")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        done = _read_journal(journal, reader)
        left = [candidate for candidate in candidates if candidate not in done]
        with journal.open("a") as file, tqdm(total=len(candidates), initial=len(done), unit="item") as progress:
            if not file.tell():
                _note(file, _describe(reader))
            for outcome in parallel(partial(_read, reader), left, workers):
                _note(file, asdict(outcome))
                done[outcome.candidate] = outcome
                progress.update()
        outcomes = [done[candidate] for candidate in candidates]
        _finish(reader, out, outcomes, test_share)
        journal.unlink()
    except OSError as error:
        fault = f"{out} could not be written ({error}); {remedy(error, out.parent)} or choose another `out`"
        raise InputError(fault) from error
    return outcomes


def _finish(reader: Reader, out: Path, outcomes: list[Outcome], test_share: float) -> None:
    items = [outcome.item for outcome in outcomes if outcome.item is not None]
    faults = [outcome.fault for outcome in outcomes if outcome.fault is not None]
    listing = out.with_suffix(".faults.txt")
    if faults:
        listing.write_text("\n".join(faults) + "\n")
    else:
        listing.unlink(missing_ok=True)
    if not items:
        first = f"; the first of {len(faults)} faults: {faults[0]}" if faults else ""
        raise InputError(f"{reader.root}: none of {len(outcomes)} candidates can be used{first}")
    write_index(out, reader, items, test_share)
    splits = _describe_splits(Index(out), test_share)
    left_out = len(outcomes) - len(items) - len(faults)
    print(f"{out}: {splits}; {left_out} left out, {len(faults)} faulty")
    print_some(faults, f"all in {listing}")


def _describe_splits(index: Index, test_share: float) -> str:
    held_out = len(index.rows("test"))
    counts = f"{len(index)} items, {len(index) - held_out} for training and {held_out} held out"
    if held_out == 0 < test_share:
        return f"{counts} (nothing to validate or evaluate on: index more items, or use a larger test_share=)"
    if held_out == len(index) and test_share < 1:
        return f"{counts} (nothing to train on: index more items, or use a smaller test_share=)"
    return counts


def print_some(faults: Sequence[str], rest: str) -> None:
    """Prints the first faults, and where to find the rest."""
    for fault in faults[:SHOWN]:
        print(f"  {fault}")
    if len(faults) > SHOWN:
        print(f"  ... {rest}")


def _describe(reader: Reader) -> dict[str, Any]:
    """The settings that the outcomes depend on, as JSON."""
    return {"reader": f"{type(reader).__name__} {reader!r}"}


def _note(file: IO[str], entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _read_journal(journal: Path, reader: Reader) -> dict[str, Outcome]:
    """Candidate -> outcome of an interrupted run; empty if its settings differ or the journal is damaged.

    Faulty candidates are read again: they may have been repaired since.
    """
    if not journal.is_file():
        return {}
    try:
        lines = journal.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # truncated by the interruption
            lines.pop()
        done = _parse_journal(lines, reader)
    except (ValueError, TypeError):  # includes invalid UTF-8, invalid JSON and other fields
        os.replace(journal, journal.with_suffix(".old"))
        return {}
    atomic_write(journal, "".join(lines))  # a full disk leaves it as it was
    return done


def _parse_journal(lines: list[str], reader: Reader) -> dict[str, Outcome]:
    """The outcomes without a fault in a journal's lines; `ValueError` if the settings differ."""
    entries = [json.loads(line) for line in lines]
    if not entries or entries[0] != _describe(reader):
        raise ValueError("a journal of other settings")
    outcomes = [_outcome(**entry) for entry in entries[1:]]
    return {outcome.candidate: outcome for outcome in outcomes if outcome.fault is None}


def _outcome(candidate: str, item: dict[str, Any] | None, fault: str | None) -> Outcome:
    return Outcome(candidate, None if item is None else Item(**item), fault)


def _read(reader: Reader, candidate: str) -> Outcome:
    try:
        check_name(candidate)
        return Outcome(candidate, reader.read(candidate))
    except InputError as error:
        return Outcome(candidate, fault=str(error))


def parallel(function: Callable[[T], R], inputs: Sequence[T], workers: int, chunk: int = CHUNK) -> Iterator[R]:
    """Maps a function over inputs in worker processes, in order; the function is sent to each worker once.

    Workers take `chunk` inputs at a time. Use 1 if each takes seconds, so that progress is visible.

    Raises:
        RunError: a worker was killed.
    """
    if workers <= 1:
        yield from map(function, inputs)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(function,))
    try:
        yield from pool.map(_call, inputs, chunksize=chunk)
    except BrokenProcessPool as error:
        raise RunError(
            f"one of {workers} workers died, often for lack of memory; rerun the command with fewer workers= to resume"
        ) from error
    finally:  # on an interruption, drop the pending inputs
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)  # the workers share the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker if its parent is killed; otherwise it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(argument: Any) -> Any:
    return _function(argument)
