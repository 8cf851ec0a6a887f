"""A server that is out, slow or hostile costs a bounded time and never an exception; the key goes to it alone."""

import http.server
import json
import logging
import threading
import time

import pytest

from rewards.model_based.backends import Endpoint, Request, connect

REQUEST = Request(system="s", user="u", seed=7, schema={"type": "object"}, regex="[a-z]+")
DONE = json.dumps({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
KEY = "sk-canary-1234567890"


@pytest.fixture
def server():
    """A server on loopback whose answers, (status, headers, body), are taken from `.script`; the last one repeats."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.body = body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            with lock:
                server.seen.append((self.path, dict(self.headers), body))
                answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
                server.busy += 1
                server.most_busy = max(server.most_busy, server.busy)
            try:
                if callable(answer):
                    return answer(self)
                status, headers, text = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            finally:
                with lock:
                    server.busy -= 1

        do_GET = do_POST

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.seen, server.busy, server.most_busy = [(200, {}, DONE)], [], 0, 0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, *, count=1, **options):
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", **options)
    return connect(endpoint)([REQUEST] * count)


def test_request_is_a_chat_completion_with_its_schema(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (reply,) = ask(server, key_env="JUDGE_KEY", temperature=0.5, max_tokens=9)
    assert (reply.text, reply.cut, reply.error) == ("hello", False, "")
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "temperature": 0.5, "max_tokens": 9, "seed": 7,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": {"type": "object"}},
        },
    }  # fmt: skip


def test_no_key_no_schema_unless_asked_for(server):
    ask(server, guided="off")
    ((_, headers, body),) = server.seen
    assert "Authorization" not in headers and not {"response_format", "structured_outputs"} & set(body)


def test_vllms_own_guidance_is_a_regular_expression(server):
    ask(server, guided="vllm")
    ((_, _, body),) = server.seen
    assert body["structured_outputs"] == {"regex": "[a-z]+"} and "response_format" not in body


def test_cut_reply_says_so(server):
    server.script = [(200, {}, DONE.replace("stop", "length"))]
    assert ask(server)[0].cut


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_tried_again(server, status):
    server.script = [(status, {"Retry-After": "0"}, "busy"), (200, {}, DONE)]
    assert ask(server)[0].text == "hello" and len(server.seen) == 2


def test_retries_end(server):
    server.script = [(503, {"Retry-After": "0"}, "busy")]
    (reply,) = ask(server, retries=2)
    assert reply.text is None and reply.error == "HTTP 503: busy" and len(server.seen) == 3


def test_refusals_are_not_tried_again(server):
    server.script = [(400, {}, "no such model")]
    assert ask(server)[0].error == "HTTP 400: no such model" and len(server.seen) == 1


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", "nonsense", '{"choices": []}', "[" * 100_000,
     '{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
     '{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}'],
)  # fmt: skip
def test_what_is_no_chat_completion_is_no_reply(server, body):
    server.script = [(200, {}, body)]
    (reply,) = ask(server)
    assert reply.text is None and reply.error.startswith("not a chat completion") and len(server.seen) == 1


def test_endless_reply_is_left(server):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" " * (1 << 20))
        except OSError:
            pass

    server.script = [endless]
    assert ask(server)[0].error == "not a chat completion: ValueError"


def test_server_that_hangs_or_drips_costs_its_time_limit_once(server):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    for behaviour in (drip, lambda handler: time.sleep(3)):
        server.script = [behaviour]
        began = time.monotonic()
        replies = ask(server, count=6, concurrency=2, timeout=0.3, time_limit=0.8)
        assert time.monotonic() - began < 5  # without limits, 9 and 15
        assert all(reply.text is None and reply.error for reply in replies)
        assert replies[-1].error == "time limit: not tried"


def test_nobody_listening_is_no_reply():
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", retries=1)
    (reply,) = connect(endpoint)([REQUEST])
    assert reply.text is None and "refused" in reply.error


def test_no_more_at_once_than_allowed_and_replies_in_order(server):
    def echo(handler):
        time.sleep(0.05)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(DONE.replace("hello", str(handler.body["seed"])).encode())

    server.script = [echo]
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", concurrency=3)
    replies = connect(endpoint)([Request(system="", user="", seed=i) for i in range(12)])
    assert [reply.text for reply in replies] == [str(i) for i in range(12)]
    assert 1 < server.most_busy <= 3


@pytest.mark.parametrize("status", [301, 302, 307])
def test_redirect_takes_key_and_text_nowhere(server, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.script = [(status, {"Location": f"http://127.0.0.1:{server.server_port}/elsewhere"}, "")]
    (reply,) = ask(server, key_env="JUDGE_KEY")
    assert reply.error.startswith(f"HTTP {status}") and [path for path, _, _ in server.seen] == ["/v1/chat/completions"]


def test_proxy_of_the_environment_is_no_part_of_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(server)[0].text == "hello"


def test_key_is_never_shown(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", key_env="JUDGE_KEY", retries=0)
    for status in (401, 503):
        server.script = [(status, {}, f"bad key {KEY}")]
        (reply,) = connect(endpoint)([REQUEST])
        assert reply.error == f"HTTP {status}: bad key ***"
    server.script = [(401, {}, "." * 190 + KEY)]  # quoted where the excerpt ends
    assert connect(endpoint)([REQUEST])[0].error == "HTTP 401: " + "." * 190 + "***"
    assert KEY not in repr(endpoint) + caplog.text


def test_key_file_is_read_only_where_nobody_else_can(tmp_path, server):
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    ask(server, key_file=str(file))
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    file.chmod(0o640)
    with pytest.raises(ValueError, match=r"key_file=.*others may read it; run: chmod 600"):
        ask(server, key_file=str(file))
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ValueError, match="key_file="):
        ask(server, key_file=str(tmp_path / "link"))
    with pytest.raises(ValueError, match=r"key_file=.*No such file"):
        ask(server, key_file=str(tmp_path / "none"))
    assert len(server.seen) == 1


@pytest.mark.parametrize("value", ["", "  ", "a b", "a\r\nX-Evil: 1", "ключ"])
def test_what_can_not_be_a_key_is_refused_unshown(value, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="key_env='JUDGE_KEY': holds") as refusal:
        connect(Endpoint(url="http://127.0.0.1:9/v1", model="m", key_env="JUDGE_KEY"))
    assert not value.strip() or value not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/v1", "plain http goes to this machine only"),
        ("http://127.0.0.1.example.com/v1", "plain http goes to this machine only"),
        ("http://localhost.example.com/v1", "plain http goes to this machine only"),
        ("ftp://127.0.0.1/v1", r"give http\(s\)://host/v1"),
        ("file:///etc/passwd", r"give http\(s\)://host/v1"),
        ("https://user:secret@example.com/v1", "holds more than scheme, host and path"),
        ("https://example.com/v1?key=secret", "holds more than scheme, host and path"),
    ],
)
def test_url_that_would_leak_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Endpoint(url=url, model="m")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["https://example.com/v1", "http://localhost:1/v1", "http://[::1]:1/v1", "http://127.9.9.9/v1"]
)
def test_https_and_this_machine_are_fine(url):
    Endpoint(url=url, model="m")


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"timeout": 0}, {"time_limit": float("nan")}, {"retries": -1}, {"concurrency": 0}]
)
def test_numbers_that_can_not_work_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Endpoint(url="https://example.com/v1", model="m", **wrong)
