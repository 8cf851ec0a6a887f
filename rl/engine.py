"""A sampler that always holds attested weights of the policy, and is brought back when its process is lost.

`sync` hands the policy's weights over and has the sampler prove that it holds them (design: attested weights). When an
engine in a process of its own dies or hangs, it is started again, reloaded and attested, and what it was asked for is
asked for anew: groups come whole or not at all. A server is waited for instead, until whoever started it has it again,
or the run is told to leave. Of several processes the first brings servers their weights, and where one has lost its
engine all sync again.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from deepseek_v3.routing import has_routers
from rl.config import GRPOConfig, SamplingConfig
from rl.policy import Policy
from rl.rollout import rollout, stop_token_ids
from rl.types import Group, Prompt
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, mtp_layer
from runtime.weights import checkpoint_tensors
from sampling.attest import SyncReport, WeightsMismatch, make_canary, sync
from sampling.backend import CANARY_TOKENS, make_sampler
from sampling.process import EngineLost, ProcessSampler
from sampling.protocol import Sampler, SamplingParams
from sampling.server import ServerPool
from sampling.transfer import fingerprints_of

log = logging.getLogger(__name__)

T = TypeVar("T")


class Engine:
    """The sampler of a run."""

    def __init__(
        self,
        config: GRPOConfig,
        world: World,
        policy: Policy,
        *,
        model: Path | str,
        text: Sequence[int],
        leaving: Callable[[], bool],
    ) -> None:
        """model: the checkpoint the policy was loaded from. text: token ids to make the canary of. leaving: whether to
        give an engine up that is lost."""
        self.policy, self.world, self.leaving = policy, world, leaving
        record = config.sampling.experts != "ignore"
        if record and not has_routers(policy.model):
            raise UserError(
                f"sampling.experts={config.sampling.experts}: {config.model!r} has no experts that could be recorded; "
                "use ignore"
            )
        if config.sampling.speculate and mtp_layer(policy.model) is None:
            raise UserError(
                f"sampling.speculate=True: {config.model!r} has no MTP layer to draft with, by "
                "num_nextn_predict_layers in its config.json; use false"
            )
        self.sampler: Sampler
        if config.sampling.backend == "server":
            positions = policy.causal_lm.config.max_position_embeddings
            self.sampler = connect(config.sampling, positions=positions, rank=world.rank, leaving=leaving)
        else:
            self.sampler = make_sampler(
                # Samplers know no adapters, which are merged on the way, nor parts of weights.
                policy.causal_lm if policy.is_plain else load_causal_lm(model).to(world.device),
                backend=config.sampling.backend,
                dtype=config.sampling.dtype,
                max_model_len=config.sampling.max_prompt_tokens + config.sampling.max_tokens,
                seed=config.seed,
                processes=world.size,
                process=config.sampling.process,
                time_limit=config.sampling.time_limit,
                record_experts=record,
                fp8=config.fp8 != "off",
            )
        self.backend = config.sampling.backend
        self.max_restarts = config.sampling.max_restarts
        self.canary = make_canary(
            policy.causal_lm.config.vocab_size,
            text=text,
            dtype="bfloat16" if config.precision == "bf16" and config.fp8 == "off" else self.sampler.dtype,
            sequences=2,
            length=CANARY_TOKENS,
        )
        self.params = SamplingParams(
            n=config.group_size,
            max_tokens=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=stop_token_ids(policy.tokenizer, policy.causal_lm),
            record_experts=record,
            speculate=config.sampling.speculate,
        )
        self.synced: SyncReport | None = None
        self.version = 0
        self.given_up = False
        """The engine was lost when the run was told to leave: nobody waits for it."""

    @property
    def name(self) -> str:
        """What samples, for people."""
        if isinstance(self.sampler, ServerPool):
            return f"servers {', '.join(member.wire.url for member in self.sampler.members)}"
        where = "its own process" if isinstance(self.sampler, ProcessSampler) else "this process"
        return f"{self.backend} engine in {where}"

    @property
    def restarts(self) -> int:
        """Times its process was started again, or lost servers were waited for."""
        return self.sampler.restarts if isinstance(self.sampler, ProcessSampler | ServerPool) else 0

    def sync(self, version: int) -> SyncReport | None:
        """Hand over the policy as it is now, and have the sampler prove that it holds it. None if it was given up."""
        self.version = version
        with contextlib.suppress(_GivenUp):
            return self._sync()
        return None

    def rollout(self, prompts: Sequence[Prompt]) -> list[Group] | None:
        """A group of completions for each prompt. None if the engine was given up."""
        return self.use(lambda sampler: rollout(sampler, prompts, self.params, self.policy.tokenizer))

    def use(self, work: Callable[[Sampler], T]) -> T | None:
        """What `work` returns; it is begun again where the engine is lost meanwhile. None if that was given up. All
        processes must call it, and get None together."""
        done: list[T] = []
        with contextlib.suppress(_GivenUp):
            while not self.given_up:
                lost = None
                if not done:
                    try:
                        done.append(work(self.sampler))
                    except EngineLost as error:
                        lost = error
                if not self._lost_anywhere(lost):
                    return done[0]
                self._sync(lost, again=True)
        return None

    def close(self) -> None:
        """Free the engine."""
        self.sampler.close()

    def _sync(self, lost: EngineLost | None = None, *, again: bool = False) -> SyncReport:
        """Attested weights in every process's sampler. lost: what became of this process's, which is restarted first.
        again: some process's was lost.

        What needs all processes, such as gathering weights they have but parts of, comes before anything that can be
        lost in one of them.
        """
        pool = self.sampler if isinstance(self.sampler, ServerPool) else None
        while True:
            model = self.policy.trained.whole(everywhere=pool is None)
            ours = self.policy.score(self.canary.sequences)
            reports: list[SyncReport] = []
            try:
                if lost is not None or (pool and again):  # servers are everybody's
                    assert isinstance(self.sampler, ProcessSampler | ServerPool)
                    self.sampler.restart()
                if pool is None or self.world.is_main:
                    assert model is not None
                    reports.append(self._attest(model, ours))
                lost = None
            except EngineLost as error:
                lost = error
            if again := self._lost_anywhere(lost):
                continue
            if pool is None or self.world.size == 1:
                return reports[0]
            report = self.world.gather(reports)[0]
            try:
                if not self.world.is_main:
                    self._follow(pool, report)
            except EngineLost as error:
                lost = error
            if not (again := self._lost_anywhere(lost)):
                return report

    def _attest(self, model: nn.Module, ours: list[list[float]]) -> SyncReport:
        """Send the weights and have them proved. ours: the policy's log-probs of the canary."""
        send: Callable[..., SyncReport]
        if isinstance(self.sampler, ServerPool):
            send = self.sampler.sync  # it remembers each server's last report itself
        else:
            send = functools.partial(sync, self.sampler, previous=self.synced)
        self.synced = send(
            lambda: checkpoint_tensors(model),
            version=self.version,
            canary=self.canary,
            score_trainer=lambda _: ours,
        )
        return self.synced

    def _follow(self, pool: ServerPool, report: SyncReport) -> None:
        """Take what the first process has attested; where weights are whole, they must be this process's own, too."""
        if not self.policy.trained.is_sharded:
            own = fingerprints_of(checkpoint_tensors(self.policy.model))
            if own != report.fingerprints:
                names = sorted(name for name in own if own[name] != report.fingerprints.get(name))
                raise WeightsMismatch(
                    f"process {self.world.rank} trains other weights than the first: {len(names)} of {len(own)} "
                    f"tensors differ, {', '.join(names[:3])}"
                )
        pool.follow(report.fingerprints, version=report.version)

    def _lost_anywhere(self, lost: EngineLost | None) -> bool:
        """Whether any process has lost its engine; raises where that has been too often, or any was told to leave."""
        found = self.world.gather([(lost is not None, self.leaving())])
        if not any(gone for gone, _ in found):
            return False
        if any(leaving for _, leaving in found):
            log.warning("the engine is lost, and the run was told to leave: it goes on when it is resumed")
            self.given_up = True
            raise _GivenUp
        if lost is not None:
            if self.restarts >= self.max_restarts:
                raise EngineLost(
                    f"{lost}; it was started again {self.restarts} times, as sampling.max_restarts allows. "
                    "--resume goes on from the last checkpoint"
                ) from lost
            now = "waiting for it" if isinstance(self.sampler, ServerPool) else "starting it again"
            log.warning("%s; %s (%d of %d)", lost, now, self.restarts + 1, self.max_restarts)
        return True


class _GivenUp(Exception):
    """An engine is lost and the run was told to leave; all processes raise it at the same point."""


def connect(sampling: SamplingConfig, *, positions: int, rank: int, leaving: Callable[[], bool]) -> ServerPool:
    """The servers of `sampling.server_urls`, once they are there. positions: of the model. leaving: whether to stop
    waiting for them. Raises UserError."""
    room = max(sampling.max_prompt_tokens + sampling.max_tokens, CANARY_TOKENS + 1)
    try:
        return ServerPool(
            sampling.server_urls,
            room=min(room, positions),
            weights_dir=sampling.weights_dir,
            transfer=sampling.transfer,
            time_limit=sampling.time_limit,
            start_limit=sampling.time_limit,
            rank=rank,
            leaving=leaving,
        )
    except EngineLost as error:
        raise UserError(f"sampling.server_urls: {error}; start it by: python -m sampling.serve --model ...") from error
