"""Prompts -> sampled rows, one or two tokens a round: the loop around a V3 whose MTP layer drafts every other token.

Distribution and log-probs are those of plain decoding; at temperature 0 the tokens are, unless two are equally likely
but for rounding. At other temperatures a seed gives other tokens than it does there, and as there a row's are a
function of its seed alone: each token has draws of its own for its draft, for the draft's acceptance, and for itself
where it isn't a draft.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.speculate import SpeculativeDecoder
from sampling.draws import Rows, judge_drafts, row_uniforms, sample_tokens
from sampling.protocol import SamplingParams


def decode_speculatively(
    model: DeepseekV3ForCausalLM, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
) -> Rows:
    """Sample `params.n` rows for each prompt."""
    device, most, temperature = model.device, params.max_tokens, params.temperature
    decoder = SpeculativeDecoder(model, prompts, n=params.n, max_tokens=most)
    uniform_B3T = row_uniforms(seeds, params.n, 3 * most).to(device).unflatten(1, (3, most))
    sample_BT, draft_BT, accept_BT = uniform_B3T.unbind(1)
    stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
    rows = len(sample_BT)
    ids_BT = torch.zeros(rows, most, dtype=torch.long, device=device)
    logprobs_BT = torch.zeros(rows, most, device=device)
    lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
    drafts_B2 = torch.zeros(rows, 2, dtype=torch.long, device=device)
    fed = [lengths_B[:0]]
    alive_B = torch.arange(rows, device=device)  # which original row each row still in the batch is
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)

    def append(to_B: Tensor, ids: Tensor, logprobs: Tensor) -> None:
        row = alive_B[to_B]
        ids_BT[row, lengths_B[row]], logprobs_BT[row, lengths_B[row]] = ids, logprobs
        lengths_B[row] += 1
        finished_B[to_B] = torch.isin(ids, stops) | (lengths_B[row] == most)

    ids_B, logprobs_B = sample_tokens(decoder.logits_BV, temperature, sample_BT[:, 0])
    append(~finished_B, ids_B, logprobs_B)
    while not bool(finished_B.all()):
        # Taking rows out copies their caches, so they leave once an eighth has finished.
        if int(finished_B.sum()) * 8 >= len(finished_B):
            decoder.keep(~finished_B)
            ids_B, alive_B, finished_B = ids_B[~finished_B], alive_B[~finished_B], finished_B[~finished_B]
        live_B = ~finished_B
        t_B = lengths_B[alive_B].clamp(max=most - 1)  # of the token that is drafted
        draft_logits_BV = decoder.draft(ids_B)
        draft_B, _ = sample_tokens(draft_logits_BV, temperature, draft_BT[alive_B, t_B])
        logits_B2V = decoder.judge(draft_B)
        draws = accept_BT[alive_B, t_B], sample_BT[alive_B, t_B]
        accepted_B, ids_B, logprobs_B = judge_drafts(logits_B2V[:, 0], draft_logits_BV, draft_B, temperature, *draws)
        append(live_B, ids_B[live_B], logprobs_B[live_B])
        kept_B2 = torch.stack([live_B, live_B & accepted_B], dim=1)
        drafts_B2[alive_B] += kept_B2
        fed.append(torch.where(kept_B2, alive_B[:, None], -1).flatten())

        more_B = accepted_B & ~finished_B
        row = alive_B[more_B]
        ids, logprobs = sample_tokens(logits_B2V[more_B, 1], temperature, sample_BT[row, lengths_B[row]])
        append(more_B, ids, logprobs)
        ids_B[more_B] = ids
        decoder.advance(kept_B2.sum(1).where(~finished_B, 0))
    return Rows(ids_BT, logprobs_BT, lengths_B, torch.cat(fed), drafts_B2)
