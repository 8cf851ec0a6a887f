"""A sampler in this process -> the backend of a judge (rewards/model_based/judge.py), which may not know samplers.

As a reward: `rl.judge:reward(source=judge.yaml)`, a file of `LocalJudge`; its engine runs in the reward's own process,
beside the policy's. Left out: guided decoding, which samplers here don't do; what ends in no verdict is unknown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rewards.model_based.backends import Reply, Request
from rewards.model_based.judge import JudgeConfig, judge_reward, open_judge
from rewards.model_based.settings import read_settings
from rl.rollout import stop_token_ids
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import score_sequences
from runtime.weights import checkpoint_tensors
from sampling.attest import make_canary, sync
from sampling.backend import CANARY_TOKENS, Backend, make_sampler
from sampling.protocol import Sampler, SamplingParams
from sft.chat import encode_prompt


@dataclass(frozen=True, kw_only=True)
class LocalJudge:
    """A judge whose model runs here."""

    model: str
    """Checkpoint folder or hub name of a causal LM."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """How it judges; without an endpoint."""
    backend: Backend = "auto"
    """What samples; "auto": vLLM where it is installed."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """vLLM's; "auto" as for a policy's sampler."""
    max_model_len: int = 8192
    """Longest question with its judgement, tokens; what is asked beyond that is unknown."""
    max_tokens: int = 2048
    """Longest judgement."""
    temperature: float = 0.6
    """Of its sampling; several votes need more than 0."""

    def __post_init__(self) -> None:
        if not 0 < self.max_tokens < self.max_model_len:
            raise ValueError(
                f"max_tokens={self.max_tokens}: leave room for a question in max_model_len={self.max_model_len}"
            )
        if self.judge.endpoint is not None:
            raise ValueError("judge.endpoint: leave it out; the model runs here")
        if not self.temperature >= 0 or (self.temperature == 0 and self.judge.votes > 1):
            raise ValueError(f"temperature={self.temperature}: more than 0, for votes={self.judge.votes} to differ")


def reward(source: str) -> Callable[..., list[float | None]]:
    """The reward function of a YAML file of `LocalJudge`; starts the sampler and asks the canaries now."""
    config = read_settings(source, LocalJudge)
    return judge_reward(open_judge(config.judge, open_backend(config)))


def open_backend(config: LocalJudge) -> "SamplerBackend":
    """A sampler that has proven to hold the checkpoint's weights, as a judge's backend."""
    model, tokenizer = load_causal_lm(config.model), load_tokenizer(config.model)
    room = min(config.max_model_len, model.config.max_position_embeddings)
    sampler = make_sampler(model, backend=config.backend, dtype=config.dtype, max_model_len=room)
    text = encode_prompt(tokenizer, config.judge.matches)
    canary = make_canary(model.config.vocab_size, text=text, dtype=sampler.dtype, length=CANARY_TOKENS)
    sync(
        sampler,
        lambda: checkpoint_tensors(model),
        version=0,
        canary=canary,
        score_trainer=lambda sequences: score_sequences(model, sequences),
    )
    params = SamplingParams(
        n=1,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        stop_token_ids=stop_token_ids(tokenizer, model),
    )
    return SamplerBackend(sampler, tokenizer, params, max_model_len=room)


class SamplerBackend:
    """A sampler as a judge's `Generate`: one completion for each request, all in one call."""

    def __init__(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, *, max_model_len: int
    ) -> None:
        """max_model_len: a request that leaves no room for max_tokens in it gets no reply."""
        self.sampler, self.tokenizer, self.params, self.max_model_len = sampler, tokenizer, params, max_model_len

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        ids = [encode_prompt(self.tokenizer, request.messages) for request in requests]
        fits = [i for i, prompt in enumerate(ids) if len(prompt) + self.params.max_tokens <= self.max_model_len]
        groups = self.sampler.sample([ids[i] for i in fits], self.params, seeds=[requests[i].seed for i in fits])
        replies = [Reply(text=None, error=f"too long for max_model_len={self.max_model_len}") for _ in requests]
        for i, (completion,) in zip(fits, groups, strict=True):
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
            replies[i] = Reply(text=text, cut=completion.finish_reason == "length")
        return replies

    def close(self) -> None:
        """Free the sampler."""
        self.sampler.close()
