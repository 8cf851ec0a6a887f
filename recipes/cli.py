"""Command line and YAML files to a checked configuration dataclass; the only importer of the parser.

`--config a.yaml` (any number; later files win), then `--optim.lr 1e-4` (wins over every file). jsonargparse
does the types, the help and `--print_config`; added here: bare `--resume`, errors of one line that name the
field, the value, where it stood and the nearest known name, and the exit codes: 0 done, 1 failed, 2 bad
configuration or input, 74 the disk is full or failed, 128 + signal when told to leave. Leaves out subclasses
chosen by a dotted path (`class_path:`): a configuration can't name code to run.
"""

import dataclasses
import difflib
import logging
import os
import sys
import types
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Never, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from runtime.errors import EXIT_DISK, DiskError, UserError

T = TypeVar("T")

PACKAGES = ("deepseek_v3", "sampling", "rewards", "sft", "distill", "rl", "runtime", "recipes")


def main(
    config_class: type[T],
    run: Callable[[T], int | None],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, set up logging, run; return the exit code.

    That is what `run` returned (None is 0), 2 after a UserError, 74 after a DiskError, 130 after Ctrl-C. Any other
    exception passes through, so that Python shows its traceback and exits with 1.
    """
    config = parse(config_class, argv, prog=prog, description=description)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
    try:
        return run(config) or 0
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except DiskError as error:
        again = " with --resume" if hasattr(config, "resume") else ""
        print(f"{prog}: error: {error}, then the same command{again}", file=sys.stderr)
        return EXIT_DISK
    except KeyboardInterrupt:
        return 130


def parse(config_class: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """The configuration that `argv` (default: the process's own) and its files ask for.

    Like argparse, ends the process: with 0 after --help and --print_config, with 2 and one line on a mistake.
    """
    try:
        return read(config_class, sys.argv[1:] if argv is None else argv, prog=prog, description=description)
    except UserError as error:
        print(f"{prog}: error: {error}\n(--help explains every setting)", file=sys.stderr)
        raise SystemExit(2) from error


def read(config_class: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """As `parse`, but a mistake is a UserError."""
    known = _settings(config_class)
    switches, files, flags = _split(argv, known)
    given = [g for file in files for g in _flatten(_read_yaml(file), "", known, file)]
    for flag in flags:
        name, value = flag[2:].split("=", 1)
        name = name.removesuffix("+")  # --stop+=x appends to a list
        where = f"flag --{name}"
        tree = _yaml_value(value) if dataclasses.is_dataclass(known.get(name)) else value
        given += _flatten(tree, f"{name}.", known, where) if isinstance(tree, dict) else [_Given(name, value, where)]
    for g in given:
        _check_name(g, known)

    # Field docstrings become help texts; the setting is the parser's own, and global.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; may be given again")
    parser.add_class_arguments(config_class, as_group=True, fail_untyped=True)
    if not {"-h", "--help"}.isdisjoint(switches):
        print(_help(parser, config_class))
        raise SystemExit(0)
    try:
        tree = parser.parse_args([*(f"--config={f}" for f in files), *flags, *switches]).as_dict()
    except ArgumentError as error:
        _explain(error, given, known)
    return _build(config_class, tree, "")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values (dict, list, str, int, float, bool, None), ready for YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@dataclasses.dataclass(frozen=True)
class _Given:
    """One setting as somebody gave it."""

    name: str  # dotted
    value: Any
    where: str  # a file, or "flag --name"


def _help(parser: ArgumentParser, config_class: type) -> str:
    """The parser's own help, and after it the groups that are off (null) by default, which it hides."""
    text = parser.format_help()
    for name, group in _optional_groups(config_class):
        hidden = ArgumentParser(usage=SUPPRESS, add_help=False)
        hidden.add_class_arguments(group, name, fail_untyped=True)
        text += f"\n{name} is null unless something in it, or --{name}={{}}, is given.\n{hidden.format_help()}"
    return text


def _optional_groups(config_class: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(config_class)
    for name, hint in ((prefix + f.name, hints[f.name]) for f in dataclasses.fields(config_class)):
        if (group := _group(hint)) and _is_union(hint):
            yield name, group
        elif group:
            yield from _optional_groups(group, f"{name}.")


def _settings(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted name and its type; a group (nested dataclass) is listed too, as its dataclass."""
    hints = typing.get_type_hints(config_class)
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name, hint = prefix + field.name, hints[field.name]
        group = _group(hint)
        out[name] = group or hint
        if group:
            out |= _settings(group, f"{name}.")
    return out


def _group(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _item_group(hint: Any) -> type | None:
    """The dataclass in `tuple[X, ...]` or `tuple[X | str, ...]`."""
    arguments = typing.get_args(hint)
    return _group(arguments[0]) if typing.get_origin(hint) in (tuple, list) and arguments else None


def _item(value: Any, group: type, name: str) -> Any:
    """One item of such a tuple. What the parser took for a string because a name in it is unknown is refused."""
    if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        return value
    known = [field.name for field in dataclasses.fields(group)]
    if isinstance(value, str):
        raise UserError(f"{name}={value!r}: expected groups of {', '.join(known)}")
    return _build(group, value if isinstance(value, Mapping) else vars(value), f"{name}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _kind(hint: Any) -> Any:
    """dict, tuple, list, bool, ... of `X[...]` or `X[...] | None`."""
    options = [o for o in typing.get_args(hint) if o is not types.NoneType] if _is_union(hint) else [hint]
    return typing.get_origin(options[0]) or options[0]


def _split(argv: Sequence[str], known: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """(--help and the like, files, flags as --name=value); a bool flag without a value is true."""
    switches, files, flags = [], [], []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if token in ("-h", "--help") or name == "print_config" or (token.endswith(".help") and name[:-5] in known):
            switches.append(token)
            continue
        if not token.startswith("--"):
            raise UserError(f"{token!r} stands alone; settings look like --optim.lr 1e-4, files like --config x.yaml")
        hint = known.get(name.removesuffix("+"))
        if not equals:
            if hint is not None and _kind(hint) is bool and not (rest and rest[0].lower() in ("true", "false", "null")):
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif name == "config" or hint is not None:
                raise UserError(f"--{name} needs a value")
        if name == "config":
            files.append(value)
            continue
        if hint is not None and not name.endswith("+") and _kind(hint) in (tuple, list) and value[:1] not in ("[", "("):
            value = "null" if value == "null" else f"[{value}]"  # --report_to wandb,trackio
        flags.append(f"--{name}={value}")
    return switches, files, flags


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict | None):
        raise UserError(f"--config {file}: expected `name: value` lines, found a {type(tree).__name__}")
    return tree or {}


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _flatten(tree: dict[Any, Any], prefix: str, known: Mapping[str, Any], where: str) -> list[_Given]:
    """A file's settings by dotted name, as deep as there are groups; unknown names come through."""
    out = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and dataclasses.is_dataclass(known.get(name)):
            out += _flatten(value, f"{name}.", known, where)
        else:
            out.append(_Given(name, value, where))
    return out


def _check_name(given: _Given, known: Mapping[str, Any]) -> None:
    parent = given.name.rpartition(".")[0]
    if given.name in known or (parent in known and _kind(known[parent]) is dict):  # --rewards.accuracy 1
        return

    def likeness(name: str) -> float:
        # `lr` means `optim.lr`, so the last parts alone count almost as much as the whole names.
        pairs = ((given.name, name, 1.0), (given.name.rpartition(".")[2], name.rpartition(".")[2], 0.99))
        return max(weight * difflib.SequenceMatcher(None, a, b).ratio() for a, b, weight in pairs)

    near = max(known, key=likeness, default="")
    hint = f"; did you mean {near}?" if near and likeness(near) >= 0.6 else ""
    raise UserError(f"{given.name} is not a setting ({given.where}){hint}")


def _explain(error: ArgumentError, given: Sequence[_Given], known: Mapping[str, Any]) -> Never:
    """Turn the parser's message into field, value, place and expected type, by trying each value alone."""
    for g in reversed(given):  # the last one given is the one that counts
        hint = known.get(g.name)
        if hint is None:  # --rewards.accuracy: the values' type
            hint = typing.get_args(known[g.name.rpartition(".")[0]])[1]
        if dataclasses.is_dataclass(hint):
            if isinstance(g.value, dict | None) or g.value in ("null", ""):
                continue
        else:
            alone = ArgumentParser(exit_on_error=False)
            alone.add_argument("--value", type=hint)
            try:
                if g.where.startswith("flag "):
                    alone.parse_args([f"--value={g.value}"])
                else:
                    alone.parse_object({"value": g.value})
                continue
            except ArgumentError:
                pass
        raise UserError(f"{g.name}={g.value!r} ({g.where}): expected {_words(hint)}") from error
    raise UserError(" ".join(str(error).split())) from error


def _words(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if item := _item_group(hint):
        strings = "strings, or of " if _is_union(typing.get_args(hint)[0]) else ""
        return f"a list of {strings}groups of " + ", ".join(field.name for field in dataclasses.fields(item))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if _is_union(hint):
        return " or ".join(map(_words, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "settings of its own: " + ", ".join(f.name for f in dataclasses.fields(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _build(config_class: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass itself; a ValueError of its own checks becomes a UserError that names the group."""
    hints = typing.get_type_hints(config_class)
    values = {}
    for field in dataclasses.fields(config_class):
        if field.name not in tree:  # an item of a list, given in part
            continue
        value, group = tree[field.name], _group(hints[field.name])
        values[field.name] = _build(group, value, f"{prefix}{field.name}.") if group and value is not None else value
        if (item := _item_group(hints[field.name])) and value is not None:
            name = f"{prefix}{field.name}"
            values[field.name] = tuple(_item(v, item, name) for v in value)
    try:
        return config_class(**values)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error
