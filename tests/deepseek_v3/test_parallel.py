"""Spread over processes, the model comes to what one process does: FSDP2, expert parallelism, DualPipe-V."""

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.parallel import spread

HERE = str(Path(__file__).parent)
LIMIT = 90.0
"""Seconds that a rank may take, several times what the slowest takes on a busy machine."""
GRACE = 10.0
"""Seconds that the others get to end by themselves after one has failed."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(job, ...) has two processes do a job of ranks.py. A failure shows what each of them said, a hang where."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))  # the server, which imports once, has no other
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    import ranks

    def start(job: str, *, size: int = 2, limit: float = LIMIT, **arguments: Any) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        outputs = [folder / f"rank-{rank}" for rank in range(size)]
        processes = [
            context.Process(target=ranks.enter, args=(job, rank, size, arguments, output, limit))
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit + GRACE
        while living := [p.sentinel for p in processes if p.is_alive()]:
            if not wait(living, max(deadline - time.monotonic(), 0)):
                break
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        said = "\n".join(f"--- {o.name} ---\n{o.read_text() if o.exists() else ''}" for o in outputs)
        assert codes == [0] * size, f"{job}: exit codes {codes}\n{said}"

    return start


def test_sharded_by_fsdp2_it_is_one_model(run):
    run("sharded")


@pytest.mark.parametrize(("tokens", "choice"), [([40, 23], "any"), ([5, 0], "hot"), ([0, 9], "far")])
def test_experts_elsewhere_do_what_experts_here_do(run, tokens, choice):
    run("experts", tokens=tokens, choice=choice)


def test_expert_parallel_it_is_one_model(run):
    run("expert_parallel_model")


def test_in_a_pipeline_it_is_one_model(run):
    run("pipelined", layers=5, lengths=[[20, 9], [3, 30, 17], [25], [7, 7, 7, 7], [2, 2]])


MANY = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]]


@pytest.mark.parametrize(("pp", "dp", "ep"), [(2, 1, 1), (1, 1, 2), *MANY])
def test_all_of_them_together_are_one_model(run, pp, dp, ep):
    run("together", size=pp * dp * ep, pp=pp, dp=dp, ep=ep)


def test_layers_that_dont_come_out_even_are_more_in_the_middle():
    assert [len(layers) for layers in spread(61, 8)] == [7, 8, 8, 8, 8, 8, 7, 7]
    assert [i for layers in spread(61, 8) for i in layers] == list(range(61))
    assert [len(layers) for layers in spread(8, 4)] == [2, 2, 2, 2]


def test_what_cant_be_spread_is_refused(run):
    run("refused")


def test_ranks_that_fail_or_hang_are_shown(run):
    with pytest.raises(AssertionError, match=r"(?s)rank-1 ---.*in fails.*KeyError: 'rank 1'"):
        run("fails")
    with pytest.raises(AssertionError, match=r"(?s)rank-1 ---\n.*Timeout.*in enter"):
        run("hangs", limit=1.0)
