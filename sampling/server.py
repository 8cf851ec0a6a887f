"""Samplers in other processes or on other machines, over HTTP: a `Sampler` for one server and one for several.

What a server must know is OpenAI's /v1/completions with vLLM's additions (token ids in and out, `prompt_logprobs`),
vLLM's /collective_rpc, /weight_info, /update_weight_version and /reset_prefix_cache, and for NCCL its routes for
weights. `python -m sampling.serve` starts one: vLLM (sampling/vllm_server.py), or our own sampler
(sampling/native_server.py).

A server that is started again has other weights and another name; requests carry the name, so that no answer can be of
weights that were not attested. Starting again is whoever started it's to do. Here it is waited for, and its weights are
sent and attested anew. Which server samples which prompt depends on their order alone.

Left out: expert choices, speculation, adapters, and data parallelism inside a server, of whose engines only one would
be attested: start one server for each.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from runtime.errors import UserError
from runtime.failpoints import failpoint
from sampling.attest import Canary, SyncReport, WeightsMismatch, sync
from sampling.process import EngineLost
from sampling.protocol import Completion, Fingerprints, SamplingParams, Weights, check_seeds
from sampling.transfer import Broadcast, Shelf, fingerprints_of, tag_of, version_in
from sampling.vllm_sampler import _stream_seed
from sampling.wire import Refused, Wire, read_key

log = logging.getLogger(__name__)

T = TypeVar("T")

Transfer = Literal["auto", "files", "nccl"]

CONCURRENCY = 256
"""Requests under way at one vLLM server; it batches what it has."""

POLL = 0.5
"""Seconds between two looks at a server that isn't ready."""

PRECISIONS = ("float32", "float16", "bfloat16")
"""From fine to coarse."""


class ServerSampler:
    """A `Sampler` that lets a server work."""

    def __init__(
        self,
        url: str,
        *,
        shelf: Shelf,
        room: int,
        transfer: Transfer = "auto",
        time_limit: float = 600.0,
        start_limit: float = 600.0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait until the server answers.

        room: tokens of the longest prompt with its completion. time_limit: seconds a call may take. start_limit:
        seconds for a server to be there. leaving: whether to wait no longer.
        Raises UserError for a server that can't do what is asked, EngineLost for one that doesn't come.
        """
        self.wire = Wire(url, key=read_key())
        self.version = -1
        self.time_limit, self.start_limit = time_limit, start_limit
        self.room, self.leaving = room, leaving
        self._asked_for = transfer
        self._shelf, self._broadcast = shelf, Broadcast(self.wire)
        self._tag, self._name = "", ""
        self._salt = secrets.token_hex(16)
        """What the probe of the prefix cache is kept under there."""
        self.wait_until_there()

    def wait_until_there(self) -> None:
        """Until the server answers, or EngineLost; what it holds is not known then."""
        self.version = -1
        deadline, told = time.monotonic() + self.start_limit, False
        while True:
            try:
                self._meet(min(self.time_limit, deadline - time.monotonic()))
                return
            except EngineLost as error:
                if self.leaving():
                    raise EngineLost(f"{error}; it is waited for no longer, as this run was told to leave") from error
                if time.monotonic() + POLL >= deadline:
                    raise EngineLost(f"{error}; waited {self.start_limit:g} s for it to be started") from error
                failpoint("server/waiting")
                if not told:
                    log.info("waiting for %s: %s", self.wire.url, error)
                    told = True
                time.sleep(POLL)

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """Have the server take these weights; the fingerprints are of what it read (NCCL: of what was sent)."""
        self.version = -1
        deadline = time.monotonic() + self.time_limit
        self._meet(self._left(deadline))
        loaded = True
        if self.transfer == "nccl":
            tensors = list(weights)
            held = fingerprints_of(tensors)
            tag = tag_of(version, held)
            if loaded := self._held(deadline) != tag:
                self._rpc("sampler_forget", [], deadline)
                self._broadcast.send(tensors, partner=self._name, limit=self._left(deadline))
            self._settle(tag, deadline)
        else:
            with self._shelf.parcel(weights, version=version) as parcel:
                reply = self._rpc("sampler_load", [parcel.tag, *parcel.files], deadline)
                held, loaded = reply["fingerprints"], reply["loaded"]
                self._settle(parcel.tag, deadline)
        if not loaded:  # what is cached is of these very weights
            self._salt = secrets.token_hex(16)
        self.version = version
        return held

    def follow(self, tag: str) -> None:
        """Sample from weights of this tag, which another process of the run has loaded and attested."""
        self.version = -1
        deadline = time.monotonic() + self.time_limit
        self._meet(self._left(deadline))
        if (held := self._held(deadline)) != tag:
            raise EngineLost(f"{self.wire.url} holds weights {held!r}; {tag!r} were attested")
        self._tag, self.version = tag, version_in(tag)

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`params.n` completions per prompt, of the version that the server says it holds."""
        check_seeds(prompts, seeds)
        if 0 < params.temperature < 0.01:
            raise ValueError(f"temperature={params.temperature}: vLLM would raise it to 0.01; use that, or 0 (greedy)")
        if params.speculate or params.record_experts:
            raise ValueError("speculate, record_experts: no server does either; use sampling.backend=native")
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + params.max_tokens > self.room:
                raise ValueError(
                    f"prompt {i}: {len(prompt)} tokens + {params.max_tokens} new: a server was asked for room for 1 "
                    f"to {self.room}; raise sampling.max_prompt_tokens"
                )
        options = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,  # only the stop tokens asked for
            "logprobs": 0,  # of the sampled token alone
            # A prompt that an earlier call left in the cache would be rounded another way than one computed now.
            "cache_salt": secrets.token_hex(16),
        }
        deadline = time.monotonic() + self.time_limit
        with self._or_lost():
            groups = self._complete(prompts, options, deadline, n=params.n, seeds=seeds)
            held = self._held(deadline)
            if held != self._tag:
                raise EngineLost(f"{self.wire.url} holds weights {held!r} now; {self._tag!r} were attested")
            return [[self._completion(choice, version_in(held)) for choice in group] for group in groups]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of each token but the first, at temperature 1."""
        options = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        with self._or_lost():
            groups = self._complete(sequences, options, time.monotonic() + self.time_limit)
            return [
                [float(row[str(i)]["logprob"]) for i, row in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]
                for ids, (choice,) in zip(sequences, groups, strict=True)
            ]

    def cached_prompt_tokens(self, prompt: Sequence[int]) -> int:
        """Run `prompt`, leave it in the prefix cache, and return how many of its tokens came from there."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "cache_salt": self._salt}
        with self._or_lost():
            reply = self._request(body, time.monotonic() + self.time_limit)
            return int(((reply["usage"] or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def close(self) -> None:
        """Let go of the server, which goes on."""
        self.version = -1
        self._broadcast.close()

    def _meet(self, limit: float) -> None:
        """Learn who answers, and whether it can do what is asked of it."""
        deadline = time.monotonic() + limit
        try:
            model = self.wire.call("/v1/models", limit=limit)["data"][0]
            world, engine = (
                self.wire.call(f"/get_world_size?include_dp={dp}", limit=limit) for dp in ("true", "false")
            )
            about = self._rpc("sampler_describe", [], deadline)
            self._name, longest = model["id"], int(model["max_model_len"])
            self.dtype: str = about["dtype"]
            self._batches = about["backend"] == "native"
        except Refused as error:
            if error.status in (401, 403):
                raise UserError(f"{error}; set SAMPLING_API_KEY to the key the server was started with") from error
            raise UserError(f"{error}; start the server by: python -m sampling.serve --model ...") from error
        except (LookupError, TypeError, ValueError) as error:
            raise EngineLost(f"{self.wire.url} is no sampling server: {error!r}") from error
        if longest < self.room:
            raise UserError(
                f"sampling.max_prompt_tokens + sampling.max_tokens: {self.room} tokens, but {self.wire.url} takes "
                f"{longest}; start it with --max_model_len {self.room}, or lower them"
            )
        if world != engine:
            raise UserError(
                f"{self.wire.url} is data parallel inside, and only one of its engines would be attested; start one "
                "server for each engine and name all in sampling.server_urls"
            )
        self.transfer = self._asked_for
        if self.transfer == "auto":
            self.transfer = "nccl" if about["device"] == "cuda" and torch.cuda.is_available() else "files"
        if self.transfer not in about["transfers"]:
            raise UserError(
                f"sampling.transfer={self.transfer}: {self.wire.url} takes weights by {' or '.join(about['transfers'])}"
            )

    def _settle(self, tag: str, deadline: float) -> None:
        """Have the server drop what it cached and name its weights."""
        while self._held(deadline) != tag:
            if self.wire.call("/reset_prefix_cache", {}, limit=self._left(deadline))["success"]:
                self.wire.call("/update_weight_version", {"new_version": tag}, limit=self._left(deadline))
            elif time.monotonic() + POLL >= deadline:
                raise WeightsMismatch(f"{self.wire.url} won't reset its prefix cache: are requests still running?")
            else:
                time.sleep(POLL)
        self._tag = tag

    def _held(self, deadline: float) -> str:
        return str(self.wire.call("/weight_info", limit=self._left(deadline))["weight_version"])

    def _rpc(self, method: str, arguments: list[str], deadline: float) -> dict[str, Any]:
        """What every worker of the server answers alike."""
        limit = self._left(deadline)
        answers = self.wire.call("/collective_rpc", {"method": method, "args": arguments}, limit=limit)["results"]
        for answer in answers:
            if "refused" in answer:
                raise WeightsMismatch(f"{self.wire.url}: {answer['refused']}", received=answer["received"])
        if not answers or any(answer != answers[0] for answer in answers):
            raise WeightsMismatch(f"{self.wire.url}: its {len(answers)} workers answer {method} differently")
        return answers[0]

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        options: dict[str, Any],
        deadline: float,
        *,
        n: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Choices of /v1/completions, n for each prompt."""
        if self.version < 0:
            raise WeightsMismatch("this sampler holds no attested weights: run sampling.attest.sync first")
        if not prompts:
            return []
        if self._batches:
            # Our own server's, which vLLM has not: a seed for each prompt. One batch has the bits it has in process.
            body = {"prompt": [list(ids) for ids in prompts], "n": n, **options}
            choices = self._choices(body | ({} if seeds is None else {"seed": list(seeds)}), deadline, n * len(prompts))
        else:
            bodies = [
                {"prompt": list(ids), **options, **({} if seeds is None else {"seed": _stream_seed(seeds[k], i)})}
                for k, ids in enumerate(prompts)
                for i in range(n)
            ]
            choices = [c for (c,) in self._each(lambda body: self._choices(body, deadline, 1), bodies)]
        groups = [choices[i : i + n] for i in range(0, len(choices), n)]
        for ids, group in zip(prompts, groups, strict=True):
            if any(choice["prompt_token_ids"] != list(ids) for choice in group):
                raise EngineLost(f"{self.wire.url} completed another prompt than it was given")
        return groups

    def _each(self, work: Callable[[T], list[Any]], items: list[T]) -> list[list[Any]]:
        """`work` on all, CONCURRENCY at a time; after the first failure nothing more is begun."""
        failed = threading.Event()

        def unless_failed(item: T) -> list[Any]:
            if failed.is_set():
                return []
            try:
                return work(item)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(min(CONCURRENCY, len(items))) as pool:
            return [future.result() for future in [pool.submit(unless_failed, item) for item in items]]

    def _choices(self, body: dict[str, Any], deadline: float, count: int) -> list[dict[str, Any]]:
        choices = sorted(self._request(body, deadline)["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != count:
            raise EngineLost(f"{self.wire.url} made {len(choices)} completions of {count}")
        return choices

    def _request(self, body: dict[str, Any], deadline: float) -> dict[str, Any]:
        ours = {"model": self._name, "return_token_ids": True, "return_tokens_as_token_ids": True}
        try:
            reply = self.wire.call("/v1/completions", ours | body, limit=self._left(deadline))
        except Refused as error:
            if error.status == 404:  # nobody there has this name
                raise EngineLost(f"{self.wire.url} was started again: {error}") from error
            raise ValueError(str(error)) from error
        return dict(reply)

    def _completion(self, choice: dict[str, Any], version: int) -> Completion:
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
        if len(ids) != len(logprobs) or reason not in ("stop", "length"):
            raise EngineLost(
                f"{self.wire.url}: {len(ids)} tokens with {len(logprobs)} log-probs, finish_reason {reason!r}"
            )
        return Completion(
            ids=[int(i) for i in ids], logprobs=[float(p) for p in logprobs], finish_reason=reason, version=version
        )

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        """Whatever is odd about an answer: the server is lost, and holds nothing until it is attested anew."""
        try:
            yield
        except EngineLost:
            self.version = -1
            raise
        except (LookupError, TypeError) as error:
            self.version = -1
            raise EngineLost(f"{self.wire.url}: an answer that can't be read: {error!r}") from error

    def _left(self, deadline: float) -> float:
        return max(deadline - time.monotonic(), 0.0)


class ServerPool:
    """A `Sampler` over several servers that hold the same weights and share the prompts."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        room: int,
        weights_dir: str | Path | None = None,
        transfer: Transfer = "auto",
        time_limit: float = 600.0,
        start_limit: float = 600.0,
        rank: int = 0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        """As `ServerSampler`. rank: of this process in the run; one process brings the weights (`sync`), the others
        follow (`follow`)."""
        self.restarts = 0
        """How often lost servers were waited for."""
        self.rank = rank
        self._shelf = Shelf(weights_dir)
        make = partial(
            ServerSampler, shelf=self._shelf, room=room, transfer=transfer, time_limit=time_limit, leaving=leaving
        )
        self.members: list[ServerSampler] = []
        try:
            for url in urls:
                self.members.append(make(url, start_limit=start_limit))
            for member in self.members:
                if weights_dir is None and member.transfer == "files" and not member.wire.is_here:
                    raise UserError(
                        f"sampling.weights_dir: {member.wire.url} is another machine; name a folder that it and this "
                        "one see, or use sampling.transfer=nccl"
                    )
        except BaseException:
            self.close()
            raise
        self.dtype = max((member.dtype for member in self.members), key=PRECISIONS.index)
        self._previous: list[SyncReport | None] = [None] * len(self.members)

    @property
    def version(self) -> int:
        """What all servers hold; -1 if any holds nothing that was attested, or something else."""
        held = {member.version for member in self.members}
        return held.pop() if len(held) == 1 else -1

    @version.setter
    def version(self, version: int) -> None:
        for member in self.members:
            member.version = version

    def sync(
        self,
        weights_factory: Callable[[], Weights],
        *,
        version: int,
        canary: Canary,
        score_trainer: Callable[[Sequence[Sequence[int]]], list[list[float]]],
    ) -> SyncReport:
        """`sampling.attest.sync` with each server; the report of the one that agrees least."""
        ours = score_trainer(canary.sequences)
        with self._shelf.shared():
            for i, member in enumerate(self.members):
                self._previous[i] = sync(
                    member,
                    weights_factory,
                    version=version,
                    canary=canary,
                    score_trainer=lambda _: ours,
                    previous=self._previous[i],
                )
        return max((report for report in self._previous if report is not None), key=lambda r: r.canary_mean)

    def follow(self, fingerprints: Fingerprints, *, version: int) -> None:
        """Sample from what another process of the run has brought. EngineLost if a server holds anything else."""
        tag = tag_of(version, fingerprints)
        for member in self.members:
            member.follow(tag)

    def restart(self) -> None:
        """Wait until all servers are there. EngineLost if one doesn't come."""
        self.restarts += 1
        for member in self.members:
            member.wait_until_there()

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """Have every server take these weights; `sync` also has every one of them prove it."""
        tensors = list(weights)
        with self._shelf.shared():
            held = [member.load(tensors, version=version) for member in self.members]
        if any(other != held[0] for other in held):
            raise WeightsMismatch("the servers hold different weights")
        return held[0]

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Prompt i by server (rank + i) mod S, all servers at once."""
        check_seeds(prompts, seeds)
        shares: list[list[int]] = [[] for _ in self.members]
        for i in range(len(prompts)):
            shares[(self.rank + i) % len(shares)].append(i)
        groups: list[list[Completion]] = [[] for _ in prompts]

        def work(member: ServerSampler, share: list[int]) -> None:
            made = member.sample([prompts[i] for i in share], params, seeds=[seeds[i] for i in share])
            for i, group in zip(share, made, strict=True):
                groups[i] = group

        with ThreadPoolExecutor(len(self.members)) as pool:
            working = [pool.submit(work, m, share) for m, share in zip(self.members, shares, strict=True) if share]
        for future in working:
            future.result()
        return groups

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """By the first server; they all hold the same."""
        return self.members[0].score(sequences)

    def close(self) -> None:
        """Let go of the servers and remove what lies about."""
        for member in self.members:
            with contextlib.suppress(RuntimeError, OSError):
                member.close()
        self._shelf.close()
