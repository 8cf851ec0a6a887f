"""What anything that runs programs offers and answers: this machine's jail (local.py) or a service (remote.py).

Left out: whether what came out is right (judge.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rewards.sandbox.judge import canonical
from rewards.sandbox.limits import Limits


class SandboxFault(Exception):
    """The sandbox, not the program, failed: nobody can say how the program ends. `reason` is a verdict's."""

    reason = "sandbox-fault"


class SandboxUnavailable(SandboxFault):
    """This machine can't isolate a program; the text says which layer is missing and what would help."""

    reason = "sandbox-unavailable"

    def __init__(self, layer: str, why: str) -> None:
        super().__init__(f"{layer}: {why}")
        self.layer, self.why = layer, why


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of one program."""

    status: str
    """`ok`, `runtime-error`, `time-limit`, `memory-limit`, `output-limit`, `no-result` (it left without one),
    `failed-check`, `bad-check` (the test code is at fault), `hack/eq-override` or `hack/bad-result`."""
    stdout: bytes = b""
    """All of it, if the status is `ok`."""
    detail: str = ""
    """For people, without control characters: the end of standard error, or what was wrong with a result."""
    value: Any = None
    """Of a call: its result as rewards/sandbox/values.py encodes it; of one that raised, the exception and its text."""


class Backend(Protocol):
    """Where programs run. Every method raises SandboxFault if it can't say how the program ended."""

    def run(self, program: str, stdin: str, limits: Limits) -> Finished:
        """Run it as the main program, with `stdin` on standard input."""

    def call(
        self, program: str, function: str, args: Sequence[Any], kwargs: Mapping[str, Any], limits: Limits
    ) -> Finished:
        """Call one of its functions, with plain values."""

    def check(self, program: str, test: str, names: Sequence[str], entry_point: str | None, limits: Limits) -> Finished:
        """Run test code apart from it; `names`, and check's `candidate`, are there the program's functions.

        `names` are those that the test code uses and does not define; `entry_point` is what `check` is given.
        """


def read_answer(data: bytes) -> Finished:
    """What guest.py answered to a call, or what a candidate put in its place: only a value counts as one."""
    try:
        match json.loads(data):
            case {"value": value}:
                canonical(value, exact=False)  # raises ValueError unless it is one
                return Finished(status="ok", value=value)
            case {"refused": str(text), "overrides": overrides}:
                return Finished(status="hack/eq-override" if overrides else "runtime-error", detail=printable(text))
            case {"error": "MemoryError"}:
                return Finished(status="memory-limit")
            case {"error": str(kind), "text": str(text)}:
                return Finished(status="runtime-error", value=[kind, text], detail=printable(f"{kind}: {text}"))
    except (ValueError, RecursionError):
        pass
    return Finished(status="hack/bad-result", detail="what came back is no result")


def ended_badly(stderr: str, otherwise: str) -> Finished:
    """Of a program with another exit code than 0, by the last line that it wrote."""
    out_of_memory = stderr.rstrip().rpartition("\n")[2].startswith("MemoryError")
    return Finished(status="memory-limit" if out_of_memory else "runtime-error", detail=printable(stderr) or otherwise)


def printable(text: str) -> str:
    """Hostile text for a terminal or a log: its end, without control characters."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[-2000:])
