"""The check of a selection by value: it accepts every correct float32 implementation and refuses every wrong one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llsa_gen import reference
from llsa_gen.spec import Level, Spec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_spec(*levels: tuple[int, int], head_dim: int = 8) -> Spec:
    """A spec from (block, topk) pairs, finest first."""
    return Spec(name="tiny", head_dim=head_dim, levels=tuple(Level(block=block, topk=topk) for block, topk in levels))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Selections made as an implementation makes them, in float32 and with torch.topk.


def pool_backwards(x: Tensor, span: int) -> Tensor:
    """Float32 sums, from the last token of a block to the first, times a float32 inverse; rounded once."""
    blocks = x.float().split(min(span, x.shape[2]), dim=2)
    means: list[Tensor] = []
    for block in blocks:
        total = torch.zeros_like(block[:, :, 0])
        for i in reversed(range(block.shape[2])):
            total = total + block[:, :, i]
        means.append(total * (torch.ones(()) / block.shape[2]))
    return torch.stack(means, dim=2).to(x.dtype)


def truncated_to_tf32(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def select_in_float32(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    pool: Callable[[Tensor, int], Tensor] = pool_backwards,
    operand: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    indices: list[Tensor] = []
    for level in range(spec.num_levels, 0, -1):
        queries, keys = pool(q, spec.span(level)).float(), pool(k, spec.span(level)).float()
        scores = operand(queries) @ operand(keys).mT
        if indices:
            rows, columns = (torch.arange(size) // spec.block(level + 1) for size in scores.shape[2:])
            of_parent = indices[0][:, :, rows]
            allowed = (of_parent[..., None] == columns).any(dim=3)
            scores = scores.masked_fill(~allowed, -torch.inf)
        best = scores.topk(reference.kept_width(spec, level, k.shape[2]), dim=-1)
        indices.insert(0, torch.where(best.values == -torch.inf, -1, best.indices).int())
    return indices


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(2, 20), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-3, 1.0, 8.0]),
    st.integers(0, 1000),
)
def test_any_order_of_float32_sums_is_accepted(
    levels: list[tuple[int, int]], n: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    spec = make_spec(*levels)
    q, k = ((normal(seed + i, 2, 2, n, 8) * scale).to(dtype) for i in range(2))
    reference.check_selection(spec, q, k, select_in_float32(spec, q, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_close_scores_are_accepted_and_told_apart(dtype: torch.dtype) -> None:
    # 256 x 256 scores of short vectors: some pairs of neighbours are closer than float32 sums can order
    spec = make_spec((8, 16))
    q, k = (normal(seed, 1, 2, 2048, 8, dtype=dtype) for seed in range(2))
    kept = select_in_float32(spec, q, k)
    reference.check_selection(spec, q, k, kept)
    assert (kept[0].sort(-1).values == reference.select(spec, q, k)[0].sort(-1).values).float().mean() > 0.99

    def pool_in_bfloat16(x: Tensor, span: int) -> Tensor:  # known fault 6
        tokens = x.bfloat16().unflatten(2, (-1, span)).unbind(3)
        return (sum(tokens[1:], tokens[0]) / span).to(x.dtype)

    with pytest.raises(AssertionError, match="further apart than rounding explains"):
        reference.check_selection(spec, q, k, select_in_float32(spec, q, k, pool=pool_in_bfloat16))
    if dtype == torch.float32:
        with pytest.raises(AssertionError, match="further apart than rounding explains"):
            reference.check_selection(spec, q, k, select_in_float32(spec, q, k, operand=truncated_to_tf32))


# Two blocks of three equal or cancelling tokens; a float32 sum may lose `small` beside `big`, and so swap the two.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("small", "explained"), [(2.0**-14, True), (2.0**-6, False)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("across", ["tokens", "dimensions"])
def test_what_float32_sums_may_lose_is_accepted_and_no_more(
    across: str, sign: int, small: float, explained: bool, dtype: torch.dtype
) -> None:
    big = 1024.0
    if across == "tokens":  # lost in pooling
        cancelling, plain = torch.tensor([big, sign * small, -big]), torch.full((3,), sign * small / 8)
        k = torch.cat([cancelling, plain])[:, None].expand(6, 8)
    else:  # lost in the product
        k = torch.zeros(6, 8)
        k[:3, :3] = torch.tensor([big, sign * small, -big])
        k[3:, 0] = sign * small / 8
    k = k.to(dtype)[None, None]
    # Exactly, the cancelling block scores higher if `small` is positive, and lower if it is negative.
    exact, swapped = (0, 1) if sign > 0 else (1, 0)
    spec, q = make_spec((3, 1)), torch.ones(1, 1, 6, 8, dtype=dtype)
    assert reference.select(spec, q, k)[0].flatten().tolist() == [exact, exact]
    kept = [torch.full((1, 1, 2, 1), swapped, dtype=torch.int32)]
    if explained:
        reference.check_selection(spec, q, k, kept)
    else:
        with pytest.raises(AssertionError, match="further apart than rounding explains"):
            reference.check_selection(spec, q, k, kept)


@pytest.mark.parametrize(("offset", "explained"), [(2.0**-21, True), (2.0**-10, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_only_a_mean_between_two_values_may_be_rounded_to_either(sign: int, offset: float, explained: bool) -> None:
    # In bfloat16 1 and 1 + 2^-7 are neighbours; the first block's mean is half-way, give or take a quarter of `offset`.
    one, above = 1.0, 1.0 + 2.0**-7
    between = torch.tensor([2.0, 1.0, 1.0 + 2.0**-6, sign * offset])[:, None].expand(4, 8)
    plain = torch.tensor([one, above] * 4).expand(4, 8)  # scores higher than eight ones, lower than eight times `above`
    k = torch.cat([between, plain])[None, None].bfloat16()
    exact, swapped = (0, 1) if sign > 0 else (1, 0)
    spec, q = make_spec((4, 1)), torch.ones(1, 1, 8, 8, dtype=torch.bfloat16)
    assert reference.select(spec, q, k)[0].flatten().tolist() == [exact, exact]
    kept = [torch.full((1, 1, 2, 1), swapped, dtype=torch.int32)]
    if explained:
        reference.check_selection(spec, q, k, kept)
    else:
        with pytest.raises(AssertionError, match="further apart than rounding explains"):
            reference.check_selection(spec, q, k, kept)


def test_fewer_candidates_than_places() -> None:
    # Nine tokens are 5 at level 1 and 2 at level 2, the first with four children and the last with one.
    spec = make_spec((2, 3), (4, 1))
    k = torch.ones(1, 1, 9, 8)
    k[:, :, 8] = 2  # so that the last one is kept
    kept = reference.select(spec, torch.ones(1, 1, 9, 8), k)
    assert kept[1].flatten().tolist() == [1, 1]
    assert kept[0].tolist() == [[[[4, -1, -1]] * 5]]
    reference.check_selection(spec, torch.ones(1, 1, 9, 8), k, kept)
    filled = [torch.where(kept[0] < 0, 0, kept[0]), kept[1]]  # known fault 8
    with pytest.raises(AssertionError, match="expected no key token twice"):
        reference.check_selection(spec, torch.ones(1, 1, 9, 8), k, filled)


def test_either_of_two_equal_scores_may_be_kept() -> None:
    spec = make_spec((2, 1))
    q = normal(0, 1, 1, 6, 8)
    k = normal(1, 1, 1, 1, 8).expand(1, 1, 6, 8)
    reference.check_selection(spec, q, k, [torch.tensor([[[[2], [0], [1]]]], dtype=torch.int32)])


# A correct selection with one thing wrong. Blocks of 3 and 4, K of 4 and 2: 53 tokens are 18 and 5 pooled ones, the
# last of each shorter; a query token of level 1 chooses among 8 children of two blocks, 6 where the last is kept.

SPEC = make_spec((3, 4), (4, 2))
TOKENS = 53


@pytest.fixture
def q() -> Tensor:
    return normal(10, 2, 2, TOKENS, 8)


@pytest.fixture
def k() -> Tensor:
    return normal(11, 2, 2, TOKENS, 8)


Change = Callable[[list[Tensor], list[Tensor], Tensor, Tensor], None]


def set_twice(kept: list[Tensor], _: list[Tensor], *__: Tensor) -> None:
    kept[0][1, 0, 7, 3] = kept[0][1, 0, 7, 1]


def set_out_of_range(kept: list[Tensor], _: list[Tensor], *__: Tensor) -> None:
    kept[0][1, 0, 7, 3] = 18


def set_far_below_zero(kept: list[Tensor], _: list[Tensor], *__: Tensor) -> None:
    kept[1][0, 1, 4, 0] = -2


def set_a_stranger(kept: list[Tensor], allowed: list[Tensor], *_: Tensor) -> None:
    kept[0][1, 0, 7, 3] = (~allowed[0][1, 0, 7]).nonzero()[0, 0]


def drop_one(kept: list[Tensor], _: list[Tensor], *__: Tensor) -> None:
    kept[0][1, 0, 7, 3] = -1


def drop_one_above(kept: list[Tensor], _: list[Tensor], *__: Tensor) -> None:
    kept[1][0, 1, 4, 1] = -1


def keep_the_worst(kept: list[Tensor], allowed: list[Tensor], q: Tensor, k: Tensor) -> None:
    queries, keys = reference.pool(q, 3), reference.pool(k, 3)
    scores = (queries @ keys.mT).masked_fill(~allowed[0], torch.inf)
    kept[0][1, 0, 7, 2] = scores[1, 0, 7].argmin()


def keep_the_next_best(kept: list[Tensor], _: list[Tensor], q: Tensor, k: Tensor) -> None:
    third = (reference.pool(q, 12) @ reference.pool(k, 12).mT)[0, 1, 4].argsort(descending=True)[2]
    kept[1][0, 1, 4, 1] = third


def widen(kept: list[Tensor], *_: object) -> None:
    kept[0] = torch.nn.functional.pad(kept[0], (0, 1), value=-1)


def lengthen(kept: list[Tensor], *_: object) -> None:
    kept[1] = kept[1].long()


def forget_a_level(kept: list[Tensor], *_: object) -> None:
    kept.pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_twice, r"level 1, batch 1, head 0, query token 7: expected no key token twice"),
        (set_out_of_range, r"level 1, batch 1, head 0, query token 7: expected -1 or ids below 18, got .*18\]"),
        (set_far_below_zero, r"level 2, batch 0, head 1, query token 4: expected -1 or ids below 5, got \[-2,"),
        (set_a_stranger, r"level 1, batch 1, head 0, query token 7: kept key token \d+, which is not a candidate"),
        (drop_one, r"level 1, batch 1, head 0, query token 7: expected 4 kept key tokens, got 3"),
        (drop_one_above, r"level 2, batch 0, head 1, query token 4: expected 2 kept key tokens, got 1"),
        (keep_the_worst, r"level 1, batch 1, head 0, query token 7: kept key token \d+ with score .* and dropped \d+"),
        (keep_the_next_best, r"level 2, batch 0, head 1, query token 4: kept key token \d+ with score .* and dropped"),
        (widen, r"level 1: expected int32 \[2, 2, 18, 4\], got torch.int32 \[2, 2, 18, 5\]"),
        (lengthen, r"level 2: expected int32 \[2, 2, 5, 2\], got torch.int64"),
        (forget_a_level, r"expected 2 tensors, one a level, got 1"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_one_mistake_is_refused(
    change: Change, message: str, chunk: int, q: Tensor, k: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llsa_gen.reference.selection.CHUNK_ELEMENTS", chunk)
    kept = list(reference.select(SPEC, q, k))
    reference.check_selection(SPEC, q, k, kept)
    change(kept, reference.candidates(SPEC, kept, TOKENS), q, k)
    with pytest.raises(AssertionError, match=message):
        reference.check_selection(SPEC, q, k, kept)


def test_candidates_are_those_of_the_selection_that_is_checked() -> None:
    # Two equal keys at level 2: ours keeps the lower, this selection the higher, and then children of the higher.
    spec = make_spec((2, 1), (2, 1))
    q = normal(0, 1, 1, 8, 8)
    key = normal(1, 1, 1, 4, 8)
    k = torch.cat([key, key], dim=2)
    ours = reference.select(spec, q, k)
    assert (ours[1] == 0).all()
    reference.check_selection(spec, q, k, (ours[0] + 2, torch.ones_like(ours[1])))
    with pytest.raises(AssertionError, match=r"level 1, .* which is not a candidate"):
        reference.check_selection(spec, q, k, (ours[0], torch.ones_like(ours[1])))


def test_the_rows_of_a_chunk_do_not_change_the_selection(q: Tensor, k: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reference.select(SPEC, q, k)
    monkeypatch.setattr("llsa_gen.reference.selection.CHUNK_ELEMENTS", 200)
    assert all(torch.equal(x, y) for x, y in zip(reference.select(SPEC, q, k), whole, strict=True))


@pytest.mark.gpu
def test_a_gpu_gives_the_same(q: Tensor, k: Tensor) -> None:
    here = reference.select(SPEC, q, k)
    there = reference.select(SPEC, q.cuda(), k.cuda())
    assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(there, here, strict=True))
    reference.check_selection(SPEC, q.cuda(), k.cuda(), there)
    o, lse = reference.attention(SPEC, q.cuda(), k.cuda(), k.cuda(), return_lse=True)
    expected, expected_lse = reference.attention(SPEC, q, k, k, return_lse=True)
    torch.testing.assert_close(o.cpu(), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-11, atol=1e-12)
