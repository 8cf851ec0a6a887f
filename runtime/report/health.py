"""A run's numbers -> what looks unhealthy, in plain words, each with its threshold, what to do, and where to look.

A check is a function below; CHECKS is their order. One that returns None has nothing to go by. Thresholds are rules of
thumb: they say where to look first, not that something is wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from runtime.report.figures import phase_seconds
from runtime.report.ledger import Answers
from runtime.report.read import Metrics, Run, brief, mean, number, points, values
from runtime.report.rollouts import Scan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at."""

    name: str
    value: str
    limit: str
    """Up to where it is no finding."""
    finding: str = ""
    """Empty: nothing to say."""
    figure: str = ""
    """Id of the figure to look at."""
    steps: tuple[int, ...] = ()
    """Where it shows most."""
    samples: str = ""
    """Query that filters the completions to those concerned."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that checks go by."""

    run: Run
    scans: Sequence[Scan] = ()
    answers: Answers | None = None
    pairs: dict[str, float] = field(default_factory=dict)
    """A reward model's held-out accuracy: before, after, low."""

    @property
    def metrics(self) -> Metrics:
        """Of the run."""
        return self.run.metrics

    def early(self, key: str) -> float:
        """Mean of the first quarter of a metric's values; NaN without any."""
        return mean(_quarters(values(self.metrics, key))[0])

    def late(self, key: str) -> float:
        """Of the last quarter."""
        return mean(_quarters(values(self.metrics, key))[1])

    def worst(self, key: str) -> tuple[int, ...]:
        """The step with the largest value, of the last quarter."""
        tail = _quarters(points(self.metrics, key))[1]
        return (max(tail, key=lambda point: point[1])[0],) if tail else ()

    @property
    def most_reward(self) -> float:
        """What the weights of rewards sum to; 0 where they aren't known."""
        weights = [v for k, v in self.run.config.items() if k.startswith("rewards.") and isinstance(v, int | float)]
        return math.fsum(max(w, 0.0) for w in weights)

    def span(self, key: str) -> str:
        """The steps of the last quarter, in words."""
        steps = [step for step, _ in _quarters(points(self.metrics, key))[1]]
        unit = self.run.unit
        return f"{unit} {steps[0]}" if len(steps) == 1 else f"{unit}s {steps[0]} to {steps[-1]}"


def _quarters(items: list[T]) -> tuple[list[T], list[T]]:
    n = max(1, len(items) // 4)
    return items[:n], items[-n:]


def examine(evidence: Evidence) -> list[Check]:
    """Every check that has something to go by, findings first."""
    made = [check for examiner in CHECKS if (check := examiner(evidence)) is not None]
    return sorted(made, key=lambda check: not check.finding)


# Rewards


def equal_groups(e: Evidence) -> Check | None:
    """Groups that teach nothing."""
    key = "frac_reward_zero_std"
    share = e.late(key)
    if math.isnan(share):
        return None
    high, low = sum(s.equal_high for s in e.scans), sum(s.equal_low for s in e.scans)
    advice = "raise difficulty or group size"
    if low > high:
        advice = "use easier prompts, a warm-up by SFT, or larger groups"
    said = f"{share:.0%} of groups all-equal in {e.span(key)}: {advice}."
    if high + low:
        said += f" Of those that were read, {high:,} are all at the top of the reward and {low:,} at its bottom."
    return Check(
        name="all-equal groups",
        value=f"{share:.0%}",
        limit="50 %",
        finding=said if share > 0.5 else "",
        figure="signal",
        steps=e.worst(key),
        samples="equal=1",
    )


def saturation(e: Evidence) -> Check | None:
    """A reward that has nothing left to give."""
    reward, most = e.late("reward"), e.most_reward
    if math.isnan(reward) or not most:
        return None
    share = reward / most
    said = (
        f"The reward is at {reward:.3g} of {most:g} that its weights sum to: it is saturated. Harder problems, a "
        "finer reward, or an end to the run."
    )
    return Check(
        name="reward over the most its weights allow",
        value=f"{share:.0%}",
        limit="95 %",
        finding=said if share > 0.95 else "",
        figure="reward",
        samples="verdict=right",
    )


def reward_fell(e: Evidence) -> Check | None:
    """A policy that loses what it could do."""
    before, after, most = e.early("reward"), e.late("reward"), e.most_reward
    if len(values(e.metrics, "reward")) < 8 or not most:
        return None
    fall = (before - after) / most
    said = (
        f"The reward fell from {before:.3g} to {after:.3g}: lower optim.lr or raise loss.beta, unless it was the "
        "problems that got harder."
    )
    return Check(
        name="fall of the reward, of the most its weights allow",
        value=f"{fall:.0%}",
        limit="10 %",
        finding=said if fall > 0.1 else "",
        figure="reward",
        samples="verdict=wrong",
    )


def unknown_rewards(e: Evidence) -> Check | None:
    """Rewards that nobody could give."""
    key = "rewards/unknown"
    share = e.late(key)
    if math.isnan(share):
        return None
    said = f"{share:.0%} of the rewards are unknown in {e.span(key)}: look at the gold answers and the grader's log."
    return Check(
        name="unknown rewards",
        value=f"{share:.1%}",
        limit="5 %",
        finding=said if share > 0.05 else "",
        figure="signal",
        steps=e.worst(key),
        samples="verdict=unknown",
    )


def dominance(e: Evidence) -> Check | None:
    """One part of the reward pays for nearly everything, and it isn't the one for right answers."""
    weights = {k[8:]: v for k, v in e.run.config.items() if k.startswith("rewards.") and isinstance(v, int | float)}
    paid = {name: w * e.late(f"rewards/{name}/mean") for name, w in weights.items() if w > 0}
    paid = {name: value for name, value in paid.items() if value > 0}
    total = math.fsum(paid.values())
    if len(weights) < 2 or not total or "accuracy" not in weights or not weights["accuracy"]:
        return None
    largest = max(paid, key=lambda name: paid[name])
    share = paid[largest] / total
    bad = share > 0.8 and largest != "accuracy"
    name = brief(largest, 60)
    return Check(
        name="largest part of what is paid",
        value=f"{name} {share:.0%}",
        limit="80 %, unless accuracy",
        finding=f"{share:.0%} of the reward is {name}: lower its weight, or gate it by accuracy." if bad else "",
        figure="parts",
    )


def accuracy_fell(e: Evidence) -> Check | None:
    """Held-out accuracy below where it started, beyond chance."""
    seen, low = values(e.metrics, "eval/accuracy"), values(e.metrics, "eval/accuracy_low")
    high = values(e.metrics, "eval/accuracy_high")
    if len(seen) < 2 or len(low) != len(seen) or len(high) != len(seen):
        return None
    bad = high[-1] < low[0]
    said = (
        f"Held-out accuracy fell from {seen[0]:.1%} to {seen[-1]:.1%}, beyond both intervals: lower optim.lr, or stop "
        "at an earlier checkpoint."
    )
    return Check(
        name="held-out accuracy, first and last",
        value=f"{seen[0]:.1%}, {seen[-1]:.1%}",
        limit="no fall beyond both intervals",
        finding=said if bad else "",
        figure="reward",
    )


# Length


def truncation(e: Evidence) -> Check | None:
    """Completions cut at the limit."""
    key = "completions/clipped_ratio"
    share = e.late(key)
    if math.isnan(share):
        return None
    said = (
        f"{share:.0%} of the completions are cut at the length limit in {e.span(key)}: raise sampling.max_tokens, or "
        "shape length (overlong_buffer)."
    )
    return Check(
        name="truncated completions",
        value=f"{share:.0%}",
        limit="20 %",
        finding=said if share > 0.2 else "",
        figure="signal",
        steps=e.worst(key),
        samples="truncated=1",
    )


def length_hacking(e: Evidence) -> Check | None:
    """Reward that comes with length and not with right answers."""
    before, after = e.early("completions/mean_length"), e.late("completions/mean_length")
    right = values(e.metrics, "eval/accuracy") or values(e.metrics, "rewards/accuracy/mean")
    if math.isnan(before) or not before or len(right) < 2 or len(values(e.metrics, "reward")) < 8:
        return None
    growth, gained = after / before - 1, e.late("reward") - e.early("reward")
    better = mean(_quarters(right)[1]) - mean(_quarters(right)[0])
    bad = growth > 0.3 and gained > 0 and better < 0.01
    said = (
        f"Completions grew by {growth:.0%} and the reward by {gained:.3g}, accuracy by {100 * better:.1f} points: "
        "length may be what is paid for. Read the longest ones."
    )
    return Check(
        name="growth of length, with a reward that rises and accuracy that doesn't",
        value=f"{growth:+.0%}",
        limit="+30 %",
        finding=said if bad else "",
        figure="length",
        samples="sort=length",
    )


def length_pays(e: Evidence) -> Check | None:
    """Within a group, longer is better paid."""
    known = [(scan.step, scan.length_pays) for scan in e.scans if not math.isnan(scan.length_pays)]
    if not known:
        return None
    tail = _quarters(known)[1]
    r = mean([value for _, value in tail])
    said = f"Within groups, reward and length correlate at {r:+.2f}: longer completions are what earns. Read some."
    return Check(
        name="correlation of length and reward within groups",
        value=f"{r:+.2f}",
        limit="+0.8",
        finding=said if r > 0.8 else "",
        figure="length",
        steps=(max(tail, key=lambda point: point[1])[0],),
        samples="sort=length",
    )


# Policy


def entropy_collapse(e: Evidence) -> Check | None:
    """Exploration that ends."""
    before, after = e.early("entropy"), e.late("entropy")
    if math.isnan(before) or len(values(e.metrics, "entropy")) < 5:
        return None
    said = (
        f"Entropy fell from {before:.3g} to {after:.3g} nats per token: exploration has nearly ended. Raise "
        "loss.epsilon_high, the temperature, or the problems' variety."
    )
    return Check(
        name="entropy, last quarter over first",
        value=f"{after / before:.0%}" if before else "0 to 0",
        limit="at least 20 %",
        finding=said if after < 0.2 * before else "",
        figure="entropy",
        steps=points(e.metrics, "entropy")[-1][:1],
    )


def kl_drift(e: Evidence) -> Check | None:
    """A policy far from its reference."""
    kl = e.late("kl")
    if math.isnan(kl):
        return None
    said = f"The policy is {kl:.3g} nats per token from its reference: raise loss.beta, or lower optim.lr."
    return Check(
        name="KL to the reference",
        value=number(kl),
        limit="0.5 nats per token",
        finding=said if kl > 0.5 else "",
        figure="kl",
        steps=e.worst("kl"),
    )


def clipping(e: Evidence) -> Check | None:
    """Updates that the clip holds back."""
    share = e.late("clip_ratio/region_mean")
    if math.isnan(share):
        return None
    said = f"The clip holds back {share:.0%} of the tokens: lower optim.lr, or take fewer updates of a rollout."
    return Check(
        name="clip fraction",
        value=f"{share:.1%}",
        limit="20 %",
        finding=said if share > 0.2 else "",
        figure="clip",
        steps=e.worst("clip_ratio/region_mean"),
    )


def sampler_gap(e: Evidence) -> Check | None:
    """A sampler and a trainer that compute different things."""
    key = "sampling/logp_gap/mean"
    gap = e.late(key)
    if math.isnan(gap):
        return None
    said = f"Sampler and trainer disagree by {gap:.3g} nats per token on average: check dtype and sync."
    return Check(
        name="sampler–trainer gap",
        value=number(gap),
        limit="0.05 nats per token",
        finding=said if gap > 0.05 else "",
        figure="gap",
        steps=e.worst(key),
        samples="colour=ratio",
    )


def gap_rises(e: Evidence) -> Check | None:
    """A gap that grows, long before it is large."""
    key = "sampling/logp_gap/mean"
    before, after = e.early(key), e.late(key)
    if math.isnan(before) or len(values(e.metrics, key)) < 8:
        return None
    bad = after > 3 * before and after > 1e-3
    said = (
        f"The sampler–trainer gap rose from {before:.2g} to {after:.2g} nats per token: precision is lost as weights "
        "or lengths grow. Compare sampling.dtype with precision before it reaches sampling.gap_limit."
    )
    return Check(
        name="sampler–trainer gap, last quarter over first",
        value=f"{after / before:.1f} times" if before else number(after),
        limit="3 times, once above 0.001",
        finding=said if bad else "",
        figure="gap",
        steps=e.worst(key),
        samples="colour=ratio",
    )


def stale_weights(e: Evidence) -> Check | None:
    """A sampler that lags behind."""
    versions = points(e.metrics, "weights/version")
    if not versions:
        return None
    step, lag = max(((step, step - int(version)) for step, version in versions), key=lambda point: point[1])
    said = f"After step {step} the sampler had the weights of step {step - lag}: what it draws is off policy."
    return Check(
        name="age of the sampler's weights",
        value=f"{lag} steps",
        limit="0",
        finding=said if lag > 0 else "",
        figure="version",
        steps=(step,),
    )


# Training


def skipped_updates(e: Evidence) -> Check | None:
    """Gradients that were not finite."""
    files = sorted(path.name for path in e.run.path.glob("skipped-*.json"))[:1000]
    norms = values(e.metrics, "grad_norm")
    if not norms and not files:
        return None
    steps = tuple(int(name[8:-5]) for name in files if name[8:-5].isdecimal() and len(name) < 24)
    said = (
        f"{len(files)} updates were left out for a gradient that was not finite: {', '.join(files[:3])} in the run "
        "folder name what they were trained on."
    )
    return Check(
        name="updates left out",
        value=f"{len(files)}",
        limit="0",
        finding=brief(said) if files else "",
        figure="gradient",
        steps=steps[:3],
    )


def gradient_spikes(e: Evidence) -> Check | None:
    """A gradient far beyond the usual one."""
    norms = points(e.metrics, "grad_norm")
    if len(norms) < 8:
        return None
    usual = sorted(norm for _, norm in norms)[len(norms) // 2]
    step, largest = max(norms[len(norms) // 10 :], key=lambda point: point[1])
    said = f"The gradient norm reached {largest:.3g} at step {step}, usual is {usual:.3g}: look at that step's data."
    return Check(
        name="largest gradient norm over the median",
        value=f"{largest / usual:.1f} times" if usual else number(largest),
        limit="20 times",
        finding=said if usual and largest > 20 * usual else "",
        figure="gradient",
        steps=(step,),
    )


def overfitting(e: Evidence) -> Check | None:
    """A held-out loss that rises again."""
    losses = points(e.metrics, "eval/loss")
    if len(losses) < 3:
        return None
    step, best = min(losses, key=lambda point: point[1])
    last = losses[-1][1]
    said = (
        f"The held-out loss rose from {best:.3f} at step {step} to {last:.3f}: use checkpoints/best, or stop earlier."
    )
    return Check(
        name="held-out loss, last over best",
        value=f"{last / best:.2f}" if best > 0 else number(last),
        limit="1.02",
        finding=said if last > 1.02 * best > 0 else "",
        figure="held-out",
        steps=(step,),
    )


def packing(e: Evidence) -> Check | None:
    """Rows with room left over."""
    fills = values(e.metrics, "derived/fill")[:-1]  # the last step may have fewer rows
    if not fills:
        return None
    fill = mean(fills)
    said = f"Packed rows are {fill:.0%} full: examples near row_length leave gaps; raise row_length."
    return Check(
        name="packing fill",
        value=f"{fill:.1%}",
        limit="at least 90 %",
        finding=said if fill < 0.9 else "",
        figure="fill",
    )


def rejected_rows(e: Evidence) -> Check | None:
    """Data that was set aside."""
    examples = values(e.metrics, "data/examples")
    if not examples:
        return None
    rejected = sum(int(v[0]) for k in _reasons(e.metrics) if (v := values(e.metrics, k)))
    share = rejected / max(rejected + examples[0], 1)
    said = f"{share:.1%} of the rows were set aside ({rejected:,}): the sources' rejects.jsonl says which and why."
    return Check(
        name="rows set aside",
        value=f"{share:.1%}",
        limit="1 %",
        finding=said if share > 0.01 else "",
        figure="data-rows",
    )


def _reasons(metrics: Metrics) -> list[str]:
    return sorted({key for row in metrics for key in row if key.startswith("data/rejected/")})


def sampling_share(e: Evidence) -> Check | None:
    """Where the time goes."""
    timed = [phase_seconds(row) for row in e.metrics]
    total = math.fsum(v for row in timed for v in row.values())
    if not total:
        return None
    by_phase = {
        name: math.fsum(row.get(name, 0.0) for row in timed) / total for name in {n for row in timed for n in row}
    }
    sync = by_phase.get("sync", 0.0)
    largest = max(sorted(by_phase), key=lambda name: by_phase[name])
    said = f"{sync:.0%} of the time goes into weight sync: take more samples a step."
    return Check(
        name="largest phase; share of sync",
        value=f"{brief(largest, 40)} {by_phase[largest]:.0%}; {sync:.0%}",
        limit="sync 30 %",
        finding=said if sync > 0.3 else "",
        figure="time",
    )


# Distillation and reward models


def acceptance(e: Evidence) -> Check | None:
    """A teacher of whose answers little is left."""
    if e.answers is None or not e.answers.sampled:
        return None
    share = e.answers.right / e.answers.sampled
    said = f"{share:.0%} of the sampled answers are right: easier problems, a better teacher, or more samples of each."
    return Check(
        name="sampled answers that are right",
        value=f"{share:.0%}",
        limit="at least 20 %",
        finding=said if share < 0.2 else "",
        figure="pass-rates",
        samples="verdict=wrong",
    )


def unknown_verdicts(e: Evidence) -> Check | None:
    """Answers that no grader could judge, or no teacher gave."""
    if e.answers is None or not e.answers.sampled:
        return None
    share = e.answers.unknown / e.answers.sampled
    said = f"{share:.0%} of the sampled answers have no verdict: see the reasons below; --retry_unknown asks again."
    return Check(
        name="sampled answers without a verdict",
        value=f"{share:.1%}",
        limit="5 %",
        finding=said if share > 0.05 else "",
        figure="verdicts",
        samples="verdict=unknown",
    )


def pass_rate_ends(e: Evidence) -> Check | None:
    """Problems that would teach GRPO nothing."""
    rates = [] if e.answers is None else e.answers.pass_rates
    if not rates:
        return None
    share = sum(rate in (0.0, 1.0) for rate in rates) / len(rates)
    none = sum(rate == 0 for rate in rates) / len(rates)
    said = (
        f"{share:.0%} of the problems are always or never solved ({none:.0%} never): as GRPO's data they give "
        "all-equal groups; change difficulty, or use its curriculum."
    )
    return Check(
        name="problems always or never solved",
        value=f"{share:.0%}",
        limit="70 %",
        finding=said if share > 0.7 else "",
        figure="pass-rates",
    )


def pairs_put_right(e: Evidence) -> Check | None:
    """A reward model that is no better than a coin, or than it was."""
    if not e.pairs:
        return None
    before, after, low = (e.pairs[name] for name in ("before", "after", "low"))
    said = ""
    if low <= 0.5:
        said = f"{after:.1%} of the held-out pairs are put right, no better than chance: more or clearer pairs."
    elif after < before:
        said = f"Held-out pairs put right fell from {before:.1%} to {after:.1%}."
    return Check(
        name="held-out pairs put right", value=f"{after:.1%}", limit="interval above 50 %", finding=said, figure="pairs"
    )


CHECKS: tuple[Callable[[Evidence], Check | None], ...] = (
    *(equal_groups, accuracy_fell, reward_fell, unknown_rewards, truncation),
    *(length_hacking, length_pays, dominance, saturation),
    *(entropy_collapse, kl_drift, clipping, sampler_gap, gap_rises, stale_weights),
    *(skipped_updates, gradient_spikes, overfitting, packing, rejected_rows, sampling_share),
    *(acceptance, unknown_verdicts, pass_rate_ends, pairs_put_right),
)
