"""Losses: the hand numbers, the facts the equations imply, and TRL's own trainer on the same batch."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rl.batch import make_batch
from rl.config import LossConfig
from rl.loss import OBJECTIVES, LossInputs, LossParts, Totals, importance_weights, k1, k2, k3, kl_penalty, policy_loss
from rl.types import Family, Sample
from runtime.packed import logprobs_at


def inputs(
    logp: Sequence[Sequence[float]],
    advantages: Sequence[float],
    *,
    old: Sequence[Sequence[float]] | None = None,
    sampler: Sequence[Sequence[float]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
) -> LossInputs:
    """Completions given as lists of log-probs; old is logp, and sampler is old, unless given."""

    def flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=torch.float64)

    lengths = torch.tensor([len(row) for row in logp])
    return LossInputs(
        logp=flat(logp).requires_grad_(),
        old=flat(old or logp),
        sampler=flat(sampler or old or logp),
        reference=None if reference is None else flat(reference),
        sequence=torch.arange(len(lengths)).repeat_interleave(lengths),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        lengths=lengths,
    )


def backward(x: LossInputs, *, max_tokens: int = 10, n: int | None = None, **settings: Any) -> tuple[LossParts, list]:
    """The loss's parts and d loss / d log π."""
    totals = Totals(completions=n or len(x.lengths), tokens=len(x.logp), max_tokens=max_tokens)
    parts = policy_loss(x, config=LossConfig(**settings), totals=totals)
    (gradient,) = torch.autograd.grad(parts.loss, x.logp)
    return parts, gradient.tolist()


# --- the clip ---------------------------------------------------------------------------------------------------------


def at_ratio(ratio: float, advantage: float, **settings: Any) -> tuple[float, float, int]:
    """Loss, gradient and held tokens of one completion of one token."""
    parts, gradient = backward(inputs([[math.log(ratio)]], [advantage], old=[[0.0]]), importance="none", **settings)
    return float(parts.loss.detach()), gradient[0], int(parts.held)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "held"),
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
def test_clip_at_a_fifth_by_hand(ratio, advantage, loss, gradient, held):
    assert at_ratio(ratio, advantage) == (pytest.approx(loss), pytest.approx(gradient), held)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "held"),
    [
        (10.9, 1.0, -10.9, -10.9, 0),
        (12.0, 1.0, -11.0, 0.0, 1),
        (12.0, -1.0, 12.0, 12.0, 0),
        (1e-3, 1.0, -1e-3, -1e-3, 0),
        (1e-3, -1.0, 1e-3, 1e-3, 0),  # 1 − ε = −9 is below every ratio: never clipped
    ],
)
def test_epsilon_10_caps_only_good_answers_above_ratio_11(ratio, advantage, loss, gradient, held):
    got = at_ratio(ratio, advantage, epsilon=10.0)
    assert got == (pytest.approx(loss, rel=1e-5), pytest.approx(gradient, rel=1e-5), held)


def test_clip_higher_widens_only_the_upper_side():
    wide = dict(epsilon=0.2, epsilon_high=0.28)
    assert at_ratio(1.25, 1.0, **wide) == (pytest.approx(-1.25), pytest.approx(-1.25), 0)
    assert at_ratio(1.3, 1.0, **wide) == (pytest.approx(-1.28), 0.0, 1)
    assert at_ratio(0.75, -1.0, **wide) == (pytest.approx(0.8), 0.0, 1)


# --- variants ---------------------------------------------------------------------------------------------------------

TWO = [[-0.5], [-0.1, -0.2, -0.3]]


@pytest.mark.parametrize(
    ("objective", "gradient"),
    [
        ("grpo", [-1 / 2, *[2 / 2 / 3] * 3]),  # −A / (n |o_i|)
        ("dapo", [-1 / 4, *[2 / 4] * 3]),  # −A / Σ|o|
        ("dr_grpo", [-1 / 20, *[2 / 20] * 3]),  # −A / (n L_max)
        ("gspo", [-1 / 2, *[2 / 2 / 3] * 3]),
        ("sequence", [-1 / 2, *[2 / 2] * 3]),  # the whole answer's ratio: no 1 / |o|
        ("cispo", [-1 / 4, *[2 / 4] * 3]),
    ],
)
def test_shares_by_hand_where_the_ratio_is_one(objective, gradient):
    _, got = backward(inputs(TWO, [1.0, -2.0]), objective=objective)
    assert got == pytest.approx(gradient)


OLD = [[-0.6], [-0.4, -0.2, 0.0]]  # log ρ of TWO: 0.1; 0.3, 0, −0.3


@pytest.mark.parametrize(
    ("objective", "gradient"),
    [
        # the first token is free at ρ = e^0.1; of the second completion (A = 1) e^0.3 is above 1.2
        ("grpo", [-math.exp(0.1) / 2, 0.0, -1 / 6, -math.exp(-0.3) / 6]),
        ("dapo", [-math.exp(0.1) / 4, 0.0, -1 / 4, -math.exp(-0.3) / 4]),
        ("gspo", [-math.exp(0.1) / 2, *[-1 / 6] * 3]),  # the geometric mean of e^0.3, 1, e^−0.3 is 1
        ("sequence", [-math.exp(0.1) / 2, *[-1 / 2] * 3]),
        ("cispo", [-math.exp(0.1) / 4, -1.2 / 4, -1 / 4, -math.exp(-0.3) / 4]),  # the capped token keeps a gradient
    ],
)
def test_ratios_by_hand_off_policy(objective, gradient):
    parts, got = backward(inputs(TWO, [1.0, 1.0], old=OLD), objective=objective, importance="none")
    assert got == pytest.approx(gradient)
    assert int(parts.held) == (objective in ("grpo", "dapo", "cispo"))


def test_gspo_clips_whole_completions():
    old = [[-0.6], [-1.0, -0.8, -0.6]]  # means of log ρ: 0.1 and 0.6
    parts, got = backward(inputs(TWO, [1.0, 1.0], old=old), objective="gspo", importance="none")
    assert got == pytest.approx([-math.exp(0.1) / 2, 0, 0, 0]) and int(parts.held) == 3


def test_sequence_is_deepseek_v3_equation_26_with_kl_27_to_the_letter():
    """π(o|q) of whole answers: log-probs add up, then one ratio, one weight and one k3 an answer."""
    reference = [[-0.7], [-0.1, -0.4, -0.2]]
    sampler = [[-0.5], [-0.3, -0.1, -0.1]]
    x = inputs(TWO, [1.0, -1.0], old=OLD, sampler=sampler, reference=reference)
    parts, _ = backward(x, objective="sequence", beta=0.3, kl_gradient="direct", importance_cap=9.0)
    expected = 0.0
    for logp, old, s, r, A in zip(TWO, OLD, sampler, reference, [1.0, -1.0], strict=True):
        ratio, w = math.exp(sum(logp) - sum(old)), math.exp(sum(old) - sum(s))
        d = sum(r) - sum(logp)
        expected -= (w * min(ratio * A, min(max(ratio, 0.8), 1.2) * A) - 0.3 * (math.exp(d) - d - 1)) / 2
    assert float(parts.loss.detach()) == pytest.approx(expected)
    assert parts.units == 2


def test_a_whole_line_by_hand():
    """Two tokens of one completion, A = 1, ε = 0.2, β = 0.5, cap 2; every factor of the equation at work."""

    # token 1: ρ = 1.6 clipped to 1.2, w = min(0.5 / 0.25, 2) = 2, k3 = 0.5 − ln 0.5 − 1
    # token 2: ρ = 1, w = 0.4 / 0.5 = 0.8, k3 = 0
    def logs(*p: float) -> list[list[float]]:
        return [[math.log(value) for value in p]]

    x = inputs(logs(0.8, 0.4), [1.0], old=logs(0.5, 0.4), sampler=logs(0.25, 0.5), reference=logs(0.4, 0.4))
    k = 0.5 - math.log(0.5) - 1
    parts, _ = backward(x, beta=0.5, kl_gradient="direct")
    assert float(parts.loss.detach()) == pytest.approx(-((2 * 1.2 - 0.5 * k) + 0.8) / 2)
    assert (int(parts.held), float(parts.kl)) == (1, pytest.approx(k))
    parts, _ = backward(x, beta=0.5, kl_gradient="unbiased")  # k is weighted by w ρ = 2 · 1.6
    assert float(parts.loss.detach()) == pytest.approx(-((2 * 1.2 - 0.5 * 3.2 * k) + 0.8) / 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_advantages_of_zero_have_no_gradient_without_kl(objective):
    _, gradient = backward(inputs(TWO, [0.0, 0.0], old=OLD), objective=objective)
    assert gradient == [0.0] * 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_that_share_their_totals_add_up_to_the_loss_of_one(objective):
    rows, old = [[-0.3], [-0.2, -0.5, -0.1], [-0.4, -0.6]], [[-0.1], [-0.3, -0.4, -0.2], [-0.5, -0.3]]
    reference, A = [[-0.2], [-0.2, -0.2, -0.2], [-0.9, -0.1]], [1.0, -0.5, 0.25]
    totals = Totals(completions=3, tokens=6, max_tokens=8)
    config = LossConfig(objective=objective, beta=0.1)

    def loss(part: slice) -> float:
        x = inputs(rows[part], A[part], old=old[part], reference=reference[part])
        return float(policy_loss(x, config=config, totals=totals).loss.detach())

    assert loss(slice(1)) + loss(slice(1, 3)) == pytest.approx(loss(slice(3)), rel=1e-12)


def test_at_ratio_1_the_loss_is_beta_times_k3_while_the_gradient_is_not_zero():
    """Spec fact 15: with advantages that sum to zero the objective's value says nothing about learning."""
    rows, reference = [[-0.5, -1.0], [-2.0, -0.1]], [[-0.7, -0.9], [-2.5, -0.1]]
    parts, gradient = backward(inputs(rows, [1.0, -1.0], reference=reference), beta=0.04, importance="none")
    expected = 0.04 * k3(torch.tensor(reference) - torch.tensor(rows)).mean()
    assert float(parts.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert min(map(abs, gradient)) > 0.1


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_k3_is_never_negative_and_zero_only_where_both_agree():
    values = k3(torch.linspace(-8, 8, 33, dtype=torch.float64))
    assert (values >= 0).all() and (values == 0).nonzero().flatten().tolist() == [16]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_mean_of_k1_and_of_k3_under_the_policy_is_the_exact_kl(estimator):
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimator(reference - policy)).sum(), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kl", "slope"),
    [("k2", lambda d: -d), ("k3", lambda d: 1 - math.exp(d))],
)
def test_direct_differentiates_the_estimator_as_published(kl, slope):
    x = inputs([[-3.0, -1.0, -0.2]], [0.0], reference=[[-1.0, -1.0, -2.2]])
    config = LossConfig(beta=1.0, kl=kl, kl_gradient="direct")
    (gradient,) = torch.autograd.grad(kl_penalty(x, torch.ones(3), config).sum(), x.logp)
    assert gradient.tolist() == pytest.approx([slope(2.0), slope(0.0), slope(-2.0)])


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_unbiased_has_the_estimators_value_and_the_kls_gradient(estimator):
    w, d = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([2.0, 0.0, -2.0])
    x = inputs([[-3.0, -1.0, -0.2]], [0.0], old=[[-3.1, -1.0, 0.1]], reference=[[-1.0, -1.0, -2.2]])
    weight = w * torch.tensor([0.1, 0.0, -0.3]).exp()
    kl = kl_penalty(x, w, LossConfig(beta=1.0, kl=estimator.__name__))
    (gradient,) = torch.autograd.grad(kl.sum(), x.logp)
    assert kl.tolist() == pytest.approx((weight * estimator(d)).tolist(), rel=1e-6)
    assert gradient.tolist() == pytest.approx((weight * -d).tolist(), rel=1e-6)


def test_for_k3_that_is_the_derivative_of_ratio_times_k3():
    x = inputs([[-3.0, -1.0, -0.2]], [0.0], old=[[-3.1, -1.2, 0.1]], reference=[[-1.0, -1.0, -2.2]])
    (ours,) = torch.autograd.grad(kl_penalty(x, torch.ones(3), LossConfig(beta=1.0)).sum(), x.logp)
    (theirs,) = torch.autograd.grad((x.log_ratio.exp() * k3(x.reference - x.logp)).sum(), x.logp)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


# --- correction for the sampler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "weights"),
    [
        ("none", [1, 1, 1]),
        ("token_truncate", [0.25, 2.0, 1.0]),
        ("token_mask", [0.25, 0.0, 1.0]),
        ("sequence_truncate", [2.0, 2.0, 1.0]),  # 0.25 · 9 = 2.25
        ("sequence_mask", [0.0, 0.0, 1.0]),
    ],
)
def test_importance_weights_by_hand(importance, weights):
    def logs(*rows):
        return [[math.log(value) for value in row] for row in rows]

    x = inputs([[0.0, 0.0], [0.0]], [1.0, 1.0], old=logs([0.1, 0.9], [0.4]), sampler=logs([0.4, 0.1], [0.4]))
    got = importance_weights(x, LossConfig(importance=importance, importance_cap=2.0))
    assert got.tolist() == pytest.approx(weights) and not got.requires_grad


def test_importance_weights_scale_the_policy_term_and_the_unbiased_kl_but_not_the_direct_one():
    x = inputs([[0.0]], [1.0], sampler=[[math.log(4.0)]], reference=[[1.0]])  # π_old / π_sampler = 1/4
    kl = math.e - 2

    def loss(**settings) -> float:
        return float(backward(x, beta=1.0, **settings)[0].loss.detach())

    assert loss(importance="none", kl_gradient="direct") == pytest.approx(-1 + kl)
    assert loss(kl_gradient="direct") == pytest.approx(-0.25 + kl)
    assert loss() == pytest.approx(0.25 * (-1 + kl))


# --- TRL's trainer ----------------------------------------------------------------------------------------------------


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


def cases() -> list[Any]:
    """Every objective TRL has, at its usual clip, and GRPO with everything else."""
    plain = [dict(objective=name) for name in ("grpo", "dapo", "dr_grpo")]
    higher = [dict(objective="dapo", epsilon_high=0.28), dict(epsilon=10.0)]
    sequences = [dict(objective="gspo", epsilon=0.03, epsilon_high=0.04), dict(objective="cispo", epsilon_high=0.3)]
    modes = [dict(importance=f"{level}_{how}") for level in ("token", "sequence") for how in ("truncate", "mask")]
    kls = [dict(beta=0.04, kl_gradient=gradient) for gradient in ("direct", "unbiased")]
    crossed = [dict(objective="dapo", beta=0.04, kl_gradient="direct", importance="sequence_truncate")]
    every = [*plain, *higher, *sequences, *modes, *kls, *crossed]
    settings = [dict(importance="none") | case for case in every]
    return [pytest.param(case, id=" ".join(f"{k}={v}" for k, v in case.items())) for case in settings]


@pytest.mark.parametrize("settings", cases())
def test_trls_trainer_has_the_same_loss_and_gradients(trl_trainer, settings):
    """Its `_compute_loss` on padded rows, ours on packed ones that share prompts: the same model and log-probs."""
    config = LossConfig(**settings)
    generator = torch.Generator().manual_seed(1)
    prompts, lengths = [[3, 9, 77], [8]], [[4, 7, 1], [5, 3, 6]]
    A = iter([1.3, -0.7, 0.0, 2.0, -1.1, 0.4])

    def sample(n: int) -> Sample:
        return Sample(
            ids=torch.randint(5, 400, (n,), generator=generator).tolist(), logprobs=[0.0] * n, advantage=next(A)
        )

    families = [
        Family(prompt=prompt, samples=[sample(n) for n in row]) for prompt, row in zip(prompts, lengths, strict=True)
    ]
    batch, model = make_batch(families), trl_trainer.model

    def logprobs() -> torch.Tensor:
        return logprobs_at(model, batch.packed, batch.states_C, batch.targets_C, temperature=0.7)[0]

    def around(values: torch.Tensor, scale: float) -> torch.Tensor:
        return values + scale * torch.randn(values.shape, generator=generator)

    model.zero_grad()
    logp = logprobs()
    old = around(logp.detach(), 0.4)
    sampler, reference = around(old, 0.7), around(logp.detach(), 0.5)
    x = LossInputs(
        logp=logp,
        old=old,
        sampler=sampler,
        reference=reference if config.beta else None,
        sequence=batch.sequence_C,
        advantages=batch.advantages_N,
        lengths=batch.lengths_N,
    )
    totals = Totals(completions=6, tokens=len(logp), max_tokens=trl_trainer.max_completion_length)
    parts = policy_loss(x, config=config, totals=totals)
    parts.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    def padded(values: torch.Tensor) -> torch.Tensor:
        return pad_sequence(values.split(batch.lengths_N.tolist()), batch_first=True)

    trl_inputs = {
        "prompt_ids": torch.tensor([prompt for prompt in ([3, 9, 77], [0, 0, 8]) for _ in range(3)]),
        "prompt_mask": torch.tensor([mask for mask in ([1, 1, 1], [0, 0, 1]) for _ in range(3)]),
        "completion_ids": padded(batch.targets_C),
        "completion_mask": padded(torch.ones_like(batch.targets_C)),
        "advantages": batch.advantages_N,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "importance_sampling_ratio": padded(_trl_weights(x, config)),
        "num_items_in_batch": torch.tensor(len(logp)),
    }
    trl_trainer.beta, trl_trainer.loss_type = config.beta, {"gspo": "grpo"}.get(config.objective, config.objective)
    trl_trainer.importance_sampling_level = "sequence" if config.objective == "gspo" else "token"
    trl_trainer.epsilon_low = config.epsilon
    trl_trainer.epsilon_high = config.clip_high + (config.objective == "cispo")  # there it is the ceiling itself
    trl_trainer.args.use_bias_correction_kl = config.kl_gradient == "unbiased"
    trl_trainer.args.steps_per_generation = 1
    trl_trainer._metrics["train"].clear()
    model.zero_grad()
    theirs = trl_trainer._compute_loss(model, trl_inputs)
    theirs.backward()

    # Terms of order 1 cancel to a thousandth: what is left of fp32 depends on the machine.
    assert float(parts.loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-6)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-5 * float(scale), msg=name)
    metrics = {name: values[0] for name, values in trl_trainer._metrics["train"].items()}
    if config.objective != "gspo":  # TRL counts completions there, we their tokens
        ratio = metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio"))
        assert int(parts.held) / parts.units == pytest.approx(ratio, abs=1e-6)
        assert (int(parts.held) > 0) == (config.epsilon != 10.0)
    if config.beta and config.kl_gradient == "direct":
        assert float(parts.kl) / parts.units == pytest.approx(metrics["kl"], rel=1e-5)


def _trl_weights(x: LossInputs, config: LossConfig) -> torch.Tensor:
    """As TRL makes them of the log-prob difference (its lines, on our flat tokens)."""
    level, _, how = config.importance.partition("_")
    difference = x.old - x.sampler
    if level == "sequence":
        difference = torch.stack([d.sum() for d in difference.split(x.lengths.tolist())])[x.sequence]
    ratio = difference.exp()
    if how == "truncate":
        return ratio.clamp(max=config.importance_cap)
    return ratio.masked_fill(ratio > config.importance_cap, 0.0) if how == "mask" else torch.ones_like(ratio)
