"""What tests of the review share: a queue, and its server as a command that can be killed and asked."""

import asyncio
import http.client
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.__main__ import main
from distill.review.log import Record, read_log
from distill.review.queue import Queue, load_queue

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> \u202e\x1b {{7*7}} "
    "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}"
)


def row(name: str, domain: str, question: str, answer: str) -> dict[str, Any]:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "domain": domain, "messages": talk}


ROWS = [
    row("poem/0", "writing", "A line about snow?", "Snow is\nwhite."),
    row("../../etc/passwd", "writing", "Dinner?", HOSTILE),
    row("qa/0", "qa", "Who wrote Middlemarch?", "George Eliot."),
    row("qa/1", "qa", "Capital of Australia?", "Canberra."),
]


@pytest.fixture
def queue_file(tmp_path: Path) -> Path:
    path = tmp_path / "queue.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def queue(queue_file: Path) -> Queue:
    return load_queue(queue_file)


class Server:
    """`python -m distill review QUEUE`, in a process of its own: a fork of this one, which has paid for the imports."""

    def __init__(self, queue: Queue, *options: str, **environment: str) -> None:
        self.queue = queue
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            asyncio.events._set_running_loop(None)  # Playwright's, in tests with a browser: it stays behind
            os.dup2(write, 1)
            sys.stdout = os.fdopen(1, "w")
            os.environ.update(environment)
            code = 1
            try:
                code = main(["review", str(queue.path), "--port", "0", *options])
                sys.stdout.flush()
            finally:
                os._exit(code)
        os.close(write)
        self.code: int | None = None
        self._output = os.fdopen(read)
        self.said = [next(self._output)]
        while not self.said[-1].startswith("elsewhere"):
            self.said.append(next(self._output))
        self.address = next(line for line in self.said if line.startswith("open")).split()[1]
        self.port, self.token = int(self.address.split(":")[2].split("/")[0]), self.address.split("token=")[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.cookie = f"review-{self.port}={self.token}"

    def ask(self, path: str, body: Any = None, **headers: str | None) -> tuple[int, str, http.client.HTTPMessage]:
        """Status, text, headers. By default as a page of the server asks; a header that is None is left out."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        if data is not None:
            sent |= {"Origin": self.origin, "Content-Type": "application/json", "Content-Length": str(len(data))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[dict-item]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest("POST" if data is not None else "GET", path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text, reply.headers

    def decide(self, number: int, action: str, reviewer: str = "ana", **more: Any) -> tuple[int, dict[str, Any]]:
        """What the page sends for a decision on a row, and what it gets."""
        digest = self.queue.items[number - 1].digest
        body = {"row": number, "digest": digest, "action": action, "reviewer": reviewer, "key": f"{number} {action}"}
        status, text, _ = self.ask("/decide", {**body, **more})
        return status, json.loads(text)

    def records(self) -> list[Record]:
        """What is on disk."""
        return read_log(self.queue.log_path)

    def end(self, signum: signal.Signals | None = None) -> str:
        """Send it a signal, if any, and wait for its end, which is in `code`; returns what it said by then."""
        if self.code is not None:
            return ""
        if signum is not None:
            os.kill(self.pid, signum)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with self._output:
            return self._output.read()


@pytest.fixture
def serve(queue: Queue) -> Iterator[Callable[..., Server]]:
    """Starts servers; they are gone when the test is."""
    pytest.importorskip("fastapi", reason="needs the extra `review`")
    servers: list[Server] = []

    def start(*options: str, **environment: str) -> Server:
        servers.append(Server(queue, *options, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.end(signal.SIGKILL)
