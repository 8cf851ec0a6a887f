"""Nonsense never raises, never takes a second, and is never right by luck: 100,000 strings at night, a slice by day."""

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import grade_math

ROOT = Path(__file__).parents[3]
GSM8K = Path(os.environ.get("DATA", ROOT.parent / "shared/data")) / "gsm8k/test.jsonl"
NO_NUMBER = "917363.125"
"""A gold that no fuzzed string happens to equal."""

TOKENS = [
    *r"\frac \sqrt \boxed \fbox \text \mathrm \left \right \begin{pmatrix} \end{pmatrix} \\ & { } ( ) [ ]".split(),
    *r"\{ \} | \lfloor \rceil + - \pm \times \cdot / ^ _ ! = < > \le \ne \in \cup , ; : . \% % ^\circ".split(),
    *r"\$ $ \pi e i x n \infty \emptyset \mathbb{R} \sin \log_2 \ln \sum_{k=1}^{n} \prod \int \binom \pmod".split(),
    *r"\ldots \overline 0 1 2 9 10 -1 0.5 1,000 1e9 10^{9} 99999999999999999999 or and \text{or} \text{cm} cm".split(),
    *r"(A) A yes DNE <think> </think> <answer> </answer> #### ** \( \) \[ \] 0x1F 1_000 __import__".split(),
    *"½ √ ² − × ∞ ∪ ≤ ° １ ， ⟨".split(),
    *(" ", "\n", "\t", "\x00", "\u200b", "\u200d", "\u202e", "\ud800", "\U0001f600"),
]

hostile = st.one_of(
    st.lists(st.sampled_from(TOKENS), max_size=40).map("".join),
    st.lists(st.sampled_from(TOKENS), max_size=40).map(" ".join),
    st.text(max_size=200),
    st.builds(lambda part, times: part * times, st.sampled_from(TOKENS), st.integers(1, 400)),
)
boxed = hostile.map(lambda text: rf"So \boxed{{{text}}}.")


def _check(gold: str, response: str) -> None:
    """A verdict in a second; a slow one has a second try as other text, for the machine may be busy."""
    for attempt in range(2):
        began = time.perf_counter()
        verdict = grade_math(gold, response + " " * attempt)
        if time.perf_counter() - began < 1:
            break
    else:
        pytest.fail(f"more than a second, twice: {gold!r} | {response!r}")
    assert verdict.outcome in ("right", "wrong", "unknown") and verdict.reason
    assert gold != NO_NUMBER or verdict.outcome == "wrong", (gold, response, verdict)


def _real() -> list[str]:
    """Golds and responses of the golden file, and GSM8K solutions where they are."""
    lines = (ROOT / "rewards/golden/math.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [str(row[column]) for row in rows for column in ("gold", "response") if len(str(row[column])) < 500]
    if GSM8K.exists():
        texts += [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()[:200]]
    return texts


def _mutants(seed: int) -> Iterator[str]:
    """Real strings with one to four spans deleted, doubled, moved or replaced by a token or a part of another one."""
    rng = random.Random(seed)
    real = _real()
    while True:
        text = rng.choice(real)
        for _ in range(rng.randint(1, 4)):
            start = rng.randint(0, len(text))
            end = min(len(text), start + rng.choice((0, 1, 1, 2, 5)))
            other = rng.choice(real)
            cut = rng.randint(0, len(other))
            new = rng.choice(("", text[start:end] * 2, text[start:end][::-1], rng.choice(TOKENS), other[cut : cut + 8]))
            text = text[:start] + new + text[end:]
        yield text


def _fuzz_mutants(count: int, seed: int) -> None:
    """Each mutant once as the response to a fixed gold, once as the gold; both sides count."""
    mutants = _mutants(seed)
    for _ in range(count // 2):
        text = next(mutants)
        _check(NO_NUMBER, text)
        _check(text, next(mutants))


def _fuzz_generated(count: int) -> None:
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from([NO_NUMBER, "x^2", r"\{1,2\}", "[0,1)", r"\text{yes}", "A", ""]), st.one_of(hostile, boxed))
    def run(gold: str, response: str) -> None:
        _check(gold, response)

    run()


def test_a_slice_of_generated_strings() -> None:
    _fuzz_generated(1_000)


def test_a_slice_of_mutated_real_strings() -> None:
    _fuzz_mutants(2_000, seed=0)


@pytest.mark.nightly
def test_50_000_generated_strings() -> None:
    _fuzz_generated(50_000)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_10_000_mutated_real_strings(seed: int) -> None:
    _fuzz_mutants(10_000, seed)


@pytest.mark.parametrize(
    "response",
    [
        "1" * 100_000,
        r"\frac{1}{" * 20_000,
        "{" * 100_000,
        "(" * 50_000 + "1" + ")" * 50_000,
        r"\boxed{" * 20_000 + "5" + "}" * 20_000,
        r"\boxed{5} " * 20_000,
        "<think>" * 50_000,
        "$" * 100_000,
        "\\" * 100_000,
        "1," * 50_000,
        " " * 1_000_000,
        "a" * 1_000_000,
        r"\boxed{" + "x^2+" * 50_000 + "1}",
        "\u200b" * 200_000 + "5",
    ],
    ids=lambda response: f"{response[:10]!r} {len(response)}",
)
def test_a_long_response_is_wrong_in_a_second(response: str) -> None:
    _check(NO_NUMBER, response)
