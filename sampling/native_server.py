"""Our own sampler behind the same HTTP: `python -m sampling.native_server PARENT_PID SETTINGS` (JSON).

Started by `python -m sampling.serve --backend native`, for machines without vLLM. It knows the calls that
sampling/server.py makes and no others. Beyond OpenAI's fields, `seed` may be a list, one for each prompt: a batch that
comes in one request has the bits it has in the trainer's own process. Calls are answered one after the other.
"""

import contextlib
import http.server
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch

from runtime.failpoints import failpoint
from sampling.attest import WeightsMismatch
from sampling.native import NativeSampler
from sampling.protocol import Completion, Fingerprints, SamplingParams
from sampling.transfer import read_files
from sampling.vllm_server import admits
from sampling.worker import _die_with_parent

T = TypeVar("T")

MAX_BODY = 1 << 28
"""Bytes of a call; a batch of a thousand prompts of 32K tokens is less."""


class NoSuchModel(LookupError):
    """A call for a server that was here before."""


class NativeServer:
    """The calls and the sampler that answers them; `url` says where."""

    def __init__(
        self, sampler: NativeSampler, *, name: str, host: str = "127.0.0.1", port: int = 0, key: str | None = None
    ) -> None:
        """name: of this server, another one at every start. port: 0 for any."""
        self.sampler, self.name = sampler, name
        self.longest: int = sampler.model.config.max_position_embeddings
        self.weight_version = "default"
        self._state: tuple[str, Fingerprints] = ("", {})
        # One thread for all that computes: calls take turns, and torch keeps one pool of threads.
        self._engine = ThreadPoolExecutor(1)
        self._http = http.server.ThreadingHTTPServer((host, port), _handler(self, key))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}"

    def serve(self) -> None:
        """Answer calls until `close`."""
        self._http.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Stop listening; what is being answered is lost."""
        self._http.shutdown()
        self._http.server_close()
        self._engine.shutdown(wait=True, cancel_futures=True)

    def get(self, path: str) -> dict[str, Any]:
        """What it says of itself."""
        if path == "/v1/models":
            return {"data": [{"id": self.name, "max_model_len": self.longest, "owned_by": "native"}]}
        if path == "/weight_info":
            return {"weight_version": self.weight_version}
        if path.startswith("/get_world_size"):
            return {"world_size": 1}
        if path == "/health":
            return {}
        raise NoSuchModel(f"no {path} here")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What it does."""
        if path == "/v1/completions":
            if body["model"] != self.name:
                raise NoSuchModel(f"the model {body['model']!r} does not exist; this server is {self.name!r}")
            return self._in_turn(lambda: self._complete(body))
        if path == "/collective_rpc":
            if (call := self._calls().get(body["method"])) is None:
                raise NoSuchModel(f"no method {body['method']!r} here")
            return {"results": [self._in_turn(lambda: call(*body["args"]))]}
        if path == "/update_weight_version":
            self.weight_version = str(body["new_version"])
            return {"success": True, "new_version": self.weight_version}
        if path == "/reset_prefix_cache":
            return {"success": True}  # it has none
        raise NoSuchModel(f"no {path} here")

    def _calls(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"sampler_describe": self._describe, "sampler_load": self._load}

    def _in_turn(self, work: Callable[[], T]) -> T:
        return self._engine.submit(work).result()

    def _describe(self) -> dict[str, Any]:
        device = self.sampler.model.device.type
        return {"backend": "native", "dtype": self.sampler.dtype, "device": device, "transfers": ["files"]}

    def _load(self, tag: str, *files: str) -> dict[str, Any]:
        loaded = self._state[0] != tag
        if loaded:
            self._state = ("", {})
            try:
                self._state = (tag, self.sampler.load(read_files(files), version=0))
            except WeightsMismatch as error:
                return {"refused": str(error), "received": error.received}
            failpoint("server/load")  # loaded, and not said
        return self._held() | {"loaded": loaded}

    def _held(self) -> dict[str, Any]:
        tag, held = self._state
        return {"tag": tag, "fingerprints": held}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        n, seed = int(body.get("n", 1)), body.get("seed", 0)
        params = SamplingParams(
            n=n,
            max_tokens=int(body["max_tokens"]),
            temperature=float(body["temperature"]),
            stop_token_ids=tuple(body.get("stop_token_ids", ())),
        )
        scores = None if body.get("prompt_logprobs") is None else self.sampler.score(prompts)
        seeds = seed if isinstance(seed, list) else [seed] * len(prompts)
        groups = self.sampler.sample(prompts, params, seeds=seeds)
        failpoint("server/complete")  # the work is done and is lost
        choices = [_choice(completion, prompts[k]) for k, group in enumerate(groups) for completion in group]
        for index, choice in enumerate(choices):
            choice["index"] = index
            if scores is not None:
                ids, row = prompts[index // n], scores[index // n]
                choice["prompt_logprobs"] = [
                    None,
                    *({str(i): {"logprob": p}} for i, p in zip(ids[1:], row, strict=True)),
                ]
        return {"model": self.name, "choices": choices, "usage": {"prompt_tokens": sum(map(len, prompts))}}


def _choice(completion: Completion, prompt: list[int]) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "prompt_token_ids": prompt,
        "token_ids": completion.ids,
        "logprobs": {"token_logprobs": completion.logprobs},
    }


def _handler(server: NativeServer, key: str | None) -> type[http.server.BaseHTTPRequestHandler]:
    """HTTP's side of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # seconds that a connection may be idle

        def do_GET(self) -> None:
            self._answer(lambda: server.get(self.path))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= MAX_BODY or self.headers.get("Content-Type") != "application/json":
                self.close_connection = True
                self._send(400, {"error": f"{length} bytes of {self.headers.get('Content-Type')}: give JSON"})
                return
            content = self.rfile.read(length)
            self._answer(lambda: server.post(self.path, json.loads(content)))

        def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
            headers = {name.lower().encode(): value.encode("latin-1") for name, value in self.headers.items()}
            if self.path != "/health" and not admits(key, headers):
                self._send(401, {"error": "no key, another one, or a foreign Host"})
                return
            try:
                status, reply = 200, work()
            except NoSuchModel as error:
                status, reply = 404, {"error": str(error)}
            except (ValueError, KeyError, TypeError, IndexError) as error:
                status, reply = 400, {"error": f"{type(error).__name__}: {error}"}
            except Exception as error:
                status, reply = 500, {"error": f"{type(error).__name__}: {error}"}
            self._send(status, reply)

        def _send(self, status: int, reply: dict[str, Any]) -> None:
            content = json.dumps(reply).encode()
            with contextlib.suppress(ConnectionError):  # whoever asked has given up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Says nothing: a line for every call is no help to anybody."""

    return Handler


def main() -> None:
    """Serve until killed, or the parent dies."""
    from runtime.models import load_causal_lm
    from sampling.wire import read_key

    parent, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    _die_with_parent(parent)
    dtype = {"auto": "float32"}.get(settings["dtype"], settings["dtype"])
    model = load_causal_lm(settings["model"], dtype=cast(torch.dtype, getattr(torch, dtype)))
    NativeServer(
        NativeSampler(model.to("cuda" if torch.cuda.is_available() else "cpu")),
        name=settings["name"],
        host=settings["host"],
        port=settings["port"],
        key=read_key(),
    ).serve()


if __name__ == "__main__":
    main()
