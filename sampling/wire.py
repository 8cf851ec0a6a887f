"""Calls to one sampling server over HTTP: JSON out, JSON in, a deadline for each, and bounded retries with back-off.

Whatever is wrong with the server or the way to it ends as `EngineLost`, because it may pass; what a server refuses is
`Refused`. The key, if there is one, comes from the environment, goes to this one host only (no redirects, and no proxy
to this machine), and is never logged.
"""

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from runtime.errors import UserError
from sampling.process import EngineLost

KEY_ENV = "SAMPLING_API_KEY"
"""Environment variable with the servers' key, for trainers and for `python -m sampling.serve`."""

ATTEMPTS = 4
"""How often a call is made that finds nobody, is cut off, or meets an error of the server."""

BACK_OFF = 0.5
"""Seconds before the second attempt; twice as many before each further one."""


class Refused(RuntimeError):
    """The server understood a call and won't do it; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine, by its name alone."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def read_key() -> str | None:
    """The servers' key, None if there is none. Raises UserError, never with the key in it."""
    key = os.environ.get(KEY_ENV, "").strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{KEY_ENV} holds something that can't be a key: use printable ASCII without spaces")
    return key or None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Wire:
    """One server's address, and how to talk to it."""

    def __init__(self, url: str, *, key: str | None) -> None:
        """url: http(s)://host:port. Raises UserError for one that can't be used."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise UserError(f"sampling.server_urls: {url!r} is no address of a server; give http://host:port")
        if parts.username or parts.password:
            raise UserError(f"sampling.server_urls: {parts.hostname!r} is given with a key; put it into {KEY_ENV}")
        if key is None and not is_loopback(parts.hostname):
            raise UserError(
                f"sampling.server_urls: {url!r} is another machine, and whoever reaches a server without a key can "
                f"replace its weights; start it with {KEY_ENV} set, and set it here"
            )
        self.url, self.host = url.rstrip("/"), parts.hostname
        self._key = key
        proxies = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname) else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def is_here(self) -> bool:
        """Whether the server is on this machine, by its address alone."""
        return is_loopback(self.host)

    def call(self, path: str, body: Any = None, *, limit: float, attempts: int = ATTEMPTS) -> Any:
        """The answer to a GET, or with a body to a POST, within `limit` seconds for all attempts together.

        Raises Refused for a 4xx, EngineLost for anything else that isn't an answer.
        """
        deadline = time.monotonic() + limit
        for attempt in range(1, attempts + 1):
            try:
                return self._once(path, body, deadline - time.monotonic())
            except urllib.error.HTTPError as error:
                fault = f"answered {error.code} to {path}: {self._excerpt(error)}"
                if error.code < 500 and error.code not in (408, 429):
                    raise Refused(error.code, f"{self.url} {fault}") from error
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out, no name
                fault = f"doesn't answer {path}: {error!r}"
            except ValueError as error:
                raise EngineLost(f"{self.url} answers {path} with something that is no JSON: {error}") from error
            wait = BACK_OFF * 2 ** (attempt - 1)
            if time.monotonic() + wait >= deadline:
                fault += f"; its {limit:.3g} s are over"
                break
            if attempt < attempts:
                time.sleep(wait)
        raise EngineLost(f"{self.url} {fault}")

    def _once(self, path: str, body: Any, seconds: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        with self._opener.open(request, timeout=max(seconds, 1e-3)) as response:
            content = response.read()
        return json.loads(content) if content else None

    def _excerpt(self, error: urllib.error.HTTPError) -> str:
        """The first words of an error's page, without the key."""
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return (text.replace(self._key, "***") if self._key else text)[:500]
