"""A job -> a program run in this process, which is in the jail already and will end with it.

Three kinds: `run` a program on standard input; `serve` its functions to calls that come as frames; `check` it, by
running test code in which its functions are stand-ins that send those frames. This code shares its process with
a candidate, who may do anything to it: nothing here knows an expected value, and what comes out is judged outside.
A frame is four bytes of length and JSON.
"""

import atexit
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from rewards.sandbox.values import NotPlainError, decode, encode

HEADER = struct.Struct(">I")
FRAMES = 3
"""The file descriptor of the frames' socket."""


def main(job: dict[str, Any]) -> NoReturn:
    """Do a job and end the process; `ready` goes out before the candidate's first line."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["main.py"]
    random.seed(0)  # hashes are fixed as well: a program's verdict is the same every time
    frames = Frames(socket.socket(fileno=FRAMES))
    frames.send({"ready": True})
    if job["kind"] == "run":
        frames.close()
        _end(_exit_code(lambda: load("__main__", job["program"])), finish=True)
    elif job["kind"] == "serve":
        _end(_exit_code(lambda: serve(load("solution", job["program"]), frames)), finish=False)
    _end(_exit_code(lambda: check(job["program"], job["names"], job["entry_point"], frames)), finish=False)


def _end(code: int, *, finish: bool) -> NoReturn:
    """Leave; `finish` does what a program's end does: wait for its threads, run what it left for the end."""
    try:
        if finish:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    finally:
        os._exit(code)


def _exit_code(work: Callable[[], object]) -> int:
    """What Python's own exit code would be; an error's trace goes to standard error."""
    try:
        work()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 0xFF
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Source(importlib.abc.InspectLoader):
    """A loader of source text that is in no file."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source


def load(name: str, source: str, **bound: Any) -> ModuleType:
    """Run source text as module `name`, with names `bound` in it beforehand."""
    loader = _Source(source)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader))
    vars(module).update(bound, __builtins__=builtins)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class Frames:
    """JSON objects, one a frame, over a stream socket; its methods are bound before a candidate can touch json."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._dumps, self._loads = json.JSONEncoder(allow_nan=False).encode, json.JSONDecoder().decode

    def send(self, frame: dict[str, Any]) -> None:
        data = self._dumps(frame).encode()
        self._stream.sendall(HEADER.pack(len(data)) + data)

    def receive(self) -> dict[str, Any]:
        """The next frame. Raises EOFError if none comes any more."""
        (size,) = HEADER.unpack(self._exactly(HEADER.size))
        return self._loads(self._exactly(size).decode())

    def close(self) -> None:
        self._stream.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not (part := self._stream.recv(size - len(data))):
                raise EOFError
            data += part
        return bytes(data)


def serve(module: ModuleType, frames: Frames) -> None:
    """Answer calls until no more come: with a value, with the exception, or with why a result can't be told."""
    frames.send({"loaded": True})
    while True:
        try:
            request = frames.receive()
        except EOFError:
            return
        frames.send(answer(module, request))


def answer(module: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Make one call of a program's function."""
    arguments, keywords = decode(request["arguments"]), decode(request["keywords"])
    try:
        target: Any = module
        for part in request["call"].split("."):
            target = getattr(target, part)
            if "." in request["call"] and isinstance(target, type):
                target = target()  # Solution.method: of an instance made without arguments
        return {"value": encode(target(*arguments, **keywords))}
    except NotPlainError as refusal:
        return {"refused": str(refusal), "overrides": refusal.overrides}
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "text": str(error)[:1000]}


def check(source: str, names: list[str], entry_point: str | None, frames: Frames) -> None:
    """Run test code; a failed assertion, or another error once the candidate has been called, is its failure."""
    called = False

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal called
            called = True
            request = {"call": name, "arguments": encode(list(arguments)), "keywords": encode(keywords)}
            frames.send(request)
            reply = frames.receive()
            if "value" in reply:
                return decode(reply["value"])
            kind = getattr(builtins, str(reply["error"]), None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(reply["text"])

        return call

    try:
        module = load("checks", source, **{name: stand_in(name) for name in names})
        if entry_point and hasattr(module, "check"):
            module.check(stand_in(entry_point))
        frames.send({"done": True, "called": called})
    except BaseException as error:
        traceback.print_exc()
        frames.send({"failed": type(error).__name__, "called": called})
