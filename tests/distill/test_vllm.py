"""vLLM as a teacher, in this process and as a server on loopback: killed in between, every answer is there once.

The model is tiny and its weights are random: what it says is of no matter, and not the same twice.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.ledger import Ledger
from recipes.tiny import random_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
ROOT = Path(__file__).parents[2]
KEY = "sk-canary-1234567890"
START_LIMIT = 500
OWN = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def distill(run_dir: Path, expert: dict[str, Any], **environment: str) -> int:
    problems = json.dumps([{"path": "stories", "domain": "math", "response": "direct", "max_rows": 8}])
    experts = json.dumps([{"max_tokens": 8, "samples": 3, "system": "", **expert}])
    arguments = [f"--problems={problems}", f"--experts={experts}", "--batch=4", f"--run_dir={run_dir}", "--resume"]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.distill", *arguments],
        cwd=ROOT,
        env=os.environ | OWN | QUIET | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def answers(run_dir: Path) -> dict[Any, Any]:
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        return ledger.samples(range(8))


def whole(found: dict[Any, Any]) -> bool:
    kinds = [("original", 0), *(("reasoning", index) for index in range(3))]
    return list(found) == [(i, *kind) for i in range(8) for kind in kinds]


def test_in_this_process_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    expert = {"model": str(random_checkpoint()), "backend": "vllm"}
    # The second commit is of what was sampled; the first, of what came with the problems.
    assert distill(tmp_path / "run", expert, FAILPOINT="distill/after-samples:2") == -signal.SIGKILL
    before = answers(tmp_path / "run")
    assert len(before) == 16
    assert distill(tmp_path / "run", expert) == 0
    after = answers(tmp_path / "run")
    assert whole(after) and {**after, **before} == after
    assert {sample.finish_reason for sample in after.values()} <= {"stop", "length"}
    assert json.loads((tmp_path / "run/shards/manifest.json").read_text())["rows"] >= 8


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    # In chunks, a prompt with a seed ends vLLM on a CPU: RuntimeError("CPU Generator does not use offset").
    options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024", "--served-model-name", "tiny"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(random_checkpoint())]
    with (tmp_path_factory.mktemp("log") / "server.txt").open("w+b") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            env=os.environ | OWN | QUIET | {"VLLM_API_KEY": KEY}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until = time.monotonic() + START_LIMIT
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    log.seek(0)
                    assert server.poll() is None and time.monotonic() < until, log.read()[-3000:].decode()
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def served(url: str) -> int:
    """Requests that the server has answered."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = [
        line for line in lines if re.match(r"vllm:request_success_total\{.*finished_reason=\"(stop|length)\"", line)
    ]
    return int(sum(float(line.split()[-1]) for line in found))


def test_of_a_server_nothing_is_asked_twice_but_what_was_under_way(url: str, tmp_path: Path) -> None:
    expert = {"model": "tiny", "endpoint": url, "key_env": "TEACHER_KEY", "concurrency": 2, "original": "source"}
    assert distill(tmp_path / "run", expert, TEACHER_KEY=KEY, FAILPOINT="distill/after-samples:8") == -signal.SIGKILL
    before = answers(tmp_path / "run")
    assert 4 < len(before) < 32
    assert distill(tmp_path / "run", expert, TEACHER_KEY=KEY) == 0
    after = answers(tmp_path / "run")
    assert whole(after) and {**after, **before} == after
    assert all(sample.error == "" for sample in after.values())
    assert len({sample.text for key, sample in after.items() if key[1] == "reasoning"}) > 4
    assert 24 <= served(url) <= 24 + 2
    assert all(KEY.encode() not in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())


def test_a_wrong_key_is_unknown_and_no_hole(url: str, tmp_path: Path) -> None:
    expert = {"model": "tiny", "endpoint": url, "key_env": "TEACHER_KEY", "retries": 0}
    assert distill(tmp_path / "run", expert, TEACHER_KEY="sk-wrong") == 0
    found = answers(tmp_path / "run")
    assert whole(found)
    assert all(sample.error.startswith("HTTP 401") for key, sample in found.items() if key[1] == "reasoning")
