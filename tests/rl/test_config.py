"""Settings that can't work are refused with their name, their value and what to do; the files shipped are not."""

import pytest

from recipes.cli import parse
from rl.config import (
    CheckpointConfig,
    CurriculumConfig,
    DynamicSamplingConfig,
    GRPOConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    SamplingConfig,
)
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(top_p=0.95), r"sampling\.top_p=0\.95: only 1\.0 \(off\) can be trained on"),
        (lambda: SamplingConfig(top_k=20), r"sampling\.top_k=20: only 0 \(off\)"),
        (lambda: SamplingConfig(repetition_penalty=1.1), r"sampling\.repetition_penalty=1\.1: only 1\.0 \(off\)"),
        (lambda: SamplingConfig(temperature=0.0), r"sampling\.temperature=0\.0: .*use e\.g\. 1\.0"),
        (lambda: SamplingConfig(temperature=float("nan")), r"sampling\.temperature=nan"),
        (lambda: SamplingConfig(max_tokens=0), r"sampling\.max_tokens=0: must be positive"),
        (lambda: SamplingConfig(max_prompt_tokens=0), r"sampling\.max_prompt_tokens=0: must be positive"),
        (lambda: SamplingConfig(speculate=True), r"sampling\.speculate=True: .*sampling\.backend=auto; use native"),
        (lambda: LossConfig(epsilon=0), r"loss\.epsilon=0: .*must be positive"),
        (lambda: LossConfig(beta=-0.1), r"loss\.beta=-0\.1: .*can't be negative"),
        (lambda: LossConfig(reference_every=-1), r"loss\.reference_every=-1: steps, 0 for never"),
        (
            lambda: LossConfig(importance_cap=0.5),
            r"loss\.importance_cap=0\.5: .*importance=none turns the correction off",
        ),
        (lambda: LossConfig(importance_floor=1.0), r"loss\.importance_floor=1\.0: a share below 1"),
        (lambda: LossConfig(epsilon_high=0.0), r"loss\.epsilon_high=0\.0: .*must be positive"),
        (lambda: LossConfig(beta=0.1, kl="k1", kl_gradient="direct"), r"loss\.kl=k1 .*not the KL's.*use unbiased"),
        (lambda: DynamicSamplingConfig(max_rounds=-1), r"dynamic_sampling\.max_rounds=-1: use 0 for off"),
        (lambda: CurriculumConfig(floor=0.0), r"curriculum\.floor=0\.0: a chance in \(0, 1\]"),
        (lambda: GRPOConfig(gates={"format": "acuracy"}), r"gates: 'acuracy' is not .*did you mean 'accuracy'"),
        (
            lambda: GRPOConfig(gates={"format": "accuracy", "accuracy": "format"}),
            r"gates: format waits for accuracy waits for format",
        ),
        (lambda: GRPOConfig(overlong_buffer=40), r"overlong_buffer=40: must be below sampling\.max_tokens=40"),
        (lambda: OptimConfig(lr=0), r"optim\.lr=0: .*must be positive"),
        (lambda: OptimConfig(minibatches=0), r"optim\.minibatches=0: must be at least 1"),
        (lambda: OptimConfig(epochs=0), r"optim\.epochs=0: must be at least 1"),
        (lambda: OptimConfig(microbatch_tokens=0), r"optim\.microbatch_tokens=0: must be at least 1"),
        (lambda: CheckpointConfig(every=-1), r"checkpoint\.every=-1: .*0 for only the final"),
        (lambda: CheckpointConfig(keep=0), r"checkpoint\.keep=0: .*must be kept"),
        (lambda: GRPOConfig(steps=0), r"steps=0: take at least one"),
        (lambda: GRPOConfig(group_size=1), r"group_size=1: .*sample at least 2"),
        (lambda: GRPOConfig(prompts_per_step=0), r"prompts_per_step=0: take at least one"),
        (
            lambda: GRPOConfig(prompts_per_step=16, optim=OptimConfig(minibatches=3)),
            r"optim\.minibatches=3: must divide prompts_per_step=16",
        ),
        (
            lambda: GRPOConfig(rewards={"accuracy": 0.0}),
            r"rewards=\{'accuracy': 0\.0\}: at least one needs a weight other than 0",
        ),
        (
            lambda: GRPOConfig(lora=LoraConfig(), loss=LossConfig(beta=0.1, reference_every=400)),
            r"loss\.reference_every=400: under LoRA .*use 0",
        ),
        (lambda: GRPOConfig(fp8="forward"), r"fp8=forward: .*sampling\.backend=auto; use native"),
        (lambda: GRPOConfig(resume=True), r"resume=True: name the run to continue with run_dir"),
    ],
)
def test_refusal_names_the_field_the_value_and_the_remedy(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_r1_zero_ran_with_is_allowed():
    config = GRPOConfig(
        prompts_per_step=512,
        group_size=16,
        loss=LossConfig(epsilon=10, beta=0.001, reference_every=400),
        optim=OptimConfig(lr=3e-6, minibatches=16),
        sampling=SamplingConfig(max_tokens=32_768),
    )
    # Spec fact 16: a rollout of 8,192 is 16 steps of 512.
    assert config.prompts_per_step * config.group_size // config.optim.minibatches == 512


def test_defaults_are_the_demo():
    config = GRPOConfig()
    assert (config.model, config.data, config.steps) == ("tiny", "stories", 40)
    assert (config.prompts_per_step, config.group_size, config.sampling.temperature) == (16, 8, 1.0)
    assert config.rewards == {"accuracy": 1.0, "format": 0.0}


def test_a_refusal_on_the_command_line_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(GRPOConfig, ["--sampling.top_p", "0.9"], prog="grpo", description="")
    error = capsys.readouterr().err
    assert "sampling.top_p=0.9" in error and "Traceback" not in error
