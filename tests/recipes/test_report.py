"""`python -m recipes.report`: a run's page anew, several on one page, and what can't be done in one line."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import DistillConfig
from recipes.report import defaults, main
from rl.config import GRPOConfig
from runtime.report.read import KINDS, read_run
from runtime.report.settings import changed
from sft.config import SFTConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    def make(name: str, config: Any = None, reward: float = 0.5) -> Path:
        run = tmp_path / name
        run.mkdir()
        tree = dataclasses.asdict(GRPOConfig() if config is None else config)
        (run / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": reward}) + "\n")
        return run

    return make


def test_one_run_gets_its_report_anew(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", dataclasses.replace(GRPOConfig(), group_size=16))
    (run / "report.html").write_text("old")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    page = (run / "report.html").read_text()
    assert re.findall(r"<tr><td><code>(\w+)</code></td><td><code>(\w+)</code></td><td><code>(\w+)", page) == [
        ("group_size", "16", "8")
    ]


def test_several_runs_are_compared_on_a_page_beside_them(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run("a", reward=0.25), make_run("b", dataclasses.replace(GRPOConfig(), seed=1), reward=0.75)
    assert main([str(a), str(b)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == a.parent / "comparison.html"
    page = path.read_text()
    assert "<tr><td>Reward</td><td>0.250</td><td>0.750</td></tr>" in page
    assert "<tr><td><code>seed</code></td><td><code>0</code></td><td><code>1</code></td></tr>" in page
    assert page.count("<tr><td><code>") == 1
    assert not (a / "report.html").exists() and not (b / "report.html").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_goes_where_it_is_asked_for(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    runs = [str(make_run(name)) for name in "ab"[:count]]
    out = tmp_path / "page.html"
    assert main([*runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.stat().st_size > 1000
    assert not list(tmp_path.rglob("report.html"))


def test_what_is_no_run_is_named(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a")
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere: no such folder"),
        ([run, tmp_path / "empty"], f"{tmp_path}/empty: holds no run (neither config.yaml nor metrics.jsonl)"),
        ([run, "--out", tmp_path / "x" / "y.html"], f"--out {tmp_path}/x/y.html: give a file in a folder that exists"),
        ([run, "--out", tmp_path], f"--out {tmp_path}: give a file"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"python -m recipes.report: error: {said}"), captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.rglob("*.html"))


def test_wrong_options_are_refused() -> None:
    for arguments in ([], ["--oops"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


@pytest.mark.parametrize(
    "config", [GRPOConfig(), SFTConfig(), DistillConfig()], ids=lambda config: type(config).__name__
)
def test_a_run_of_defaults_differs_in_nothing(make_run: Any, config: Any) -> None:
    run = read_run(make_run("a", config))
    assert defaults(run.kind) == config
    assert changed(run, config) == []


def test_every_kind_of_run_has_defaults() -> None:
    """And a setting by which it is told: one that the others lack."""
    configs = {kind: dataclasses.asdict(defaults(kind)) for kind in KINDS}
    for kind, setting in KINDS.items():
        assert [k for k, config in configs.items() if setting in config] == [kind]
    assert defaults("") is None


def test_the_command(make_run: Any) -> None:
    run = make_run("a")
    command = [sys.executable, "-m", "recipes.report", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}/report.html\n", "")
