"""Near duplicates against every pair compared by hand."""

import random

from distill.duplicates import near_duplicates, ngrams, words


def test_words_ignore_case_width_and_punctuation_but_not_signs() -> None:
    assert words("The ＣＡＴ, the “cat”!") == ["the", "cat", "the", "cat"]
    assert words("3+5") != words("3-5")
    assert words("三只猫") == ["三", "只", "猫"]


def test_ngrams_of_a_short_text_are_the_whole() -> None:
    assert list(ngrams(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(ngrams(["a", "b"], 3)) == ["a b"]


def test_they_are_those_that_comparing_every_pair_finds() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(10)]
    texts = [" ".join(draw.choices(vocabulary, k=40)) for _ in range(60)]
    for original in list(texts[:30]):  # copies with one to six words changed
        copy = original.split()
        for _ in range(draw.randint(1, 6)):
            copy[draw.randrange(40)] = draw.choice(vocabulary)
        texts.append(" ".join(copy))
    draw.shuffle(texts)

    shingles = [{tuple(text.split()[i : i + 3]) for i in range(38)} for text in texts]
    expected: list[tuple[int, float] | None] = []
    for mine in range(len(texts)):
        alike = [
            (len(shingles[mine] & shingles[other]) / len(shingles[mine] | shingles[other]), -other)
            for other in range(mine)
            if expected[other] is None
        ]
        best = max((pair for pair in alike if pair[0] >= 0.5), default=None)
        expected.append((-best[1], best[0]) if best else None)
    found = list(near_duplicates(texts, threshold=0.5))
    assert sum(pair is not None for pair in expected) >= 15
    assert found == expected


def test_a_copy_of_a_copy_repeats_the_first() -> None:
    text = "one two three four five six seven eight nine ten"
    assert list(near_duplicates([text, text, text + " eleven"], threshold=0.8)) == [None, (0, 1.0), (0, 8 / 9)]


def test_at_the_threshold_is_a_duplicate() -> None:
    text = "one two three four five six seven eight nine ten"
    assert list(near_duplicates([text, text + " eleven"], threshold=8 / 9)) == [None, (0, 8 / 9)]


def test_what_only_repeats_a_duplicate_is_new() -> None:
    names = [chr(97 + i) * 2 for i in range(26)]
    first, second, third = (" ".join(names[start : start + 20]) for start in (0, 3, 6))
    assert list(near_duplicates([first, second, third], threshold=0.6)) == [None, (0, 15 / 21), None]
