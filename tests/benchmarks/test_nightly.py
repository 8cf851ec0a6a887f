"""The night's page says what changed, and nothing that a case quotes acts on it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nightly import misses_of, read_figures, summary

ROOT = Path(__file__).resolve().parents[2]


def miss(why: str, where: str = "rewards/golden/math.jsonl:5", got: str = "wrong (no-answer)") -> dict[str, str]:
    return {"where": where, "why": why, "want": "right", "got": got}


def figures(
    *misses: dict[str, str], cases: int = 1000, p99: float = 10.0, quick: bool = False, peers: Any = None
) -> dict[str, Any]:
    suite = {"cases": cases, "seconds": 1.5, "p50_ms": 0.1, "p99_ms": p99, "budget_ms": 50.0, "misses": list(misses)}
    return {
        "when": "2026-03-04 05:06 UTC",
        "commit": "abc1234",
        "machine": "x86_64, 2 cores",
        "quick": quick,
        "suites": {"golden/math": suite},
        "peers": peers or {},
    }


def test_the_first_night_has_nothing_to_compare_with() -> None:
    page = summary(figures(), None)
    assert page.startswith("# Rewards, 2026-03-04 05:06 UTC\n\n**All 1,000 cases as wanted.**\n")
    assert "The first night: nothing to compare with." in page
    assert "| golden/math | 1,000 | 0 | 0.10 | 10.00 | 50 | 1.5 |\n" in page
    assert "##" not in page


def test_changes_stand_in_brackets() -> None:
    page = summary(figures(miss("a"), cases=1010, p99=15.0), figures(cases=1000, p99=10.0))
    assert "| golden/math | 1,010 (+10) | 1 (+1) | 0.10 | 15.00 (+50%) | 50 | 1.5 |\n" in page
    assert "Changes in brackets are since 2026-03-04 05:06 UTC (commit abc1234)." in page


def test_latency_within_the_noise_of_a_shared_machine_is_no_change() -> None:
    assert "| 11.00 | 50 |" in summary(figures(p99=11.0), figures(p99=10.0))


def test_misses_are_new_still_there_or_gone() -> None:
    page = summary(figures(miss("old"), miss("new")), figures(miss("old"), miss("mended")))
    assert "**2 of 1,000 cases missed, 1 of them new.**" in page
    sections = {part.split("\n")[0]: part for part in page.split("## ")[1:]}
    assert list(sections) == ["New misses", "Still missed", "No longer missed"]
    expected = "rewards/golden/math.jsonl:5: new\n  wanted right, got wrong (no-answer)\n"
    assert expected in sections["New misses"] and ": old\n" not in sections["New misses"]
    assert ": old\n" in sections["Still missed"] and ": mended\n" in sections["No longer missed"]


def test_a_night_without_misses_says_how_many_are_mended() -> None:
    page = summary(figures(), figures(miss("a"), miss("b")))
    assert "**All 1,000 cases as wanted; 2 that were missed are mended.**" in page


def test_a_case_that_moved_in_its_file_is_the_same() -> None:
    page = summary(figures(miss("a", where="f.jsonl:9")), figures(miss("a", where="f.jsonl:7")))
    assert "0 of them new" in page and "No longer missed" not in page


def test_cases_with_the_same_words_are_counted_one_by_one() -> None:
    two = figures(miss("a", where="f.jsonl:1"), miss("a", where="f.jsonl:2"))
    assert len(misses_of(two["suites"])) == 2
    assert "2 of 1,000 cases missed, 1 of them new." in summary(two, figures(miss("a", where="f.jsonl:1")))


def test_what_a_case_quotes_stays_inside_its_block() -> None:
    page = summary(figures(miss("a", where="gold x", got="```\n# Owned <script>")), None)
    block = page.split("```text\n")[1].split("\n```")[0]
    assert "# Owned <script>" in block and page.count("```") == 2


def test_suites_come_and_go() -> None:
    tonight, before = figures(), figures()
    before["suites"]["golden/gone"] = before["suites"]["golden/math"]
    tonight["suites"]["golden/new"] = tonight["suites"]["golden/math"]
    page = summary(tonight, before)
    assert "| golden/new | 1,000 | 0 |" in page and "No longer there: golden/gone." in page


def test_a_sample_is_not_taken_for_a_whole_night() -> None:
    assert "That night took a sample only." in summary(figures(), figures(quick=True))
    assert "That night took a sample only." not in summary(figures(quick=True), figures(quick=True))


def test_peers_stand_beside_their_last_figures() -> None:
    page = summary(figures(peers={"math_grading": "| 22× |"}), figures(peers={"math_grading": "| 21× |"}))
    assert page.index("`python -m benchmarks.math_grading`") < page.index("| 22× |") < page.index("| 21× |")


def test_figures_that_are_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    assert read_figures(None) is None and read_figures(tmp_path / "gone.json") is None
    (tmp_path / "cut.json").write_text('{"when": ')
    assert read_figures(tmp_path / "cut.json") is None


@pytest.mark.slow
def test_two_nights_in_a_row(tmp_path: Path) -> None:
    first = night("--out", str(tmp_path / "1"))
    second = night("--out", str(tmp_path / "2"), "--previous", str(tmp_path / "1" / "figures.json"))
    assert "The first night" in first and "Changes in brackets" in second
    assert (tmp_path / "2" / "summary.md").read_text() == second
    assert json.loads((tmp_path / "2" / "figures.json").read_text())["suites"]["hostile/code"]["misses"] == []


def night(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.nightly", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == (" cases as wanted" not in done.stdout), done.stdout + done.stderr
    return done.stdout
