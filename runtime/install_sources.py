"""pip's configuration in, the same package sources as uv's options out; uv reads no pip configuration itself.

Read: index-url, extra-index-url, find-links, no-index, trusted-host, cert, proxy and timeout, from pip's
files and from the environment. Left out: client certificates and keyrings. Standard library only.
"""

from __future__ import annotations

import ast
import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PipSources:
    """Where pip's configuration looks for packages; empty fields are pip's defaults."""

    index_url: str = ""
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    no_index: bool = False
    cert: str = ""
    proxy: str = ""
    timeout: str = ""

    @property
    def has_packages(self) -> bool:
        """Does it name any place of its own?"""
        return bool(self.index_url or self.extra_index_urls or self.find_links or self.no_index)

    def uv_arguments(self) -> list[str]:
        """The same places as options. As in pip, all places are equal and the best version wins."""
        arguments = ["--index-strategy", "unsafe-best-match"]
        arguments += ["--no-index"] if self.no_index else []
        arguments += ["--index-url", self.index_url] if self.index_url else []
        for option, values in (
            ("--extra-index-url", self.extra_index_urls),
            ("--find-links", self.find_links),
            ("--allow-insecure-host", self.trusted_hosts),
        ):
            for value in values:
                arguments += [option, value]
        return arguments

    def uv_environment(self) -> dict[str, str]:
        """This process's environment plus what uv takes only from there; a variable the user set wins."""
        wanted = {
            "SSL_CERT_FILE": self.cert,
            "HTTPS_PROXY": self.proxy,
            "HTTP_PROXY": self.proxy,
            "UV_HTTP_TIMEOUT": self.timeout,
        }
        return {name: value for name, value in wanted.items() if value} | dict(os.environ)


def parse_pip_config(listing: str) -> PipSources:
    """Read `pip config list`: lines such as `global.find-links='/a /b'` or `:env:.cert='/c'`.

    As in pip, `install.` goes over `global.`, the environment over both, and an empty value changes nothing.
    """
    rank = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.([\w-]+)=(.*)", line.strip())
        if not match:
            continue
        section, name, quoted = match.groups()
        name = name.replace("_", "-").replace("default-timeout", "timeout")
        value = str(ast.literal_eval(quoted)).strip()
        if value and rank[section] >= found.get(name, (0, ""))[0]:
            found[name] = (rank[section], value)

    def option(name: str) -> str:
        return found.get(name, (0, ""))[1]

    return PipSources(
        index_url=option("index-url"),
        extra_index_urls=tuple(option("extra-index-url").split()),
        find_links=tuple(option("find-links").split()),
        trusted_hosts=tuple(option("trusted-host").split()),
        no_index=option("no-index").lower() in ("1", "true", "yes", "on"),
        cert=option("cert"),
        proxy=option("proxy"),
        timeout=option("timeout"),
    )


def hide_credentials(text: str) -> str:
    """Blank out user:password in addresses, so that a printed command can be pasted anywhere."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
