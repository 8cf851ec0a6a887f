"""Log-probs and advantages -> a policy-gradient loss, on the trained tokens of packed completions.

    loss = − Σ_t z_t · (w_t · l_t − β · KL_t)

l_t is what a variant earns for a token, z_t the token's share of the whole (a mean over completions, over tokens, or a
constant), w_t = π_old / π_sampler the correction for samples of an engine whose log-probs are not quite the
trainer's, KL_t an estimate of KL(π ‖ π_ref). A variant is one function below, `l` and `z` with its paper's equation;
what each is worth against the true gradient is in docs/gradients.md.

Denominators are arguments (`Totals`), so that micro-batches and processes add up to the gradient of one large batch.
Shapes: C trained tokens, N completions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The C trained tokens of N completions, completions end to end. Log-probs are at the sampling temperature."""

    logp: Tensor
    """(C,) log π_θ, with its gradient."""
    old: Tensor
    """(C,) log π_old: the policy as it was when its samples were drawn."""
    sampler: Tensor
    """(C,) log π_sampler: what the engine said it drew from."""
    reference: Tensor | None
    """(C,) log π_ref; None without a KL term."""
    sequence: Tensor
    """(C,) which completion a token belongs to, 0 .. N−1, ascending."""
    advantages: Tensor
    """(N,)"""
    lengths: Tensor
    """(N,) tokens of each completion, at least 1."""

    @property
    def A(self) -> Tensor:
        """(C,) the advantage of each token's completion."""
        return self.advantages[self.sequence]

    @property
    def log_ratio(self) -> Tensor:
        """(C,) log ρ = log π_θ − log π_old."""
        return self.logp - self.old

    def summed(self, values: Tensor) -> Tensor:
        """(C,) -> (N,): over each completion."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.sequence, values)

    def whole(self) -> "LossInputs":
        """Each completion as if it were a single token: log-probs of whole answers."""
        return LossInputs(
            logp=self.summed(self.logp),
            old=self.summed(self.old),
            sampler=self.summed(self.sampler),
            reference=None if self.reference is None else self.summed(self.reference),
            sequence=torch.arange(len(self.lengths), device=self.lengths.device),
            advantages=self.advantages,
            lengths=torch.ones_like(self.lengths),
        )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a loss is divided by: counts over the whole minibatch and all processes."""

    completions: int | Tensor
    """Completions with a known reward."""
    tokens: int | Tensor
    """Their tokens."""
    max_tokens: int
    """The longest a completion may be."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A variant's answer for the tokens (or whole completions) of `x`."""

    x: LossInputs
    l: Tensor  # noqa: E741 (the papers' letter)
    """What is earned, per token."""
    z: Tensor
    """Share of the whole, per token."""
    held: Tensor
    """True where the clip holds a token back."""


# --- variants ---------------------------------------------------------------------------------------------------------


def grpo(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """GRPO: DeepSeekMath (arXiv 2402.03300), eq. 3. Every completion counts alike, however long."""
    l, held = clipped(x.log_ratio.exp(), x.A, config)  # noqa: E741
    return Terms(x=x, l=l, z=1 / (x.lengths[x.sequence] * totals.completions), held=held)


def dapo(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """DAPO: arXiv 2503.14476, eq. 8. Every token counts alike; with `epsilon_high` the upper clip is wider.

    differs: Σ|o_i| is over the minibatch, not over each group, so that no group's tokens count more than another's.
    """
    l, held = clipped(x.log_ratio.exp(), x.A, config)  # noqa: E741
    return Terms(x=x, l=l, z=torch.ones_like(l) / totals.tokens, held=held)


def dr_grpo(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """Dr. GRPO: arXiv 2503.20783, section 3.2. A constant, so that long answers aren't paid less a token."""
    l, held = clipped(x.log_ratio.exp(), x.A, config)  # noqa: E741
    return Terms(x=x, l=l, z=torch.ones_like(l) / (totals.completions * totals.max_tokens), held=held)


def gspo(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """GSPO: arXiv 2507.18071, eq. 5 and 7. One ratio a completion: the geometric mean of its tokens'."""
    mean_N = x.summed(x.log_ratio) / x.lengths
    l, held = clipped(mean_N.exp()[x.sequence], x.A, config)  # noqa: E741
    return Terms(x=x, l=l, z=1 / (x.lengths[x.sequence] * totals.completions), held=held)


def sequence(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """DeepSeek-V3 (arXiv 2412.19437), eq. 26-27, to the letter: ratio and KL are of whole answers π(o|q)."""
    return grpo(x.whole(), config, totals)


def cispo(x: LossInputs, config: LossConfig, totals: Totals) -> Terms:
    """CISPO: MiniMax-M1 (arXiv 2506.13585), eq. 4-5. The ratio is a clipped weight; every token keeps its gradient."""
    ratio, ceiling = x.log_ratio.detach().exp(), 1 + config.clip_high
    l = ratio.clamp(max=ceiling) * x.A * x.logp  # noqa: E741
    return Terms(x=x, l=l, z=torch.ones_like(l) / totals.tokens, held=(ratio > ceiling) & (x.A > 0))


OBJECTIVES: dict[str, Callable[[LossInputs, LossConfig, Totals], Terms]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "sequence": sequence,
    "cispo": cispo,
}


def clipped(ratio: Tensor, A: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """PPO's min(ρA, clip(ρ, 1 − ε, 1 + ε_high)A), and where the clip holds back (arXiv 1707.06347, eq. 7)."""
    free, held = ratio * A, ratio.clamp(1 - config.epsilon, 1 + config.clip_high) * A
    return torch.minimum(free, held), held < free


# --- correction for the sampler ---------------------------------------------------------------------------------------


def importance_weights(x: LossInputs, config: LossConfig) -> Tensor:
    """w (C,): π_old / π_sampler of each token, or of its whole completion; a constant to the gradient.

    "truncate" caps weights (Ionides 2008: bounded variance, some bias), "mask" drops what exceeds the cap.
    """
    if config.importance == "none":
        return torch.ones_like(x.old)
    level, _, how = config.importance.partition("_")
    log_w = (x.old - x.sampler).detach()
    w = (log_w if level == "token" else x.summed(log_w)[x.sequence]).exp()
    return w.clamp(max=config.importance_cap) if how == "truncate" else w.masked_fill(w > config.importance_cap, 0.0)


# --- KL to the reference ----------------------------------------------------------------------------------------------


def k1(log_r: Tensor) -> Tensor:
    """log π − log π_ref: unbiased, of either sign. (log_r is log π_ref − log π, as in joschu.net/blog/kl-approx.)"""
    return -log_r


def k2(log_r: Tensor) -> Tensor:
    """½ (log π − log π_ref)²: biased as a value; its derivative is KL's own where samples are π's."""
    return log_r.square() / 2


def k3(log_r: Tensor) -> Tensor:
    """r − log r − 1 (DeepSeekMath, eq. 4): never negative, and its mean under π is KL(π ‖ π_ref)."""
    return log_r.exp() - log_r - 1


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(x: LossInputs, w: Tensor, config: LossConfig) -> Tensor:
    """KL(π ‖ π_ref) per token (C,), by the estimator asked for.

    "unbiased": the value is w·ρ·k and the gradient w·ρ·(log π − log π_ref)·∇log π. With w uncapped its mean after a
    prefix is ∇KL(π(·|prefix) ‖ π_ref(·|prefix)), whoever sampled; prefixes count as the sampler visits them (as π_old
    does, under whole-answer weights). For "sequence" it is ∇KL of whole answers. Where z depends on the length (grpo,
    gspo) it is neither: docs/gradients.md. For k3 it is the derivative of ρ·k3 (DeepSeek-V3.2, arXiv 2512.02556).
    "direct": the estimator differentiated as published (DeepSeekMath, R1); no w and no ρ. On π's own samples k2's is
    the same ∇KL, and k3's is ∇KL(π_ref ‖ π) instead.
    """
    assert x.reference is not None
    log_r = x.reference - x.logp
    if config.kl_gradient == "direct":
        return ESTIMATORS[config.kl](log_r)
    weight = w * x.log_ratio.detach().exp()
    slope = (weight * -log_r).detach() * x.logp
    return (weight * ESTIMATORS[config.kl](log_r)).detach() + slope - slope.detach()


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The loss and what it was made of; sums, so that micro-batches add up."""

    loss: Tensor
    """Scalar; its gradient is this batch's share of the whole."""
    held: Tensor
    """Tokens (completions, for "sequence") that the clip held back."""
    units: int
    """Tokens (completions) there were."""
    kl: Tensor
    """Σ of the KL estimates."""


def policy_loss(x: LossInputs, *, config: LossConfig, totals: Totals) -> LossParts:
    """The loss of a packed batch under the variant, correction and KL that `config` asks for."""
    loss_C, terms, kl = loss_terms(x, config=config, totals=totals)
    return LossParts(loss=loss_C.sum(), held=terms.held.sum(), units=len(terms.l), kl=kl.detach().sum())


def loss_terms(x: LossInputs, *, config: LossConfig, totals: Totals) -> tuple[Tensor, Terms, Tensor]:
    """The loss before it is summed over tokens, its variant's terms, and the KL estimates (0 without a reference)."""
    x = replace(x, old=x.old.detach())
    terms = OBJECTIVES[config.objective](x, config, totals)
    w = importance_weights(terms.x, config)
    kl = torch.zeros_like(terms.l) if terms.x.reference is None else kl_penalty(terms.x, w, config)
    return -terms.z * (w * terms.l - config.beta * kl), terms, kl
