"""Logits and uniform draws -> tokens with their log-probs, drafted ones too: how our own sampler samples.

Every token is a function of logits and of draws that belong to its row and step alone. Log-probs are always those the
model gives at the sampling temperature, whichever way a token came about.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What a decoder sampled."""

    ids_BT: Tensor
    logprobs_BT: Tensor
    lengths_B: Tensor
    """Sampled tokens of each row."""
    fed_S: Tensor
    """The row of every token fed to the decoder after the prompts, step after step; −1: a token that no row keeps."""
    drafts_B2: Tensor | None = None
    """Tokens drafted for each row, and how many of them were accepted."""


def row_uniforms(seeds: Sequence[int], n: int, draws: int) -> Tensor:
    """Uniform draws of each row, (len(seeds)·n, draws) fp64: those of sample i of a group are a pure function of the
    group's seed, i and `draws`, whatever else is in the batch."""
    groups = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed % 2**63)
        groups.append(torch.rand(n, draws, generator=generator, dtype=torch.float64))
    return torch.cat(groups)


def sample_tokens(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at a uniform draw, and its log-prob (fp32).

    temperature 0 takes the likeliest token and reports its log-prob at temperature 1.
    """
    logits_BV = logits_BV.float() / (temperature if temperature > 0 else 1.0)
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    cdf_BV = _cumulative((logits_BV - largest_B1).exp_())
    ids_B = logits_BV.argmax(-1) if temperature == 0 else _inverted(cdf_BV, uniform_B)
    logprobs_B1 = logits_BV.gather(-1, ids_B[:, None]) - largest_B1 - cdf_BV[:, -1:].log()
    return ids_B, logprobs_B1[:, 0].float()


def judge_drafts(
    logits_BV: Tensor, draft_logits_BV: Tensor, draft_B: Tensor, temperature: float, accept_B: Tensor, sample_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row, distributed as softmax(logits / temperature) although a draft was drawn from q, the same of
    the draft's logits: which drafts are accepted, the tokens, and their log-probs (fp32).

    A draft is accepted with probability min(1, p(draft) / q(draft)); a refused one is replaced by a token from
    norm(max(p − q, 0)) (arXiv 2211.17192, 2.3). At temperature 0 one is accepted if it is the likeliest token.
    accept_B, sample_B: uniform draws for the one and the other.
    """
    if temperature == 0:
        ids_B, logprobs_B = sample_tokens(logits_BV, 0, sample_B)
        return ids_B == draft_B, ids_B, logprobs_B
    logp_BV, logq_BV = ((x.float() / temperature).log_softmax(-1) for x in (logits_BV, draft_logits_BV))
    p_BV, q_BV = logp_BV.exp(), logq_BV.exp()
    p_B, q_B = (x.gather(-1, draft_B[:, None])[:, 0] for x in (p_BV, q_BV))
    accepted_B = accept_B * q_B < p_B
    rest_BV = (p_BV - q_BV).clamp_(min=0)
    # Where p and q are the same but for rounding, nothing may be left of their difference.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    ids_B = torch.where(accepted_B, draft_B, _inverted(_cumulative(rest_BV), sample_B))
    return accepted_B, ids_B, logp_BV.gather(-1, ids_B[:, None])[:, 0]


def _cumulative(weights_BV: Tensor) -> Tensor:
    """Running sums in fp64: in fp32 the tail of a large vocabulary would round away."""
    return weights_BV.cumsum(-1, dtype=torch.float64)


def _inverted(cdf_BV: Tensor, uniform_B: Tensor) -> Tensor:
    ids_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    return ids_B1.clamp_(max=cdf_BV.shape[-1] - 1)[:, 0]
