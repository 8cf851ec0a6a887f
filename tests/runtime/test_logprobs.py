"""Log-probs and entropies from hidden states, in one piece or in chunks."""

import math

import pytest
import torch
from torch import nn

from runtime.logprobs import summed_logprobs, token_logprobs


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


def of_token_logprobs(head, hidden, targets, **options):
    return token_logprobs(head, hidden, targets, **options)[0]


@pytest.mark.parametrize("per_chunk", [1, 4, 13])
@pytest.mark.parametrize("kind", ["linear", "any other"])
def test_log_probs_to_add_up_are_the_same_and_so_are_their_gradients(head, kind, per_chunk):
    given = head if kind == "linear" else lambda hidden: head(hidden)
    results = []
    for work in (of_token_logprobs, summed_logprobs):
        hidden, targets = states()
        head.zero_grad()
        for weight in (0.25, 3.0, 0.0):  # gradients accumulate
            logprobs = work(given, hidden, targets, vocab_size=20, chunk_elements=20 * per_chunk)
            (-logprobs.sum() * weight).backward()
        results.append((logprobs, hidden.grad, head.weight.grad.clone()))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_log_probs_to_add_up_take_one_product_with_the_head_less(head):
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for work in (of_token_logprobs, summed_logprobs):
        hidden, targets = states()
        with FlopCounterMode(display=False) as counter:
            work(head, hidden, targets, vocab_size=20).mean().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * 13 * 8 * 20
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        summed_logprobs(head, *states(), vocab_size=20)
    assert counter.get_total_flops() == 2 * 13 * 8 * 20


def test_log_probs_to_add_up_refuse_a_loss_that_weighs_them(head):
    hidden, targets = states()
    logprobs = summed_logprobs(head, hidden, targets, vocab_size=20)
    with pytest.raises(ValueError, match="token_logprobs"):
        (logprobs * torch.arange(13)).sum().backward()


def test_gradients_taken_on_the_way_are_not_scaled_twice(head):
    loss = summed_logprobs(head, *states(), vocab_size=20).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_frozen_head_or_frozen_states_get_no_gradient_of_a_sum(head):
    hidden, targets = states()
    head.requires_grad_(False)
    logprobs = summed_logprobs(head, hidden, targets, vocab_size=20)
    assert logprobs.grad_fn.saved_tensors[1] is None  # none of the head's size is made
    logprobs.sum().backward()
    assert head.weight.grad is None and hidden.grad is not None
    head.requires_grad_(True)
    summed_logprobs(head, hidden.detach(), targets, vocab_size=20).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not summed_logprobs(head, hidden, targets, vocab_size=20).requires_grad


def test_a_sum_under_autocast_scales_gradients_in_fp32(head):
    """1/3 is not a bf16 number: rounding it would shrink every gradient alike."""
    results = []
    for work in (of_token_logprobs, summed_logprobs):
        hidden, targets = states()
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = work(head, hidden, targets, vocab_size=20, chunk_elements=100)
        (logprobs.sum() / 3).backward()
        results.append((logprobs, hidden.grad, head.weight.grad.clone()))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert float(((got * expected).sum() / expected.square().sum()).detach()) == pytest.approx(1, abs=1e-3)
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_no_targets_at_all_have_zero_gradients(head):
    """Where processes must keep step, one of them may have nothing to predict."""
    hidden, targets = states(T=0)
    summed_logprobs(head, hidden, targets, vocab_size=20).sum().backward()
    assert hidden.grad.shape == (0, 8) and not head.weight.grad.any()
