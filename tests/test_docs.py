"""What docs/*.md name is there: files, functions in them, modules, settings, and the pages they link to.

Names are read from code spans: `rl/loss.py`, `rl/loss.py: grpo, dapo`, `rl/train.py: Run.step`, `loss.epsilon`,
`python -m recipes.grpo`. Blocks between fences are left alone: a command there may use the reader's own files.
"""

import ast
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.advantage import ADVANTAGES
from rl.config import GRPOConfig
from rl.loss import ESTIMATORS, OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PATH = r"[\w./-]+\.py"


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Code spans; one may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(text: str) -> list[str]:
    """Targets of links and pictures, but for those to elsewhere."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def find(name: str, folder: Path) -> Path | None:
    """A file by its path from the root or the page, or by a shorter one that only one file ends in."""
    for base in (ROOT, folder):
        if (base / name).is_file():
            return base / name
    ends = [path for path in files() if f"/{path}".endswith(f"/{name}")]
    return ROOT / ends[0] if len(ends) == 1 else None


@functools.cache
def files() -> tuple[str, ...]:
    packages = [path.parent for path in ROOT.glob("*/__init__.py")] + [ROOT / "tests", ROOT / "benchmarks"]
    return tuple(str(path.relative_to(ROOT)) for folder in packages for path in folder.rglob("*.py"))


@functools.cache
def names(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, constants; methods and fields as Class.name."""

    def defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                yield from (prefix + n.id for n in ast.walk(target or ast.Pass()) if isinstance(n, ast.Name))

    return frozenset(defined(ast.parse(path.read_text()).body, ""))


def settings(config: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        yield prefix + field.name
        for option in (hints[field.name], *typing.get_args(hints[field.name])):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                yield from settings(option, f"{prefix}{field.name}.")


def faults(text: str, folder: Path) -> list[str]:
    """What a page names that isn't there."""
    known = set(settings(GRPOConfig))
    groups = "|".join({name.split(".")[0] for name in known if "." in name})
    wrong = [f"link {target}" for target in links(text) if not (folder / target.split("#")[0]).exists()]
    for span in spans(text):
        wrong += [name for name in re.findall(PATH, span) if find(name, folder) is None]
        if match := re.fullmatch(rf"({PATH})::? ?([A-Za-z_][\w.]*(?:, ?[\w.]+)*)", span):
            path = find(match[1], folder)
            asked = re.split(r", ?", match[2])
            wrong += [f"{match[1]}: {name}" for name in asked if path and name not in names(path)]
        if match := re.search(r"python -m ([\w.]+)", span):
            module = match[1].replace(".", "/")
            own = (ROOT / module.split("/")[0] / "__init__.py").exists() or module.startswith(("benchmarks/", "tests/"))
            wrong += [span] if own and not (ROOT / f"{module}.py").exists() else []
        if match := re.fullmatch(rf"((?:{groups})\.\w+)(?:=.*)?", span):
            wrong += [] if match[1] in known or match[1].endswith(".py") else [f"setting {match[1]}"]
    return wrong


def test_there_are_pages() -> None:
    assert ROOT / "docs/algorithm.md" in DOCS


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert faults(page.read_text(), page.parent) == []


def test_a_stale_name_is_found() -> None:
    page = (
        "`rl/loss.py: grpo, gone` `rl/train.py: Run.step` `rl/train.py: Run.gone` `rl/gone.py`\n"
        "`rl/types.py: Group.rewards` `rl/advantage.py: EPS` `advantage.py` `rl/config.py:3`\n"
        "`pytest tests/rl/test_loss.py` `python -m recipes.gone` `loss.epsilon` `loss.gone` `loss.beta=0`\n"
        "[a](algorithm.md) [b](../rl/loss.py) [c](gone.md#x) [d](https://x.org)\n"
        "```\npython my_own.py\n```\n"
    )
    assert sorted(faults(page, ROOT / "docs")) == [
        "link gone.md#x",
        "python -m recipes.gone",
        "rl/gone.py",
        "rl/loss.py: gone",
        "rl/train.py: Run.gone",
        "setting loss.gone",
    ]


@pytest.mark.parametrize(
    ("file", "functions"),
    [("rl/loss.py", [*OBJECTIVES, *ESTIMATORS]), ("rl/advantage.py", list(ADVANTAGES))],
)
def test_every_formula_has_its_line(file: str, functions: list[str]) -> None:
    named = spans((ROOT / "docs/algorithm.md").read_text())
    assert [name for name in functions if f"{file}: {name}" not in named] == []
