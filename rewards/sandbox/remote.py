"""A program -> how it ended on another machine, over HTTP as SandboxFusion or Piston speaks it.

An outage, a 5xx, a late or an unreadable answer is tried once more and then raised: unknown, never the program's
fault. Calls are made by a driver that is sent along; what it prints is a value and is judged here, so expected
values stay here. Left out: test code that `check`s a program (its expected values would have to be sent), and
anything about how well that machine isolates.
"""

import ipaddress
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rewards.sandbox import guest, values
from rewards.sandbox.backend import Finished, SandboxFault, ended_badly, read_answer
from rewards.sandbox.limits import Limits
from rewards.sandbox.values import encode

PATIENCE = 10.0
"""Seconds beyond a program's own for a service to answer."""

# Loads guest.py, values.py and the program from standard input, makes the call, and prints the answer last.
_DRIVER = """
import importlib.abc, importlib.machinery, importlib.util, json, sys, types

class Source(importlib.abc.InspectLoader):
    def __init__(self, source):
        self.source = source
    def get_source(self, name):
        return self.source

def load(name, source):
    loader = Source(source)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module

given = json.loads(sys.stdin.read())
encode, write = json.dumps, sys.stdout.write
for name in ("rewards", "rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
load("rewards.sandbox.values", given["values"])
guest = load("rewards.sandbox.guest", given["guest"])
answer = guest.answer(guest.load("solution", given["program"]), given["request"])
write("\\n" + given["mark"] + encode(answer) + "\\n")
"""


class SandboxOutage(SandboxFault):
    """The service gave no usable answer."""

    reason = "sandbox-outage"


class NotOverHTTP(SandboxFault):
    """A kind of test that a remote backend can't run without sending the expected values."""

    reason = "tests-unusable"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Code and headers go to the host that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Service:
    """A JSON service that runs a program on standard input."""

    path = ""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None) -> None:
        """`url` of the service, without the path. Raises ValueError unless it is https, or on this machine."""
        parts = urllib.parse.urlsplit(url)
        local = _is_loopback(parts.hostname or "")
        if not parts.hostname or parts.scheme not in (("http", "https") if local else ("https",)):
            raise ValueError(f"url={url!r}: give an https address; plain http goes to loopback only")
        self._url = url.rstrip("/") + self.path
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def run(self, program: str, stdin: str, limits: Limits) -> Finished:
        try:
            return self._run(program, stdin, limits)
        except SandboxOutage:
            return self._run(program, stdin, limits)

    def call(
        self, program: str, function: str, args: Sequence[Any], kwargs: Mapping[str, Any], limits: Limits
    ) -> Finished:
        mark = secrets.token_hex(16)
        sources = {name: Path(str(module.__file__)).read_text() for name, module in _SENT.items()}
        request = {"call": function, "arguments": encode(list(args)), "keywords": encode(dict(kwargs))}
        given = {**sources, "program": program, "request": request, "mark": mark}
        finished = self.run(_DRIVER, json.dumps(given), limits)
        if finished.status != "ok":
            return finished
        line = finished.stdout.rstrip().rpartition(b"\n")[2]
        return read_answer(line.removeprefix(mark.encode())) if line.startswith(mark.encode()) else _NO_RESULT

    def check(self, program: str, test: str, names: Sequence[str], entry_point: str | None, limits: Limits) -> NoReturn:
        raise NotOverHTTP("test code runs in the local sandbox only; give tests of input or call")

    def _run(self, program: str, stdin: str, limits: Limits) -> Finished:
        reply = self._post(self.request(program, stdin, limits), limits)
        try:
            finished = self.read(reply)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SandboxOutage(f"{self._url}: an answer of an unknown form: {error!r}") from error
        return Finished(status="output-limit") if len(finished.stdout) > limits.output_bytes else finished

    def request(self, program: str, stdin: str, limits: Limits) -> dict[str, Any]:
        """The service's form of a request."""
        raise NotImplementedError

    def read(self, reply: dict[str, Any]) -> Finished:
        """The service's form of an answer; may raise KeyError, TypeError and the like, or SandboxOutage."""
        raise NotImplementedError

    def _post(self, body: dict[str, Any], limits: Limits) -> Any:
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers, method="POST")
        most = 16 * limits.output_bytes + (1 << 16)  # both streams, escaped
        try:
            with self._opener.open(request, timeout=limits.wall_seconds + PATIENCE) as response:
                data = response.read(most + 1)
            if len(data) > most:
                raise SandboxOutage(f"{self._url}: more than {most} bytes")
            return json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise SandboxOutage(f"{self._url}: {error}") from error


class SandboxFusion(_Service):
    """ByteDance's SandboxFusion: `POST /run_code`."""

    path = "/run_code"

    def request(self, program: str, stdin: str, limits: Limits) -> dict[str, Any]:
        return {"code": program, "language": "python", "stdin": stdin, "run_timeout": limits.wall_seconds}

    def read(self, reply: dict[str, Any]) -> Finished:
        if reply["status"] not in ("Success", "Failed"):
            raise SandboxOutage(f"{self._url}: {reply['status']}: {str(reply.get('message'))[:200]}")
        result = reply["run_result"]
        if result["status"] == "TimeLimitExceeded":
            return Finished(status="time-limit")
        if result["status"] != "Finished":
            raise SandboxOutage(f"{self._url}: the run is {result['status']}")
        return _finished(result["return_code"], result["stdout"], result["stderr"])


class Piston(_Service):
    """Engineer Man's Piston: `POST /api/v2/execute`."""

    path = "/api/v2/execute"

    def request(self, program: str, stdin: str, limits: Limits) -> dict[str, Any]:
        return {
            "language": "python",
            "version": "*",
            "files": [{"content": program}],
            "stdin": stdin,
            "run_timeout": int(1000 * limits.wall_seconds),
            "run_memory_limit": limits.memory_mb << 20,
        }

    def read(self, reply: dict[str, Any]) -> Finished:
        run = reply["run"]
        status = run.get("status")
        if status == "XX":
            raise SandboxOutage(f"{self._url}: {str(run.get('message'))[:200]}")
        if status in ("OL", "EL"):
            return Finished(status="output-limit")
        if status == "TO" or (status is None and run["signal"] == "SIGKILL"):
            return Finished(status="time-limit")
        return _finished(1 if run["signal"] else run["code"], run["stdout"], run["stderr"])


_SENT = {"guest": guest, "values": values}
_NO_RESULT = Finished(status="no-result")


def _finished(code: Any, stdout: Any, stderr: Any) -> Finished:
    if not (isinstance(code, int) and isinstance(stdout, str) and isinstance(stderr or "", str)):
        raise TypeError("no exit code, or output that is no text")
    out = stdout.encode("utf-8", "surrogatepass")
    return Finished(status="ok", stdout=out) if code == 0 else ended_badly(stderr or "", f"exit code {code}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
