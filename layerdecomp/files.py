"""Atomic writes (files and folders that appear complete or not at all), and what identifies their settings and code."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layerdecomp.errors import InputError, WriteError


def remedy(error: OSError, folder: Path) -> str:
    """What to do about a failed write to a folder, as the end of an error message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space in {folder}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"make {folder} writable"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "rename the file that is where a folder is needed"
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY):
        return "rename the folder of that name"
    if error.errno == errno.EFBIG:
        return f"allow larger files in {folder} (ulimit -f)"
    return f"check the disk of {folder}"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, and renames the file or folder written there to `path` at the end.

    The name begins with a dot, keeps the extension, and is unique: several processes may write the same file.

    Raises:
        WriteError: on any `OSError` within the context; an existing `path` is then unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        fault = f"{path} could not be written ({error}); {remedy(error, path.parent)} or choose another place"
        raise WriteError(fault) from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of the files beside `path` as JSON; `InputError` if those were made with other settings."""
    settings = json.loads(json.dumps(settings))  # as they are read back
    try:
        before = json.loads(path.read_text()) if path.is_file() else settings
        if changed := [key for key in settings if before.get(key, "unknown") != settings[key]]:
            raise InputError(
                f"{path}: existing files were made with {changed[0]}={before.get(changed[0], 'unknown')}, now it is "
                f"{settings[changed[0]]}; choose another folder, or remove that one"
            )
        atomic_write(path, json.dumps(settings, indent=2) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be used ({error}); choose another folder") from error


def source_sha256(*patterns: str) -> str:
    """Hash of the package's source files that match the patterns, such as models/*.py.

    For code that has been imported, call it at import as well: the files may change while the process runs.
    """
    package = Path(__file__).parent
    files = sorted({path for pattern in patterns for path in package.glob(pattern)})
    assert files, f"no source files match {patterns} in {package}"
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes; see `atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
