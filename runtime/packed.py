"""Any causal LM on packed sequences: many samples in one row, none padded, none visible to another.

Our DeepSeek-V3 takes a `Layout` itself. Other transformers models get it through an attention function registered
under the name "packed", which attends as the layout says; without one it is transformers' own SDPA.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deepseek_v3.attention import packed_attention
from deepseek_v3.packing import Layout
from runtime.logprobs import summed_logprobs, token_logprobs


class Packed(NamedTuple):
    """Segments end to end."""

    ids_T: Tensor
    """(T,) token ids."""
    layout: Layout
    """Where segments begin and end, and which continue others."""

    @property
    def cu_seqlens(self) -> Sequence[int]:
        """[0, ..., T]"""
        return self.layout.cu_seqlens

    @property
    def positions_T(self) -> Tensor:
        """Position of each token within its sample."""
        return self.layout.positions(self.ids_T.device)


def pack(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", *, parents: Sequence[int] | None = None
) -> Packed:
    """Token id lists -> one packed row. parents: which of them each continues (see `Layout`)."""
    ids_T = torch.tensor(list(chain.from_iterable(sequences)), device=device)
    return Packed(ids_T, Layout([0, *accumulate(map(len, sequences))], parents))


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature, (1, heads, T, d) -> (1, T, heads, d), by the segments of `layout`."""
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and layout.longest > window:
        raise ValueError(
            f"a sample of {layout.longest} tokens is longer than the model's sliding window of {window}: shorten it"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(q, k, v, layout, scale)[None], None


AttentionInterface.register("packed", _packed_attention_forward)
AttentionMaskInterface.register("packed", sdpa_mask)

# A ready-made mask of four dimensions passes through transformers untouched: none of T × T is built.
_NO_MASK = torch.zeros(1, 1, 1, 1)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, under the adapters if there are any."""
    found: Any = model
    return found.get_base_model() if hasattr(model, "peft_config") else found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal LM, with or without adapters."""
    base: Any = plain_model(model).base_model
    return base.layers


def packed_hidden(model: nn.Module, packed: Packed) -> Tensor:
    """Final hidden states (T, D) of packed samples, for our V3 or any transformers causal LM loaded as "packed"."""
    return _outputs(model, packed).last_hidden_state[0]


def _outputs(model: nn.Module, packed: Packed, **options: Any) -> Any:
    causal_lm: Any = plain_model(model)
    inputs: dict[str, Any] = dict(
        input_ids=packed.ids_T[None],
        position_ids=packed.positions_T[None],
        layout=packed.layout,
        use_cache=False,
        **options,
    )
    if not _is_ours(causal_lm):
        if causal_lm.config._attn_implementation != "packed":
            raise ValueError(
                f"attn_implementation={causal_lm.config._attn_implementation!r}: packed samples would see each other; "
                'load the model with attn_implementation="packed"'
            )
        inputs["attention_mask"] = _NO_MASK.to(packed.ids_T.device)
    return causal_lm.base_model(**inputs)


def logprobs_at(
    model: nn.Module, packed: Packed, states_C: Tensor, targets_C: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (C,) fp32 each, where `states_C` says which token of the row predicts each target."""
    head: Any = plain_model(model).get_output_embeddings()
    hidden_CD = packed_hidden(model, packed)[states_C]
    return token_logprobs(head, hidden_CD, targets_C, temperature=temperature, vocab_size=head.weight.shape[0])


class Targets(NamedTuple):
    """What a packed row is to predict."""

    states_C: Tensor
    """Which token of the row predicts each target."""
    ids_C: Tensor
    """Token ids."""


def logprobs_to_sum(
    model: nn.Module, packed: Packed, targets: Targets, further: Targets | None = None
) -> tuple[Tensor, Tensor | None]:
    """The log-probs of `logprobs_at`, (C,) fp32, for less, where the loss adds them up all with one weight.

    further: targets two tokens on, for our V3 with an MTP layer; their log-probs come second.
    """
    head: Any = plain_model(model).get_output_embeddings()
    outputs = _outputs(model, packed, **({} if further is None else {"output_mtp": True}))

    def logprobs(hidden_BTD: Tensor, targets: Targets) -> Tensor:
        return summed_logprobs(head, hidden_BTD[0][targets.states_C], targets.ids_C, vocab_size=head.weight.shape[0])

    first = logprobs(outputs.last_hidden_state, targets)
    return first, None if further is None else logprobs(outputs.mtp_hidden_state, further)


def packed_logprobs(
    model: nn.Module, packed: Packed, *, temperature: float = 1.0, only_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log π(token | its sample so far) and entropy, (T,) fp32 each, aligned with `packed.ids_T`.

    The first token of each sample has no prediction: 0. With `only_T` (True = wanted) just those tokens go through
    the head, and the others are 0.
    """
    if packed.layout.parents is not None:
        raise ValueError("segments that continue others: say with logprobs_at which state predicts which token")
    wanted = torch.ones_like(packed.ids_T, dtype=torch.bool) if only_T is None else only_T.clone()
    wanted[list(packed.cu_seqlens[:-1])] = False
    at = wanted.nonzero()[:, 0]
    logprobs, entropy = logprobs_at(model, packed, at - 1, packed.ids_T[at], temperature=temperature)
    zeros = logprobs.new_zeros(len(wanted))
    return zeros.index_copy(0, at, logprobs), zeros.index_copy(0, at, entropy)


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, max_tokens: int = 16_384
) -> list[list[float]]:
    """log π(token_t | tokens before t) at temperature 1, t = 1 .. len-1 of each sequence; a few packs at a time."""
    device = next(model.parameters()).device
    scores: list[list[float]] = []
    batch: list[Sequence[int]] = []
    for i, sequence in enumerate(sequences):
        batch.append(sequence)
        if i + 1 == len(sequences) or sum(map(len, batch)) >= max_tokens:
            packed = pack(batch, device)
            logprobs = packed_logprobs(model, packed)[0].tolist()
            scores += [logprobs[start + 1 : end] for start, end in pairwise(packed.cu_seqlens)]
            batch = []
    return scores


def _is_ours(model: nn.Module) -> bool:
    return type(model).__module__.split(".")[0] == "deepseek_v3"
