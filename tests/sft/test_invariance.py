"""One loss and one gradient, however examples are packed, split into passes, or surrounded."""

import numpy as np
import pytest
import torch
import transformers

import deepseek_v3
from runtime.packed import logprobs_at, packed_hidden
from sft.batch import load_batch

V3 = dict(vocab_size=96, initializer_range=0.15)
PLAIN = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.15,
)  # fmt: skip
MODELS = {
    "v3": lambda: deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny", **V3)),
    "llama": lambda: _plain("Llama"),
    "qwen3": lambda: _plain("Qwen3"),
}


def _plain(kind: str):
    config = getattr(transformers, f"{kind}Config")(**PLAIN)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="packed")


def examples_of(lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    chance = np.random.default_rng(seed)
    return [(chance.integers(0, 96, n).astype(np.int32), np.arange(n) >= min(3, n - 1)) for n in lengths]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[request.param]()


def loss_and_gradients(model, examples, passes: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the token mean over all passes."""
    model.zero_grad()
    batches = [load_batch(examples, numbers) for numbers in passes]
    targets = sum(len(batch.targets.ids_C) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = -logprobs_at(model, batch.packed, *batch.targets)[0].sum() / targets
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_equals_separate_and_transformers_own_loss(model) -> None:
    """Loss and every gradient, fp32, against transformers' loss on one unpacked example at a time."""
    examples = examples_of([30, 1, 7, 64, 2, 19])
    packed_loss, packed_gradients = loss_and_gradients(model, examples, [list(range(6))])
    model.zero_grad()
    targets, total = sum(int(trained[1:].sum()) for _, trained in examples), 0.0
    for ids, trained in examples:
        labels = np.where(trained, ids, -100)
        labels[0] = -100
        if (labels >= 0).any():
            ids_T = torch.from_numpy(ids.astype(np.int64))[None]
            logits = model(input_ids=ids_T).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], torch.from_numpy(labels[1:].astype(np.int64)), ignore_index=-100, reduction="sum"
            )
            (loss / targets).backward()
            total += float(loss.detach()) / targets
    assert packed_loss == pytest.approx(total, rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            limit = 1e-5 * max(float(p.grad.abs().max()), 1e-2)
            torch.testing.assert_close(packed_gradients[name], p.grad, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("passes", [[[0], [1], [2], [3], [4], [5]], [[3, 1], [0, 5, 2], [4]], [[5, 4, 3, 2, 1, 0]]])
def test_passes_and_order_change_no_gradient(model, passes: list[list[int]]) -> None:
    examples = examples_of([30, 3, 7, 64, 2, 19], seed=1)
    loss, gradients = loss_and_gradients(model, examples, [list(range(6))])
    again, split = loss_and_gradients(model, examples, passes)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        limit = 1e-5 * max(float(gradient.abs().max()), 1e-2)
        torch.testing.assert_close(split[name], gradient, rtol=0, atol=limit, msg=name)


@torch.no_grad()
def test_another_neighbour_leaves_the_outputs_of_an_example_bitwise_the_same(model) -> None:
    outputs = set()
    for seed in range(8):
        a, b, c = examples_of([70, 50, 40 + 5 * (seed % 3)], seed)
        b = examples_of([50], 99)[0]
        hidden = packed_hidden(model, load_batch([a, b, c], [0, 1, 2]).packed)
        outputs.add(hidden[70:120].numpy().tobytes())
    assert len(outputs) == 1


def test_targets_are_the_trained_tokens_and_never_an_examples_first() -> None:
    examples = [(np.array([5, 6, 7]), np.array([True, False, True])), (np.array([8, 9]), np.array([True, True]))]
    batch = load_batch(examples, [0, 1])
    assert batch.packed.ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.packed.cu_seqlens == [0, 3, 5]
    assert batch.targets.ids_C.tolist() == [7, 9]
    assert batch.targets.states_C.tolist() == [1, 3]
    assert batch.further.ids_C.tolist() == [7]  # two tokens on, and in the same example
    assert batch.further.states_C.tolist() == [0]
    assert examples[0][1].tolist() == [True, False, True]  # the store's own arrays are left alone
