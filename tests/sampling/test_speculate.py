"""Drafting changes neither the distribution that is sampled from nor the log-probs, whether drafts are good or bad."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepseek_v3
from deepseek_v3.config import yarn
from deepseek_v3.routing import recorded, set_flips
from runtime.packed import pack, packed_hidden
from runtime.weights import checkpoint_tensors
from sampling.draws import judge_drafts
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams
from sampling.vllm_sampler import VLLMSampler

PROMPTS = [[7, 1, 3, 2], [5, 0, 6, 1, 1, 2, 7, 4, 3, 2, 2, 6], [4] * 5, [1]]
SEEDS = range(len(PROMPTS))
TOKENS = 14


@torch.no_grad()
def random_model(vocab_size: int, **sizes):
    model = deepseek_v3.DeepseekV3ForCausalLM(
        deepseek_v3.preset(
            "tiny", vocab_size=vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=24,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, intermediate_size=48, moe_intermediate_size=16,
            n_routed_experts=8, n_group=4, topk_group=2, max_position_embeddings=128,
            rope_parameters=yarn(factor=4, original=32), num_nextn_predict_layers=1, **sizes,
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        mean, std = (1.0, 0.15) if "norm" in name else (0.0, 0.4 if name == "lm_head.weight" else 0.2)
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))
    return model


def taught(model, rows: list[list[int]], *, steps: int):
    """A copy whose MTP layer has learnt what the main model says on these rows."""
    model = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.model.mtp.requires_grad_(True).parameters(), lr=1e-2)
    packed = pack(rows)
    places = torch.cat([torch.arange(*bounds) for bounds in itertools.pairwise(packed.cu_seqlens)])
    places = places[~torch.isin(places + 1, torch.tensor(packed.cu_seqlens))]  # all but last tokens
    for _ in range(steps):
        output = model.model(packed.ids_T[None], layout=packed.layout, output_mtp=True)
        target = model.lm_head(output.last_hidden_state[0, places + 1]).softmax(-1)
        logits = model.lm_head(output.mtp_hidden_state[0, places])
        optimizer.zero_grad()
        (-(target * logits.log_softmax(-1)).sum(-1).mean()).backward()
        optimizer.step()
    return model.requires_grad_(False)


def sampler_of(model, *, max_rows: int = 512) -> NativeSampler:
    sampler = NativeSampler(model, max_rows=max_rows)
    sampler.load(checkpoint_tensors(model), version=1)
    return sampler


def sampled(sampler, prompts=PROMPTS, *, seeds=SEEDS, n=3, speculate=True, **options):
    params = SamplingParams(n=n, speculate=speculate, **dict(max_tokens=TOKENS) | options)
    return sampler.sample(prompts, params, seeds=list(seeds))


def ids(groups):
    return [[answer.ids for answer in group] for group in groups]


def acceptance(groups) -> float:
    drafted, accepted = np.sum([answer.drafts for group in groups for answer in group], axis=0)
    return accepted / drafted


@pytest.fixture(scope="module")
def samplers():
    """One with a random drafter, one whose drafter has seen what the main model likes to say."""
    model = random_model(40)
    plain = sampler_of(model)
    said = [sampled(plain, n=2, temperature=t, speculate=False) for t in (0.0, 1.0)]
    rows = [p + c.ids for groups in said for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    return {"random": plain, "taught": sampler_of(taught(model, rows, steps=50))}


@pytest.fixture(params=["random", "taught"])
def sampler(samplers, request):
    return samplers[request.param]


# Exactness.


def test_temperature_0_samples_the_tokens_of_plain_decoding(samplers) -> None:
    """For 4 prompts that one drafter has been taught with, and for 60 others of 1 to 9 tokens."""
    others = [[int(i) for i in np.random.default_rng(seed).integers(40, size=1 + seed % 9)] for seed in range(60)]
    prompts, rates = [*PROMPTS, *others], {}
    for name, sampler in samplers.items():
        plain, groups = (
            sampled(sampler, prompts, seeds=range(64), n=1, temperature=0.0, speculate=speculate)
            for speculate in (False, True)
        )
        assert ids(groups) == ids(plain)
        for (a,), (b,) in zip(groups, plain, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        rates[name] = acceptance(groups[:4]), acceptance(groups[4:])
    assert all(0 < rate < 0.3 for rate in rates["random"]), rates
    assert rates["taught"][0] > 0.7 and 0 < rates["taught"][1] < 0.7, rates


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward(sampler, temperature) -> None:
    groups = sampled(sampler, temperature=temperature)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for answer in group:
            logits = sampler.model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])
            assert answer.logprobs == pytest.approx(logprobs[:, 0].tolist(), abs=1e-5 / (temperature or 1.0))
            assert len(answer.ids) == TOKENS and answer.finish_reason == "length"


@pytest.mark.parametrize("drafter", ["random", "taught"])
def test_answers_are_drawn_from_the_exact_distribution(drafter) -> None:
    """Chi-square of 25,000 answers of three tokens against all 512 there are, with what each one's chance is."""
    vocab, tokens, draws, prompt = 8, 3, 25_000, [3, 1, 4]
    model = random_model(vocab)
    if drafter == "taught":
        model = taught(model, [[*prompt, *two] for two in itertools.product(range(vocab), repeat=2)], steps=40)
    every = torch.tensor(list(itertools.product(range(vocab), repeat=tokens)))
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([prompt]).expand(len(every), -1), every], dim=1)).logits
    logprobs = logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
    expected = logprobs.double().exp() * draws

    sampler, n = sampler_of(model, max_rows=draws), draws // 50
    groups = sampled(sampler, [prompt] * 50, seeds=range(50), n=n, max_tokens=tokens)
    places = torch.tensor([c.ids for group in groups for c in group]) @ torch.tensor([vocab**2, vocab, 1])
    counts = torch.bincount(places, minlength=len(every)).double()
    common = expected >= 5
    seen, wanted = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    chi2, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1
    p, rate = float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), chi2 / 2)), acceptance(groups)
    assert p > 0.001, f"p = {p:.1e}, chi² = {chi2:.0f} with {freedom} degrees of freedom, acceptance {rate:.2f}"
    assert freedom > 100 and (rate < 0.7 if drafter == "random" else rate > 0.9)


def test_a_judgement_gives_the_models_distribution_whatever_was_drafted() -> None:
    """By the midpoint rule over both draws: 3 × 4 drafts × 200 × 200 rows."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.9, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.0, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]])
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    for temperature in (1.0, 0.5):
        p_logits, q_logits = p.log() * temperature, q.log() * temperature
        for i in range(3):
            total = torch.zeros(4)
            for d in range(4):
                accept, sample = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
                rows = len(accept)
                draft = torch.full((rows,), d)
                args = p_logits[i].expand(rows, 4), q_logits[i].expand(rows, 4), draft, temperature, accept, sample
                accepted, tokens, logprobs = judge_drafts(*args)
                assert torch.equal(tokens[accepted], draft[accepted])
                torch.testing.assert_close(logprobs.exp(), p[i][tokens])
                total += q[i, d] * torch.bincount(tokens, minlength=4) / rows
            torch.testing.assert_close(total, p[i], atol=0.006, rtol=0)


def test_where_model_and_drafter_agree_every_draft_is_accepted() -> None:
    logits = torch.randn(1000, 30, generator=torch.Generator().manual_seed(0))
    draft, accept = torch.arange(1000) % 30, torch.full((1000,), 1 - 2**-53, dtype=torch.float64)
    accepted, tokens, _ = judge_drafts(logits, logits, draft, 0.7, accept, accept)
    assert float(accepted.float().mean()) > 0.99 and torch.equal(tokens[accepted], draft[accepted])
    nothing_left = judge_drafts(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, -torch.inf]]),
                                torch.tensor([2]), 1.0, accept[:1], accept[:1])  # fmt: skip
    assert int(nothing_left[1]) == 1  # not the impossible last token


# Rows.


def test_a_row_samples_the_same_alone_and_in_any_batch(sampler) -> None:
    together = sampled(sampler)
    for i, prompt in enumerate(PROMPTS):
        ((alone,),) = sampled(sampler, [prompt], seeds=[i], n=1)
        assert (alone.ids, alone.drafts) == (together[i][0].ids, together[i][0].drafts)
    assert ids(sampled(sampler_of(sampler.model, max_rows=5))) == ids(together)
    assert len({tuple(answer.ids) for group in together for answer in group}) == 12
    assert ids(sampled(sampler, [PROMPTS[0]], seeds=[9])) != ids([together[0]])


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_rows_end_with_their_first_stop_token_and_change_no_other(samplers, sampler, temperature) -> None:
    free = sampled(sampler, n=6, max_tokens=18, temperature=temperature)
    stops = tuple(sorted({answer.ids[t] for answer, t in zip(free[0] + free[1], (0, 2, 3, 5, 7, 8), strict=False)}))[:4]
    stopped = sampled(sampler, n=6, max_tokens=18, temperature=temperature, stop_token_ids=stops)
    lengths, ends = set(), set()
    for free_group, group in zip(free, stopped, strict=True):
        for long, answer in zip(free_group, group, strict=True):
            end = next((t + 1 for t, token in enumerate(long.ids) if token in stops), 18)
            assert answer.ids == long.ids[:end]
            assert answer.logprobs == pytest.approx(long.logprobs[:end], abs=1e-5)
            assert answer.finish_reason == ("stop" if answer.ids[-1] in stops else "length")
            lengths.add(end)
            # The first is never drafted; a round brings one token, and another after an accepted draft that isn't last.
            ends.add((answer.finish_reason, end - sum(answer.drafts)))
    assert len(lengths) > (3 if temperature else 1)
    assert {end for _, end in ends} <= {0, 1} and ("stop", 1) in ends
    if sampler is samplers["taught"] and temperature:
        assert ("stop", 0) in ends  # an accepted draft


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_no_row_is_longer_than_asked_for(sampler, tokens) -> None:
    groups = sampled(sampler, max_tokens=tokens)
    assert {len(answer.ids) for group in groups for answer in group} == {tokens}
    assert all(tokens - sum(answer.drafts) in (0, 1) for group in groups for answer in group)


def test_the_last_position_of_the_model_can_be_sampled(sampler) -> None:
    prompt = [i % 40 for i in range(128 - TOKENS)]
    ((answer,),) = sampled(sampler, [prompt], seeds=[0], n=1)
    (expected,) = sampler.score([prompt + answer.ids])
    assert answer.logprobs == pytest.approx(expected[-TOKENS:], abs=1e-5)
    with pytest.raises(ValueError, match=r"prompt 0: 115 tokens \+ 14 new exceed .*=128"):
        sampled(sampler, [[0, *prompt]], seeds=[0], n=1)


@torch.no_grad()
def test_recorded_experts_are_those_of_the_tokens_that_were_kept(sampler) -> None:
    free = sampled(sampler, n=6, max_tokens=18)
    stops = tuple(sorted({answer.ids[3] for answer in free[0][:3]}))
    groups = sampled(sampler, n=6, max_tokens=18, stop_token_ids=stops, record_experts=True)
    assert ids(groups) == ids(sampled(sampler, n=6, max_tokens=18, stop_token_ids=stops))
    answers = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
    packed = pack([prompt + c.ids[:-1] for prompt, c in answers])
    with recorded(sampler.model) as choices:
        packed_hidden(sampler.model, packed)
    theirs = choices.chosen_LTK.transpose(0, 1).split(packed.layout.lengths)
    for (_, answer), expected in zip(answers, theirs, strict=True):
        assert answer.experts.shape == tuple(expected.shape)
        assert set_flips(torch.from_numpy(answer.experts), expected)[0] == 0


# Requests that can't be served.


def test_a_model_without_the_layer_is_refused() -> None:
    small = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama = LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=64))
    without = deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny", vocab_size=8, kv_lora_rank=8))
    for model in (llama, without):
        sampler = sampler_of(model)
        with pytest.raises(ValueError, match="speculate=True: the model has no MTP layer"):
            sampled(sampler)
        assert sampled(sampler, [[1]], seeds=[0], n=1, speculate=False)[0][0].drafts is None


def test_vllm_is_not_asked_to_draft() -> None:
    sampler = VLLMSampler.__new__(VLLMSampler)
    with pytest.raises(ValueError, match=r"speculate=True: .*sampling\.backend=native"):
        sampler.sample([[1]], SamplingParams(n=1, max_tokens=1, speculate=True), seeds=[0])
