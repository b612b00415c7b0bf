"""Shared by the command-line tools: `key=value` arguments, and errors without a traceback."""

import gc
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from layerdecomp.errors import InputError, RunError
from layerdecomp.tensor_files import check_device

LESS_MEMORY = (
    "to use less memory: quantize=nf4 for the transformer, a smaller sample.max_side for large images, a smaller "
    "evaluate.batch_size for a comparison; or device=cpu"
)


def take(arguments: list[str], **defaults: str | None) -> tuple[dict[str, str], list[str]]:
    """Splits `key=value` arguments into a tool's own, by name, and the config overrides that remain, in order.

    A default of None marks a required argument.
    """
    own = {key: value for key, value in defaults.items() if value is not None}
    overrides = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if separator and key in defaults:
            own[key] = value
        else:
            overrides.append(argument)
    if missing := [key for key in defaults if key not in own]:
        raise InputError(f"{missing[0]}= is missing; expected {' '.join(f'{key}=...' for key in missing)}")
    return own, overrides


def refuse_unknown(rest: Sequence[str], known: Iterable[str]) -> None:
    """Raises `InputError` for the first of the arguments that a tool has no use for; `known` are the keys it has."""
    if rest:
        raise InputError(f"unknown argument {rest[0]}; expected {' '.join(f'{key}=' for key in known)}")


def whole_number(arguments: dict[str, str], key: str) -> int:
    """The value of a tool's own argument that must be a whole number."""
    try:
        return int(arguments[key])
    except ValueError as error:
        raise InputError(f"{key}={arguments[key]}: expected a whole number") from error


def true_or_false(arguments: dict[str, str], key: str) -> bool:
    """The value of a tool's own argument that must be true or false."""
    if arguments[key] not in ("true", "false"):
        raise InputError(f"{key}={arguments[key]}: expected true or false")
    return arguments[key] == "true"


def device_name(arguments: dict[str, str]) -> str:
    """The value of `device=`, after checking that tensors can be allocated there."""
    check_device(arguments["device"])
    return arguments["device"]


def out_folder(arguments: dict[str, str]) -> Path:
    """The value of `out=`, after checking that files can be written there; nothing is created yet."""
    folder = Path(arguments["out"]).absolute()
    place = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not place.is_dir():
        raise InputError(f"out={arguments['out']}: {place} is a file; expected a folder: choose another out=")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"out={arguments['out']}: {place} cannot be written to; make it writable, or choose another out="
        )
    return Path(arguments["out"])


def named_dtype(arguments: dict[str, str]) -> torch.dtype:
    """The value of `dtype=`: the precision of the frozen parts."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if (name := arguments["dtype"]) not in known:
        raise InputError(f"dtype={name}: expected one of {', '.join(known)}")
    return known[name]


def run_command(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a tool, or prints its module docstring if help is requested.

    An expected error is one message on stderr and exit status 2 or 1; bugs keep their traceback.
    """
    if {"-h", "--help", "help"} & {*arguments}:
        print(inspect.getdoc(inspect.getmodule(main)))
        return
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(arguments)
        leave_group()
    except SystemExit:  # a signal stopped training, on every rank
        leave_group()
        raise
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        end(2 if isinstance(error, InputError) else 1)
    except torch.OutOfMemoryError as error:  # training handles this itself, and finds settings that fit
        reason = str(error).splitlines()[0]
        print(f"error: {reason}\n{LESS_MEMORY}", file=sys.stderr)
        end(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end(130)
    except Exception:
        if not among_ranks():
            raise
        traceback.print_exc()
        end(1)


def among_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def end(status: int) -> NoReturn:
    """Exits after an error; a rank of several does so at once, since the others may be waiting for it.

    At a normal exit, Lightning destroys an NCCL process group, which in turn waits for them: the launcher would not see
    for half an hour that this rank has failed.
    """
    if among_ranks():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def leave_group() -> None:
    """Destroys the process group, if there is one: at interpreter exit, gloo's threads may abort the process.

    Not to be called after an error: other ranks may be waiting for this one, which would then wait for them.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # the trainer's reference cycles also hold it; its threads end when it is freed
