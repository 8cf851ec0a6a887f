"""Held-out loss is the mean over trained tokens, source by source; accuracy is what our rewards say of samples."""

import math

import pytest
import torch

from rewards import resolve
from runtime.models import load_causal_lm
from runtime.packed import logprobs_at
from sft.batch import load_batch
from sft.chat import encode_conversation
from sft.evaluate import sampled_accuracy, source_losses

EXAMPLES = [("1+1?", "2"), ("What is 20 + 3?", "<think>20+3</think>23"), ("Ana?", "Ana has 20 cards.")]


@pytest.fixture(scope="module")
def model(v3):
    return load_causal_lm(v3)


@pytest.fixture(scope="module")
def examples(tokenizer):
    turns = ("user", "assistant")
    conversations = [[dict(role=r, content=c) for r, c in zip(turns, pair, strict=True)] for pair in EXAMPLES]
    samples = [encode_conversation(tokenizer, conversation) for conversation in conversations]
    return [(torch.tensor(ids).numpy(), torch.tensor(trained).numpy()) for ids, trained in samples]


@pytest.fixture
def losses(model, examples):
    def measure(**passes: list[tuple[list[int], float]]) -> dict[str, float]:
        def logprobs(batch):
            return logprobs_at(model, batch.packed, *batch.targets)[0]

        batches = {name: [(load_batch(examples, n), w) for n, w in these] for name, these in passes.items()}
        return source_losses(batches, logprobs, lambda sums: sums)

    return measure


@torch.no_grad()
def plain_loss(model, examples, numbers: list[int]) -> tuple[float, int]:
    """Sum and count over trained tokens, one unpacked example at a time, from transformers' logits."""
    total, count = 0.0, 0
    for number in numbers:
        ids, trained = (torch.from_numpy(x) for x in examples[number])
        logp = model(input_ids=ids[None].long()).logits[0, :-1].double().log_softmax(-1)
        chosen = logp.gather(1, ids[1:, None].long())[:, 0][trained[1:]]
        total, count = total - float(chosen.sum()), count + len(chosen)
    return total, count


def test_the_loss_of_a_source_is_the_plain_token_mean_and_the_whole_weighs_tokens(losses, model, examples):
    (a, n_a), (b, n_b) = plain_loss(model, examples, [0, 1]), plain_loss(model, examples, [2])
    assert n_a != n_b
    assert losses(sums=[([0], 1.0), ([1], 1.0)], names=[([2], 1.0)]) == pytest.approx(
        {"eval/sums/loss": a / n_a, "eval/names/loss": b / n_b, "eval/loss": (a + b) / (n_a + n_b)}, rel=1e-5
    )


def test_packed_or_not_and_with_passes_that_dont_count_it_is_the_same(losses):
    expected = losses(sums=[([0], 1.0), ([1], 1.0)])
    assert losses(sums=[([0, 1], 1.0), ([2], 0.0)]) == pytest.approx(expected, rel=1e-6)


def test_a_source_without_targets_has_no_loss(losses):
    found = losses(sums=[([0], 0.0)])
    assert math.isnan(found["eval/sums/loss"]) and "eval/loss" not in found


def test_accuracy_grades_what_the_model_samples(model, tokenizer, data):
    path = str(data / "problems.jsonl")
    found = sampled_accuracy(model, tokenizer, path, samples=2, max_tokens=6)
    assert found.problems == 2 and found.mean in (0, 0.5, 1) and 0 <= found.low <= found.mean <= found.high <= 1
    again = sampled_accuracy(model, tokenizer, path, samples=2, max_tokens=6)
    assert again.samples == found.samples  # the same at every evaluation
    assert [(s.question, s.gold) for s in found.samples] == [("What is 0 + 0?", "0"), ("What is 1 + 1?", "2")]
    for s in found.samples:
        graded = resolve("accuracy")(completions=[s.text], completion_ids=None, prompts=[s.question], answer=[s.gold])
        assert s.grades["accuracy"] == graded[0]
        assert s.text == tokenizer.decode(s.completion.ids, skip_special_tokens=True)
    assert sampled_accuracy(model, tokenizer, path, samples=1, max_tokens=6).problems == 1
