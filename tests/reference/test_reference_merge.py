"""The log of the sum of exponentials: its gradient, and attention over disjoint keys put together by it."""

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import float64_leaves, make_spec, normal
from torch import Tensor

from llsa_gen import reference

SPEC = make_spec((2, 2), (2, 1))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


# The gradient of lse.


def test_gradients_of_o_and_lse_are_those_of_differences() -> None:
    q, k, v, k_global, v_global = float64_leaves(*(normal(i, 1, 1, n, 8) for i, n in enumerate((5, 7, 7, 2, 2))))
    kept = reference.select(SPEC, q, k, query_offset=3)
    mask = torch.tensor([[True, False]])

    def attention(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *plain, k_global, v_global = leaves
        q, k, v = plain
        shared: dict[str, Any] = {"k_global": k_global, "v_global": v_global, "global_mask": mask}
        return reference.attention(
            SPEC, q, k, v, indices=kept, query_offset=3, return_lse=True, round_to=torch.float64, **shared
        )

    assert torch.autograd.gradcheck(attention, (q, k, v, k_global, v_global))


def test_the_gradient_of_lse_is_that_of_the_contract() -> None:
    # Where coarse levels are not attended to, ds_ij = p_ij (do_i . v_j - delta_i + dlse_i), and dv is as without dlse.
    spec = make_spec((2, 2), enrich="none")
    leaves = q, k, v = float64_leaves(*(normal(i, 1, 2, 9, 8) for i in range(3)))
    kept = reference.select(spec, q, k)
    o, lse = reference.attention(spec, q, k, v, indices=kept, return_lse=True, scale=0.4)
    d_out, d_lse = normal(3, *o.shape).double(), normal(4, *lse.shape).double()
    dq, dk, dv = torch.autograd.grad([o, lse], leaves, [d_out, d_lse])
    with torch.no_grad():
        attended = reference.weight_rows(spec, kept, torch.arange(9), 9)[..., :9] > 0
        p = torch.where(attended, (0.4 * q @ k.mT - lse[..., None]).exp(), 0)
        delta = (o * d_out).sum(-1, keepdim=True)
        ds = p * (d_out @ v.mT - delta + d_lse[..., None])
        close((dq, dk, dv), (0.4 * ds @ k, 0.4 * ds.mT @ q, p.mT @ d_out))


# Merging.


def parts_of(present: Tensor, seed: int = 0) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """For bool [parts, B, H, M] leaves, and parts (o, lse) made of them with an lse of -inf where not present."""
    o = [normal(seed + i, *mask.shape, 8) for i, mask in enumerate(present)]
    lse = [3 * normal(seed + 20 + i, *mask.shape) for i, mask in enumerate(present)]
    leaves = float64_leaves(*o, *lse)
    halves = leaves[: len(o)], leaves[len(o) :]
    parts = [(x, y.masked_fill(~mask, -math.inf)) for x, y, mask in zip(*halves, present, strict=True)]
    return leaves, parts


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(0, 5), st.data())
def test_merging_is_the_formula_without_the_parts_of_nothing(count: int, m: int, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=count * 2 * m, max_size=count * 2 * m))
    present = torch.tensor(flags).bool().view(count, 1, 2, m)
    leaves, parts = parts_of(present)
    o, lse = reference.merge(*parts)
    assert o.dtype == lse.dtype == torch.float64 and o.shape == (1, 2, m, 8) and lse.shape == (1, 2, m)
    gradients = torch.autograd.grad([o, lse], leaves, [normal(40, *o.shape).double(), normal(41, *lse.shape).double()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    for i, mask in enumerate(present):
        assert (gradients[i][~mask] == 0).all() and (gradients[count + i][~mask] == 0).all()
    for head in range(2):
        for row in range(m):
            place = 0, head, row
            those = [part for part, mask in zip(parts, present, strict=True) if mask[place]]
            if not those:
                assert (o[place] == 0).all() and lse[place] == -math.inf
                continue
            total = sum(math.exp(part_lse[place].item()) for _, part_lse in those)
            close(lse[place].item(), math.log(total))
            mean = sum(math.exp(part_lse[place].item()) / total * part_o[place] for part_o, part_lse in those)
            close(o[place], mean)


def test_gradients_of_merging_are_those_of_differences() -> None:
    present = torch.tensor([[True, True, False], [True, False, True], [True, False, True]])[:, None, None]
    leaves, _ = parts_of(present)

    def merge(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        masked = [x.masked_fill(~mask, -math.inf) for x, mask in zip(leaves[3:], present, strict=True)]
        return reference.merge(*zip(leaves[:3], masked, strict=True))

    assert torch.autograd.gradcheck(merge, leaves)


def test_what_a_part_of_nothing_holds_is_not_read_and_large_sums_do_not_overflow() -> None:
    nothing = (
        torch.full((1, 1, 3, 8), math.nan, requires_grad=True),
        torch.full((1, 1, 3), -math.inf, requires_grad=True),
    )
    one = normal(0, 1, 1, 3, 8).requires_grad_(), (normal(1, 1, 1, 3) + 5000).requires_grad_()
    o, lse = reference.merge(nothing, one, one)
    close(o, one[0].double())
    close(lse, one[1].double() + math.log(2))
    gradients = torch.autograd.grad(o.sum() + lse.sum(), [*nothing, *one])
    assert [x.unique().tolist() for x in gradients] == [[0], [0], [1], [1]]
    alone = reference.merge(nothing)
    assert (alone[0] == 0).all() and (alone[1] == -math.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(alone[0].sum() + alone[1].sum(), nothing))


@settings(max_examples=30)
@given(
    st.integers(1, 15),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), max_size=7),
    st.sampled_from(["all", "none"]),
)
def test_attention_over_disjoint_keys_merges_to_attention_over_all(
    m: int, n: int, tokens: list[tuple[int, bool, bool]], enrich: str
) -> None:
    # Global tokens, each in one of three sets and present or not in either batch entry. The first set goes with the
    # keys that are selected, the others are attended to alone: a sequence without keys.
    spec = make_spec((2, 2), (2, 1), enrich=enrich)
    g = len(tokens)
    leaves = float64_leaves(*(normal(i, 2, 2, length, 8) for i, length in enumerate((m, n, n, g, g))))
    q, k, v, k_global, v_global = leaves
    mask = torch.tensor([[present[b + 1] for present in tokens] for b in range(2)]).bool().view(2, g)
    kept = reference.select(spec, q, k)
    shared: dict[str, Any] = {"k_global": k_global, "v_global": v_global, "global_mask": mask}
    whole = reference.attention(spec, q, k, v, indices=kept, return_lse=True, **shared)
    parts = []
    for number in range(3):
        members = torch.tensor([j for j, token in enumerate(tokens) if token[0] == number], dtype=torch.int64)
        shared = {"k_global": k_global[:, :, members], "v_global": v_global[:, :, members]}
        here = (k, v) if number == 0 else (k[:, :, :0], v[:, :, :0])
        parts.append(reference.attention(spec, q, *here, return_lse=True, global_mask=mask[:, members], **shared))
    merged = reference.merge(*parts)
    close(merged, whole)
    incoming = normal(40, *whole[0].shape).double(), normal(41, *whole[1].shape).double()
    close(torch.autograd.grad(merged, leaves, incoming), torch.autograd.grad(whole, leaves, incoming))


def test_wrong_parts_are_refused() -> None:
    o, lse = normal(0, 2, 2, 3, 8), normal(1, 2, 2, 3)
    part, no = (o, lse), cast(Any, None)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, r"merge: expected one or more of \(o, lse\), got none", ()),
        (TypeError, r"merge, part 1: expected a pair of tensors \(o, lse\), got NoneType", (part, no)),
        (TypeError, r"merge, part 0: expected a pair of .*, got Tensor", (o, lse)),
        (TypeError, "merge, part 0: expected floating dtypes, got torch.int64", ((o.long(), lse),)),
        (ValueError, r"part 1: expected \[2, 2, 3, 8\] and \[2, 2, 3\], got", (part, (o[:1], lse[:1]))),
        (ValueError, r"part 0: expected .* and .*, got", ((o, lse[..., None]),)),
        (ValueError, r"part 0: expected \[B, H, M, D\] and \[B, H, M\], got", ((lse, lse),)),
        (ValueError, "part 1: expected cpu, got meta and meta", (part, (o.to("meta"), lse.to("meta")))),
    ]
    for error, message, parts in wrong:
        with pytest.raises(error, match=message):
            reference.merge(*parts)
