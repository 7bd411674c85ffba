"""Queries and keys of lengths of their own, none of either, and queries that are a part of a sequence."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import as_lists, block_of, blocks, float64_leaves, make_spec, naive_pool, naive_select, normal
from torch import Tensor

from llsa_gen import reference
from llsa_gen.spec import Spec

LEVELS = st.lists(st.tuples(st.integers(2, 6), st.integers(1, 4)), min_size=1, max_size=3)


# Where query tokens begin and end.


@given(LEVELS, st.integers(0, 40), st.integers(0, 60), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_blocks_of_queries_are_those_of_a_longer_sequence(
    levels: list[tuple[int, int]], m: int, offset: int, dtype: torch.dtype
) -> None:
    spec = make_spec(*levels)
    x = normal(m, 1, 1, m, 8, dtype=dtype)
    for level in range(1, spec.num_levels + 1):
        span = spec.span(level)
        cut = blocks(m, span, offset)
        pooled = reference.pool(x, span, offset=offset)
        assert pooled.shape[2] == reference.num_tokens(spec, level, m, offset) == len(cut)
        if m:
            assert torch.equal(pooled[0, 0], torch.stack(naive_pool(x[0, 0].double(), span, dtype, offset)))
        # Every token passes its share on to the tokens pooled there, and to no other.
        (leaf,) = float64_leaves(x)
        (gradient,) = torch.autograd.grad(reference.pool(leaf, span, offset=offset).sum(), leaf)
        for token in range(m):
            torch.testing.assert_close(gradient[0, 0, token, 0].item(), 1 / len(cut[block_of(token, cut)]))


def test_blocks_by_hand() -> None:
    # Spans 2 and 6. Queries 5 to 14 of a sequence: 5 | 6 7 | ... | 14 at level 1, 5 | 6 ... 11 | 12 13 14 at level 2.
    spec = make_spec((2, 1), (3, 1))
    x = torch.arange(5.0, 15)[None, None, :, None]
    assert reference.pool(x, 2, offset=5).flatten().tolist() == [5, 6.5, 8.5, 10.5, 12.5, 14]
    assert reference.pool(x, 6, offset=5).flatten().tolist() == [5, 8.5, 13]
    assert [reference.num_tokens(spec, level, 10, 5) for level in (1, 2)] == [6, 3]
    # The parents of the six, by what they may keep: query token a of level 2 keeps key token a, which has the children
    # 3a to 3a + 2.
    kept = torch.arange(6).view(1, 1, 6, 1), torch.arange(3).view(1, 1, 3, 1)
    fine, _ = reference.candidates(spec, kept, 18, query_offset=5)
    assert [row.nonzero()[:, 0].tolist() for row in fine[0, 0]] == [
        [3 * a, 3 * a + 1, 3 * a + 2] for a in (0, 1, 1, 1, 2, 2)
    ]
    # And by what the ten queries see: the two tokens of the block a_1 that they keep, and candidates of weight 2 and 6.
    rows = reference.weight_rows(spec, kept, torch.arange(10), 18, query_offset=5)[0, 0]
    above = [(0, 0), (1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1), (4, 2), (4, 2), (5, 2)]
    for row, (a_1, a_2) in zip(rows, above, strict=True):
        tokens, children, coarsest = row.split([18, 9, 3])
        assert tokens.nonzero()[:, 0].tolist() == [2 * a_1, 2 * a_1 + 1]
        assert children.tolist() == [2.0 if j // 3 == a_2 else 0.0 for j in range(9)]
        assert coarsest.tolist() == [6, 6, 6]


@pytest.mark.parametrize("offset", [2**48 - 2, 2**62])
def test_an_offset_may_be_as_large_as_the_largest_span(offset: int) -> None:
    spec = make_spec(*[(256, 2)] * 6)  # spans up to 2^48
    q, k = normal(0, 1, 1, 5, 8), normal(1, 1, 1, 9, 8)
    kept = reference.select(spec, q, k, query_offset=offset)
    reference.check_selection(spec, q, k, kept, query_offset=offset)
    assert as_lists(kept, 0) == naive_select(spec, q[0, 0].double(), k[0, 0].double(), q.dtype, offset)
    assert {ids.shape[2] for ids in kept} == {2 if offset < 2**48 else 1}


# A sequence in shards.


@st.composite
def shards(draw: st.DrawFn, at_blocks: bool) -> tuple[Spec, int, list[int], int]:
    """A spec, a number of queries, where they are cut (`at_blocks`: between coarsest blocks), a number of keys."""
    enrich = draw(st.sampled_from(["all", "none"]))
    spec = make_spec(*draw(LEVELS), enrich=enrich)
    m = draw(st.integers(1, 60))
    places = range(0, m, spec.span(spec.num_levels)) if at_blocks else range(m)
    cuts = draw(st.sets(st.sampled_from(places), max_size=4))
    return spec, m, [*sorted({0, *cuts}), m], draw(st.integers(0, 40))


def tensors(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of m, k and v of n tokens."""
    return normal(m, 2, 2, m, 8), normal(n + 100, 2, 2, n, 8), normal(n + 200, 2, 2, n, 8)


@settings(max_examples=50)
@given(shards(at_blocks=True))
def test_shards_of_whole_blocks_make_the_whole(drawn: tuple[Spec, int, list[int], int]) -> None:
    spec, m, cuts, n = drawn
    q, k, v = tensors(m, n)
    whole = reference.select(spec, q, k)
    o, lse = reference.attention(spec, q, k, v, return_lse=True)
    parts = []
    for start, end in pairwise(cuts):
        shard = q[:, :, start:end]
        kept = reference.select(spec, shard, k, query_offset=start)
        plain = reference.select(spec, shard, k)
        assert all(torch.equal(ids, same) for ids, same in zip(kept, plain, strict=True)), "nothing is cut"
        parts.append((kept, *reference.attention(spec, shard, k, v, return_lse=True, query_offset=start)))
    for level in range(spec.num_levels):
        assert torch.equal(torch.cat([kept[level] for kept, _, _ in parts], dim=2), whole[level])
    torch.testing.assert_close(torch.cat([part for _, part, _ in parts], dim=2), o, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.cat([part for _, _, part in parts], dim=2), lse, rtol=1e-13, atol=1e-14)


@settings(max_examples=30)
@given(shards(at_blocks=False))
def test_shards_cut_anywhere_attend_as_the_whole_with_its_selection(drawn: tuple[Spec, int, list[int], int]) -> None:
    spec, m, cuts, n = drawn
    q, k, v = tensors(m, n)
    leaves = float64_leaves(q, k, v)
    whole = reference.select(spec, q, k)
    results = reference.attention(spec, *leaves, indices=whole, return_lse=True)
    gradients = torch.autograd.grad([x.sum() for x in results], leaves)
    outputs: list[tuple[Tensor, Tensor]] = []
    sums = [torch.zeros_like(x) for x in leaves]
    for start, end in pairwise(cuts):
        # The rows of the query tokens over the shard: a block that is cut is in two shards.
        kept = []
        for level, ids in enumerate(whole, start=1):
            cut = blocks(m, spec.span(level))
            kept.append(ids[:, :, block_of(start, cut) : block_of(end - 1, cut) + 1])
        parts = float64_leaves(q[:, :, start:end], k, v)
        outputs.append(reference.attention(spec, *parts, indices=kept, return_lse=True, query_offset=start))
        dq, *of_keys = torch.autograd.grad([x.sum() for x in outputs[-1]], parts)
        sums[0][:, :, start:end] = dq
        for total, gradient in zip(sums[1:], of_keys, strict=True):
            total += gradient
        # What the shard selects by itself differs only through the query tokens of cut blocks: it pools what it has.
        for span in (spec.span(level) for level in range(1, spec.num_levels + 1)):
            pooled, there = reference.pool(q[:, :, start:end], span, offset=start), reference.pool(q, span)
            for number, members in enumerate(blocks(end - start, span, start)):
                same = block_of(start + members[0], blocks(m, span))
                if len(members) == len(blocks(m, span)[same]):
                    assert torch.equal(pooled[:, :, number], there[:, :, same])
    for found, expected in zip(zip(*outputs, strict=True), results, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tuple(sums), gradients, rtol=1e-11, atol=1e-12)


def test_a_shard_pools_its_own_queries_only() -> None:
    # One block of four queries, cut in the middle: the whole scores by the mean of all, the shards by their own halves.
    spec = make_spec((4, 1), enrich="none")
    q = torch.zeros(1, 1, 4, 8)
    q[..., :2, 0], q[..., 2:, 0] = -1.0, 2.0
    k = torch.zeros(1, 1, 8, 8)
    k[..., 4:, 0] = 1.0
    assert reference.select(spec, q, k)[0].item() == 1
    assert [reference.select(spec, q[:, :, i : i + 2], k, query_offset=i)[0].item() for i in (0, 2)] == [0, 1]


def test_a_selection_is_checked_with_its_offset() -> None:
    spec = make_spec((2, 2), (3, 2))
    q, k = normal(0, 1, 2, 24, 8), normal(1, 1, 2, 60, 8)
    kept = reference.select(spec, q, k, query_offset=5)
    reference.check_selection(spec, q, k, kept, query_offset=5)
    reference.check_selection(spec, q, k, kept, query_offset=11)  # cut in the same places
    with pytest.raises(AssertionError, match=r"level 2: expected int32 \[1, 2, 4, 2\], got torch.int32 \[1, 2, 5, 2\]"):
        reference.check_selection(spec, q, k, kept)
    with pytest.raises(AssertionError, match=r"level 2, batch 0, head 0, query token 0: kept key token .* and dropped"):
        reference.check_selection(spec, q, k, kept, query_offset=7)


# None of something.


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("present", [0, 2], ids=["no globals", "globals"])
@pytest.mark.parametrize(("m", "n"), [(0, 9), (7, 0), (0, 0)])
@pytest.mark.parametrize("enrich", ["all", "none"])
def test_no_queries_and_no_keys_are_legal(enrich: str, m: int, n: int, present: int, offset: int) -> None:
    spec = make_spec((2, 2), (2, 3), enrich=enrich)
    q, k, v = tensors(m, n)
    kept = reference.select(spec, q, k, query_offset=offset)
    expected_rows = [len(blocks(m, span, offset)) for span in (2, 4)]
    assert [ids.shape for ids in kept] == [
        (2, 2, expected_rows[0], 2 if n else 0),
        (2, 2, expected_rows[1], 3 if n else 0),
    ]
    reference.check_selection(spec, q, k, kept, query_offset=offset)
    assert [mask.shape[2:] for mask in reference.candidates(spec, kept, n, query_offset=offset)] == [
        (expected_rows[0], -(-n // 2)),
        (expected_rows[1], -(-n // 4)),
    ]
    shared = normal(7, 2, 2, present, 8), normal(8, 2, 2, present, 8)
    leaves = q, k, v, k_global, v_global = float64_leaves(q, k, v, *shared)
    options: dict[str, Any] = {"k_global": k_global, "v_global": v_global, "query_offset": offset}
    o, lse = reference.attention(spec, q, k, v, return_lse=True, **options)
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    if not n:
        logits = q @ k_global.mT / 8**0.5
        torch.testing.assert_close(o, logits.softmax(-1) @ v_global if present else torch.zeros_like(q))
        torch.testing.assert_close(lse, logits.logsumexp(-1))  # of nothing: -inf
    for gradient, leaf in zip(torch.autograd.grad([o.sum(), lse.sum()], leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.isfinite().all()
        assert gradient.any() == (bool(m) and bool(present) and leaf.numel() > 0)
    rows = torch.arange(m)
    for again in (
        reference.attention_rows(spec, q, k, v, rows, kept, **options),
        reference.dense_in_dtype(spec, q, k, v, kept, **options),
    ):
        torch.testing.assert_close(again, (o, lse))


# Lists that come from elsewhere.


@pytest.mark.parametrize("enrich", ["none", "all", (1,)])
def test_lists_may_be_short_empty_and_have_minus_one_anywhere(enrich: Any) -> None:
    spec = make_spec((2, 3), (2, 2), enrich=enrich)
    q, k, v = normal(0, 1, 1, 8, 8), normal(1, 1, 1, 11, 8), normal(2, 1, 1, 11, 8)
    fine = torch.tensor([[[[-1, 3], [-1, -1], [5, -1], [0, 2]]]], dtype=torch.int32)
    coarse = torch.tensor([[[[-1], [1]]]], dtype=torch.int32)
    leaves = float64_leaves(q, k, v)
    o, lse = reference.attention(spec, *leaves, indices=(fine, coarse), return_lse=True)
    weights = reference.weight_rows(spec, (fine, coarse), torch.arange(8), 11)[0, 0]
    tokens = [[6, 7], [], [10], [0, 1, 4, 5]]
    assert [weights[2 * a + i, :11].nonzero()[:, 0].tolist() for a in range(4) for i in range(2)] == [
        tokens[a] for a in range(4) for _ in range(2)
    ]
    nothing = torch.zeros(8, dtype=torch.bool)
    if enrich != "all":  # where the coarsest level is attended to, every query has something
        nothing[2:4] = True
    assert (lse[0, 0] == -torch.inf).tolist() == nothing.tolist()
    assert (o[0, 0] == 0).all(-1).tolist() == nothing.tolist()
    # Gradients: none for and through a query that has nothing, whatever comes in; the others do not notice it.
    d_out, d_lse = normal(3, *o.shape).double(), normal(4, *lse.shape).double()
    gradients = torch.autograd.grad([o, lse], leaves, [d_out, d_lse])
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][0, 0] == 0).all(-1).tolist() == nothing.tolist()
    some = [x[:, :, ~nothing] for x in reference.attention(spec, *leaves, indices=(fine, coarse), return_lse=True)]
    expected = torch.autograd.grad(some, leaves, [d_out[:, :, ~nothing], d_lse[:, :, ~nothing]])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_a_cut_first_block_has_the_slack_of_its_rounding(dtype: torch.dtype) -> None:
    """A roundoff u of either score: keys that are 2u apart may be taken for one another, those 4u apart may not."""
    spec, step = make_spec((4, 1)), float(torch.finfo(dtype).eps)
    for apart, cut_may in ((1, True), (2, False)):
        k = torch.full((1, 1, 8, 8), 1.0)
        k[:, :, 4:] += apart * step
        q, k = torch.ones(1, 1, 7, 8, dtype=dtype), k.to(dtype)
        for row, may in ((0, cut_may), (1, False)):
            kept = torch.ones(1, 1, 2, 1, dtype=torch.int32)
            reference.check_selection(spec, q, k, [kept], query_offset=1)
            kept[0, 0, row] = 0
            if may:
                reference.check_selection(spec, q, k, [kept], query_offset=1)
                continue
            with pytest.raises(AssertionError, match=f"query token {row}: .* further apart than rounding explains"):
                reference.check_selection(spec, q, k, [kept], query_offset=1)
