"""The number of tokens of a completion -> DAPO's soft overlong punishment, or a plain cap."""

from collections.abc import Sequence
from typing import Any

from rewards.options import per_row


def length_reward(
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    buffer: int | Sequence[int] = 0,
    **_: Any,
) -> list[float | None]:
    """Punish long completions, between 0 and −1; TRL's signature. A data column may give each row its own limits.

    max_tokens: a completion that is cut at the sampler's limit has just that many tokens, so a cap without a buffer
    must be below it to be felt.
    """
    count = len(completion_ids)
    return [
        overlong_punishment(len(ids), max_tokens=most, buffer=soft)
        for ids, most, soft in zip(completion_ids, per_row(max_tokens, count), per_row(buffer, count), strict=True)
    ]


def overlong_punishment(length: int, *, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens − buffer` tokens, then a line down to −1 at `max_tokens` (arXiv 2503.14476, eq. 13).

    With a buffer of 0 it is a cap: −1 above `max_tokens`, else 0.
    """
    if not 0 <= buffer <= max_tokens:
        raise ValueError(
            f"buffer={buffer}: give tokens from 0 to max_tokens={max_tokens}, in which the punishment grows"
        )
    if buffer == 0:
        return -1.0 if length > max_tokens else 0.0
    return -min(max(length - (max_tokens - buffer), 0) / buffer, 1.0)
