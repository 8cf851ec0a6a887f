"""The length of a completion -> DAPO's soft overlong punishment."""


def overlong_punishment(length: int, *, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens − buffer` tokens, then a line down to −1 at `max_tokens` (arXiv 2503.14476, eq. 13)."""
    if buffer <= 0:
        raise ValueError(f"buffer={buffer}: give the number of tokens in which the punishment grows")
    return -min(max(length - (max_tokens - buffer), 0) / buffer, 1.0)
