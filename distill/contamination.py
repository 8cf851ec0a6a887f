"""Benchmark files in; for a text, the places in them that it repeats, out.

A text is contaminated where it shares n words in a row with a benchmark's, as in the n-gram filters of GPT-3 (arXiv
2005.14165, appendix C; n = 13) and DeepSeek-R1 (arXiv 2501.12948, B.3; n = 10). Texts of fewer words count as a whole.
Numbers are words here: a benchmark problem with other numbers in its first sentence is still a hit by its second.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distill.duplicates import ngrams, words
from runtime.errors import UserError
from runtime.rows import BadRow, normalise, parse, read_raw


class Hit(NamedTuple):
    """A place in a benchmark that a text repeats."""

    benchmark: str
    """The file or dataset, as it was named."""
    line: int
    """Its first line that has these words, from 1."""
    words: str
    """The words they share."""

    def __str__(self) -> str:
        return f"{self.benchmark}:{self.line}: {self.words}"


class Benchmarks:
    """An index of every n-gram of some benchmarks' problems."""

    def __init__(self, names: Sequence[str], *, n: int) -> None:
        """names: files or `datasets` names, in any layout of runtime/rows.py. UserError for one without problems."""
        self.n = n
        self.problems = 0
        self._places: dict[str, tuple[str, int]] = {}
        for name in names:
            before = self.problems
            for line, text in _problems(name):
                self.problems += 1
                for ngram in ngrams(words(text), n):
                    self._places.setdefault(ngram, (name, line))
            if self.problems == before:
                raise UserError(f"benchmarks: {name!r} holds no problem; it needs rows with `prompt`")

    def hit(self, text: str) -> Hit | None:
        """The first place a text shares n words with, or all of its words where it has fewer; None if there is none."""
        for ngram in ngrams(words(text), self.n):
            if place := self._places.get(ngram):
                return Hit(*place, ngram)
        return None


def _problems(name: str) -> Iterator[tuple[int, str]]:
    for line, found in read_raw(name):
        try:
            row = normalise(parse(found) if isinstance(found, bytes) else found)
        except BadRow:
            continue  # it can't be evaluated on either
        yield line, text_of(row["prompt"])


def text_of(prompt: str | list[dict[str, str]]) -> str:
    """What a prompt asks: the user's words."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] == "user")
