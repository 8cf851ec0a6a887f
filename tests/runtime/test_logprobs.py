"""Log-probs and entropies from hidden states, in one piece or in chunks."""

import math

import pytest
import torch
from torch import nn

from runtime.logprobs import token_logprobs


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(8, 20, bias=False)


def states(T: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, 8, generator=generator)
    return hidden.requires_grad_(), torch.randint(20, (T,), generator=generator)


def test_logprob_and_entropy_by_hand():
    """Logits log(1, 2, 5): probabilities 1/8, 2/8, 5/8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    logprobs, entropy = token_logprobs(lambda h: h, logits, torch.tensor([1]), vocab_size=3)
    assert logprobs.item() == pytest.approx(math.log(2 / 8))
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    logprobs, entropy = token_logprobs(lambda h: h, logits, torch.tensor([2]), temperature=0.5, vocab_size=3)
    assert logprobs.item() == pytest.approx(math.log(25 / 30))
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30)))
    greedy, _ = token_logprobs(lambda h: h, logits, torch.tensor([2]), temperature=0, vocab_size=3)
    assert greedy.item() == pytest.approx(math.log(5 / 8))


def test_entropy_of_a_uniform_distribution_is_log_v_and_of_a_certain_one_0():
    hidden = torch.tensor([[0.0] * 20, [200.0] + [0.0] * 19])
    _, entropy = token_logprobs(lambda h: h, hidden, torch.tensor([0, 0]), vocab_size=20)
    torch.testing.assert_close(entropy, torch.tensor([math.log(20), 0.0]), atol=1e-5, rtol=0)


def of_whole_logits(head, hidden, targets, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's own softmax, on all logits at once."""
    logp = (head(hidden).float() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1).detach()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("per_chunk", [1, 4, 13])
@pytest.mark.parametrize("kind", ["linear", "any other"])
def test_chunks_change_neither_values_nor_gradients(head, kind, per_chunk, temperature):
    def chunked(hidden, targets):
        given = head if kind == "linear" else lambda hidden: head(hidden)
        options = dict(temperature=temperature, chunk_elements=20 * per_chunk)
        return token_logprobs(given, hidden, targets, vocab_size=20, **options)

    results = []
    for work in (lambda *states: of_whole_logits(head, *states, temperature), chunked):
        hidden, targets = states()
        head.zero_grad()
        logprobs, entropy = work(hidden, targets)
        (logprobs * torch.arange(13)).sum().backward()
        assert not entropy.requires_grad
        results.append((logprobs, entropy, hidden.grad, head.weight.grad.clone()))
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_passes_the_gradient_on(head):
    hidden, targets = states()
    head.requires_grad_(False)
    token_logprobs(head, hidden, targets, vocab_size=20, chunk_elements=100)[0].sum().backward()
    ours, hidden.grad = hidden.grad, None
    of_whole_logits(head, hidden, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours, hidden.grad, atol=1e-6, rtol=0)
    assert head.weight.grad is None


def test_under_autocast_the_matmuls_are_in_bf16_and_gradients_in_fp32(head):
    results = []
    for work in (
        lambda *states: of_whole_logits(head, *states, 0.7),
        lambda *states: token_logprobs(head, *states, temperature=0.7, vocab_size=20, chunk_elements=100),
    ):
        hidden, targets = states()
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, entropy = work(hidden, targets)
        logprobs.sum().backward()
        results.append((logprobs, entropy, hidden.grad, head.weight.grad.clone()))
    for whole, part in zip(*results, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, whole, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)


def test_no_more_than_one_chunk_of_logits_is_held(head):
    seen = []

    def watched(hidden):
        seen.append(len(hidden))
        return head(hidden)

    hidden, targets = states()
    logprobs, _ = token_logprobs(watched, hidden, targets, vocab_size=20, chunk_elements=100)
    assert seen == [5, 5, 3]
    logprobs.sum().backward()
    assert sorted(seen) == sorted([5, 5, 3] * 2)  # computed again, not kept


def test_bf16_states_give_fp32_logprobs(head):
    hidden, targets = states()
    head.to(torch.bfloat16)
    logprobs, entropy = token_logprobs(head, hidden.bfloat16(), targets, vocab_size=20)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = head(hidden.bfloat16()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact, atol=1e-6, rtol=0)
