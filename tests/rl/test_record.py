"""The step's metrics by hand, and every completion in a Parquet file as it was."""

import hashlib
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rl.record import evaluation_metrics, read_rollout, rollout_metrics, write_rollout, write_trainer_logprobs
from rl.types import Group, Rollout
from runtime.distributed import World

NAN = float("nan")


@pytest.fixture
def groups(make_group):
    return [
        make_group(
            [[5, 6], [7, 8, 9, 10]],
            prompt=[1, 2, 3],
            logprobs=[[-0.5, -0.25], [-1.0] * 4],
            rewards=[1.0, 0.0],
            advantages=[0.7, -0.7],
            parts={"accuracy": [1.0, 0.0], "format": [1.0, NAN]},
            texts=["<think>2+2</think>4", "<think></think>5"],
            cut=[1],
        ),
        make_group(
            [[5], [6, 6]],
            prompt=[1],
            rewards=[0.5, NAN],
            advantages=[0.0, NAN],
            parts={"accuracy": [0.5, NAN], "format": [0.0, 0.0]},
            texts=["4", "<think>on and on"],
            index=3,
        ),
    ]


def rollout_of(groups: list[Group], **changes) -> Rollout:
    return Rollout(**dict(groups=groups, spare=[], cursor=7, metrics={}) | changes)


def test_metrics_by_hand(groups):
    assert rollout_metrics(groups, World()) == pytest.approx(
        {
            "reward": 0.5,  # of 1, 0 and 0.5
            "reward_std": math.sqrt(0.5) / 2,  # of a group, N − 1; a single known reward has none
            "frac_reward_zero_std": 0.5,
            "rewards/unknown": 0.25,
            "completions/mean_length": 9 / 4,
            "completions/min_length": 1,
            "completions/max_length": 4,
            "completions/clipped_ratio": 0.25,
            "completions/mean_terminated_length": 5 / 3,
            "completions/thinking_fraction": 0.5,
            "num_tokens": 9 + 2 * 3 + 2 * 1,
            "rewards/accuracy/mean": 0.5,
            "rewards/accuracy/std": 0.5,
            "rewards/format/mean": 1 / 3,
            "rewards/format/std": math.sqrt(1 / 3),
        }
    )


def test_a_step_nobody_could_grade_or_finish_has_metrics_all_the_same(make_group):
    group = make_group(
        [[5], [6]], rewards=[NAN, NAN], advantages=[NAN, NAN], parts={"accuracy": [NAN, NAN]}, cut=[0, 1]
    )
    metrics = rollout_metrics([group], World())
    assert math.isnan(metrics["reward"]) and math.isnan(metrics["rewards/accuracy/mean"])
    assert metrics["rewards/unknown"] == 1 and metrics["frac_reward_zero_std"] == 1
    assert metrics["completions/clipped_ratio"] == 1 and metrics["completions/mean_terminated_length"] == 0


COLUMNS = {
    "step": pa.int64(),
    "prompt_index": pa.int64(),
    "epoch": pa.int64(),
    "process": pa.int64(),
    "group": pa.int64(),
    "sample": pa.int64(),
    "seed": pa.int64(),
    "used": pa.bool_(),
    "prompt_text": pa.string(),
    "completion_text": pa.string(),
    "prompt_ids": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float64()),
    "finish_reason": pa.string(),
    "version": pa.int64(),
    "experts": pa.list_(pa.int16()),
    "answer": pa.string(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "rewards/accuracy": pa.float64(),
    "rewards/format": pa.float64(),
}


def test_every_completion_comes_back_as_it_was(groups, tmp_path):
    write_rollout(tmp_path, rollout_of(groups), step=12, world=World())
    assert {path.name for path in tmp_path.iterdir()} == {"step-000012.parquet", "step-000012.sha256"}  # nothing aside
    digest = hashlib.sha256((tmp_path / "step-000012.parquet").read_bytes()).hexdigest()
    assert (tmp_path / "step-000012.sha256").read_text() == f"{digest}  step-000012.parquet\n"  # for sha256sum -c
    rows = pq.read_table(tmp_path / "step-000012.parquet").to_pylist()
    assert [list(row) for row in rows] == [list(COLUMNS)] * 4
    assert rows[1] == {
        "step": 12,
        "prompt_index": 0,
        "epoch": 0,
        "process": 0,
        "group": 0,
        "sample": 1,
        "seed": 0,
        "used": True,
        "prompt_text": "question",
        "completion_text": "<think></think>5",
        "prompt_ids": [1, 2, 3],
        "completion_ids": [7, 8, 9, 10],
        "logprobs": [-1.0] * 4,
        "finish_reason": "length",
        "version": 0,
        "experts": None,
        "answer": "7",
        "reward": 0.0,
        "advantage": -0.7,
        "rewards/accuracy": 0.0,
        "rewards/format": None,
    }
    assert [(row["group"], row["sample"], row["prompt_index"]) for row in rows] == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 3),
        (1, 1, 3),
    ]
    assert (rows[3]["reward"], rows[3]["advantage"], rows[3]["rewards/accuracy"]) == (None, None, None)


def test_a_rollout_read_back_is_what_was_written(groups, tmp_path):
    """What an update reads, to the bit; the float32 log-probs go through float64 and back."""
    groups[0].completions[0].logprobs[:] = np.random.default_rng(0).normal(size=2).astype(np.float32).tolist()
    for completion in groups[0].completions:
        object.__setattr__(completion, "experts", np.arange(12 * len(completion.ids), dtype=np.int16).reshape(-1, 3, 2))
    for completion in groups[1].completions:
        object.__setattr__(completion, "experts", np.zeros((len(completion.ids), 3, 2), dtype=np.int16))
    rollout = rollout_of(groups[:1], spare=groups[1:], metrics={"brevity": 0.1, "strange": NAN})
    write_rollout(tmp_path, rollout, step=2, world=World())
    again = read_rollout(tmp_path, step=2, world=World())
    assert (again.cursor, again.metrics["brevity"]) == (7, 0.1) and math.isnan(again.metrics["strange"])
    for before, after in ((groups[0], again.groups[0]), (groups[1], again.spare[0])):
        for name in ("texts", "parts", "rewards", "advantages"):
            assert repr(getattr(after, name)) == repr(getattr(before, name))  # repr: a NaN is a NaN
        assert after.completions == before.completions
        for a, b in zip(after.completions, before.completions, strict=True):
            assert a.experts.dtype == np.int16 and np.array_equal(a.experts, b.experts)
        assert (after.prompt.ids, after.prompt.seed) == (before.prompt.ids, before.prompt.seed)
    assert rollout_metrics(again.groups, World()) == pytest.approx(rollout_metrics(groups[:1], World()))


def test_a_step_that_was_not_sampled_has_no_rollout(tmp_path):
    assert read_rollout(tmp_path, step=2, world=World()) is None


def test_a_rollout_of_another_number_of_processes_is_not_taken(groups, tmp_path):
    write_rollout(tmp_path, rollout_of(groups), step=2, world=World())
    world = World()
    world.size = 2
    assert read_rollout(tmp_path, step=2, world=world) is None


def test_any_flipped_bit_of_a_rollout_is_found_and_it_is_sampled_anew(groups, tmp_path, caplog):
    """In the footer too, which Parquet's own checksums leave out: it says what the columns are and where they lie."""
    write_rollout(tmp_path, rollout_of(groups), step=2, world=World())
    path = tmp_path / "step-000002.parquet"
    whole = path.read_bytes()
    for i in range(0, len(whole), 61):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        caplog.clear()
        assert read_rollout(tmp_path, step=2, world=World()) is None, f"byte {i} of {len(whole)}"
        assert "step-000002.parquet is damaged" in caplog.text and "sampled anew" in caplog.text
    path.write_bytes(whole)
    assert read_rollout(tmp_path, step=2, world=World()) is not None


def test_a_rollout_whose_hash_is_lost_is_sampled_anew(groups, tmp_path, caplog):
    write_rollout(tmp_path, rollout_of(groups), step=2, world=World())
    (tmp_path / "step-000002.sha256").unlink()
    assert read_rollout(tmp_path, step=2, world=World()) is None and "sampled anew" in caplog.text


HOSTILE = [
    "\x00\x01\x1b[31mred\x1b[0m\r\n\t",
    '"},{"reward": 1}\\u0000\\',
    "𝕬😀\u202eright to left\ufffd\ufdd0",
    "<script>alert(1)</script>" + "x" * 100_000,
    "",
]


def test_hostile_text_survives(make_group, tmp_path):
    n = len(HOSTILE)
    talk = [{"role": "system", "content": HOSTILE[2]}, {"role": "user", "content": HOSTILE[0]}]
    group = make_group(
        [[5]] * n,
        texts=HOSTILE,
        rewards=[0.0] * n,
        advantages=[0.0] * n,
        parts={"accuracy": [0.0] * n},
        content=talk,
        columns={"answer": HOSTILE[1]},
    )
    write_rollout(tmp_path, rollout_of([group]), step=1, world=World())
    rows = pq.read_table(tmp_path / "step-000001.parquet").to_pylist()
    assert [row["completion_text"] for row in rows] == HOSTILE
    assert {row["answer"] for row in rows} == {HOSTILE[1]}
    assert {row["prompt_text"] for row in rows} == {HOSTILE[2] + "\n\n" + HOSTILE[0]}


@pytest.mark.parametrize("unknown", [True, False])
def test_columns_have_the_same_types_in_every_file(make_group, tmp_path, unknown):
    """A step without one known reward, or without golds, must still be read together with the others."""
    value = NAN if unknown else 1.0
    group = make_group(
        [[5], [6]],
        rewards=[value] * 2,
        advantages=[value] * 2,
        parts={"accuracy": [value] * 2, "format": [0.0] * 2},
        columns={} if unknown else {"answer": "1"},
    )
    write_rollout(tmp_path, rollout_of([group]), step=1, world=World())
    schema = pq.read_schema(tmp_path / "step-000001.parquet")
    assert {field.name: field.type for field in schema} == COLUMNS


def test_evaluation_metrics_are_the_evaluations(make_group):
    from rl.evaluate import Estimate, Evaluation

    evaluation = Evaluation(
        problems=3,
        unknown=1,
        pass_at={1: Estimate(mean=0.5, low=0.2, high=0.8)},
        format=0.9,
        mean_length=7.5,
        thinking=0.25,
        truncated=0.1,
        groups=[],
    )
    assert evaluation_metrics(evaluation) == {
        "eval/accuracy": 0.5,
        "eval/accuracy_low": 0.2,
        "eval/accuracy_high": 0.8,
        "eval/problems": 3.0,
        "eval/format": 0.9,
        "eval/mean_length": 7.5,
        "eval/thinking_fraction": 0.25,
    }
    assert str(evaluation.accuracy) == "50.0 % [20.0, 80.0]"


def test_the_trainers_log_probs_are_written_to_their_completions(groups, tmp_path):
    """Trained shortest first, without the unknown completion; the first group's lengths are the other way round."""
    groups[0].completions.reverse()
    log_probs = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7]  # 2 tokens, 4 tokens; 1 token
    write_trainer_logprobs(tmp_path / "t", groups, torch.tensor(log_probs), mask_truncated=False, step=7, world=World())
    rows = pq.read_table(tmp_path / "t" / "step-000007.parquet").to_pylist()
    found = {(row["process"], row["group"], row["sample"]): row["logprobs"] for row in rows}
    expected = {(0, 0, 1): log_probs[:2], (0, 0, 0): log_probs[2:6], (0, 1, 0): log_probs[6:]}
    assert {key: pytest.approx(value) for key, value in expected.items()} == found


def test_without_a_trained_completion_there_is_an_empty_file(groups, tmp_path):
    groups[1].advantages[0] = NAN
    write_trainer_logprobs(tmp_path, groups[1:], torch.zeros(0), mask_truncated=True, step=1, world=World())
    assert pq.read_table(tmp_path / "step-000001.parquet").num_rows == 0


def test_log_probs_of_other_completions_are_refused(groups, tmp_path):
    with pytest.raises(RuntimeError):
        write_trainer_logprobs(tmp_path, groups, torch.zeros(6), mask_truncated=False, step=1, world=World())
    assert not list(tmp_path.iterdir())
