"""Whole runs that meet the faults docs/faults.md lists, on the real command: what stops, what goes on, what is said.

Here engines, rewards and updates; disks and folders are in test_faults_files.py, kills in test_kill.py.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from recipes.cli import parse
from rl.config import GRPOConfig
from rl.train import train
from rl.update import MAX_SKIPPED
from runtime.metrics import read_metrics
from sampling.native import NativeSampler

ROOT = Path(__file__).parents[2]
PLAIN = ("--dynamic_sampling.max_rounds=0", "--curriculum.reward=null")
"""For rewards that are not the parity the curriculum goes by."""

REWARDS = '''
import math, os, signal, time
from pathlib import Path
from tiny_rewards import parity

def once(name, act):
    """The first time in a run; what it does is done to the reward's own process."""
    mark = Path(__file__).with_name(name)
    if not mark.exists():
        mark.touch()
        act()

def dies_once(completion_ids, **_):
    once("died", lambda: os.kill(os.getpid(), signal.SIGKILL))
    return parity(completion_ids)

def hangs_once(completion_ids, **_):
    once("hung", lambda: time.sleep(1000))
    return parity(completion_ids)

def dies_of_some(completion_ids, trainer_state, **_):
    if trainer_state.global_step == 0 and any(sum(ids) % 3 == 0 for ids in completion_ids):
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(ids) % 5 / 5 for ids in completion_ids]

def odd(completion_ids, **_):
    return [(math.nan, math.inf, None, 1.0, 0.5, 0.0)[i % 6] for i in range(len(completion_ids))]

def equal(completion_ids, **_):
    return [0.35] * len(completion_ids)

def huge(completion_ids, trainer_state, **_):
    scale = 1e300 if trainer_state.global_step >= 1 else 1.0
    return [scale * (i % 3) for i in range(len(completion_ids))]
'''


@pytest.fixture(scope="module")
def grpo(commands) -> Callable[..., Any]:
    (commands.folder / "faulty_rewards.py").write_text(REWARDS)
    return commands.grpo


def differing(whole: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]


def without_restarts(outcome: dict[str, Any]) -> dict[str, Any]:
    """The metrics count them, and so do the rollouts' headers."""
    tables = {name: io.BytesIO(content) for name, content in outcome.items() if name.endswith(".parquet")}
    found = {name: content for name, content in outcome.items() if not name.startswith("rollouts")}
    found |= {name: pq.read_table(table).to_pylist() for name, table in tables.items()}
    return found | {"metrics": [{k: v for k, v in m.items() if k != "sampling/restarts"} for m in found["metrics"]]}


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]


def rollout(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run_dir / f"rollouts/step-{step:06d}.parquet").to_pylist()


# Engines (3, 4, 5).


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param({"FAILPOINT": "engine/sample:5"}, "died in sample after", id="dead in sample"),
        pytest.param({"FAILPOINT": "engine/load:3"}, "died in load after", id="dead in sync", marks=pytest.mark.slow),
        pytest.param(
            {"FAILPOINT": "engine/sample:5", "FAILPOINT_SIGNAL": "SIGSTOP"},
            "hung in sample: killed after 5 s",
            id="hung in sample",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_engine_lost_in_the_middle_of_a_run_changes_nothing(grpo, whole, outcome, tmp_path, fault, said):
    ended = grpo(tmp_path, "--sampling.process=true", "--sampling.time_limit=5", **fault)
    assert ended.code == 0, ended.output
    assert said in ended.output and "starting it again (1 of 3)" in ended.output
    assert steps(tmp_path)[-1]["sampling/restarts"] == 1
    assert differing(without_restarts(whole), without_restarts(outcome(tmp_path))) == []


@pytest.mark.slow
def test_an_engine_that_keeps_dying_stops_the_run_which_resumes_when_it_is_mended(grpo, whole, outcome, tmp_path):
    flags = ("--sampling.process=true", "--sampling.max_restarts=1")
    ended = grpo(tmp_path, *flags, FAILPOINT="engine/sample:2")
    assert ended.code == 1
    assert (
        "EngineLost" in ended.output and "it was started again 1 times, as sampling.max_restarts allows" in ended.output
    )
    assert grpo(tmp_path).code == 0
    assert differing(without_restarts(whole), without_restarts(outcome(tmp_path))) == []


# Rewards (6, 7, 14, 15, 19).


@pytest.mark.parametrize("fault", ["dies_once", "hangs_once"])
def test_a_reward_process_lost_once_is_started_again_and_nothing_is_unknown(grpo, tmp_path, fault):
    flags = ("--steps=2", "--reward_time_limit=2", *PLAIN)
    undisturbed = grpo(tmp_path / "parity", *flags)
    ended = grpo(tmp_path / fault, *flags, "--rewards", f'{{"faulty_rewards.{fault}": 1.0}}')
    assert (undisturbed.code, ended.code) == (0, 0), ended.output
    assert [m["rewards/unknown"] for m in steps(tmp_path / fault)] == [0, 0]
    assert [m["reward"] for m in steps(tmp_path / fault)] == [m["reward"] for m in steps(tmp_path / "parity")]


def test_rows_that_kill_the_reward_are_unknown_and_the_next_step_is_scored(grpo, tmp_path):
    ended = grpo(tmp_path, "--steps=2", "--group_size=4", "--rewards", '{"faulty_rewards.dies_of_some": 1.0}', *PLAIN)
    assert ended.code == 0, ended.output
    rows = rollout(tmp_path, 1)
    deadly = [sum(row["completion_ids"]) % 3 == 0 for row in rows]
    assert 0 < sum(deadly) < len(rows)
    assert [row["reward"] is None for row in rows] == [row["advantage"] is None for row in rows] == deadly
    assert [m["rewards/unknown"] for m in steps(tmp_path)] == [sum(deadly) / len(rows), 0]
    assert "reward unknown: faulty_rewards.dies_of_some, completion" in ended.output and "signal 9" in ended.output


def test_nan_infinite_and_absent_rewards_leave_their_group(grpo, tmp_path):
    ended = grpo(tmp_path, "--steps=1", "--group_size=6", "--rewards", '{"faulty_rewards.odd": 1.0}', *PLAIN)
    assert ended.code == 0, ended.output
    for first in (0, 6):
        group = rollout(tmp_path, 1)[first : first + 6]
        assert [row["reward"] for row in group] == [None, None, None, 1.0, 0.5, 0.0]
        assert [row["advantage"] for row in group] == [
            None,
            None,
            None,
            pytest.approx(1, abs=1e-3),
            0,
            pytest.approx(-1, abs=1e-3),
        ]
    (line,) = steps(tmp_path)
    assert (line["rewards/unknown"], line["reward"]) == (0.5, 0.5) and math.isfinite(line["grad_norm"])


def test_groups_of_equal_rewards_are_counted_and_move_nothing(grpo, commands, tmp_path):
    ended = grpo(tmp_path, "--loss.beta=0", "--rewards", '{"faulty_rewards.equal": 1.0}', *PLAIN)
    assert ended.code == 0, ended.output
    assert [m["frac_reward_zero_std"] for m in steps(tmp_path)] == [1, 1, 1]
    before = load_file(commands.folder / "model/model.safetensors")
    after = load_file(tmp_path / "checkpoints/final/model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)


# Updates (16) and prompts (17).


def test_updates_that_are_not_finite_are_left_out_named_and_stop_the_run_in_the_end(grpo, tmp_path):
    flags = ("--steps=9", "--loss.advantage=dr_grpo", "--loss.beta=0", "--rewards", '{"faulty_rewards.huge": 1.0}')
    ended = grpo(tmp_path, *flags, *PLAIN)
    assert ended.code == 1 and f"in {MAX_SKIPPED} updates in a row: lower optim.lr" in ended.output
    assert [m["updates/skipped"] for m in steps(tmp_path)] == [0, 1, 2]
    skipped = [f"skipped-{step:06d}.json" for step in range(2, 2 + MAX_SKIPPED)]
    assert sorted(path.name for path in tmp_path.glob("skipped-*")) == skipped
    told = json.loads((tmp_path / skipped[0]).read_text())["groups"]
    rows = rollout(tmp_path, 2)
    assert [group["prompt_index"] for group in told] == [row["prompt_index"] for row in rows if row["sample"] == 0]
    assert told[0]["rewards"] == ["0.0", "1e+300", "2e+300"] and len(told[0]["tokens"]) == 3
    one, three = (load_file(tmp_path / f"checkpoints/step-00000{n}/model.safetensors") for n in (2, 3))
    assert all((one[name] == three[name]).all() for name in one)


def test_a_prompt_that_is_too_long_is_counted_before_the_run(grpo, commands, tmp_path):
    long = json.dumps({"prompt": "What is " + "1 + " * 200 + "1?", "answer": "201"})
    (tmp_path / "data.jsonl").write_text((commands.folder / "problems.jsonl").read_text() + long + "\n")
    flags = ("--steps=2", "--data", str(tmp_path / "data.jsonl"), "--sampling.max_prompt_tokens=64")
    ended = grpo(tmp_path / "run", *flags)
    assert ended.code == 0 and "1 prompts too long" in ended.output
    assert {row["prompt_index"] for step in (1, 2) for row in rollout(tmp_path / "run", step)} <= {0, 1, 2, 3}


# Completions (18), and the list itself.


def test_an_empty_completion_is_rewarded_recorded_and_not_trained_on(commands, tmp_path, monkeypatch):
    """No sampler returns one, as a stop token is part of its completion; a server might."""
    sample = NativeSampler.sample

    def first_is_empty(self, prompts, params, *, seeds):
        groups = sample(self, prompts, params, seeds=seeds)
        return [[dataclasses.replace(group[0], ids=[], logprobs=[]), *group[1:]] for group in groups]

    monkeypatch.setattr(NativeSampler, "sample", first_is_empty)
    flags = ["--config", str(commands.folder / "run.yaml"), "--run_dir", str(tmp_path), "--steps=2", *PLAIN]
    result = train(parse(GRPOConfig, flags, prog="", description=""), rewards={lambda completions, **_: range(6): 1.0})
    assert result.steps == 2
    assert [m["completions/min_length"] for m in steps(tmp_path)] == [0, 0]
    assert all(math.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in steps(tmp_path))
    empty = rollout(tmp_path, 2)[0]
    assert (empty["completion_ids"], empty["completion_text"], empty["reward"]) == ([], "", 0.0)


def test_every_test_that_the_list_of_faults_names_is_there():
    text = (ROOT / "docs/faults.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", text)
    assert len(named) > 50
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []
    rows = re.findall(r"^\| (\d+) \|.*$", text, re.MULTILINE)
    assert sorted({int(row) for row in rows}) == [*range(1, 11), *range(14, 20), *range(21, 26)]
    assert all("::" in line for line in text.splitlines() if re.match(r"\| \d+ \|", line))
