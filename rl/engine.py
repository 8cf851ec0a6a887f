"""A sampler that always holds attested weights of the policy, and is brought back when its process is lost.

`sync` hands the policy's weights over and has the sampler prove that it holds them (design: attested weights). When an
engine in a process of its own dies or hangs, it is started again, reloaded and attested, and what it was asked for is
asked for anew: groups come whole or not at all. A server is waited for instead, until whoever started it has it again.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deepseek_v3.routing import has_routers
from rl.config import GRPOConfig, SamplingConfig
from rl.policy import Policy
from rl.rollout import rollout, stop_token_ids
from rl.types import Group, Prompt
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, mtp_layer
from runtime.weights import checkpoint_tensors
from sampling.attest import SyncReport, make_canary, sync
from sampling.backend import CANARY_TOKENS, make_sampler
from sampling.process import EngineLost, ProcessSampler
from sampling.protocol import Sampler, SamplingParams
from sampling.server import ServerPool

log = logging.getLogger(__name__)

T = TypeVar("T")


class Engine:
    """The sampler of a run."""

    def __init__(
        self, config: GRPOConfig, world: World, policy: Policy, *, model: Path | str, text: Sequence[int]
    ) -> None:
        """model: the checkpoint the policy was loaded from. text: token ids to make the canary of."""
        self.policy = policy
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
            self.sampler = connect(config.sampling, positions=positions, rank=world.rank)
        else:
            self.sampler = make_sampler(
                # Samplers know no adapters: they are sent merged weights.
                policy.causal_lm if config.lora is None else load_causal_lm(model).to(world.device),
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

    def sync(self, version: int) -> SyncReport:
        """Hand over the policy as it is now, and have the sampler prove that it holds it."""
        self.version = version
        return self._surviving(self._sync)

    def rollout(self, prompts: Sequence[Prompt]) -> list[Group]:
        """A group of completions for each prompt."""
        return self._surviving(lambda: rollout(self.sampler, prompts, self.params, self.policy.tokenizer))

    def use(self, work: Callable[[Sampler], T]) -> T:
        """Anything else that samples, evaluation say; it may be begun again."""
        return self._surviving(lambda: work(self.sampler))

    def close(self) -> None:
        """Free the engine."""
        self.sampler.close()

    def _sync(self) -> SyncReport:
        if isinstance(self.sampler, ServerPool):
            return self.sampler.sync(
                lambda: checkpoint_tensors(self.policy.model),
                version=self.version,
                canary=self.canary,
                score_trainer=self.policy.score,
            )
        self.synced = sync(
            self.sampler,
            lambda: checkpoint_tensors(self.policy.model),
            version=self.version,
            canary=self.canary,
            score_trainer=self.policy.score,
            previous=self.synced,
        )
        return self.synced

    def _surviving(self, work: Callable[[], T]) -> T:
        """What `work` returns; an engine lost meanwhile is restarted and synced, and `work` begun again."""
        lost = False
        while True:
            try:
                if lost:
                    assert isinstance(self.sampler, ProcessSampler | ServerPool)
                    self.sampler.restart()
                    self._sync()
                return work()
            except EngineLost as error:
                if self.restarts >= self.max_restarts:
                    raise EngineLost(
                        f"{error}; it was started again {self.restarts} times, as sampling.max_restarts allows. "
                        "--resume goes on from the last checkpoint"
                    ) from error
                lost = True
                now = "waiting for it" if isinstance(self.sampler, ServerPool) else "starting it again"
                log.warning("%s; %s (%d of %d)", error, now, self.restarts + 1, self.max_restarts)


def connect(sampling: SamplingConfig, *, positions: int, rank: int) -> ServerPool:
    """The servers of `sampling.server_urls`, once they are there. positions: of the model. Raises UserError."""
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
        )
    except EngineLost as error:
        raise UserError(f"sampling.server_urls: {error}; start it by: python -m sampling.serve --model ...") from error
