"""Chat requests in, replies out: what a judge needs of a generative model, and any OpenAI-compatible server as one.

A reply is a text or the reason why there is none: a server that is out, slow or confused never raises here, and never
costs more than `time_limit`. The key comes from the environment or from a file nobody else can read, goes to this one
host only (no redirects, HTTPS unless it is this machine), and is never logged. Left out: streaming; a sampler in this
process (rl/judge.py).
"""

import functools
import http.client
import ipaddress
import json
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

MAX_REPLY_BYTES = 1 << 24
RETRIED = (408, 409, 425, 429)
"""HTTP statuses that may pass, besides 5xx."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to a generative model."""

    system: str
    """What it is to do."""
    user: str
    """What it is to do it with."""
    seed: int
    """Of its sampling, below 2^31."""
    schema: Mapping[str, Any] | None = None
    """JSON schema the reply must follow, for backends that can guide the decoding; others pass it over."""
    regex: str | None = None
    """The same, for backends that take a regular expression: it also fixes the white space."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back."""

    text: str | None
    """None: nothing that could be read; `error` says why."""
    cut: bool = False
    """It ended at the token limit."""
    error: str = ""
    """For people, without the key."""


Generate = Callable[[Sequence[Request]], Sequence[Reply]]
"""One reply for each request, in order."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind an OpenAI-compatible /chat/completions: vLLM, SGLang, a provider."""

    url: str
    """Base URL with its version, such as http://127.0.0.1:8000/v1. HTTPS, unless it is this machine."""
    model: str
    """Its name there."""
    key_env: str | None = None
    """Environment variable that holds the key."""
    key_file: str | None = None
    """File that holds the key, readable by its owner alone (chmod 600)."""
    temperature: float = 0.6
    """Of the sampling. Several votes need more than 0."""
    max_tokens: int = 2048
    """Longest reply. A judgement that doesn't end in it doesn't count."""
    guided: Literal["json_schema", "vllm", "off"] = "json_schema"
    """How the server holds the reply to its form. json_schema: `response_format`, which most servers know. vllm: vLLM's
    `structured_outputs`, which leaves no white space free; in that small models get lost (the tiny one always)."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout: float = 60.0
    """Seconds for one attempt."""
    retries: int = 3
    """More attempts after a connection error, a 429 or a 5xx, after 0.5, 1, 2, ... seconds or what the server asks."""
    time_limit: float = 240.0
    """Seconds for all requests of one call; what isn't answered by then is unknown. Keep GRPO's reward_time_limit above
    it."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={self.url!r}: give http(s)://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"url={parts.hostname!r}: holds more than scheme, host and path; a key goes into key_env")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError(f"url={self.url!r}: plain http goes to this machine only; use https")
        if self.key_env and self.key_file:
            raise ValueError(f"key_env={self.key_env!r}, key_file={self.key_file!r}: give one of them")
        for name in ("max_tokens", "concurrency", "timeout", "time_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        for name in ("temperature", "retries"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: can't be negative")


def connect(endpoint: Endpoint) -> Generate:
    """A backend for this server; nothing is sent yet. Raises ValueError for a key that is absent or unguarded."""
    return functools.partial(_complete, endpoint, read_key(endpoint))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(endpoint: Endpoint) -> str | None:
    """The key, None if there is to be none. Raises ValueError, never with the key in it."""
    if endpoint.key_env:
        key = os.environ.get(endpoint.key_env, "")
        where = f"key_env={endpoint.key_env!r}"
    elif endpoint.key_file:
        key = _read_guarded(endpoint.key_file)
        where = f"key_file={endpoint.key_file!r}"
    else:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{where}: holds no key" if not key else f"{where}: holds something that can't be a key")
    return key


def _read_guarded(path: str) -> str:
    try:
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NOFOLLOW)  # noqa: PTH111 (as it is opened)
    except OSError as error:
        raise ValueError(f"key_file={path!r}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_mode & 0o077:
            raise ValueError(f"key_file={path!r}: others may read it; run: chmod 600 {path}")
        return file.read(1 << 16).decode("utf-8", "replace")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry key and texts to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _complete(endpoint: Endpoint, key: str | None, requests: Sequence[Request]) -> list[Reply]:
    """Ask for all, `concurrency` at a time."""
    deadline = time.monotonic() + endpoint.time_limit
    host = urlsplit(endpoint.url).hostname or ""
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(host) else []  # a proxy is no part of this machine
    opener = urllib.request.build_opener(_NoRedirect, *proxies)
    ask = functools.partial(_ask, endpoint, key, opener, deadline)
    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        return list(pool.map(ask, requests))


def _ask(
    endpoint: Endpoint, key: str | None, opener: urllib.request.OpenerDirector, deadline: float, request: Request
) -> Reply:
    error = "time limit: not tried"
    for attempt in range(endpoint.retries + 1):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            answer = _post(endpoint, key, opener, request, min(endpoint.timeout, left))
            return _read(answer)
        except urllib.error.HTTPError as failure:
            error = f"HTTP {failure.code}: {_excerpt(failure, key)}"
            if failure.code < 500 and failure.code not in RETRIED:
                break
            wait = _seconds(failure.headers.get("Retry-After"), 0.5 * 2**attempt)
        except (OSError, http.client.HTTPException) as failure:  # refused, reset, timed out, no name, bad certificate
            error = f"{type(failure).__name__}: {failure}"[:200]
            wait = 0.5 * 2**attempt
        except (ValueError, LookupError, TypeError, RecursionError) as failure:
            error = f"not a chat completion: {type(failure).__name__}"
            break
        if attempt < endpoint.retries:
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
    return Reply(text=None, error=error if key is None else error.replace(key, "***"))


def _post(
    endpoint: Endpoint, key: str | None, opener: urllib.request.OpenerDirector, request: Request, seconds: float
) -> Any:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": request.messages,
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
        "seed": request.seed,
    }
    if endpoint.guided == "vllm" and request.regex:
        body["structured_outputs"] = {"regex": request.regex}
    elif endpoint.guided == "json_schema" and request.schema:
        schema = {"name": "reply", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    post = urllib.request.Request(url, json.dumps(body).encode(), headers)
    until = time.monotonic() + seconds
    with opener.open(post, timeout=seconds) as response:
        content = bytearray()
        while part := response.read1(1 << 16):  # the timeout is of one wait: a server that drips would never meet it
            content += part
            if len(content) > MAX_REPLY_BYTES:
                raise ValueError("a reply without end")
            if time.monotonic() > until:
                raise TimeoutError(f"no whole reply in {seconds:g} s")
    return json.loads(content)


def _read(answer: Any) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("content is no text")
    return Reply(text=text, cut=choice["finish_reason"] == "length")


def _seconds(asked: str | None, otherwise: float) -> float:
    try:
        return min(max(float(asked or otherwise), 0.0), 60.0)
    except ValueError:  # a date
        return otherwise


def _excerpt(failure: urllib.error.HTTPError, key: str | None) -> str:
    """The start of what the server says, in one line: it may quote what a model said, or the key."""
    try:
        said = failure.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    return ascii(said.replace(key, "***") if key else said)[1:-1][:200]
