"""`python -m recipes.configuration`: every setting of every recipe as Markdown, read from the dataclasses themselves.

docs/configuration.md is this page; `--write` writes it anew, and tests/test_docs.py holds it to the code. Left out:
what the commands of `rewards`, `distill` and `deepseek_v3` take, which their `--help` says.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.cli import to_dict
from runtime.files import write_durably

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/configuration.md"
PLAIN: dict[Any, str] = {
    **{str: "text", int: "whole number", float: "number", bool: "true or false"},
    **{types.NoneType: "null", Any: "anything"},
}
HEAD = """\
# Configuration

Every setting, from the code's own words. Written by `python -m recipes.configuration --write`; don't edit.

A setting is a flag, `--optim.lr 1e-6`, or a line of a YAML file that `--config` names; any number of files, where later
ones win, and flags win over all. `--print_config` shows the whole as it would run. Lists take `a,b` or YAML's brackets,
dictionaries JSON or `--rewards.accuracy 1`. Groups that are null are off until something in them is given.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n{part}\n" for part in (section for recipe in recipes() for section in _recipe(*recipe)))


def recipes() -> list[tuple[str, type]]:
    """Every command of recipes/ that has settings, and their dataclass: what its module hands to the parser."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            continue
        module = importlib.import_module(f"recipes.{path.stem}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("main", "parse") and node.args:
                config = getattr(module, ast.unparse(node.args[0]), None)
                if isinstance(config, type) and dataclasses.is_dataclass(config):
                    found.append((path.stem, config))
    return found


def _recipe(name: str, config: type) -> Iterator[str]:
    yield f"## recipes.{name}"
    yield _escaped(_sentence(sys.modules[f"recipes.{name}"].__doc__ or ""))
    yield from _group(config, "", recipe=name)


def _group(config: type, prefix: str, *, recipe: str) -> Iterator[str]:
    """A group's own settings as a list, then each group in it under a heading."""
    hints, told = typing.get_type_hints(config), docstrings(config)
    fields = [field for field in dataclasses.fields(config) if field.init]
    inner = {field.name: group for field in fields if (group := dataclass_in(hints[field.name])) is not None}
    lines = [
        f"- **`{prefix}{field.name}`** ({words(hints[field.name])}; {default(field)})"
        + (f": {_escaped(told[field.name])}" if field.name in told else "")
        for field in fields
        if field.name not in inner or _is_list(hints[field.name])
    ]
    yield "\n".join(lines)
    for field in fields:
        if field.name in inner:
            item = "[]" if _is_list(hints[field.name]) else ""
            name, off = f"{prefix}{field.name}{item}", default(field) == "default null"
            about = told.get(field.name) if not item else None
            yield f"### {recipe}: {name}"
            yield _escaped(f"{about or inspect.getdoc(inner[field.name]) or ''}" + (" Null by default." if off else ""))
            yield from _group(inner[field.name], f"{name}.", recipe=recipe)


def docstrings(config: type) -> dict[str, str]:
    """Field -> the string that stands under it, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    out = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            out[ast.unparse(node.target)] = " ".join(str(after.value.value).split())
    return out


def dataclass_in(hint: Any) -> type | None:
    """The dataclass in `X`, `X | None`, `tuple[X, ...]` or `tuple[X | str, ...]`."""
    options = [hint, *typing.get_args(hint), *(o for a in typing.get_args(hint) for o in typing.get_args(a))]
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def words(hint: Any) -> str:
    """A type for people."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, arguments))
    if origin in (tuple, list):
        items = list(dict.fromkeys(words(a) for a in arguments if a is not Ellipsis))
        return f"list of {' and '.join(items)}" + ("" if Ellipsis in arguments else f", {len(arguments)} of them")
    if origin is dict:
        return f"{words(arguments[0])} to {words(arguments[1])}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "group"
    return PLAIN[hint]


def default(field: "dataclasses.Field[Any]") -> str:
    """What a setting is where nothing is given."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return "must be given"
    if isinstance(value, tuple):
        value = [_given(item) for item in value]
    if isinstance(value, list | dict) and value:
        return f"default `{json.dumps(value, ensure_ascii=False)}`"
    if isinstance(value, str) and len(value) > 60:
        return "default: see the code"
    plain = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    return f"default {plain}" if plain else f"default `{value}`" if value not in ("", [], {}) else "default: empty"


def _given(item: Any) -> Any:
    """A group as what in it isn't its own default; a plain value as it is."""
    if not dataclasses.is_dataclass(item):
        return item
    plain = to_dict(item)
    return {f.name: plain[f.name] for f in dataclasses.fields(item) if getattr(item, f.name) != f.default}


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _sentence(docstring: str) -> str:
    """The first paragraph, as one line."""
    return " ".join(docstring.split("\n\n")[0].split())


def _escaped(text: str) -> str:
    """Plain words as Markdown: outside code spans nothing is emphasis or a tag."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("*", r"\*") for p in parts)


def main(arguments: list[str] | None = None) -> int:
    """Print the page, or write it to docs/."""
    parser = argparse.ArgumentParser(prog="python -m recipes.configuration", description="Every setting, as Markdown.")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    if parser.parse_args(arguments).write:
        write_durably(PAGE, page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
