"""Hidden states -> log-probability of each next token and entropy, without ever holding all logits.

The head runs over chunks of tokens; in training each chunk's logits are recomputed in the backward pass, so peak
memory is one chunk × vocabulary whatever the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 2^24 floats are 64 MiB, large enough that the matmul dominates its launch.
CHUNK_ELEMENTS = 1 << 24


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden_TD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(head(h_t) / temperature)[target_t] and the entropy of that distribution, both fp32 (T,).

    hidden_TD holds the states that predict: the state *before* each target. The entropy carries no gradient.
    temperature 0 (greedy) is scored at temperature 1. chunk_elements: logits held at a time (CHUNK_ELEMENTS).
    """
    chunk_elements = CHUNK_ELEMENTS if chunk_elements is None else chunk_elements
    scale = 1.0 / temperature if temperature > 0 else 1.0

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # fp32: a bf16 softmax over the vocabulary loses the small log-prob differences the ratio is made of.
        logits = head(hidden).float() * scale
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
        with torch.no_grad():
            logits = logits.detach()
            probs = (logits - log_z[:, None]).exp_()
            entropy = log_z - (probs * logits).sum(-1)
        return logprobs, entropy

    size = max(chunk_elements // vocab_size, 1)
    if len(targets_T) <= size:
        return chunk_logprobs(hidden_TD, targets_T)
    recompute = torch.is_grad_enabled()
    chunks = [
        checkpoint(chunk_logprobs, hidden, targets, use_reentrant=False)
        if recompute
        else chunk_logprobs(hidden, targets)
        for hidden, targets in zip(hidden_TD.split(size), targets_T.split(size), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
