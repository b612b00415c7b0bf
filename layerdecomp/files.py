"""Files and folders that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layerdecomp.errors import InputError


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a name to write to, beside `path`, and renames that file or folder to `path` when it is complete.

    The name begins with a dot, keeps its extension, and is no other process's: several may write one file.

    Raises:
        InputError: from any `OSError` meanwhile; what was at `path` still is, then.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error}); free some space or choose another place") from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a text (in UTF-8) or bytes; as `written_whole`."""
    with written_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
