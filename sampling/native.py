"""Our own sampler: groups decoded in lock step on a private copy of the model, for any causal LM.

DeepSeek-V3 takes the latent-cache `GroupDecoder`; other transformers models their own key-value cache. A group's
prompt is prefilled once, finished rows leave the batch, and what a row samples depends on its seed alone: not on
which rows it is batched with. A V3 with an MTP layer can draft with it (speculate.py). Needs no vLLM.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.decode import GroupDecoder
from deepseek_v3.fp8.linear import use_fp8
from deepseek_v3.routing import has_routers, recorded
from runtime.models import mtp_layer
from runtime.packed import score_sequences
from runtime.weights import checkpoint_views
from sampling.attest import WeightsMismatch, fingerprint
from sampling.draws import Rows, row_uniforms, sample_tokens
from sampling.protocol import Completion, Fingerprints, SamplingParams, Weights, check_seeds
from sampling.speculate import decode_speculatively

# Rows decoded together. Larger batches gain nothing on a CPU and cost memory.
MAX_ROWS = 512


class Decoder(Protocol):
    """Rows growing one token a step."""

    logits_BV: Tensor

    def step(self, ids_B: Tensor) -> None: ...
    def keep(self, live_B: Tensor) -> None: ...


class NativeSampler:
    """Samples from its own copy of `model`; `load` writes the trainer's weights into that copy."""

    def __init__(self, model: PreTrainedModel, *, max_rows: int = MAX_ROWS, fp8: bool = False) -> None:
        """`model` gives the architecture and the first weights; it is copied, never shared. It keeps its dtype.

        fp8: the linear layers of a DeepSeek-V3 compute in FP8; weights are held in their dtype all the same.
        """
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if fp8:
            use_fp8(self.model, "forward")
        self.dtype = "float8" if fp8 else str(self.model.dtype).removeprefix("torch.")
        self.max_rows = max_rows
        self.version = -1
        self._views = checkpoint_views(self.model)

    @torch.no_grad()
    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """Copy checkpoint-named tensors in; return fingerprints of what is then held, read back from the model."""
        self.version = -1
        awaited = set(self._views)
        for name, tensor in weights:
            if name not in self._views:
                raise WeightsMismatch(f"{name}: the sampler's model has no such tensor")
            if self._views[name].shape != tensor.shape:
                held = tuple(self._views[name].shape)
                raise WeightsMismatch(f"{name}: shape {tuple(tensor.shape)} sent, {held} held")
            self._views[name].copy_(tensor)
            awaited.discard(name)
        if awaited:
            raise WeightsMismatch(f"{len(awaited)} of {len(self._views)} tensors never sent: {sorted(awaited)[:8]}")
        self.version = version
        return {name: fingerprint(view) for name, view in self._views.items()}

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        if self.version < 0:
            raise WeightsMismatch(
                "the sampler holds no attested weights: load() failed or never ran; sync before sampling"
            )
        self._check(prompts, params, seeds)
        groups: list[list[Completion]] = []
        per_wave = max(self.max_rows // params.n, 1)
        for start in range(0, len(prompts), per_wave):
            wave = slice(start, start + per_wave)
            groups += self._wave(prompts[wave], params, seeds[wave])
        return groups

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> None:
        check_seeds(prompts, seeds)
        config = self.model.config
        if params.speculate and mtp_layer(self.model) is None:
            raise ValueError("speculate=True: the model has no MTP layer to draft with; use False")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise ValueError(f"prompt {i}: token ids outside 0..{config.vocab_size - 1}")
            if len(prompt) + params.max_tokens > config.max_position_embeddings:
                raise ValueError(
                    f"prompt {i}: {len(prompt)} tokens + {params.max_tokens} new exceed the model's "
                    f"max_position_embeddings={config.max_position_embeddings}: shorten it or lower max_tokens"
                )

    def _wave(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        record = params.record_experts and has_routers(self.model)
        with recorded(self.model) if record else nullcontext() as choices:
            if params.speculate:
                rows = decode_speculatively(self.model, prompts, params, seeds)
            else:
                rows = self._decode(prompts, params, seeds)
        experts: list[np.ndarray] | None = None
        if choices is not None:
            lengths, fed = rows.lengths_B.tolist(), rows.fed_S.cpu().numpy()
            experts = experts_by_row(choices.chosen_LTK.cpu().numpy(), prompts, lengths, fed, n=params.n)
        return self._completions(rows, params, experts)

    def _decode(self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]) -> Rows:
        device = self.model.get_input_embeddings().weight.device
        kind = GroupDecoder if isinstance(self.model, DeepseekV3ForCausalLM) else CachedDecoder
        decoder: Decoder = kind(self.model, prompts, n=params.n, max_tokens=params.max_tokens)
        uniform_BT = row_uniforms(seeds, params.n, params.max_tokens).to(device)
        stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        rows = len(prompts) * params.n
        ids_BT = torch.zeros(rows, params.max_tokens, dtype=torch.long, device=device)
        logprobs_BT = torch.zeros(rows, params.max_tokens, device=device)
        lengths_B = torch.full((rows,), params.max_tokens, device=device)
        alive_B = torch.arange(rows, device=device)  # which original row each live row is
        finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
        fed = [alive_B[:0]]
        for t in range(params.max_tokens):
            ids, logprobs = sample_tokens(decoder.logits_BV, params.temperature, uniform_BT[alive_B, t])
            ids_BT[alive_B, t], logprobs_BT[alive_B, t] = ids, logprobs
            now = torch.isin(ids, stops) & ~finished_B
            lengths_B[alive_B[now]] = t + 1
            finished_B |= now
            if bool(finished_B.all()) or t + 1 == params.max_tokens:
                break
            # Taking rows out copies their caches, so they leave once an eighth has finished.
            if int(finished_B.sum()) * 8 >= len(finished_B):
                decoder.keep(~finished_B)
                ids, alive_B, finished_B = ids[~finished_B], alive_B[~finished_B], finished_B[~finished_B]
            decoder.step(ids)
            fed.append(alive_B)
        return Rows(ids_BT, logprobs_BT, lengths_B, torch.cat(fed))

    def _completions(
        self, rows: Rows, params: SamplingParams, experts: list[np.ndarray] | None
    ) -> list[list[Completion]]:
        stops = set(params.stop_token_ids)
        completions = [
            Completion(
                ids=ids[:length],
                logprobs=logprobs[:length],
                finish_reason="stop" if ids[length - 1] in stops else "length",
                version=self.version,
                experts=None if experts is None else experts[row],
                drafts=None if rows.drafts_B2 is None else tuple(rows.drafts_B2[row].tolist()),
            )
            for row, (ids, logprobs, length) in enumerate(
                zip(rows.ids_BT.tolist(), rows.logprobs_BT.tolist(), rows.lengths_B.tolist(), strict=True)
            )
        ]
        return [completions[i : i + params.n] for i in range(0, len(completions), params.n)]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return score_sequences(self.model, sequences)

    def close(self) -> None:
        self.version = -1
        del self.model, self._views


class CachedDecoder:
    """The decoder for any transformers causal LM: prompts left-padded once, rows on its own key-value cache."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int) -> None:
        device = model.get_input_embeddings().weight.device
        longest = max(map(len, prompts))
        ids_PS = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        mask_PS = torch.zeros_like(ids_PS)
        for row, prompt in enumerate(prompts):
            ids_PS[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask_PS[row, longest - len(prompt) :] = 1
        self.model, self.cache = model, DynamicCache(config=model.config)
        positions_PS = (mask_PS.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids_PS,
            attention_mask=mask_PS,
            position_ids=positions_PS,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.logits_BV = logits[:, -1].repeat_interleave(n, dim=0)
        self.cache.batch_repeat_interleave(n)
        self.mask_BS = mask_PS.repeat_interleave(n, dim=0)

    def keep(self, live_B: Tensor) -> None:
        rows = live_B.nonzero()[:, 0]
        self.cache.batch_select_indices(rows)
        self.logits_BV, self.mask_BS = self.logits_BV[rows], self.mask_BS[rows]

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> None:
        self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(len(ids_B), 1)], dim=1)
        self.logits_BV = self.model(
            input_ids=ids_B[:, None],
            attention_mask=self.mask_BS,
            position_ids=self.mask_BS.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]


def experts_by_row(
    chosen_LTK: np.ndarray,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    fed_S: np.ndarray,
    *,
    n: int,
) -> list[np.ndarray]:
    """Experts as a decoder met them, all prompts and then step by step its live rows -> (prompt + length − 1, L, K) for
    each row, n rows per prompt. fed_S: the row of each token after the prompts, −1: of none. A row may stay in the
    batch after its last token; what it was fed then is left out."""
    chosen_TLK = np.ascontiguousarray(chosen_LTK.transpose(1, 0, 2))
    *starts, end = accumulate(map(len, prompts), initial=0)
    shared = np.split(chosen_TLK[:end], starts[1:])
    order_S = np.argsort(fed_S, kind="stable")  # a row's tokens together, in the order of the steps
    grown_SLK = chosen_TLK[end:][order_S]
    first_B = np.searchsorted(fed_S[order_S], np.arange(len(lengths)))
    return [
        np.concatenate([shared[row // n], grown_SLK[first : first + length - 1]])
        for row, (first, length) in enumerate(zip(first_B, lengths, strict=True))
    ]
