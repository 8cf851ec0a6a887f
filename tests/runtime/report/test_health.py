"""Each check at its threshold: silent on the good side, in plain words on the bad one."""

from pathlib import Path
from typing import Any

import pytest

from runtime.report.figures import derive
from runtime.report.health import CHECKS, Check, Evidence, examine
from runtime.report.ledger import Answers
from runtime.report.read import Run
from runtime.report.rollouts import Scan

NAN = float("nan")


def evidence(series: dict[str, list[float]], config: dict[str, Any] | None = None, **more: Any) -> Evidence:
    """Steps 1, 2, ... of these metrics."""
    longest = max(map(len, series.values()), default=0)
    metrics = [
        {"step": i + 1, **{key: values[i] for key, values in series.items() if i < len(values)}} for i in range(longest)
    ]
    run = Run(path=Path("nowhere"), name="run", metrics=metrics, config=config or {})
    derive(run)
    return Evidence(run=run, **more)


def findings(e: Evidence) -> list[Check]:
    return [check for check in examine(e) if check.finding]


def scan(**values: Any) -> Scan:
    """A step with nothing to say, but for these."""
    usual = dict(step=1, completions=8, advantages=[], groups=2, equal_high=0, equal_low=0, length_pays=NAN)
    return Scan(**usual | values)


PAID = {"rewards.accuracy": 1.0, "rewards.format": 0.5}
LONG = {"completions/mean_length": [100.0] * 4 + [140.0] * 4, "reward": [0.2] * 4 + [0.5] * 4}

# metrics and settings on either side of a threshold, and how the finding begins
CASES: list[tuple[str, dict[str, list[float]], dict[str, list[float]], dict[str, Any]]] = [
    (
        "62% of groups all-equal in step 4:",
        {"frac_reward_zero_std": [0, 0, 0, 0.62]},
        {"frac_reward_zero_std": [0.5]},
        {},
    ),
    ("6% of the rewards are unknown", {"rewards/unknown": [0.06]}, {"rewards/unknown": [0.05]}, {}),
    (
        "21% of the completions are cut at the length limit",
        {"completions/clipped_ratio": [0.21]},
        {"completions/clipped_ratio": [0.2, 0.9, 0.2, 0.2]},
        {},
    ),
    (
        "Held-out accuracy fell from 60.0% to 40.0%",
        {"eval/accuracy": [0.6, 0.4], "eval/accuracy_low": [0.5, 0.3], "eval/accuracy_high": [0.7, 0.49]},
        {"eval/accuracy": [0.6, 0.4], "eval/accuracy_low": [0.5, 0.3], "eval/accuracy_high": [0.7, 0.5]},
        {},
    ),
    (
        "The reward fell from 0.5 to 0.3",
        {"reward": [0.5] * 6 + [0.3] * 2},
        {"reward": [0.5] * 6 + [0.36] * 2},
        PAID,
    ),
    (
        "Completions grew by 40%",
        LONG | {"rewards/accuracy/mean": [0.3] * 8},
        LONG | {"rewards/accuracy/mean": [0.3] * 4 + [0.5] * 4},  # it pays: no hack
        {},
    ),
    (
        "90% of the reward is format",
        {"rewards/accuracy/mean": [0.05], "rewards/format/mean": [0.9]},
        {"rewards/accuracy/mean": [0.2], "rewards/format/mean": [0.9]},
        PAID,
    ),
    ("The reward is at 1.45 of 1.5", {"reward": [1.45]}, {"reward": [1.4]}, PAID),
    ("Entropy fell from 1 to 0.19", {"entropy": [1, 1, 1, 1, 0.19]}, {"entropy": [1, 1, 1, 1, 0.2]}, {}),
    ("The policy is 0.6 nats per token from its reference", {"kl": [0.6]}, {"kl": [0.5]}, {}),
    (
        "The clip holds back 21% of the tokens",
        {"clip_ratio/region_mean": [0.21]},
        {"clip_ratio/region_mean": [0.2]},
        {},
    ),
    (
        "Sampler and trainer disagree by 0.06",
        {"sampling/logp_gap/mean": [0.06]},
        {"sampling/logp_gap/mean": [0.05]},
        {},
    ),
    (
        "The sampler–trainer gap rose from 0.001 to 0.0031",
        {"sampling/logp_gap/mean": [0.001] * 6 + [0.0031] * 2},
        {"sampling/logp_gap/mean": [0.001] * 6 + [0.003] * 2},
        {},
    ),
    (
        "After step 3 the sampler had the weights of step 2",
        {"weights/version": [1, 2, 2]},
        {"weights/version": [1, 2, 3]},
        {},
    ),
    (
        "The gradient norm reached 21 at step 8, usual is 1",
        {"grad_norm": [1] * 7 + [21.0]},
        {"grad_norm": [1] * 7 + [20.0]},
        {},
    ),
    (
        "The held-out loss rose from 1.000 at step 2 to 1.030",
        {"eval/loss": [2.0, 1.0, 1.03]},
        {"eval/loss": [2.0, 1.0, 1.02]},
        {},
    ),
    (
        "Packed rows are 89% full",
        {"num_tokens": [89.0, 89.0, 10.0]},
        {"num_tokens": [90.0, 90.0, 10.0]},  # the last step has fewer rows
        {"mix": ["x"], "rows_per_step": 1, "row_length": 100},
    ),
    (
        "2.0% of the rows were set aside (2)",
        {"data/examples": [98.0], "data/rejected/empty": [2.0]},
        {"data/examples": [99.0], "data/rejected/empty": [1.0]},
        {},
    ),
    (
        "40% of the time goes into weight sync",
        {"time/sync": [4.0], "time/rollout": [6.0]},
        {"time/sync": [3.0], "time/rollout": [7.0]},
        {},
    ),
]


@pytest.mark.parametrize(("words", "bad", "good", "config"), CASES, ids=[case[0] for case in CASES])
def test_a_finding_begins_at_its_threshold(
    words: str, bad: dict[str, list[float]], good: dict[str, list[float]], config: dict[str, Any]
) -> None:
    said = [check.finding for check in findings(evidence(bad, config))]
    assert len(said) == 1 and said[0].startswith(words), said
    assert findings(evidence(good, config)) == []


def test_all_equal_groups_are_told_by_where_they_are() -> None:
    equal = {"frac_reward_zero_std": [0.7]}
    easy = findings(evidence(equal, scans=[scan(equal_high=3, equal_low=1)]))[0].finding
    assert "raise difficulty or group size" in easy and "3 are all at the top of the reward and 1 at its bottom" in easy
    hard = findings(evidence(equal, scans=[scan(equal_high=1, equal_low=3)]))[0].finding
    assert "easier prompts" in hard


def test_length_that_pays_within_groups() -> None:
    late = [scan(step=s, length_pays=r) for s, r in ((1, 0.1), (2, 0.1), (3, 0.1), (4, 0.9))]
    (check,) = findings(evidence({}, scans=late))
    assert check.finding.startswith("Within groups, reward and length correlate at +0.90") and check.steps == (4,)
    assert findings(evidence({}, scans=[scan(length_pays=0.8)])) == []
    assert examine(evidence({}, scans=[scan()])) == []


def test_updates_left_out_are_named(tmp_path: Path) -> None:
    for step in (3, 7):
        (tmp_path / f"skipped-{step:06d}.json").write_text("{}")
    run = Run(path=tmp_path, name="run", metrics=[{"step": 1, "grad_norm": 1.0}])
    (check,) = findings(Evidence(run=run))
    assert "2 updates were left out" in check.finding and "skipped-000003.json" in check.finding
    assert check.steps == (3, 7)


def answers(**values: Any) -> Answers:
    usual: dict[str, Any] = dict(table=[], verdicts=[], choices=[], aside=[], sampled=100, right=50, unknown=0)
    return Answers(**usual | values)


@pytest.mark.parametrize(
    ("words", "bad", "good"),
    [
        ("19% of the sampled answers are right", {"right": 19}, {"right": 20}),
        ("6% of the sampled answers have no verdict", {"unknown": 6}, {"unknown": 5}),
        (
            "75% of the problems are always or never solved (50% never)",
            {"pass_rates": [0.0, 0.0, 1.0, 0.5]},
            {"pass_rates": [0.0] * 4 + [1.0] * 3 + [0.5] * 3},
        ),
    ],
)
def test_a_distillations_findings(words: str, bad: dict[str, Any], good: dict[str, Any]) -> None:
    (check,) = findings(evidence({}, answers=answers(**bad)))
    assert check.finding.startswith(words)
    assert findings(evidence({}, answers=answers(**good))) == []


def test_a_reward_models_findings() -> None:
    def said(before: float, after: float, low: float) -> list[str]:
        pairs = {"before": before, "after": after, "low": low, "high": 1.0}
        return [check.finding for check in findings(evidence({}, pairs=pairs))]

    assert said(0.5, 0.6, 0.51) == []
    assert said(0.5, 0.6, 0.5)[0].startswith("60.0% of the held-out pairs are put right, no better than chance")
    assert said(0.7, 0.6, 0.55) == ["Held-out pairs put right fell from 70.0% to 60.0%."]


def test_a_run_without_numbers_has_nothing_to_check() -> None:
    assert examine(evidence({})) == []
    assert len(CHECKS) == len(set(CHECKS)) == 25


def test_every_finding_has_a_threshold_and_a_figure() -> None:
    for words, bad, _, config in CASES:
        for check in findings(evidence(bad, config)):
            assert check.limit and check.value and check.figure, words
