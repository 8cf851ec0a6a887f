"""Whole runs in this process: what is refused, what a resume asks for, and what becomes of a teacher's faults."""

import dataclasses
import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill.__main__ import main
from distill.config import DistillConfig, ExpertConfig
from distill.generate import generate
from distill.ledger import Ledger
from distill.problems import ProblemsConfig
from distill.review.decisions import Review
from distill.review.log import Log
from distill.review.queue import load_queue
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.rows import load_rows


def rows(run_dir: Path) -> list[Any]:
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        return list(ledger.rows())


def manifest(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "shards/manifest.json").read_text())  # type: ignore[no-any-return]


def shards(run_dir: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((run_dir / "shards").glob("data-*")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def done(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    result = generate(dataclasses.replace(config, run_dir=str(run_dir)))
    assert result.exit_code == 0 and result.export is not None and result.left == 0
    return run_dir


def test_every_answer_is_there_and_has_a_fate(done: Path) -> None:
    found = rows(done)
    counts = Counter((row.problem.domain, row.sample.kind) for row in found)
    assert counts == {("math", "original"): 3, ("math", "reasoning"): 21, ("talk", "original"): 9}
    assert all(row.finding is not None and row.choice is not None for row in found)
    kept = [row for row in found if row.choice.kept]
    assert kept and all(not row.finding.complaints for row in kept)
    assert {row.finding.outcome for row in kept if row.problem.domain == "math"} == {"right"}
    assert {row.finding.reason for row in kept if row.problem.domain == "talk"} == {"not-graded"}
    assert max(Counter((row.problem.id, row.sample.kind) for row in kept).values()) == 1
    for row in kept:  # policy: the shortest
        rivals = [
            r
            for r in found
            if r.problem == row.problem and r.sample.kind == row.sample.kind and r.choice.reason == "not chosen"
        ]
        assert all(row.sample.tokens <= rival.sample.tokens for rival in rivals)


def test_reasons_are_counted_and_add_up(done: Path) -> None:
    said = manifest(done)
    assert sum(said["verdicts"].values()) == sum(said["choices"].values()) == 33
    assert said["choices"]["kept"] == said["rows"] and said["set aside"] == {"duplicate": 1}
    assert sum(part["answers"] for part in said["answers"]) == 33
    lines = read_metrics(done / "metrics.jsonl")
    assert lines[0] == {"step": 0, "problems": 10, "set_aside": 1}
    assert [line["step"] for line in lines[1:]] == [3, 6, 7, 10]
    assert 0 < lines[1]["rewards/math/mean"] < 1 and lines[-1]["unknown"] == 1 and lines[1]["rows_per_second"] > 0


def test_what_people_decide_is_in_the_shards_and_in_the_trace(
    done: Path, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queue is whole whatever was decided, so that nothing is judged twice."""
    run_dir = shutil.copytree(done, tmp_path / "run")
    queue = load_queue(run_dir)
    waiting = {row["id"] for row in shards(run_dir) if row["reviewed"] is False}
    assert waiting == set(queue.by_id) and len(waiting) >= 2
    first, second, *others = queue.items
    with Log(queue.log_path) as log:
        review = Review(queue, log)
        review.decide(first, "edit", reviewer="ana", text="Rain falls.")
        review.decide(second, "reject", reviewer="raj")
    result = generate(dataclasses.replace(config, run_dir=str(run_dir), resume=True))
    assert result.export is not None and sum(part.waiting for part in result.export.table) == len(others)
    talk = {row["id"]: row for row in shards(run_dir) if row["domain"] == "talk"}
    assert talk.keys() == waiting - {second.id}
    assert (talk[first.id]["reviewed"], talk[first.id]["reviewer"]) == (True, "ana")
    assert talk[first.id]["messages"][-1]["content"] == "Rain falls."
    assert load_queue(run_dir).by_id.keys() == waiting
    assert main(["trace", second.id, "--run", str(run_dir)]) == 0
    assert "review        rejected by raj\n" in capsys.readouterr().out


def test_pass_rates_are_those_of_the_sampled_reasoning_and_grpo_reads_them(done: Path) -> None:
    problems = load_rows(str(done / "shards/problems.jsonl"))
    assert len(problems) == 10
    found = rows(done)
    for problem in problems:
        own = [r.finding.outcome for r in found if r.problem.id == problem["id"] and r.sample.kind == "reasoning"]
        expected = own.count("right") / 3 if problem["domain"] == "math" else None
        assert problem["pass_rate"] == expected
    assert 0 < sum(p["pass_rate"] or 0 for p in problems)


def test_a_second_run_in_the_same_folder_is_refused_without_resume(done: Path, config: DistillConfig) -> None:
    with pytest.raises(UserError, match="--resume"):
        generate(dataclasses.replace(config, run_dir=str(done)))
    (done / "metrics.jsonl").rename(done / "aside")
    with pytest.raises(UserError, match=r"ledger\.sqlite holds a run; add --resume"):
        generate(dataclasses.replace(config, run_dir=str(done)))
    (done / "aside").rename(done / "metrics.jsonl")


def test_settings_that_change_answers_may_not_differ_and_others_may(
    done: Path, config: DistillConfig, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(done, tmp_path / "run")
    again = dataclasses.replace(config, run_dir=str(run_dir), resume=True)
    math, talk = config.experts
    refused = {
        "seed": dict(seed=1),
        "keep": dict(keep=2),
        "experts.math.temperature": dict(experts=(dataclasses.replace(math, temperature=0.5), talk)),
        "experts.talk.system": dict(experts=(math, dataclasses.replace(talk, system=""))),
    }
    for name, change in refused.items():
        with pytest.raises(UserError, match=f"other settings(.|\n)*  {name}: "):
            generate(dataclasses.replace(again, **change))
    allowed = (dataclasses.replace(math, timeout=1.0, retries=0), talk)
    before = manifest(run_dir)
    assert generate(dataclasses.replace(again, workers=1, experts=allowed)).exit_code == 0
    assert manifest(run_dir) == before


def test_another_teacher_may_not_go_on(config: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(teacher, tmp_path / "model")
    experts = tuple(dataclasses.replace(expert, model=str(model)) for expert in config.experts)
    own = dataclasses.replace(config, experts=experts, run_dir=str(tmp_path / "run"))
    generate(own)
    with Ledger(tmp_path / "run/ledger.sqlite") as ledger:
        with ledger._transaction("test"):
            for table in ("choices", "findings", "samples"):
                ledger._db.execute(f"DELETE FROM {table} WHERE problem = 9")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no longer the teacher that answered before"):
        generate(dataclasses.replace(own, resume=True))


def test_a_domain_nobody_answers_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody answers domain='talk'"):
        generate(dataclasses.replace(config, experts=config.experts[:1], run_dir=str(tmp_path / "run")))


# With a server.


def served(server: Any, problems: Path, **settings: Any) -> DistillConfig:
    expert = dict(model="r1", endpoint=server.url, timeout=2.0, retries=0, samples=2, concurrency=3, system="")
    return DistillConfig(
        problems=(ProblemsConfig(path=str(problems), domain="math"),),
        experts=(ExpertConfig(**{**expert, "original": "none"}),),
        near_duplicates=None,
        batch=4,
        **settings,
    )


def reply(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()


def test_a_dead_teachers_answers_are_unknown_and_asked_for_again(server: Any, problems: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ill = {"4 and", "Say"}

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        question = body["messages"][-1]["content"]
        return (500, b"out") if any(question.startswith(start) for start in ill) else reply("\\boxed{1}")

    server.answer = answer
    config = served(server, problems, run_dir=str(run_dir))
    assert generate(config).exit_code == 0
    asked = len(server.seen)
    unknown = [row for row in rows(run_dir) if row.finding.reason == "teacher-fault"]
    assert asked == 20 and len(unknown) == 8  # one sum and three things to say, twice each
    assert all(row.choice.reason == "unknown" and "HTTP 500: out" in row.sample.error for row in unknown)
    assert manifest(run_dir)["verdicts"]["unknown: teacher-fault"] == 8

    generate(dataclasses.replace(config, resume=True))
    assert len(server.seen) == asked  # not without being told to
    ill.clear()
    generate(dataclasses.replace(config, resume=True, retry_unknown=True))
    assert len(server.seen) == asked + 8
    found = rows(run_dir)
    assert len(found) == 20 and all(row.sample.text == "\\boxed{1}" for row in found)
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.retried(unknown[0].sample.key) == [unknown[0].sample.error]


def test_a_server_that_moved_is_asked_for_the_rest(server: Any, problems: Path, tmp_path: Path) -> None:
    server.answer = lambda body: reply("\\boxed{1}")
    config = served(server, problems, run_dir=str(tmp_path / "run"))
    dead = dataclasses.replace(config.experts[0], endpoint="http://127.0.0.1:1/v1")
    assert generate(dataclasses.replace(config, experts=(dead,))).exit_code == 0
    generate(dataclasses.replace(config, resume=True, retry_unknown=True))
    assert {row.finding.outcome for row in rows(tmp_path / "run")} <= {"right", "wrong", "unknown"}
    assert all(row.sample.text == "\\boxed{1}" for row in rows(tmp_path / "run"))


def test_two_at_once_are_refused(server: Any, problems: Path, tmp_path: Path) -> None:
    go_on = threading.Event()
    server.answer = lambda body: (go_on.wait(20), reply("\\boxed{1}"))[1]
    config = served(server, problems, run_dir=str(tmp_path / "run"), resume=True)
    first = threading.Thread(target=generate, args=(config,))
    first.start()
    try:
        while not server.seen:
            time.sleep(0.01)
        with pytest.raises(UserError, match="in use by another run"):
            generate(config)
    finally:
        go_on.set()
        first.join()
    assert len(rows(tmp_path / "run")) == 20


def test_the_key_is_written_nowhere(
    server: Any, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-canary-0123456789")
    server.answer = lambda body: (401, b"bad key sk-canary-0123456789")
    config = served(server, problems, run_dir=str(tmp_path / "run"))
    generate(dataclasses.replace(config, experts=(dataclasses.replace(config.experts[0], key_env="TEACHER_KEY"),)))
    assert server.keys == {"Bearer sk-canary-0123456789"}
    assert all(b"sk-canary" not in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(samples=0), "samples=0"),
        (dict(fp8=True), "fp8=True: .* not auto; set backend to native"),
        (dict(reasoning=False, original="none"), "nothing is asked for"),
        (dict(endpoint="http://example.com/v1"), "plain http"),
        (dict(temperature=-1.0), "temperature=-1"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertConfig(**settings)


def test_experts_and_policies_that_can_not_be_are_refused() -> None:
    with pytest.raises(UserError, match="experts: one for each domain"):
        DistillConfig(experts=(ExpertConfig(), ExpertConfig()))
    with pytest.raises(UserError, match="a scorer is for policy=best"):
        DistillConfig(policy="best")
