"""Texts in; which of them repeat an earlier one, out.

Candidates come from MinHash (datasketch), the word is the Jaccard similarity of the texts' shingles themselves, so
that nothing is called a duplicate by chance. Texts with different numbers never repeat each other: "3 apples" and "5
apples" are two problems. Left out: paraphrases.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

SHINGLE = 3
"""Words of a shingle."""
PERMUTATIONS = 128
"""Of a signature."""
MISSES = (0.1, 0.9)
"""Weights of candidates in vain and of missed pairs: only misses cost anything, candidates are compared."""

# Scripts without spaces give a word a character; so do signs that make another problem of the same words.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|\w+|[-+*/×÷=<>≤≥^%√]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def words(text: str) -> list[str]:
    """The words and signs of a text, whatever their case, width and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def near_duplicates(texts: Sequence[str], *, threshold: float) -> Iterator[tuple[int, float] | None]:
    """For each text, the earlier one it repeats and how alike they are, from `threshold` to 1; None if it's new.

    An earlier one is one that is new itself, the likest, of several the first. threshold: Jaccard similarity of their
    three-word shingles; 1 for texts of the same words.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=0.9 * threshold, num_perm=PERMUTATIONS, weights=MISSES)
    for position, text in enumerate(texts):
        own = _shingles(text)
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in own])
        numbers = _NUMBER.findall(text)
        found = [
            (likeness, -earlier)
            for earlier in index.query(signature)
            if _NUMBER.findall(texts[earlier]) == numbers
            and (likeness := _jaccard(own, _shingles(texts[earlier]))) >= threshold
        ]
        if found:
            likeness, earlier = max(found)
            yield -earlier, likeness
        else:
            index.insert(position, signature)
            yield None


def _shingles(text: str) -> set[str]:
    return set(ngrams(words(text), SHINGLE))


def ngrams(sequence: Sequence[str], n: int) -> Iterable[str]:
    """Every n words in a row; of a shorter text, the whole."""
    return (" ".join(sequence[start : start + n]) for start in range(max(1, len(sequence) - n + 1)))


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
