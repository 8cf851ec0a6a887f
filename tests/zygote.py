"""A recipe's command again and again, without paying seconds of imports for each; also in several processes.

`python zygote.py recipes.sft` imports what the command needs, starts no thread, and for every line it reads forks the
command's processes: they really die by the signals they get. tests/commands.py is the other end.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

# Imported on the way by a run: here, once.
import pandas  # noqa: F401
import peft  # noqa: F401
import plotext  # noqa: F401
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
import torch.optim._muon
import torch.utils.tensorboard  # noqa: F401

import rewards.maths.grade  # noqa: F401
import runtime.models  # noqa: F401
import sampling.attest
import sampling.native
import sampling.process  # noqa: F401
from recipes.cli import main, parse

PATIENCE = 20.0
"""Seconds that the other processes of a command may live on after one has failed."""


def serve(recipe: Any, config_class: Any) -> None:
    """Fork, wait, answer; until the input ends."""
    parse(config_class, [], prog="", description="")  # fills the parser's caches
    threads = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    # No thread survives a fork. Arrow's allocator knows that, and starts its own again.
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads
    # A third of such a run's time, for a page drawn from metrics.jsonl when all is done and saved.
    loop = getattr(recipe, "train", None) or recipe.generate
    sys.modules[loop.__module__].write_report = lambda folder, **_: folder / "report.html"  # type: ignore[attr-defined]
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        pids = []
        port = free_port()
        for rank in range(len(request["outputs"])):
            if (pid := os.fork()) == 0:
                command(recipe, config_class, request, rank, port)
            pids.append(pid)
        codes = wait(pids, request["kill_after"], request["signum"])
        os.write(answers, (json.dumps([codes, time.monotonic() - began]) + "\n").encode())


def wait(pids: list[int], kill_after: float | None, signum: int) -> list[int]:
    """Exit codes of all, or minus the signal; all get `signum` after so many seconds."""
    codes = {}
    living = {os.pidfd_open(pid): pid for pid in pids}
    while living:
        ended = select.select(list(living), [], [], kill_after)[0]
        if not ended:
            for pid in living.values():
                os.kill(pid, signum)
            kill_after = None
        for fd in ended:
            os.close(fd)
            pid = living.pop(fd)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if codes[pid]:
                kill_after, signum = PATIENCE, signal.SIGKILL
    return [codes[pid] for pid in pids]


def command(recipe: Any, config_class: Any, request: dict[str, Any], rank: int, port: int) -> None:
    """The child: what `python -m` of the recipe does, and the end of the process."""
    os.environ.update(request["environment"])
    if (size := len(request["outputs"])) > 1:
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    file = os.open(request["outputs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for fd in (1, 2):
        os.dup2(file, fd)
    code = 1
    try:
        code = main(config_class, recipe.run, prog=recipe.__name__, description="", argv=request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    serve(module, next(v for k, v in vars(module).items() if k in ("SFTConfig", "GRPOConfig", "DistillConfig")))
