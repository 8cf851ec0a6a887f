"""Groups to packed batches: who is trained, who counts, and where every token's numbers land."""

from itertools import chain

import numpy as np
import pytest
import torch

from rl.batch import batches, count_known, count_tokens, make_batch, trainable
from rl.types import Family, Sample

NAN = float("nan")


@pytest.fixture
def groups(make_group):
    return [
        make_group([[5, 6], [7]], prompt=[1, 2], logprobs=[[-0.1, -0.2], [-0.3]], advantages=[1.0, -1.0], cut=[1]),
        make_group([[8], [9, 9, 9]], prompt=[3], logprobs=[[-0.4], [-0.5, -0.6, -0.7]], advantages=[NAN, 0.0]),
    ]


def test_unknown_completions_are_left_out_and_equal_ones_are_not(groups):
    first = Sample(ids=[7], logprobs=[-0.3], advantage=-1.0)
    second = Sample(ids=[5, 6], logprobs=[-0.1, -0.2], advantage=1.0)
    third = Sample(ids=[9, 9, 9], logprobs=[-0.5, -0.6, -0.7], advantage=0.0)
    families = trainable(groups, mask_truncated=False)
    assert families == [Family(prompt=[1, 2], samples=[first, second]), Family(prompt=[3], samples=[third])]
    assert (count_known(groups), count_tokens(families)) == (3, 6)


def test_masked_truncated_completions_are_not_trained_but_still_counted(groups):
    kept = trainable(groups, mask_truncated=True)
    assert [sample.ids for family in kept for sample in family.samples] == [[5, 6], [9, 9, 9]]
    assert count_known(groups) == 3


def test_an_empty_completion_is_counted_and_not_trained(make_group):
    groups = [make_group([[], [5]], advantages=[1.0, -1.0])]
    (family,) = trainable(groups, mask_truncated=False)
    assert [sample.ids for sample in family.samples] == [[5]] and count_known(groups) == 2


def test_a_prompt_is_packed_once_and_its_completions_behind_it_without_their_last_tokens(groups):
    batch = make_batch(trainable(groups, mask_truncated=False))
    assert batch.packed.ids_T.tolist() == [1, 2, 5, 3, 9, 9]
    assert batch.packed.cu_seqlens == [0, 2, 3, 4, 6]
    assert batch.packed.layout.parents == [-1, 0, -1, 2]
    assert batch.packed.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    # [7] and [5, 6] are both predicted from the prompt's last token, at 1.
    assert batch.states_C.tolist() == [1, 1, 2, 3, 4, 5]
    assert batch.targets_C.tolist() == [7, 5, 6, 9, 9, 9]
    assert batch.sequence_C.tolist() == [0, 1, 1, 2, 2, 2]
    assert batch.advantages_N.tolist() == [-1.0, 1.0, 0.0]
    assert batch.lengths_N.tolist() == [1, 2, 3]
    assert batch.sampler_logprobs_C.tolist() == pytest.approx([-0.3, -0.1, -0.2, -0.5, -0.6, -0.7])
    assert batch.experts_LTK is None


def test_recorded_experts_line_up_with_the_packed_row(make_group):
    """An expert number that spells where it belongs: 100 · completion + position; prompts are the same in all."""
    group = make_group([[5, 6, 7], [8]], prompt=[1, 2], advantages=[1.0, -1.0])
    rows = [[0, 1, 102, 103], [0, 1]]
    groups = [group]
    for completion, row in zip(group.completions, rows, strict=True):
        object.__setattr__(completion, "experts", np.array(row, dtype=np.int16)[:, None, None].repeat(3, axis=1))
    batch = make_batch(trainable(groups, mask_truncated=False))
    assert batch.packed.ids_T.tolist() == [1, 2, 5, 6]
    assert batch.experts_LTK.tolist() == [[[0], [1], [102], [103]]] * 3
    alone = list(batches(trainable(groups, mask_truncated=False), max_tokens=99, share=False))
    assert alone[0].packed.ids_T.tolist() == [1, 2, 1, 2, 5, 6]
    assert alone[0].experts_LTK[0, :, 0].tolist() == [0, 1, 0, 1, 102, 103]
    object.__setattr__(group.completions[0], "experts", None)
    with pytest.raises(ValueError, match="record all completions or none"):
        make_batch(trainable(groups, mask_truncated=False))


def sizes(families: list[Family], limit: int, **options) -> list[list[int]]:
    return [batch.lengths_N.tolist() for batch in batches(families, max_tokens=limit, **options)]


def test_batches_fill_up_to_the_limit_in_order_and_lose_nothing(groups):
    families = trainable(groups, mask_truncated=False)  # of 3 and 3 tokens
    assert sizes(families, 6) == [[1, 2, 3]]
    assert sizes(families, 5) == [[1, 2], [3]]
    assert sizes(families, 3) == [[1, 2], [3]]
    assert sizes(families, 2) == [[1], [2], [3]]  # a family over the limit is divided
    assert sizes(families, 1) == [[1], [2], [3]]  # a completion over it gets a batch of its own


def test_unshared_every_completion_has_a_prompt_of_its_own(groups):
    families = trainable(groups, mask_truncated=False)
    assert sizes(families, 8, share=False) == [[1, 2, 3]]
    (batch,) = batches(families, max_tokens=8, share=False)
    assert batch.packed.ids_T.tolist() == [1, 2, 1, 2, 5, 3, 9, 9]
    assert batch.packed.layout.parents == [-1, -1, 1, -1, 3]
    assert sizes(families, 7, share=False) == [[1, 2], [3]]


def test_no_samples_make_no_batches(make_group):
    groups = [make_group([[5], [6]], advantages=[NAN, NAN])]
    assert list(batches(trainable(groups, mask_truncated=False), max_tokens=8)) == []
    assert count_known(groups) == 0


@pytest.mark.parametrize("share", [True, False])
def test_a_packed_completions_log_probs_are_those_it_has_alone(make_policy, make_group, share):
    policy = make_policy()
    groups = [
        make_group([[40, 41], [50], [60, 61, 62, 63]], prompt=[1, 2, 3], advantages=[1.0] * 3),
        make_group([[44], [51, 52, 53]], prompt=[4], advantages=[1.0] * 2),
    ]
    families = trainable(groups, mask_truncated=False)
    with torch.no_grad():
        (batch,) = batches(families, max_tokens=99, share=share)
        together, entropy = policy.logprobs(batch)
        plain, spread = [], []
        for family in families:
            for sample in family.samples:
                ids = torch.tensor(family.prompt + sample.ids)
                logp = policy.model(input_ids=ids[None]).logits[0].log_softmax(-1)[len(family.prompt) - 1 : -1]
                plain.append(logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0])
                spread.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(together, torch.cat(plain), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(spread), rtol=0, atol=1e-4)
    assert batch.targets_C.tolist() == list(chain(*(s.ids for f in families for s in f.samples)))
