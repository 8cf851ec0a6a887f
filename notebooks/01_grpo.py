# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # GRPO on a small model
#
# A model of 0.97M parameters has two habits: it works a story out, or it jumps to the answer. We pay for right answers
# and for nothing else. Which habit wins?
#
# The whole notebook takes a few minutes on two cores. Open it in Jupyter with jupytext, or in VS Code as it is.

# %%
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
from IPython.display import display
from matplotlib.figure import Figure

from recipes.tiny import tiny_checkpoint
from rl.config import EvaluationConfig, GRPOConfig
from rl.train import train
from runtime.metrics import read_metrics

# %matplotlib inline

# %% [markdown]
# ## The model and the problems
#
# `tiny_checkpoint` builds a DeepSeek-V3 in miniature (latent attention, routed experts) and teaches it both habits by a
# short SFT. That takes about a minute once, and is found in the cache afterwards.

# %%
model = tiny_checkpoint()
print(model)

# %% [markdown]
# ## A live plot
#
# A run writes a line of `metrics.jsonl` after each step. This reads it every two seconds and draws the curves anew,
# while a cell trains.


# %%
def curves(run_dir: Path) -> Figure:
    """Reward and length of a run so far."""
    steps = [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("reward", "completions/mean_length"),
        ("reward", "tokens per completion"),
        strict=True,
    ):
        axes.plot([m["step"] for m in steps], [m[name] for m in steps])
        axes.set(title=title, xlabel="step")
    return figure


@contextmanager
def watched(run_dir: Path) -> Iterator[None]:
    """Draw the run's curves while the block runs."""
    shown = display(Figure(figsize=(9, 3)), display_id=True)
    over = threading.Event()

    def draw() -> None:
        while not over.wait(2):
            if (run_dir / "metrics.jsonl").exists():
                shown.update(curves(run_dir))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        shown.update(curves(run_dir))


# %% [markdown]
# ## Train
#
# A step takes 16 stories and samples 8 answers to each. An answer's advantage is its reward against those of its own
# group; the answers of a group in which all are right, or all wrong, teach nothing. Every setting is explained in
# `rl/config.py`, and by `python -m recipes.grpo --help`.

# %%
run_dir = Path(f"runs/notebook-grpo-{time.strftime('%Y%m%d-%H%M%S')}")
config = GRPOConfig(
    model=str(model),
    data="stories",
    rewards={"accuracy": 1.0, "format": 0.0},  # format is measured, not paid
    steps=25,
    prompts_per_step=16,
    group_size=8,
    evaluation=EvaluationConfig(problems=200, every=0),
    run_dir=str(run_dir),
)
with watched(run_dir):
    result = train(config)

# %% [markdown]
# ## What came of it
#
# Held-out accuracy with its 95 % interval, on stories that no run ever trains on.

# %%
for name, evaluation in (("before", result.before), ("after", result.after)):
    print(
        f"{name:7} right {evaluation.accuracy}   shows its work {evaluation.thinking:.0%}   "
        f"{evaluation.mean_length:.1f} tokens"
    )

# %% [markdown]
# ## Read the completions
#
# Every completion of every step is on the disk, with its token ids, the sampler's log-probs, its rewards and its
# advantage. Here is the group of the first step whose rewards differ most, and one of the last step.


# %%
def show_group(step: int) -> None:
    """The group whose rewards vary most in a step's rollout."""
    rows = pq.read_table(run_dir / f"rollouts/step-{step:06d}.parquet").to_pandas()
    group = rows[rows["group"] == rows.groupby("group")["reward"].std().idxmax()]
    print(f"step {step}: {textwrap.fill(group['prompt_text'].iloc[0], 100)}  (answer {group['answer'].iloc[0]})")
    for row in group.sort_values("advantage").itertuples():
        print(f"  reward {row.reward:.0f}  advantage {row.advantage:+.2f}  {row.completion_text!r}")
    print()


show_group(1)
show_group(25)

# %% [markdown]
# Worked answers are nearly always right and jumped ones seldom. So within a group worked ones get the positive
# advantages, and the model learns to work: it thinks longer because thinking pays. That is R1's result in small.
#
# The same curves, with the share of answers that show their work. `report.html` in the run folder has more of them.

# %%
steps = [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]
figure = Figure(figsize=(9, 3.5), layout="constrained")
axes = figure.subplots()
axes.plot([m["step"] for m in steps], [m["reward"] for m in steps], label="right")
axes.plot([m["step"] for m in steps], [m["completions/thinking_fraction"] for m in steps], label="shows its work")
axes.set(
    xlabel="step", ylabel="share of completions", ylim=(0, 1), title="Right answers are paid; work is what brings them"
)
axes.legend()
display(figure)
