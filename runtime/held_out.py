"""A model's answers to held-out problems -> held_out/step-000012.parquet in its run folder, which the report shows.

Columns are named as in GRPO's rollouts (rl/record.py), as far as there is something to say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.files import make_folder, replacing

FOLDER = "held_out"

SCHEMA = {
    **dict.fromkeys(("step", "group", "sample"), pa.int64()),
    **dict.fromkeys(("prompt_text", "completion_text"), pa.string()),
    "completion_ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float64()),
    **dict.fromkeys(("finish_reason", "answer"), pa.string()),
    "reward": pa.float64(),
}
"""Columns a row may have. Others are grades, "rewards/" and a name, float64 or unknown."""


def write_held_out(run_dir: Path, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
    """Write a file of rows with the same columns, durably or not at all. Raises DiskError."""
    schema = pa.schema({name: SCHEMA.get(name, pa.float64()) for name in ("step", *rows[0])})
    make_folder(folder := run_dir / FOLDER)
    with replacing(folder / f"step-{step:06d}.parquet") as aside:
        pq.write_table(pa.Table.from_pylist([{"step": step, **row} for row in rows], schema=schema), aside)
