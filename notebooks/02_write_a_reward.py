# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Write a reward
#
# A reward is a function: completions in, a number for each out, and `None` for one that nobody can judge. We write one,
# try it on answers, give it cases of every kind that a reward meets, find its hole, and then train on it.

# %%
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.display import display
from matplotlib.figure import Figure

from recipes.tiny import tiny_checkpoint
from rewards.check import golden_suite
from rewards.completions import text_of
from rl.config import EvaluationConfig, GRPOConfig
from rl.train import train
from runtime.metrics import read_metrics

# %matplotlib inline

# %% [markdown]
# ## What it should pay for
#
# The built-in stories are sums: three events, so three lines of work, such as `20-3=17`. We want the reasoning to hold
# such lines, and each of them to be true. A first try pays the share of lines that look like an equation.
#
# The signature is TRL's. A completion is a text, or a list with one message; `text_of` reads both. Columns of the data
# come by name (`answer` here), the rest goes to `**_`.

# %%
LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


def first_try(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """Share of the reasoning's lines that are equations."""
    scores: list[float | None] = []
    for completion in completions:
        lines = text_of(completion).partition("<think>")[2].partition("</think>")[0].split("\n")
        scores.append(sum(bool(LINE.fullmatch(line)) for line in lines) / len(lines))
    return scores


print(first_try(["<think>20-3=17\n17+5=22</think>\\boxed{22}", "<think></think>\\boxed{22}", "I guess 22."]))

# %% [markdown]
# ## Cases
#
# A golden file says what should come out, one case a line, with at least one of each kind: right, wrong, reworded,
# truncated, adversarial, and, where the data has golds, a bad gold. Writing the adversarial one is the most useful
# minute you spend on a reward: what is the cheapest way to be paid?

# %%
cases = [
    {"kind": "right", "want": 1, "why": "each line is true", "response": "<think>20-3=17\n17+5=22</think>\\boxed{22}"},
    {"kind": "wrong", "want": 0, "why": "no reasoning", "response": "<think></think>\\boxed{22}"},
    {"kind": "wrong", "want": 0.5, "why": "a false line", "response": "<think>20-3=16\n16+6=22</think>\\boxed{22}"},
    {"kind": "reworded", "want": 1, "why": "one line is enough", "response": "<think>17+5=22</think>\\boxed{22}"},
    {"kind": "truncated", "want": 0, "why": "never closed", "response": "<think>20-3=17\n17+5="},
    {
        "kind": "adversarial",
        "want": 0.25,
        "why": "a line said again",
        "response": "<think>1+1=2\n1+1=2\n1+1=2\n1+1=2</think>",
    },
]
for case in cases:
    case["answer"] = "22"
cases.append({"kind": "bad-gold", "want": "unknown", "why": "no gold", "response": cases[0]["response"], "answer": ""})
golden = Path("work_shown.jsonl")
golden.write_text("".join(json.dumps(case) + "\n" for case in cases))


def check(reward: Any) -> None:
    """Run a reward on the golden file, as `python -m rewards check --reward NAME --golden FILE` does."""

    def grade(case: Mapping[str, Any]) -> float | None:
        score: float | None = reward(completions=[case["response"]], answer=[case["answer"]])[0]
        return score

    suite = golden_suite(golden, grade, budget_ms=20)
    print(f"{suite.cases} cases, {len(suite.misses)} misses")
    for miss in suite.misses:
        print(miss)


check(first_try)

# %% [markdown]
# Four misses. Lines are paid that aren't true, reasoning that never ends is paid, the same line can be said for ever,
# and a problem without an answer gets a score, where nobody can know one. Unknown must not become 0: it would teach
# that good work on a broken problem is bad work.


# %%
def work_shown(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """Share of the reasoning's lines that are true equations and new; None where the problem has no answer."""
    return [score(text_of(c), gold) for c, gold in zip(completions, answer, strict=True)]


def score(text: str, gold: str) -> float | None:
    """One completion's share."""
    if not gold:
        return None
    reasoning, closed, _ = text.partition("<think>")[2].partition("</think>")
    if not closed:
        return 0.0
    lines = reasoning.split("\n")
    return sum(map(is_true, set(lines))) / len(lines)


def is_true(line: str) -> bool:
    """Whether a line is an equation that holds."""
    match = LINE.fullmatch(line)
    if match is None:
        return False
    a, b, c = int(match[1]), int(match[3]), int(match[4])
    return (a + b if match[2] == "+" else a - b) == c


check(work_shown)

# %% [markdown]
# ## Train on it
#
# `train` takes functions as they are, beside names of built-in rewards. Each runs in a process of its own with a time
# limit: one that hangs or crashes makes its rows unknown, and the run goes on. In a file of your own, name it
# `my_rewards.work_shown` on the command line instead.
#
# Right answers are worth 1, work half as much.

# %%
run_dir = Path(f"runs/notebook-reward-{time.strftime('%Y%m%d-%H%M%S')}")
config = GRPOConfig(
    model=str(tiny_checkpoint()),
    steps=15,
    evaluation=EvaluationConfig(problems=100, every=0),
    run_dir=str(run_dir),
)
result = train(config, rewards={"accuracy": 1.0, work_shown: 0.5})
print(f"right {result.before.accuracy} -> {result.after.accuracy}")

# %% [markdown]
# Both parts of the reward are in the metrics, under the function's name. Look at them apart: a total that rises while
# accuracy falls is a hole that nobody has written a case for.

# %%
metrics = [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]
figure = Figure(figsize=(9, 3.5), layout="constrained")
axes = figure.subplots()
for name in ("accuracy", "work_shown"):
    axes.plot([m["step"] for m in metrics], [m[f"rewards/{name}/mean"] for m in metrics], label=name)
axes.set(xlabel="step", ylabel="mean of the part", ylim=(0, 1), title="The parts of the reward")
axes.legend()
display(figure)
