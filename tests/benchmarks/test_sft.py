"""The benchmark of SFT steps: its workload is what it says, and its gate closes on documents that see each other."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks._common import make_checkpoint
from benchmarks.sft import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Case,
    fix_routes,
    make_rows,
    make_trainer,
    our_gradient,
    parity,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = Case(preset="tiny", rows=2, row_length=64, mean=16, equal=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("benchmark") / "model", "tiny")


@pytest.mark.parametrize("rows", [2, 4])
def test_documents_fill_the_rows_and_have_the_mean_asked_for(rows: int) -> None:
    case = Case(preset="5m", rows=rows, row_length=4096, mean=256, equal=False)
    assert 0.97 * rows * 4096 < case.lengths.sum() <= rows * 4096
    assert case.lengths.mean() == pytest.approx(256, abs=8)
    assert case.lengths.min() < 60 and case.lengths.max() > 900
    assert case.trained == sum(n - n // 4 for n in case.lengths)
    assert set(dataclasses.replace(case, equal=True).lengths) == {256}


def test_peers_have_the_same_documents_in_rows_one_by_one_and_sorted() -> None:
    packed, padded, together = (make_rows(SMALL, peer) for peer in ("packed", "padded", "sorted"))
    assert len(packed) == 2 and all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in packed)

    def cut(rows: list[dict[str, list[int]]], name: str) -> list[list[int]]:
        lengths = [row.get("seq_lengths", [len(row[name])]) for row in rows]
        return sorted(
            row[name][sum(each[:i]) : sum(each[: i + 1])]
            for row, each in zip(rows, lengths, strict=True)
            for i in range(len(each))
        )

    for name in ("input_ids", "labels"):
        assert cut(packed, name) == cut(padded, name) == cut(together, name)
    assert sum(label != -100 for row in padded for label in row["labels"]) == SMALL.trained
    lengths = [len(row["input_ids"]) for row in together]
    assert lengths == sorted(lengths)


def test_fixed_routes_are_the_same_for_every_token_and_free_again_afterwards(checkpoint: Path) -> None:
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(checkpoint)
    biases = [b for name, b in model.named_buffers() if name.endswith("bias")]
    with fix_routes(model):
        assert [b.tolist() for b in biases] == [[0, 1, 2, 3]]
    assert not biases[0].any()
    free, fixed = (our_gradient(checkpoint, SMALL, fixed=fixed) for fixed in (False, True))
    assert math.isfinite(free[0]) and free[0] != fixed[0]
    name = next(name for name in fixed[1] if name.endswith("experts.down_proj"))
    assert fixed[1][name].flatten(1).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("leaks", [False, True])
def test_the_gate_is_passed_unless_documents_see_each_other(checkpoint: Path, leaks: bool) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    rows = make_rows(SMALL, "packed")
    if leaks:
        rows = [row | {"seq_lengths": [len(row["input_ids"])]} for row in rows]
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    differs = parity(make_trainer(model, checkpoint, rows, SMALL, 1), checkpoint, SMALL)
    assert (differs["loss differs by"] > LOSS_TOLERANCE) == leaks
    assert (differs["gradient differs by"] > GRADIENT_TOLERANCE) == leaks


@pytest.mark.slow
def test_sft_passes_its_gate_and_prints_a_row_for_each_peer() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    options = dict(preset="tiny", rows=2, row_length=64, mean=16, lengths="skewed", rounds=1, threads=1)
    command = [sys.executable, "-m", "benchmarks.sft", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row.split(" | ") for row in done.stdout.splitlines()[-3:]]
    assert [row[1] for row in rows] == ["TRL, packed", "TRL, padded", "TRL, padded, sorted"]
    assert {row[0] for row in rows} == {f"| {SMALL}"}
