"""Requests for answers in; answers out, from a checkpoint in a sampler of this process or from a server.

Every request is answered, if only by the reason why there is no answer: a server that is out, slow or confused costs
its retries and no more. A sampler's weights are attested before it is asked anything, and hashed. Left out: what
becomes of an answer (verify.py), and of one that was acknowledged before (ledger.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from distill.config import ExpertConfig
from distill.duplicates import words
from distill.types import Kind, Message, Problem, Sample, Teacher
from rewards.model_based import backends
from runtime.errors import UserError

Models = Mapping[str, Callable[[], Path]]
"""Makers of checkpoints that settings may name."""
POLL = 0.2
"""Seconds between two looks at whether to stop asking."""


@dataclass(frozen=True)
class Request:
    """An answer to ask for."""

    problem: Problem
    kind: Kind
    index: int


class Respondent(Protocol):
    """Whoever answers."""

    record: Teacher

    def answer(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[list[Sample]]:
        """One answer for each request, in any order, as they come; fewer once `stop` says so."""
        ...

    def close(self) -> None:
        """Free what answers."""
        ...


def open_teacher(
    expert: ExpertConfig, *, seed: int, problems: Sequence[Problem], named_models: Models | None = None
) -> Respondent:
    """A domain's expert, ready to be asked; its weights are proved on some of its problems. Raises UserError."""
    if expert.endpoint is not None:
        return EndpointTeacher(expert, seed=seed)
    make = (named_models or {}).get(expert.model)
    return SamplerTeacher(expert, make() if make else expert.model, seed=seed, problems=problems)


def conversation(problem: Problem, kind: Kind, system: str) -> list[Message]:
    """What a teacher is asked, which is also what its answer is learnt behind."""
    if kind == "original" or not system:
        return problem.prompt
    first, *rest = problem.prompt
    if first["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": system}, *problem.prompt]


def seed_of(seed: int, request: Request, *, each: bool) -> int:
    """63 bits of a hash of the run's seed and of what is asked for; the same for all indices unless `each`."""
    index = request.index if each else ""
    digest = hashlib.sha256(f"{seed} {request.problem.position} {request.kind} {index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class SamplerTeacher:
    """A checkpoint in the native sampler or in vLLM; its answers are a pure function of the batch and the seed."""

    def __init__(self, expert: ExpertConfig, path: str | Path, *, seed: int, problems: Sequence[Problem]) -> None:
        import torch

        from runtime.models import end_token_ids, load_causal_lm, load_tokenizer, tokenizer_hash
        from runtime.packed import score_sequences
        from runtime.weights import checkpoint_tensors
        from sampling.attest import make_canary, sync
        from sampling.backend import make_sampler
        from sampling.protocol import SamplingParams

        self.expert, self.seed = expert, seed
        self.tokenizer: Any = load_tokenizer(path)
        model = load_causal_lm(path, dtype=torch.bfloat16 if expert.dtype == "bfloat16" else torch.float32)
        if expert.backend == "native" and torch.cuda.is_available():
            model = model.to("cuda")
        if expert.fp8 and model.config.model_type != "deepseek_v3":
            raise UserError(f"experts ({expert.name}).fp8=True: {expert.model!r} is no DeepSeek-V3; leave it out")
        positions = model.config.max_position_embeddings
        self.longest = min(expert.max_prompt_tokens, positions - expert.max_tokens)
        if self.longest < 1:
            raise UserError(
                f"experts ({expert.name}).max_tokens={expert.max_tokens}: {expert.model!r} has {positions} positions, "
                "which leaves none for the prompt; lower it"
            )
        self.params = SamplingParams(
            n=expert.samples,
            max_tokens=expert.max_tokens,
            temperature=expert.temperature,
            stop_token_ids=tuple(end_token_ids(path, self.tokenizer)),
        )
        self.sampler = make_sampler(
            model,
            backend=expert.backend,
            dtype=expert.dtype,
            max_model_len=self.longest + expert.max_tokens,
            seed=seed,
            fp8=expert.fp8,
        )
        text = [i for problem in problems[:16] for i in self._ids(problem, "reasoning")]
        report = sync(
            self.sampler,
            lambda: checkpoint_tensors(model),
            version=0,
            canary=make_canary(model.config.vocab_size, text=text, dtype=self.sampler.dtype),
            score_trainer=lambda sequences: score_sequences(model, sequences),
        )
        settings = {
            "sampler": f"{type(self.sampler).__name__} {self.sampler.dtype}",
            "tokenizer": tokenizer_hash(self.tokenizer)[:16],
        }
        self.record = _record(expert, seed, weights_hash=_hash(sorted(report.fingerprints.items())), **settings)

    def answer(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[list[Sample]]:
        """All at once: an answer's index is its number in a group that is sampled together."""
        groups = [list(group) for _, group in groupby(requests, key=lambda r: (r.problem.position, r.kind))]
        prompts = [self._ids(group[0].problem, group[0].kind) for group in groups]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.longest]
        sampled = self.sampler.sample(
            [prompts[i] for i in fits],
            self.params,
            seeds=[seed_of(self.seed, groups[i][0], each=False) for i in fits],
        )
        completions = dict(zip(fits, sampled, strict=True))
        samples = []
        for i, group in enumerate(groups):
            for request in group:
                seed = seed_of(self.seed, request, each=False)
                if i in completions:
                    completion = completions[i][request.index]
                    text = str(self.tokenizer.decode(completion.ids, skip_special_tokens=True))
                    tokens = len(completion.ids)
                    samples.append(
                        _sample(request, self, seed, text=text, tokens=tokens, finish_reason=completion.finish_reason)
                    )
                else:
                    error = f"its prompt of {len(prompts[i])} tokens is longer than {self.longest}"
                    samples.append(_sample(request, self, seed, finish_reason="error", error=error))
        yield samples

    def close(self) -> None:
        self.sampler.close()

    def _ids(self, problem: Problem, kind: Kind) -> list[int]:
        from sft.chat import encode_prompt

        return encode_prompt(self.tokenizer, conversation(problem, kind, self.expert.system))


@dataclass(frozen=True, kw_only=True)
class _Chat(backends.Request):
    """A conversation as a request to a server."""

    system: str = ""
    user: str = ""
    turns: Sequence[Message]

    @property
    def messages(self) -> list[Message]:
        return list(self.turns)


class EndpointTeacher:
    """A model behind an OpenAI-compatible server; answers come one by one."""

    def __init__(self, expert: ExpertConfig, *, seed: int) -> None:
        self.expert, self.seed = expert, seed
        try:
            self._generate = backends.connect(expert.client())
        except ValueError as error:
            raise UserError(f"experts ({expert.name}).{error}") from error
        self.record = _record(expert, seed, weights_hash=None)

    def answer(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[list[Sample]]:
        """Those under way when `stop` comes are waited for, the rest is not asked."""
        pool = ThreadPoolExecutor(self.expert.concurrency)
        waiting: set[Future[Sample]] = {pool.submit(self._ask, request) for request in requests}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                if answered := [future.result() for future in done]:
                    yield answered
                if stop():
                    waiting = {future for future in waiting if not future.cancel()}
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, request: Request) -> Sample:
        seed = seed_of(self.seed, request, each=True) % 2**31
        turns = conversation(request.problem, request.kind, self.expert.system)
        (reply,) = self._generate([_Chat(turns=turns, seed=seed)])
        if reply.text is None:
            return _sample(request, self, seed, finish_reason="error", error=reply.error)
        if not _is_unicode(reply.text):
            return _sample(request, self, seed, finish_reason="error", error="not a text: it holds lone surrogates")
        finish_reason = "length" if reply.cut else "stop"
        return _sample(request, self, seed, text=reply.text, tokens=len(words(reply.text)), finish_reason=finish_reason)

    def close(self) -> None:
        pass


def _sample(request: Request, teacher: Respondent, seed: int, **rest: Any) -> Sample:
    about: dict[str, Any] = {"text": "", "tokens": 0, "seed": seed, "teacher": teacher.record.id, **rest}
    return Sample(problem=request.problem.position, kind=request.kind, index=request.index, **about)


def _record(expert: ExpertConfig, seed: int, *, weights_hash: str | None, **more: Any) -> Teacher:
    names = ("domain", "temperature", "max_tokens", "samples", "system")
    settings = {**{name: getattr(expert, name) for name in names}, "run_seed": seed, **more}
    # Not where a server is: it may move between two attempts at a run.
    id = _hash([expert.model, weights_hash, settings])
    return Teacher(id=id, model=expert.model, weights_hash=weights_hash, settings=settings)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
