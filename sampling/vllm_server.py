"""vLLM's own server with what a trainer needs of it: `python -m sampling.vllm_server PARENT_PID SETTINGS` (JSON).

Started by `python -m sampling.serve`. Added to `vllm serve` are its flags, which make it sample from exactly the
distribution it reports (sampling/vllm_setup.py), a worker extension that reads weights from files, and a guard: vLLM's
own key protects /v1 alone, and who reaches the routes for weights can replace them. Weights by NCCL are vLLM's work.

vLLM is imported when it starts; its engine processes import this module for the extension.
"""

import hmac
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sampling import vllm_reload
from sampling.attest import WeightsMismatch
from sampling.fingerprint import observed
from sampling.protocol import Fingerprints
from sampling.transfer import read_files
from sampling.vllm_sampler import CPU_BATCH_TOKENS
from sampling.vllm_setup import cpu_attention, has_amx, hf_overrides
from sampling.wire import is_loopback, read_key
from sampling.worker import _die_with_parent

NOTHING: tuple[str, Fingerprints] = ("", {})
"""Tag and fingerprints of a worker that was sent no weights in files."""


class WorkerExtension:
    """Methods of every worker of the engine, for /collective_rpc. All run between two steps of the engine."""

    def sampler_describe(self: Any) -> dict[str, Any]:
        """What a trainer must know."""
        transfers = ["files"] + (["nccl"] if self.vllm_config.weight_transfer_config is not None else [])
        dtype = str(self.vllm_config.model_config.dtype).removeprefix("torch.")
        return {"backend": "vllm", "dtype": dtype, "device": self.device.type, "transfers": transfers}

    def sampler_load(self: Any, tag: str, *files: str) -> dict[str, Any]:
        """Take the weights in these files, unless it has them: another process of the same run may have been first."""
        if self.sampler_held()["tag"] == tag:
            return self.sampler_held() | {"loaded": False}
        self.sampler_state = NOTHING
        received: Fingerprints = {}
        weights = observed(read_files(files), received)
        try:
            if self.device.type == "cpu":
                vllm_reload._rebuild(self, weights, received)
            else:
                self.reload_weights(weights_iterator=weights)
        except WeightsMismatch as error:
            return {"refused": str(error), "received": received}
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            # vLLM's loaders assert shapes without saying whose.
            last = next(reversed(received), "the first tensor")
            return {"refused": f"while loading {last}: {error!r}", "received": received}
        self.sampler_state = (tag, received)
        return self.sampler_held() | {"loaded": True}

    def sampler_forget(self: Any) -> dict[str, Any]:
        """Weights are about to come another way."""
        self.sampler_state = NOTHING
        return {}

    def sampler_held(self: Any) -> dict[str, Any]:
        """The tag of the weights read from files last, and the fingerprints of what was read."""
        tag, received = getattr(self, "sampler_state", NOTHING)  # absent before the first load
        return {"tag": tag, "fingerprints": received}


class Guard:
    """ASGI middleware: nothing but /health without the key; on loopback no other Host, as a page's DNS could name."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key = read_key()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on, or answer 401."""
        if scope["type"] != "http" or scope["path"] == "/health" or admits(self.key, dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"no key, another one, or a foreign Host"})


def admits(key: str | None, headers: dict[bytes, bytes]) -> bool:
    """Whether a call with these headers (lower-case names) is its owner's: by the key, or without one by the Host."""
    if key is None:
        return is_loopback(urlsplit("//" + headers.get(b"host", b"").decode("latin-1")).hostname)
    return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {key}".encode())


def arguments(settings: dict[str, Any], *, while_open: ExitStack) -> list[str]:
    """vLLM's command line for these settings, those of `sampling.serve.Settings`."""
    from transformers.utils import cached_file
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    config = json.loads(Path(cached_file(settings["model"], "config.json")).read_text())
    dtype = settings["dtype"]
    if dtype == "auto":
        dtype = "float32" if on_cpu and not has_amx() else "bfloat16"
    longest = settings["max_model_len"]
    options: dict[str, Any] = {
        "model": settings["model"],
        "served_model_name": settings["name"],
        "host": settings["host"],
        "port": settings["port"],
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": settings["max_num_seqs"],
        "tensor_parallel_size": settings["tensor_parallel"],
        "seed": 0,
        "load_format": "dummy",  # weights come from the trainer
        "skip_tokenizer_init": True,
        "hf_overrides": hf_overrides(config, on_cpu=on_cpu),
        # The model's own sampling defaults (top-p and the like) must not leak in, and log-probs must be those of the
        # distribution that is sampled from.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prompt_tokens_details": True,
        "worker_extension_cls": "sampling.vllm_server.WorkerExtension",
        "middleware": "sampling.vllm_server.Guard",
        "disable_uvicorn_access_log": True,
    }
    if on_cpu:
        options |= cpu_attention(config, dtype=dtype, while_open=while_open)
        options |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(settings["kv_cache_gib"] * 2**30),
            "enable_chunked_prefill": False,  # as in sampling/vllm_sampler.py
            "max_num_batched_tokens": max(longest, CPU_BATCH_TOKENS),
        }
    else:
        options |= {
            "gpu_memory_utilization": settings["gpu_memory"],
            "weight_transfer_config": {"backend": "nccl"},
        }
    return [*flags(options), *settings["extra"]]


def flags(options: dict[str, Any]) -> list[str]:
    """Options as vLLM's command line spells them."""
    line: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return line


def end_group_with_stdin() -> None:
    """Have this process group killed once nobody holds the other end of stdin, which its launcher does.

    vLLM's engines outlive a server that is killed, and the kernel kills with a launcher only the child it started.
    """
    subprocess.Popen(["sh", "-c", "cat > /dev/null; kill -KILL 0"])
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)


def main() -> None:
    """Serve until told to leave, or the parent or the engine dies."""
    parent, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    _die_with_parent(parent)
    end_group_with_stdin()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes for weights
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with ExitStack() as stack:
        line = arguments(settings, while_open=stack)
        from vllm.entrypoints.launchers.api_server import entry

        sys.argv = ["vllm serve", *line]
        entry.main()


if __name__ == "__main__":
    main()
