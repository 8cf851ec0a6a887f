"""A YAML file -> a checked settings dataclass; rewards know no command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_settings(path: str | Path, kind: type[T]) -> T:
    """The settings in a YAML file. Raises ValueError naming the file, the setting, its value and what it may be."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return build(tree, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build(tree: object, kind: type[T], prefix: str = "") -> T:
    """A settings dataclass from plain nested values. Raises ValueError naming the setting."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix or 'settings'}: expected `name: value` lines, found {tree!r}")
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), n=1)
            raise ValueError(
                f"{prefix}{name} is not a setting; "
                + (f"did you mean {near[0]}?" if near else f"use {', '.join(hints)}")
            )
    values = {name: _value(value, hints[name], f"{prefix}{name}") for name, value in tree.items()}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    for field in fields:
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{field.name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _value(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return build(value, option, f"{name}.")  # type: ignore[arg-type]
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    words = [", ".join(map(repr, typing.get_args(o))) or o.__name__ for o in options]
    raise ValueError(f"{name}={value!r}: expected {' or '.join(words)}")
