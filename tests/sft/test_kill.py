"""Killed, told to leave or out of disk anywhere, and the same command again: the run ends as if nothing had happened.

Real processes and real signals, on a run of under a second. SIGKILL leaves the page cache, so what a power cut would
take is tests/runtime/test_checkpoint.py's matter.
"""

import json
import math
import random
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint import latest_checkpoint
from runtime.errors import EXIT_DISK
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm, load_tokenizer

VARIANTS = {
    "lora": ("--lora.rank=2",),
    "muon": ("--optim.muon=true",),
    "seldom saved": ("--checkpoint.every=2", "--bias_update_speed=0.125", "--balance_loss=0.1", "--rows_per_pass=1"),
}
"""Runs with other things to lose; in the last a killed step may lie behind its checkpoint."""


def passes(log: Path) -> list[str]:
    """Every pass of a failpoint, as FAILPOINT takes it: name:n."""
    names = log.read_text().split()
    return [f"{name}:{names[: i + 1].count(name)}" for i, name in enumerate(names)]


class Trials:
    """Kills and resumes of one kind of run, and what it comes to when nothing happens to it."""

    def __init__(self, commands: Any, outcome: Any, folder: Path, *flags: str) -> None:
        self.commands, self.collect, self.folder, self.flags = commands, outcome, folder, flags
        ended = self.start(folder / "whole", FAILPOINT_LOG=str(folder / "passes"))
        assert ended.code == 0, ended.output
        self.whole, self.seconds = outcome(folder / "whole"), ended.seconds
        self.passes = passes(folder / "passes")

    def start(self, run_dir: Path, **options: Any) -> Any:
        return self.commands.sft(run_dir, *self.flags, **options)

    def killed(self, run_dir: Path, **options: Any) -> None:
        """Start or resume it, and see it die by SIGKILL."""
        ended = self.start(run_dir, **options)
        assert ended.code == -signal.SIGKILL, (options, ended.output)

    def wrong(self, run_dir: Path) -> list[str]:
        """Resume to the end; what then differs from the uninterrupted run."""
        ended = self.start(run_dir)
        if ended.code:
            return [ended.output]
        found = self.collect(run_dir)
        shutil.rmtree(run_dir)
        return [name for name in sorted(found.keys() | self.whole.keys()) if found.get(name) != self.whole.get(name)]

    def at_passes(self, passes: Iterable[str]) -> dict[str, list[str]]:
        """What differs after a kill at each of them."""
        results: dict[str, list[str]] = {}
        for name in passes:
            run_dir = self.folder / name.replace("/", "-")
            self.killed(run_dir, FAILPOINT=name)
            results[name] = self.wrong(run_dir)
        return {name: differs for name, differs in results.items() if differs}

    def at_moments(self, count: int, *, seed: int) -> dict[float, list[str]]:
        """What differs after a kill at that many moments of a run, evenly spread and each at random in its share."""
        draw = random.Random(seed)
        results: dict[float, list[str]] = {}
        for i in range(count):
            moment = (i + draw.random()) / count * self.seconds
            ended = self.start(self.folder / f"{moment}", kill_after=moment)
            assert ended.code in (-signal.SIGKILL, 0), ended.output  # a run may be faster than the first was
            results[moment] = self.wrong(self.folder / f"{moment}")
        return {moment: differs for moment, differs in results.items() if differs}

    def told_to_leave(self, passes: Iterable[str]) -> dict[str, list[str]]:
        """What is wrong after a SIGTERM at each of them, and then the rest of the run."""
        results: dict[str, list[str]] = {}
        for name in passes:
            run_dir = self.folder / f"term-{name.replace('/', '-')}"
            ended = self.start(run_dir, FAILPOINT=name, FAILPOINT_SIGNAL="SIGTERM")
            assert ended.code == 128 + signal.SIGTERM and "SIGTERM: saving" in ended.output, (name, ended.output)
            saved = latest_checkpoint(run_dir / "checkpoints")
            done = max([m["step"] for m in read_metrics(run_dir / "metrics.jsonl")], default=0)
            results[name] = [] if saved and saved.name == f"step-{done:06d}" else [f"{saved} of step {done}"]
            results[name] += self.wrong(run_dir)
        return {name: differs for name, differs in results.items() if differs}


@pytest.fixture(scope="module")
def trials(commands, outcome, tmp_path_factory) -> Trials:
    return Trials(commands, outcome, tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant(request, commands, outcome, tmp_path_factory) -> Trials:
    return Trials(commands, outcome, tmp_path_factory.mktemp("variant"), *request.param)


def test_the_run_that_is_killed_has_everything_to_lose(trials):
    steps = [m for m in trials.whole["metrics"] if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3] and steps[0]["epoch"] < 1 < steps[1]["epoch"] < 2
    assert [m["step"] for m in trials.whole["metrics"] if "eval/loss" in m] == [0, 2, 3]
    assert {"checkpoints/best/model.safetensors", "checkpoints/final/model.safetensors"} < trials.whole.keys()
    for name in ("sft/evaluating:3", "sft/stepped:3", "sft/recorded:3", "checkpoint/before-rename:6"):
        assert name in trials.passes


def test_killed_at_every_failpoint_in_turn_it_ends_as_if_nothing_had_happened(trials, tmp_path):
    """One run, and in every attempt to finish it another failpoint."""
    names = [name for name in trials.passes if name.endswith(":1")]
    # The only pruning is over once it was killed before the rename; the other is in the sweep below.
    names.remove("prune/before-remove:1")
    assert len(names) > 15
    for name in names:
        trials.killed(tmp_path / "run", FAILPOINT=name)
    assert trials.wrong(tmp_path / "run") == []


def test_killed_in_the_middle_it_resumes_bit_for_bit(variant):
    assert variant.at_passes(["sft/stepped:3"]) == {}


def test_told_to_leave_it_saves_the_steps_it_has_done_and_resumes_bit_for_bit(trials):
    """Also before the first one: the optimizer then has no state yet."""
    assert trials.told_to_leave(["sft/evaluating:1", "sft/stepped:2"]) == {}


def test_told_to_leave_before_there_is_anything_to_save_it_just_ends(trials, tmp_path):
    ended = trials.start(tmp_path / "run", FAILPOINT="file/before-rename:2", FAILPOINT_SIGNAL="SIGTERM")
    assert ended.code == -signal.SIGTERM
    assert trials.wrong(tmp_path / "run") == []


def test_a_finished_run_killed_while_it_replaces_its_final_checkpoint_keeps_one(trials, tmp_path):
    shutil.copytree(trials.folder / "whole", tmp_path / "run")
    trials.killed(tmp_path / "run", FAILPOINT="checkpoint/before-rename:2")  # the first is the best one
    assert list((tmp_path / "run/checkpoints").glob("final.old-*"))
    assert trials.wrong(tmp_path / "run") == []


@pytest.fixture
def poisoned(v3, tokenizer, tmp_path) -> tuple[str, ...]:
    """Settings of a run on two examples in turn; one has a token whose embedding is not a number."""
    model = load_causal_lm(v3)
    (token,) = tokenizer("+", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, questions in (("one", ("1+1", "Ana")), ("both", ("1+1", "2+2"))):
        rows = [{"messages": [dict(role="user", content=q), dict(role="assistant", content="20")]} for q in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--row_length=12", "--rows_per_step=1", "--evaluation.problems=null", "--evaluation.mix=[]")
    return ("--model", str(tmp_path / "model"), f"--mix={tmp_path / 'one.jsonl'}", "--seed=3", *flags)


def test_a_first_step_that_was_skipped_is_none_after_a_save_and_a_resume_either(commands, outcome, poisoned, tmp_path):
    assert commands.sft(tmp_path / "whole", *poisoned).code == 0
    skipped = [m["step"] for m in read_metrics(tmp_path / "whole/metrics.jsonl") if m.get("grad_norm", 0) is None]
    assert len(skipped) == 2 and skipped[0] == 1
    assert commands.sft(tmp_path / "run", *poisoned, FAILPOINT="sft/stepped:2").code == -signal.SIGKILL
    assert commands.sft(tmp_path / "run", *poisoned).code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert commands.sft(tmp_path / "unsaved", *poisoned, "--checkpoint.every=0").code == 0
    final = "checkpoints/final/model.safetensors"
    assert (tmp_path / "unsaved" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


def test_bad_gradients_in_a_row_are_counted_across_a_resume(commands, poisoned, tmp_path):
    flags = (*poisoned, f"--mix={tmp_path / 'both.jsonl'}")
    ended = commands.sft(tmp_path / "run", *flags, FAILPOINT="sft/recorded:2", FAILPOINT_SIGNAL="SIGTERM")
    assert ended.code == 128 + signal.SIGTERM, ended.output
    ended = commands.sft(tmp_path / "run", *flags)
    assert ended.code == 1 and "nan in 3 steps in a row" in ended.output
    assert [path.name for path in sorted((tmp_path / "run").glob("skipped-*"))][-1] == "skipped-000003.json"


# Disks and damage.


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint_and_ends_with_74(small_disk, trials, outcome):
    disk, run_dir = small_disk.disk, small_disk.folder / "disk/run"

    def leave(free: int) -> None:
        (disk / "ballast").unlink(missing_ok=True)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - free))

    leave(500_000)
    ended = small_disk.sft(run_dir)
    assert ended.code == 2 and "the run needs" in ended.output and not (disk / "run/metrics.jsonl").exists()
    (disk / "ballast").unlink()
    assert small_disk.sft(run_dir, FAILPOINT="checkpoint/before-remove-old:1").code == -signal.SIGKILL
    said = ""
    for free in (4_096, 100_000, 250_000):
        leave(free)
        ended = small_disk.sft(run_dir)
        assert ended.code == EXIT_DISK and "Traceback" not in ended.output, ended.output
        assert "No space left on device; free space, then the same command with --resume" in ended.output
        assert latest_checkpoint(disk / "run/checkpoints") == disk / "run/checkpoints/step-000001"
        said += ended.output
    assert "checkpoints/step-000002: No space" in said
    (disk / "ballast").unlink()
    ended = small_disk.sft(run_dir)
    assert ended.code == 0, ended.output
    found = outcome(disk / "run")
    assert [name for name in trials.whole if found[name] != trials.whole[name]] == []


def test_a_flipped_bit_in_the_newest_checkpoint_costs_a_step_and_is_said(trials, tmp_path):
    trials.killed(tmp_path / "run", FAILPOINT="sft/stepped:3")
    file = tmp_path / "run/checkpoints/step-000002/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert "step-000002/optimizer.safetensors has changed since it was saved" in trials.start(tmp_path / "copy").output
    assert trials.wrong(tmp_path / "run") == []


@pytest.mark.parametrize("changed", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_changed_between_two_attempts_is_refused(commands, tmp_path, changed):
    """Under LoRA, where it comes from the base model; otherwise from the checkpoint, under its hashes."""
    model = shutil.copytree(commands.config.model, tmp_path / "model")
    flags = ("--model", str(model), "--lora.rank=2")
    assert commands.sft(tmp_path / "run", *flags, FAILPOINT="sft/stepped:2").code == -signal.SIGKILL
    text = (model / changed).read_text()
    (model / changed).write_text(text.replace('"<think>"', '"<thunk>"') if changed == "tokenizer.json" else f" {text}")
    assert load_tokenizer(model) is not None and text != (model / changed).read_text()
    ended = commands.sft(tmp_path / "run", *flags)
    assert ended.code == 2 and "its tokenizer or chat template is no longer the one" in ended.output
    (model / changed).write_text(text)
    assert commands.sft(tmp_path / "run", *flags).code == 0


# Each and every one.


@pytest.mark.slow
def test_killed_at_every_pass_of_every_failpoint_it_resumes_bit_for_bit(trials):
    assert trials.at_passes(trials.passes) == {}


@pytest.mark.slow
def test_told_to_leave_in_every_phase_it_saves_and_resumes_bit_for_bit(trials):
    phases = ("sft/", "checkpoint/before-write", "checkpoint/before-rename", "prune/", "metrics/")
    assert trials.told_to_leave([name for name in trials.passes if name.startswith(phases)]) == {}


@pytest.mark.slow
def test_killed_or_told_to_leave_at_every_step_it_resumes_bit_for_bit(variant):
    names = [name for name in variant.passes if name.startswith(("sft/", "checkpoint/before-write", "prune/"))]
    assert variant.at_passes(names) == {}
    assert variant.told_to_leave(names) == {}


@pytest.mark.slow
def test_killed_at_thirty_random_moments_it_resumes_bit_for_bit(trials):
    assert trials.at_moments(30, seed=0) == {}


@pytest.mark.slow
def test_killed_at_every_failpoint_of_a_resume_it_ends_the_same(trials, tmp_path):
    trials.killed(tmp_path / "killed", FAILPOINT="checkpoint/before-rename:2")
    shutil.copytree(tmp_path / "killed", tmp_path / "run")
    assert trials.start(tmp_path / "run", FAILPOINT_LOG=str(tmp_path / "log")).code == 0
    results = {}
    for name in (name for name in passes(tmp_path / "log") if name.endswith(":1")):
        run_dir = tmp_path / name.replace("/", "-")
        shutil.copytree(tmp_path / "killed", run_dir)
        trials.killed(run_dir, FAILPOINT=name)
        results[name] = trials.wrong(run_dir)
    assert len(results) > 15 and not any(results.values()), results
