"""Weights of a trainer -> the servers that sample for it: in files that both see, or by vLLM's own NCCL broadcast.

Files are safetensors in a folder of a disk that trainer and servers share, written once for all servers and removed
when they have been read. They work for every server. NCCL needs CUDA on both sides; vLLM does the work
(vllm.distributed.weight_transfer), with a group of its own for each server, so that one that is started again costs
the others nothing. vLLM is imported when NCCL is used, never with this module.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.errors import UserError
from sampling.attest import DivergedPolicy
from sampling.fingerprint import observed
from sampling.protocol import Fingerprints, Weights
from sampling.wire import Wire, is_loopback

SHARD = 1 << 30
"""Bytes of a file, or one tensor if that is larger: the memory that writing CUDA tensors needs."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Weights ready to be fetched."""

    tag: str
    """Version and hash of what is in it: what a server that holds it says of itself."""
    sent: Fingerprints
    files: list[str] = field(default_factory=list)


def tag_of(version: int, fingerprints: Fingerprints) -> str:
    """The name of these weights: any other version, tensor or bit has another one."""
    content = json.dumps(sorted(fingerprints.items())).encode()
    return f"{version}:{hashlib.blake2b(content, digest_size=12).hexdigest()}"


def version_in(tag: str) -> int:
    """The version that a tag names."""
    return int(tag.partition(":")[0])


def finite(weights: Weights) -> Weights:
    """Pass weights through. Raises DivergedPolicy where one holds NaN."""
    for name, tensor in weights:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise DivergedPolicy(f"{name} holds NaN: lower the learning rate, or resume from before")
        yield name, tensor


def fingerprints_of(weights: Weights) -> Fingerprints:
    """Of each tensor. Raises DivergedPolicy where one holds NaN."""
    prints: Fingerprints = {}
    for _ in observed(finite(weights), prints):
        pass
    return prints


class Shelf:
    """The folder through which weights go."""

    def __init__(self, folder: str | Path | None) -> None:
        """folder: on a disk that the servers see, used by one run at a time. None: a temporary one of this machine."""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sampler-weights-")
            folder = self._temporary.name
        self.folder = Path(folder).expanduser().absolute()
        # Of this process: those of a run on several write the same weights, each where no other looks.
        self._own = self.folder / f"rank-{os.environ.get('RANK', '0')}"
        try:
            shutil.rmtree(self._own, ignore_errors=True)  # what a killed attempt at this run left
            self._own.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"sampling.weights_dir={str(folder)!r}: {error.strerror}; name a folder to write"
            ) from error
        self._kept: Parcel | None = None
        self._keeping = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Whoever asks for a parcel in here gets the same one: the weights don't change meanwhile."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping, self._kept = False, None
            self._clear()

    @contextlib.contextmanager
    def parcel(self, weights: Weights, *, version: int) -> Iterator[Parcel]:
        """The weights as files, for as long as the context lasts."""
        parcel = self._kept or self._write(weights, version)
        if self._keeping:
            self._kept = parcel
        try:
            yield parcel
        finally:
            if not self._keeping:
                self._clear()

    def close(self) -> None:
        """Remove what is left."""
        shutil.rmtree(self._own, ignore_errors=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _write(self, weights: Weights, version: int) -> Parcel:
        from safetensors.torch import save_file

        sent: Fingerprints = {}
        files: list[str] = []
        part: dict[str, torch.Tensor] = {}
        size = 0

        def flush() -> None:
            nonlocal size
            path = self._own / f"{len(files):05d}.safetensors"
            save_file(part, path)
            files.append(str(path))
            part.clear()
            size = 0

        for name, tensor in observed(finite(weights), sent):
            part[name] = tensor.detach().cpu().contiguous()
            size += part[name].nbytes
            if size >= SHARD:
                flush()
        if part:
            flush()
        return Parcel(tag=tag_of(version, sent), sent=sent, files=files)

    def _clear(self) -> None:
        for path in self._own.glob("*.safetensors"):
            path.unlink()


def read_files(files: Sequence[str]) -> Weights:
    """The server's side: names and tensors, in the order in which they were written, a file at a time."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.offset_keys():
                yield name, opened.get_tensor(name)


class Broadcast:
    """vLLM's NCCL weight transfer to one server; made anew when another process answers there."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._engine: Any = None
        self._partner = ""

    def send(self, tensors: Sequence[tuple[str, torch.Tensor]], *, partner: str, limit: float) -> None:
        """Send everything. partner: the server's name for itself."""
        from sampling.vllm_setup import guest

        with guest():
            from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            class Source(WeightSource):
                def metadata(self) -> list[Any]:
                    return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]

                def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                    return ((name, tensor.cuda()) for name, tensor in tensors)  # sharded ones were gathered on the CPU

            if self._engine is None or partner != self._partner:
                self.close()
                client = _Control(self.wire, limit)
                client.post("/shutdown_weight_transfer_engine")  # of a trainer before this one
                world = int(self.wire.call("/get_world_size", limit=limit)["world_size"])
                address, port = _meeting_point(self.wire)
                info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world + 1, rank=0)
                self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
                self._partner = partner
            self._engine.source = Source()
            self._engine.send_weights()

    def close(self) -> None:
        """Leave the group."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


class _Control:
    """What vLLM's sender wants of a server (its VLLMWeightSyncClient), with our key and deadline."""

    def __init__(self, wire: Wire, limit: float) -> None:
        self.wire, self.limit = wire, limit

    def post(self, path: str, **body: Any) -> None:
        # Once: what half of has been done can't be begun again.
        self.wire.call(path, body, limit=self.limit, attempts=1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("/init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("/update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", weight_version=weight_version)


def _meeting_point(wire: Wire) -> tuple[str, int]:
    """An address of this machine that the server can reach, and a port that is free there."""
    family = socket.AF_INET6 if ":" in (wire.host or "") else socket.AF_INET
    host = "127.0.0.1"
    if not is_loopback(wire.host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing; asks for the route
            probe.connect((wire.host, 9))
            host = probe.getsockname()[0]
    with socket.socket(family if host != "127.0.0.1" else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return host, int(probe.getsockname()[1])
