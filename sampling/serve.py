"""`python -m sampling.serve --model DIR`: a server for `sampling.backend: server`, started again when it dies.

Runs vLLM's own server (sampling/vllm_server.py) or our own sampler behind the same HTTP (sampling/native_server.py) in
a child process with another name at every start, and starts it again when it dies or stops answering. It listens on
this machine alone unless told otherwise, and for others only with a key in the environment (SAMPLING_API_KEY). The
model's folder says what to build; the weights come from the trainer. One server is one engine: data parallelism is
several of these. What follows `--` goes to vLLM as it is.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from runtime.errors import UserError
from sampling.process import EngineLost, _death, _kill_group
from sampling.wire import Refused, Wire, is_loopback, read_key

PROBE = 5.0
"""Seconds between two questions to the child."""

ASK = {"method": "sampler_describe", "args": []}
"""The question: it is answered between two steps of the engine, so one that hangs doesn't."""

LOOK = 0.2
"""Seconds between two looks at whether it lives."""

SETTLED = 60.0
"""Seconds of service after which a death counts as the first one again."""

GRACE = 20.0
"""Seconds a child told to leave has for it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is served, and how."""

    model: str
    """Checkpoint folder or hub name: architecture and tokenizer's sizes. vLLM doesn't read its weights."""
    backend: str = "auto"
    """"vllm", "native", or "auto": vllm where it is installed."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than this machine's own only with a key."""
    port: int = 8100
    """Port to listen on."""
    dtype: str = "auto"
    """"bfloat16", "float32" or "auto": vLLM's bfloat16, but float32 on a CPU without AMX; ours float32."""
    max_model_len: int = 4096
    """Longest prompt with its completion, tokens (vLLM; ours takes what the model's positions allow)."""
    max_num_seqs: int = 256
    """Sequences decoded together (vLLM)."""
    tensor_parallel: int = 1
    """GPUs that one copy of the model is spread over (vLLM)."""
    gpu_memory: float = 0.9
    """Share of each GPU's memory for weights and KV cache (vLLM, CUDA)."""
    kv_cache_gib: float = 1.0
    """KV cache (vLLM on a CPU)."""
    start_limit: float = 1800.0
    """Seconds for a start, after which the child is killed."""
    hang_limit: float = 1800.0
    """Seconds without an answer after which the child is killed: more than a load of weights takes, or with our own
    sampler a batch."""
    max_restarts: int = 5
    """Deaths in a row, each before it had served for a minute, before giving up."""
    extra: list[str] = field(default_factory=list)
    """More of vLLM's options."""


def read(argv: Sequence[str] | None = None) -> Settings:
    """Settings from a command line; ends the process with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m sampling.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for spec in dataclasses.fields(Settings):
        if spec.name != "extra":
            default = None if spec.name == "model" else spec.default
            parser.add_argument(f"--{spec.name}", type=spec.type, default=default, help=f"default: {default}")
    parser.add_argument("extra", nargs="*", help="after --: options of vLLM")
    settings = Settings(**vars(parser.parse_args(argv)))
    try:
        check(settings)
    except UserError as error:
        parser.error(str(error))
    return settings


def check(settings: Settings) -> None:
    """Raises UserError for what can't be served."""
    if not settings.model:
        raise UserError("--model: name a checkpoint folder or hub name")
    if settings.model.startswith((".", "/", "~")) and not Path(settings.model).expanduser().is_dir():
        raise UserError(f"--model {settings.model}: no such folder")
    if settings.backend not in ("auto", "vllm", "native"):
        raise UserError(f"--backend {settings.backend}: use auto, vllm or native")
    if settings.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--backend vllm: vllm is not installed; use native, or run: make setup")
    if settings.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype {settings.dtype}: use auto, bfloat16 or float32")
    if not is_loopback(settings.host) and read_key() is None:
        raise UserError(
            f"--host {settings.host}: whoever reaches a server without a key can replace its weights; put a key into "
            "SAMPLING_API_KEY, here and at the trainer, or listen on 127.0.0.1"
        )
    for name, value in dataclasses.asdict(settings).items():
        if name != "max_restarts" and isinstance(value, int | float) and not value > 0:
            raise UserError(f"--{name} {value}: give a positive number")


class Supervisor:
    """A child that serves, started again when it is gone."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        backend = settings.backend
        if backend == "auto":
            backend = "vllm" if importlib.util.find_spec("vllm") is not None else "native"
        self.backend = backend
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
        self.wire = Wire(f"http://{f'[{host}]' if ':' in host else host}:{settings.port}", key=read_key())
        self.child: subprocess.Popen[bytes] | None = None
        self.told = 0

    def run(self) -> int:
        """Until told to leave (0), or until it dies again and again (1)."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._leave)
        deaths = 0
        while not self.told:
            self._start()
            fate, served = self._watch()
            if self.told:
                self._end()
                break
            deaths = deaths + 1 if served < SETTLED else 1
            if deaths > self.settings.max_restarts:
                say(f"{fate}; {deaths} times in a row, giving up. The lines above say why")
                return 1
            wait = min(2.0 ** (deaths - 2), 60.0) if deaths > 1 else 0.0
            say(f"{fate}; starting it again" + (f" in {wait:g} s" if wait else ""))
            end = time.monotonic() + wait
            while not self.told and time.monotonic() < end:
                time.sleep(LOOK)
        return 0

    def _start(self) -> None:
        settings = dataclasses.asdict(self.settings) | {"name": f"sampler-{secrets.token_hex(4)}"}
        self.child = subprocess.Popen(
            # A fresh interpreter in a process group of its own, without the current directory in front (-P).
            [sys.executable, "-P", "-m", f"sampling.{self.backend}_server", str(os.getpid()), json.dumps(settings)],
            stdin=subprocess.PIPE,  # nothing comes; it ends with this process, which vllm_server.py notices
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)},
            start_new_session=True,
        )
        say(f"{self.backend} server for {self.settings.model}: process {self.child.pid}")

    def _watch(self) -> tuple[str, float]:
        """How the child ended, and for how many seconds it had served. It is gone then, with all it started."""
        answered = began = time.monotonic()
        ready = 0.0
        while not self.told and not self._dead():
            try:
                reply = self.wire.call("/collective_rpc", ASK, limit=min(self.settings.hang_limit, 30), attempts=1)
                about = reply["results"][0]
                answered = time.monotonic()
                if not ready:
                    seconds = answered - began
                    say(f"ready at {self.wire.url} after {seconds:.0f} s: {about['dtype']} on {about['device']}")
                    ready = answered
            except (EngineLost, Refused, LookupError, TypeError):
                pass
            limit = self.settings.hang_limit if ready else self.settings.start_limit
            if time.monotonic() - answered >= limit:
                self._kill()
                return f"the server gave no answer for {limit:g} s and was killed", answered - ready if ready else 0
            self._dead(within=PROBE if ready else LOOK)
        served = time.monotonic() - ready if ready else 0
        return "told to leave" if self.told else f"the server died ({_death(self._kill())})", served

    def _dead(self, within: float = 0.0) -> bool:
        """Whether the child has ended, or does so within these seconds."""
        end = time.monotonic() + within
        while not self._ended():
            if time.monotonic() >= end or self.told:
                return False
            time.sleep(LOOK)
        return True

    def _kill(self) -> int:
        """End the child and all it started, engines that outlive their server too; its return code."""
        assert self.child is not None
        if self.child.returncode is None:  # not reaped, so the id can't belong to anyone else
            _kill_group(self.child.pid)
        return self.child.wait()

    def _end(self) -> None:
        """Let the child leave by itself for GRACE seconds."""
        assert self.child is not None
        end = time.monotonic() + GRACE
        while self.child.returncode is None and not self._ended() and time.monotonic() < end:
            time.sleep(LOOK)
        self._kill()

    def _ended(self) -> bool:
        """It is not reaped: its id and its group stay its own."""
        assert self.child is not None
        return os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        """A second signal ends it at once, with all it started."""
        if self.told:
            self._kill()
            sys.exit(128 + signum)
        self.told = signum
        if self.child is not None and self.child.returncode is None:  # not reaped
            os.kill(self.child.pid, signal.SIGTERM)  # not Popen's, which would reap it


def say(message: str) -> None:
    """A line for whoever watches."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def main() -> int:
    """The command; its exit code."""
    return Supervisor(read()).run()


if __name__ == "__main__":
    sys.exit(main())
