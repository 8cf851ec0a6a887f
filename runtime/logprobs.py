"""Hidden states -> log-probability of each next token and entropy, without ever holding all logits.

The head runs over chunks of tokens whose logits fit the cache; in training each chunk's logits are computed again in
the backward pass, so peak memory is a chunk × vocabulary whatever the batch. A plain linear head, which nearly all
models have, has its backward written out below, in place on one buffer; any other (with adapters, say) is checkpointed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits held at a time, by device. On a CPU 8 MiB stay near the cores, where whole logits spend their time on touching
# new pages; a GPU wants large matmuls.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 24}

MIN_ROWS = 128
"""Tokens of a chunk at least, whatever the vocabulary: the head's weights are read again for every chunk."""


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
    if chunk_elements is None:
        elements = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cuda"])
        rows = max(elements // vocab_size, MIN_ROWS)
    else:
        rows = max(chunk_elements // vocab_size, 1)
    scale = 1.0 / temperature if temperature > 0 else 1.0
    if type(head) is nn.Linear and head.bias is None:
        weight = head.weight
        if torch.is_autocast_enabled(hidden_TD.device.type):
            dtype = torch.get_autocast_dtype(hidden_TD.device.type)
            hidden_TD, weight = hidden_TD.to(dtype), weight.to(dtype)
        return LinearLogprobs.apply(hidden_TD, weight, targets_T, scale, rows)

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy, _ = _of_logits(head(hidden).float() * scale, targets)
        return logprobs, entropy.detach()

    chunks = [
        checkpoint(chunk_logprobs, hidden, targets, use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk_logprobs(hidden, targets)
        for hidden, targets in zip(hidden_TD.split(rows), targets_T.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _of_logits(logits_tV: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log Σ exp, (t,) each. fp32: a bf16 softmax loses the differences the ratio is made of."""
    log_z = logits_tV.logsumexp(-1)
    logprobs = logits_tV.gather(-1, targets_t[:, None])[:, 0] - log_z
    entropy = log_z - ((logits_tV - log_z[:, None]).exp() * logits_tV).sum(-1)
    return logprobs, entropy, log_z


class LinearLogprobs(torch.autograd.Function):
    """hidden (T, D), weight (V, D), targets (T,), 1 / temperature, rows per chunk -> log-probs and entropy, (T,) fp32.

    With p the distribution, d logprob / d logits = scale · (1[target] − p).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        logits = _Logits(hidden, weight, scale, rows)
        p_tV = torch.empty_like(logits.buffer)
        logprobs, entropy, log_z = torch.empty(3, len(hidden), device=hidden.device)
        for chunk, x in logits:
            largest = x.amax(-1)
            x -= largest[:, None]
            e = torch.exp(x, out=p_tV[: len(x)])
            total = e.sum(-1)
            log_total = total.log()
            logprobs[chunk] = x.gather(-1, targets[chunk, None])[:, 0] - log_total
            entropy[chunk] = log_total - torch.linalg.vecdot(e, x) / total
            log_z[chunk] = largest + log_total
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.scale, ctx.rows = scale, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad = grad * ctx.scale
        for chunk, x in _Logits(hidden, weight, ctx.scale, ctx.rows):
            x.sub_(log_z[chunk, None]).exp_().mul_(-grad[chunk, None])
            x.scatter_add_(-1, targets[chunk, None], grad[chunk, None])
            d_logits = x.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                if weight.dtype == torch.float32:
                    d_weight.addmm_(d_logits.T, hidden[chunk])
                else:
                    d_weight += d_logits.T @ hidden[chunk]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


class _Logits:
    """Iterates over (chunk, its fp32 logits), computed into one buffer that the caller may overwrite."""

    def __init__(self, hidden: Tensor, weight: Tensor, scale: float, rows: int) -> None:
        self.hidden, self.weight, self.scale = hidden, weight, scale
        self.rows = max(min(rows, len(hidden)), 1)
        self.buffer = torch.empty(self.rows, len(weight), device=hidden.device, dtype=torch.float32)

    def __iter__(self) -> Any:
        for start in range(0, len(self.hidden), self.rows):
            chunk = slice(start, min(start + self.rows, len(self.hidden)))
            x = self.buffer[: chunk.stop - start]
            if self.weight.dtype == torch.float32:
                torch.mm(self.hidden[chunk], self.weight.T, out=x)
            else:
                x.copy_(self.hidden[chunk] @ self.weight.T)
            if self.scale != 1.0:
                x *= self.scale
            yield chunk, x
