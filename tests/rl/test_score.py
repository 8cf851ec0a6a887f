"""The scorer with real child processes: a fault stays in its row, and no process is left behind."""

import contextlib
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl.score import Scorer, Scores, Unknown

GOOD = r"<think></think>\boxed{3}"
BAD = r"<think></think>\boxed{4}"


def _score(reward: Any, completions: list[Any], **options: Any) -> Scores:
    with Scorer({reward: 1.0}, **options) as scorer:
        return scorer.score(["p"] * len(completions), completions, [[1]] * len(completions))


def _rows(scores: Scores) -> list[float | str]:
    """Totals, with the reason in place of each unknown."""
    rows: list[float | str] = list(scores.total)
    for unknown in scores.unknown:
        assert math.isnan(scores.total[unknown.row])
        rows[unknown.row] = unknown.reason
    return rows


def _children() -> set[int]:
    """Pids of this process's children, zombies too."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
    return pids


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Any:
    before = _children()
    yield
    deadline = time.monotonic() + 5  # a killed process takes a moment to be gone
    while left := _children() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_parts_are_weighted_and_summed() -> None:
    with Scorer({"accuracy": 1.0, "format": 0.25}) as scorer:
        scores = scorer.score(["p"] * 3, [GOOD, BAD, "3"], [[1]] * 3, {"answer": ["3", "3", "3"]})
    assert scores.parts == {"accuracy": [1.0, 0.0, 0.0], "format": [1.0, 1.0, 0.0]}
    assert scores.total == [1.25, 0.25, 0.0]
    assert scores.unknown == []


def test_an_unknown_part_makes_the_total_unknown_unless_its_weight_is_zero() -> None:
    columns = {"answer": ["3", None]}
    with Scorer({"accuracy": 1.0, "format": 1.0}) as scorer:
        paid = scorer.score(["p"] * 2, [GOOD, GOOD], [[1]] * 2, columns)
    with Scorer({"accuracy": 0.0, "format": 1.0}) as scorer:
        measured = scorer.score(["p"] * 2, [GOOD, GOOD], [[1]] * 2, columns)
    assert paid.total[0] == 2.0 and math.isnan(paid.total[1])
    assert measured.total == [1.0, 1.0] and math.isnan(measured.parts["accuracy"][1])
    assert paid.unknown == measured.unknown == [Unknown(row=1, reward="accuracy", reason="returned None")]


def test_a_gated_reward_is_paid_where_its_gate_is_one_and_reported_everywhere() -> None:
    columns = {"answer": ["3", "3", None, None]}
    completions = [GOOD, BAD, GOOD, "3"]
    with Scorer({"accuracy": 0.0, "format": 0.25}, gates={"format": "accuracy"}) as scorer:
        scores = scorer.score(["p"] * 4, completions, [[1]] * 4, columns)
        assert scorer.score([], [], [], {"answer": []}).total == []
    assert scores.parts["format"] == [1.0, 1.0, 1.0, 0.0]
    assert scores.total[:2] == [0.25, 0.0] and math.isnan(scores.total[2])
    assert scores.total[3] == 0.0  # without the format, the unknown accuracy doesn't matter


def test_options_reach_a_reward_in_its_process() -> None:
    with Scorer({"rewards.length.length_reward(max_tokens=4, buffer=2)": 1.0}) as scorer:
        assert scorer.score(["p"] * 3, ["a"] * 3, [[1] * 2, [1] * 3, [1] * 9]).total == [0.0, -0.5, -1.0]


def test_a_call_looks_as_trl_makes_it() -> None:
    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        columns["log_metric"]("pairs", 1)
        columns["log_metric"]("pairs", 2.0)
        columns["log_extra"](
            "seen",
            [f"{p}{c[0]['content']}{i}" for p, c, i in zip(prompts, completions, completion_ids, strict=True)],
        )
        assert columns["trainer_state"].global_step == 7
        assert set(columns) == {"answer", "trainer_state", "log_metric", "log_extra"}
        return [float(answer) for answer in columns["answer"]]

    talk = [[{"role": "assistant", "content": text}] for text in "ab"]
    with Scorer({reward: 2.0}) as scorer:
        columns = {"answer": ["1", "2"], "prompt": ["x", "y"]}
        scores = scorer.score(["p", "q"], talk, [[5], [6, 7]], columns, step=7)
    assert scores.total == [2.0, 4.0]
    assert scores.metrics == {"pairs": 1.5}
    assert scores.columns == {"seen": ["pa[5]", "qb[6, 7]"]}


def test_a_closure_a_lambda_an_async_function_and_a_partial_run() -> None:
    bonus = 0.5

    def closure(completions: Any, **_: Any) -> list[float]:
        return [bonus] * len(completions)

    async def later(completions: Any, **_: Any) -> list[float]:
        return [0.25 for _ in completions]

    with Scorer({closure: 1.0, (lambda completions, **_: [True for _ in completions]): 1.0, later: 1.0}) as scorer:
        scores = scorer.score(["p"] * 2, ["a", "b"], [[1]] * 2)
    assert scores.parts == {"closure": [0.5, 0.5], "<lambda>": [1.0, 1.0], "later": [0.25, 0.25]}


def test_a_dotted_name_runs_from_a_module_only_the_parents_path_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text("def length(completions, **_):\n    return map(len, completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    scores = _score("my_rewards.length", ["a", "bbb"])
    assert scores.parts == {"my_rewards.length": [1.0, 3.0]}


def test_numpy_scalars_count_and_odd_values_are_unknown() -> None:
    def reward(completions: Any, **_: Any) -> list[Any]:
        import numpy as np

        odd = [np.float32(0.5), np.bool_(True), 2, None, float("nan"), -math.inf, "1", object(), 10**400]
        return odd[: len(completions)]

    *known, none, nan, inf, text, thing, huge = _rows(_score(reward, ["a"] * 9))
    assert known == [0.5, 1.0, 2.0]
    assert (none, nan, inf, text) == ("returned None", "returned NaN", "returned inf", "returned a str")
    assert str(thing).startswith("returned object") and str(huge).startswith("returned int")


def _raises(text: str) -> float:
    raise KeyError(text)


def _exits(text: str) -> float:
    os._exit(3)


def _crashes(text: str) -> float:
    import ctypes

    return float(len(ctypes.string_at(0)))


def _spins(text: str) -> float:
    while True:
        pass


def _sleeps(text: str) -> float:
    time.sleep(60)
    return 0.0


def _holds_the_gil(text: str) -> float:
    return float(9**9**9)


def _on_bad_rows(fault: Callable[[str], float]) -> Callable[..., list[float]]:
    """A reward that works, except on "bad" completions. Built here so that it is sent by value."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [fault(text) if text == "bad" else 1.0 for text in completions]

    return reward


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_raises, "raised KeyError: 'bad'"),
        (_exits, "worker exited (code 3)"),
        (_crashes, "worker died (signal 11)"),
        (_spins, "time limit 0.5 s"),
        (_sleeps, "time limit 0.5 s"),
        (_holds_the_gil, "time limit 0.5 s"),
    ],
)
def test_a_fault_in_one_row_makes_only_that_row_unknown(fault: Callable[[str], float], reason: str) -> None:
    scores = _score(_on_bad_rows(fault), ["a", "bad", "c"], time_limit=0.5)
    assert _rows(scores) == [1.0, reason, 1.0]


def test_the_next_batch_after_a_kill_is_scored() -> None:
    with Scorer({_on_bad_rows(_spins): 1.0}, time_limit=0.3) as scorer:
        first = scorer.score(["p"], ["bad"], [[1]])
        second = scorer.score(["p"], ["good"], [[1]])
    assert _rows(first) == ["time limit 0.3 s"] and _rows(second) == [1.0]


def test_a_miscount_is_named_and_does_not_shift_the_rows() -> None:
    def drops_empty(completions: list[str], **_: Any) -> list[float]:
        return [1.0 for text in completions if text]

    assert _rows(_score(drops_empty, ["a", "", "c"])) == [1.0, "returned 0 values for 1 completions", 1.0]
    assert _rows(_score(drops_empty, [""])) == ["returned 0 values for 1 completions"]


def test_after_max_failures_the_rest_of_the_batch_is_not_tried() -> None:
    rows = _rows(_score(_on_bad_rows(_raises), ["a", "bad", "bad", "c"], max_failures=2))
    assert rows == [1.0, *["raised KeyError: 'bad'"] * 2, "not tried: 2 rows of this batch failed before it"]


def test_a_reward_that_always_hangs_costs_bounded_time() -> None:
    start = time.monotonic()
    rows = _rows(_score(_on_bad_rows(_spins), ["bad"] * 50, time_limit=0.3, max_failures=2))
    assert rows[0] == "time limit 0.3 s" and str(rows[-1]).startswith("not tried")
    assert time.monotonic() - start < 8


def test_slow_but_working_rows_also_have_a_budget() -> None:
    def slow(completions: list[str], **_: Any) -> list[float]:
        time.sleep(0.05 * len(completions))
        return [1.0] * len(completions)

    rows = _rows(_score(slow, ["a"] * 100, time_limit=0.5, max_failures=2))
    assert rows[0] == 1.0
    assert rows[-1] == "not tried: row by row, this batch took over 1 s"


def test_rewards_run_at_the_same_time(tmp_path: Path) -> None:
    def meets(mine: str, other: str) -> Any:
        def waits_for_the_other(completions: list[str], **_: Any) -> list[float]:
            (tmp_path / mine).touch()
            while not (tmp_path / other).exists():  # for ever, were they called one after the other
                time.sleep(0.01)
            return [1.0] * len(completions)

        waits_for_the_other.__name__ = mine
        return waits_for_the_other

    with Scorer({meets("one", "two"): 1.0, meets("two", "one"): 1.0}, time_limit=60.0) as scorer:
        assert scorer.score(["p"], ["a"], [[1]]).total == [2.0]


def test_printing_and_reading_stdin_do_not_disturb_the_protocol(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(completions: list[str], **_: Any) -> list[float]:
        print("from print", flush=True)
        os.write(1, b"from file descriptor 1\n")
        return [float(len(sys.stdin.read()))] * len(completions)

    assert _score(noisy, ["a"]).total == [0.0]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "from print" in captured.err and "from file descriptor 1" in captured.err


def test_children_of_a_killed_reward_die_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def spawns(completions: list[str], **_: Any) -> list[float]:
        child = subprocess.Popen(["sleep", "60"])
        pid_file.write_text(str(child.pid))
        return [float(child.wait())]

    assert _rows(_score(spawns, ["a"], time_limit=0.5)) == ["time limit 0.5 s"]
    status = Path("/proc", pid_file.read_text(), "status")
    deadline = time.monotonic() + 5
    while status.exists() and "Z (zombie)" not in status.read_text():  # a zombie is init's to reap
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_large_batch_crosses_the_pipes() -> None:
    completions = ["é" * 1_000_000] * 8
    assert _score(lambda completions, **_: map(len, completions), completions).total == [1_000_000.0] * 8


def test_an_error_in_the_parent_closes_the_processes() -> None:
    with pytest.raises(RuntimeError), Scorer({"accuracy": 1.0}) as scorer:
        scorer.start()
        assert len(_children()) >= 1
        raise RuntimeError
    with pytest.raises(ValueError, match="closed"):
        scorer.score(["p"], ["a"], [[1]], {"answer": ["1"]})


def test_a_worker_dies_with_its_parent_even_in_a_hang(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = textwrap.dedent(f"""
        import os, pathlib, threading, time
        from rl.score import Scorer
        def hang(completions, **_):
            pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
            return [float(9**9**9)]
        scorer = Scorer({{hang: 1.0}}, time_limit=60)
        threading.Thread(target=scorer.score, args=(["p"], ["a"], [[1]]), daemon=True).start()
        while not (pathlib.Path({str(pid_file)!r}).exists() and pathlib.Path({str(pid_file)!r}).read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """)
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, timeout=30, check=False)
    status = Path("/proc", pid_file.read_text(), "status")
    deadline = time.monotonic() + 5
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards is empty"),
        ({"acuracy": 1.0}, "did you mean 'accuracy'"),
        ({"accuracy": math.nan}, "weight of 'accuracy' is nan"),
        ({(lambda: 0): 1.0, (lambda: 1): 1.0}, "two functions are called '<lambda>'"),
        ({"lenght(max_tokens=4.5)": 1.0}, "did you mean 'length'"),
    ],
)
def test_a_bad_configuration_fails_before_anything_starts(rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(rewards)


def test_a_gate_between_rewards_that_are_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gates: 'acuracy' is not one of the rewards \(did you mean 'accuracy'\?\)"):
        Scorer({"accuracy": 1.0, "format": 1.0}, gates={"format": "acuracy"})


def test_a_reward_that_cannot_be_loaded_is_an_error_not_a_batch_of_unknowns() -> None:
    with (
        Scorer({"no_such_module.f": 1.0}) as scorer,
        pytest.raises(ValueError, match="No module named 'no_such"),
    ):
        scorer.start()
    lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="can't be sent to a reward process"):
        Scorer({(lambda completions, **_: [lock.locked()]): 1.0})


def test_columns_must_fit_the_batch() -> None:
    with Scorer({"accuracy": 1.0}) as scorer:
        with pytest.raises(ValueError, match="answer: 1 values for 2 completions"):
            scorer.score(["p"] * 2, ["a", "b"], [[1]] * 2, {"answer": ["1"]})
        with pytest.raises(ValueError, match="'trainer_state' is the trainer's own argument"):
            scorer.score(["p"], ["a"], [[1]], {"trainer_state": [0]})
        assert scorer.score([], [], [], {"answer": []}) == Scores(parts={"accuracy": []}, total=[], unknown=[])
