"""Attention over packed segments is softmax under the layout's mask, forward and backward, on every path."""

import pytest
import torch

from deepseek_v3.packing import Layout, SegmentAttention, block_mask

LAYOUTS = {
    "one sample": ([17], None),
    "uneven samples": ([4, 40, 3, 1, 9], None),
    "one family": ([5, 3, 4, 20, 1], [-1, 0, 0, 0, 0]),
    "families and a sample": ([5, 3, 4, 9, 20, 7, 1, 2, 6], [-1, 0, 0, 0, 0, -1, 5, 5, -1]),
    "a prompt nobody continues": ([5, 6, 2, 2], [-1, -1, 1, 1]),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    lengths, parents = LAYOUTS[request.param]
    return Layout([0, *torch.tensor(lengths).cumsum(0).tolist()], parents)


def visible(layout: Layout) -> torch.Tensor:
    """(T, T) True = may be attended to, token by token."""
    parents = layout.parents or [-1] * len(layout.lengths)
    segment = [s for s, n in enumerate(layout.lengths) for _ in range(n)]
    T = len(segment)
    return torch.tensor(
        [
            [(segment[i] == segment[j] and i >= j) or parents[segment[i]] == segment[j] for j in range(T)]
            for i in range(T)
        ]
    )


def by_hand(q, k, v, layout: Layout, scale: float) -> torch.Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible(layout), -torch.inf).softmax(-1), v)


def tensors(layout: Layout, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    T = layout.cu_seqlens[-1]
    return [torch.randn(T, 3, 16, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_are_those_of_the_masked_softmax(layout, dtype, tolerance):
    ours, theirs = tensors(layout, dtype), tensors(layout, dtype)
    got, expected = SegmentAttention.apply(*ours, layout, 0.3), by_hand(*theirs, layout, 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=tolerance)


def test_bf16_is_joined_in_fp32(layout):
    exact = [x.detach() for x in tensors(layout)]
    got = SegmentAttention.apply(*(x.bfloat16() for x in exact), layout, 0.3)
    expected = by_hand(*(x.bfloat16().double() for x in exact), layout, 0.3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.02)


def test_flex_attentions_mask_is_the_same(layout):
    """What runs on CUDA; on a CPU FlexAttention has no backward."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    mask = block_mask(layout, "cpu")
    T = layout.cu_seqlens[-1]
    assert torch.equal(create_mask(mask.mask_mod, None, None, T, T, device="cpu")[0, 0], visible(layout))
    q, k, v = (x.detach().float().transpose(0, 1)[None] for x in tensors(layout))
    got = flex_attention(q, k, v, block_mask=mask, scale=0.3)[0].transpose(0, 1)
    expected = SegmentAttention.apply(*(x.detach().float() for x in tensors(layout)), layout, 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_positions_go_on_where_the_parent_ends():
    layout = Layout([0, 2, 5, 6, 8], [-1, 0, 0, -1])
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert layout.longest == 5


def test_neighbours_of_about_one_length_run_together():
    layout = Layout([0, 40, 80, 125, 130, 230])
    assert [run.lengths for run in layout.runs] == [[40, 40, 45], [5], [100]]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 0], "2 for 3 segments"),
        ([1, -1, -1], "segment 0 continues 1: a parent comes first"),
        ([-1, 0, 1], "segment 2 continues 1: a parent comes first and continues nothing itself"),
    ],
)
def test_parents_that_make_no_sense_are_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        Layout([0, 2, 4, 6], parents)


def test_siblings_apart_are_refused():
    with pytest.raises(ValueError, match="segment 3 continues 0 apart from its siblings"):
        _ = Layout([0, 2, 4, 6, 8], [-1, 0, -1, 0]).families
