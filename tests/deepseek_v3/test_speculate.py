"""Drafts and the logits that judge them are those of full forwards, however unevenly rows grow."""

import pytest
import torch

from deepseek_v3.speculate import SpeculativeDecoder

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [8]]
KEPT = {2: [0, 1, 2, 4, 5], 4: [1, 2, 3, 4], 6: [0, 3]}
"""Round -> live rows that stay: one row leaves, another, and then a whole group."""


@pytest.fixture(params=["absorbed", "expanded"])
def model(request, make):
    sizes = {"absorbed": {}, "expanded": dict(num_attention_heads=1, kv_lora_rank=48)}[request.param]
    return make(num_nextn_predict_layers=1, **sizes)


@torch.no_grad()
def test_every_round_has_the_logits_of_full_forwards(model) -> None:
    """Whatever is sampled, drafted and accepted; rows that keep neither token stand still."""
    decoder = SpeculativeDecoder(model, PROMPTS, n=2, max_tokens=16)
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    for row, logits in zip(rows, decoder.logits_BV, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0, -1], atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    grown = set()
    for turn in range(8):
        if turn in KEPT:
            rows = [rows[i] for i in KEPT[turn]]
            decoder.keep(torch.tensor([i in KEPT[turn] for i in range(len(decoder.positions_B))]))
        sampled, drafted = torch.randint(64, (2, len(rows)), generator=generator)
        by = torch.randint(3, (len(rows),), generator=generator)
        drafts, judgements = decoder.draft(sampled), decoder.judge(drafted)
        decoder.advance(by)
        for b, row in enumerate(rows):
            ids = torch.tensor([[*row, int(sampled[b]), int(drafted[b])]])
            predicted = model.lm_head(model.model(ids, output_mtp=True).mtp_hidden_state[0, len(row) - 1])
            torch.testing.assert_close(drafts[b], predicted, atol=1e-5, rtol=0)
            torch.testing.assert_close(judgements[b], model(ids).logits[0, -2:], atol=1e-5, rtol=0)
            row += ids[0, len(row) : len(row) + int(by[b])].tolist()
        grown |= {len(row) for row in rows}
    assert decoder.absorbed == (model.config.num_attention_heads == 4) and len(grown) > 6


def test_a_model_without_the_layer_is_refused(make) -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0: this model has no MTP layer to draft with"):
        SpeculativeDecoder(make(), PROMPTS, n=1, max_tokens=4)
