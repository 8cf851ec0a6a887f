"""A policy small enough to enumerate: every answer, every group, and the exact expected gradient of every loss.

Answers of a tabular softmax are written down with their probabilities, groups go through our own `group_advantages` and
`loss_terms`, and the truths they are compared with are written from the tables alone. benchmarks/gradients.py makes
docs/gradients.md of it; tests/rl/test_gradients.py holds the equalities.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.advantage import group_advantages
from rl.config import LossConfig
from rl.loss import OBJECTIVES, LossInputs, Terms, Totals, importance_weights, kl_penalty, loss_terms, policy_loss

VOCAB, LONGEST, END = 3, 3, 0


# --- the toy ----------------------------------------------------------------------------------------------------------
# Shapes: P prompts, S completions, X prefixes, V tokens, U = X·V cells of a table; K groups of G, C trained tokens.


def _completions(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == LONGEST or prefix[-1:] == (END,):
        return [prefix]
    return [o for token in range(VOCAB) for o in _completions((*prefix, token))]


COMPLETIONS = _completions()
"""All S of them: ended by END, or cut at LONGEST."""
PREFIXES = sorted({o[:t] for o in COMPLETIONS for t in range(len(o))}, key=lambda prefix: (len(prefix), prefix))
LENGTHS_S = torch.tensor([len(o) for o in COMPLETIONS])
CELLS_SL = torch.tensor(
    [[PREFIXES.index(o[:t]) * VOCAB + o[t] if t < len(o) else -1 for t in range(LONGEST)] for o in COMPLETIONS]
)
"""(S, LONGEST) where in the table each token's log-prob stands; -1 after the end."""
USES_SU = (CELLS_SL[..., None] == torch.arange(len(PREFIXES) * VOCAB)).sum(1).double()


def table_of(logits_PXV: Tensor) -> Tensor:
    """(P, U) log π of every token after every prefix."""
    return logits_PXV.log_softmax(-1).flatten(1)


def answers(logits_PXV: Tensor) -> Tensor:
    """(P, S) log π(o)."""
    return table_of(logits_PXV) @ USES_SU.T


@dataclass(frozen=True, kw_only=True)
class Groups:
    """K groups of G completions, end to end."""

    prompt_K: Tensor
    members_KG: Tensor
    cell_C: Tensor
    sequence_C: Tensor
    group_C: Tensor
    lengths_N: Tensor


def lay_out(prompt_K: Tensor, members_KG: Tensor) -> Groups:
    """Groups as a packed batch has them."""
    cells_NL = CELLS_SL[members_KG.flatten()]
    real_NL = cells_NL >= 0
    sequence_C = torch.arange(len(cells_NL))[:, None].expand_as(cells_NL)[real_NL]
    return Groups(
        prompt_K=prompt_K,
        members_KG=members_KG,
        cell_C=cells_NL[real_NL],
        sequence_C=sequence_C,
        group_C=sequence_C // members_KG.shape[1],
        lengths_N=LENGTHS_S[members_KG.flatten()].double(),  # 1 / an integer tensor would be float32
    )


@functools.cache
def all_groups(size: int, prompts: int) -> tuple[Groups, Tensor]:
    """Every group of every prompt, its order aside, and (K,) the log of how many orders it has."""
    members_MG = torch.combinations(torch.arange(len(COMPLETIONS)), size, with_replacement=True)
    counts_MS = (members_MG[..., None] == torch.arange(len(COMPLETIONS))).sum(1).double()
    log_orders_M = math.lgamma(size + 1) - torch.lgamma(counts_MS + 1).sum(1)
    prompt_K = torch.arange(prompts).repeat_interleave(len(members_MG))
    return lay_out(prompt_K, members_MG.repeat(prompts, 1)), log_orders_M.repeat(prompts)


# --- the expected gradient of a loss ----------------------------------------------------------------------------------

Loss = Callable[[LossInputs, LossConfig, Totals], tuple[Tensor, Terms]]


def ours(x: LossInputs, config: LossConfig, totals: Totals) -> tuple[Tensor, Terms]:
    """The loss of a run, per token (or completion)."""
    loss_C, terms, _ = loss_terms(x, config=config, totals=totals)
    return loss_C, terms


def kl_alone(x: LossInputs, config: LossConfig, totals: Totals) -> tuple[Tensor, Terms]:
    """Only the KL term at β = 1; LossConfig refuses some of its choices at β > 0."""
    terms = OBJECTIVES[config.objective](x, config, totals)
    return terms.z * kl_penalty(terms.x, importance_weights(terms.x, config), config), terms


@dataclass(frozen=True, kw_only=True)
class World:
    """Who trains, who samples, and what is paid. Policies are logits (P, X, V)."""

    policy: Tensor
    old: Tensor
    sampler: Tensor
    """The groups are drawn from this one."""
    rewards: Tensor
    """(P, S)"""
    reference: Tensor | None = None

    def inputs(self, groups: Groups, theta_KXV: Tensor, advantage: str) -> LossInputs:
        """What the loss sees of these groups, each under its own copy of the trained parameters, `theta_KXV`."""
        at_C = (groups.prompt_K[groups.group_C], groups.cell_C)
        rewards_KG = self.rewards[groups.prompt_K[:, None], groups.members_KG]
        return LossInputs(
            logp=table_of(theta_KXV)[groups.group_C, groups.cell_C],
            old=table_of(self.old)[at_C],
            sampler=table_of(self.sampler)[at_C],
            reference=None if self.reference is None else table_of(self.reference)[at_C],
            sequence=groups.sequence_C,
            advantages=group_advantages(rewards_KG, advantage).flatten(),
            lengths=groups.lengths_N,
        )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The gradient a loss ascends, over all groups of a prompt drawn at random."""

    mean: Tensor
    """(P·X·V,)"""
    variance: float
    """Trace of the covariance, one group a step."""
    held: float
    """Share of tokens (completions) that the clip holds back."""
    kept: float
    """Effective share of samples under the correction, (Σw)² / (n Σw²)."""


def expected(
    world: World, config: LossConfig, *, size: int = 4, per_group: bool = False, loss: Loss = ours
) -> Expected:
    """Exact mean and variance of −∇loss over all groups of `size`.

    per_group: `totals.tokens` counts the group's own tokens, as if it were a whole minibatch. Otherwise it is what a
    minibatch of very many groups has, per group.
    """
    groups, log_orders_K = all_groups(size, len(world.policy))
    log_chance_KG = answers(world.sampler)[groups.prompt_K[:, None], groups.members_KG]
    chance_K = (log_orders_K + log_chance_KG.sum(1)).exp() / len(world.policy)

    # Each group has the parameters to itself, so that one backward gives all their gradients.
    theta_KXV = world.policy[groups.prompt_K].requires_grad_()
    x = world.inputs(groups, theta_KXV, config.advantage)
    tokens_K = LENGTHS_S[groups.members_KG].sum(1).double()
    tokens = tokens_K[groups.group_C] if per_group else chance_K @ tokens_K
    loss_C, terms = loss(x, config, Totals(completions=size, tokens=tokens, max_tokens=LONGEST))
    gradient_KD = torch.autograd.grad(-loss_C.sum(), theta_KXV)[0].flatten(1)
    mean = (chance_K[:, None] * gradient_KD).view(len(world.policy), -1, gradient_KD.shape[1]).sum(1).flatten()

    chance_C = chance_K[terms.x.sequence // size]
    w, total = importance_weights(terms.x, config), chance_C.sum()
    return Expected(
        mean=mean,
        variance=float(chance_K @ gradient_KD.square().sum(1) - mean.square().sum()),
        held=float(chance_C @ terms.held.double() / total),
        kept=float((chance_C @ w) ** 2 / (total * (chance_C @ w.square()))),
    )


# --- the truths -------------------------------------------------------------------------------------------------------
# Scalars of logits (P, X, V), a mean over prompts. A behaviour `by` is held fixed.


def reward(logits_PXV: Tensor, rewards_PS: Tensor) -> Tensor:
    """J = E_π[r]."""
    return (answers(logits_PXV).exp() * rewards_PS).sum(1).mean()


def reward_per_token(logits_PXV: Tensor, rewards_PS: Tensor, by: Tensor) -> Tensor:
    """E_π[(r − b) / |o|], with the baseline b = E_by[r] of each prompt held fixed."""
    b_P1 = (answers(by).exp() * rewards_PS).sum(1, keepdim=True)
    return (answers(logits_PXV).exp() * (rewards_PS - b_P1) / LENGTHS_S).sum(1).mean()


def surrogate(logits_PXV: Tensor, rewards_PS: Tensor, by: Tensor) -> Tensor:
    """Σ_prefix d(prefix) Σ_a π(a | prefix) Q(prefix, a), with `by`'s visits d and values Q (Kakade & Langford 2002)."""
    chance_PS = answers(by).exp()
    passing_PU = chance_PS @ USES_SU
    Q_PU = (chance_PS * rewards_PS) @ USES_SU / passing_PU
    return (visits(by) * table_of(logits_PXV).exp() * Q_PU).sum(1).mean()


def visits(logits_PXV: Tensor) -> Tensor:
    """(P, U) how often each cell's prefix comes up in a completion."""
    passing_PXV = (answers(logits_PXV).exp() @ USES_SU).view_as(logits_PXV)
    return passing_PXV.sum(-1, keepdim=True).expand_as(logits_PXV).flatten(1)


def token_kl(logits_PXV: Tensor, reference_PXV: Tensor, by: Tensor) -> Tensor:
    """Σ_t KL(π(· | prefix) ‖ π_ref(· | prefix)) over prefixes as `by` visits them."""
    log_p, log_q = table_of(logits_PXV), table_of(reference_PXV)
    return (visits(by) * log_p.exp() * (log_p - log_q)).sum(1).mean()


def reverse_token_kl(logits_PXV: Tensor, reference_PXV: Tensor, by: Tensor) -> Tensor:
    """The same of KL(π_ref ‖ π)."""
    log_p, log_q = table_of(logits_PXV), table_of(reference_PXV)
    return (visits(by) * log_q.exp() * (log_q - log_p)).sum(1).mean()


def answer_kl(logits_PXV: Tensor, reference_PXV: Tensor) -> Tensor:
    """KL(π(o) ‖ π_ref(o)) of whole completions."""
    log_p, log_q = answers(logits_PXV), answers(reference_PXV)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def gradient(value: Callable[..., Tensor], logits_PXV: Tensor, *args: Tensor) -> Tensor:
    """(P·X·V,) ∇value."""
    logits_PXV = logits_PXV.clone().requires_grad_()
    (result,) = torch.autograd.grad(value(logits_PXV, *args), logits_PXV)
    return result.flatten()


# --- the toys the tables are of ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Two prompts, and policies around `start`, (P, X, V) each."""

    start: Tensor
    rewards: Tensor
    """(P, S): 1 for a right answer, and 0.2 for one that ends in time. Right is rare for the second prompt."""
    near: Tensor
    """Three optimizer steps from `start`, where a rollout's fourth minibatch finds the policy; no ratio beyond 0.2."""
    far: Tensor
    """The same with twice the learning rate: some ratios are."""
    very_far: Tensor
    """Ten times: most are."""
    mild: Tensor
    """`start` as an engine has it that is a little off."""
    strong: Tensor
    """An engine that is far off."""
    reference: Tensor


@functools.cache
def toy(seed: int) -> Toy:
    """A toy at random."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(2, len(PREFIXES), VOCAB, generator=generator, dtype=torch.float64)

    easy = [float(1 in o) for o in COMPLETIONS]
    hard = [float(o in ((2, END), (1, 2, END), (2, 2, 1))) for o in COMPLETIONS]
    rewards = torch.tensor([easy, hard]).double() + 0.2 * torch.tensor([o[-1] == END for o in COMPLETIONS])
    start = noise(1.0)
    return Toy(
        start=start,
        rewards=rewards,
        near=trained(start, rewards, steps=3, lr=0.03, generator=generator),
        far=trained(start, rewards, steps=3, lr=0.06, generator=generator),
        very_far=trained(start, rewards, steps=3, lr=0.3, generator=generator),
        mild=start + noise(0.05),
        strong=start + noise(0.5),
        reference=start + noise(0.7),
    )


def draw(logits_PXV: Tensor, prompt_K: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(K, size) completions."""
    cumulative_KS = answers(logits_PXV).exp().cumsum(1)[prompt_K]
    u = torch.rand(len(prompt_K), size, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulative_KS, u).clamp(max=len(COMPLETIONS) - 1)


def trained(start: Tensor, rewards: Tensor, *, steps: int, lr: float, generator: torch.Generator) -> Tensor:
    """`start` after so many minibatches of 8 groups of 4 under the default loss and Adam."""
    theta = start.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=lr)
    prompt_K = torch.arange(len(start)).repeat(4)
    for _ in range(steps):
        groups = lay_out(prompt_K, draw(start, prompt_K, 4, generator))
        world = World(policy=theta, old=start, sampler=start, rewards=rewards)
        x = world.inputs(groups, theta[prompt_K], "grpo")
        totals = Totals(completions=len(x.lengths), tokens=len(x.logp), max_tokens=LONGEST)
        adam.zero_grad()
        policy_loss(x, config=LossConfig(), totals=totals).loss.backward()
        adam.step()
    return theta.detach()
