"""Seconds of a GRPO update alone, forward to optimizer step: packed completions that share a prompt against TRL's rows.

The same random V3 weights, groups of 8 completions and advantages in fp32, at 5M and 20M parameters. Ours is
`rl.update.update` with all that a step asks of it: packing, the check of the sampler's log-probs, metrics, clip, AdamW.
The peer is TRL's `GRPOTrainer` inside its own `train()`, on transformers' V3, with generation replaced by what
`_generate_and_score_completions` returns for these groups: prompts padded left, completions right, no old log-probs
(nor reference ones), which on policy it needs not compute. Completions have skewed lengths (an exponential's quantiles,
mean 128, longest 512) behind prompts of 64 or 1024 tokens; and, where we have no advantage, all of one length behind
short prompts. Either side accumulates over as many micro-batches as are fastest for it, tried at the start.

Before a case is timed, loss and whole gradient of one update must agree; otherwise the exit code is 1. (Here the loss
is minus the mean advantage, as ratios are 1; grpo_step.py compares it off policy.)
On a CPU, TRL's head also scores prompts and padding, which on a GPU it leaves out; at a vocabulary of 8192 that is most
of its time and nothing to measure packing by. So it is made to leave them out here, too: `--peer_head installed` times
TRL as it comes. Left out: sampling, rewards, checkpoints, logging.
"""

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks._common import (
    TRL_AT_ITS_BEST,
    Contestant,
    Turns,
    alternate,
    fastest_peer,
    make_checkpoint,
    ratio,
    setting,
    spread,
    table,
    timed,
)
from deepseek_v3.routing import recorded, set_flips
from rl.batch import make_batch, trainable
from rl.config import GRPOConfig, LossConfig, OptimConfig, SamplingConfig
from rl.policy import Policy
from rl.types import Family, Group, Prompt
from rl.update import Optimizer, update
from runtime.distributed import World
from runtime.models import load_tokenizer
from runtime.packed import score_sequences
from sampling.protocol import Completion

G = 8
LR = 1e-6
"""Small: every round then has nearly the same weights, and the groups stay on policy."""
TOLERANCE = 1e-4
"""Largest relative difference of loss and gradient between us and TRL."""
HEADER = (
    *("case", "ours, s", "TRL, s", "ours, tokens/s", "TRL, tokens/s", "times faster than TRL"),
    *("ceiling: padded / shared", "packed / shared", "TRL with", "ours with"),
)
MICROBATCH_TOKENS = (2048, 4096, 8192, 16384)
MICROBATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One update."""

    preset: str
    groups: int
    prompt: int
    """Tokens of every prompt."""
    mean: int
    """Tokens of a completion, on average."""
    longest: int
    """Tokens of the longest; equal to the mean: all of one length."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, group after group."""
        n = self.groups * G
        if self.mean == self.longest:
            return [self.mean] * n
        quantiles = [min(round(-self.mean * math.log(1 - (i + 0.5) / n)), self.longest) for i in range(n)]
        quantiles[-1] = self.longest
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
        return [max(quantiles[i], 1) for i in order]

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return sum(self.lengths)

    @property
    def ceilings(self) -> tuple[float, float]:
        """How many times the tokens of ours pass through the model when rows are padded, and when they are packed with
        a prompt each: what can be gained (performance.md, section 1)."""
        shared, rows = self.groups * self.prompt + self.tokens, self.groups * G
        return rows * (self.prompt + max(self.lengths)) / shared, (rows * self.prompt + self.tokens) / shared

    def __str__(self) -> str:
        kind = "equal" if self.mean == self.longest else f"to {self.longest}"
        return f"{self.preset}, {self.groups} × {G}, P {self.prompt}, C {self.tokens / self.groups / G:.0f} {kind}"


def make_groups(policy: Policy, case: Case) -> list[Group]:
    """Random prompts and completions, sampled (as far as log-probs can tell) from the policy, with advantages."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = policy.causal_lm.config.vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(5, vocab_size, (n,), generator=generator).tolist()

    groups = []
    for g in range(case.groups):
        prompt = Prompt(index=g, epoch=0, seed=g, content="", ids=draw(case.prompt), columns={})
        samples = [draw(length) for length in case.lengths[g * G : (g + 1) * G]]
        scores = score_sequences(policy.model, [prompt.ids + ids for ids in samples])
        completions = [
            Completion(ids=ids, logprobs=score[case.prompt - 1 :], finish_reason="stop", version=0)
            for ids, score in zip(samples, scores, strict=True)
        ]
        # Not centred: on policy the loss is minus their mean, which should be a number to compare.
        advantages = (torch.randn(G, generator=generator) + 0.5).tolist()
        groups.append(Group(prompt=prompt, completions=completions, texts=[""] * G, advantages=advantages))
    return groups


def make_policy(folder: Path, microbatch_tokens: int = MICROBATCH_TOKENS[0]) -> Policy:
    config = GRPOConfig(
        model=str(folder),
        group_size=G,
        # The same groups again and again: in the end the policy is no longer the one that sampled them, and no matter.
        sampling=SamplingConfig(backend="native", max_tokens=4096, max_prompt_tokens=4096, gap_limit=99.0),
        loss=LossConfig(importance_floor=0.0),
        optim=OptimConfig(lr=LR, warmup_steps=0, microbatch_tokens=microbatch_tokens),
    )
    return Policy(config, World())


def with_microbatches(policy: Policy, tokens: int) -> None:
    policy.config = replace(policy.config, optim=replace(policy.config.optim, microbatch_tokens=tokens))


class Recorder(Optimizer):
    """Keeps the gradient instead of following it."""

    def step(self) -> float:
        self.gradient = {name: p.grad for name, p in self.model.model.named_parameters() if p.grad is not None}
        for p in self.model.parameters():
            p.grad = None
        return 0.0


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(turns: Turns, folder: Path, case: Case) -> None:
    """Updates; answers with the seconds of each."""
    policy = make_policy(folder)
    optimizer = Optimizer(policy)
    groups = make_groups(policy, case)
    work = partial(update, policy, groups, optimizer)
    best: dict[int, float] = {}
    for _ in range(2):  # the first time round also warms up
        for tokens in MICROBATCH_TOKENS:
            with_microbatches(policy, tokens)
            best[tokens] = min(timed(work)[0], best.get(tokens, math.inf))
    fastest = min(best, key=lambda tokens: best[tokens])
    with_microbatches(policy, fastest)
    agreement = f"{100 * router_agreement(policy, groups):.4f} %"
    settings = f"{fastest} tokens a micro-batch"
    turns.answer({"threads": torch.get_num_threads(), "settings": settings, "router agreement": agreement})
    for _ in turns:
        turns.answer(timed(work)[0])


@torch.no_grad()
def router_agreement(policy: Policy, groups: Sequence[Group]) -> float:
    """Share of choices, a token in a MoE layer each, in which the shared pass takes the same experts as passes of one
    completion behind its own prompt."""

    def choices(family: Family) -> torch.Tensor:
        with recorded(policy.model) as chosen:
            policy.logprobs(make_batch([family]))
        return chosen.chosen_LTK

    flipped = total = 0
    for family in trainable(groups, mask_truncated=False):
        P = len(family.prompt)
        prompt_LPK, rest_LTK = choices(family).tensor_split([P], dim=1)
        for sample in family.samples:
            own_LTK, rest_LTK = rest_LTK.tensor_split([len(sample.ids) - 1], dim=1)
            alone_LTK = choices(replace(family, samples=[sample]))
            differ, of = set_flips(torch.cat([prompt_LPK, own_LTK], dim=1), alone_LTK)
            flipped, total = flipped + differ, total + of
    return 1 - flipped / total


# --- TRL --------------------------------------------------------------------------------------------------------------


def padded(groups: Sequence[Group], pad: int) -> dict[str, torch.Tensor]:
    """What TRL's `_generate_and_score_completions` makes of groups."""

    def rows(sequences: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    prompts = [group.prompt.ids for group in groups for _ in group.completions]
    completions = [completion.ids for group in groups for completion in group.completions]
    return {
        "prompt_ids": rows(prompts, pad, "left"),
        "prompt_mask": rows([[1] * len(ids) for ids in prompts], 0, "left"),
        "completion_ids": rows(completions, pad, "right"),
        "completion_mask": rows([[1] * len(ids) for ids in completions], 0, "right"),
        "advantages": torch.tensor([a for group in groups for a in group.advantages]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


def make_trainer(model: Any, folder: Path, inputs: dict[str, torch.Tensor], *, microbatches: int, steps: int) -> Any:
    """A `GRPOTrainer` whose rollouts are `inputs`."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    class Stubbed(GRPOTrainer):
        def _generate_and_score_completions(self, _: Any) -> dict[str, torch.Tensor]:
            return dict(inputs)

    rows = len(inputs["advantages"])
    trainer = Stubbed(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            **TRL_AT_ITS_BEST,
            output_dir=str(folder.parent / "trl"),
            max_steps=steps,
            per_device_train_batch_size=rows // microbatches,
            gradient_accumulation_steps=microbatches,
            steps_per_generation=microbatches,
            num_generations=G,
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta2=0.99,
        ),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * rows),
        processing_class=load_tokenizer(folder),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl(turns: Turns, folder: Path, case: Case, peer_head: str) -> None:
    """TRL's updates; answers with the seconds of each."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it uses none here
    from transformers import TrainerCallback

    if peer_head == "completions":
        import trl.trainer.utils as utils

        utils._use_triton = lambda device: True  # there it only decides which positions are scored
    policy = make_policy(folder)
    groups = make_groups(policy, case)
    pad = int(policy.causal_lm.config.pad_token_id)
    inputs = padded(groups, pad)
    model, settings = fastest_peer(
        folder, partial(_peer_work, inputs={name: x[:G] for name, x in inputs.items() if x.ndim}), rounds=2
    )

    class TakeTurns(TrainerCallback):
        """Waits in front of a step until it is TRL's turn, and times it."""

        requests = iter(turns)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if next(self.requests, None) is None:
                sys.exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.answer(time.perf_counter() - self.began)

    # Before any step moves the weights.
    differs = parity(make_trainer(model, folder, inputs, microbatches=2, steps=1), policy, groups)
    del policy
    best: dict[int, float] = {}
    for microbatches in (n for n in MICROBATCHES if len(inputs["advantages"]) % n == 0):
        trainer = make_trainer(model, folder, inputs, microbatches=microbatches, steps=1)
        micro_step(trainer)
        best[microbatches] = microbatches * min(timed(partial(micro_step, trainer))[0] for _ in range(2))
        model.zero_grad()
    fastest = min(best, key=lambda microbatches: best[microbatches])
    settings = f"{settings}, {len(inputs['advantages']) // fastest} rows a micro-batch"
    turns.answer({"threads": torch.get_num_threads(), "settings": settings, **differs})
    trainer = make_trainer(model, folder, inputs, microbatches=fastest, steps=10**6)
    trainer.add_callback(TakeTurns())
    trainer.train()


def micro_step(trainer: Any) -> float:
    """One forward and backward of TRL's, outside its `train()`; returns its share of the loss."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return float(trainer.training_step(trainer.model, list(trainer.train_dataset), None))


def _peer_work(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward of a few of the rows."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    model.train()
    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.square().mean().backward()
    model.zero_grad()


def parity(trainer: Any, policy: Policy, groups: Sequence[Group]) -> dict[str, float]:
    """Relative differences of loss and gradient: our update's, in micro-batches, and TRL's training step's."""
    recorder = Recorder(policy)
    loss = update(policy, groups, recorder)["loss"]
    theirs = sum(micro_step(trainer) for _ in range(trainer.args.gradient_accumulation_steps))
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    if set(gradients) != set(recorder.gradient):
        raise RuntimeError(f"parameters differ: {sorted(set(gradients) ^ set(recorder.gradient))}")
    off = math.sqrt(sum(float((g - gradients[name]).square().sum()) for name, g in recorder.gradient.items()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    trainer.model.zero_grad()
    return {"loss differs by": abs(loss / theirs - 1), "gradient differs by": off / norm}


# --- both -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["5m", "20m"], help="model sizes")
    parser.add_argument("--prompt", type=int, nargs="*", default=[64, 1024], help="prompt tokens, skewed completions")
    parser.add_argument("--equal", type=int, nargs="*", default=[16], help="prompt tokens, completions of one length")
    parser.add_argument("--mean", type=int, default=128, help="mean tokens of a completion")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest, where lengths are skewed")
    parser.add_argument("--groups", type=int, help="groups an update; unset: 4, behind long prompts 2")
    parser.add_argument("--peer_head", choices=["completions", "installed"], default="completions", help="see above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(setting(args.threads, "torch", "transformers", "trl"), flush=True)
    print(f"\n{table(HEADER, [])}", flush=True)
    for preset in args.preset:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_checkpoint(Path(temporary) / "model", preset)
            skewed = [(prompt, args.longest) for prompt in args.prompt]
            for prompt, longest in [*skewed, *((prompt, args.mean) for prompt in args.equal)]:
                groups = args.groups or (4 if prompt < 512 else 2)
                case = Case(preset=preset, groups=groups, prompt=prompt, mean=args.mean, longest=longest)
                if not compare(args, folder, case):
                    return 1
    return 0


def compare(args: argparse.Namespace, folder: Path, case: Case) -> bool:
    """Time a case and print its row; False when the two sides don't compute the same."""
    contestants: list[Contestant] = []
    try:
        for name, system, *more in (("TRL", trl, args.peer_head), ("ours", ours)):
            contestants.append(Contestant(name, system, folder, case, *more, threads=args.threads))
            differences = [contestants[0].ready[f"{what} differs by"] for what in ("loss", "gradient")]
            if not max(differences) <= TOLERANCE:
                print(f"parity: loss and gradient differ from TRL's by {differences}, more than {TOLERANCE:g}")
                return False
        seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        for r, turns in groupby(alternate(contestants, args.rounds + 1), key=lambda turn: turn[0]):
            for _, contestant in turns:
                seconds[contestant.name].append(contestant.turn("update"))
            print(f"round {r}: { ({k: round(v[-1], 3) for k, v in seconds.items()}) }", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    sides = [seconds["ours"][1:], seconds["TRL"][1:]]  # round 0 was to warm up
    ceilings = [f"{ceiling:.2f}" for ceiling in case.ceilings]
    speeds = [spread([case.tokens / s for s in side], ",.0f") for side in sides]
    settings = [contestant.ready["settings"] for contestant in contestants]
    row = [str(case), *(spread(side, ".2f") for side in sides), *speeds, ratio(*sides), *ceilings, *settings]
    print(f"| {' | '.join(row)} |", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
