"""Samples packed into one row are computed as if each were alone, in any causal LM."""

import peft
import pytest
import torch
import transformers

import deepseek_v3
from deepseek_v3.config import yarn
from runtime.packed import Packed, pack, packed_hidden, packed_logprobs

PLAIN = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.15,
)
SAMPLES = [[5, 6, 7, 8, 9], list(range(20)), [3], [1, 2, 3], [11, 12, 13]]


def v3(**overrides):
    small = dict(vocab_size=60, hidden_size=32, intermediate_size=48, kv_lora_rank=16, initializer_range=0.15)
    rope = dict(max_position_embeddings=64, rope_parameters=yarn(factor=4, original=16))
    return deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny", **small, **rope, **overrides))


def plain(kind: str, attention: str = "packed", **options):
    config = getattr(transformers, f"{kind}Config")(**PLAIN | options)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention)


MODELS = {
    "v3": v3,
    "llama_gqa": lambda: plain("Llama"),
    "qwen3": lambda: plain("Qwen3", tie_word_embeddings=True),
    "mistral_window": lambda: plain("Mistral", sliding_window=20),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def one_by_one(model, samples, temperature=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of each token, 0 for first ones, by the model's own whole forward."""
    logprobs, entropies = [], []
    for ids in samples:
        scores = (model(input_ids=torch.tensor([ids])).logits[0, :-1] / temperature).log_softmax(-1)
        zero = scores.new_zeros(1)
        logprobs += [zero, scores.gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0]]
        entropies += [zero, -(scores.exp() * scores).sum(-1)]
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_pack_lays_samples_end_to_end():
    packed = pack([[1, 2, 3], [4], [5, 6]])
    assert packed.ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.cu_seqlens == [0, 3, 4, 6]
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_logprobs_are_those_of_each_sample_alone(model, temperature):
    got = packed_logprobs(model, pack(SAMPLES), temperature=temperature)
    expected = one_by_one(model, SAMPLES, temperature)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    weights = torch.arange(len(expected[0])) % 5 - 2.0
    a, b = (gradients(model, (logprobs * weights).sum()) for logprobs in (got[0], expected[0]))
    assert a.keys() == b.keys()
    for name, gradient in b.items():
        assert (a[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_wanted_tokens_alone_have_the_same_values(model):
    packed = pack(SAMPLES)
    wanted = torch.arange(len(packed.ids_T)) % 3 == 0
    asked = wanted.clone()
    some, everything = packed_logprobs(model, packed, only_T=wanted), packed_logprobs(model, packed)
    assert torch.equal(wanted, asked)
    for a, b in zip(some, everything, strict=True):
        torch.testing.assert_close(a, torch.where(wanted, b, 0.0), atol=1e-6, rtol=0)


def test_samples_do_not_see_each_other(model):
    packed = pack(SAMPLES)
    other = Packed(packed.ids_T.clone(), packed.layout)
    other.ids_T[:5] += 7
    other.ids_T[25:] += 7
    before, after = packed_hidden(model, packed), packed_hidden(model, other)
    torch.testing.assert_close(before[5:25], after[5:25], atol=1e-6, rtol=0)
    assert (before[:5] - after[:5]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_would_mix_samples_is_refused(attention):
    with pytest.raises(ValueError, match=rf"attn_implementation='{attention}': packed samples would see each other"):
        packed_logprobs(plain("Llama", attention), pack(SAMPLES))


def test_a_sample_beyond_the_sliding_window_is_refused():
    with pytest.raises(ValueError, match="a sample of 20 tokens is longer than the model's sliding window of 10"):
        packed_logprobs(plain("Mistral", sliding_window=10), pack(SAMPLES))


def test_packed_attention_is_sdpa_without_boundaries():
    torch.manual_seed(0)
    model = plain("Llama").eval()
    ids = torch.randint(60, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [v3, lambda: plain("Llama")], ids=["v3", "llama"])
def test_adapters_are_part_of_the_policy(make):
    torch.manual_seed(0)
    policy = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"])).eval()
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    got, expected = packed_logprobs(policy, pack(SAMPLES))[0], one_by_one(policy, SAMPLES)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with policy.disable_adapter():
        assert (packed_logprobs(policy, pack(SAMPLES))[0] - got).abs().max() > 1e-2


PROMPTS = [[5, 6, 7, 8, 9], [3]]
COMPLETIONS = [[[1, 2, 3], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4], [9]], [[11, 12], [13, 14, 15]]]


def shared() -> Packed:
    segments, parents = [], []
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        parents += [-1, *[len(segments)] * len(completions)]
        segments += [prompt, *completions]
    return pack(segments, parents=parents)


def test_completions_that_share_a_prompt_are_as_if_each_had_its_own(model):
    """Hidden states and every parameter's gradient, whether the prompt is computed once or for each completion."""
    alone = [prompt + c for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True) for c in completions]
    states = packed_hidden(model, shared())
    parts = iter(states.split([len(s) for p, cs in zip(PROMPTS, COMPLETIONS, strict=True) for s in (p, *cs)]))
    rows = []
    for completions in COMPLETIONS:
        prompt = next(parts)
        rows += [torch.cat([prompt, next(parts)]) for _ in completions]
    expected = packed_hidden(model, pack(alone)).split([len(ids) for ids in alone])
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, other, atol=1e-5, rtol=0)
    a, b = (gradients(model, torch.cat(r)[:, :7].sin().sum()) for r in (rows, list(expected)))
    assert a.keys() == b.keys()
    for name, gradient in b.items():
        assert (a[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name


def test_a_prompt_is_blind_to_its_completions_and_they_to_each_other(model):
    packed = shared()
    changed = Packed(packed.ids_T.clone(), packed.layout)
    changed.ids_T[5:8] += 7  # the first completion
    before, after = packed_hidden(model, packed), packed_hidden(model, changed)
    moved = (before - after).abs().amax(1) > 1e-5
    assert moved.tolist() == [5 <= t < 8 for t in range(len(moved))]
    changed.ids_T[0] += 7  # the prompt: seen by all of its completions, and by nobody else's
    moved = (before - packed_hidden(model, changed)).abs().amax(1) > 1e-5
    assert moved.tolist() == [t < 22 for t in range(len(moved))]


def test_shared_rows_need_to_be_told_which_state_predicts_which_token(model):
    with pytest.raises(ValueError, match="logprobs_at"):
        packed_logprobs(model, shared())
