"""The page of a made-up run: complete, offline, and safe whatever the model wrote."""

import base64
import hashlib
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.report import write_comparison, write_report
from runtime.report.ledger import read_answers
from runtime.report.read import read_run


def test_every_figure_is_drawn_with_its_words(page: Any) -> None:
    assert page.figures[:15] == [
        "Reward and held-out accuracy",
        "Reward by part",
        "Where signal is lost",
        "Advantages",
        "Length",
        "Completions that show work",
        "Entropy",
        "KL to the reference",
        "Clip fraction",
        "Sampler–trainer gap",
        "Weights version",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Time by phase",
    ]
    for words in ("held-out accuracy", "all-equal groups", "rollout", "other", "0.425 → 0.900", "70.0% → 90.0%"):
        assert words in page.text, words


def test_a_metric_that_no_figure_asks_for_is_drawn_too(page: Any) -> None:
    assert len(page.figures) == 16
    assert page.figures[15].startswith("mine/<script>document.title")


def test_curves_carry_their_numbers_for_the_readout(page: Any) -> None:
    entropy = page.data["figures"]["entropy"]
    assert (entropy["low"], entropy["high"]) == (1.0, 20.0)
    assert entropy["series"] == [
        {"label": "entropy", "steps": list(range(1, 21)), "values": [round(0.6 - 0.01 * s, 4) for s in range(1, 21)]}
    ]
    times = {series["label"]: series["values"] for series in page.data["figures"]["time"]["series"]}
    assert list(times) == ["rollout", "reward", "update", "sync", "other"]
    assert times["other"][0] == pytest.approx(0.14)  # of 1.3 s, what the phases leave


def test_hostile_text_is_shown_and_nothing_else(page: Any) -> None:
    tags = [tag for tag, _ in page.elements]
    assert not {"img", "b", "iframe", "link", "object", "base"} & set(tags)
    assert (tags.count("script"), tags.count("style"), tags.count("meta")) == (2, 1, 4)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>document.title='owned'</script><img src=//evil.example>\\x1b") == 3
    prompts = page.data["prompts"]
    for shown in ("]]>", "{{7*7}}", "{% raw %}", "\\x1b[31mred\\x1b[0m", "\\u202egnp.exe\\u202c", "&lt;b&gt;", "\\x00"):
        assert shown in prompts[0], shown
    assert "".join(page.data["samples"][0]["tok"]) == prompts[0]  # the same text, token by token
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u2028\u2029]", page.source)
    assert not re.search("[<>&]", page.scripts[0])


def test_only_the_pages_own_script_may_run(page: Any) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    (inert,) = [a for tag, a in page.elements if tag == "script" and "type" in a]
    assert inert == {"type": "application/json", "id": "data"}


def test_the_page_refers_to_nothing_but_itself(page: Any) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "style", "action", "xlink:href"} & set(attributes), tag
        if "href" in attributes:
            assert attributes["href"].startswith("#") and attributes["href"][1:].partition("?")[0] in ids, attributes


def test_findings_say_what_is_wrong_and_where(page: Any) -> None:
    (equal, *rest) = page.findings
    # The last quarter's shares are 0.72 to 0.9.
    assert equal.startswith("81% of groups all-equal in steps 16 to 20: raise difficulty or group size. Of those")
    assert rest == []
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert links == ["#signal", "#samples?equal=1", "#samples?equal=1&step=20"]
    assert "metrics.jsonl: 1 unreadable line(s) were left out." in page.text


def test_settings_are_compared_with_the_defaults(page: Any, hostile: tuple[str, str]) -> None:
    named = hostile[1].replace("\x1b", "\\x1b")
    rows = re.findall(r"<tr><td><code>(.*?)</code>(.*?)</tr>", page.source, re.DOTALL)
    cells = {name: re.sub(r"<[^>]*>", "|", rest).strip("|") for name, rest in rows}
    assert list(cells) == ["group_size", "model", "optim.lr"]
    assert re.split(r"\|+", cells["optim.lr"]) == ["0.0001", "1e-06", "command line"]
    assert re.split(r"\|+", cells["group_size"])[:2] == ["4", "8"]
    assert cells["group_size"].endswith(
        "evil.example&gt;\\x1b.yaml"
    )  # of the preset's name, no more than the last part
    assert "optim: {lr: 0.0001}" in page.text and named in page.text
    assert '"commit": "<script>"' in page.text


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, again = (write_report(run, path=tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == again


def test_an_empty_folder_gives_a_page(tmp_path: Path, page_of: Any) -> None:
    page = page_of(write_report(tmp_path))
    assert "No steps recorded yet." in page.text
    assert page.figures == []
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_torn_files_are_named_not_fatal(tmp_path: Path, page_of: Any) -> None:
    for folder in ("rollouts", "trainer", "checkpoints/final"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "evaluation.json").write_text("[1]")
    (tmp_path / "ledger.sqlite").write_bytes(b"no ledger at all")
    (tmp_path / "config.yaml").write_bytes(b"model: \xff\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 1, "eval/accuracy": 0.5}\n[]\n')
    page = page_of(write_report(tmp_path, defaults={"model": "tiny"}))
    for note in (
        "rollouts/step-000001.parquet can't be read",
        "environment.json is not readable JSON.",
        "evaluation.json is not readable JSON.",
        "ledger.sqlite can't be read: file is not a database",
        "metrics.jsonl: 1 unreadable line(s) were left out.",
        "model: \\xff",
    ):
        assert note in page.text, note
    assert page.figures == ["Reward and held-out accuracy"]


@pytest.mark.parametrize(
    "config",
    ["a: [", "- 1\n- 2\n", "&a\nx: *a\n", "a: &a [*a, *a]\n", "? [1, 2]\n: 3\n", "2024-13-45: x\n", "a: 99999-99-99\n"],
)
def test_any_configuration_gives_a_page(tmp_path: Path, page_of: Any, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert config.strip() in page_of(write_report(tmp_path, defaults={"a": 1})).text


def test_a_folded_configuration_is_not_unfolded(tmp_path: Path, page_of: Any) -> None:
    """Ten lists of ten of the last: 10^9 leaves, if somebody walks them."""
    lists = ["l0: &l0 [x]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10))]
    (tmp_path / "config.yaml").write_text("group_size: 4\n" + "\n".join(lists))
    write_report(tmp_path, defaults={"group_size": 8})
    assert write_comparison([tmp_path, tmp_path], tmp_path / "compared.html").stat().st_size < 100_000


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_dir=.*nowhere"):
        write_report(tmp_path / "nowhere")


def test_other_files_are_never_read_as_numbers(tmp_path: Path, page_of: Any) -> None:
    lines = [{"step": 1, "reward": "<b>1</b>", "kl": True, "loss": None, "entropy": [1]}, {"step": "2", "reward": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = page_of(write_report(tmp_path))
    assert page.figures == []
    assert "1 unreadable line(s)" in page.text


def test_a_long_run_gives_a_small_page(tmp_path: Path, make_run: Any, page_of: Any) -> None:
    """5,000 steps, 200 files of rollouts."""
    run = make_run(tmp_path / "long")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    (run / "metrics.jsonl").write_text("\n".join(json.dumps({**line, "step": step}) for step in range(1, 5001)))
    for step in range(21, 221):
        shutil.copy(run / "rollouts/step-000001.parquet", run / f"rollouts/step-{step:06d}.parquet")
    path = write_report(run)
    assert path.stat().st_size < 1_000_000
    page = page_of(path)
    assert len(page.data["figures"]["entropy"]["series"][0]["steps"]) == 300
    assert "of the 144 completions of 12 steps; the run has 203 steps with completions" in page.text
    assert {sample["s"] for sample in page.data["samples"]} >= {1, 220}


# Other recipes


def test_a_reward_models_page(tmp_path: Path, page_of: Any) -> None:
    (tmp_path / "config.yaml").write_text("plain_share: 0.5\nlr: 0.001\n")
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": s, "loss": 0.7, "accuracy": 0.5, "margin": 0.1}) for s in (10, 20))
    )
    before, after = ({"plain": {"mean": m, "low": m - 0.05, "high": m + 0.05}, "judged": None} for m in (0.5, 0.52))
    (tmp_path / "evaluation.json").write_text(json.dumps({"pairs": 400, "before": before, "after": after}))
    page = page_of(write_report(tmp_path))
    assert page.figures == ["Loss", "Pairs put right", "Scores"]
    assert "Reward model, steps 10 to 20." in page.text
    assert "50.0% → 52.0%" in page.text and "95 %: 47.0% to 57.0%" in page.text
    (finding,) = page.findings
    assert finding.startswith("52.0% of the held-out pairs are put right, no better than chance: more or clearer")


def test_an_sft_runs_page(tmp_path: Path, page_of: Any) -> None:
    (tmp_path / "config.yaml").write_text("mix: [stories]\nrows_per_step: 2\nrow_length: 100\n")
    first = {"step": 0, "eval/loss": 3.0, "eval/a/b/loss": 3.0, "data/examples": 96, "data/rejected/not <b>text": 4}
    steps = [{"step": s, "loss": 1.0, "num_tokens": 180, "tokens_per_second": 900.0} for s in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [first, *steps])))
    page = page_of(write_report(tmp_path))
    assert page.figures == ["Loss", "Held-out loss", "Tokens per second", "Packing fill"]
    assert page.data["figures"]["fill"]["series"][0]["values"] == [0.9] * 4
    assert "rejected/not <b>text" in page.text and "4.0% of the rows were set aside (4)" in page.findings[0]


LEDGER = """
CREATE TABLE aside (source TEXT, line INTEGER, reason TEXT, detail TEXT);
CREATE TABLE problems (id TEXT, position INTEGER PRIMARY KEY, domain TEXT, prompt TEXT, answer TEXT, response TEXT);
CREATE TABLE samples (problem INTEGER, kind TEXT, number INTEGER, text TEXT, tokens INTEGER, finish_reason TEXT,
    teacher TEXT, error TEXT);
CREATE TABLE findings (problem INTEGER, kind TEXT, number INTEGER, outcome TEXT, reason TEXT, complaints TEXT);
CREATE TABLE choices (problem INTEGER, kind TEXT, number INTEGER, kept INTEGER, reason TEXT);
PRAGMA user_version = 1;
"""


def test_a_distillations_page(tmp_path: Path, page_of: Any, hostile: tuple[str, str]) -> None:
    """Of the sampled answers to the first problem 1 of 2 is right, to the second 0 of 1, and 1 is unknown; the third
    has the answer it came with."""
    text, named = hostile
    (tmp_path / "config.yaml").write_text("experts: []\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "accepted": 0.5, "unknown": 0.25, "rewards/x/mean": 0.3}\n')
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.executescript(LEDGER)
    for position in (0, 1, 2):
        prompt = json.dumps([{"role": "user", "content": text}])
        db.execute("INSERT INTO problems VALUES (?, ?, ?, ?, '7', NULL)", (f"p{position}", position, named, prompt))
    answers = [
        (0, "original", 0, "source", "right", "equal", 1),
        (0, "reasoning", 0, "t", "right", "equal", 1),
        (0, "reasoning", 1, "t", "wrong", named, 0),
        (1, "reasoning", 0, "t", "wrong", named, 0),
        (1, "reasoning", 1, "t", "unknown", "timeout", 0),
        (2, "original", 0, "source", "right", "equal", 1),
    ]
    for problem, kind, number, teacher, outcome, reason, kept in answers:
        key = (problem, kind, number)
        db.execute("INSERT INTO samples VALUES (?, ?, ?, ?, 9, 'stop', ?, '')", (*key, text, teacher))
        db.execute("INSERT INTO findings VALUES (?, ?, ?, ?, ?, '[]')", (*key, outcome, reason))
        db.execute("INSERT INTO choices VALUES (?, ?, ?, ?, ?)", (*key, kept, "kept" if kept else named))
    db.execute("INSERT INTO aside VALUES ('x', 1, ?, '')", (named,))
    db.commit()
    db.close()
    page = page_of(write_report(tmp_path))
    assert page.figures == ["Right answers by expert", "Answers kept", "Pass rates"]
    counts = read_answers(read_run(tmp_path))
    assert counts is not None and counts.pass_rates == [0.5, 0.0]  # as shards/problems.jsonl has them
    table = re.findall(r"<td>([^<]*)</td>", re.search(r'numbers named">(.*?)</table>', page.source, re.DOTALL)[1])
    assert table[1:9] == ["original", "2", "2", "2", "0", "0", "2", "18"]
    assert table[10:18] == ["reasoning", "2", "4", "1", "2", "1", "1", "9"]
    assert "3 of 6" in page.text and "25.0%" in page.text
    assert [f.split(":")[0] for f in page.findings] == ["25% of the sampled answers have no verdict"]
    assert [(s["s"], s["n"], s["v"]) for s in page.data["samples"]] == [
        (0, 0, "right"), (0, 0, "right"), (0, 1, "wrong"), (1, 0, "wrong"), (1, 1, "unknown"), (2, 0, "right"),
    ]  # fmt: skip
    assert not {"img", "b"} & {tag for tag, _ in page.elements}


# Comparison


def test_runs_are_compared(run: Path, tmp_path: Path, make_run: Any, page_of: Any) -> None:
    other = make_run(tmp_path / "other")
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("0.0001", "0.0002"))
    page = page_of(write_comparison([run, other], tmp_path / "compared.html"))
    rows = re.findall(r"<tr><td><code>(.*?)</code></td><td><code>(.*?)</code></td><td><code>(.*?)</code>", page.source)
    assert rows == [("optim.lr", "0.0001", "0.0002")]
    accuracy = re.search(r"<tr><td>Held-out accuracy</td><td>(.*?)</td><td>(.*?)</td>", page.source)
    assert accuracy is not None and accuracy[1] == accuracy[2] == "90.0% [86.7%, 92.6%]"
    reward = re.search(r"<tr><td>Reward</td><td>(.*?)</td>", page.source)
    assert reward is not None and reward[1] == "0.850 [0.800, 0.900]"  # steps 16 to 20
    assert page.figures[0] == "Reward and held-out accuracy: reward"
    (name,) = [name for name in page.data["figures"] if name.startswith("entropy")]
    assert [series["label"] for series in page.data["figures"][name]["series"]] == ["<script>tiny", "other"]
    assert len(page.findings) == 2
    assert not {"img", "b"} & {tag for tag, _ in page.elements}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, page_of: Any) -> None:
    folders = [tmp_path / parent / "run" for parent in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    page = page_of(write_comparison(folders, tmp_path / "c.html"))
    assert [s["label"] for s in page.data["figures"]["reward-0"]["series"]] == ["a/run", "b/run"]
    page = page_of(write_comparison([folders[0]] * 2, tmp_path / "c.html"))
    assert [s["label"] for s in page.data["figures"]["reward-0"]["series"]] == ["a/run (1)", "a/run (2)"]
