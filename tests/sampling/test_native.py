"""The native sampler samples from exactly the model's distribution, whatever a row is batched with."""

import copy
import dataclasses
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import deepseek_v3
from deepseek_v3.config import yarn
from deepseek_v3.decode import GroupDecoder
from deepseek_v3.moe import Router
from deepseek_v3.routing import recorded, replayed, set_flips
from runtime.packed import pack, packed_hidden, packed_logprobs
from runtime.weights import checkpoint_tensors
from sampling.attest import SyncReport, WeightsMismatch, make_canary, sync
from sampling.draws import row_uniforms, sample_tokens
from sampling.fingerprint import fingerprint
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams
from sampling.vllm_sampler import VLLMSampler, moe_experts

VOCAB = 50
PROMPTS = [[7, 21, 30, 2], list(range(10, 40)), [5] * 9, [1]]
PLAIN = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    kv_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    max_position_embeddings=128,
    rope_parameters=yarn(factor=4, original=32),
)


def v3(**overrides):
    return deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny", **SMALL | overrides))


MODELS = {
    # Few experts, and one head: expanded keys and values are smaller than the latent.
    "v3_tiny": lambda: v3(num_attention_heads=1),
    "v3": lambda: v3(num_attention_heads=4, n_routed_experts=8, n_group=4, topk_group=2),
    "v3_q_lora": lambda: v3(num_attention_heads=4, q_lora_rank=20, rope_interleave=False, v_head_dim=8),
    "llama": lambda: LlamaForCausalLM._from_config(LlamaConfig(**PLAIN), attn_implementation="packed"),
    "qwen3": lambda: Qwen3ForCausalLM._from_config(
        Qwen3Config(**PLAIN, tie_word_embeddings=True), attn_implementation="packed"
    ),
}


@torch.no_grad()
def randomize(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if "inv_freq" not in name:
            tensor.copy_((1.0 if "norm" in name else 0.0) + 0.15 * torch.randn(tensor.shape, generator=generator))


class Pair:
    """A trainer's model and the sampler for it."""

    def __init__(self, model) -> None:
        self.model = model.eval()
        randomize(model, 0)
        self.sampler = NativeSampler(model)
        self.canary = make_canary(VOCAB, dtype="float32", length=40)
        self.report: SyncReport | None = None

    def weights(self):
        return checkpoint_tensors(self.model)

    @torch.no_grad()
    def score(self, sequences, temperature=1.0):
        rows = []
        for sequence in sequences:
            logits = self.model(torch.tensor([list(sequence)])).logits[0, :-1] / temperature
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].tolist())
        return rows

    def sync(self, version):
        self.report = sync(
            self.sampler,
            self.weights,
            version=version,
            canary=self.canary,
            score_trainer=self.score,
            previous=self.report,
        )
        return self.report

    def gap(self, prompts, groups, temperature=1.0) -> float:
        """Largest |Δlogp| of sampled tokens against a full forward of the trainer's model."""
        gaps = []
        for prompt, group in zip(prompts, groups, strict=True):
            for answer in group:
                ours = self.score([prompt + answer.ids], temperature)[0][len(prompt) - 1 :]
                gaps += [abs(a - b) for a, b in zip(ours, answer.logprobs, strict=True)]
        return max(gaps)


@pytest.fixture(scope="module", params=MODELS)
def shared(request):
    return Pair(MODELS[request.param]())


@pytest.fixture
def pair(shared):
    """The pair, with weights of seed 1 on both sides."""
    randomize(shared.model, 1)
    shared.sync(1)
    return shared


@pytest.fixture
def v3_pair():
    pair = Pair(MODELS["v3"]())
    pair.sync(1)
    return pair


def sampled(pair, prompts=PROMPTS, *, seeds=None, n=3, **options):
    params = SamplingParams(n=n, **dict(max_tokens=10) | options)
    return pair.sampler.sample(prompts, params, seeds=list(range(len(prompts))) if seeds is None else seeds)


def ids(groups):
    return [[answer.ids for answer in group] for group in groups]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_a_full_forward(pair, temperature):
    groups = sampled(pair, temperature=temperature)
    assert pair.gap(PROMPTS, groups, temperature or 1.0) < 1e-5
    assert all(len(answer.ids) == len(answer.logprobs) == 10 for group in groups for answer in group)


def test_temperature_0_takes_the_likeliest_token(pair):
    (answer,), *_ = sampled(pair, n=1, temperature=0.0)
    grown = torch.tensor([PROMPTS[0]])
    for token in answer.ids:
        assert token == int(pair.model(grown).logits[0, -1].argmax())
        grown = torch.cat([grown, torch.tensor([[token]])], dim=1)


def test_logprobs_follow_the_weights_of_every_sync(pair):
    old = sampled(pair)
    randomize(pair.model, 2)
    assert pair.gap(PROMPTS, old) > 0.1  # the trainer moved on
    assert pair.sync(2).canary_max < 1e-4
    new = sampled(pair)
    assert pair.gap(PROMPTS, new) < 1e-5
    assert {answer.version for group in new for answer in group} == {2}


def test_a_row_samples_the_same_alone_and_in_any_batch(pair):
    together = sampled(pair)
    assert ids(together) == ids(sampled(pair))
    for i, prompt in enumerate(PROMPTS):
        assert ids(sampled(pair, [prompt], seeds=[i])) == ids([together[i]])
        assert ids(sampled(pair, [prompt], seeds=[i], n=1)) == [[together[i][0].ids]]
    waves = NativeSampler(pair.model, max_rows=5)
    waves.version = 1
    assert ids(waves.sample(PROMPTS, SamplingParams(n=3, max_tokens=10), seeds=[0, 1, 2, 3])) == ids(together)
    assert len({tuple(answer.ids) for group in together for answer in group}) == 12


def test_rows_that_leave_early_change_no_other_row(pair):
    free = sampled(pair, n=6, max_tokens=16)
    stops = tuple(sorted({answer.ids[2] for answer in free[0][:3]}))
    stopped = sampled(pair, n=6, max_tokens=16, stop_token_ids=stops)
    lengths = set()
    for free_group, group in zip(free, stopped, strict=True):
        for long, answer in zip(free_group, group, strict=True):
            end = next((t + 1 for t, token in enumerate(long.ids) if token in stops), 16)
            assert answer.ids == long.ids[:end]
            assert answer.logprobs == pytest.approx(long.logprobs[:end], abs=1e-5)
            assert answer.finish_reason == ("stop" if answer.ids[-1] in stops else "length")
            lengths.add(end)
    assert len(lengths) > 3


def test_a_stop_token_may_come_first_or_last(pair):
    (free,), *_ = sampled(pair, n=1)
    for t in (0, 9):
        if free.ids[t] in free.ids[:t]:
            continue
        (answer,), *_ = sampled(pair, n=1, stop_token_ids=(free.ids[t],))
        assert (answer.ids, answer.finish_reason) == (free.ids[: t + 1], "stop")


def test_score_is_that_of_a_full_forward(pair):
    sequences = [[1, 2, 3], list(range(40)), [9, 9]]
    for got, expected in zip(pair.sampler.score(sequences), pair.score(sequences), strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


def test_the_global_randomness_is_left_alone(pair):
    state = torch.get_rng_state()
    sampled(pair)
    assert torch.equal(state, torch.get_rng_state())


def test_the_sampler_shares_nothing_with_the_trainer(v3_pair):
    before = sampled(v3_pair)
    randomize(v3_pair.model, 3)
    assert sampled(v3_pair) == before


def test_bad_requests_are_refused_with_the_prompt_they_concern(v3_pair):
    with pytest.raises(ValueError, match=r"prompt 1: 100 tokens \+ 100 new exceed .*=128"):
        sampled(v3_pair, [[1], [1] * 100], max_tokens=100)
    with pytest.raises(ValueError, match=r"prompt 0: token ids outside 0\.\.49"):
        sampled(v3_pair, [[50]])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampled(v3_pair, [[1], []])
    with pytest.raises(ValueError, match="seeds: 2 for 1 prompts"):
        sampled(v3_pair, [[1]], seeds=[0, 1])
    assert sampled(v3_pair, []) == []


def test_a_closed_sampler_is_gone(v3_pair):
    v3_pair.sampler.close()
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        sampled(v3_pair)


# What is drawn.


def test_tokens_are_drawn_from_the_exact_distribution():
    """Chi-square of 40,000 first and second tokens against softmax(logits / T), 49 degrees of freedom each."""
    pair = Pair(MODELS["v3_tiny"]())
    pair.sync(1)
    draws, temperature = 20_000, 0.7
    params = SamplingParams(n=500, max_tokens=2, temperature=temperature)
    groups = pair.sampler.sample([PROMPTS[0]] * (draws // 500), params, seeds=list(range(draws // 500)))
    answers = [answer for group in groups for answer in group]
    with torch.no_grad():
        first = (pair.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
        grown = torch.tensor([[*PROMPTS[0], token] for token in range(VOCAB)])
        second = first @ (pair.model(grown).logits[:, -1] / temperature).softmax(-1)
    for t, expected in enumerate((first, second)):
        counts = torch.bincount(torch.tensor([answer.ids[t] for answer in answers]), minlength=VOCAB)
        enough = expected * draws >= 5
        chi2 = ((counts - expected * draws)[enough] ** 2 / (expected * draws)[enough]).sum()
        freedom = int(enough.sum()) - 1
        assert freedom > 20
        assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


def test_sampling_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.0, 0.2, 0.7]]).log()  # one token is impossible
    rows = logits.expand(6, 4)
    drawn, logprobs = sample_tokens(
        rows, 1.0, torch.tensor([0.0, 0.05, 0.15, 0.29, 0.31, 1 - 2**-53], dtype=torch.float64)
    )
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.7, 0.7]))


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    """A million tokens of probability 1e-6: fp32 running sums would be off by whole tokens."""
    uniform = torch.tensor([0.25, 0.5, 0.999999], dtype=torch.float64)
    drawn, _ = sample_tokens(torch.zeros(3, 1_000_000), 1.0, uniform)
    assert (drawn - torch.tensor([250_000, 500_000, 999_999])).abs().max() <= 1


def test_uniforms_depend_on_seed_row_and_step_alone():
    draws = row_uniforms([3, 4], 2, 5)
    assert torch.equal(row_uniforms([4], 2, 5), draws[2:])
    assert torch.equal(row_uniforms([3], 1, 5), draws[:1])
    assert len(draws.unique()) == 20


# The decoder, step by step.


@pytest.mark.parametrize("name", ["v3_tiny", "v3", "v3_q_lora"])
def test_every_step_has_the_logits_of_a_full_forward(name):
    model = MODELS[name]()
    randomize(model, 0)
    prompts, n = [[3, 1, 4, 1, 5], [9, 2], [6]], 2
    decoder = GroupDecoder(model, prompts, n=n, max_tokens=6)
    rows = [list(p) for p in prompts for _ in range(n)]
    alive = torch.arange(6)
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        for row, logits in zip(alive.tolist(), decoder.logits_BV, strict=True):
            expected = model(torch.tensor([rows[row]])).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        live = {1: [0, 2, 3, 5], 3: [1, 2, 3], 4: [0, 2]}.get(t)  # rows, then a whole group, leave
        if live is not None:
            decoder.keep(torch.tensor([i in live for i in range(len(alive))]))
            alive = alive[live]
        new = torch.randint(VOCAB, (len(alive),), generator=generator)
        for row, token in zip(alive.tolist(), new.tolist(), strict=True):
            rows[row].append(token)
        decoder.step(new)


# Loading, and syncs that go wrong.


def refuses_to_sample(pair) -> bool:
    with pytest.raises(WeightsMismatch, match="no attested weights"):
        sampled(pair)
    return pair.sampler.version == -1


def test_a_new_sampler_refuses_to_sample():
    pair = Pair(MODELS["v3_tiny"]())
    assert refuses_to_sample(pair)
    pair.sampler.load(pair.weights(), version=0)
    assert len(sampled(pair)) == 4


def test_load_reports_what_is_then_held(v3_pair):
    randomize(v3_pair.model, 4)
    prints = v3_pair.sampler.load(v3_pair.weights(), version=3)
    assert prints == {name: fingerprint(tensor) for name, tensor in v3_pair.weights()}
    assert v3_pair.sampler.version == 3


def test_load_refuses_unknown_missing_and_misshapen_tensors(v3_pair):
    good = dict(v3_pair.weights())
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    bad = {
        "no such tensor": good | {"model.layers.0.mlp.gate_bias": torch.ones(3)},
        rf"1 of {len(good)} tensors never sent: .*{name}": {n: t for n, t in good.items() if n != name},
        rf"{name}: shape \(32, 16\) sent, \(16, 32\) held": good | {name: good[name].T},
    }
    for message, weights in bad.items():
        v3_pair.sampler.load(good.items(), version=1)
        with pytest.raises(WeightsMismatch, match=message):
            v3_pair.sampler.load(weights.items(), version=2)
        assert refuses_to_sample(v3_pair)


def spoil(pair, monkeypatch, name, change) -> None:
    """Let `change` (tensor -> tensor or None: drop) come between the trainer and the sampler."""
    load = pair.sampler.load

    def spoiled(weights, *, version):
        stream = ((n, change(t) if n == name else t) for n, t in weights)
        return load(((n, t) for n, t in stream if t is not None), version=version)

    monkeypatch.setattr(pair.sampler, "load", spoiled)


@pytest.mark.parametrize("lie", [False, True])
def test_a_sync_that_did_nothing_is_caught(pair, monkeypatch, lie):
    """Whether it reports the fingerprints it holds or, having only read the weights, the new ones."""

    def load(weights, *, version):
        pair.sampler.version = version
        return {name: fingerprint(t) for name, t in weights} if lie else pair.report.fingerprints

    randomize(pair.model, 2)
    monkeypatch.setattr(pair.sampler, "load", load)
    with pytest.raises(WeightsMismatch, match="canary" if lie else "embed_tokens.weight .* is still version 1's"):
        pair.sync(2)
    assert refuses_to_sample(pair)


def test_one_stale_tensor_is_named(pair, monkeypatch):
    name = "model.layers.1.post_attention_layernorm.weight"
    stale = dict(pair.weights())[name].clone()
    randomize(pair.model, 2)
    spoil(pair, monkeypatch, name, lambda _: stale)
    with pytest.raises(WeightsMismatch, match=rf"1 of \d+ tensors differ: {name} .* is still version 1's"):
        pair.sync(2)
    assert refuses_to_sample(pair)


def test_one_transposed_square_tensor_is_named(pair, monkeypatch):
    square = [name for name, t in pair.weights() if t.dim() == 2 and t.shape[0] == t.shape[1]]
    if not square:
        pytest.skip("this model has no square matrix")
    spoil(pair, monkeypatch, square[0], lambda tensor: tensor.T)
    with pytest.raises(WeightsMismatch, match=rf"{square[0]} \[\d+, \d+\] is transposed"):
        pair.sync(2)
    assert refuses_to_sample(pair)


def test_a_missing_expert_is_named(v3_pair, monkeypatch):
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    spoil(v3_pair, monkeypatch, name, lambda _: None)
    with pytest.raises(WeightsMismatch, match=name):
        v3_pair.sync(2)
    assert refuses_to_sample(v3_pair)


def test_a_parameter_permuted_after_loading_is_caught_by_the_canary(pair, monkeypatch):
    load = pair.sampler.load

    def load_then_permute(weights, *, version):
        prints = load(weights, version=version)
        norm = pair.sampler.model.get_parameter("model.norm.weight")
        norm.data.copy_(norm.flip(0) * 1.5)
        return prints

    monkeypatch.setattr(pair.sampler, "load", load_then_permute)
    with pytest.raises(WeightsMismatch, match="canary: every tensor arrived"):
        pair.sync(2)
    assert refuses_to_sample(pair)


def test_completions_are_values(v3_pair):
    answer = sampled(v3_pair)[0][0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.version = 5


# Which experts were chosen.


@torch.no_grad()
def trainer_experts(model, sequences):
    """(tokens, MoE layers, K) of each sequence, from one packed forward."""
    packed = pack(sequences)
    with recorded(model) as choices:
        packed_hidden(model, packed)
    return [part.transpose(0, 1) for part in choices.chosen_LTK.split(packed.layout.lengths, dim=1)]


def flips(model, prompts, groups) -> tuple[int, int]:
    """Between what the sampler recorded and the trainer's forward on the same tokens."""
    fed = [prompt + c.ids[:-1] for prompt, group in zip(prompts, groups, strict=True) for c in group]
    answers = [c for group in groups for c in group]
    counts = []
    for theirs, answer in zip(trainer_experts(model, fed), answers, strict=True):
        assert answer.experts.shape == tuple(theirs.shape)
        assert answer.experts.dtype == np.int16 and answer.experts.flags.owndata
        counts.append(set_flips(torch.from_numpy(answer.experts), theirs))
    return tuple(map(sum, zip(*counts, strict=True)))


@pytest.mark.parametrize("name", ["v3_tiny", "v3"])
def test_recorded_experts_are_those_of_the_trainers_packed_forward(name):
    pair = Pair(MODELS[name]())
    pair.sync(1)
    groups = sampled(pair, record_experts=True)
    layers = sum(isinstance(module, Router) for module in pair.model.modules())
    assert flips(pair.model, PROMPTS, groups) == (0, layers * 3 * sum(len(p) + 9 for p in PROMPTS))
    assert len(np.unique(groups[1][0].experts)) > 3
    assert groups == sampled(pair)  # recording changes no token


def test_experts_stay_with_their_row_when_others_leave_early(v3_pair):
    free = sampled(v3_pair, n=6, max_tokens=16)
    stops = tuple(sorted({answer.ids[2] for answer in free[0][:3]}))
    groups = sampled(v3_pair, n=6, max_tokens=16, stop_token_ids=stops, record_experts=True)
    assert len({len(answer.ids) for group in groups for answer in group}) > 3
    assert flips(v3_pair.model, PROMPTS, groups)[0] == 0


def test_experts_are_the_same_alone_and_in_any_batch(v3_pair):
    together = sampled(v3_pair, record_experts=True)
    waves = NativeSampler(v3_pair.model, max_rows=5)
    waves.version = 1
    params = SamplingParams(n=3, max_tokens=10, record_experts=True)
    apart = waves.sample(PROMPTS, params, seeds=[0, 1, 2, 3])
    for group, other in zip(together, apart, strict=True):
        for a, b in zip(group, other, strict=True):
            assert np.array_equal(np.sort(a.experts), np.sort(b.experts))


def test_a_completion_of_one_token_has_the_experts_of_its_prompt(v3_pair):
    groups = sampled(v3_pair, max_tokens=1, record_experts=True)
    assert [answer.experts.shape for answer in groups[1]] == [(30, 2, 2)] * 3
    assert flips(v3_pair.model, PROMPTS, groups)[0] == 0


def test_a_changed_router_shows_as_flips(v3_pair):
    groups = sampled(v3_pair, record_experts=True)
    with torch.no_grad():
        for module in v3_pair.model.modules():
            if isinstance(module, Router):
                module.e_score_correction_bias += 0.05 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    flipped, total = flips(v3_pair.model, PROMPTS, groups)
    assert 0.01 < flipped / total < 0.9


@torch.no_grad()
def test_replaying_a_bf16_samplers_experts_takes_the_largest_gaps_away(v3_pair):
    """A token that bfloat16 sends to another expert has another log-prob; what else bfloat16 rounds stays."""
    rounded = NativeSampler(copy.deepcopy(v3_pair.model).to(torch.bfloat16))
    rounded.version = 1
    params = SamplingParams(n=16, max_tokens=16, record_experts=True)
    groups = rounded.sample(PROMPTS, params, seeds=[0, 1, 2, 3])
    rows = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    packed = pack([prompt + c.ids for prompt, c in rows])
    # The last token of each was never fed to the sampler: it chooses freely.
    experts_LTK = torch.cat([F.pad(torch.from_numpy(c.experts), (0, 0, 0, 0, 0, 1), value=-1) for _, c in rows])
    largest = []
    for use in (False, True):
        with replayed(v3_pair.model, experts_LTK.transpose(0, 1), use=use) as count:
            logprobs = packed_logprobs(v3_pair.model, packed)[0].split(packed.layout.lengths)
        gaps = [row[len(p) :] - torch.tensor(c.logprobs) for row, (p, c) in zip(logprobs, rows, strict=True)]
        largest.append(float(torch.cat(gaps).abs().max()))
        assert 0 < count.rate < 0.1
    assert largest[1] < largest[0] / 2


def test_nothing_is_recorded_unasked_or_without_routers(pair):
    plain = [answer.experts for group in sampled(pair) for answer in group]
    assert plain == [None] * 12
    asked = [answer.experts for group in sampled(pair, record_experts=True) for answer in group]
    has_routers = any(isinstance(module, Router) for module in pair.model.modules())
    assert all((experts is not None) == has_routers for experts in asked)
    assert not any(m.on_choice for m in pair.sampler.model.modules() if isinstance(m, Router))


# The same from vLLM, whose engine records on CUDA only.


def test_vllms_record_has_a_row_per_layer_and_becomes_ours(v3_pair):
    ours = sampled(v3_pair, record_experts=True)[1][2].experts
    theirs = np.concatenate([np.zeros_like(ours[:, :1]), ours], axis=1).astype(np.uint8)  # the first layer is dense
    converted = moe_experts(theirs, tokens=len(ours), dense_layers=1)
    assert converted.dtype == np.int16 and np.array_equal(converted, ours)
    for held in (None, theirs[:-1]):
        with pytest.raises(RuntimeError, match=f"experts of {'none' if held is None else 38} of 39 tokens"):
            moe_experts(held, tokens=39, dense_layers=1)


def test_vllm_on_a_cpu_is_refused_before_an_engine_starts(v3_pair, monkeypatch, tmp_path):
    v3_pair.model.config.save_pretrained(tmp_path)
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: True)
    vllm = types.ModuleType("vllm")
    vllm.LLM = lambda *_, **__: pytest.fail("an engine was made")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(ValueError, match=r"record_experts=True: on a CPU .* sampling\.backend=native"):
        VLLMSampler(tmp_path, max_model_len=64, record_experts=True)
