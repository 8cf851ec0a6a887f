"""Rows of data -> the prompts of each step: a pure function of the seed and one cursor.

A row whose prompt is too long for the sampler is set aside before the run starts, and counted.
"""

import functools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rl.curriculum import Curriculum
from rl.types import Prompt
from runtime.errors import UserError
from runtime.rows import Rows, take
from sft.chat import Prompt as Content
from sft.chat import encode_prompt

MOST_PASSED_OVER = 50
"""Turns per wanted prompt after which a curriculum no longer chooses."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """The problems of a run."""

    rows: Rows
    """Usable rows."""
    tokenizer: PreTrainedTokenizerBase
    too_long: int
    """Rows set aside because their prompt exceeds the limit."""
    seed: int

    def draw(self, cursor: int, count: int, curriculum: Curriculum | None = None) -> tuple[list[Prompt], int]:
        """The next `count` prompts from `cursor` on, in the order of epoch after epoch of shuffled rows, and the
        cursor behind them. A curriculum passes over some; when it has nearly all, the rest is taken as it comes."""
        prompts: list[Prompt] = []
        give_up = cursor + MOST_PASSED_OVER * count
        while len(prompts) < count:
            ((epoch, index),) = take(len(self.rows), seed=self.seed, start=cursor, count=1)
            seed = mix_seed(self.seed, cursor)
            if curriculum is None or cursor >= give_up or seed / 2**63 < curriculum.chance(index, self.rows[index]):
                prompts.append(self.prompt(index, epoch=epoch, draw=cursor))
            cursor += 1
        return prompts, cursor

    def first(self, count: int) -> list[Prompt]:
        """The first `count` rows in file order, for evaluation."""
        return [self.prompt(i, epoch=0, draw=i) for i in range(min(count, len(self.rows)))]

    def prompt(self, index: int, *, epoch: int, draw: int) -> Prompt:
        """Row `index` as a prompt; its samples are decided by the run's seed and which draw this is."""
        row = self.rows[index]
        return Prompt(
            index=index,
            epoch=epoch,
            seed=mix_seed(self.seed, draw),
            content=row["prompt"],
            ids=encode_prompt(self.tokenizer, row["prompt"]),
            columns={name: value for name, value in row.items() if name != "prompt"},
        )


def make_source(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, seed: int, max_prompt_tokens: int) -> PromptSource:
    """Set aside rows whose prompt has more than `max_prompt_tokens` tokens."""
    kept = Rows(source=rows.source, rejects=rows.rejects)
    kept.extend(row for row in rows if _fits(row["prompt"], tokenizer, max_prompt_tokens))
    if not kept:
        raise UserError(
            f"sampling.max_prompt_tokens={max_prompt_tokens}: every one of the {len(rows)} prompts of "
            f"{rows.source!r} is longer; raise it"
        )
    return PromptSource(
        rows=kept,
        tokenizer=tokenizer,
        too_long=len(rows) - len(kept),
        seed=seed,
    )


def mix_seed(seed: int, draw: int) -> int:
    """One seed per (run seed, draw), spread over 63 bits so that neighbours share nothing (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + (draw + 1) * 0xBF58476D1CE4E5B9) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1


def _fits(prompt: Content, tokenizer: PreTrainedTokenizerBase, limit: int) -> bool:
    # No token is shorter than a byte, so most rows need no tokenising: only what surrounds the text is counted.
    if isinstance(prompt, str):
        size, roles = len(prompt.encode()), None
    else:
        size, roles = sum(len(m["content"].encode()) for m in prompt), tuple(m["role"] for m in prompt)
    return size + _surroundings(tokenizer, roles) <= limit or len(encode_prompt(tokenizer, prompt)) <= limit


@functools.lru_cache(maxsize=64)
def _surroundings(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...] | None) -> int:
    """Tokens that come with a text, or with messages of these roles, before any word is said."""
    empty: Content = "" if roles is None else [{"role": role, "content": ""} for role in roles]
    return len(encode_prompt(tokenizer, empty))
