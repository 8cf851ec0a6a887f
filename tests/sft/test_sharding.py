"""Two processes on gloo, sharded or not, come to what one does: real ones, in steps whose rows can't be halved."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoint import latest_checkpoint
from runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]

UNEVEN = ("--rows_per_step=7", "--rows_per_pass=1")
"""Seven rows and then one: in the first step one process has a pass less than the other, in the second none."""


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    """A run's folder after a command that ended well."""

    def start(*flags: str, processes: int, run_dir: Path | None = None, **options: Any) -> Path:
        run_dir = run_dir or tmp_path_factory.mktemp("run") / "run"
        ended = commands.sft(run_dir, *flags, processes=processes, **options)
        assert ended.codes == [0] * processes, ended.output
        assert ended.output.count("run folder  ") == 1  # one process speaks for all
        return run_dir

    return start


@pytest.fixture(scope="module")
def one(run) -> Path:
    return run(processes=1)


@pytest.fixture(scope="module")
def two(run) -> Path:
    return run(processes=2)


def assert_same(a: Path, b: Path, limit: float = 1e-5) -> None:
    """Losses, of training and held out, and final weights."""
    series = [
        [(m["step"], m[key]) for m in read_metrics(run / "metrics.jsonl") for key in ("loss", "eval/loss") if key in m]
        for run in (a, b)
    ]
    assert [step for step, _ in series[0]] == [step for step, _ in series[1]]
    assert [loss for _, loss in series[0]] == pytest.approx([loss for _, loss in series[1]], rel=limit)
    assert_same_weights(a, b, limit)


def assert_same_weights(a: Path, b: Path, limit: float) -> None:
    final = [load_file(run / "checkpoints/final/model.safetensors") for run in (a, b)]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        torch.testing.assert_close(tensor, final[1][name], rtol=0, atol=limit, msg=name)


def test_two_sharded_processes_come_to_what_one_does(one, two):
    assert_same(one, two)
    of_one, of_two = (read_metrics(path / "metrics.jsonl") for path in (one, two))
    for key in ("num_tokens", "trained_tokens", "epoch", "learning_rate", "eval/accuracy"):
        assert [m.get(key) for m in of_one] == [m.get(key) for m in of_two]
    norms = [[m["grad_norm"] for m in lines if "loss" in m] for lines in (of_one, of_two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("shard", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_rows_that_cant_be_dealt_evenly_count_once_each_and_so_do_their_loads(run, shard):
    """With the router's bias, which loads of a pass that only keeps step would push."""
    flags = (*UNEVEN, "--bias_update_speed=0.125", "--balance_loss=0.1")
    alone, together = run(*flags, processes=1), run(*flags, f"--shard={shard}", processes=2)
    assert [m["step"] for m in read_metrics(alone / "metrics.jsonl") if "loss" in m] == [1, 2]
    assert_same(alone, together)
    loads = [[m.get("router/max_load") for m in read_metrics(r / "metrics.jsonl")] for r in (alone, together)]
    assert loads[0] == loads[1] and loads[0][1] >= 1


def test_a_model_with_a_tied_head_is_sharded_too_and_samples(run, llama, one):
    flags = ("--model", str(llama), "--epochs=1")
    alone, together = run(*flags, processes=1), run(*flags, processes=2)
    assert_same(alone, together)
    accuracy = [[m.get("eval/accuracy") for m in read_metrics(path / "metrics.jsonl")] for path in (alone, together)]
    assert accuracy[0] == accuracy[1] and accuracy[0][0] is not None
    assert "lm_head.weight" not in load_file(together / "checkpoints/final/model.safetensors")


@pytest.mark.slow
def test_adapters_are_sharded_and_resumed_too(run, commands, tmp_path):
    flags = ("--lora.rank=2", "--epochs=1", "--rows_per_step=1")
    alone = run(*flags, processes=1)
    ended = commands.sft(tmp_path / "run", *flags, processes=2, FAILPOINT="sft/stepped:3")
    assert ended.codes == [-signal.SIGKILL] * 2, ended.output
    run(*flags, processes=2, run_dir=tmp_path / "run")
    assert_same(alone, tmp_path / "run")
    adapters = load_file(tmp_path / "run/checkpoints/final/adapter/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_a_run_goes_on_with_another_number_of_processes(run, commands, one, tmp_path):
    """One step in one, one in two, and the last in one again."""
    for step, processes in ((1, 1), (2, 2)):
        ended = commands.sft(
            tmp_path / "run",
            processes=processes,
            FAILPOINT=f"sft/recorded:{1 if processes == 2 else step}",
            FAILPOINT_SIGNAL="SIGTERM",
        )
        assert ended.codes == [128 + signal.SIGTERM] * processes, ended.output
        assert (tmp_path / f"run/checkpoints/step-{step:06d}").is_dir()
    run(processes=1, run_dir=tmp_path / "run")
    assert_same(one, tmp_path / "run")


def differing(outcome: Any, a: Path, b: Path) -> list[str]:
    whole, found = outcome(a), outcome(b)
    return [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]


def test_sharded_and_killed_it_resumes_bit_for_bit(run, commands, outcome, two, tmp_path):
    """While the first process writes a checkpoint the other waits, and dies of its death."""
    ended = commands.sft(tmp_path / "run", processes=2, FAILPOINT="checkpoint/before-rename:2")
    assert ended.code == -signal.SIGKILL and 0 not in ended.codes, ended.output
    run(processes=2, run_dir=tmp_path / "run")
    assert differing(outcome, two, tmp_path / "run") == []


def test_a_signal_to_one_process_lets_all_leave_after_a_save(run, commands, outcome, two, tmp_path):
    """Only the first process writes checkpoints, and with it only it passes this point."""
    ended = commands.sft(
        tmp_path / "run", processes=2, FAILPOINT="checkpoint/before-write:2", FAILPOINT_SIGNAL="SIGTERM"
    )
    assert ended.codes == [128 + signal.SIGTERM, 0], ended.output
    assert latest_checkpoint(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-000002"
    run(processes=2, run_dir=tmp_path / "run")
    assert differing(outcome, two, tmp_path / "run") == []


def test_what_only_the_first_process_finds_wrong_ends_them_all(commands, tmp_path):
    ended = commands.sft(tmp_path / "run", "--mix=[/nowhere.jsonl]", processes=2)
    assert ended.code == 2 and 0 not in ended.codes and "/nowhere.jsonl" in ended.output


def test_muon_needs_whole_matrices(commands, tmp_path):
    ended = commands.sft(tmp_path / "run", "--optim.muon=true", processes=2)
    assert ended.codes == [2, 2] and "optim.muon: it takes whole matrices; set shard to false" in ended.output


@pytest.mark.slow
def test_muon_in_processes_that_are_not_sharded_is_the_same(run):
    flags = ("--optim.muon=true", "--epochs=1")
    # It computes in bf16, where the last bit of a gradient may make a difference of 0.4 %.
    assert_same_weights(run(*flags, processes=1), run(*flags, "--shard=false", processes=2), limit=1e-3)


@pytest.mark.slow
def test_sharded_with_checkpointed_activations_it_is_the_same(run, two):
    assert_same(two, run("--gradient_checkpointing=true", processes=2))


@pytest.mark.slow
def test_sharded_and_killed_at_every_failpoint_it_resumes_bit_for_bit(run, commands, outcome, two, tmp_path):
    """At its last pass: the sweep over all of them is tests/sft/test_kill.py's, with one process."""
    run(processes=2, run_dir=tmp_path / "log", FAILPOINT_LOG=str(tmp_path / "passes"))
    counts = Counter((tmp_path / "passes").read_text().split())
    wrong = {}
    for name, count in counts.items():
        last = count // 2 if name.startswith("sft/") else count  # which both processes pass
        run_dir = tmp_path / name.replace("/", "-")
        ended = commands.sft(run_dir, processes=2, FAILPOINT=f"{name}:{last}")
        assert -signal.SIGKILL in ended.codes, (name, ended.output)
        run(processes=2, run_dir=run_dir)
        wrong[name] = differing(outcome, two, run_dir)
    assert len(wrong) > 15 and not any(wrong.values()), wrong


@pytest.mark.slow
def test_compiled_and_sharded_it_is_the_same(run, two):
    assert_same(two, run("--compile=true", processes=2), limit=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_it(commands, one, launcher, tmp_path):
    start = {
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"),
    }[launcher]
    arguments = ("-m", "recipes.sft", "--config", str(commands.folder / "run.yaml"), "--run_dir", str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-m", *start, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out accuracy") == 1
    assert_same(one, tmp_path / "run")


@pytest.mark.slow
def test_sharded_in_fp8_it_is_the_same(run):
    flags = ("--fp8=true", "--evaluation.every=0")
    assert_same_weights(run(*flags, processes=1), run(*flags, processes=2), limit=1e-3)
