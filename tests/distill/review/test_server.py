"""The real command, asked over HTTP: who gets in, what is shown, what is on disk when it says so."""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.__main__ import main
from distill.review.log import Log

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(serve: Any) -> Any:
    return serve()


class Page(HTMLParser):
    """Elements with their attributes, and the text of those that have an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("input", "meta", "link", "img", "br"):
            self._open.append(dict(attrs).get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in self._open:
            self.texts[name] = self.texts.get(name, "") + data

    @property
    def main(self) -> dict[str, str | None]:
        return next(attrs for tag, attrs in self.elements if tag == "main")


def test_only_the_token_opens_it_and_then_a_cookie_does(server) -> None:
    for path in ("/", "/?token=", "/?token=wrong", "/?token=%ff", "/nowhere"):
        status, text, headers = server.ask(path, Cookie=None)
        assert (status, headers["Set-Cookie"]) == (403, None) and "Open the address that the command printed" in text
    assert server.ask(f"/?token={server.token}x")[0] == 403  # though the cookie is right
    status, _, headers = server.ask(f"/?token={server.token}", Cookie=None)
    assert status == 200
    assert headers["Set-Cookie"] == f"{server.cookie}; HttpOnly; Path=/; SameSite=strict"
    assert server.ask("/")[0] == 200 and server.ask("/", Cookie=f"review-{server.port}=x")[0] == 403
    assert len(server.token) >= 32
    assert server.decide(1, "accept")[0] == 200
    status, _, _ = server.ask("/decide", {}, Cookie=None)
    assert status == 403 and len(server.records()) == 1


def test_it_listens_on_loopback_only(server) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; finds the address of this machine
        outside = probe.getsockname()[0]
    with pytest.raises(OSError), socket.create_connection((outside, server.port), timeout=5):
        pass
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass


def test_host_must_be_its_own_exactly(server) -> None:
    port = server.port
    hosts = ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"127.0.0.1.evil:{port}",
             f"LOCALHOST:{port}", f"[::1]:{port}", f"127.0.0.1:{port},evil", None)  # fmt: skip
    for host in hosts:
        status, text, _ = server.ask(f"/?token={server.token}", Host=host)
        assert status in (400, 421) and "answer" not in text.replace("answers at", ""), host
    assert server.ask("/", Host=f"localhost:{port}")[0] == 200
    assert server.ask("/decide", {}, Host=f"localhost:{port}")[0] == 403  # Origin is the other name's
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil\r\nCookie: {server.cookie}\r\n\r\n".encode()
        )
        assert raw.recv(100).split()[1] in (b"400", b"421")


def test_origin_must_be_its_own_exactly(server) -> None:
    port = server.port
    origins = ("http://evil.example", f"https://127.0.0.1:{port}", f"http://localhost:{port}", "null", "", "http://127.0.0.1",
               f"http://127.0.0.1:{port}/", None)  # fmt: skip
    for origin in origins:
        assert server.ask("/decide", {}, Origin=origin)[0] == 403, origin
        assert server.ask("/undo", {}, Origin=origin)[0] == 403, origin
        assert server.ask("/", Origin=origin)[0] == (200 if origin is None else 403), origin
    assert server.ask("/decide", b"{}", Content_Type="text/plain")[0] == 415
    assert server.ask("/decide", {}, Content_Length="9000000")[0] == 413
    assert server.ask("/decide", b"2\r\n{}\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")[0] == 413
    assert server.records() == []


def test_every_answer_forbids_what_the_page_needs_not(server) -> None:
    nonces = set()
    for path, cookie in (("/?reviewer=ana", server.cookie), ("/?reviewer=ana", server.cookie), ("/", None)):
        _, text, headers = server.ask(path, Cookie=cookie)
        rules = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
        nonce = rules["script-src"]
        assert re.fullmatch(r"'nonce-[\w-]{20,}'", nonce) and rules["style-src"] == nonce
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
        assert headers["Referrer-Policy"] == "same-origin" and "uvicorn" not in str(headers)
        nonces.add(nonce)
        if cookie:
            scripts = [attrs for tag, attrs in Page(text).elements if tag in ("script", "style")]
            assert len(scripts) == 2 and {f"'nonce-{attrs['nonce']}'" for attrs in scripts} == {nonce}
    assert len(nonces) == 3
    for path in ("/docs", "/openapi.json", "/redoc", "/page.html.jinja", "/../queue.jsonl", "/%2e%2e/queue.jsonl"):
        assert server.ask(path)[0] == 404, path


def test_model_text_is_text_and_nothing_comes_from_elsewhere(server) -> None:
    _, text, _ = server.ask("/?reviewer=ana&row=2&state=all&q=%3Cscript%3E")
    page = Page(text)
    assert [tag for tag, _ in page.elements if tag in ("img", "iframe", "link")] == []
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.elements for name in attrs)
    hostile = server.queue.items[1].answer
    assert page.texts["answer"] == hostile.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert page.texts["editor"] == "\n" + hostile  # whose first line break a browser drops
    assert page.texts["row-id"] == "../../etc/passwd"
    urls = [attrs.get(name) or "" for _, attrs in page.elements for name in ("src", "href", "action") if name in attrs]
    assert all(url.startswith("/") and not url.startswith("//") for url in urls)
    assert "http://" not in text and "https://" not in text


def test_a_decision_leads_to_the_next_answer_of_the_view(server) -> None:
    status, said = server.decide(1, "accept", domain="writing", state="todo")
    assert status == 200
    query = dict(urllib.parse.parse_qsl(said["next"].removeprefix("/?")))
    assert query == {"reviewer": "ana", "domain": "writing", "row": "2", "saved": "1"}
    page = Page(server.ask(said["next"])[1])
    assert page.main["data-row"] == "2"
    assert page.texts["status"].startswith("Saved at ") and page.texts["status"].endswith(" UTC: poem/0 accepted.")
    assert page.texts["progress"] == "You: 1 of 4 · Together: 1 settled, 0 disputed"
    last = server.decide(2, "reject", domain="writing")[1]["next"]
    assert "row=" not in last and "No answer is in this view" in server.ask(last)[1]
    around = server.decide(4, "accept")[1]["next"]  # behind the last, the first that is left
    assert "row=3" in around
    finished = server.decide(3, "edit", text="x")[1]["next"]
    assert "You have decided on every answer" in server.ask(finished)[1]
    _, text, _ = server.ask("/undo", {"reviewer": "ana", "key": "u"})
    page = Page(server.ask(json.loads(text)["next"])[1])
    assert page.main["data-row"] == "3" and "qa/0 undone" in page.texts["status"]
    assert [record.action for record in server.records()] == ["accept", "reject", "accept", "edit", "undo"]


def test_others_are_heard_after_ones_own_decision_only(server) -> None:
    server.decide(1, "reject", "raj")
    before = server.ask("/?reviewer=ana&row=1")[1]
    assert "raj rejected" not in before and "You rejected this" not in before
    assert "Saved" not in Page(server.ask("/?reviewer=ana&row=1&saved=1")[1]).texts.get("status", "")  # that was raj's
    server.decide(1, "accept", "ana")
    after = server.ask("/?reviewer=ana&row=1")[1]
    assert "raj rejected it" in after and "You accepted this" in after
    assert "You rejected this" in server.ask("/?reviewer=raj&row=1")[1]


def test_the_same_submission_twice_is_saved_once(server) -> None:
    threads = [threading.Thread(target=server.decide, args=(1, "accept")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.records()) == 1
    for _ in range(2):
        assert server.ask("/undo", {"reviewer": "ana", "key": "u"})[0] == 200
    assert [record.action for record in server.records()] == ["accept", "undo"]
    status, text, _ = server.ask("/undo", {"reviewer": "ana", "key": "u2"})
    assert (status, json.loads(text)) == (400, {"error": "There is nothing left to undo."})


def test_what_makes_no_sense_is_refused_with_the_reason(server) -> None:
    refused: list[tuple[int, dict[str, Any], str]] = [
        (1, {"action": "edit", "text": " "}, "text: an edited answer has"),
        (1, {"action": "edit"}, "text: an edited answer has"),
        (1, {"action": "undo"}, "use accept, edit or reject"),
        (1, {"reviewer": "a\nb"}, "a name has 1 to 60 printable characters"),
        (1, {"digest": "0" * 16}, "not what this page shows"),
        (1, {"row": 2}, "not what this page shows"),
        (1, {"row": 0}, "not what this page shows"),
        (1, {"row": 5}, "not what this page shows"),
    ]
    for number, more, reason in refused:
        status, said = server.decide(number, more.pop("action", "accept"), **more)
        assert status == 400 and reason in said["error"], more
    for body in ([], {}, {"reviewer": "a"}, b"{", b'{"key": "\\ud800"}', {"row": "../1", "key": "k"}):
        assert server.ask("/decide", body)[0] == 422, body
    digest = server.queue.items[0].digest
    broken = {"row": 1, "digest": digest, "action": "edit", "reviewer": "ana", "key": "k", "text": "\ud800"}
    assert server.ask("/decide", broken)[0] in (400, 422)
    for path in ("/?row=../1&reviewer=a", "/?row=x&reviewer=a", "/?saved=x"):
        assert server.ask(path)[0] == 422
    for path in ("/?reviewer=a&row=99", "/?reviewer=a&state=../x", "/?reviewer=%0a", "/?reviewer=" + "x" * 61):
        status, text, _ = server.ask(path)
        assert status == 200 and 'role="alert"' in text and "data-row" not in text, path
    assert server.records() == []
    assert server.decide(1, "accept")[0] == 200


def test_named_reviewers_are_the_only_ones(serve) -> None:
    server = serve("--reviewer", "ana", "--reviewer", "Raj K")
    page = Page(server.ask("/")[1])
    assert [attrs["value"] for tag, attrs in page.elements if tag == "button"] == ["ana", "Raj K"]
    assert server.decide(1, "accept", "eve") == (400, {"error": "reviewer='eve': this review is for ana, Raj K"})
    assert server.ask("/undo", {"reviewer": "eve", "key": "u"})[0] == 400
    assert "data-row" not in server.ask("/?reviewer=eve")[1]
    assert server.decide(1, "accept", "Raj K")[0] == 200
    server.end(signal.SIGKILL)
    alone = serve("--reviewer", "ana")
    assert Page(alone.ask("/")[1]).main["data-reviewer"] == "ana"  # no need to ask


@pytest.mark.parametrize("where", ["before-write", "before-fsync", "saved"])
def test_a_kill_at_any_point_of_saving_loses_nothing_acknowledged(serve, where: str) -> None:
    server = serve(FAILPOINT=f"review/{where}:2")
    assert server.decide(1, "accept")[0] == 200
    with pytest.raises(OSError):  # killed while it saves: no answer
        server.decide(3, "edit", text="x", key="second")
    server.end()
    assert server.code == -signal.SIGKILL
    assert [record.number for record in server.records()][:1] == [1]
    again = serve()
    assert again.token != server.token
    status, _ = again.decide(3, "edit", text="x", key="second")  # as the page does when it is asked to try again
    assert status == 200
    assert [(record.row, record.action) for record in again.records()] == [("poem/0", "accept"), ("qa/0", "edit")]


def test_a_full_disk_is_said_and_the_review_goes_on(serve) -> None:
    server = serve()
    limit = server.queue.log_path.stat().st_size + 100
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    status, said = server.decide(1, "accept")
    assert status == 507 and "Not saved: " in said["error"] and "ulimit -f" in said["error"]
    assert "0 settled" in server.ask("/?reviewer=ana")[1]
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert server.decide(1, "accept")[0] == 200
    assert len(server.records()) == 1


def test_the_command_says_where_and_how_it_ended(serve, queue, capsys) -> None:
    server = serve()
    assert server.said[0] == f"4 rows to review; decisions go to {queue.log_path}\n"
    assert f"ssh -L {server.port}:127.0.0.1:{server.port}" in server.said[-1]
    server.decide(1, "accept")
    assert main(["review", str(queue.path), "--port", "0"]) == 2
    assert "another process has it open" in capsys.readouterr().err
    assert server.end(signal.SIGINT) == "\n1 of 4 rows settled, 0 disputed\n" and server.code == 0
    changed = queue.path.read_text().replace("Snow", "Sleet")
    queue.path.write_text(changed)
    assert any("1 earlier decisions were about other texts" in line for line in serve().said)


def test_it_starts_as_a_command(queue) -> None:
    command = [sys.executable, "-m", "distill", "review", str(queue.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(line.split()[1] for line in process.stdout if line.startswith("open "))
        with urllib.request.urlopen(address) as page:
            assert page.status == 200 and b"What is your name?" in page.read()
        process.terminate()
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_queue_or_port_that_cannot_be_had_is_named(queue, tmp_path: Path, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["review", str(queue.path), "--port", str(port)]) == 2
        assert f"port={port}: " in (said := capsys.readouterr().err) and "use --port 0" in said
    assert main(["review", str(queue.path), "--port", "70000"]) == 2
    assert main(["review", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    with Log(queue.log_path) as log:
        assert log.records == []
