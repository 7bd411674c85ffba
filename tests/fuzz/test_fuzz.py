"""The fuzzer itself: what it draws, what it compares with, what it notices, and what it reports."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llsa_gen
from examples import BRANCHES, spec
from llsa_gen import Level, Spec, fuzz, reference
from llsa_gen.compiler import Attention
from llsa_gen.errors import CheckFailed
from llsa_gen.fuzz import Case, search
from llsa_gen.fuzz import case as fuzz_cases
from llsa_gen.fuzz import oracle as fuzz_oracle
from llsa_gen.store import Store

SMALL = spec("small", 8, (3, 2), (2, 2))


# ---- cases ----------------------------------------------------------------------------------------------------------


@given(case=fuzz.cases())
def test_a_case_is_what_its_text_says(case: Case) -> None:
    assert eval(repr(case), {"Case": Case, "Spec": Spec, "Level": Level}) == case


def test_a_case_tells_what_is_new_of_it() -> None:
    case = Case(SMALL, n=5, global_tokens=3, masked=True, loud=True, kept="thinned")
    assert repr(case) == f"Case(spec={SMALL!r}, n=5, global_tokens=3, masked=True, loud=True, kept='thinned')"
    assert eval(repr(case), {"Case": Case, "Spec": Spec, "Level": Level}) == case


def test_a_case_tells_only_what_is_unusual() -> None:
    assert repr(Case(SMALL, n=5, std=8.0)) == f"Case(spec={SMALL!r}, n=5, std=8.0)"


@settings(max_examples=30)
@given(case=fuzz.cases())
def test_tensors_follow_from_the_case(case: Case) -> None:
    tensors, again = case.tensors(), case.tensors()
    lengths = case.queries, case.n, case.n, case.queries
    for x, y, layout, tokens in zip(tensors, again, case.layouts, lengths, strict=True):
        shape = (case.batch, case.heads, tokens, case.spec.head_dim)
        assert torch.equal(x, y) and x.shape == shape and x.dtype == case.torch_dtype
        assert x.isfinite().all()
        assert layout != "contiguous" or x.is_contiguous()
    if case.values == "zero_queries" and not case.popular and not case.loud:
        assert not tensors[0].any()


@settings(max_examples=30)
@given(case=fuzz.cases(), global_tokens=st.sampled_from([1, 3, 17]))
def test_global_tokens_follow_from_the_case(case: Case, global_tokens: int) -> None:
    assert (case.shared() == {}) == (case.global_tokens == 0)
    case = dataclasses.replace(case, global_tokens=case.global_tokens or global_tokens)
    shared, again = case.shared(), case.shared()
    assert [*shared] == ["k_global", "v_global", *["global_mask"] * case.masked]
    assert all(fuzz.same_bits(shared[name], again[name]) for name in shared)
    mask = shared.get("global_mask", torch.ones(case.batch, case.global_tokens, dtype=torch.bool))
    assert mask.dtype == torch.bool and mask.shape == (case.batch, case.global_tokens)
    for name, layout in zip(("k_global", "v_global"), case.layouts[1:3], strict=True):
        x = shared[name]
        assert x.shape == (case.batch, case.heads, case.global_tokens, case.spec.head_dim)
        assert x.dtype == case.torch_dtype and x.stride() == fuzz_cases.lay_out(torch.empty_like(x), layout).stride()
        takes_part = mask[:, None, :, None].expand(x.shape)
        assert torch.equal(x.isfinite(), takes_part) and torch.equal(x.isnan(), ~takes_part)


def test_masks_leave_some_tokens_out_and_sometimes_all() -> None:
    masks = [
        Case(SMALL, 5, batch=3, global_tokens=8, masked=True, seed=seed).shared()["global_mask"] for seed in range(20)
    ]
    assert all(mask.any() and not mask.all() for mask in masks)
    assert 3 < sum(bool((~mask).all(dim=1).any()) for mask in masks) < 17


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_loud_tokens_are_heard_above_all_others(std: float) -> None:
    case = Case(spec("loud", 64, (3, 2)), n=200, global_tokens=2, loud=True, std=std)
    q, k, _, _ = case.tensors()
    loud, others = ((q @ keys.mT * case.softmax_scale).amax(-1) for keys in (case.shared()["k_global"], k))
    assert 10 < (loud - others).mean() < 16 and (loud - others).min() > 5
    assert not case.standard


def lists_of(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of the selection, and those that a case gives."""
    q, k, _, _ = case.tensors()
    selected = list(reference.select(case.spec, q, k, query_offset=case.query_offset))
    return selected, case.lists(q, k, selected) or selected


@settings(max_examples=60)
@given(case=fuzz.cases(), kept=st.sampled_from(["own", "other", "thinned"]))
def test_lists_that_are_given_are_of_what_their_parents_keep(case: Case, kept: fuzz.Kept) -> None:
    case = dataclasses.replace(case, kept=kept)
    selected, lists = lists_of(case)
    assert kept != "own" or all(map(torch.equal, lists, selected))
    allowed = reference.candidates(case.spec, lists, case.n, query_offset=case.query_offset)
    for level, (ids, before, candidates) in enumerate(zip(lists, selected, allowed, strict=True), start=1):
        tokens = reference.num_tokens(case.spec, level, case.n)
        assert ids.dtype == torch.int32 and ids.shape[:3] == before.shape[:3]
        if kept == "thinned" and case.layouts[0] != "contiguous" and min(ids.shape[2:]) > 1:
            assert ids.stride(3) == ids.shape[2]
        assert ids.shape[3] == before.shape[3] or 1 <= ids.shape[3] <= case.spec.topk(level)
        assert ((ids >= -1) & (ids < tokens)).all()
        named = torch.zeros(*ids.shape[:3], tokens + 1, dtype=torch.int32)
        named.scatter_add_(3, torch.where(ids < 0, tokens, ids).long(), torch.ones_like(ids))
        assert (named[..., :tokens] <= candidates).all(), "none twice, and none whose parent is not kept"


def test_thinned_lists_have_gaps_empty_rows_and_other_widths() -> None:
    gaps = empty = narrower = reordered = 0
    for seed in range(30):
        case = Case(spec("gaps", 8, (3, 4), (2, 3)), n=24, m=40, kept="thinned", seed=seed)
        selected, lists = lists_of(case)
        for ids, before in zip(lists, selected, strict=True):
            missing = ids < 0
            gaps += bool((missing[..., :-1] & ~missing[..., 1:]).any())
            empty += bool(missing.all(-1).any())
            narrower += ids.shape[3] < before.shape[3]
            reordered += ids.shape == before.shape and not torch.equal(ids[~missing], before[~missing])
    assert min(gaps, empty, narrower, reordered) > 5
    short = Case(spec("wide", 8, (3, 40)), n=20, kept="thinned")
    assert {lists_of(dataclasses.replace(short, seed=seed))[1][0].shape[3] > 7 for seed in range(30)} == {False, True}


def test_every_kind_of_case_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Case] = []
    monkeypatch.setattr(search, "run", lambda case, store: seen.append(case) or fuzz.Outcome(case, (), {}))
    fuzz.check(examples=600, seed=5)
    usual = [case for case in seen if not case.global_tokens and case.kept is None]
    assert len(usual) > len(seen) / 4
    assert {case.kept for case in seen} == {None, "own", "other", "thinned"}
    for condition in (
        lambda case: case.masked, lambda case: case.loud, lambda case: case.global_tokens > 64,
        lambda case: case.n == 0, lambda case: case.queries == 0, lambda case: case.n == 0 and case.global_tokens,
        lambda case: case.masked and case.loud, lambda case: case.masked and case.batch > 1,
        lambda case: case.kept and case.global_tokens, lambda case: case.kept and case.query_offset,
        lambda case: case.kept == "thinned" and case.masked, lambda case: case.kept and case.grad_lse,
        lambda case: case.kept == "thinned" and case.spec.enrich == "none" and not case.global_tokens,
        lambda case: case.kept and case.m, lambda case: case.global_tokens and case.layouts != fuzz_cases.CONTIGUOUS,
    ):  # fmt: skip
        assert any(map(condition, seen))
    assert not any((case.masked or case.loud) and not case.global_tokens for case in seen)


STRIDES: dict[fuzz_cases.Layout, Callable[[int, int, int], tuple[int, ...]]] = {
    "contiguous": lambda h, n, d: (h * n * d, n * d, d, 1),
    "transposed": lambda h, n, d: (n * h * d, d, h * d, 1),
    "expanded": lambda h, n, d: (n * d, 0, d, 1),
    "sliced": lambda h, n, d: (h * n * (2 * d + 3), n * (2 * d + 3), 2 * d + 3, 1),
    "every_second": lambda h, n, d: (h * 2 * n * d, 2 * n * d, 2 * d, 1),
    "columns": lambda h, n, d: (h * n * d, n * d, 1, n),
}


@pytest.mark.parametrize("layout", STRIDES)
def test_layouts_have_their_strides_and_values(layout: fuzz_cases.Layout) -> None:
    x = torch.arange(2.0 * 3 * 5 * 4).view(2, 3, 5, 4)
    laid_out = fuzz_cases.lay_out(x, layout)
    assert laid_out.stride() == STRIDES[layout](3, 5, 4)
    assert torch.equal(laid_out, x[:, :1].expand(x.shape) if layout == "expanded" else x)


def test_popular_keys_are_kept_by_every_query() -> None:
    case = Case(spec("popular", 16, (4, 2), (4, 2)), n=160, popular=True)
    fine, coarse = reference.select(case.spec, *case.tensors()[:2])
    for ids in (fine, coarse):
        most = torch.bincount(ids.flatten()).topk(2).values.sum()
        assert most > 0.8 * ids.numel()


# ---- what it compares with ------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(case=fuzz.cases(), chunk=st.sampled_from([1, 1 << 12, 1 << 26]))
def test_the_truth_is_that_of_autograd_through_the_reference(case: Case, chunk: int) -> None:
    q, k, v, grad_o = case.tensors()
    _, kept = lists_of(case)
    shared: dict[str, Any] = case.shared()
    offset = case.query_offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_oracle, "CHUNK_ELEMENTS", chunk if case.n < 50 else 1 << 16)
        grad_lse = case.gradient_of_lse()
        true = fuzz_oracle.truth(
            case.spec, q, k, v, grad_o, kept, case.softmax_scale, grad_lse=grad_lse, query_offset=offset, **shared
        )
    mask = shared.pop("global_mask", None)
    leaves = {
        name: x.detach().double().requires_grad_() for name, x in {"q": q, "k": k, "v": v, **shared}.items()
    }  # fmt: skip
    o, lse = reference.attention(
        case.spec, **leaves, global_mask=mask, scale=case.scale, indices=kept, return_lse=True,
        round_to=case.torch_dtype, query_offset=offset,
    )  # fmt: skip
    outputs, gradients = ((o,), (grad_o.double(),))
    if grad_lse is not None:
        outputs, gradients = (o, lse), (grad_o.double(), grad_lse.double())
    found = torch.autograd.grad(outputs, tuple(leaves.values()), gradients)
    wanted = {"o": o, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}
    assert [*wanted] == [*true.values] == [*true.sizes] == [*fuzz_oracle.results(case)]
    for name, expected in wanted.items():
        nothing = expected.isneginf()
        assert torch.equal(true.values[name].isneginf(), nothing) and not (nothing.any() and name != "lse")
        value, expected = (x.masked_fill(nothing, 0) for x in (true.values[name], expected))
        size = true.sizes[name].norm() + 1e-300
        assert (value - expected).norm() <= 1e-12 * size, name
        assert (value.abs() <= true.sizes[name] * (1 + 1e-9) + 1e-300).all() or name == "lse"
    if mask is not None:
        for name in ("dk_global", "dv_global"):
            assert not true.sizes[name].masked_fill(mask[:, None, :, None], 0).any()


@settings(max_examples=60)
@given(case=fuzz.cases(SMALL), name=st.sampled_from([*fuzz_oracle.RESULTS, *fuzz_oracle.GLOBAL_RESULTS]))
def test_no_tolerance_hides_a_mistake(case: Case, name: str) -> None:
    # Results off by two percent are refused: in float32 for all inputs, in half precision for standard normal ones of
    # some length. (Of two tokens nearly all of dq cancels, and what is left is made of the rounding of o.)
    if case.dtype != "float32":
        case = dataclasses.replace(
            case, n=64 + case.n, m=None, values="normal", std=1.0, popular=False, scale=None, loud=False
        )
    if name.endswith("_global"):
        case = dataclasses.replace(case, global_tokens=case.global_tokens or 3)
    q, k, v, grad_o = case.tensors()
    _, kept = lists_of(case)
    options: dict[str, Any] = {"grad_lse": case.gradient_of_lse(), "query_offset": case.query_offset, **case.shared()}
    true = fuzz_oracle.truth(case.spec, q, k, v, grad_o, kept, case.softmax_scale, **options)
    found = {key: x.to(torch.float32 if key == "lse" else case.torch_dtype) for key, x in true.values.items()}
    assert fuzz.compare(case, (q, k, v, grad_o), kept, found)[0] == []
    if name == "lse":
        assume(true.values["lse"].isfinite().any())
        found[name] += 0.1
    else:
        assume(true.values[name].norm() > 0.005 * true.sizes[name].norm())  # else there is nothing to multiply
        found[name] *= 1.02
    assert fuzz.compare(case, (q, k, v, grad_o), kept, found)[0] != []


def test_equal_scores_are_compared_by_index() -> None:
    case = Case(spec("ties", 8, (2, 3)), n=16, values="zero_queries")
    q, k, _, _ = case.tensors()
    lowest = reference.select(case.spec, q, k)
    fuzz_oracle.check_exact_ties(case, q, k, lowest)
    fuzz_oracle.check_exact_ties(case, q, k, [lowest[0].flip(-1)])  # the order within a row is free
    reference.check_selection(case.spec, q, k, [lowest[0] + 1])  # by value, one is as good as the other
    with pytest.raises(AssertionError, match=r"of equal scores the lower index, \[0, 1, 2\], got \[1, 2, 3\]"):
        fuzz_oracle.check_exact_ties(case, q, k, [lowest[0] + 1])


@pytest.mark.parametrize(("block", "n", "exact"), [(4, 32, True), (4, 33, True), (4, 31, False), (3, 30, False)])
def test_scores_are_exact_where_means_are(block: int, n: int, exact: bool) -> None:
    case = Case(spec("means", 8, (block, 2)), n=n, values="integers")
    assert fuzz_oracle._scores_are_exact(case, 1, *case.tensors()[:2]) == exact


# ---- what it notices ------------------------------------------------------------------------------------------------


genuine = fuzz.attend


def alter(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the results of every operator before the fuzzer sees them."""

    def attend(*arguments: Any) -> dict[str, Tensor]:
        found = genuine(*arguments)
        change(found)
        return found

    monkeypatch.setattr(search, "attend", attend)


def last_token_forgotten(found: dict[str, Tensor]) -> None:
    found["dk"][:, :, -1] = 0.0


def nothing_written(found: dict[str, Tensor]) -> None:
    found["dv"][0, 0, 0] = torch.empty(found["dv"].shape[-1])


def other_dtype(found: dict[str, Tensor]) -> None:
    found["o"] = found["o"].double()


def transposed_result(found: dict[str, Tensor]) -> None:
    found["lse"] = found["lse"].mT.contiguous()


def id_out_of_range(found: dict[str, Tensor]) -> None:
    found["kept_l1"][0, 0, 0, 0] = 99


def worse_key(found: dict[str, Tensor]) -> None:
    row = found["kept_l2"][0, 0, 0]
    row[0] = ({0, 1, 2, 3} - set(row.tolist())).pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (last_token_forgotten, "dk: error"),
        (nothing_written, "dv: error nan"),
        (other_dtype, r"o: expected torch.float32 \[1, 2, 22, 8\], got torch.float64"),
        (transposed_result, r"lse: expected torch.float32 \[1, 2, 22\], got torch.float32 \[1, 22, 2\]"),
        (id_out_of_range, "selection, level 1, batch 0, head 0, query token 0: expected -1 or ids below 8"),
        (worse_key, "selection, level 2, batch 0, head 0, query token 0: kept key token"),
    ],
)
def test_wrong_results_are_noticed(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(monkeypatch, change)
    outcome = fuzz.run(Case(SMALL, n=22, heads=2))
    assert not outcome.ok
    with pytest.raises(CheckFailed, match=message):
        outcome.raise_if_failed()


SHARED = Case(SMALL, n=22, batch=2, heads=2, global_tokens=4, masked=True, seed=1)
GIVEN = Case(SMALL, n=22, heads=2, kept="thinned")
# queries without blocks and without candidates
NOTHING = Case(spec("alone", 8, (3, 2), (2, 2), enrich="none"), n=40, heads=2, kept="thinned")

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A compiled operator with a fault in it: `fault` calls it in another way, or changes what it returns."""

    attention: Attention
    fault: Call

    def select(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return self.attention.select(*tensors, **options)

    def __call__(self, *tensors: Tensor, **options: Any) -> Any:
        return self.fault(self.attention, *tensors, **options)


def mask_ignored(attention: Call, *tensors: Tensor, global_mask: Tensor, **options: Any) -> Any:
    options |= {name: options[name].nan_to_num() for name in ("k_global", "v_global")}
    return attention(*tensors, **options)


def mask_of_another_entry(attention: Call, *tensors: Tensor, global_mask: Tensor, **options: Any) -> Any:
    options |= {name: options[name].nan_to_num() for name in ("k_global", "v_global")}
    return attention(*tensors, global_mask=global_mask.flip(0), **options)


def masked_tokens_looked_at(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    o, lse = attention(*tensors, **options)
    return o + 0 * options["v_global"].sum(dim=2, keepdim=True).to(o.dtype), lse


def a_gradient_left_out(attention: Call, *tensors: Tensor, k_global: Tensor, **options: Any) -> Any:
    cut = torch.cat([k_global[:, :, :-1], k_global[:, :, -1:].detach()], dim=2)
    return attention(*tensors, k_global=cut, **options)


def a_value_left_out(attention: Call, *tensors: Tensor, v_global: Tensor, **options: Any) -> Any:
    cut = torch.cat([v_global[:, :, :-1], v_global[:, :, -1:].detach()], dim=2)
    return attention(*tensors, v_global=cut, **options)


def values_of_keys(attention: Call, *tensors: Tensor, v_global: Tensor, **options: Any) -> Any:
    return attention(*tensors, v_global=options["k_global"] + 0 * v_global.nan_to_num(), **options)


def global_tokens_left_out(
    attention: Call, *tensors: Tensor, k_global: Tensor, v_global: Tensor, **options: Any
) -> Any:  # fmt: skip
    options.pop("global_mask", None)
    o, lse = attention(*tensors, **options)
    return o + 0 * (k_global + v_global).nan_to_num().sum(), lse


def counted_twice(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    twice = {name: torch.cat([options[name]] * 2, dim=2) for name in ("k_global", "v_global")}
    return attention(*tensors, **(options | twice))


def stale_lists(attention: Call, *tensors: Tensor, kept: list[Tensor], check_kept: bool, **options: Any) -> Any:
    return attention(*tensors, **options)


def stale_at_the_top(attention: Any, *tensors: Tensor, kept: list[Tensor], **options: Any) -> Any:
    *_, top = attention.select(*tensors[:2])
    return attention(*tensors, kept=[*kept[:-1], top], **(options | {"check_kept": False}))


def missing_ids_name_the_first_token(attention: Call, *tensors: Tensor, kept: list[Tensor], **options: Any) -> Any:
    lists = [torch.where((ids < 0).all(-1, keepdim=True) & (torch.arange(ids.shape[-1]) == 0), 0, ids) for ids in kept]
    return attention(*tensors, kept=lists, **(options | {"check_kept": False}))


def nothing_is_nan(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    o, lse = attention(*tensors, **options)
    return o.masked_fill(lse.isneginf()[..., None], torch.nan), lse


def nothing_is_little(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    o, lse = attention(*tensors, **options)
    return o + 1e-30 * lse.isneginf()[..., None], lse


def nothing_has_a_sum(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    o, lse = attention(*tensors, **options)
    return o, lse.clamp(min=-1e30)


def nothing_has_a_gradient(attention: Call, *tensors: Tensor, **options: Any) -> Any:
    o, lse = attention(*tensors, **options)
    nothing = lse.isneginf()[..., None]
    leak = 1e-20 * tensors[0] * nothing
    return o + leak - leak.detach(), lse


@pytest.mark.parametrize(
    ("fault", "case", "message"),
    [
        (mask_ignored, SHARED, "o: error"),
        (mask_of_another_entry, SHARED, "o: error"),
        (masked_tokens_looked_at, SHARED, "o: error nan"),
        (a_gradient_left_out, dataclasses.replace(SHARED, masked=False), "dk_global: error"),
        (a_value_left_out, dataclasses.replace(SHARED, masked=False), "dv_global: error"),
        (values_of_keys, SHARED, "o: error"),
        (global_tokens_left_out, SHARED, "o: error"),
        (global_tokens_left_out, dataclasses.replace(SHARED, loud=True, dtype="float16"), "o: error"),
        (counted_twice, dataclasses.replace(SHARED, masked=False), "lse: error"),
        (stale_lists, GIVEN, "o: error"),
        (stale_lists, dataclasses.replace(GIVEN, kept="other"), "o: error"),
        (stale_at_the_top, dataclasses.replace(GIVEN, kept="other"), "o: error"),
        (missing_ids_name_the_first_token, GIVEN, "o: error"),
        (nothing_is_nan, NOTHING, "o: expected zeros for queries with nothing to attend to, got other numbers"),
        (nothing_is_little, NOTHING, "o: expected zeros for queries with nothing to attend to, got other numbers"),
        (nothing_has_a_sum, NOTHING, "lse: error inf"),
        (
            nothing_has_a_gradient,
            NOTHING,
            "dq: expected zeros for queries with nothing to attend to, got other numbers",
        ),
    ],
)
def test_faults_of_what_is_given_are_noticed(
    fault: Call, case: Case, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = search.compile
    fuzz.run(case).raise_if_failed()
    monkeypatch.setattr(search, "compile", lambda *given, **options: Broken(genuine(*given, **options), fault))
    with pytest.raises(CheckFailed, match=message):
        fuzz.run(case).raise_if_failed()


def masked_gradient(found: dict[str, Tensor]) -> None:
    found["dv_global"][~SHARED.shared()["global_mask"][:, None].expand(-1, SHARED.heads, -1)] = 1e-30


def masked_gradient_not_written(found: dict[str, Tensor]) -> None:
    found["dk_global"][~SHARED.shared()["global_mask"][:, None].expand(-1, SHARED.heads, -1)] = torch.nan


@pytest.mark.parametrize(
    ("change", "name"), [(masked_gradient, "dv_global"), (masked_gradient_not_written, "dk_global")]
)
def test_gradients_of_masked_tokens_are_zeros(change: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(monkeypatch, change)
    first, *_ = fuzz.run(SHARED).failures
    assert first == f"{name}: expected zeros for global tokens that take no part, got other numbers"


def test_other_bits_with_the_lists_that_are_selected_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(attention: Any, case: Case, *tensors: Tensor) -> dict[str, Tensor]:
        found = genuine(attention, case, *tensors)
        if case.kept is not None:
            found["dk_global"] = torch.nextafter(found["dk_global"], torch.tensor(1e9))
        return found

    case = dataclasses.replace(SHARED, kept="own", masked=False)
    fuzz.run(case).raise_if_failed()
    monkeypatch.setattr(search, "attend", attend)
    assert fuzz.run(case).failures == ("dk_global: other bits than without the lists, which are those selected",)


def test_other_bits_in_a_second_run_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter((1.0, -1.0))

    def last_bit(found: dict[str, Tensor]) -> None:
        found["dq"][0, 0, 3] = torch.nextafter(found["dq"][0, 0, 3], torch.tensor(next(runs) * 1e9))

    alter(monkeypatch, last_bit)
    assert fuzz.run(Case(SMALL, n=10)).failures == ("dq: a second run gave other bits",)


def test_poisoned_memory_is_poisoned_and_given_back() -> None:
    with fuzz.poisoned_memory():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


# ---- the search -----------------------------------------------------------------------------------------------------


def test_a_check_draws_what_its_seed_says() -> None:
    drawn: list[list[Case]] = []
    for seed in (3, 3, 4):
        with pytest.MonkeyPatch.context() as patch:
            seen: list[Case] = []
            patch.setattr(search, "run", lambda case, store, seen=seen: seen.append(case) or fuzz.Outcome(case, (), {}))
            fuzz.check(SMALL, examples=30, seed=seed)
        drawn.append(seen)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == len(set(drawn[0])) == 30
    assert {case.spec for case in drawn[0]} == {SMALL}


def test_specs_that_are_drawn_do_not_fill_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLSA_GEN_CACHE_DIR", str(tmp_path))  # that of the other tests is filled by them meanwhile
    report = fuzz.check(examples=2, seed=11)
    assert report.specs > 0 and Store().entries() == []
    llsa_gen.compile(spec("kept_by_compile", 16, (4, 3)))  # which does fill it
    assert [entry.name for entry in Store().entries()] == ["kept_by_compile"]


def test_a_check_reports_what_it_did() -> None:
    steps: list[tuple[int, float]] = []
    report = fuzz.check(SMALL, examples=30, seed=5, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == list(range(1, 31))
    assert steps == sorted(steps) and steps[-1][1] <= report.seconds
    assert (report.examples, report.specs, report.seed, report.device) == (30, 1, 5, "cpu")
    assert not report.interpreted
    assert all(0.0 < margin <= 1.0 for margin in report.margins.values())
    assert [*report.margins] == [*fuzz_oracle.RESULTS, *fuzz_oracle.GLOBAL_RESULTS]


def test_a_check_reports_on_global_tokens_only_where_it_drew_some(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Case] = []

    def run(case: Case, store: Store | None) -> fuzz.Outcome:
        seen.append(case)
        return fuzz.Outcome(case, (), dict.fromkeys(fuzz_oracle.results(case), 0.5))

    monkeypatch.setattr(search, "run", run)
    assert [*fuzz.check(SMALL, examples=1, seed=0).margins] == [*fuzz_oracle.results(seen[0])]
    assert not seen[0].global_tokens


def test_a_check_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=0.25)  # the clock goes on whenever somebody looks at it
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    report = fuzz.check(SMALL, seconds=2.0)
    assert 2 <= report.examples <= 8 and 2.0 <= report.seconds <= 3.0
    assert fuzz.check(SMALL, seconds=0.0).examples == 1  # one at least


def test_a_check_takes_whatever_a_spec_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.to_yaml())
    for source in (file, str(file), SMALL.model_dump(), SMALL):
        assert fuzz.check(source, examples=1, seed=0).examples == 1


def test_a_failing_check_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case, store: Store | None) -> fuzz.Outcome:
        wrong = case.n >= 7 and case.spec.num_levels >= 2
        return fuzz.Outcome(case, ("dq: wrong",) if wrong else (), {})

    monkeypatch.setattr(search, "run", run)
    with pytest.raises(CheckFailed, match="dq: wrong") as caught:
        fuzz.check(examples=300, seed=0)
    smallest = eval(str(caught.value).partition("\nin ")[2], {"Case": Case, "Spec": Spec, "Level": Level})
    assert (smallest.n, smallest.spec.num_levels) == (7, 2)
    assert dataclasses.replace(smallest, spec=SMALL) == Case(SMALL, n=7)
    assert smallest.spec.head_dim == 8


def test_a_failure_is_not_lost_to_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case, store: object = None) -> fuzz.Outcome:
        nonlocal tried
        tried += 1
        if tried == 5:
            raise KeyboardInterrupt
        return fuzz.Outcome(case, ("wrong",) if failing else (), {})

    monkeypatch.setattr(search, "run", fails)
    tried, failing = 0, True
    with pytest.raises(CheckFailed, match="wrong"):
        fuzz.check(SMALL, examples=100)
    tried, failing = 0, False
    with pytest.raises(KeyboardInterrupt):
        fuzz.check(SMALL, examples=100)


def test_whatever_an_operator_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case, store: Store | None) -> fuzz.Outcome:
        raise IndexError("out of range")

    monkeypatch.setattr(search, "run", run)
    with pytest.raises(CheckFailed, match="IndexError: out of range"):
        fuzz.check(SMALL, examples=5, seed=0)


def test_a_gpu_that_is_lost_ends_the_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Case] = []

    def run(case: Case, store: Store | None) -> fuzz.Outcome:
        calls.append(case)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(search, "run", run)
    with pytest.raises(CheckFailed, match="illegal memory access"):
        fuzz.check(SMALL, examples=5, seed=0)
    assert len(calls) == 1


# ---- the reproducer -------------------------------------------------------------------------------------------------


def paste(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as `python - <<'EOF'` does."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, env=variables, timeout=600
    )


def test_a_reproducer_runs_when_pasted() -> None:
    case = Case(BRANCHES[0], n=9, layouts=("columns", "sliced", "expanded", "transposed"), popular=True)
    done = paste(fuzz.reproducer(case))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_reproducer_shows_what_is_wrong() -> None:
    # the same script, after lines that break every operator
    broken = """
from llsa_gen.fuzz import search
genuine = search.attend
search.attend = lambda *given: {name: 2 * x if name == "dq" else x for name, x in genuine(*given).items()}
"""
    done = paste(broken + fuzz.reproducer(Case(SMALL, n=9)))
    assert done.returncode == 1 and "CheckFailed: dq: error" in done.stderr


def test_a_reproducer_of_the_interpreter_turns_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TRITON_INTERPRET" not in fuzz.reproducer(Case(SMALL, n=3))
    monkeypatch.setattr(search, "on_interpreter", lambda device: device == "cpu")
    script = fuzz.reproducer(Case(SMALL, n=3))
    assert "TRITON_INTERPRET" not in fuzz.reproducer(Case(SMALL, n=3, device="cuda"))
    shown = "\nfrom llsa_gen import compile\nprint(compile(Spec(**SPEC)).module.INTERPRETED)\n"
    done = paste(script + shown.replace("**SPEC", f"**{SMALL.model_dump()!r}"))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_the_roundoff_of_large_logits_is_allowed_and_little_more() -> None:
    # logits of 5,120, all equal but for the order of their sums: torch works them out once, and has no error at all
    case = fuzz.Case(spec("alike", 80, (2, 1)), n=4, values="constant", std=8.0, scale=1.0)
    attention, inputs = llsa_gen.compile(case.spec), case.tensors()
    found = fuzz.attend(attention, case, *inputs)
    assert fuzz.compare(case, inputs, [found["kept_l1"]], found)[0] == []
    for name in ("o", "dv"):
        off = found | {name: found[name] * 1.002}
        (failure,) = fuzz.compare(case, inputs, [found["kept_l1"]], off)[0]
        assert failure.startswith(f"{name}: error ")
