"""The real server, asked over HTTP: who gets in, what it shows, what is on disk when it is killed."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.__main__ import main
from distill.review.decisions import load_decisions
from distill.review.queue import load_queue

pytest.importorskip("fastapi", reason="needs the extra `review`")
ROOT = Path(__file__).parents[3]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    rows = [
        {"id": f"../{i}", "domain": "talk", "messages": [
            {"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"{HOSTILE} answer {i}"},
        ]} for i in range(3)
    ]  # fmt: skip
    path = tmp_path / "review.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server(queue: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "distill", "review", str(queue), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(line.split()[1] for line in process.stdout if line.startswith("open"))
        try:
            yield process, address
        finally:
            process.kill()


def ask(address: str, *, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    if body is not None:
        headers = {"Content-Type": "application/json", "Origin": re.match(r"http://[^/]+", address)[0], **headers}  # type: ignore[index]
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_lets_in_whoever_has_the_token_and_shows_text_as_text(server) -> None:
    _, address = server
    status, page = ask(f"{address}&reviewer=Ann")
    assert status == 200 and "Question 0?" in page
    assert HOSTILE not in page and "&lt;img src=x onerror" in page
    assert ask(address.split("?")[0])[0] == 403
    assert ask(address, Host="evil.example")[0] == 421
    assert ask(address.replace("/?", "/decide?"), body={}, Origin="http://evil.example")[0] == 403


def test_a_decision_that_is_acknowledged_outlives_a_kill(server, queue: Path) -> None:
    process, address = server
    decision = {
        "reviewer": "Ann",
        "row": 1,
        "digest": load_queue(queue).items[0].digest,
        "action": "accept",
        "key": "k1",
    }
    for _ in range(2):  # the same submission again is the same decision
        status, said = ask(address.replace("/?", "/decide?"), body=decision)
        assert status == 200, said
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = queue.with_name("review.jsonl.decisions.jsonl").read_text().splitlines()
    assert len(log) == 1
    assert load_decisions(queue)["../0"].accepted


def test_exports_hold_what_was_decided(queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(queue), "--to", "argilla", str(tmp_path / "out.json")]) == 0
    assert "Question 0?" in (tmp_path / "out.json").read_text()
    assert main(["review", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
