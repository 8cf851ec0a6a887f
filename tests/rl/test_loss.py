"""GRPO's loss: the hand numbers, the facts the equation implies, and TRL's own trainer on the same batch."""

import math
from collections.abc import Sequence

import pytest
import torch

from rl.batch import make_batch
from rl.config import LossConfig
from rl.loss import grpo_loss, importance_weights, k3
from rl.types import Batch


def batch_of(lengths: Sequence[int], advantages: Sequence[float], sampler: Sequence[float] | None = None) -> Batch:
    """Completions of these lengths behind prompts of one token; `sampler` log-probs in order (0 unless given)."""
    left = list(sampler or [0.0] * sum(lengths))
    rows = []
    for length, advantage in zip(lengths, advantages, strict=True):
        rows.append(([1], [2] * length, [left.pop(0) for _ in range(length)], advantage))
    return make_batch(rows)


def spread(batch: Batch, values: Sequence[float]) -> torch.Tensor:
    """Values of the trained tokens, in order, at their places in the packed row."""
    out = torch.zeros(len(batch.loss_mask_T))
    out[batch.loss_mask_T] = torch.tensor(values)
    return out


def loss_at(ratio: float, advantage: float, *, epsilon: float = 0.2) -> tuple[float, float, int]:
    """Loss, d loss / d log π and clipped tokens of one completion of one token."""
    batch = batch_of([1], [advantage])
    logp = spread(batch, [math.log(ratio)]).requires_grad_()
    config = LossConfig(epsilon=epsilon, importance_cap=0)
    parts = grpo_loss(batch, logp, torch.zeros(2), None, config=config, num_completions=1)
    parts.loss.backward()
    return float(parts.loss.detach()), float(logp.grad[1]), int(parts.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.1, 1.0, -1.1, -1.1, 0),
        (1.5, 1.0, -1.2, 0.0, 1),
        (1.5, -1.0, 1.5, 1.5, 0),
        (0.5, 1.0, -0.5, -0.5, 0),
        (0.5, -1.0, 0.8, 0.0, 1),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clip_at_a_fifth_by_hand(ratio, advantage, loss, gradient, clipped):
    assert loss_at(ratio, advantage) == (pytest.approx(loss), pytest.approx(gradient), clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (10.9, 1.0, -10.9, -10.9, 0),
        (12.0, 1.0, -11.0, 0.0, 1),
        (12.0, -1.0, 12.0, 12.0, 0),
        (1e-3, 1.0, -1e-3, -1e-3, 0),
        (1e-3, -1.0, 1e-3, 1e-3, 0),  # 1 − ε = −9 is below every ratio: never clipped
    ],
)
def test_epsilon_10_caps_only_good_answers_above_ratio_11(ratio, advantage, loss, gradient, clipped):
    got = loss_at(ratio, advantage, epsilon=10.0)
    assert got == (pytest.approx(loss, rel=1e-5), pytest.approx(gradient, rel=1e-5), clipped)


def test_each_completion_counts_once_however_long():
    batch = batch_of([1, 3], [1.0, -2.0])
    logp = torch.zeros(6, requires_grad=True)
    parts = grpo_loss(batch, logp, torch.zeros(6), None, config=LossConfig(), num_completions=2)
    parts.loss.backward()
    assert float(parts.loss.detach()) == pytest.approx(-(1.0 - 2.0) / 2)
    # −A / (n |o_i|) on trained tokens, nothing on prompts
    assert logp.grad.tolist() == pytest.approx([0, -0.5, 0, 1 / 3, 1 / 3, 1 / 3])


def test_a_whole_line_by_hand():
    """Two tokens of one completion, A = 1, ε = 0.2, β = 0.5, cap 2; every factor of the equation at work."""
    batch = batch_of([2], [1.0], sampler=[math.log(0.25), math.log(0.5)])
    old = spread(batch, [math.log(0.5), math.log(0.4)])
    logp = spread(batch, [math.log(0.8), math.log(0.4)])
    reference = spread(batch, [math.log(0.4), math.log(0.4)])
    # token 1: ρ = 1.6 clipped to 1.2, w = min(0.5 / 0.25, 2) = 2, k3 = 0.5 − ln 0.5 − 1
    # token 2: ρ = 1, w = 0.4 / 0.5 = 0.8, k3 = 0
    k = 0.5 - math.log(0.5) - 1
    parts = grpo_loss(batch, logp, old, reference, config=LossConfig(beta=0.5, importance_cap=2.0), num_completions=1)
    assert float(parts.loss) == pytest.approx(-((2 * 1.2 - 0.5 * k) + 0.8) / 2, rel=1e-6)
    assert (int(parts.clipped), float(parts.kl)) == (1, pytest.approx(k, rel=1e-6))


def test_at_ratio_1_the_loss_is_beta_times_k3_while_the_gradient_is_not_zero():
    """Spec fact 15: with advantages that sum to zero the objective's value says nothing about learning."""
    batch = batch_of([2, 2], [1.0, -1.0])
    values = torch.tensor([-0.5, -1.0, -2.0, -0.1])
    logp = spread(batch, values.tolist()).requires_grad_()
    reference = spread(batch, [-0.7, -0.9, -2.5, -0.1])
    config = LossConfig(beta=0.04, importance_cap=0)
    parts = grpo_loss(batch, logp, logp.detach(), reference, config=config, num_completions=2)
    parts.loss.backward()
    expected = 0.04 * k3(values, reference[batch.loss_mask_T]).mean()
    assert float(parts.loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert logp.grad[batch.loss_mask_T].abs().min() > 0.1


def test_a_constant_group_has_no_gradient_without_kl():
    batch = batch_of([2, 3], [0.0, 0.0])
    logp = torch.full((7,), -1.5, requires_grad=True)
    parts = grpo_loss(batch, logp, torch.full((7,), -1.0), None, config=LossConfig(), num_completions=2)
    parts.loss.backward()
    assert float(parts.loss.detach()) == 0 and logp.grad.tolist() == [0.0] * 7


def test_k3_gradient_is_one_minus_e_to_the_d():
    logp = torch.tensor([-3.0, -1.0, -0.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -2.2], dtype=torch.float64)
    k3(logp, reference).sum().backward()
    expected = 1 - torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64).exp()
    torch.testing.assert_close(logp.grad, expected)


def test_k3_is_never_negative_and_zero_only_where_both_agree():
    reference = torch.linspace(-8, 8, 33, dtype=torch.float64)
    values = k3(torch.zeros(33, dtype=torch.float64), reference)
    assert (values >= 0).all() and (values == 0).nonzero().flatten().tolist() == [16]


def test_the_mean_of_k3_under_the_policy_is_the_exact_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), exact, rtol=1e-12, atol=0)


def test_importance_weights_are_capped_from_above_only_and_carry_no_gradient():
    old = torch.log(torch.tensor([0.1, 0.4, 0.9])).requires_grad_()
    sampler = torch.log(torch.tensor([0.4, 0.4, 0.1]))
    assert importance_weights(old, sampler, cap=2.0).tolist() == pytest.approx([0.25, 1.0, 2.0])
    assert not importance_weights(old, sampler, cap=2.0).requires_grad
    assert importance_weights(old, sampler, cap=0).tolist() == [1.0, 1.0, 1.0]


def test_importance_weights_scale_the_policy_term_but_not_the_kl():
    batch = batch_of([1], [1.0], sampler=[math.log(4.0)])  # π_old / π_sampler = 1/4
    reference = spread(batch, [1.0])
    losses = {
        cap: float(
            grpo_loss(
                batch,
                torch.zeros(2),
                torch.zeros(2),
                reference,
                config=LossConfig(beta=1.0, importance_cap=cap),
                num_completions=1,
            ).loss
        )
        for cap in (0.0, 2.0)
    }
    kl = math.e - 2
    assert losses == {0.0: pytest.approx(-1 + kl), 2.0: pytest.approx(-0.25 + kl)}


def test_what_stands_at_prompt_places_does_not_matter():
    batch = batch_of([2, 1], [1.0, -1.0])
    values = [-0.5, -0.6, -0.7]
    clean = [spread(batch, [v + shift for v in values]) for shift in (0.0, 0.1, 0.2)]
    dirty = [torch.where(batch.loss_mask_T, t, torch.full_like(t, 99.0)) for t in clean]
    config = LossConfig(beta=0.1)
    parts = [grpo_loss(batch, *ts, config=config, num_completions=2) for ts in (clean, dirty)]
    assert float(parts[0].loss) == float(parts[1].loss) and float(parts[0].kl) == float(parts[1].kl)


def test_batches_that_share_n_add_up_to_the_loss_of_one():
    rows = [([1], [2] * n, [-0.1] * n, a) for n, a in [(1, 1.0), (3, -0.5), (2, 0.25)]]

    def loss(part) -> torch.Tensor:
        batch = make_batch(part)
        logp = spread(batch, [-0.3] * int(batch.loss_mask_T.sum()))
        return grpo_loss(batch, logp, logp, None, config=LossConfig(), num_completions=3).loss

    torch.testing.assert_close(loss(rows[:1]) + loss(rows[1:]), loss(rows), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def trl_trainer(tokenizer, tmp_path_factory):
    """TRL's trainer on a small Qwen2 of random weights, sampling temperature 0.7."""
    import_utils = pytest.importorskip("trl.import_utils", reason="TRL is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # Not needed here, and importing vLLM takes longer than all tests of this file.
        patch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
        from trl import GRPOConfig, GRPOTrainer
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.15,
        )
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="packed")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            loss_type="grpo",
            epsilon=0.2,
            beta=0.0,
            temperature=0.7,
            use_bias_correction_kl=False,  # its default multiplies k3 by the ratio; DeepSeekMath's equation doesn't
            num_generations=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=tokenizer,
    )
    trainer.use_vllm = True  # the branch that multiplies by the importance ratio
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("epsilon", [0.2, 10.0])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_trls_trainer_has_the_same_loss_and_gradients(trl_trainer, beta, epsilon, cap):
    """Its `_compute_loss` on padded rows, ours on packed ones: the same model, log-probs, advantages and weights."""
    from runtime.packed import packed_logprobs

    generator = torch.Generator().manual_seed(1)
    prompts, lengths = [3, 1, 5, 2, 4, 3], [4, 7, 1, 5, 3, 6]
    advantages = [1.3, -0.7, 0.0, 2.0, -1.1, 0.4]
    rows = []
    for p, n, a in zip(prompts, lengths, advantages, strict=True):
        ids = torch.randint(5, 400, (p + n,), generator=generator).tolist()
        rows.append((ids[:p], ids[p:], [0.0] * n, a))
    batch = make_batch(rows)
    model = trl_trainer.model
    with torch.no_grad():
        now_T, _ = packed_logprobs(model, batch.packed, temperature=0.7, only_T=batch.loss_mask_T)

    def around(values: torch.Tensor, scale: float) -> torch.Tensor:
        noise = scale * torch.randn(values.shape, generator=generator)
        return torch.where(batch.loss_mask_T, values + noise, torch.zeros(()))

    old_T = around(now_T, 0.4)
    batch = make_batch(
        [
            (prompt, ids, around(old_T, 0.7)[batch.sequence_T == i][len(prompt) :].tolist(), a)
            for i, (prompt, ids, _, a) in enumerate(rows)
        ]
    )
    reference_T = around(now_T, 0.5)

    model.zero_grad()
    logprobs_T, _ = packed_logprobs(model, batch.packed, temperature=0.7, only_T=batch.loss_mask_T)
    config = LossConfig(beta=beta, epsilon=epsilon, importance_cap=cap)
    parts = grpo_loss(batch, logprobs_T, old_T, reference_T if beta else None, config=config, num_completions=len(rows))
    parts.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    def padded(values_T: torch.Tensor) -> torch.Tensor:
        out = values_T.new_zeros(len(rows), max(lengths))
        for i, n in enumerate(lengths):
            out[i, :n] = values_T[(batch.sequence_T == i) & batch.loss_mask_T]
        return out

    difference = padded(old_T) - padded(batch.sampler_logprobs_T)
    longest = max(prompts)
    inputs = {
        "prompt_ids": torch.tensor([[0] * (longest - len(p)) + p for p, *_ in rows]),
        "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, *_ in rows]),
        "completion_ids": padded(batch.packed.ids_T),
        "completion_mask": padded(batch.loss_mask_T.long()),
        "advantages": batch.advantages_N,
        "old_per_token_logps": padded(old_T),
        "ref_per_token_logps": padded(reference_T),
        # "token_truncate" with clip_max = cap
        "importance_sampling_ratio": difference.exp().clamp(max=cap) if cap else torch.ones_like(difference),
    }
    trl_trainer.beta, trl_trainer.epsilon_low, trl_trainer.epsilon_high = beta, epsilon, epsilon
    trl_trainer._metrics["train"].clear()
    model.zero_grad()
    theirs = trl_trainer._compute_loss(model, inputs)
    theirs.backward()

    assert float(parts.loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-5 * float(scale), msg=name)
    tokens = sum(lengths)
    metrics = {name: values[0] for name, values in trl_trainer._metrics["train"].items()}
    assert int(parts.clipped) / tokens == pytest.approx(metrics["clip_ratio/region_mean"], abs=1e-6)
    assert (int(parts.clipped) > 0) == (epsilon == 0.2)
    if beta:
        assert float(parts.kl) / tokens == pytest.approx(metrics["kl"], rel=1e-5)
