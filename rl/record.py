"""Scored groups -> the step's metrics under TRL's names, and a Parquet file of every completion; and back from it."""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rl.advantage import zero_variance
from rl.batch import trainable
from rl.evaluate import Evaluation, thinks
from rl.types import Group, Prompt, Rollout
from runtime.distributed import World
from runtime.files import make_folder, replacing, write_durably
from sampling.protocol import Completion

log = logging.getLogger(__name__)


def rollout_metrics(groups: Sequence[Group], world: World) -> dict[str, float]:
    """Rewards, lengths and habits of a step, over all processes."""
    own = [
        {
            "rewards": group.rewards,
            "parts": group.parts,
            "lengths": [len(c.ids) for c in group.completions],
            "cut": [c.finish_reason == "length" for c in group.completions],
            "thinks": [thinks(text) for text in group.texts],
            "prompt": len(group.prompt.ids),
        }
        for group in groups
    ]
    rows = world.gather(own)
    rewards_PG = torch.tensor([row["rewards"] for row in rows], dtype=torch.float64)
    lengths = np.array([n for row in rows for n in row["lengths"]])
    cut = np.array([c for row in rows for c in row["cut"]])
    ended = lengths[~cut]
    metrics = {
        "reward": _nanmean(rewards_PG.flatten().tolist()),
        "reward_std": _nanmean([_nanstd(row) for row in rewards_PG.tolist()]),
        "frac_reward_zero_std": float(zero_variance(rewards_PG).double().mean()),
        "rewards/unknown": float(rewards_PG.isnan().double().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut.mean()),
        "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        "completions/thinking_fraction": float(np.mean([t for row in rows for t in row["thinks"]])),
        "num_tokens": float(lengths.sum() + sum(row["prompt"] * len(row["lengths"]) for row in rows)),
    }
    for name in rows[0]["parts"]:
        values = [v for row in rows for v in row["parts"][name]]
        metrics[f"rewards/{name}/mean"] = _nanmean(values)
        metrics[f"rewards/{name}/std"] = _nanstd(values)
    return metrics


def acceptance(groups: Sequence[Group], world: World) -> float:
    """Share of drafted tokens that were accepted, over all processes; 0 if none was drafted."""
    drafts = [c.drafts for group in groups for c in group.completions if c.drafts is not None]
    drafted, accepted = world.sum(torch.tensor([[0, 0], *drafts]).sum(0)).tolist()
    return accepted / max(drafted, 1)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Held-out accuracy with its interval, and the habits behind it."""
    return {
        "eval/accuracy": evaluation.accuracy.mean,
        "eval/accuracy_low": evaluation.accuracy.low,
        "eval/accuracy_high": evaluation.accuracy.high,
        "eval/problems": float(evaluation.problems),
        "eval/format": evaluation.format,
        "eval/mean_length": evaluation.mean_length,
        "eval/thinking_fraction": evaluation.thinking,
    }


# Declared, not inferred: a step without a single known reward must have the same types as the others.
SCHEMA = {
    **dict.fromkeys(("step", "prompt_index", "epoch", "process", "group", "sample", "seed"), pa.int64()),
    "used": pa.bool_(),
    **dict.fromkeys(("prompt_text", "completion_text"), pa.string()),
    **dict.fromkeys(("prompt_ids", "completion_ids"), pa.list_(pa.int64())),
    "logprobs": pa.list_(pa.float64()),
    "finish_reason": pa.string(),
    "version": pa.int64(),
    "experts": pa.list_(pa.int16()),
    "answer": pa.string(),
    **dict.fromkeys(("reward", "advantage"), pa.float64()),
}
"""Columns of a step's file; those of the parts of the reward come after them."""

TRAINER_SCHEMA = {
    **dict.fromkeys(("process", "group", "sample"), pa.int64()),
    "logprobs": pa.list_(pa.float32()),
}
"""Of `write_trainer_logprobs`; the first three are those of the rollout's rows."""

PART = "rewards/"
"""Before the name of a part of the reward, in its column's name."""


def write_rollout(folder: Path, rollout: Rollout, *, step: int, world: World) -> None:
    """Write `step-000012.parquet`: one row per completion of every process, in order, durably or not at all; and its
    hash beside it.

    Groups that were sampled and not trained on are in it too (`used` is false). From it `read_rollout` brings the
    step back, so that a run that is killed neither samples nor pays for it again.
    """
    marked = [(group, True) for group in rollout.groups] + [(group, False) for group in rollout.spare]
    own = [row for g, (group, used) in enumerate(marked) for row in _rows(group, g, step, world.rank, used)]
    rows = world.gather(own)
    if world.is_main:
        parts = {name: pa.float64() for name in rows[0] if name not in SCHEMA}
        about = {
            "cursor": rollout.cursor,
            "metrics": rollout.metrics,
            "processes": world.size,
            "experts": _experts_shape(rollout.groups),
        }
        schema = pa.schema(SCHEMA | parts, metadata={"rollout": json.dumps(about)})
        path = folder / f"step-{step:06d}.parquet"
        with replacing(path) as aside:
            table = pa.Table.from_pylist(rows, schema=schema)
            pq.write_table(table, aside, compression="zstd", write_page_checksum=True)
            # First the hash: once there is a rollout, there is what it must be.
            write_durably(path.with_suffix(".sha256"), _digest(aside, path.name))


def write_trainer_logprobs(
    folder: Path, groups: Sequence[Group], old_C: torch.Tensor, *, mask_truncated: bool, step: int, world: World
) -> None:
    """Write `step-000012.parquet` beside the rollouts, for the report: log π_old of the trained completions' tokens.

    old_C: of all that `rl.batch.trainable` makes of the groups, in its order. Nothing reads it to resume.
    """
    places = {id(c.ids): (g, i) for g, group in enumerate(groups) for i, c in enumerate(group.completions)}
    samples = [sample for family in trainable(groups, mask_truncated=mask_truncated) for sample in family.samples]
    parts = old_C.float().cpu().split([len(sample.ids) for sample in samples])
    own = [
        {"process": world.rank, "group": group, "sample": number, "logprobs": part.tolist()}
        for (group, number), part in zip((places[id(sample.ids)] for sample in samples), parts, strict=True)
    ]
    rows = world.gather(own)
    if world.is_main:
        make_folder(folder)
        with replacing(folder / f"step-{step:06d}.parquet") as aside:
            table = pa.Table.from_pylist(rows, schema=pa.schema(TRAINER_SCHEMA))
            pq.write_table(table, aside, compression="zstd")


def read_rollout(folder: Path, *, step: int, world: World) -> Rollout | None:
    """This process's share of a step's rollout as it was written; None if there is none, if it was written by another
    number of processes, or if it is damaged, which a warning says."""
    path = folder / f"step-{step:06d}.parquet"
    if not path.exists():
        return None
    try:
        if _digest(path, path.name) != path.with_suffix(".sha256").read_text(errors="replace"):
            raise ValueError("SHA-256 differs")
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s): the step is sampled anew", path, error)
        return None
    about = json.loads((table.schema.metadata or {}).get(b"rollout", b"{}"))
    if about.get("processes") != world.size:
        return None
    groups: dict[bool, list[Group]] = {True: [], False: []}
    rows = [row for row in table.to_pylist() if row["process"] == world.rank]
    for _, own in itertools.groupby(rows, key=lambda row: row["group"]):
        members = list(own)
        groups[members[0]["used"]].append(_group(members, about["experts"]))
    return Rollout(groups=groups[True], spare=groups[False], cursor=about["cursor"], metrics=about["metrics"])


def prompt_text(content: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt's words as the file holds them: its text, or its messages without who says them."""
    return content if isinstance(content, str) else "\n\n".join(message["content"] for message in content)


def _digest(path: Path, name: str) -> str:
    """SHA-256 of a file, in the form sha256sum reads. Parquet's own checksums leave out the footer."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n"


def _rows(group: Group, number: int, step: int, process: int, used: bool) -> list[dict[str, Any]]:
    text = prompt_text(group.prompt.content)
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "epoch": group.prompt.epoch,
            "process": process,
            "group": number,
            "sample": i,
            "used": used,
            "seed": group.prompt.seed,
            "prompt_text": text,
            "completion_text": completion_text,
            "prompt_ids": group.prompt.ids,
            "completion_ids": completion.ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "version": completion.version,
            "experts": None if completion.experts is None else completion.experts.ravel(),
            "answer": _text(group.prompt.columns.get("answer")),
            "reward": or_none(group.rewards[i]),
            "advantage": or_none(group.advantages[i]),
            **{PART + name: or_none(values[i]) for name, values in group.parts.items()},
        }
        for i, (completion, completion_text) in enumerate(zip(group.completions, group.texts, strict=True))
    ]


def _group(rows: Sequence[Mapping[str, Any]], experts: Sequence[int] | None) -> Group:
    """What `_rows` wrote; the prompt's text in place of its messages, and without its columns, which only rewards
    read."""
    first = rows[0]
    return Group(
        prompt=Prompt(
            index=first["prompt_index"],
            epoch=first["epoch"],
            seed=first["seed"],
            content=first["prompt_text"],
            ids=first["prompt_ids"],
            columns={"answer": first["answer"]},
        ),
        completions=[
            Completion(
                ids=row["completion_ids"],
                logprobs=row["logprobs"],
                finish_reason=row["finish_reason"],
                version=row["version"],
                experts=None if experts is None else np.array(row["experts"], dtype=np.int16).reshape(-1, *experts),
            )
            for row in rows
        ],
        texts=[row["completion_text"] for row in rows],
        parts={name.removeprefix(PART): [or_nan(r[name]) for r in rows] for name in first if name.startswith(PART)},
        rewards=[or_nan(row["reward"]) for row in rows],
        advantages=[or_nan(row["advantage"]) for row in rows],
    )


def _experts_shape(groups: Sequence[Group]) -> list[int] | None:
    """(MoE layers, K) of the recorded experts."""
    recorded = groups[0].completions[0].experts if groups else None
    return None if recorded is None else list(recorded.shape[1:])


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, Mapping) else str(value)


def or_none(value: float) -> float | None:
    """Unknown (NaN) as a file holds it."""
    return None if math.isnan(value) else value


def or_nan(value: float | None) -> float:
    """The way back."""
    return math.nan if value is None else value


def _nanmean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _nanstd(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
