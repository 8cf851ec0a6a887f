"""Whole runs whose disk fills up, whose files are damaged or lost, and those that must not start: docs/faults.md."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import EXIT_DISK
from runtime.metrics import read_metrics
from runtime.models import load_tokenizer
from runtime.run_folder import open_run


def differing(whole: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Disks (8) and damaged files (10, 25).


def test_a_full_disk_ends_the_run_with_74_and_it_resumes_when_space_is_free(small_disk, whole, outcome):
    disk, run_dir = small_disk.disk, small_disk.folder / "disk/run"

    def leave(free: int) -> None:
        (disk / "ballast").unlink(missing_ok=True)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - free))

    leave(500_000)
    ended = small_disk.grpo(run_dir)
    assert ended.code == 2 and "the run needs" in ended.output and not (disk / "run/metrics.jsonl").exists()
    (disk / "ballast").unlink()
    assert small_disk.grpo(run_dir, FAILPOINT="checkpoint/before-remove-old:1").code == -signal.SIGKILL
    said = ""
    for free in (4_096, 8_192, 16_384, 24_576, 100_000, 200_000):
        leave(free)
        ended = small_disk.grpo(run_dir)
        assert ended.code == EXIT_DISK and "Traceback" not in ended.output, ended.output
        assert "No space left on device; free space, then the same command with --resume" in ended.output
        said += ended.output
    assert "rollouts/step-000002.parquet: No space" in said and "checkpoints/step-000002: No space" in said
    (disk / "ballast").unlink()
    ended = small_disk.grpo(run_dir)
    assert ended.code == 0, ended.output
    assert differing(whole, outcome(disk / "run")) == []


def test_a_flipped_bit_in_the_newest_checkpoint_costs_a_step_and_is_said(commands, whole, outcome, tmp_path):
    assert commands.grpo(tmp_path, FAILPOINT="step/updated:3").code == -signal.SIGKILL
    flip_bit(tmp_path / "checkpoints/step-000002/model.safetensors")
    ended = commands.grpo(tmp_path)
    assert ended.code == 0, ended.output
    assert "step-000002/model.safetensors has changed since it was saved" in ended.output
    assert "falling back to the checkpoint before it" in ended.output and "step-000001" in ended.output
    assert differing(whole, outcome(tmp_path)) == []


def test_a_damaged_rollout_is_said_and_sampled_anew(commands, whole, outcome, tmp_path):
    assert commands.grpo(tmp_path, FAILPOINT="step/rollout-written:2").code == -signal.SIGKILL
    flip_bit(tmp_path / "rollouts/step-000002.parquet")
    ended = commands.grpo(tmp_path)
    assert ended.code == 0, ended.output
    assert re.search(r"step-000002\.parquet is damaged .*: the step is sampled anew", ended.output)
    assert differing(whole, outcome(tmp_path)) == []


def test_lost_checkpoints_and_unwritable_folders_are_refused_not_started_afresh(commands, tmp_path):
    assert commands.grpo(tmp_path, FAILPOINT="step/updated:3").code == -signal.SIGKILL
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for path in (tmp_path / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    ended = commands.grpo(tmp_path)
    assert ended.code == 2 and "step-000002 is gone; put it back, or give another run_dir" in ended.output
    shutil.rmtree(tmp_path / "checkpoints")
    ended = commands.grpo(tmp_path)
    assert ended.code == 2 and "whose checkpoints folder is gone" in ended.output
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    ended = commands.grpo(Path("/proc/run"))
    assert ended.code == 2 and "run_dir=/proc/run can't be written" in ended.output


def test_a_lost_pointer_to_the_latest_checkpoint_is_not_needed(commands, whole, outcome, tmp_path):
    assert commands.grpo(tmp_path, FAILPOINT="step/updated:3").code == -signal.SIGKILL
    (tmp_path / "checkpoints/latest").unlink()
    ended = commands.grpo(tmp_path)
    assert ended.code == 0 and "resuming from" in ended.output and "step-000002" in ended.output
    assert differing(whole, outcome(tmp_path)) == []


# Runs that must not go on (23, 24).


def test_a_second_run_in_the_folder_is_refused(commands, whole, outcome, tmp_path):
    with open_run(tmp_path, config={}, resume=True):
        ended = commands.grpo(tmp_path)
    assert ended.code == 2 and "is in use by another run (pid" in ended.output
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_tokenizer_of_another_model_is_refused_before_the_first_step(commands, tmp_path):
    model = shutil.copytree(commands.folder / "model", tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([f"<{i}>" for i in range(513 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    ended = commands.grpo(tmp_path / "run", "--model", str(model))
    assert ended.code == 2 and "its tokenizer has ids up to 512, its vocab_size is 512" in ended.output
    assert not list((tmp_path / "run/rollouts").iterdir()) and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("changed", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_changed_between_two_attempts_is_refused(commands, tmp_path, changed):
    """Under LoRA, where it comes from the base model; otherwise from the checkpoint, under its hashes."""
    model = shutil.copytree(commands.folder / "model", tmp_path / "model")
    flags = ("--model", str(model), "--lora.rank=2", "--loss.beta=0", "--loss.reference_every=0")
    assert commands.grpo(tmp_path / "run", *flags, FAILPOINT="step/updated:2").code == -signal.SIGKILL
    text = (model / changed).read_text()
    (model / changed).write_text(text.replace('"<think>"', '"<thunk>"') if changed == "tokenizer.json" else f" {text}")
    assert text != (model / changed).read_text()
    ended = commands.grpo(tmp_path / "run", *flags)
    assert ended.code == 2 and "its tokenizer or chat template is no longer the one" in ended.output
    (model / changed).write_text(text)
    assert commands.grpo(tmp_path / "run", *flags).code == 0
