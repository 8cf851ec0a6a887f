"""`python -m recipes.grpo` again and again, without paying seconds of imports for each.

Imports what the command needs, starts no thread, and forks a child for every line it reads: the child is the command,
and really dies by the signal it gets. `Commands` in conftest.py is the other end.
"""

import json
import os
import select
import sys
import time
from pathlib import Path

# Imported on the way by a run: here, once.
import pandas  # noqa: F401
import plotext  # noqa: F401
import pyarrow.dataset  # noqa: F401

import rl.train
import sampling.native
import sampling.process  # noqa: F401
from recipes.cli import main, parse
from recipes.grpo import run
from rl.config import GRPOConfig


def serve() -> None:
    """Fork, wait, answer; until the input ends."""
    parse(GRPOConfig, [], prog="", description="")  # fills the parser's caches
    threads = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    # No thread survives a fork. Arrow's allocator knows that, and starts its own again.
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads
    # A third of such a run's time, for a page drawn from metrics.jsonl when all is done and saved.
    rl.train.write_report = lambda folder, **_: folder / "report.html"
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        if (pid := os.fork()) == 0:
            command(**request)
        if request["kill_after"] is not None:
            select.select([os.pidfd_open(pid)], [], [], request["kill_after"])
            os.kill(pid, request["signum"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, (json.dumps([code, time.monotonic() - began]) + "\n").encode())


def command(*, arguments: list[str], environment: dict[str, str], output: str, **_: object) -> None:
    """The child: what `python -m recipes.grpo` does, and the end of the process."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for fd in (1, 2):
        os.dup2(file, fd)
    code = 1
    try:
        code = main(GRPOConfig, run, prog="grpo", description="", argv=arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
