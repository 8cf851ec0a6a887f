"""What a correction for the sampler keeps is reported by length, and a run in which too little is left stops."""

import math

import pytest
import torch

from rl.config import GRPOConfig, LossConfig, SamplingConfig
from rl.gap import SamplerGap, check_gap
from rl.loss import LossInputs
from runtime.distributed import World


def inputs(gaps: list[list[float]]) -> LossInputs:
    """Completions given as log π_old − log π_sampler of their tokens."""
    lengths = torch.tensor([len(row) for row in gaps])
    sampler = torch.zeros(int(lengths.sum()))
    old = torch.tensor([gap for row in gaps for gap in row])
    return LossInputs(
        logp=old,
        old=old,
        sampler=sampler,
        reference=None,
        sequence=torch.arange(len(gaps)).repeat_interleave(lengths),
        advantages=torch.ones(len(gaps)),
        lengths=lengths,
    )


def check(gaps: list[list[float]], *, limit: float = 99.0, **loss) -> dict[str, float]:
    config = GRPOConfig(sampling=SamplingConfig(gap_limit=limit), loss=LossConfig(**loss))
    return check_gap([inputs(gaps[:3]), inputs(gaps[3:])], config, World())


def test_by_hand():
    gaps = [[0.5, -0.25], [0.0], [0.0], [1.0]]
    metrics = check(gaps, importance_floor=0.0)
    assert metrics["sampling/logp_gap/mean"] == pytest.approx(1.75 / 5)
    assert metrics["sampling/logp_gap/max"] == 1.0
    w = [math.exp(0.5), math.exp(-0.25), 1, 1, 2.0]  # e is above the cap of 2
    assert metrics["sampling/kept"] == pytest.approx(4 / 5)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(sum(w) ** 2 / (5 * sum(x * x for x in w)))


def test_whole_completions_are_what_has_a_weight_in_sequence_corrections():
    gaps = [[0.5, -0.25], [0.0], [0.0], [0.5, 0.5]]  # e^0.25, 1, 1, e
    metrics = check(gaps, importance="sequence_mask", importance_floor=0.0)
    w = [math.exp(0.25), 1, 1, 0]
    assert metrics["sampling/kept"] == pytest.approx(3 / 4)
    assert metrics["sampling/effective_sample_size"] == pytest.approx(sum(w) ** 2 / (4 * sum(x * x for x in w)))


def by_length(short: float, long: float) -> list[list[float]]:
    """200 completions of 1 to 200 tokens; every token off by `short`, those of the longest tenth by `long`."""
    return [[long if n > 180 else short] * n for n in range(1, 201)]


def test_kept_and_effective_shares_are_reported_by_length():
    metrics = check(by_length(0.0, 1.0), importance="token_mask", importance_floor=0.0)
    kept = [metrics[f"sampling/kept/length_{i:02d}"] for i in range(1, 11)]
    assert kept == [1.0] * 9 + [0.0]
    assert metrics["sampling/effective_sample_size/length_10"] == 0.0
    assert metrics["sampling/kept"] == pytest.approx(1 - sum(range(181, 201)) / sum(range(1, 201)))


def test_a_run_that_only_loses_its_long_answers_stops():
    with pytest.raises(
        SamplerGap, match=r"importance_floor=0\.2: of the 20 completions of 181 to 200 tokens.*kept of 0"
    ):
        check(by_length(0.0, 1.0), importance="token_mask")
    check(by_length(0.0, 0.1), importance="token_mask")
    # The same gap a token, but the product over a long answer is out of all bounds.
    with pytest.raises(SamplerGap, match=r"181 to 200 tokens, loss\.importance=sequence_mask"):
        check(by_length(0.0, 0.01), importance="sequence_mask")


def test_without_a_correction_nothing_is_left_out_and_nothing_stops():
    metrics = check(by_length(0.0, 1.0), importance="none")
    assert metrics["sampling/effective_sample_size"] < 1


def test_too_few_completions_of_a_length_do_not_stop_a_run():
    check([[1.0 if n == 19 else 0.0] * n for n in range(1, 20)], importance="token_mask")


def test_the_mean_gap_has_its_own_limit():
    with pytest.raises(SamplerGap, match=r"sampling\.gap_limit=0\.1: .* is 0\.5 nats"):
        check([[0.5], [-0.5], [0.5], [0.5]], limit=0.1)


def test_nothing_to_train_on_has_no_gap():
    assert check_gap([], GRPOConfig(), World())["sampling/logp_gap/mean"] == 0
