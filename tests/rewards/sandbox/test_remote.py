"""The HTTP backends against real servers on loopback, which run what they get in the local sandbox."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards.code_tests import grade_code
from rewards.sandbox.limits import Limits
from rewards.sandbox.local import Sandbox
from rewards.sandbox.remote import Piston, SandboxFusion

LIMITS = Limits(wall_seconds=2.0)
RIGHT = {"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": "1", "stderr": ""}}
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextmanager
def server(answer: Answer, seen: list[str] | None = None) -> Iterator[str]:
    """A service on loopback; `answer` maps path and request to a status and a body (JSON, or bytes as they are)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append(self.path)

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if seen is not None:
                seen.append(text)
            status, body = answer(self.path, json.loads(text))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def local() -> Iterator[Sandbox]:
    with Sandbox(1) as sandbox:
        yield sandbox


def fusion(local: Sandbox) -> Answer:
    def answer(path: str, request: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/run_code" and request["language"] == "python"
        done = local.run(request["code"], request["stdin"], LIMITS)
        status = "TimeLimitExceeded" if done.status == "time-limit" else "Finished"
        code = 0 if done.status == "ok" else 1
        result = {"status": status, "return_code": code, "stdout": done.stdout.decode(), "stderr": done.detail}
        return 200, {"status": "Failed" if code else "Success", "message": "", "run_result": result}

    return answer


def piston(local: Sandbox) -> Answer:
    def answer(path: str, request: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/api/v2/execute" and request["run_timeout"] > 0
        done = local.run(request["files"][0]["content"], request["stdin"], LIMITS)
        late = done.status == "time-limit"
        code = None if late else int(done.status != "ok")
        run = {
            "stdout": done.stdout.decode(),
            "stderr": done.detail,
            "code": code,
            "signal": "SIGKILL" if late else None,
        }
        return 200, {"language": "python", "version": "3.12.0", "run": run}

    return answer


@pytest.mark.parametrize(("service", "backend"), [(fusion, SandboxFusion), (piston, Piston)])
def test_programs_and_calls_are_graded_over_http(service: Any, backend: Any, local: Sandbox) -> None:
    seen: list[str] = []

    def reason(code: str, *tests: dict[str, Any]) -> str:
        return grade_code(f"```python\n{code}\n```", tests, sandbox=remote, limits=LIMITS).reason

    with server(service(local), seen) as url:
        remote = backend(url)
        assert reason("print(int(input()) + 1)", {"input": "3\n", "output": "4711"}) == "wrong-output"
        assert reason("print(int(input()) + 1)", {"input": "3\n", "output": "4"}) == "passed"
        assert reason("1 / 0", {"input": "", "output": ""}) == "runtime-error"
        assert reason("x = bytearray(10**12)", {"input": "", "output": ""}) == "memory-limit"
        assert reason("while True: pass", {"input": "", "output": ""}) == "time-limit"
        double = "print('noise', end='')\ndef double(x):\n    return 2 * x"
        assert reason(double, {"call": "double", "args": [21], "output": 42}) == "passed"
        assert reason(double, {"assert": "assert double((1,)) == (1, 1)"}) == "passed"
        assert reason(double, {"call": "double", "args": [1], "output": 4711}) == "wrong-output"
        sly = "class A:\n    def __eq__(self, o): return True\ndef double(x):\n    return A()"
        assert reason(sly, {"call": "double", "args": [1], "output": 2}) == "hack/eq-override"
        assert reason("import os; os._exit(0)", {"call": "double", "output": 2}) == "wrong-output"
        assert reason(double, {"assert": "assert abs(double(1) - 2) < 1e-6"}) == "tests-unusable"
    assert all("4711" not in text for text in seen)


@pytest.mark.parametrize(
    "answer",
    [
        (500, {}),
        (429, {}),
        (200, b"<html>"),
        (200, b"[" * 100_000),
        (200, []),
        (200, {"status": "SandboxError", "message": "no room"}),
        (200, {"status": "Success"}),
        (200, {"status": "Success", "run_result": {"status": "Error"}}),
        (
            200,
            {"status": "Success", "run_result": {"status": "Finished", "return_code": "0", "stdout": 1, "stderr": ""}},
        ),
        (200, json.dumps(RIGHT).encode() + b" " * 100_000),
    ],
    ids=lambda answer: f"{answer[0]} {str(answer[1])[:40]}",
)
def test_an_outage_is_unknown_and_tried_twice(answer: tuple[int, Any]) -> None:
    seen: list[str] = []
    with server(lambda *_: answer, seen) as url:
        limits = Limits(output_bytes=1000)
        verdict = grade_code("print(1)", [{"input": "", "output": "1"}], sandbox=SandboxFusion(url), limits=limits)
    assert (verdict.outcome, verdict.reason, verdict.score) == ("unknown", "sandbox-outage", None)
    assert len(seen) == 2


def test_one_failure_is_forgiven(local: Sandbox) -> None:
    answers = iter([lambda *_: (503, {}), fusion(local)])
    with server(lambda path, request: next(answers)(path, request)) as url:
        assert grade_code("print(1)", [{"input": "", "output": "1"}], sandbox=SandboxFusion(url)).score == 1.0


def test_nobody_at_the_address_is_an_outage() -> None:
    with server(lambda *_: (500, {})) as url:
        pass
    assert grade_code("print(1)", [{"input": "", "output": "1"}], sandbox=Piston(url)).reason == "sandbox-outage"


def test_a_redirect_is_not_followed() -> None:
    elsewhere: list[str] = []
    with (
        server(lambda *_: (200, {}), elsewhere) as other,
        server(lambda *_: (302, f"{other}/run_code".encode())) as url,
    ):
        verdict = grade_code("print(1)", [{"input": "", "output": "1"}], sandbox=SandboxFusion(url))
    assert verdict.reason == "sandbox-outage" and elsewhere == []


def test_only_https_leaves_this_machine() -> None:
    for url in ("http://example.com", "http://10.0.0.1:8080", "ftp://localhost", "file:///tmp", "localhost:8080"):
        with pytest.raises(ValueError, match="https"):
            SandboxFusion(url)
    for url in ("https://example.com", "http://localhost:1", "http://[::1]:1", "http://127.0.0.1:1/"):
        SandboxFusion(url)
