"""Where samples lie in a packed row -> attention over it, none of it spent on padding or on what may not be seen.

A row is cut into segments. A segment is a sample of its own, or continues another one: a group's completions all
continue its prompt, which is then computed once for the whole group. Attention of such a row has two parts: each
segment within itself, causally, and each family's continuations over the segment they share. The parts are joined
by their log-sum-exps, as in ring attention (arXiv 2310.01889), forward and backward.

Shapes: T packed tokens, H heads, d head size; a run is R segments of about one length L, computed together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Neighbours up to this much longer than the shortest of a run join it: less padding than another kernel call costs.
RUN_STRETCH, RUN_SLACK = 1.25, 8


@dataclass(frozen=True, eq=False)
class Layout:
    """Boundaries of a packed row's segments, and which segment each continues.

    cu_seqlens: [0, ..., T].
    parents: for each segment the number of the one it continues, or −1; None: none continues another. A parent
        comes before its continuations, continues nothing itself, and its continuations are neighbours.
    """

    cu_seqlens: Sequence[int]
    parents: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.parents is None:
            return
        if len(self.parents) != len(self.lengths):
            raise ValueError(f"parents: {len(self.parents)} for {len(self.lengths)} segments; give each one, or −1")
        for segment, parent in enumerate(self.parents):
            if parent >= 0 and (parent >= segment or self.parents[parent] >= 0):
                raise ValueError(
                    f"segment {segment} continues {parent}: a parent comes first and continues nothing itself"
                )

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - start for start, end in pairwise(self.cu_seqlens)]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sample, with the segment it continues."""
        parents = self.parents or [-1] * len(self.lengths)
        return max(n + (self.lengths[p] if p >= 0 else 0) for n, p in zip(self.lengths, parents, strict=True))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """(T,) place of each token in its sample: a continuation goes on counting where its parent ends."""
        parents = self.parents or [-1] * len(self.lengths)
        starts = [self.lengths[p] if p >= 0 else 0 for p in parents]
        spans = zip(starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + n) for start, n in spans]).to(device)

    @cached_property
    def runs(self) -> list["Run"]:
        """The segments, neighbours of about one length together."""
        runs: list[Run] = []
        first = 0
        for i in range(1, len(self.lengths) + 1):
            run = self.lengths[first:i]
            if i == len(self.lengths) or not _alike([*run, self.lengths[i]]):
                runs.append(Run(start=self.cu_seqlens[first], lengths=run))
                first = i
        return runs

    @cached_property
    def families(self) -> list[tuple[slice, slice]]:
        """(tokens of all continuations, tokens of the segment they continue), for each segment that is continued."""
        spans: dict[int, slice] = {}
        for segment, parent in enumerate(self.parents or ()):
            if parent < 0:
                continue
            start, end = self.cu_seqlens[segment], self.cu_seqlens[segment + 1]
            if parent in spans and spans[parent].stop != start:
                raise ValueError(f"segment {segment} continues {parent} apart from its siblings: keep them together")
            spans[parent] = slice(spans[parent].start if parent in spans else start, end)
        return [(span, slice(self.cu_seqlens[p], self.cu_seqlens[p + 1])) for p, span in spans.items()]

    @cached_property
    def segment_ids(self) -> tuple[Tensor, Tensor]:
        """(T,) number of each token's segment, and of the one it continues (−1: none)."""
        lengths = torch.tensor(self.lengths)
        parents = torch.tensor(self.parents or [-1] * len(self.lengths))
        return torch.arange(len(lengths)).repeat_interleave(lengths), parents.repeat_interleave(lengths)


def _alike(lengths: Sequence[int]) -> bool:
    return max(lengths) <= RUN_STRETCH * min(lengths) + RUN_SLACK


@dataclass(frozen=True)
class Run:
    """R neighbouring segments computed as one batch of R rows; shorter ones are filled up at the end."""

    start: int
    lengths: list[int]

    @cached_property
    def tokens(self) -> slice:
        """Where the run lies in the row."""
        return slice(self.start, self.start + sum(self.lengths))

    @cached_property
    def even(self) -> bool:
        """All of one length: rows are a view."""
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def place_t(self) -> Tensor:
        """Place in the (R · L) grid of each of the run's tokens."""
        longest = max(self.lengths)
        return torch.cat([torch.arange(row * longest, row * longest + n) for row, n in enumerate(self.lengths)])

    def rows(self, x_tH: Tensor) -> Tensor:
        """(t, H, ...) -> (R, H, L, ...). What fills a row up comes after it, so causally no token sees it."""
        if not self.even:
            grid = x_tH.new_zeros(len(self.lengths) * max(self.lengths), *x_tH.shape[1:])
            x_tH = grid.index_copy_(0, self.place_t, x_tH)
        return x_tH.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)

    def row(self, x_RHL: Tensor) -> Tensor:
        """The way back: (R, H, L, ...) -> (t, H, ...)."""
        x_tH = x_RHL.transpose(1, 2).flatten(0, 1)
        return x_tH if self.even else x_tH[self.place_t]


class SegmentAttention(torch.autograd.Function):
    """q, k, v (T, H, d), a layout and the softmax scale -> (T, H, d), by the CPU's flash kernel on each part.

    The kernel's backward takes probabilities from the output and the log-sum-exp it is given; given those of the
    joined parts, each part's gradients are those of the one softmax over both.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for run in layout.runs:
            o, l = _flash(*(run.rows(x[run.tokens]) for x in (q, k, v)), causal=True, scale=scale)  # noqa: E741
            out[run.tokens], lse[run.tokens] = run.row(o), run.row(l)
        for after, shared in layout.families:
            o, l = _flash(*(_one(x) for x in (q[after], k[shared], v[shared])), causal=False, scale=scale)  # noqa: E741
            o, l = o[0].transpose(0, 1), l[0].T  # noqa: E741
            joined = torch.logaddexp(lse[after], l)
            own, other = (lse[after] - joined).exp(), (l - joined).exp()
            out[after] = (out[after] * own[..., None] + o * other[..., None]).to(out.dtype)
            lse[after] = joined
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for run in ctx.layout.runs:
            t = run.tokens
            parts = _flash_backward(
                *(run.rows(x[t]) for x in (grad, q, k, v, out, lse)), causal=True, scale=ctx.scale
            )  # fmt: skip
            dq[t], dk[t], dv[t] = (run.row(part) for part in parts)
        for after, shared in ctx.layout.families:
            parts = _flash_backward(
                *(_one(x) for x in (grad[after], q[after], k[shared], v[shared], out[after], lse[after])),
                causal=False, scale=ctx.scale,
            )  # fmt: skip
            for total, part in zip((dq[after], dk[shared], dv[shared]), parts, strict=True):
                total += part[0].transpose(0, 1)
        return dq, dk, dv, None, None


def _one(x_tH: Tensor) -> Tensor:
    """(t, H, ...) -> (1, H, t, ...)."""
    return x_tH.transpose(0, 1)[None]


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (R, H, L, d) and its log-sum-exp (R, H, L)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash_backward(*tensors: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(grad, q, k, v, out, log-sum-exp) -> the gradients of q, k, v."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, causal, scale=scale)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same by FlexAttention's block mask: (T, H, d) -> (T, H, v)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = _flex()(q, k, v, block_mask=block_mask(layout, str(q.device)), scale=scale)
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    # Uncompiled it would hold all scores. Lengths differ in every batch, so shapes are symbols.
    return torch.compile(flex, dynamic=True)


@lru_cache(maxsize=4)  # every layer of a forward asks for the same one
def block_mask(layout: Layout, device: str) -> Any:
    """Which blocks of a row attend to which, for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment, parent = (ids.to(device) for ids in layout.segment_ids)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((segment[i] == segment[j]) & (i >= j)) | (parent[i] == segment[j])

    T = len(segment)
    return create_block_mask(visible, None, None, T, T, device=device)
