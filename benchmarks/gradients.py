"""Every loss, advantage, KL and correction -> its exact expected gradient beside the true one: docs/gradients.md.

The policy is a table small enough to enumerate all completions and all groups of them. Each group goes through
rl.advantage and rl.loss as in a run, autograd differentiates it, and its exact probability weighs it. The truths are
closed forms of the same tables and know nothing of losses. Left out: what an optimizer makes of a gradient, and long
answers.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import spread, table
from benchmarks._enumeration import (
    LONGEST,
    USES_SU,
    Expected,
    Toy,
    World,
    answer_kl,
    answers,
    expected,
    gradient,
    kl_alone,
    reverse_token_kl,
    reward,
    table_of,
    token_kl,
    toy,
)
from rl.advantage import group_advantages
from rl.config import LossConfig

# --- what is measured -------------------------------------------------------------------------------------------------

TOYS = range(7)
EXACT = 1e-10
"""Relative errors below this are rounding."""
FREE = math.inf
"""ε of no clip, cap of no cap."""

Values = list[float]
"""One figure, over the toys."""
Rows = dict[tuple[str, ...], list[Values]]
"""Labels -> figures."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """An expected gradient beside a true one."""

    error: float
    """‖s·mean − truth‖ / ‖truth‖ at the best scale s."""
    cosine: float
    noise: float
    """Variance over the square of the mean's part along the truth; one group a step."""
    even: float
    """Groups a step at which noise is as large as bias; inf without bias."""


def against(e: Expected, truth: Tensor) -> Against:
    """Compare up to scale."""
    along = e.mean @ truth / truth.norm()
    aside = e.mean - along * truth / truth.norm()
    best = e.mean @ truth / e.mean.square().sum()
    error = float((best * e.mean - truth).norm() / truth.norm())
    return Against(
        error=error,
        cosine=float(along / e.mean.norm()),
        noise=float(e.variance / along.square()),
        even=math.inf if error < EXACT else float(e.variance / aside.square().sum()),
    )


def off_by(e: Expected, truth: Tensor, share: float) -> float:
    """Relative error, scale included: the mean should be `share` of the truth."""
    return float((e.mean / share - truth).norm() / truth.norm())


def over_toys(figures: Callable[..., Sequence[float]], *args: Any) -> list[Values]:
    """Each figure's values."""
    return [list(values) for values in zip(*(figures(toy(seed), *args) for seed in TOYS), strict=True)]


def among(t: Toy, *, policy: Tensor | None = None, old: Tensor | None = None, sampler: Tensor | None = None) -> World:
    """The toy, where whoever is not named is `start`."""
    policy, old, sampler = (t.start if logits is None else logits for logits in (policy, old, sampler))
    return World(policy=policy, old=old, sampler=sampler, rewards=t.rewards, reference=t.reference)


ALIKE = [("grpo, gspo", "grpo"), ("dapo, cispo", "dapo"), ("dapo, one group", "dapo"), ("dr_grpo, sequence", "dr_grpo")]
"""Objectives that have one direction on policy, and the one that is computed."""


@functools.cache
def on_policy() -> Rows:
    """error, cosine, noise, even, and the error where rewards are only 1 or 0."""

    def figures(t: Toy, config: LossConfig, per_group: bool) -> Values:
        world = among(t)
        a = against(expected(world, config, per_group=per_group), gradient(reward, t.start, t.rewards))
        world = replace(world, rewards=t.rewards.floor())
        right = against(expected(world, config, per_group=per_group), gradient(reward, t.start, world.rewards))
        return [a.error, a.cosine, a.noise, a.even, right.error]

    return {
        (label, advantage): over_toys(
            figures, LossConfig(objective=objective, advantage=advantage), label == "dapo, one group"
        )
        for label, objective in ALIKE
        for advantage in ("grpo", "rloo")
    }


RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
"""Of right answers."""


def pay(pass_rate: float, size: int, advantage: str) -> float:
    """What multiple of ∇p the expected advantage-weighted gradient is, for rewards 1 (with chance p) and 0."""
    k = torch.arange(size, dtype=torch.float64)  # how many of the others are right
    choose = math.lgamma(size) - torch.lgamma(k + 1) - torch.lgamma(size - k)
    chance = (choose + k * math.log(pass_rate) + (size - 1 - k) * math.log1p(-pass_rate)).exp()
    others = (torch.arange(size - 1) < k[:, None]).double()
    right, wrong = (
        group_advantages(torch.cat([torch.full((size, 1), own, dtype=torch.float64), others], 1), advantage)[:, 0]
        for own in (1.0, 0.0)
    )
    return float(chance @ (right - wrong))


@functools.cache
def group_sizes() -> Rows:
    """error and noise per completion (G times that of a group): dr_grpo with rloo, with z-scores, and the default."""

    def figures(t: Toy, size: int) -> Values:
        out = []
        for objective, advantage in [("dr_grpo", "rloo"), ("dr_grpo", "grpo"), ("grpo", "grpo")]:
            config = LossConfig(objective=objective, advantage=advantage)
            a = against(expected(among(t), config, size=size), gradient(reward, t.start, t.rewards))
            out += [a.error, a.noise * size]
        return out

    return {(str(size),): over_toys(figures, size) for size in (2, 3, 4, 5)}


CLIPS: list[tuple[str, str, float, float | None]] = [
    ("grpo", "no clip", FREE, None), ("grpo", "0.2", 0.2, None), ("grpo", "10", 10.0, None),
    ("dapo", "no clip", FREE, None), ("dapo", "0.2, 0.28", 0.2, 0.28),
    ("dr_grpo", "no clip", FREE, None), ("dr_grpo", "0.2", 0.2, None), ("dr_grpo", "10", 10.0, None),
    ("gspo", "no clip", FREE, None), ("gspo", "0.2", 0.2, None), ("gspo", "3e-4, 4e-4", 3e-4, 4e-4),
    ("sequence", "no clip", FREE, None), ("sequence", "0.2", 0.2, None), ("sequence", "10", 10.0, None),
    ("cispo", "0.2", FREE, 0.2), ("cispo", "4", FREE, 4.0),
]  # fmt: skip
"""Objective, label, ε, ε_high."""


@functools.cache
def off_policy() -> Rows:
    """error, cosine, noise, held: for near, far and very far in turn. Samples are π_old's; advantage rloo."""

    def figures(t: Toy, config: LossConfig, ratio: bool = True) -> Values:
        out = []
        for policy in (t.near, t.far, t.very_far):
            e = expected(among(t, policy=policy, old=None if ratio else policy), config)
            a = against(e, gradient(reward, policy, t.rewards))
            out += [a.error, a.cosine, a.noise, e.held]
        return out

    plain = LossConfig(objective="dr_grpo", advantage="rloo", importance="none")
    rows: Rows = {("dr_grpo", "no ratio"): over_toys(figures, plain, False)}
    for objective, label, low, high in CLIPS:
        rows[objective, label] = over_toys(figures, replace(plain, objective=objective, epsilon=low, epsilon_high=high))
    return rows


CORRECTIONS = [
    ("dr_grpo", "none", 2.0), ("dr_grpo", "token_truncate", FREE), ("dr_grpo", "token_truncate", 2.0),
    ("dr_grpo", "token_mask", 2.0), ("dr_grpo", "sequence_truncate", FREE), ("dr_grpo", "sequence_truncate", 2.0),
    ("dr_grpo", "sequence_mask", 2.0), ("sequence", "none", 2.0), ("sequence", "sequence_truncate", FREE),
    ("sequence", "sequence_truncate", 2.0), ("sequence", "sequence_mask", 2.0),
]  # fmt: skip
"""Objective, correction, cap."""


@functools.cache
def corrections() -> Rows:
    """error, noise, kept: for a mild gap, a strong one, and a strong one with π far from π_old. Unclipped, rloo."""

    def figures(t: Toy, config: LossConfig) -> Values:
        out = []
        for sampler, policy in [(t.mild, t.start), (t.strong, t.start), (t.strong, t.far)]:
            e = expected(among(t, sampler=sampler, policy=policy), config)
            a = against(e, gradient(reward, policy, t.rewards))
            out += [a.error, a.noise, e.kept]
        return out

    return {
        (objective, how, "" if how == "none" else "no cap" if cap == FREE else f"{cap:g}"): over_toys(
            figures,
            LossConfig(objective=objective, advantage="rloo", importance=how, importance_cap=cap, epsilon=FREE),
        )
        for objective, how, cap in CORRECTIONS
    }


@functools.cache
def kl_estimators() -> Rows:
    """Error of the KL's gradient, its scale included, under dr_grpo: on policy, π_old's samples, a strong gap with no
    weights, token weights uncapped and capped at 2, sequence weights; error from ∇KL(π_ref ‖ π) and noise on policy.
    """

    def figures(t: Toy, config: LossConfig) -> Values:
        own, gap = among(t), among(t, sampler=t.strong, policy=t.far)

        def error(world: World, by: Tensor, value: Callable[..., Tensor] = token_kl, **options: Any) -> float:
            e = expected(world, replace(config, **options), loss=kl_alone)
            return off_by(e, -gradient(value, world.policy, t.reference, by), 1 / LONGEST)

        truth = gradient(token_kl, t.start, t.reference, t.start)
        return [
            error(own, t.start),
            error(among(t, policy=t.far), t.start),
            error(gap, t.strong, importance="none"),
            error(gap, t.strong, importance_cap=FREE),
            error(gap, t.strong),
            error(gap, t.start, importance="sequence_truncate", importance_cap=FREE),
            error(own, t.start, reverse_token_kl),
            expected(own, config, loss=kl_alone).variance * LONGEST**2 / float(truth.square().sum()),
        ]

    return {
        (label, how): over_toys(figures, LossConfig(objective="dr_grpo", kl=label[:2], kl_gradient=how))
        for label, how in [("k1, k2, k3", "unbiased"), ("k2", "direct"), ("k3", "direct"), ("k1", "direct")]
    }


@functools.cache
def kl_objectives() -> Rows:
    """On policy: the unbiased gradient's error from the per-token ∇KL and from the whole answers', and the mean of k1
    direct's gradient relative to it."""

    def figures(t: Toy, config: LossConfig, per_group: bool) -> Values:
        direct = replace(config, kl="k1", kl_gradient="direct")
        e, naught = (expected(among(t), c, per_group=per_group, loss=kl_alone) for c in (config, direct))
        return [
            against(e, -gradient(token_kl, t.start, t.reference, t.start)).error,
            against(e, -gradient(answer_kl, t.start, t.reference)).error,
            float(naught.mean.norm() / e.mean.norm()),
        ]

    return {
        (label,): over_toys(figures, LossConfig(objective=objective), label == "dapo, one group")
        for label, objective in [*ALIKE[:3], ("dr_grpo", "dr_grpo"), ("sequence", "sequence")]
    }


@functools.cache
def distances() -> Rows:
    """How far each policy is from `start`: mean |Δ log p| of its tokens, and the share with a ratio beyond 0.8 to 1.2.
    """  # fmt: skip

    def figures(t: Toy, name: str) -> Values:
        passing_PU = answers(t.start).exp() @ USES_SU
        apart_PU = table_of(getattr(t, name)) - table_of(t.start)
        beyond_PU = ((apart_PU.exp() - 1).abs() > 0.2).double()
        return [float((passing_PU * what).sum() / passing_PU.sum()) for what in (apart_PU.abs(), beyond_PU)]

    return {(name,): over_toys(figures, name) for name in ("near", "far", "very_far", "mild", "strong")}


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gradients.md"

TEXT = """
# Which loss follows the true gradient

Written by `python -m benchmarks.gradients --write`. A test fails when it is not what the code gives now.

A loss in `rl/loss.py` is meant to raise the reward, J = E[r]. Not every one follows ∇J. This page compares the
expected gradient of each with ∇J, on a policy so small that both are computed exactly.

## Findings

1. **On policy, four objectives follow ∇J exactly**: dapo, cispo, dr_grpo and sequence, with advantage rloo or dr_grpo.
They differ by a constant factor, which is a matter of the learning rate. So do the two advantages: dr_grpo's is
(G−1)/G of rloo's. For dapo and cispo it takes a minibatch of many groups.
2. **The default (grpo, advantage grpo) follows something else nearby**: it is {default} off ("error" below), at a
cosine of {cosine}. With fewer than about {even} groups a step, noise is larger than this bias; with more, bias is what
is left. Exactness costs no variance here: the noise of a group is {noise} for the default and {exact_noise} for
dr_grpo with rloo.
3. **Dividing by length (grpo, gspo) is a bias of its own**: {length} with rloo. A token of a good short answer is
pushed up more than one of a good long answer, and a token of a bad long answer is pushed down less.
4. **The z-score blows up small differences.** Where all answers of a group are right, the 0.2 for ending in time
counts as much as being right does elsewhere. Hence the error of {z} with dr_grpo; with rewards of 1 and 0 only it is
{z_right}. Then each prompt's direction is exact and only its weight is not: at G = 16 a prompt with a pass rate of 2 %
or 98 % counts {pay} times as much as one of 50 %.
5. **Off policy, only the ratio of whole answers stays exact** (sequence, no clip), and its noise grows with the
distance. Ratios of single tokens leave out how the prefix and the rest of the answer have changed: {token_far} off
where the policy is far, {token_very_far} where it is very far. No ratio at all gives {none_far} and {none_very_far}.
6. **A clip is the largest bias here, by design.** With ε = 0.2 and {held} of the tokens held back, dr_grpo is {clip}
off, against {token_far} without a clip. A clip is one-sided: where a token has become too likely, good answers no
longer push it up and bad ones still push it down, so that its samples on average push back towards π_old. R1's ε = 10
never acts on these policies. cispo's ceiling limits weights instead: {cispo} at the same ε.
7. **A correction for the sampler is exact with weights of whole answers and no cap that acts, and only then.** At a
strong gap, no correction is {gap} off, token weights {gap_token}, whole-answer weights capped at 2 {gap_capped}. A mask
is no
better than nothing ({mask_token}, {mask_sequence}): it leaves out just what the sampler draws too rarely. Whole-answer
weights wear out with length, which three tokens do not show; see below the table.
8. **"unbiased" KL is exact where tokens count alike** (dapo, cispo, dr_grpo): it is ∇KL of every next token, on the
prefixes that were sampled. That is not ∇KL of whole answers ({kl_whole} off), which only "sequence" has. Under grpo
and gspo the division by length turns it ({kl_length} off). "direct" k2 is the same gradient on policy only; "direct"
k3 is ∇KL(π_ref ‖ π) on policy, {kl_direct} off, and off policy the gradient of no KL.

## What was enumerated

- A toy policy: 3 tokens, one of which ends an answer, and at most 3 of them in one. It is a table of logits, with a
row for each prefix, for two prompts. It has 15 answers. A right one is paid 1, and one that ends in time 0.2 more.
Right answers are rarer for the second prompt.
- All groups of G = 4 answers, unless stated. Each group goes through `group_advantages` and `loss_terms` as in a run,
in float64; autograd gives its gradient; its exact probability weighs it. No group is sampled.
- {toys} toys with random logits. A cell is the median, with lowest to highest in brackets.
- J, the KLs and the other truths are written down from the tables, without a loss.
- dapo and cispo divide by the tokens of a minibatch of very many groups; "dapo, one group" by the group's own.
- Off policy, groups are π_old's and π is three Adam steps of the default loss further on. For a gap, groups are those
of a sampler whose logits differ from π_old's by random noise. Mean |Δ log p| a token, in nats, and the share of tokens
whose ratio is beyond 0.8 to 1.2:

{distances}

## How to read

- **error**: ‖s·g − ∇J‖ / ‖∇J‖ of the expected gradient g at the best scale s. It is the sine of the angle between
them. "exact" is below 1e-10.
- **cosine**: of that angle. Below 0, a step lowers the reward on average.
- **noise**: trace of the gradient's covariance for one group a step, over the square of the part of its mean along ∇J.
With n groups it is noise / n.
- **even**: the n at which noise and bias are equally large. Below it noise decides, above it error.
- **held**: share of tokens (of answers, for sequence) that the clip holds back.
- **kept**: effective share of samples under the correction, (Σw)² / (n Σw²).

What carries over to a real model is which cells say "exact", and why the others do not. The sizes do not: real answers
are a thousand times as long, and share their parameters.

## On policy

π, π_old and the sampler are one. Advantage dr_grpo has rloo's figures.

{on_policy}

What a prompt is paid, by its pass rate p. With rewards of 1 and 0 the expected gradient is this times ∇p:

{pays}

Larger groups. Noise is per answer here, G times that of a group, so that rows cost alike:

{group_sizes}

## Off policy

Samples are π_old's. Advantage rloo. "no ratio" takes them for π's own. Two values of ε are the lower and the upper;
cispo's is the upper.

{off_policy}

- Token ratios (dr_grpo, dapo, cispo without a clip) follow exactly the surrogate
Σ d_old(prefix) Σ_a π(a | prefix) Q_old(prefix, a) of Kakade and Langford (2002). Its gradient is ∇J's at π = π_old.
- gspo's own ε of 3e-4 is meant for answers of thousands of tokens, whose mean log-ratio hardly moves. Here nearly
every answer is beyond it.
- Once most tokens are held back, a step goes nowhere or back. Fewer steps per rollout help then.

## Samplers that are not π_old

No clip. Advantage rloo. "sequence" has one weight an answer, whatever the level. π is π_old, or far from it.

{corrections}

- Token weights follow the surrogate above with the sampler's prefixes and values for π_old's.
- Whole-answer weights wear out with length, roughly by the tokens' kept share for every token. The mild gap's {kept}
leaves {kept_100} after 100 tokens and {kept_1000} after 1000. The metrics `sampling/effective_sample_size` say what is
left in a run.

## KL to the reference

Objective dr_grpo. Error with its scale: ‖g − ∇KL‖ / ‖∇KL‖ of the per-token KL(π ‖ π_ref) on the prefixes that were
sampled; with sequence weights, on those that π_old visits. In all but the columns on policy, π is far from π_old.

{kl_estimators}

- The unbiased gradient is one for k1, k2 and k3. They differ in the value that is logged.
- An error of 1 on policy is a mean gradient of zero: k1 direct is only noise there. Off policy its mean is
∇KL(π_old ‖ π), upwards: it pushes the policy on, away from π_old.

By objective, on policy: the error of the unbiased gradient, at its best scale, and the mean of k1 direct's gradient
relative to it. Under grpo and gspo k1 direct is not only noise: it is −∇E[1 / length], and lengthens answers.

{kl_objectives}
"""

FOLLOWS = [
    "both of grpo, gspo with rloo and dr_grpo with grpo",
    "E[(r − b) / length], b held at J: tokens of short answers count more",
    "J, with z-scores in place of rewards",
    "J / mean length",
    "as above; groups of short answers count more",
    "J, but groups of short answers count more",
    "J, with z-scores in place of rewards",
    "dr_grpo: J / max_tokens; sequence: J",
]
"""For each row of `on_policy`."""


def error(values: Values) -> str:
    """Median (lowest to highest)."""
    return "exact" if max(values) < EXACT else spread(values, ".2f")


def number(values: Values) -> str:
    """Median, two digits."""
    middle = median(values)
    return "-" if math.isinf(middle) else f"{middle:.1f}" if middle < 10 else f"{middle:,.0f}"


def mid(values: Values) -> str:
    """Median."""
    return "0" if max(map(abs, values)) < EXACT else f"{median(values):.2f}"


def percent(values: Values) -> str:
    """Median share."""
    return f"{100 * median(values):.0f} %"


def shown(header: Sequence[str], rows: Rows, forms: Sequence[Callable[[Values], str] | None]) -> str:
    """Labels and figures; a figure without a form is left out."""
    return table(
        header,
        [
            [*labels, *(form(values) for form, values in zip(forms, columns, strict=True) if form)]
            for labels, columns in rows.items()
        ],
    )


def wrapped(block: str) -> str:
    """A paragraph or a list, its lines filled."""
    if block.startswith(("|", "#")):
        return block
    filled = []
    for part in re.split(r"\n(?=- |\d+\. )", block):
        indent = re.match(r"- |\d+\. |", part).end() * " "
        filled.append(fill(part, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False))
    return "\n".join(filled)


def document() -> str:
    """The page, with every figure computed anew."""
    on, off, fixed, kl, kl_by, moved = (
        measure() for measure in (on_policy, off_policy, corrections, kl_estimators, kl_objectives, distances)
    )
    tables = {
        "distances": table(
            ["", "near", "far", "very far", "mild gap", "strong gap"],
            [
                ["nats", *(mid(columns[0]) for columns in moved.values())],
                ["beyond", *(percent(columns[1]) for columns in moved.values())],
            ],
        ),
        "on_policy": shown(
            ["objectives", "advantage", "error", "cosine", "noise", "even", "error, rewards 1 or 0", "follows"],
            {labels: [*columns, note] for (labels, columns), note in zip(on.items(), FOLLOWS, strict=True)},
            [error, mid, number, number, error, str],
        ),
        "pays": table(
            ["advantage", "G", *(f"p = {p:g}" for p in RATES)],
            [
                [kind, str(size), *(f"{pay(p, size, kind):.2f}" for p in RATES)]
                for kind, size in [("rloo", 4), ("grpo", 2), ("grpo", 4), ("grpo", 16)]
            ],
        ),
        "group_sizes": shown(
            ["G", "dr_grpo, rloo: error", "noise", "dr_grpo, grpo: error", "noise", "grpo, grpo: error", "noise"],
            group_sizes(),
            [error, number] * 3,
        ),
        "off_policy": shown(
            [
                *("objective", "ε", "near: error", "noise", "far: error", "noise", "held"),
                *("very far: error", "cosine", "noise", "held"),
            ],
            off,
            [error, None, number, None, error, None, number, percent, error, mid, number, percent],
        ),
        "corrections": shown(
            [
                *("objective", "correction", "cap", "mild: error", "noise", "kept", "strong: error", "noise", "kept"),
                *("strong, π far: error", "noise", "kept"),
            ],
            fixed,
            [error, number, percent] * 3,
        ),
        "kl_estimators": shown(
            [
                *("kl", "kl_gradient", "on policy", "π_old's samples", "strong gap, none", "token, no cap"),
                *("token, cap 2", "sequence, no cap", "on policy, from ∇KL(π_ref ‖ π)", "noise"),
            ],
            kl,
            [error] * 7 + [number],
        ),
        "kl_objectives": shown(
            ["objectives", "error from per-token ∇KL", "error from whole-answer ∇KL", "k1 direct"],
            kl_by,
            [error, error, mid],
        ),
    }
    default, exact, z = on["grpo, gspo", "grpo"], on["dr_grpo, sequence", "rloo"], on["dr_grpo, sequence", "grpo"]
    none, free, clip = off["dr_grpo", "no ratio"], off["dr_grpo", "no clip"], off["dr_grpo", "0.2"]
    strong = {labels[1:]: columns[3] for labels, columns in fixed.items() if labels[0] == "dr_grpo"}
    kept = median(fixed["dr_grpo", "token_truncate", "no cap"][2])
    text = TEXT.strip().format(
        **tables,
        toys=len(TOYS),
        default=mid(default[0]),
        cosine=mid(default[1]),
        noise=number(default[2]),
        even=number(default[3]),
        exact_noise=number(exact[2]),
        length=mid(on["grpo, gspo", "rloo"][0]),
        z=mid(z[0]),
        z_right=mid(z[4]),
        pay=f"{pay(0.02, 16, 'grpo') / pay(0.5, 16, 'grpo'):.1f}",
        token_far=mid(free[4]),
        token_very_far=mid(free[8]),
        none_far=mid(none[4]),
        none_very_far=mid(none[8]),
        held=percent(clip[7]),
        clip=mid(clip[4]),
        cispo=mid(off["cispo", "0.2"][4]),
        gap=mid(strong["none", ""]),
        gap_token=mid(strong["token_truncate", "no cap"]),
        gap_capped=mid(strong["sequence_truncate", "2"]),
        mask_token=mid(strong["token_mask", "2"]),
        mask_sequence=mid(strong["sequence_mask", "2"]),
        kept=f"{kept:.4f}",
        kept_100=percent([kept**100]),
        kept_1000=percent([kept**1000]),
        kl_whole=mid(kl_by["dr_grpo",][1]),
        kl_length=mid(kl_by["grpo, gspo",][0]),
        kl_direct=mid(kl["k3", "direct"][0]),
    )
    return "\n\n".join(wrapped(block) for block in text.split("\n\n")) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/gradients.md instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")


if __name__ == "__main__":
    main()
