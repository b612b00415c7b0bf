"""Which code trained a run, when, and in which precision: recorded in its checkpoints and weight files."""

import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from layerdecomp.files import source_sha256
from layerdecomp.tensor_files import Metadata
from layerdecomp.weights import HISTORY, creation_date, history

logger = logging.getLogger(__name__)
PACKAGE_SHA256 = source_sha256("**/*.py")
UNKNOWN = "unknown"  # a commit or precision


def source_commit() -> str:
    """The commit of the running code, marked -dirty if files differ from it; "unknown" if git does not track this file.

    These two are followed by the start of the sources' hash.
    """
    git = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    try:
        git(("git", "ls-files", "--error-unmatch", Path(__file__).name))  # or it is another repository's .venv
        commit = git(("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = UNKNOWN
    return f"{commit}-{PACKAGE_SHA256[:8]}" if commit.endswith(("-dirty", UNKNOWN)) else commit


class Provenance:
    """The commits and precisions that trained a run so far, the date of its last checkpoint, and the stages before it.

    Args:
        start: the weight file whose tensors the run goes on training, if any.
    """

    def __init__(self, start: Path | None = None) -> None:
        # Read now, since file and checkout may change during the run.
        self.history = [] if start is None else history(start)
        self._commit = source_commit()
        self._trained_by: list[str] = []
        self._precisions: list[str] = []  # unlike train.precision, never auto, which depends on the machine
        self._trained_on: str | None = None  # the date of the last checkpoint
        self._source: str | None = None  # the hash of the sources that wrote the checkpoint to resume from

    def begin(self, step: int, precision: str, *, warns: bool) -> None:
        """Records that this code trains in this precision from `step` on; warnings, if wanted, say what has changed."""
        if self._precisions and self._precisions[-1] not in (precision, UNKNOWN) and warns:
            logger.warning(
                "this run was trained in %s up to step %d, from where %s continues: train.precision=auto depends on "
                "the device, so use one of the same kind to go on as before",
                self._precisions[-1],
                step,
                precision,
            )
        self._precisions.append(precision)
        if self._source == PACKAGE_SHA256:  # other commits may have changed only docs
            return
        if self._trained_by and warns:
            logger.warning(
                "commit %s trained this run up to step %d, from where commit %s continues: if what they train differs, "
                "the weights are a mix (resume=never starts over)",
                self._trained_by[-1],
                step,
                self._commit,
            )
        self._trained_by.append(self._commit)

    def state(self) -> dict[str, Any]:
        """What a checkpoint that is written now keeps."""
        self._trained_on = creation_date()
        return {
            "by": list(self._trained_by),
            "in": list(self._precisions),
            "on": self._trained_on,
            "source": PACKAGE_SHA256,
            HISTORY: self.history,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state` in a checkpoint."""
        self._trained_by = list(state["by"])
        self._precisions = list(state.get("in", [UNKNOWN]))  # older checkpoints do not record them
        self._trained_on = state.get("on")
        self._source = state.get("source")
        self.history = state.get(HISTORY, self.history)

    def metadata(self) -> Metadata:
        """The entries of a weight file's metadata."""
        facts = {"commit": _distinct(self._trained_by), "date": self._trained_on or creation_date()}
        if self._precisions:
            facts["precision"] = _distinct(self._precisions)
        return {**facts, HISTORY: json.dumps(self.history)} if self.history else facts


def _distinct(names: Sequence[str]) -> str:
    return " + ".join(dict.fromkeys(names))  # in order
