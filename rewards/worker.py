"""Calls in, values out, in a child process: `python -m rewards.worker PARENT_PID` runs one reward function.

A frame is an 8-byte big-endian length and a payload. Parent to child (file descriptor 0) is cloudpickle:
first `{"sys_path", "function"}`, where function is a name for `rewards.resolve` or a pickled callable, then
one `{"rows", "step", "arguments"}` per call. Child to parent (file descriptor 1) is JSON only, so that
whatever reward code does here, the parent never unpickles it. What the function prints goes to stderr.

It is a boundary for time and crashes, not a sandbox: the reward is the user's own code. The parent's side is
rewards/process.py.
"""

import asyncio
import ctypes
import inspect
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, BinaryIO

HEADER = struct.Struct(">Q")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read the function, then answer calls until the parent closes the pipe."""
    _die_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crashing reward should not fill the disk with cores
    requests, replies = _take_over_pipes()
    import cloudpickle

    hello = cloudpickle.loads(_read(requests))
    try:
        sys.path[:] = hello["sys_path"]
        function = _load(hello["function"])
    except Exception as error:  # user code runs on import and unpickling, and may raise anything
        _write(replies, json.dumps({"error": _describe(error)}))
        return
    _write(replies, json.dumps({"ready": True}))
    while frame := _read(requests):
        try:
            call = cloudpickle.loads(frame)
            reply = json.dumps(_call(function, **call), default=repr)
        except Exception as error:  # the reward is user code and may raise anything
            reply = json.dumps({"error": f"raised {_describe(error)}"})
        _write(replies, reply)


def _call(function: Any, *, rows: int, step: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call the function as TRL's trainer does; a value that is no finite number becomes text saying so."""
    metrics: dict[str, list[float]] = {}
    columns: dict[str, list[Any]] = {}
    result = function(
        **arguments,
        trainer_state=SimpleNamespace(global_step=step),
        log_metric=lambda name, value: metrics.setdefault(str(name), []).append(float(value)),
        log_extra=lambda column, values: columns.setdefault(str(column), []).extend(values),
    )
    if inspect.isawaitable(result):  # TRL also takes async functions
        result = asyncio.run(_wait(result))
    if result is None or isinstance(result, str | bytes | dict):
        return {"error": f"returned {type(result).__name__}, not a list of {rows} values"}
    values = [_value(value) for value in result]
    if len(values) != rows:
        return {"error": f"returned {len(values)} values for {rows} completions"}
    for name, column in columns.items():
        if len(column) != rows:
            return {"error": f"log_extra({name!r}) got {len(column)} values for {rows} completions"}
    return {"values": values, "metrics": metrics, "columns": columns}


def _value(value: Any) -> float | str:
    """One reward as a finite float, or why it isn't one."""
    if value is None:
        return "returned None"
    if isinstance(value, str | bytes):
        return f"returned a {type(value).__name__}"
    try:
        number = float(value)  # bool, int, float, numpy and torch scalars
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        return f"returned {type(value).__name__}: {error}"
    if math.isnan(number):
        return "returned NaN"
    return "returned inf" if math.isinf(number) else number


async def _wait(result: Awaitable[Any]) -> Any:
    return await result


def _load(function: str | bytes) -> Any:
    if isinstance(function, str):
        from rewards import resolve

        return resolve(function)
    import cloudpickle

    return cloudpickle.loads(function)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the two pipes for the protocol; give user code an empty stdin and stderr as its stdout."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return requests, replies


def _die_with_parent(parent: int) -> None:
    """On Linux, have the kernel kill this process with the thread that started it, even while it hangs.

    Elsewhere the end of the pipe stops it, once the function returns.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)


def _read(stream: BinaryIO) -> bytes:
    """One frame's payload; b"" when the parent has closed the pipe."""
    header = stream.read(HEADER.size)
    return stream.read(HEADER.unpack(header)[0]) if len(header) == HEADER.size else b""


def _write(stream: BinaryIO, reply: str) -> None:
    payload = reply.encode()
    stream.write(HEADER.pack(len(payload)) + payload)
    stream.flush()


if __name__ == "__main__":
    main()
