"""Groups to packed batches: who is trained, who counts, and where every token's numbers land."""

import pytest
import torch

from rl.batch import batches, count_known, make_batch, trainable
from runtime.packed import packed_logprobs

NAN = float("nan")


@pytest.fixture
def groups(make_group):
    return [
        make_group([[5, 6], [7]], prompt=[1, 2], logprobs=[[-0.1, -0.2], [-0.3]], advantages=[1.0, -1.0], cut=[1]),
        make_group([[8], [9, 9, 9]], prompt=[3], logprobs=[[-0.4], [-0.5, -0.6, -0.7]], advantages=[NAN, 0.0]),
    ]


def test_unknown_completions_are_left_out_and_equal_ones_are_not(groups):
    assert trainable(groups, mask_truncated=False) == [
        ([1, 2], [5, 6], [-0.1, -0.2], 1.0),
        ([1, 2], [7], [-0.3], -1.0),
        ([3], [9, 9, 9], [-0.5, -0.6, -0.7], 0.0),
    ]


def test_masked_truncated_completions_are_not_trained_but_still_counted(groups):
    kept = trainable(groups, mask_truncated=True)
    assert [ids for _, ids, _, _ in kept] == [[5, 6], [9, 9, 9]]
    assert count_known(groups) == 3


def test_everything_lands_behind_its_own_prompt(groups):
    batch = make_batch(trainable(groups, mask_truncated=False))
    assert batch.packed.ids_T.tolist() == [1, 2, 5, 6, 1, 2, 7, 3, 9, 9, 9]
    assert batch.packed.cu_seqlens == [0, 4, 7, 11]
    assert batch.packed.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert batch.loss_mask_T.tolist() == [bool(int(c)) for c in "00110010111"]
    assert batch.sequence_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert batch.advantages_N.tolist() == [1.0, -1.0, 0.0]
    assert batch.lengths_N.tolist() == [2, 1, 3]
    assert batch.sampler_logprobs_T.tolist() == pytest.approx([0, 0, -0.1, -0.2, 0, 0, -0.3, 0, -0.5, -0.6, -0.7])


def test_batches_fill_up_to_the_limit_in_order_and_lose_nothing(groups):
    samples = trainable(groups, mask_truncated=False)  # of 4, 3 and 4 tokens

    def sizes(limit: int) -> list[list[int]]:
        return [batch.lengths_N.tolist() for batch in batches(samples, max_tokens=limit)]

    assert sizes(11) == [[2, 1, 3]]
    assert sizes(10) == [[2, 1], [3]]
    assert sizes(7) == [[2, 1], [3]]
    assert sizes(6) == [[2], [1], [3]]
    assert sizes(1) == [[2], [1], [3]]  # a sample longer than the limit gets a batch of its own


def test_no_samples_make_no_batches(make_group):
    groups = [make_group([[5], [6]], advantages=[NAN, NAN])]
    assert list(batches(trainable(groups, mask_truncated=False), max_tokens=8)) == []
    assert count_known(groups) == 0


def test_a_packed_samples_log_probs_are_those_it_has_alone(make_policy):
    policy = make_policy()
    rows = [([1, 2, 3], [40, 41], [0.0, 0.0], 1.0), ([4], [50, 51, 52], [0.0] * 3, 1.0), ([5, 6], [60], [0.0], 1.0)]
    with torch.no_grad():
        batch = make_batch(rows)
        together, _ = packed_logprobs(policy.model, batch.packed, only_T=batch.loss_mask_T)
        alone = []
        for row in rows:
            one = make_batch([row])
            alone.append(packed_logprobs(policy.model, one.packed, only_T=one.loss_mask_T)[0])
            logits = policy.model(input_ids=one.packed.ids_T[None]).logits[0].log_softmax(-1)
            plain = logits[len(row[0]) - 1 : -1].gather(1, torch.tensor(row[1])[:, None])[:, 0]
            torch.testing.assert_close(alone[-1][one.loss_mask_T], plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
