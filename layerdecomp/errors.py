"""Exceptions that are not bugs of this package: wrong input, or a failure of the environment."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import SupportsIndex


class InputError(ValueError):
    """A file, key or value from the user cannot be used.

    The message names the file or key, what was found, what was expected and what to do. The command-line tools print it
    without a traceback and exit with status 2; anything else that is raised is a bug and keeps its traceback.
    """


class WriteError(InputError):
    """A file cannot be written to the place that the user chose, because the disk is full, for example."""


class RunError(RuntimeError):
    """A run cannot continue, for a reason outside the code: a full disk, a dead process, a loss that is not finite.

    The message says what happened, what is kept and what to do. The command-line tools print it without a traceback and
    exit with status 1.
    """


def first_few(names: Sequence[str], count: int = 10) -> str:
    """Names for a message: the first `count` of them, and whether there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Turns a failed import into an `InputError` that names what needs it, and the extra of setup.cfg that has it."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{what} needs the extra {extra} ({error}); in the repository: pip install -e '.[{extra}]'"
        ) from error


def check_at_least(minimum: int, config: object, section: str, *names: str) -> None:
    """Raises `InputError` for the first of the named numbers in a config section that is below `minimum`."""
    for name in names:
        if not (value := getattr(config, name)) >= minimum:  # rejects NaN too
            raise InputError(f"{section}{name} is {value}; expected at least {minimum}")


def check_probabilities(config: object, section: str, *names: str) -> None:
    """Raises `InputError` for the first of the named numbers in a config section that is not in [0, 1]."""
    for name in names:
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise InputError(f"{section}{name} is {value}; expected a probability, 0 to 1")


def check_whole_number(name: str, value: SupportsIndex, minimum: int = 0) -> int:
    """An argument, of whatever type of integer, as an int; `InputError` unless from `minimum` to 2^63 - 1."""
    try:
        number = int(operator.index(value))
    except TypeError:
        number = -1
    if not minimum <= number < 2**63:
        raise InputError(f"{name} is {value!r}; expected a whole number from {minimum} to 2^63 - 1")
    return number
