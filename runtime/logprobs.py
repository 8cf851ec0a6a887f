"""Hidden states -> log-probability of each next token and entropy, without ever holding all logits.

The head runs over chunks of tokens whose logits fit the cache; in training each chunk's logits are computed again in
the backward pass, so peak memory is a chunk × vocabulary whatever the batch. A plain linear head, which nearly all
models have, has its backward written out below, in place on one buffer; any other (with adapters, say) is checkpointed.
Where the loss only adds log-probs up, gradients are taken in the forward pass instead, while the logits are there.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

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
    rows = _chunk_rows(hidden_TD, vocab_size, chunk_elements)
    scale = 1.0 / temperature if temperature > 0 else 1.0
    if _is_plain(head):
        return LinearLogprobs.apply(*_in_autocast(hidden_TD, head.weight), targets_T, scale, rows)

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


def summed_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden_TD: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    chunk_elements: int | None = None,
) -> Tensor:
    """log softmax(head(h_t))[target_t], fp32 (T,), for a loss that adds them up, all with one weight, as SFT's does.

    With a plain head their gradients are taken while the logits are there, so the head runs once and not again in the
    backward pass. That raises ValueError if the weights turn out to differ; `token_logprobs` is for those.
    """
    if _is_plain(head) and torch.is_grad_enabled():
        rows = _chunk_rows(hidden_TD, vocab_size, chunk_elements)
        return SummedLogprobs.apply(*_in_autocast(hidden_TD, head.weight), targets_T, rows)
    return token_logprobs(head, hidden_TD, targets_T, vocab_size=vocab_size, chunk_elements=chunk_elements)[0]


def _chunk_rows(hidden_TD: Tensor, vocab_size: int, chunk_elements: int | None) -> int:
    """Tokens of a chunk."""
    if chunk_elements is not None:
        return max(chunk_elements // vocab_size, 1)
    elements = CHUNK_ELEMENTS.get(hidden_TD.device.type, CHUNK_ELEMENTS["cuda"])
    return max(elements // vocab_size, MIN_ROWS)


def _is_plain(head: object) -> TypeGuard[nn.Linear]:
    return type(head) is nn.Linear and head.bias is None


def _in_autocast(hidden_TD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's type, where it is on: it doesn't reach into our own functions."""
    device = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return hidden_TD.to(dtype or hidden_TD.dtype), weight.to(dtype or weight.dtype)


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
        logprobs, entropy, log_z = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
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
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        grad = grad * ctx.scale
        for chunk, x in _Logits(hidden, weight, ctx.scale, ctx.rows):
            x.sub_(log_z[chunk, None]).exp_().mul_(-grad[chunk, None])
            x.scatter_add_(-1, targets[chunk, None], grad[chunk, None])
            gradients.add(chunk, x)
        d_weight = gradients.weight
        return gradients.hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


class SummedLogprobs(torch.autograd.Function):
    """hidden (T, D), weight (V, D), targets (T,), rows per chunk -> log-probs (T,) fp32 that all get one gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        for chunk, x in _Logits(hidden, weight, 1.0, rows):
            target = targets[chunk, None]
            x -= x.amax(-1, keepdim=True)
            logit = x.gather(-1, target)
            total = x.exp_().sum(-1, keepdim=True)
            logprobs[chunk] = (logit - total.log())[:, 0]
            x.div_(-total).scatter_add_(-1, target, torch.ones_like(total))
            gradients.add(chunk, x)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.dtype = weight.dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad.stride() != (0,) and bool((grad != grad[:1]).any()):
            raise ValueError("summed_logprobs: the loss weighs log-probs differently; use token_logprobs")
        d_hidden, d_weight = ctx.saved_tensors
        weight_1 = grad[:1].sum(0, keepdim=True)  # of no log-probs at all, 0
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                gradient *= weight_1  # in place: as large as the head; torch refuses a second backward pass
        return d_hidden, None if d_weight is None else d_weight.to(ctx.dtype), None, None


class _Gradients:
    """Of hidden states (T, D) and, in fp32, of the weight (V, D), added up chunk by chunk; None where not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None

    def add(self, chunk: slice, d_logits_tV: Tensor) -> None:
        hidden, weight = self.inputs
        d_logits = d_logits_tV.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(d_logits, weight, out=self.hidden[chunk])
        if self.weight is not None:
            if weight.dtype == torch.float32:
                self.weight.addmm_(d_logits.T, hidden[chunk])
            else:
                self.weight += d_logits.T @ hidden[chunk]


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
