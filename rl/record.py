"""Scored groups -> the step's metrics under TRL's names, and a Parquet file of every completion."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rl.advantage import zero_variance
from rl.evaluate import Evaluation, thinks
from rl.types import Group
from runtime.distributed import World


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
_SCHEMA = {
    **dict.fromkeys(("step", "prompt_index", "epoch", "group", "sample", "seed"), pa.int64()),
    **dict.fromkeys(("prompt_text", "completion_text"), pa.string()),
    **dict.fromkeys(("prompt_ids", "completion_ids"), pa.list_(pa.int64())),
    "logprobs": pa.list_(pa.float64()),
    "finish_reason": pa.string(),
    "version": pa.int64(),
    "answer": pa.string(),
    **dict.fromkeys(("reward", "advantage"), pa.float64()),
}


def write_rollout(folder: Path, groups: Sequence[Group], *, step: int, world: World) -> None:
    """Write `step-000012.parquet`: one row per completion of every process, in order, in place or not at all."""
    rows = world.gather([row for g, group in enumerate(groups) for row in _rows(group, g, step=step)])
    if world.is_main:
        path = folder / f"step-{step:06d}.parquet"
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        parts = {name: pa.float64() for name in rows[0] if name not in _SCHEMA}
        table = pa.Table.from_pylist(rows, schema=pa.schema(_SCHEMA | parts))
        pq.write_table(table, aside, compression="zstd")
        aside.rename(path)


def _rows(group: Group, number: int, *, step: int) -> list[dict[str, Any]]:
    content = group.prompt.content
    text = content if isinstance(content, str) else "\n\n".join(m["content"] for m in content)
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "epoch": group.prompt.epoch,
            "group": number,
            "sample": i,
            "seed": group.prompt.seed,
            "prompt_text": text,
            "completion_text": completion_text,
            "prompt_ids": group.prompt.ids,
            "completion_ids": completion.ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "version": completion.version,
            "answer": _text(group.prompt.columns.get("answer")),
            "reward": _or_none(group.rewards[i]),
            "advantage": _or_none(group.advantages[i]),
            **{f"rewards/{name}": _or_none(values[i]) for name, values in group.parts.items()},
        }
        for i, (completion, completion_text) in enumerate(zip(group.completions, group.texts, strict=True))
    ]


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, Mapping) else str(value)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nanmean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _nanstd(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
