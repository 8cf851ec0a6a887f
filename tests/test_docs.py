"""What docs/*.md name is there: files, functions in them, modules, settings, and the pages they link to.

Names are read from code spans: `rl/loss.py`, `rl/loss.py: grpo, dapo`, `rl/train.py: Run.step`, `loss.epsilon`,
`python -m recipes.grpo`. Blocks between fences are left alone: a command there may use the reader's own files.
"""

import ast
import dataclasses
import functools
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import REWARDS, grade_math, resolve
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
            there = (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()
            wrong += [span] if own and not there else []
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
        "`pytest tests/rl/test_loss.py` `python -m rewards grade` `python -m recipes.gone`\n"
        "`loss.epsilon` `loss.gone` `loss.beta=0`\n"
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


# --- docs/rewards.md: what it shows is run --------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A folder with the page's blocks that have a name, each as a file of that name."""
    text = (ROOT / "docs/rewards.md").read_text()
    for name, block in re.findall(r"^```\w+ (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(block)
    return tmp_path


def rewards_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, path = [sys.executable, "-m", "rewards", *arguments], {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False, env=path)


def test_the_rows_shown_get_the_verdicts_shown(shown: Path) -> None:
    done = rewards_command(shown, "grade", "rows")
    if "sandbox-unavailable" in done.stdout:
        pytest.skip("no isolation for code on this machine: python -m rewards doctor")
    lines = zip(done.stdout.splitlines(), (shown / "verdicts").read_text().splitlines(), strict=True)
    for given, expected in lines:
        assert {**json.loads(given), "ms": 0} == {**json.loads(expected), "ms": 0}
    assert done.returncode == 2
    assert "rows:5: gold is missing: give a string or a finite number\n" in done.stderr


def test_a_reward_of_ones_own_is_under_40_lines_and_passes_its_cases(shown: Path) -> None:
    assert len((shown / "my_rewards.py").read_text().splitlines()) < 40
    done = rewards_command(shown, "check", "--reward", "my_rewards.citations", "--golden", "citations.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n0 misses in 9 cases\n")


def test_every_built_in_reward_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/rewards.md").read_text(), re.MULTILINE)
    assert [name for name in REWARDS if name not in rows] == []


def test_the_rewards_named_on_the_page_are_there() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    told = re.findall(r"--rewards '(\{.*?\})'", (ROOT / "docs/rewards.md").read_text())
    names = {name.partition("(")[0] for rewards in told for name in json.loads(rewards)} - {"my_rewards.citations"}
    assert len(names) >= 4
    assert [name for name in names if not callable(resolve(name))] == []


def test_answers_get_the_verdicts_shown() -> None:
    table = (ROOT / "docs/rewards.md").read_text().partition("## Maths")[2].partition("## Code")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong|unknown)", table, re.MULTILINE)
    assert len(rows) > 20
    wrong = [row for row in rows if grade_math(row[0], row[1]).outcome != row[2]]
    assert wrong == []
