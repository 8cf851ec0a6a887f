"""Our model computes what transformers' own DeepSeek-V3 computes, padded, packed or cached."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

VARIANTS = {
    "base": {},
    "q_lora": dict(q_lora_rank=20),
    "default_rope": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "half_rope": dict(rope_interleave=False),
    "one_group": dict(n_group=1, topk_group=1),
    "all_dense": dict(first_k_dense_replace=3),
    "no_dense_unnormalised": dict(first_k_dense_replace=0, norm_topk_prob=False),
    "biases_and_eps": dict(attention_bias=True, rms_norm_eps=1e-3, q_lora_rank=20),
    "mscale": dict(
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32, mscale=0.7
        )
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, make):
    return make(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def base(make):
    return make()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(seed))


def chosen_experts(model, **inputs) -> list[torch.Tensor]:
    """Sorted expert ids per routed layer and token."""
    seen = []

    def note(module, args, output):
        seen.append(output[0 if len(output) == 2 else 2].sort(-1).values)

    hooks = [m.register_forward_hook(note) for name, m in model.named_modules() if name.endswith("mlp.gate")]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_gradients_and_experts_are_those_of_transformers(model, twin, attention):
    theirs = twin(model, attention)
    ids = random_ids(2, 50)  # beyond the 32 positions of the original context
    expected, got = theirs(ids).logits, model(ids).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for a, b in zip(chosen_experts(model, input_ids=ids), chosen_experts(theirs, input_ids=ids), strict=True):
        assert torch.equal(a.view(b.shape), b)

    loss, expected_loss = model(ids, labels=ids).loss, theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    model.zero_grad()
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, twin, side):
    ids = random_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :1] = 0
    if side == "right":
        mask = mask.flip(1)
    inputs = dict(input_ids=ids, attention_mask=mask)
    real = mask.bool()
    got, expected = model(**inputs).logits, twin(model)(**inputs).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=0)
    moved = model(**inputs | dict(input_ids=torch.where(real, ids, (ids + 5) % 64))).logits
    assert torch.equal(moved[real], got[real])


def test_far_positions_agree_with_transformers(model, twin):
    positions = torch.tensor([[3, 40, 90, 126, 127]])
    inputs = dict(input_ids=random_ids(1, 5), position_ids=positions)
    torch.testing.assert_close(model(**inputs).logits, twin(model)(**inputs).logits, atol=1e-5, rtol=0)
    near = model(inputs["input_ids"]).logits
    assert (near - model(**inputs).logits)[0, 1:].abs().max() > 1e-3


def test_hidden_states_and_tuples_are_those_of_transformers(base, twin):
    ids = random_ids(2, 9)
    got, expected = (m(ids, output_hidden_states=True).hidden_states for m in (base, twin(base)))
    assert len(got) == len(expected) == 4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert torch.equal(base(ids, return_dict=False)[0], base(ids).logits)


def test_logits_to_keep_are_the_last_ones(base):
    ids = random_ids(2, 9)
    whole = base(ids).logits
    torch.testing.assert_close(base(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(base(inputs_embeds=base.model.embed_tokens(ids)).logits, whole)


def test_greedy_generation_is_that_of_a_full_forward_and_of_transformers(model, twin):
    ids = random_ids(2, 12)
    options = dict(max_new_tokens=12, do_sample=False)
    got = model.generate(ids, **options)
    grown = ids
    for _ in range(12):
        grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, grown)
    assert torch.equal(got, twin(model).generate(ids, **options))


def test_left_padded_generation_is_that_of_transformers_and_of_each_prompt_alone(model, twin):
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :1] = 0
    inputs = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    got = model.generate(ids, **inputs)
    assert torch.equal(got, twin(model).generate(ids, **inputs))
    alone = model.generate(ids[:1, 7:], max_new_tokens=8, do_sample=False)
    assert torch.equal(got[:1, 7:], alone)


def test_a_cache_filled_in_chunks_gives_the_logits_of_a_full_forward(model):
    from transformers import DynamicCache

    ids, cache = random_ids(2, 20), DynamicCache()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([9, 1, 6, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-5, rtol=0)


def test_beam_search_is_that_of_transformers(base, twin):
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    ids = random_ids(2, 7)
    assert torch.equal(base.generate(ids, **options), twin(base).generate(ids, **options))


LENGTHS = [5, 17, 1, 9, 9]
BOUNDS = [0, 5, 22, 23, 32, 41]


def packed_loss(model, ids, bounds):
    """Sum over samples of the next-token losses inside each."""
    logits = model(ids, cu_seqlens=bounds).logits[0]
    inside = [i for a, b in pairwise(bounds) for i in range(a, b - 1)]
    return F.cross_entropy(logits[inside], ids[0, [i + 1 for i in inside]], reduction="sum")


def test_packed_samples_are_those_computed_apart(model):
    ids = random_ids(1, BOUNDS[-1])
    packed = model(ids, cu_seqlens=BOUNDS).logits
    apart = [model(part).logits for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), atol=1e-5, rtol=0)

    model.zero_grad()
    loss = packed_loss(model, ids, BOUNDS)
    loss.backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    separate = sum(packed_loss(model, part, [0, part.shape[1]]) for part in ids.split(LENGTHS, dim=1))
    separate.backward()
    torch.testing.assert_close(loss, separate, atol=1e-4, rtol=1e-6)
    for name, p in model.named_parameters():
        assert (p.grad - packed_gradients[name]).abs().max() <= 1e-4 * p.grad.abs().max(), name


def test_no_gradient_crosses_between_samples(model):
    """Exactly zero, so the outputs of one sample are no function of another, whatever the arithmetic."""
    embedded = model.model.embed_tokens(random_ids(1, BOUNDS[-1])).detach().requires_grad_()
    model(inputs_embeds=embedded, cu_seqlens=BOUNDS).logits[0, 5:22].square().sum().backward()
    reached = embedded.grad[0].abs().sum(-1) > 0
    assert reached.nonzero()[:, 0].tolist() == list(range(5, 22))


def test_no_bit_of_a_sample_depends_on_its_neighbours(make):
    """With dense layers: how many tokens an expert gets changes the order of a matmul's sums."""
    model = make(first_k_dense_replace=3)
    ids = random_ids(1, BOUNDS[-1])
    b = slice(5, 22)
    changed = (ids + 7) % 64
    changed[:, b] = ids[:, b]
    before, after = (model(x, cu_seqlens=BOUNDS).logits for x in (ids, changed))
    assert torch.equal(before[:, b], after[:, b])
    assert not torch.allclose(before[:, :5], after[:, :5])


def test_equal_and_unequal_lengths_take_the_same_values(base):
    """Samples of one length run as one batch: another order of the same sums."""
    ids = random_ids(1, 30)
    equal = base(ids, cu_seqlens=[0, 10, 20, 30]).logits[:, :20]
    unequal = base(ids, cu_seqlens=[0, 10, 20, 23, 30]).logits[:, :20]
    torch.testing.assert_close(equal, unequal, atol=1e-6, rtol=0)


def test_contradictory_inputs_are_refused(base):
    ids = random_ids(2, 6)
    half = torch.ones_like(ids)
    half[0, :3] = 0
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        base()
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        base(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="either attention_mask"):
        base(ids, attention_mask=half, cu_seqlens=[0, 12])
    with pytest.raises(ValueError, match="can't be combined with a cache"):
        base(ids, cu_seqlens=[0, 12], use_cache=True)
