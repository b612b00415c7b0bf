"""Which code trained a run, and when: recorded in its checkpoints and weight files."""

import json
import logging
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from layerdecomp.files import source_sha256
from layerdecomp.tensor_files import Metadata
from layerdecomp.weights import HISTORY, creation_date, history

logger = logging.getLogger(__name__)
PACKAGE_SHA256 = source_sha256("**/*.py")


def source_commit() -> str:
    """The commit of the running code, marked -dirty if files differ from it; "unknown" if git does not track this file.

    These two are followed by the start of the sources' hash.
    """
    git = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    try:
        git(("git", "ls-files", "--error-unmatch", Path(__file__).name))  # or it is another repository's .venv
        commit = git(("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{commit}-{PACKAGE_SHA256[:8]}" if commit.endswith(("-dirty", "unknown")) else commit


class Provenance:
    """The commits that trained a run so far, the date of its last checkpoint, and the stages before the run.

    Args:
        start: the weight file whose tensors the run goes on training, if any.
    """

    def __init__(self, start: Path | None = None) -> None:
        # Read now, since file and checkout may change during the run.
        self.history = [] if start is None else history(start)
        self._commit = source_commit()
        self._trained_by: list[str] = []
        self._trained_on: str | None = None  # the date of the last checkpoint
        self._source: str | None = None  # the hash of the sources that wrote the checkpoint to resume from

    def begin(self, step: int, *, warns: bool) -> None:
        """Records that this code trains from `step` on; a warning, if wanted, says that other code came before."""
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
            "on": self._trained_on,
            "source": PACKAGE_SHA256,
            HISTORY: self.history,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from the `state` in a checkpoint."""
        self._trained_by = list(state["by"])
        self._trained_on = state.get("on")
        self._source = state.get("source")
        self.history = state.get(HISTORY, self.history)

    def metadata(self) -> Metadata:
        """The entries of a weight file's metadata."""
        commits = dict.fromkeys(self._trained_by)  # distinct ones, in order
        facts = {"commit": " + ".join(commits), "date": self._trained_on or creation_date()}
        return {**facts, HISTORY: json.dumps(self.history)} if self.history else facts
