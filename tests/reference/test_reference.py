"""The dense oracle against something more naive still: the definitions, written as loops over single tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import (
    as_lists,
    blocks,
    float64_leaves,
    make_spec,
    naive_attention,
    naive_candidates,
    naive_select,
    normal,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen import reference
from llsa_gen.spec import Spec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    spec: Spec
    m: int
    n: int
    dtype: torch.dtype
    ties: bool
    seed: int
    offset: int = 0
    mask: tuple[bool, ...] = ()  # one for each global token

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and global k, v of two heads; with `ties`, of few small integers, so that many scores are equal."""
        lengths = [self.m, self.n, self.n, len(self.mask), len(self.mask)]
        x = normal(self.seed, 1, 2, sum(lengths), self.spec.head_dim)
        x = (x.round().clamp(-1, 1) if self.ties else x).to(self.dtype)
        q, k, v, k_global, v_global = x.split(lengths, dim=2)
        return q, k, v, k_global, v_global


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 40) -> Case:
    block = st.one_of(st.integers(2, 6), st.sampled_from([16, 256]))
    levels = draw(st.lists(st.tuples(block, st.integers(1, 9)), min_size=1, max_size=draw(st.sampled_from([3, 6]))))
    some_levels = st.sets(st.integers(1, len(levels))).map(lambda chosen: tuple(sorted(chosen)))
    enrich = draw(st.sampled_from(["all", "none"]) | some_levels.filter(bool))
    spec = make_spec(*levels, head_dim=draw(st.integers(8, 11)), enrich=enrich, reweight=draw(st.booleans()))
    n = draw(st.integers(0, max_tokens))
    m = draw(st.just(n) | st.integers(0, max_tokens))
    return Case(
        spec,
        m,
        n,
        draw(st.sampled_from(DTYPES)),
        ties=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        offset=draw(st.just(0) | st.integers(1, 100) | st.integers(1, 10**12)),
        mask=tuple(draw(st.lists(st.booleans(), max_size=4))),
    )


@settings(max_examples=60)
@given(cases())
def test_selection_equals_the_loops(case: Case) -> None:
    q, k, *_ = case.tensors()
    kept = reference.select(case.spec, q, k, query_offset=case.offset)
    for head in range(2):
        expected = naive_select(case.spec, q[0, head].double(), k[0, head].double(), case.dtype, case.offset)
        assert as_lists(kept, head) == expected
    available = math.inf
    for level in range(case.spec.num_levels, 0, -1):
        ids, span = kept[level - 1], case.spec.span(level)
        width = min(case.spec.topk(level), math.ceil(case.n / span), available)
        assert ids.dtype == torch.int32
        assert ids.shape == (1, 2, len(blocks(case.m, span, case.offset)), width)
        assert not ((ids[..., :-1] < 0) & (ids[..., 1:] >= 0)).any(), "-1s stand last"
        available = width * case.spec.block(level)
    reference.check_selection(case.spec, q, k, kept, query_offset=case.offset)


@settings(max_examples=30)
@given(cases())
def test_candidates_equal_the_loops(case: Case) -> None:
    q, k, *_ = case.tensors()
    kept = reference.select(case.spec, q, k, query_offset=case.offset)
    for level, mask in enumerate(reference.candidates(case.spec, kept, case.n, query_offset=case.offset), start=1):
        cut = blocks(case.m, case.spec.span(level), case.offset)
        assert mask.shape[2] == len(cut)
        for head in range(2):
            lists = as_lists(kept, head)
            for row, members in zip(mask[0, head], cut, strict=True):
                expected = naive_candidates(case.spec, level, lists, members[0], case.m, case.n, case.offset)
                assert row.nonzero()[:, 0].tolist() == expected


@settings(max_examples=40)
@given(cases(max_tokens=24), st.sampled_from([None, 0.7, -0.2]))
def test_attention_and_gradients_equal_the_loops(case: Case, scale: float | None) -> None:
    spec = case.spec
    q, k, v, k_global, v_global = case.tensors()
    kept = reference.select(spec, q, k, query_offset=case.offset)
    options: dict[str, Any] = {"scale": scale, "query_offset": case.offset, "global_mask": torch.tensor([case.mask])}
    options["global_mask"] = options["global_mask"].bool()  # of no tokens, too
    leaves = wide_q, wide_k, wide_v, wide_k_global, wide_v_global = float64_leaves(q, k, v, k_global, v_global)
    o, lse = reference.attention(
        spec,
        wide_q,
        wide_k,
        wide_v,
        indices=kept,
        k_global=wide_k_global,
        v_global=wide_v_global,
        return_lse=True,
        round_to=case.dtype,
        **options,
    )
    d_out, d_lse = normal(case.seed + 1, *o.shape).double(), normal(case.seed + 2, *lse.shape).double()
    gradients = torch.autograd.grad([o, lse], leaves, [d_out, d_lse])
    used = 1 / math.sqrt(spec.head_dim) if scale is None else scale
    for head in range(2):
        single = q1, k1, v1, *globals_of_one = float64_leaves(*(x[0, head] for x in leaves))
        tokens = zip(*globals_of_one, case.mask, strict=True)
        everybodys = [(key, value) for key, value, present in tokens if present]
        expected_o, expected_lse = naive_attention(
            spec, q1, k1, v1, as_lists(kept, head), used, case.dtype, case.offset, everybodys
        )
        torch.testing.assert_close(o[0, head], expected_o, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(lse[0, head], expected_lse, rtol=1e-9, atol=1e-11)
        loss = (expected_o * d_out[0, head]).sum() + sum(x.sum() * 0 for x in single)  # which all of them are part of
        for total, gradient in zip(expected_lse, d_lse[0, head], strict=True):
            loss = loss + (total * gradient if total > -math.inf else 0)
        for gradient, naive in zip(gradients, torch.autograd.grad(loss, single), strict=True):
            torch.testing.assert_close(gradient[0, head], naive, rtol=1e-9, atol=1e-10)
    # The same from tensors in their own dtype, selecting by itself.
    again = reference.attention(spec, q, k, v, k_global=k_global, v_global=v_global, **options)
    torch.testing.assert_close(again, o, rtol=0, atol=0)


@settings(max_examples=30)
@given(cases())
def test_a_sample_of_rows_is_a_part_of_the_whole(case: Case) -> None:
    case = replace(case, m=case.m + 1)  # something to take a sample of
    q, k, v, k_global, v_global = case.tensors()
    options: dict[str, Any] = {"k_global": k_global, "v_global": v_global, "query_offset": case.offset}
    options["global_mask"] = torch.tensor([case.mask]).bool()
    kept = reference.select(case.spec, q, k, query_offset=case.offset)
    o, lse = reference.attention(case.spec, q, k, v, indices=kept, return_lse=True, **options)
    rows = torch.randint(case.m, (5,), generator=torch.Generator().manual_seed(case.seed), dtype=torch.int32)
    some_o, some_lse = reference.attention_rows(case.spec, q, k, v, rows, kept, **options)
    torch.testing.assert_close(some_o, o[:, :, rows.long()], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(some_lse, lse[:, :, rows.long()], rtol=1e-12, atol=1e-13)
    # And in the dtype of the inputs, where the yardstick is float64 itself.
    q, k, v, options["k_global"], options["v_global"] = (x.double() for x in (q, k, v, k_global, v_global))
    theirs = reference.dense_in_dtype(case.spec, q, k, v, kept, **options)
    ours = reference.attention(case.spec, q, k, v, indices=kept, return_lse=True, **options)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


# By hand. Zero queries make every logit 0, so o is the weighted mean of what is seen, lse the log of its weight.

ONES = torch.ones(8)


@pytest.mark.parametrize(
    ("enrich", "reweight", "weight", "token_shares"),
    [
        # Three tokens in blocks of two: block 0 (tied, so the lower) is kept; level 1 is {0, 1} and {2}, c = 2 and 1.
        ("all", True, 5, (2, 2, 1)),
        ("all", False, 4, (1.5, 1.5, 1)),
        ("none", True, 2, (1, 1, 0)),
    ],
)
def test_three_tokens_by_hand(enrich: str, reweight: bool, weight: int, token_shares: tuple[float, ...]) -> None:
    spec = make_spec((2, 1), enrich=enrich, reweight=reweight)
    v = torch.stack([1 * ONES, 10 * ONES, 100 * ONES])[None, None].requires_grad_()
    q = k = torch.zeros(1, 1, 3, 8)
    assert [ids.tolist() for ids in reference.select(spec, q, k)] == [[[[[0], [0]]]]]
    o, lse = reference.attention(spec, q, k, v, return_lse=True)
    mean = sum(share * x for share, x in zip(token_shares, (1, 10, 100), strict=True)) / weight
    torch.testing.assert_close(o, torch.full((1, 1, 3, 8), mean, dtype=torch.float64))
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(weight), dtype=torch.float64))
    (dv,) = torch.autograd.grad(o.sum(), v)
    expected = torch.tensor([3 * share / weight for share in token_shares])  # three queries
    torch.testing.assert_close(dv[0, 0], expected[:, None].expand(3, 8))


def test_enrich_list_by_hand() -> None:
    # Seven tokens, spans 2 and 4. Level 2: {0..3}, {4..6}, both candidates; 0 is kept. Level 1: candidates {0, 1},
    # {2, 3}; {0, 1} is kept. So the tokens seen are 0 and 1; at level 1 c = 2, 2; at level 2 c = 4, 3.
    q = k = torch.zeros(1, 1, 7, 8)
    weights = {(1,): 2 + 4, (2,): 2 + 7, (1, 2): 2 + 4 + 7, "none": 2}
    for enrich, weight in weights.items():
        spec = make_spec((2, 1), (2, 1), enrich=enrich)
        _, lse = reference.attention(spec, q, k, k, return_lse=True)
        torch.testing.assert_close(lse.exp(), torch.full((1, 1, 7), float(weight), dtype=torch.float64))
    row = reference.weight_rows(
        make_spec((2, 1), (2, 1), enrich=(2,)), reference.select(spec, q, k), torch.tensor([6]), 7
    )
    assert [part.tolist() for part in row[0, 0, 0].split([7, 4, 2])] == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0], [4, 3]]


def test_one_token_is_its_own_attention() -> None:
    spec = make_spec(*[(256, 512)] * 6)  # spans up to 2^48
    q, k, v = (normal(seed, 2, 3, 1, 8) for seed in range(3))
    kept = reference.select(spec, q, k)
    assert [ids.tolist() for ids in kept] == [[[[[0]]] * 3] * 2] * 6
    o, lse = reference.attention(spec, q, k, v, indices=kept, return_lse=True)
    torch.testing.assert_close(o, v.double())
    # Seen as a token and on six levels, each time with weight 1.
    torch.testing.assert_close(lse, (q * k).double().sum(-1) / math.sqrt(8) + math.log(7))


@pytest.mark.parametrize("levels", [((4, 512),), ((3, 512), (5, 512)), ((256, 1),)])
def test_everything_kept_and_nothing_added_is_dense_attention(levels: tuple[tuple[int, int], ...]) -> None:
    spec = make_spec(*levels, enrich="none")
    leaves = q, k, v = float64_leaves(*normal(0, 3, 2, 3, 50, 8))
    o = reference.attention(spec, q, k, v)
    dense = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(o, dense, rtol=1e-12, atol=1e-13)
    d_out = normal(3, *o.shape).double()
    ours, theirs = (torch.autograd.grad(x, leaves, d_out) for x in (o, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_ties_go_to_the_lower_index() -> None:
    spec = make_spec((2, 3), (2, 2), head_dim=13)
    key = normal(0, 13)
    k = key.expand(1, 1, 37, 13)  # 19 equal keys at level 1, 10 at level 2
    fine, coarse = reference.select(spec, normal(1, 1, 1, 37, 13), k)
    assert (coarse == torch.tensor([0, 1])).all()
    assert (fine == torch.tensor([0, 1, 2])).all()


# Pooling.


def test_the_last_pooled_token_is_the_mean_of_its_tokens() -> None:
    x = torch.tensor([1.0, 2, 3, 4, 5, 6, 16])[None, None, :, None].requires_grad_()
    pooled = reference.pool(x, 4)
    assert pooled.flatten().tolist() == [2.5, 9.0]  # not a mean of means, (5.5 + 16) / 2
    (gradient,) = torch.autograd.grad(pooled, x, torch.tensor([8.0, 3.0])[None, None, :, None].double())
    assert gradient.flatten().tolist() == [2.0] * 4 + [1.0] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_tokens_are_rounded_once(dtype: torch.dtype) -> None:
    x = normal(0, 1, 1, 256, 8, dtype=dtype) + 3  # a sum of 256 terms near 3 is far off in bfloat16
    expected = torch.tensor([[math.fsum(column) / 256 for column in x[0, 0].double().T.tolist()]], dtype=torch.float64)
    assert torch.equal(reference.pool(x, 256)[0, 0], expected.to(dtype).double())


def test_nothing_is_created_on_another_device() -> None:
    spec = make_spec((3, 2), (2, 2))
    q, k, v = (normal(seed, 1, 2, 20, 8) for seed in range(3))
    rows = torch.tensor([3, 5])
    with torch.device("meta"):  # where a tensor is created that does not say where
        kept = reference.select(spec, q, k, query_offset=1)
        reference.check_selection(spec, q, k, kept, query_offset=1)
        reference.candidates(spec, kept, 20, query_offset=1)
        results = [*reference.attention_rows(spec, q, k, v, rows, kept, query_offset=1)]
        results += reference.dense_in_dtype(spec, q, k, v, kept, query_offset=1)
        results += reference.merge(
            reference.attention(spec, q, k, v, k_global=k, v_global=v, return_lse=True),
            reference.joint_attention(spec, q, k, v, globals_first=1, globals_last=2, return_lse=True),
        )
    assert all(x.device.type == "cpu" for x in (*results, *kept))


# The figures by which others are judged.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_formula_in_a_dtype_is_about_as_exact_as_the_dtype(dtype: torch.dtype) -> None:
    spec = make_spec((4, 3), (4, 2), head_dim=16)
    q, k, v = (normal(seed, 1, 2, 100, 16, dtype=dtype).requires_grad_() for seed in range(3))
    kept = reference.select(spec, q, k)
    wide = float64_leaves(q, k, v)
    expected, expected_lse = reference.attention(spec, *wide, indices=kept, return_lse=True, round_to=dtype)
    o, lse = reference.dense_in_dtype(spec, q, k, v, kept)
    assert o.dtype == lse.dtype == dtype
    d_out = normal(3, *o.shape, dtype=dtype)
    pairs = [(o, expected), (lse, expected_lse)]
    pairs += zip(
        torch.autograd.grad(o, (q, k, v), d_out), torch.autograd.grad(expected, wide, d_out.double()), strict=True
    )
    roundoff = torch.finfo(dtype).eps / 2
    for x, ref in pairs:
        assert roundoff / 20 < reference.relative_error(x, ref) < 20 * roundoff


def test_tolerances_are_those_of_the_contract() -> None:
    assert [reference.tolerance(dtype) for dtype in DTYPES] == [1e-5, 2e-3, 1.2e-2]
    with pytest.raises(ValueError, match=r"tolerance: expected one of .*float32.*, got torch.int8"):
        reference.tolerance(torch.int8)


@pytest.mark.parametrize(
    ("x", "ref", "error"),
    [
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [0.0, 2.0], 1.0),
        ([math.nan, 0.0], [1.0, 0.0], math.inf),
        ([math.inf, 0.0], [math.inf, 0.0], math.inf),
        ([1.0, 0.0], [math.nan, 0.0], math.inf),
    ],
)
def test_relative_error(x: list[float], ref: list[float], error: float) -> None:
    assert reference.relative_error(torch.tensor(x), torch.tensor(ref, dtype=torch.float64)) == pytest.approx(error)


# Arguments.


def test_a_spec_comes_in_any_form() -> None:
    declared = {"name": "tiny", "head_dim": 8, "levels": [{"block": 2, "topk": 1}]}
    q = normal(0, 1, 1, 9, 8)
    kept = reference.select(declared, q, q)
    reference.check_selection(declared, q, q, kept)
    expected = reference.attention(make_spec((2, 1)), q, q, q)
    assert torch.equal(reference.attention(declared, q, q, q, indices=kept), expected)
    assert torch.equal(reference.attention_rows(declared, q, q, q, torch.arange(9), kept)[0], expected)
    assert reference.relative_error(reference.dense_in_dtype(declared, q, q, q, kept)[0], expected) < 1e-6


def test_padding_is_ignored_and_wrong_arguments_are_refused() -> None:
    spec = make_spec((2, 2), (2, 1))
    q = normal(0, 1, 1, 9, 8)
    kept = reference.select(spec, q, q)
    padded = [torch.nn.functional.pad(ids.long(), (1, 2), value=-1) for ids in kept]
    assert torch.equal(reference.attention(spec, q, q, q, indices=padded), reference.attention(spec, q, q, q))
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("q: expected .*, 8], got", lambda: reference.attention(spec, q[..., :7], q, q)),
        ("v: expected the shape of k", lambda: reference.attention(spec, q, q, q[:, :, :5])),
        ("k: expected the dtype", lambda: reference.select(spec, q, q.double())),
        ("indices: expected 2 tensors", lambda: reference.attention(spec, q, q, q, indices=kept[:1])),
        ("indices, level 1: expected integers", lambda: reference.attention(spec, q, q, q, indices=kept[::-1])),
        ("indices, level 1: .* below 5", lambda: reference.attention(spec, q, q, q, indices=(kept[0] + 4, kept[1]))),
        (
            "indices, level 1: expected integers",
            lambda: reference.attention(spec, q[:, :, :8], q, q, indices=kept, query_offset=2),  # four rows, not five
        ),
        ("query_offset: expected an integer >= 0, got -1", lambda: reference.select(spec, q, q, query_offset=-1)),
        ("query_offset: .*, got -2", lambda: reference.check_selection(spec, q, q, kept, query_offset=-2)),
        ("query_offset: .*, got -3", lambda: reference.candidates(spec, kept, 9, query_offset=-3)),
        ("query_offset: .*, got -4", lambda: reference.weight_rows(spec, kept, kept[0][0, 0, 0], 9, query_offset=-4)),
        ("query_offset: .*, got -5", lambda: reference.attention(spec, q, q, q, query_offset=-5)),
        ("scale: expected a finite number, got nan", lambda: reference.attention(spec, q, q, q, scale=math.nan)),
        ("relative_error: expected the shape", lambda: reference.relative_error(q, q[0])),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    no, number, text = cast(Any, (None, 3, "x"))
    of_the_wrong_type = [
        (r"^q: expected a tensor \[B, H, M, 8\], got NoneType", lambda: reference.select(spec, no, q)),
        ("^v: expected a floating dtype, got torch.int64", lambda: reference.attention(spec, q, q, q.long())),
        (
            "^indices: expected 2 tensors, one a level, got int",
            lambda: reference.attention(spec, q, q, q, indices=number),
        ),
        (
            "^indices, level 1: expected a tensor of integers, got N",
            lambda: reference.attention(spec, q, q, q, indices=(no, no)),
        ),
        ("^query_offset: expected an integer >= 0, got str", lambda: reference.select(spec, q, q, query_offset=text)),
        ("^query_offset: .*, got bool", lambda: reference.attention(spec, q, q, q, query_offset=True)),
        ("^scale: expected a number or None, got str", lambda: reference.attention(spec, q, q, q, scale=text)),
    ]
    for message, call in of_the_wrong_type:
        with pytest.raises(TypeError, match=message):
            call()
