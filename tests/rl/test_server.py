"""GRPO whose sampler is behind HTTP is the run it is with a sampler in process, also when servers are lost on the way.

The run is the one of tests/rl/test_kill.py. Quick tests serve from a thread here, on real sockets; the slow ones start
`python -m sampling.serve`, kill or stop what it serves with, and train in two gloo processes.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rl.config import SamplingConfig
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm
from sampling.native import NativeSampler
from sampling.native_server import NativeServer

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on(*urls: str, **more: Any) -> list[str]:
    """Flags for a run on these servers."""
    settings = {"backend": "server", "server_urls": json.dumps(urls), "time_limit": 60, **more}
    return [f"--sampling.{name}={value}" for name, value in settings.items()]


def without_restarts(outcome: dict[str, Any]) -> dict[str, Any]:
    """The metrics count them, and so do the rollouts' headers."""
    tables = {name: io.BytesIO(content) for name, content in outcome.items() if name.endswith(".parquet")}
    found = {name: content for name, content in outcome.items() if not name.startswith("rollouts")}
    found |= {name: pq.read_table(table).to_pylist() for name, table in tables.items()}
    return found | {"metrics": [{k: v for k, v in m.items() if k != "sampling/restarts"} for m in found["metrics"]]}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted(one | other) if one.get(name) != other.get(name)]


class Dying(NativeServer):
    """Our server, which at its n-th completions is replaced by another one, of other weights, at the same address."""

    def __init__(
        self, model: Path, *, name: str, port: int = 0, dies_at: int | None = None, has_heir: bool = True
    ) -> None:
        weights = load_causal_lm(model)
        if name != "first":
            with torch.no_grad():
                for parameter in weights.parameters():
                    parameter.mul_(0.5)
        sampler = NativeSampler(weights)
        super().__init__(sampler, name=name, port=port)
        sampler.version = 0  # vLLM, too, samples from whatever it holds
        self.calls, self.dies_at, self.model = 0, dies_at, model
        self.has_heir = has_heir
        self.heir: Dying | None = None
        threading.Thread(target=self.serve, daemon=True).start()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            self.calls += 1
            if self.calls == self.dies_at:
                super().post(path, body)  # the work is done and is lost
                self.close()
                if self.has_heir:
                    self.heir = Dying(self.model, name="second", port=int(self.url.rsplit(":", 1)[1]))
                raise RuntimeError("this server is gone")
        return super().post(path, body)


@pytest.fixture
def serve(commands) -> Iterator[Callable[..., Dying]]:
    """Servers in threads of this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands have: sums are rounded alike
    begun: list[Dying] = []

    def begin(**options: Any) -> Dying:
        begun.append(Dying(commands.folder / "model", name="first", **options))
        return begun[-1]

    yield begin
    for server in begun:
        (server.heir or server).close()
    torch.set_num_threads(threads)


def test_a_run_on_a_server_is_the_run_in_process(commands, serve, whole, outcome, tmp_path):
    ended = commands.grpo(tmp_path, *on(serve().url))
    assert ended.code == 0, ended.output
    assert differing(whole, outcome(tmp_path)) == []  # weights, rollouts, log-probs and metrics, bit for bit
    assert [m["weights/version"] for m in outcome(tmp_path)["metrics"] if "reward" in m] == [1, 2, 3]


@pytest.mark.parametrize(
    "dies_at", [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_server_lost_in_the_middle_of_a_run_changes_nothing(commands, serve, whole, outcome, tmp_path, dies_at):
    """In the first sync, in a rollout, in a later sync."""
    server = serve(dies_at=dies_at)
    ended = commands.grpo(tmp_path, *on(server.url))
    assert ended.code == 0, ended.output
    assert server.heir is not None and server.heir.calls > 0
    assert "waiting for it (1 of 3)" in ended.output
    assert differing(without_restarts(whole), without_restarts(outcome(tmp_path))) == []


@pytest.mark.parametrize(("dies_at", "saved"), [pytest.param(4, 0, marks=pytest.mark.slow), (8, 1), (12, 2)])
def test_told_to_leave_while_a_server_is_lost_it_saves_and_goes_on_with_another(
    commands, serve, whole, outcome, tmp_path, dies_at, saved
):
    """In the first sync, in a rollout, in a later sync; with no checkpoint but the one for leaving."""
    server = serve(dies_at=dies_at, has_heir=False)
    flags = on(server.url, time_limit=600)
    told = dict(FAILPOINT="server/waiting:2", FAILPOINT_SIGNAL="SIGTERM")
    ended = commands.grpo(tmp_path, *flags, "--checkpoint.every=100", **told)
    assert ended.code == 143 and ended.seconds < 60, ended.output
    assert "the engine is lost, and the run was told to leave" in ended.output
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{saved:06d}"]
    ended = commands.grpo(tmp_path, *on(serve().url))
    assert ended.code == 0, ended.output
    expected, found = without_restarts(whole), without_restarts(outcome(tmp_path))
    if dies_at == 12:  # nobody took the second step's weights, and nobody evaluated them
        kept = found["metrics"][2].keys()
        assert {key.partition("/")[0] for key in expected["metrics"][2].keys() - kept} == {"weights", "eval"}
        expected["metrics"][2] = {key: expected["metrics"][2][key] for key in kept}
    assert differing(expected, found) == []


def test_two_servers_share_a_run(commands, serve, whole, tmp_path):
    """Each samples half of the batch, which may round another way: the tokens are the same, log-probs to rounding."""
    servers = [serve(), serve()]
    ended = commands.grpo(tmp_path, *on(*(server.url for server in servers)), "--steps=1")
    assert ended.code == 0, ended.output
    assert all(server.calls > 4 for server in servers)
    expected = pq.read_table(io.BytesIO(whole["rollouts/step-000001.parquet"])).to_pylist()
    rows = rollout(tmp_path, 1)
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in expected]
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-5)


def rollout(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run_dir / f"rollouts/step-{step:06d}.parquet").to_pylist()


def test_a_server_that_is_not_there_is_said_before_anything_is_computed(commands, tmp_path, monkeypatch):
    ended = commands.grpo(tmp_path, *on("http://127.0.0.1:9", time_limit=1))
    assert ended.code == 2
    assert "http://127.0.0.1:9 doesn't answer" in ended.output and "python -m sampling.serve" in ended.output


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(backend="server"), "the backend is server if and only if there are addresses"),
        (dict(server_urls=("http://127.0.0.1:1",)), "the backend is server if and only if there are addresses"),
        (dict(backend="server", server_urls=("http://a", "http://a")), "a server is named twice"),
        (dict(backend="server", server_urls=("http://a",), process=True), "sampling.process=True"),
        (dict(backend="server", server_urls=("http://a",), experts="replay"), "sampling.experts=replay"),
        (dict(backend="server", server_urls=("http://a",), speculate=True), "sampling.speculate=True"),
    ],
)
def test_settings_that_servers_can_not_follow_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        SamplingConfig(**settings)


# The command, killed and stopped for real.


class Service:
    """`python -m sampling.serve` on the commands' model."""

    def __init__(self, model: Path, log: Path, *flags: str, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sampling.serve", "--model", str(model), "--port", str(port), *flags],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment},
                stdout=file,
                stderr=file,
            )

    @property
    def children(self) -> list[int]:
        """Processes that were started to serve, first to last."""
        return [int(pid) for pid in re.findall(r"server for .*: process (\d+)", self.log.read_text())]

    def close(self) -> None:
        """As Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()


@pytest.fixture
def service(commands, tmp_path) -> Iterator[Callable[..., Service]]:
    """Services that must end with 0 when they are told to."""
    begun: list[Service] = []

    def begin(*flags: str, model: Path | None = None, **environment: str) -> Service:
        begun.append(Service(model or commands.folder / "model", tmp_path / "serve.log", *flags, **environment))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()
        assert not any(alive(pid) for pid in each.children)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param({"FAILPOINT": "server/complete:11"}, "the server died (signal 9", id="killed in a rollout"),
        pytest.param({"FAILPOINT": "server/load:3"}, "the server died (signal 9", id="killed in a sync"),
        pytest.param(
            {"FAILPOINT": "server/complete:11", "FAILPOINT_SIGNAL": "SIGSTOP"},
            "the server gave no answer for 15 s and was killed",
            id="hung in a rollout",
        ),
    ],
)
def test_a_server_killed_or_hung_is_started_again_and_the_run_ends_the_same(
    commands, service, whole, outcome, tmp_path, fault, said
):
    served = service("--backend", "native", "--hang_limit", "15", "--max_restarts", "20", **fault)
    ended = commands.grpo(tmp_path / "run", *on(served.url, max_restarts=20, time_limit=60))
    assert ended.code == 0, ended.output
    assert said in served.log.read_text() and len(served.children) > 1
    assert differing(without_restarts(whole), without_restarts(outcome(tmp_path / "run"))) == []


def train(commands: Any, run_dir: Path, *flags: str, processes: int) -> str:
    """The commands' run under torchrun; what it said."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "recipes.grpo"]
    done = subprocess.run(
        [sys.executable, *command, "--config", str(commands.folder / "run.yaml"), "--run_dir", str(run_dir), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(commands.folder)])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_gloo_trainers_with_a_server_that_is_killed_end_as_two_with_samplers_in_process(
    commands, service, outcome, tmp_path
):
    train(commands, tmp_path / "in-process", processes=2)
    served = service("--backend", "native", "--max_restarts", "20", FAILPOINT="server/complete:17")
    said = train(commands, tmp_path / "server", *on(served.url, max_restarts=20), processes=2)
    assert "waiting for it" in said and len(served.children) > 1
    found = [without_restarts(outcome(tmp_path / run)) for run in ("in-process", "server")]
    assert differing(*found) == []


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", pytest.param("vllm", marks=needs_vllm)])
def test_a_killed_launcher_takes_its_server_and_engines_with_it(tiny_folder, tmp_path, backend):
    served = Service(tiny_folder, tmp_path / "log", "--backend", backend, "--kv_cache_gib", "0.25")
    deadline = time.monotonic() + 300
    while "ready at" not in served.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = served.children
    group = members(child)
    assert child in group and any("EngineCor" in name(pid) for pid in group) == (backend == "vllm")
    served.process.kill()
    served.process.wait()
    while any(map(alive, group)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, group))


def members(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                found.append(pid)
    return found


# vLLM.


@pytest.mark.slow
@needs_vllm
def test_vllms_engine_killed_in_the_middle_of_a_run_comes_back_attested(commands, service, tiny_folder, tmp_path):
    """Two trainers, too. In float32: batches depend on when requests come, and bfloat16 would round to other tokens."""
    model = f"--model={tiny_folder}"  # vLLM has no kernel for experts as small as the commands' own
    flags = (model, "--sampling.dtype=float32", "--sampling.max_prompt_tokens=64", "--optim.lr=0.001")
    ended = commands.grpo(tmp_path / "in-process", "--sampling.backend=vllm", *flags)
    assert ended.code == 0, ended.output
    options = ("--dtype", "float32", "--max_model_len", "256", "--kv_cache_gib", "0.25")
    served = service("--backend", "vllm", *options, model=tiny_folder)
    killed: list[int] = []

    def kill_the_engine() -> None:
        while not (tmp_path / "server/rollouts/step-000001.parquet").exists():
            time.sleep(0.05)
        killed.extend(pid for pid in children(served.children[0]) if "EngineCor" in name(pid))  # 15 characters
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill_the_engine, daemon=True).start()
    ended = commands.grpo(tmp_path / "server", *on(served.url, time_limit=400), *flags)
    assert ended.code == 0, ended.output
    assert killed and "waiting for it (1 of 3)" in ended.output and len(served.children) == 2
    runs = [tmp_path / "in-process", tmp_path / "server"]
    for step in (1, 2, 3):
        rows = [rollout(run, step) for run in runs]
        assert [row["completion_ids"] for row in rows[0]] == [row["completion_ids"] for row in rows[1]]
    for metrics in (read_metrics(run / "metrics.jsonl") for run in runs):
        assert all(m["weights/canary_mean"] < 1e-4 for m in metrics if "reward" in m)
    one, two = (load_file(run / "checkpoints/final/model.safetensors") for run in runs)
    for name_ in one:
        torch.testing.assert_close(one[name_], two[name_], atol=1e-4, rtol=1e-3)
    train(commands, tmp_path / "two", *on(served.url, time_limit=400), *flags, processes=2)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()
