"""Configs as dataclasses: a YAML file overrides their defaults, and `key=value` on the command line overrides both.

An unknown key, or a value of the wrong type, is an error that names it.
"""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from layerdecomp.errors import InputError

ConfigT = TypeVar("ConfigT")


def merge_config(
    defaults: ConfigT | type[ConfigT], files: Sequence[tuple[str, DictConfig]], overrides: Sequence[str]
) -> ConfigT:
    """A config dataclass: its defaults, overridden by each named file's content, then by each `key=value`."""
    merged = OmegaConf.structured(defaults)
    OmegaConf.set_readonly(merged, False)  # a frozen dataclass makes it read-only
    sources = [*files, *((f"argument {text!r}", _parse_override(text)) for text in overrides)]
    flat = dotted(OmegaConf.to_container(merged))
    known = sorted(flat)
    free = tuple(f"{key}." for key, value in flat.items() if value == {})  # dictionaries, which accept any key
    for name, source in sources:
        for key, value in dotted(OmegaConf.to_container(source)).items():
            if not key.startswith(free):
                _check_known(key, known, name)
            if isinstance(flat.get(key), list) and isinstance(value, str | int | float | dict):
                raise InputError(f"{name}: found {value!r}, expected a list: {key}=[{value or ''}]")
        try:
            merged = OmegaConf.merge(merged, source)
        except (OmegaConfBaseException, ValueError, TypeError) as error:  # TypeError: a list for a dictionary
            default = flat.get(getattr(error, "full_key", None) or "")
            raise InputError(f"{name}: {_first_line(error)}; expected {_kind(default)}") from error
    for key, value in dotted(OmegaConf.to_container(merged)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} is {value}; expected a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:  # neither PyTorch's seeds nor NumPy's integers are larger
            raise InputError(f"{key} is {value}; expected less than 2^63")
    try:
        return cast(ConfigT, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key or error.key}= is missing; expected a value for it") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{', '.join(name for name, _ in sources)}: {_first_line(error)}") from error


def read_yaml(path: Path) -> DictConfig:
    """The keys and values of a YAML file; `InputError` if it is missing or not a mapping."""
    if not path.is_file():
        raise InputError(f"config {path} does not exist; configs/ has {_yaml_names()}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not readable YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise InputError(f"config {path}: found a list or a single value, expected keys and values")
    return content


def _yaml_names() -> str:
    return ", ".join(sorted(path.name for path in Path("configs").glob("*.yaml"))) or "no files here"


def _parse_override(text: str) -> DictConfig:
    key, separator, _ = text.partition("=")
    if not separator or not key:
        raise InputError(f"argument {text!r}: expected key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(
            f"argument {text!r}: {_first_line(error)}; expected a value in YAML, where text that begins with a special "
            "character is quoted, such as ['*_blocks.*']"
        ) from error


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _check_known(key: str, known: list[str], source: str) -> None:
    if key in known:
        return
    sections = [name for name in known if name.startswith(f"{key}.")]
    if sections:
        raise InputError(f"{source}: {key} is a section; expected one of its keys: {', '.join(sections)}")
    namesakes = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if nearest := difflib.get_close_matches(key, namesakes, 1, cutoff=0.0) or difflib.get_close_matches(key, known, 1):
        raise InputError(f"{source}: unknown key {key}; the nearest known one is {nearest[0]}")
    begins = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
    raise InputError(f"{source}: unknown key {key}; the known ones begin with {begins}")


def _kind(default: Any) -> str:
    """The expected kind of value in words, by the type of the default."""
    kinds = {bool: "true or false", int: f"a whole number, such as {default}", float: f"a number, such as {default}"}
    return kinds.get(type(default), "the type of its default")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
