# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Distil, review, train
#
# A teacher answers problems several times, its answers are graded, and a few right and readable ones of each problem
# are kept: rejection sampling, as R1 made its 800,000 examples. Then people look at them, and SFT learns from what they
# accept.
#
# Teacher and student are the same tiny model here: it learns from its own best answers. A few minutes on two cores.

# %%
import time
from dataclasses import asdict, replace

import pandas as pd
import pyarrow.parquet as pq
from IPython.display import display
from matplotlib.figure import Figure

from distill.config import DistillConfig, ExpertConfig
from distill.generate import generate
from distill.ledger import Ledger
from distill.problems import ProblemsConfig
from distill.review.decisions import Review
from distill.review.log import Log
from distill.review.queue import load_queue
from distill.trace import trace
from recipes.tiny import tiny_checkpoint
from runtime.metrics import read_metrics
from sft.config import EvaluationConfig, OptimConfig, SFTConfig
from sft.train import train

name = f"runs/notebook-distill-{time.strftime('%Y%m%d-%H%M%S')}"
teacher = str(tiny_checkpoint())

# %matplotlib inline

# %% [markdown]
# ## Distil
#
# Four answers to each of 256 stories. `policy="diverse"` with `keep=2` keeps up to two right answers of a problem, the
# second as unlike the first as possible. `review=True` writes the rows as not reviewed: SFT sets them aside until
# somebody has looked.

# %%
expert = ExpertConfig(domain="math", model=teacher, system="", original="none", samples=4, max_tokens=40, review=True)
config = DistillConfig(
    problems=(ProblemsConfig(path="stories", domain="math", max_rows=256),),
    experts=(expert,),
    policy="diverse",
    keep=2,
    run_dir=name,
)
result = generate(config)
shard = result.export.folder / "data-00000.parquet"
print(f"{result.export.rows} rows in {shard}")

# %% [markdown]
# ## What became of all answers
#
# Nothing vanishes: each answer is right, wrong or unknown, readable or not, kept or not.

# %%
display(pd.DataFrame(map(asdict, result.export.table)))

# %% [markdown]
# Every answer has a life, from the problem to the choice. On the command line:
# `python -m distill trace ROW --run RUN`.

# %%
rows = pq.read_table(shard).to_pandas()
with Ledger(result.run_dir / "ledger.sqlite", read_only=True) as ledger:
    print("\n".join(trace(ledger, rows["id"].iloc[0])))

# %% [markdown]
# ## Review
#
# `python -m distill review RUN` opens a page for people: A accepts, E edits, R rejects, U takes it back. Here we do the
# same from Python. Ana rejects what jumps to its answer and accepts what shows its work. Raj looks at forty rows by the
# same rule, slips on every eighth, and takes his last decision back. A decision is on the disk before it counts.

# %%
queue = load_queue(result.run_dir)
print(queue.summary())
with Log(queue.log_path) as log:
    review = Review(queue, log)
    for item in queue.items:
        jumps = item.answer.startswith("<think></think>")
        review.decide(item, "reject" if jumps else "accept", reviewer="ana")
        if item.number <= 40:
            slips = item.number % 8 == 0
            review.decide(item, "reject" if jumps != slips else "accept", reviewer="raj")
    review.undo("raj")
    print(review.decisions.progress())
    for agreement in review.decisions.agreements():
        print(f"{agreement.first} and {agreement.second}: {agreement.raw:.0%} the same, kappa {agreement.kappa:.2f}")

# %% [markdown]
# The run's own command with `--resume` writes the shards with what was decided: rejected rows are gone, edited ones are
# as edited. Rows on which the two are divided stay `reviewed: false`, and SFT sets them aside.

# %%
result = generate(replace(config, resume=True))
reviewed = pq.read_table(shard).to_pandas()
print(f"{len(rows)} rows, {len(reviewed)} left, {(~reviewed['reviewed'].astype(bool)).sum()} of them divided")

# %% [markdown]
# ## Train on it
#
# Six passes over what people accepted, from the teacher's own weights, with held-out accuracy before and after.

# %%
result = train(
    SFTConfig(
        model=teacher,
        mix=(str(shard),),
        epochs=6,
        row_length=128,
        rows_per_step=12,
        rows_per_pass=12,
        optim=OptimConfig(lr=1e-3, final_lr=1e-4, warmup_steps=5),
        evaluation=EvaluationConfig(problems="stories:heldout", samples=200, every=0),
        run_dir=f"{name}-sft",
    )
)
print(f"right {result.before.mean:.0%} -> {result.after.mean:.0%} of {result.after.problems} held-out stories")

# %% [markdown]
# The answers were the model's own; only the choice among them was ours. That is enough: it leaves with the habit that
# Ana asked for.

# %%
losses = [m for m in read_metrics(result.run_dir / "metrics.jsonl") if "loss" in m]
figure = Figure(figsize=(9, 3.5), layout="constrained")
left, right = figure.subplots(1, 2)
left.hist(rows.drop_duplicates("problem_id")["pass_rate"], bins=5, range=(0, 1))
left.set(title="Problems with a kept answer", xlabel="share of right answers", ylabel="problems")
right.plot([m["step"] for m in losses], [m["loss"] for m in losses])
right.set(title="SFT on what people accepted", xlabel="step", ylabel="loss")
display(figure)
