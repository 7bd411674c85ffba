"""Every kernel in Triton's interpreter, by specs that take every branch of the templates, against the reference."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import interpreting
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from examples import BRANCHES, every_schedule, spec
from llsa_gen import Spec, fuzz, reference
from llsa_gen.compiler import compile
from llsa_gen.fuzz.case import Layouts
from llsa_gen.plan import lower
from llsa_gen.schedule.table import stage_kind

pytestmark = pytest.mark.interpret

MIXED: Layouts = ("transposed", "columns", "sliced", "every_second")
SHARED: Layouts = ("sliced", "expanded", "transposed", "expanded")


OTHER_VERSIONS = ("l1_whole_none", "l2_keepers", "l3")
"""Branches that run with the oldest and the newest Triton, too: together they have every kind of kernel."""


def by_name(chosen: Spec) -> str:
    return chosen.name


def marked(chosen: Spec) -> Any:
    return pytest.param(chosen, marks=pytest.mark.versions if chosen.name in OTHER_VERSIONS else ())


def test_the_interpreter_is_on() -> None:
    assert compile(BRANCHES[0]).module.INTERPRETED


def test_what_the_interpreter_is_spared_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = fuzz.Case(spec("spared", 16, (4, 2), (3, 2)), n=29)
    attention, inputs = compile(case.spec), case.tensors()
    spared = fuzz.attend(attention, case, *inputs)
    counts = Counter[str]()

    def counted(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            counts[name] += 1
            return whole(*given)

        return call

    for owner, name, _ in interpreting.places():
        whole = getattr(owner, name).__wrapped__
        monkeypatch.setattr(owner, name, counted(f"{owner.__name__}.{name}", whole))
    found = fuzz.attend(attention, case, *inputs)
    assert all(fuzz.same_bits(found[name], spared[name]) for name in found)
    assert len(counts) == 6 and min(counts.values()) > 100, f"no longer spared, drop it from interpreting.py: {counts}"


def test_the_specs_take_every_branch() -> None:
    plans = [lower(chosen) for chosen in BRANCHES]
    choices = {
        (plan.grouped, bool(plan.enriched), plan.shared_level is None, plan.attends_top, plan.parted != (*plan.levels,))
        for plan in plans
    }
    assert choices >= {
        (True, True, True, True, False),  # all queries see the same coarse keys
        (True, True, False, True, False),  # those under one coarse token do
        (True, True, False, False, False),  # and nobody sees the top
        (True, True, True, True, True),  # a level between tokens and top that is not attended
        (False, True, True, True, False),
        (False, True, False, True, False),
        (False, False, True, False, False),
        (False, False, True, False, True),
    }
    sorting = {(level == plan.top, level in plan.sorted_levels) for plan in plans for level in plan.levels}
    assert sorting == {(True, True), (True, False), (False, True), (False, False)}
    assert {len(plan.pool_steps[-1]) for plan in plans if plan.top > 2} == {1, 2}
    assert {plan.spec.reweight for plan in plans if plan.attends_top and plan.top > 1} == {True, False}
    above = {(level > 0, plan.enriched_above(level) is not None) for plan in plans for level in plan.by_list}
    assert above == {(True, True), (True, False), (False, True), (False, False)}
    skipped = {(plan.enriched_above(level) or 0) - level for plan in plans for level in plan.by_keeper}
    assert skipped >= {-1, 1, 2}  # nothing above, the level above, one beyond


def test_the_short_set_has_every_kind_of_kernel() -> None:
    def kinds(specs: Iterable[Spec]) -> set[tuple[str, str]]:
        planned = [(plan, kernel) for plan in map(lower, specs) for kernel in plan.kernels]
        return {(stage_kind(plan, one.stage), re.sub(r"_l\d", "", one.name)) for plan, one in planned}

    assert kinds(chosen for chosen in BRANCHES if chosen.name in OTHER_VERSIONS) == kinds(BRANCHES)


@pytest.mark.parametrize("chosen", list(map(marked, BRANCHES)), ids=by_name)
def test_kernels_agree_with_the_reference(chosen: Spec) -> None:
    # two blocks of the second level and one token more, so that every level has a tail
    n = chosen.span(min(2, chosen.num_levels)) * 2 + 1
    if max(level.topk for level in chosen.levels) > 64:
        n = 139  # 70 candidates, and one block of them
    fuzz.run(fuzz.Case(chosen, n=37 if n < 20 else n, layouts=MIXED)).raise_if_failed()


def take_schedule_of(goal: str, chosen: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the kernels of a spec the schedule of another GPU than the interpreter's usual cuda:80."""
    module = compile(chosen).module
    monkeypatch.setattr(module, "launch_plan", module.launch_plan.__wrapped__)  # which remembers schedules
    monkeypatch.setattr(module, "target_of", lambda device: goal)


@pytest.fixture(params=["cuda:90", "cuda:120"])
def other_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """A spec whose kernels have the schedule of another GPU."""
    chosen = spec("other_gpu", 16, (16, 3), (4, 5))
    take_schedule_of(request.param, chosen, monkeypatch)
    return chosen


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("values", ["normal", "integers", "zero_queries"])
def test_the_schedule_of_another_gpu(other_gpu: Spec, dtype: fuzz.DType, values: fuzz.Values) -> None:
    # what differs in more than tiles is how candidates are ordered: by float64, or by int64
    fuzz.run(fuzz.Case(other_gpu, n=16 * 4 * 4 + 21, dtype=dtype, values=values)).raise_if_failed()


def test_tiles_smaller_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 fine keys a tile, of blocks of 24 that are grouped: a tile may begin in one block and end in the next
    chosen = spec("heads_of_256", 256, (24, 2), (3, 2))
    take_schedule_of("cuda:90", chosen, monkeypatch)
    n = 24 * 3 * 3 + 5
    module = compile(chosen).module
    target = module.target_of(torch.device("cpu"))
    assert module.schedule_for(target, torch.float16)["attend"]["BLOCK_N"] == 16
    fuzz.run(fuzz.Case(chosen, n=n, dtype="float16")).raise_if_failed()


@pytest.mark.parametrize(
    ("topk", "values"),
    [(1, "integers"), pytest.param(3, "normal", marks=pytest.mark.versions), (8, "zero_queries")],
)
def test_runs_of_candidates(topk: int, values: fuzz.Values, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = spec("many_candidates", 16, (2, topk), enrich="none")
    module = compile(chosen).module
    monkeypatch.setattr(module, "launch_plan", module.launch_plan.__wrapped__)
    monkeypatch.setattr(module, "MANY_CANDIDATES", 16)  # with 1,024, it takes minutes
    for n in (2 * 99 + 1, 33):  # the last run is not full
        fuzz.run(fuzz.Case(chosen, n=n, dtype="float16", values=values)).raise_if_failed()


@pytest.mark.parametrize("score", [-1.0, 0.0, 1.0])
def test_of_equal_scores_the_lower_token(other_gpu: Spec, score: float) -> None:
    q, k = (torch.full((1, 1, 277, 16), value, dtype=torch.float16) for value in (1.0, score))
    for kept in compile(other_gpu).select(q, k):
        assert (kept == torch.arange(kept.shape[-1])).all()


def test_scores_that_are_no_numbers(other_gpu: Spec) -> None:
    shape = (1, 1, 277, 16)
    q, k = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).half() for _ in range(2))
    k[:, :, 40:50] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.float16)  # all bits set, as NaN on a GPU
    fine, coarse = compile(other_gpu).select(q, k)
    assert (fine[..., :2] == torch.tensor([2, 3])).all()  # NaN is above all numbers, of two the lower first
    assert (coarse[..., 0] == 0).all()
    q[:, :, 60:70] = float("inf")
    for level, kept in enumerate(compile(other_gpu).select(q, k), start=1):
        tokens = -(-277 // other_gpu.span(level))
        assert ((kept >= 0) & (kept < tokens)).all()
        for row in kept.flatten(0, 2):
            assert len(set(row.tolist())) == len(row)  # no token twice, whatever NaN compares like


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_peak_that_stays(dtype: fuzz.DType) -> None:
    chosen = next(chosen for chosen in BRANCHES if chosen.name == "l1_whole_none")
    for std in (1.0, 2.5, 8.0):  # it is too low nowhere, for some, for nearly all
        fuzz.run(fuzz.Case(chosen, n=192, std=std, dtype=dtype)).raise_if_failed()


@pytest.mark.parametrize("lead", [3.0, 9.0])
def test_a_key_that_outweighs_all_others(lead: float) -> None:
    # what is far below the peak counts nevertheless, if there is much of it: here 127 values of 1, and one of 0
    chosen = next(chosen for chosen in BRANCHES if chosen.name == "l1_whole_none")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 128, 16, generator=generator) / 8 for _ in range(2))
    v = torch.ones(1, 1, 128, 16)
    q[..., 0], k[..., 0], k[..., 0, 0], v[..., 0, :] = 4.0, 0.0, lead, 0.0  # logits: a quarter of q.k
    q, k, v = q.half(), k.half(), v.half()
    expected = torch.softmax(q.double() @ k.double().mT / 4, -1) @ v.double()
    found = compile(chosen)(q, k, v)
    assert isinstance(found, torch.Tensor)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v

    def error(x: torch.Tensor) -> float:
        return float((x.double() - expected).norm() / expected.norm())

    assert error(found) <= 2 * error(dense) + 2**-11


@pytest.mark.parametrize("chosen", BRANCHES[::3], ids=by_name)
def test_kernels_agree_with_the_reference_in_half_precision(chosen: Spec) -> None:
    fuzz.run(fuzz.Case(chosen, n=31, heads=2, dtype="float16", layouts=SHARED)).raise_if_failed()


@pytest.mark.parametrize(
    "chosen", [chosen for chosen in BRANCHES if chosen.name in ("l1_none", "l2", "l3", "l3_outer")], ids=by_name
)
def test_the_operator_does_what_eager_calls_do(chosen: Spec) -> None:
    # They go around it, with and without gradients.
    module = compile(chosen).module
    shape = (1, 2, 21, chosen.head_dim)
    q, k, v, grad_o = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with fuzz.poisoned_memory():
        eager, lse = module.attention(*leaves, return_lse=True)
        eager_grads = torch.autograd.grad(eager, leaves, grad_o)
        o, operator_lse, _ = getattr(torch.ops.llsa, module.OPERATOR)(*leaves, chosen.head_dim**-0.5)
        once_more = torch.autograd.grad(o, leaves, grad_o, retain_graph=True)
        grads = torch.autograd.grad(o, leaves, grad_o)
        with torch.no_grad():
            inferred = module.attention(*leaves, return_lse=True)
    assert torch.equal(inferred[0], o) and torch.equal(inferred[1], lse)
    assert all(map(torch.equal, once_more, grads)), "the backward pass leaves what was saved as it was"
    for mine, other in zip((eager, lse, *eager_grads), (o, operator_lse.view(lse.shape), *grads), strict=True):
        assert torch.isfinite(mine).all() and torch.equal(mine, other)


def test_a_checkpoint_may_be_watched_in_one_pass_alone() -> None:
    # The operator and eager calls save the same, or recomputing one for the other would be an error of torch's.
    chosen = next(chosen for chosen in BRANCHES if chosen.name == "l2")
    attention = compile(chosen).module.attention
    leaves = [torch.randn(1, 1, 21, chosen.head_dim, requires_grad=True) for _ in range(3)]
    wanted = torch.autograd.grad(attention(*leaves).sum(), leaves)
    for forward, backward in ((True, False), (False, True)):
        with FlopCounterMode(display=False) if forward else nullcontext():
            o = checkpoint(attention, *leaves, use_reentrant=False)
        with FlopCounterMode(display=False) if backward else nullcontext():
            grads = torch.autograd.grad(o.sum(), leaves)
        assert all(map(torch.equal, grads, wanted))


SHARING = (
    "l1_wide", "l1_whole_none", "l2", "l2_fine", "l2_none", "l2_keepers", "l3_middle", "l4_some",
)  # fmt: skip
"""Branches of the walk, each of which attends to global tokens in its own place."""


@pytest.mark.parametrize(
    "chosen", [marked(chosen) for chosen in BRANCHES if chosen.name in SHARING], ids=lambda chosen: chosen.name
)
def test_global_tokens_and_given_lists(chosen: Spec) -> None:
    n = min(2 * chosen.span(min(2, chosen.num_levels)) + 1, 150)
    shared = {"global_tokens": 35, "masked": True, "batch": 2, "grad_lse": True}
    fuzz.run(fuzz.Case(chosen, n=n, m=29, kept="thinned", **shared)).raise_if_failed()
    fuzz.run(fuzz.Case(chosen, n=n, dtype="float16", global_tokens=3, kept="own")).raise_if_failed()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["l1_whole_none", "l2"])
def test_a_global_token_that_outweighs_all_others(name: str, dtype: fuzz.DType) -> None:
    chosen = next(chosen for chosen in BRANCHES if chosen.name == name)
    fuzz.run(fuzz.Case(chosen, n=66, dtype=dtype, global_tokens=20, loud=True)).raise_if_failed()


@pytest.mark.parametrize("n", [1, 2, 13])
def test_lengths_around_one_token_of_the_top(n: int) -> None:
    fuzz.run(fuzz.Case(spec("l2", 16, (4, 2), (3, 2)), n=n, batch=2)).raise_if_failed()


@pytest.mark.parametrize(
    "chosen",
    [chosen for chosen in BRANCHES if chosen.name in ("l1_none", "l2", "l3", "l3_keepers", "l3_outer", "l4")],
    ids=by_name,
)
def test_popular_keys_are_shared_out(chosen: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lists are cut into parts where they are long: here, where they are longer than two.
    for tiles in every_schedule(compile(chosen)):
        for stage in tiles.values():
            if "PART" in stage:
                monkeypatch.setitem(stage, "PART", 2)
    # or shared by many keepers: more than are summed at a time
    n = 16 * chosen.span(2) if lower(chosen).by_keeper else 51
    fuzz.run(fuzz.Case(chosen, n=n, popular=True)).raise_if_failed()


def one_multiply_add_after_another(self: Any, a: Any, b: Any, d: Any, *_: object) -> TensorHandle:
    """A product of float32 tiles in the order in which a GPU without float32 matrix units sums it: a chain for each."""
    total = d.data.astype(np.float32)
    for k in range(a.data.shape[-1]):  # exact in float64, so rounded once, as a fused multiply-add is
        product = a.data[..., :, k, None].astype(np.float64) * b.data[..., k, None, :].astype(np.float64)
        total = (total + product).astype(np.float32)
    return TensorHandle(total, d.dtype.scalar)


def test_equal_terms_in_the_order_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # A chain over all keys rounds every equal term the same way: of 512 keys, hundreds of roundoffs.
    monkeypatch.setattr(InterpreterBuilder, "create_dot", one_multiply_add_after_another)
    fuzz.run(fuzz.Case(spec("l2", 16, (16, 8), (16, 8)), n=512, values="constant")).raise_if_failed()


@pytest.mark.parametrize("seed", range(4))
def test_a_few_tokens_whose_gradients_nearly_cancel(seed: int) -> None:
    # All keys and their means are nearly alike: of dq and dk remains a hundredth, and what rounding o adds to it.
    fuzz.run(fuzz.Case(spec("l2", 16, (2, 3), (3, 2)), n=2, heads=2, dtype="float16", seed=seed)).raise_if_failed()


@pytest.mark.parametrize("std", [0.1, 8.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_scale_of_activations(std: float, dtype: fuzz.DType) -> None:
    fuzz.run(fuzz.Case(spec("l2", 32, (5, 2), (3, 2)), n=32, std=std, dtype=dtype)).raise_if_failed()


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-46, -0.3])
def test_any_softmax_scale(scale: float) -> None:
    fuzz.run(fuzz.Case(spec("l2", 16, (4, 2), (3, 2)), n=26, scale=scale)).raise_if_failed()
    # without loose ends, kernels are compiled without masks
    fuzz.run(fuzz.Case(spec("l1", 16, (16, 4)), n=48, scale=scale)).raise_if_failed()
    fuzz.run(fuzz.Case(spec("fine", 16, (16, 2), enrich="none"), n=48, scale=scale)).raise_if_failed()


@pytest.mark.parametrize("values", ["integers", "constant", "zero_queries"])
def test_ties_go_to_the_lower_index(values: fuzz.Values) -> None:
    fuzz.run(fuzz.Case(spec("l2", 16, (4, 3), (4, 2)), n=64, values=values)).raise_if_failed()


def test_more_is_kept_than_a_tile_holds() -> None:
    # K = 17 of 34 in tiles of 32: the best of one tile have to be merged with those of the next
    fuzz.run(fuzz.Case(spec("l1", 16, (2, 17)), n=67)).raise_if_failed()


@pytest.mark.parametrize("values", ["normal", "integers", "zero_queries"])
def test_candidates_are_dealt_to_four_warps(values: fuzz.Values) -> None:
    # 4 x 64 candidates at a time in half precision, and a few more: what each warp finds best is merged
    case = fuzz.Case(spec("l1", 16, (2, 3)), n=2 * 256 + 19, dtype="float16", values=values)
    q, k, *_ = case.tensors()
    reference.check_selection(case.spec, q, k, compile(case.spec).module.select(q, k))


def test_drawn_cases() -> None:
    fuzz.check(examples=3, seed=20240607)
