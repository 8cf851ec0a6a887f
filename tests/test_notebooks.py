"""notebooks/*.py: what they import and call is there; nightly, each runs to its end and ends on a plot."""

import ast
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SECONDS = 900
"""For a cell on a busy machine; each notebook takes under three minutes on two idle cores."""


def imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Name -> what a notebook's imports bind to it; an import that fails raises."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, getattr(importlib.import_module(str(node.module)), alias.name)


def wrong_calls(source: str) -> list[str]:
    """Calls of imported functions and classes with keywords they don't take."""
    tree = ast.parse(source)
    known = dict(imported(tree))
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            given = [None for a in node.args], {str(k.arg): None for k in node.keywords}
            try:
                inspect.signature(known[node.func.id]).bind(*given[0], **given[1])
            except TypeError as error:
                wrong.append(f"line {node.lineno}: {node.func.id}: {error}")
    return wrong


def test_there_are_three() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_reads_as_a_notebook_and_calls_what_is_there(path: Path) -> None:
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    assert wrong_calls(path.read_text()) == []
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and notebook.cells[0].source.startswith("# ")
    assert kinds[-1] == "code" and notebook.cells[-1].source.endswith("display(figure)")
    assert kinds.count("markdown") >= 6


def test_a_stale_call_is_found() -> None:
    source = "from rl.config import GRPOConfig\nGRPOConfig(steps=1)\nGRPOConfig(stepss=1)\nGRPOConfig(1)\n"
    assert [line.split(":")[0] for line in wrong_calls(source)] == ["line 3", "line 4"]


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_ends_on_a_plot(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    shown = [output.get("data", {}) for output in notebook.cells[-1].outputs]
    assert any("image/png" in data for data in shown)
    nbformat.write(notebook, tmp_path / f"{path.stem}.ipynb")
    printed = "".join(o.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs)
    check = {"01_grpo": grpo, "02_write_a_reward": write_a_reward, "03_distil_and_review": distil}[path.stem]
    check(printed)


def grpo(printed: str) -> None:
    """Answers are right clearly more often than before, and both groups were shown."""
    before, after = (float(n) for n in re.findall(r"right (\d+\.\d) %", printed))
    assert after > before + 10
    assert printed.count("(answer ") == 2


def write_a_reward(printed: str) -> None:
    """The first try has holes, and the second none."""
    assert re.findall(r"(\d+) cases, (\d+) misses", printed) == [("7", "4"), ("7", "0")]


def distil(printed: str) -> None:
    """People's choice among its own answers made the model better."""
    before, after = (int(n) for n in re.findall(r"right (\d+)% -> (\d+)%", printed)[0])
    assert after > before + 5
    assert "ana and raj: " in printed
