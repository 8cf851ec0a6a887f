"""A rollout's optimizer steps: one gradient however it is divided, and nothing learnt from what can't be trusted.

Gradients are compared in fp32, relative to the largest element of each parameter's.
"""

import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rl.update
import runtime.logprobs
from rl.config import GRPOConfig, LoraConfig, LossConfig, OptimConfig, SamplingConfig
from rl.gap import SamplerGap
from rl.loss import OBJECTIVES
from rl.policy import Policy
from rl.rollout import set_advantages
from rl.types import Group, Prompt
from rl.update import MAX_SKIPPED, NonFinite, Optimizer, update
from runtime.distributed import World
from runtime.packed import pack, packed_logprobs
from sampling.protocol import Completion

NAN = float("nan")
Gradients = dict[str, torch.Tensor]


class Recorder(Optimizer):
    """Keeps the gradient each step would be taken with, and takes none."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.seen: list[Gradients] = []

    def step(self) -> float:
        named = [(name, p) for name, p in self.model.model.named_parameters() if p.requires_grad]
        self.seen.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named})
        self.adamw.zero_grad(set_to_none=True)
        return 1.0


def sampled(policy: Policy, sizes: Sequence[Sequence[int]], *, noise: float = 0.0, seed: int = 0) -> list[Group]:
    """Groups of random tokens (lengths given) with the policy's own log-probs, off by `noise`, and random rewards."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for g, lengths in enumerate(sizes):
        prompt = torch.randint(5, 400, (3 + g,), generator=generator).tolist()
        completions = []
        for length in lengths:
            ids = torch.randint(5, 400, (length,), generator=generator).tolist()
            with torch.no_grad():
                temperature = policy.config.sampling.temperature
                logprobs = packed_logprobs(policy.model, pack([prompt + ids]), temperature=temperature)[0][-length:]
            logprobs = logprobs + noise * torch.randn(length, generator=generator)
            completions.append(Completion(ids=ids, logprobs=logprobs.tolist(), finish_reason="stop", version=0))
        groups.append(
            Group(
                prompt=Prompt(index=g, epoch=0, seed=g, content="q", ids=prompt, columns={}),
                completions=completions,
                texts=["text"] * len(lengths),
                rewards=torch.rand(len(lengths), generator=generator).tolist(),
            )
        )
    set_advantages(groups)
    return groups


SIZES = [[3, 9, 1], [7, 2, 2], [1, 1, 12], [5, 4, 6]]


def gradients(policy: Policy, groups: Sequence[Group]) -> list[Gradients]:
    recorder = Recorder(policy)
    update(policy, groups, recorder)
    return recorder.seen


def assert_same(got: Gradients, expected: Gradients, *, factor: float = 1.0, tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = tolerance * factor * float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient * factor, rtol=0, atol=limit, msg=name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def assert_unchanged(policy: Policy, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


# --- the same gradient however it is divided ---------------------------------------------------------------------


def test_micro_batches_add_up(make_policy):
    policy = make_policy(beta=0.04, gap_limit=9.0)
    groups = sampled(policy, SIZES, noise=0.3)
    perturb(policy, 0.02)  # or the KL would be 0
    (whole,) = gradients(policy, groups)
    for tokens in (1, 12, 40):  # 1: a micro-batch for each sample
        divided = make_policy(beta=0.04, gap_limit=9.0, microbatch_tokens=tokens)
        divided.trained, divided.reference = policy.trained, policy.reference
        assert_same(gradients(divided, groups)[0], whole)


@pytest.fixture
def off_policy(monkeypatch):
    """π_old as if the policy had moved since: it depends on the token alone, not on where it is packed."""

    @torch.no_grad()
    def moved(policy: Policy, minibatch) -> list[torch.Tensor]:
        return [
            policy.logprobs(batch)[0] + 0.3 * torch.sin(batch.targets_C.float() + batch.lengths_N[batch.sequence_C])
            for batch in minibatch.batches
        ]

    monkeypatch.setattr(rl.update, "_old_logprobs", moved)


DIVISIONS = {
    "a micro-batch a completion": dict(microbatch_tokens=1),
    "micro-batches": dict(microbatch_tokens=25),
    "prompts not shared": dict(share_prompts=False),
    "one by one": dict(microbatch_tokens=1, share_prompts=False),
}


@pytest.mark.parametrize("importance", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_loss_has_one_gradient_however_it_is_divided(make_policy, off_policy, monkeypatch, objective, importance):
    """Off-policy, with a moved reference and a sampler that differs; two epochs, so that π_old is stored."""
    settings = dict(
        objective=objective, importance=importance, importance_floor=0.0, beta=0.04, gap_limit=9.0, epochs=2
    )  # fmt: skip
    policy = make_policy(**settings)
    groups = sampled(policy, SIZES, noise=0.3)
    perturb(policy, 0.02)
    whole, again = gradients(policy, groups)
    assert_same(again, whole)
    for division in DIVISIONS.values():
        divided = make_policy(**settings | division)
        divided.trained, divided.reference = policy.trained, policy.reference
        assert_same(gradients(divided, groups)[0], whole)
    monkeypatch.setitem(runtime.logprobs.CHUNK_ELEMENTS, "cpu", 4 * 512)
    monkeypatch.setattr(runtime.logprobs, "MIN_ROWS", 4)  # four tokens at a time through the head
    assert_same(gradients(policy, groups)[0], whole)


def test_activations_computed_again_give_the_same_gradient(make_policy):
    """Of the blocks alone: dropout inside stays off."""
    policy, again = make_policy(), make_policy(gradient_checkpointing=True)
    calls = []
    norm = again.causal_lm.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    groups = sampled(policy, SIZES)
    assert_same(gradients(again, groups)[0], gradients(policy, groups)[0], tolerance=0)
    assert len(calls) == 2  # forwards, and again backwards
    training = {name for name, module in again.model.named_modules() if module.training}
    assert training == {f"model.layers.{i}" for i in range(len(again.causal_lm.model.layers))}


def test_the_order_of_samples_does_not_matter(make_policy):
    policy = make_policy(microbatch_tokens=25)
    groups = sampled(policy, SIZES)
    assert_same(gradients(policy, groups[::-1])[0], gradients(policy, groups)[0])


def test_it_is_the_gradient_of_the_equation(make_policy):
    """Written out sample by sample on the model's plain forward pass, at ρ = 1 and cap 0."""
    policy = make_policy(importance="none", temperature=0.7)
    groups = sampled(policy, SIZES)
    policy.model.zero_grad()
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            ids = torch.tensor(group.prompt.ids + completion.ids)
            logp = (policy.model(input_ids=ids[None]).logits[0] / 0.7).log_softmax(-1)
            chosen = logp[:-1].gather(1, ids[1:, None])[len(group.prompt.ids) - 1 :, 0]
            (-advantage * chosen.mean() / 12).backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    assert_same(gradients(policy, groups)[0], expected)


def test_an_unknown_row_is_as_if_never_sampled(make_policy):
    policy = make_policy()
    groups = sampled(policy, SIZES)
    for group in groups:
        group.rewards[1] = NAN
    set_advantages(groups)
    with_unknown = gradients(policy, groups)[0]
    for group in groups:
        del group.completions[1], group.rewards[1], group.texts[1]
    set_advantages(groups)
    assert_same(with_unknown, gradients(policy, groups)[0])


def test_a_masked_truncated_row_leaves_the_gradient_but_not_the_count(make_policy):
    policy = make_policy(mask_truncated=True)
    groups = sampled(policy, SIZES)
    expected = gradients(policy, [_without(group, 1) for group in groups])[0]
    for group in groups:
        cut = group.completions[1]
        group.completions[1] = Completion(ids=cut.ids, logprobs=cut.logprobs, finish_reason="length", version=0)
    assert_same(gradients(policy, groups)[0], expected, factor=8 / 12)


def _without(group: Group, i: int) -> Group:
    """The group without row i, its other advantages as they were."""
    keep = [j for j in range(len(group.completions)) if j != i]
    return Group(
        prompt=group.prompt,
        completions=[group.completions[j] for j in keep],
        texts=[group.texts[j] for j in keep],
        rewards=[group.rewards[j] for j in keep],
        advantages=[group.advantages[j] for j in keep],
    )


def test_a_rollout_nobody_could_grade_changes_nothing(make_policy):
    policy = make_policy()
    groups = sampled(policy, SIZES)
    for group in groups:
        group.rewards = [NAN] * 3
    set_advantages(groups)
    before = weights(policy)
    metrics = update(policy, groups, Optimizer(policy))
    assert_unchanged(policy, before)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


@pytest.mark.parametrize("group", ["equal rewards", "one known"])
def test_a_group_that_teaches_nothing_has_no_gradient(make_policy, group):
    policy = make_policy()
    groups = sampled(policy, [[3, 4, 2]])
    groups[0].rewards = [0.35] * 3 if group == "equal rewards" else [NAN, 0.35, NAN]
    set_advantages(groups)
    assert all(gradient.abs().max() == 0 for gradient in gradients(policy, groups)[0].values())


# --- old log-probs ------------------------------------------------------------------------------------------------


def perturb(policy: Policy, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += scale * torch.randn(p.shape, generator=generator)


@pytest.fixture
def ratios(monkeypatch) -> list[float]:
    """The largest |log ρ| of each loss that is computed, in order."""
    seen: list[float] = []

    def spy(x, **options):
        seen.append(float(x.log_ratio.detach().abs().max()))
        return policy_loss(x, **options)

    policy_loss = rl.update.policy_loss
    monkeypatch.setattr(rl.update, "policy_loss", spy)
    return seen


def test_one_update_per_rollout_is_exactly_on_policy(make_policy, ratios):
    policy = make_policy(microbatch_tokens=25)
    update(policy, sampled(policy, SIZES), Optimizer(policy))
    assert len(ratios) > 1 and set(ratios) == {0.0}


def test_later_minibatches_and_epochs_are_compared_with_the_policy_that_sampled(make_policy, ratios):
    policy = make_policy(minibatches=2, epochs=2, lr=1e-3, warmup_steps=0)
    metrics = update(policy, sampled(policy, SIZES), Optimizer(policy))
    assert len(ratios) == 4
    assert ratios[0] == 0.0 and min(ratios[1:]) > 1e-4
    assert metrics["sampling/logp_gap/mean"] < 1e-5  # of the policy that sampled, not of the one that came of it


def test_each_minibatch_has_its_own_n(make_policy):
    policy = make_policy(minibatches=2, importance="none")
    groups = sampled(policy, SIZES)
    groups[3].rewards[0] = NAN
    set_advantages(groups)
    first, second = gradients(policy, groups)
    one = make_policy(importance="none")
    one.trained = policy.trained
    assert_same(first, gradients(one, groups[:2])[0])
    assert_same(second, gradients(one, groups[2:])[0])


# --- refusing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [1, 2], ids=["old = current", "stored old"])
@pytest.mark.parametrize("fault", [0.5, NAN])
def test_a_sampler_that_disagrees_stops_the_run_before_any_weight_changes(make_policy, minibatches, fault):
    policy = make_policy(minibatches=minibatches)
    groups = sampled(policy, SIZES)
    for group in groups:
        for completion in group.completions:
            completion.logprobs[:] = [value + fault for value in completion.logprobs]
    before = weights(policy)
    optimizer = Optimizer(policy)
    with pytest.raises(SamplerGap, match=r"sampling.gap_limit=0.1: .*(0\.5|nan) nats"):
        update(policy, groups, optimizer)
    assert_unchanged(policy, before)
    assert optimizer.updates == 0 and not optimizer.adamw.state


def test_the_gap_metrics_by_hand(make_policy):
    policy = make_policy(gap_limit=1.0)
    groups = sampled(policy, [[2], [1], [1]])
    gaps = [0.25, -0.5, 0.0, 0.1]  # log π_trainer − log π_sampler
    left = list(gaps)
    for group in groups:
        group.advantages = [1.0]
        for completion in group.completions:
            completion.logprobs[:] = [value - left.pop(0) for value in completion.logprobs]
    metrics = update(policy, groups, Recorder(policy))
    assert metrics["sampling/logp_gap/mean"] == pytest.approx(0.85 / 4, abs=1e-5)
    assert metrics["sampling/logp_gap/max"] == pytest.approx(0.5, abs=1e-5)
    w = [math.exp(g) for g in gaps]
    assert metrics["sampling/effective_sample_size"] == pytest.approx(
        sum(w) ** 2 / (4 * sum(x * x for x in w)), abs=1e-5
    )


def test_a_non_finite_gradient_changes_nothing_and_three_in_a_row_stop_the_run(make_policy):
    policy = make_policy(warmup_steps=0, weight_decay=0.1)
    optimizer = Optimizer(policy)
    good, bad = sampled(policy, SIZES), sampled(policy, SIZES)
    bad[0].advantages[0] = math.inf
    before = weights(policy)
    for attempt in range(MAX_SKIPPED - 1):
        metrics = update(policy, bad, optimizer)
        assert metrics["updates/skipped"] == attempt + 1 and not math.isfinite(metrics["grad_norm"])
    assert_unchanged(policy, before)
    assert optimizer.updates == 0 and not optimizer.adamw.state

    assert update(policy, good, optimizer)["updates/skipped"] == 0  # a good one starts the count again
    good = sampled(policy, SIZES)
    bad = sampled(policy, SIZES)
    bad[0].advantages[0] = math.inf
    before = weights(policy)
    for _ in range(MAX_SKIPPED - 1):
        update(policy, bad, optimizer)
    with pytest.raises(NonFinite, match=r"3 updates in a row: lower optim\.lr"):
        update(policy, bad, optimizer)
    assert_unchanged(policy, before)
    assert optimizer.updates == 1


# --- optimizer ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_in_a_line_and_stays(make_policy):
    policy = make_policy(lr=3e-6, warmup_steps=3, gap_limit=9.0)
    optimizer = Optimizer(policy)
    groups = sampled(policy, [[2, 3]])
    rates = [update(policy, groups, optimizer)["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([1e-6, 2e-6, 3e-6, 3e-6, 3e-6])


def test_without_warm_up_the_first_step_has_the_whole_rate(make_policy):
    policy = make_policy(lr=1e-6, warmup_steps=0)
    assert Optimizer(policy).learning_rate() == 1e-6


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(make_policy):
    policy = make_policy(max_grad_norm=1e-3)
    groups = sampled(policy, SIZES)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(policy, groups)[0].values()))
    optimizer = Optimizer(policy)
    metrics = update(policy, groups, optimizer)
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-4) and expected > 1e-2
    # AdamW's first moment after one step is (1 − β1) × the clipped gradient
    moments = [state["exp_avg"] / (1 - 0.9) for state in optimizer.adamw.state.values()]
    assert math.sqrt(sum(float(m.double().square().sum()) for m in moments)) == pytest.approx(1e-3, rel=1e-3)


def test_an_update_makes_the_better_answers_likelier(make_policy):
    policy = make_policy(lr=1e-4, warmup_steps=0)
    groups = sampled(policy, SIZES)

    def objective() -> float:
        total = 0.0
        for group in groups:
            for completion, advantage in zip(group.completions, group.advantages, strict=True):
                scores = policy.score([group.prompt.ids + completion.ids])[0][-len(completion.ids) :]
                total += advantage * sum(scores) / len(scores)
        return total

    before = objective()
    update(policy, groups, Optimizer(policy))
    assert objective() > before + 0.01


def test_kl_is_reported_when_there_is_a_reference(make_policy):
    policy = make_policy(beta=0.04, lr=1e-4, warmup_steps=0, gap_limit=9.0)
    optimizer, groups = Optimizer(policy), sampled(policy, SIZES)
    assert update(policy, groups, optimizer)["kl"] == 0
    assert update(policy, groups, optimizer)["kl"] > 0
    policy.replace_reference()
    assert update(policy, groups, optimizer)["kl"] == 0
    assert "kl" not in update(make_policy(), groups, Recorder(make_policy()))


def test_under_lora_only_adapters_learn_and_the_reference_is_without_them(make_policy):
    policy = make_policy(lora=LoraConfig(rank=2), beta=0.04, lr=1e-2, warmup_steps=0, gap_limit=9.0)
    optimizer, groups = Optimizer(policy), sampled(policy, SIZES)
    before = weights(policy)
    reference = {}
    batch = rl.update._minibatch(policy, groups).batches[0]
    for step in range(3):
        metrics = update(policy, groups, optimizer)
        assert (metrics["kl"] > 0) == (step > 0)
        reference[step] = policy.reference_logprobs(batch)
    assert torch.equal(reference[0], reference[2])
    changed = {name for name, tensor in weights(policy).items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed)


# --- two processes --------------------------------------------------------------------------------------------------


def worker(model: str, out: str) -> None:
    """What each of the two processes runs: its share of the groups; every loss's summed gradients to a file."""
    torch.set_num_threads(1)
    world = World()
    tensors: dict[str, torch.Tensor] = {}
    for objective in OBJECTIVES:
        config = GRPOConfig(
            model=model,
            prompts_per_step=4,
            sampling=SamplingConfig(gap_limit=9.0),
            loss=LossConfig(objective=objective, beta=0.04, importance_floor=0.0),
            optim=OptimConfig(minibatches=2, microbatch_tokens=25),
        )
        policy = Policy(config, world)
        groups = uneven(policy)
        perturb(policy, 0.005)
        recorder = Recorder(policy)
        metrics = update(policy, groups[world.rank :: world.size], recorder)
        for i, seen in enumerate(recorder.seen):
            tensors |= {f"{objective}/{i}/{name}": gradient for name, gradient in seen.items()}
        tensors |= {f"{objective}/{name}": torch.tensor(value) for name, value in metrics.items()}
    save_file(tensors, f"{out}/{world.rank}-of-{world.size}.safetensors")


def uneven(policy: Policy) -> list[Group]:
    """Four groups in an order that gives each of two processes both halves; one rank has more unknown rows."""
    groups = sampled(policy, SIZES, noise=0.05)
    groups[1].rewards = [NAN] * 3
    groups[3].rewards[0] = NAN
    set_advantages(groups)
    return groups


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_for_every_loss(tiny_folder: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny_folder), str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert [run.returncode for run in runs] == [0, 0], errors
    worker(str(tiny_folder), str(tmp_path))
    # With two minibatches each process's first group is in the first: as one process, [0, 1] and [2, 3].
    one = load_file(tmp_path / "0-of-1.safetensors")
    two = [load_file(tmp_path / f"{rank}-of-2.safetensors") for rank in range(2)]
    assert two[0].keys() == one.keys()
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        limit = 1e-5 * max(float(expected.abs().max()), 1e-6)
        torch.testing.assert_close(two[0][name], expected, rtol=0, atol=limit, msg=name)


if __name__ == "__main__":
    worker(*sys.argv[1:])
