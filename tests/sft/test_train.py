"""SFT learns what it is shown, from the completion's tokens only, at the rate the cosine says."""

import math

import pytest
import torch

import deepseek_v3
from recipes.tiny import make_tokenizer, tiny_config
from runtime.packed import pack, packed_logprobs
from sampling.native import NativeSampler
from sampling.protocol import SamplingParams
from sft.chat import encode_example, encode_prompt
from sft.train import SFTConfig, cosine_lr, fine_tune, make_optimizers

EXAMPLES = [
    ([{"role": "user", "content": "Ana has 20 cards."}], "<think>20-3=17</think>\\boxed{17}"),
    ([{"role": "user", "content": "Raj has 4 pens."}], "\\boxed{4}"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer))


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [encode_example(tokenizer, prompt, completion) for prompt, completion in EXAMPLES]


@pytest.mark.parametrize(("peak", "end"), [(5e-6, 1e-6), (5e-5, 5e-6), (4e-3, 4e-4)])
def test_the_cosine_starts_at_the_peak_and_ends_where_it_should(peak, end):
    config = SFTConfig(steps=101, lr=peak, final_lr_ratio=end / peak, warmup_steps=0)
    assert cosine_lr(0, config) == pytest.approx(peak, rel=1e-12)
    assert cosine_lr(50, config) == pytest.approx((peak + end) / 2, rel=1e-12)
    assert cosine_lr(100, config) == pytest.approx(end, rel=1e-12)
    rates = [cosine_lr(step, config) for step in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_warm_up_is_a_line_to_the_peak():
    config = SFTConfig(steps=100, lr=1.0, warmup_steps=4)
    assert [cosine_lr(step, config) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine_lr(99, config) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 20, 21])
def test_a_run_no_longer_than_its_warm_up_has_a_rate_for_every_step(steps):
    config = SFTConfig(steps=steps)
    assert all(0 < cosine_lr(step, config) <= config.lr for step in range(steps))


def test_two_examples_are_learnt_by_heart(model, tokenizer, examples):
    losses = []
    config = SFTConfig(steps=40, batch_size=2, warmup_steps=2)
    fine_tune(model, examples, config, on_step=lambda step, metrics: losses.append((step, metrics["loss"])))
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses[0][1] == pytest.approx(math.log(512), abs=0.3) and losses[-1][1] < 0.05
    assert not model.training
    sampler = NativeSampler(model)
    sampler.version = 0
    params = SamplingParams(n=1, max_tokens=40, temperature=0, stop_token_ids=(tokenizer.eos_token_id,))
    groups = sampler.sample([encode_prompt(tokenizer, p) for p, _ in EXAMPLES], params, seeds=[0, 0])
    said = [tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in groups]
    assert said == [completion for _, completion in EXAMPLES]


def test_the_packed_loss_is_the_token_mean_of_the_separate_ones(model, examples):
    losses = []
    fine_tune(
        model,
        examples,
        SFTConfig(steps=1, batch_size=2, lr=1e-12),
        on_step=lambda step, metrics: losses.append(metrics["loss"]),
    )
    total = tokens = 0.0
    for ids, mask in examples:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        total -= float(chosen[torch.tensor(mask[1:])].sum())
        tokens += sum(mask)
    assert losses == [pytest.approx(total / tokens, rel=1e-5)]


def test_packed_gradients_are_the_sum_of_the_separate_ones(model, examples):
    def gradients(batch) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in batch:
            trained = torch.tensor([t for _, mask in part for t in mask])
            logprobs, _ = packed_logprobs(model, pack([ids for ids, _ in part]), only_T=trained)
            (-logprobs.sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients([examples]), gradients([[example] for example in examples])
    assert together.keys() == apart.keys()
    for name, expected in apart.items():
        limit = 1e-5 * max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(together[name], expected, rtol=0, atol=limit, msg=name)


def test_prompt_tokens_are_not_learnt(model, examples):
    ids, mask = examples[0]
    other = [(i + 1) % 400 if not t else i for i, t in zip(ids, mask, strict=True)]

    def head_rows(ids: list[int]) -> torch.Tensor:
        model.zero_grad()
        logprobs, _ = packed_logprobs(model, pack([ids]), only_T=torch.tensor(mask))
        (-logprobs.sum()).backward()
        return (logprobs != 0).nonzero()[:, 0]

    assert head_rows(ids).tolist() == head_rows(other).tolist() == [i for i, t in enumerate(mask) if t]


def test_the_order_is_the_seeds(tokenizer, examples):
    def run(seed: int) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer))
        losses: list[float] = []
        config = SFTConfig(steps=4, batch_size=1, seed=seed)
        fine_tune(model, examples, config, on_step=lambda step, metrics: losses.append(metrics["loss"]))
        return losses

    runs = [run(seed) for seed in range(4)]
    assert runs[0] == run(0)
    assert len({tuple(losses) for losses in runs}) > 1


def test_an_epoch_shows_every_example_once(model, examples, monkeypatch):
    import sft.train

    shown = []

    def spy(sequences, device):
        shown.extend(map(tuple, sequences))
        return pack(sequences, device)

    monkeypatch.setattr(sft.train, "pack", spy)
    ids = [([1, 2, n], [False, True, True]) for n in range(10, 15)]
    fine_tune(model, ids, SFTConfig(steps=5, batch_size=3))
    assert len(shown) == 15
    for start in range(0, 15, 5):
        assert sorted(shown[start : start + 5]) == [tuple(i) for i, _ in ids]


def test_every_parameter_is_in_exactly_one_optimizer_and_muon_has_only_inner_matrices(model):
    adamw, muon = make_optimizers(model, SFTConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    owned = [names[id(p)] for optimizer in (adamw, muon) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(names.values())
    by_muon = [names[id(p)] for g in muon.param_groups for p in g["params"]]
    assert "model.layers.0.self_attn.o_proj.weight" in by_muon
    assert not [name for name in by_muon if "embed" in name or "lm_head" in name or "norm" in name or "gate.w" in name]
