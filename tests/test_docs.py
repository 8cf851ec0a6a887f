"""What README and docs/*.md say is so: files, functions, settings, links, commands, errors; and the site builds.

Names are read from code spans: `rl/loss.py`, `rl/loss.py: grpo, dapo`, `rl/train.py: Run.step`, `loss.epsilon`,
`python -m recipes.grpo`. Commands are read from blocks between fences: each goes through its own program's parser, and
one whose program isn't ours says above its block what it needs, say `<!-- needs: cluster -->`. Left out: addresses
elsewhere, of which only the form is looked at.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never
from urllib.parse import urlsplit

import pytest

from recipes.cli import read
from recipes.configuration import PAGE, default, docstrings, page, recipes, words
from recipes.plan import PlanConfig, recognise, split
from rewards import REWARDS, grade_math, resolve
from rl.advantage import ADVANTAGES
from rl.loss import ESTIMATORS, OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PATH = r"[\w./-]+\.py"


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, content and needs of every block between fences; needs: what a comment above it says."""
    found = re.findall(r"^(?:<!-- needs: (.+?) -->\n+)?```(\S*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(language, content, needs) for needs, language, content in found]


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
    known = {name for _, config in recipes() for name in settings(config)}
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
            wrong += [] if match[1] in known or match[1].endswith((".py", ".json")) else [f"setting {match[1]}"]
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


# --- links and anchors ----------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and the site make them: small letters, no punctuation, hyphens for spaces."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).replace("`", "") for head in heads)
    return {re.sub(r"[^\w -]", "", head.strip().lower()).replace(" ", "-") for head in plain}


def broken(text: str, path: Path) -> list[str]:
    """Links of a page at `path` that lead to no file, no heading, or have no host."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            address = urlsplit(target)
            wrong += [] if address.scheme == "https" and "." in address.netloc else [target]
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if not there.exists() or (anchor and anchor not in anchors(text if not name else there.read_text())):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path.read_text(), path) == []


def test_a_broken_link_is_found() -> None:
    text = (
        "# A head: of `it`\n[a](#a-head-of-it) [b](#gone) [c](rewards.md#maths) [d](rewards.md#gone) [e](gone.md)\n"
        "[f](https://x.org) [g](https://nowhere) [h](http://x.org)\n"
    )
    assert broken(text, ROOT / "docs/faq.md") == [
        "#gone",
        "rewards.md#gone",
        "gone.md",
        "https://nowhere",
        "http://x.org",
    ]


# --- commands -------------------------------------------------------------------------------------------------------

NEEDS = {"gpu", "cluster", "network", "your files"}
"""What a block may need that a test has not; then what isn't ours in it is left alone."""
SHELL = {"", "sh", "bash", "console"}
OURS = ("recipes", "rewards", "distill", "deepseek_v3", "sampling", "benchmarks", "runtime")
LAUNCHERS = ("torchrun", "accelerate")
RUN_BY = {
    "make grpo": "tests/recipes/test_grpo.py",
    "python -m recipes.grpo": "tests/recipes/test_grpo.py",
    "python -m recipes.sft": "tests/recipes/test_sft.py",
    "python -m recipes.distill --run_dir runs/distill": "tests/distill/test_generate.py",
    "python -m recipes.reward_model": "tests/recipes/test_reward_model.py",
    "python -m recipes.evaluate": "tests/recipes/test_evaluate.py",
    "python -m recipes.r1": "tests/recipes/test_r1.py",
    "python -m rewards check": "tests/rewards/test_check.py",
    "python -m rewards doctor": "tests/rewards/sandbox/test_doctor.py",
}
"""Commands that ask for nothing of the reader's, and the tests that run what they run."""


class Parsed(Exception):
    """A parser took its arguments."""


def commands(text: str) -> list[tuple[str, str]]:
    """Every shell command of a page, on one line and without comments, and what its block needs."""
    found = []
    for language, content, needs in blocks(text):
        if language not in SHELL:
            continue
        for line in re.sub(r"\\\n\s*", " ", content).splitlines():
            if is_command(line):
                found.append((shlex.join(shlex.split(line, comments=True)), needs))
    return found


def is_command(line: str) -> bool:
    """Whether a line of such a block is one, not output, a tree or a picture."""
    return (
        re.match(r"(\.venv/bin/\S+|python|make|torchrun|accelerate|pytest|pip|vllm|ray|sbatch|srun|sky|ssh)( |$)", line)
        is not None
    )


def refused(command: str, needs: str) -> str:
    """Why a command can't be right, "" where its parser takes it."""
    words = [word for word in shlex.split(command) if word != "..."]
    while "=" in words[0] and not words[0].startswith("-"):
        words.pop(0)  # NAME=value before a program
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "".join(f"no target {word}" for word in words[1:] if "=" not in word and word not in targets)
    if program in ("python", *LAUNCHERS) and "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        if module == "pytest":
            return missing_tests(arguments)
        if module.split(".")[0] in OURS:
            return refused_by(module, arguments)
    if program == "pytest":
        return missing_tests(words[1:])
    return "" if needs else "not ours to check: say above the block what it needs, <!-- needs: ... -->"


def missing_tests(arguments: list[str]) -> str:
    """Paths among pytest's arguments that aren't there."""
    return "".join(f"no {a}" for a in arguments if a.startswith("tests/") and not (ROOT / a.split("::")[0]).exists())


def refused_by(module: str, arguments: list[str]) -> str:
    """What the module's own parser says against these arguments."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parse(module, arguments)
    except (Parsed, SystemExit) as end:
        return said.getvalue() if isinstance(end, SystemExit) and end.code else ""
    except ValueError as error:
        return str(error)
    return ""


def parse(module: str, arguments: list[str]) -> None:
    """Hand arguments to a module's parser, and no further."""
    arguments = [a for a in arguments if a not in ("--help", "--print_config")]
    own = [i for i, a in enumerate(arguments) if a == "--config" and not arguments[i + 1].startswith("recipes/")]
    for i in reversed(own):
        del arguments[i : i + 2]  # a file of the reader's
    configs = {f"recipes.{name}": config for name, config in recipes()}
    if module == "recipes.plan":
        own, others = split(arguments)
        recognise(others, read(PlanConfig, own, prog=module, description="").recipe)
    elif module in configs:
        complete = getattr(importlib.import_module(module), "arguments", list)  # recipes.r1 has words of its own
        read(configs[module], complete(arguments), prog=module, description="")
    else:
        run_until_parsed(module, arguments)


def run_until_parsed(module: str, arguments: list[str]) -> None:
    """Call the main of a module that uses argparse; Parsed once it has all its arguments."""

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Never:
        # The class's own parse_args, word for word but for its end.
        _, unknown = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {unknown}")
        raise Parsed

    try:
        main = importlib.import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        main = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *arguments])
        main()


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_every_command_is_one_its_program_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # commands are told as from there
    told = commands(path.read_text())
    assert {needs for _, needs in told} - {""} <= NEEDS
    assert [f"{command}: {why}" for command, needs in told if (why := refused(command, needs))] == []


def test_a_wrong_command_is_found() -> None:
    page = (
        "```\npython -m recipes.grpo ... --optim.lrr 1   # a comment\n"
        "python -m recipes.sft --mix a,b \\\n    --epochs two\n"
        "make gone ARGS=x\npython -m rewards grade\npython -m distill export q.jsonl --to nothing f\n"
        "python -m recipes.grpo --rewards '{\"accuracy\": 1}'\ntorchrun --nproc-per-node 2 -m recipes.sft --gone 1\n"
        "python -m benchmarks.head --gone\npython -m deepseek_v3.convert bf16 a\npytest tests/gone\nvllm serve x\n```\n"
        "<!-- needs: gpu -->\n```\nvllm serve x\n```\n```json\nmake gone\n```\n"
    )
    wrong = [command for command, needs in commands(page) if refused(command, needs)]
    assert len(commands(page)) == 12 and wrong == [
        "python -m recipes.grpo ... --optim.lrr 1",
        "python -m recipes.sft --mix a,b --epochs two",
        "make gone ARGS=x",
        "python -m rewards grade",
        "python -m distill export q.jsonl --to nothing f",
        "torchrun --nproc-per-node 2 -m recipes.sft --gone 1",
        "python -m benchmarks.head --gone",
        "python -m deepseek_v3.convert bf16 a",
        "pytest tests/gone",
        "vllm serve x",
    ]


def test_commands_that_need_nothing_are_run() -> None:
    told = {command for path in (ROOT / "README.md", *DOCS) for command, _ in commands(path.read_text())}
    assert set(RUN_BY) <= told and all((ROOT / file).is_file() for file in RUN_BY.values())
    bare = {
        command
        for command in told
        if re.fullmatch(r"(make grpo|python -m (recipes|rewards)[\w.]*( check| doctor)?)", command)
    }
    assert bare <= set(RUN_BY)


@pytest.mark.parametrize(("name", "recipe"), [("sft.md", "sft"), ("distill.md", "distill")])
def test_settings_shown_as_yaml_are_taken(name: str, recipe: str, tmp_path: Path) -> None:
    shown = [content for language, content, _ in blocks((ROOT / "docs" / name).read_text()) if language == "yaml"]
    assert shown
    for content in shown:
        (tmp_path / "shown.yaml").write_text(content)
        read(dict(recipes())[recipe], ["--config", str(tmp_path / "shown.yaml")], prog="", description="")


# --- configuration.md, written from the code ------------------------------------------------------------------------


def test_the_configuration_page_is_the_code() -> None:
    assert PAGE.read_text() == page(), "settings have changed: run python -m recipes.configuration --write"


def test_every_recipe_and_every_setting_is_on_the_page() -> None:
    text = page()
    sources = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.py")}
    runnable = {name for name, source in sources.items() if "\nif __name__ ==" in source}
    others = runnable - {name for name, _ in recipes()}
    assert [name for name in others if "ArgumentParser(" not in sources[name]] == []
    for name, config in recipes():
        part = text.partition(f"\n## recipes.{name}\n")[2].partition("\n## ")[0]
        told = {
            item.replace("[]", "") for item in re.findall(r"^(?:- \*\*`|### \w+: )([\w.\[\]]+)", part, re.MULTILINE)
        }
        assert set(settings(config)) - told == set()


def test_a_setting_is_told_with_type_default_and_words() -> None:
    @dataclasses.dataclass
    class Plain:
        """Settings."""

        sizes: tuple[int, ...] | None = None
        """How large,
        and why."""
        kind: typing.Literal["a", "b"] = "b"
        lr: float = 1e-6

    hints, fields = typing.get_type_hints(Plain), {field.name: field for field in dataclasses.fields(Plain)}
    assert [words(hints[name]) for name in fields] == ["list of whole number or null", "one of `a`, `b`", "number"]
    assert [default(field) for field in fields.values()] == ["default null", "default `b`", "default `1e-06`"]
    assert docstrings(Plain) == {"sizes": "How large, and why."}


# --- faq.md: what it quotes is what the code says -------------------------------------------------------------------


@functools.cache
def messages() -> frozenset[str]:
    """Every text in the packages, with … for what is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    trees = (ast.parse(path.read_text()) for folder in packages for path in folder.rglob("*.py"))
    strings = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant))
    return frozenset(map(text, strings))


def test_every_error_quoted_is_one_the_code_says() -> None:
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs/faq.md").read_text())
    assert len(quoted) > 50
    assert [words for words in quoted if not any(words in message for message in messages())] == []


# --- the site -------------------------------------------------------------------------------------------------------


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does. Not with --quiet: it hides warnings, and hidden ones don't fail."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in DOCS} <= {path.stem for path in tmp_path.glob("*.html")}
    elsewhere = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//')
    assert [path.name for path in tmp_path.glob("*.html") if elsewhere.search(path.read_text())] == []
    assert "def loss_terms(" in re.sub(r"<[^>]+>", "", (tmp_path / "source/rl/loss.py.html").read_text())


def test_a_broken_link_fails_the_site(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs/faq.md").write_text("# Errors\n\n[a](rewards.md#gone) [b](../rl/gone.py)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "does not contain an anchor '#gone'" in done.stderr and "link '../rl/gone.py'" in done.stderr
