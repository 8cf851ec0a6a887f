"""Spread over processes, the model comes to what one process does: FSDP2, expert parallelism, DualPipe-V."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = str(Path(__file__).parent)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(job, ...) has two processes do a job of ranks.py."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, *sys.path]))  # the server, which imports once, has no other
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    import ranks

    def start(job: str, *, size: int = 2, **arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        outputs = [tmp_path / f"rank-{rank}" for rank in range(size)]
        processes = [
            context.Process(target=ranks.enter, args=(job, rank, size, port, arguments, str(outputs[rank])))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * size, "\n".join(output.read_text() for output in outputs)

    return start


def test_sharded_by_fsdp2_it_is_one_model(run):
    run("sharded")


@pytest.mark.parametrize(("tokens", "choice"), [([40, 23], "any"), ([5, 0], "hot"), ([0, 9], "far")])
def test_experts_elsewhere_do_what_experts_here_do(run, tokens, choice):
    run("experts", tokens=tokens, choice=choice)


def test_expert_parallel_it_is_one_model(run):
    run("expert_parallel_model")


def test_in_a_pipeline_it_is_one_model(run):
    run("pipelined", layers=4, lengths=[[20, 9], [3, 30, 17], [25], [7, 7, 7, 7]])


@pytest.mark.slow
@pytest.mark.parametrize(("pp", "dp", "ep"), [(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)])
def test_all_of_them_together_are_one_model(run, pp, dp, ep):
    run("together", size=pp * dp * ep, pp=pp, dp=dp, ep=ep)
