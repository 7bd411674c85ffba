"""The cost model: expressions against counting in plain integers, against real tensors, and limits against numbers."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llsa_gen import Level, Spec, compile, load
from llsa_gen.aot.launches import Launch, dtype_name, record
from llsa_gen.fuzz.case import lengths, specs
from llsa_gen.plan import Kernel, lower
from llsa_gen.plan.cost import BYTES, Cost, dense, evaluate
from llsa_gen.plan.growth import growth, order, order_with_levels, smooth, top_share, with_another_level
from llsa_gen.plan.sizes import HEADS, MAX_TOKENS, N
from llsa_gen.plan.sizes import splits as splits_of
from llsa_gen.schedule import schedule, target

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "spec").glob("*.yaml"))


def cost_of(spec: Spec, dtype: str = "bfloat16") -> Cost:
    plan = lower(spec)
    return Cost(plan, schedule(plan, target("cuda:90"), BYTES[dtype]), dtype)


def shipped(name: str) -> Cost:
    return cost_of(load(ROOT / "spec" / f"{name}.yaml"))


# ---- FLOPs ------------------------------------------------------------------------------------------------------


class Walk:
    """One head of an attention walked through, token by token, every query keeping what `choose` picks."""

    def __init__(self, spec: Spec, n: int, choose: random.Random | None) -> None:
        """Without `choose`, every query keeps its first candidates: the short last token only if all are kept."""
        self.spec, self.choose = spec, choose
        self.tokens = [list(range(n))]
        for level in spec.levels:
            self.tokens.append(list(range((len(self.tokens[-1]) + level.block - 1) // level.block)))
        self.pairs_scored = 0
        self.seen = [0] * n
        kept: list[list[int]] = []
        for level in range(spec.num_levels, 0, -1):
            candidates = [self.candidates(level, query, kept) for query in self.tokens[level]]
            if level in spec.enriched_levels:
                for query in range(n):
                    self.seen[query] += len(candidates[query // spec.span(level)])
            self.pairs_scored += sum(map(len, candidates))
            kept = [self.keep(found, spec.topk(level)) for found in candidates]
        for query in range(n):
            self.seen[query] += len(self.candidates(0, query, kept))

    def candidates(self, level: int, query: int, kept_above: list[list[int]]) -> list[int]:
        if level == self.spec.num_levels:
            return self.tokens[level]
        block = self.spec.block(level + 1)
        return [
            child
            for parent in kept_above[query // block]
            for child in range(parent * block, min((parent + 1) * block, len(self.tokens[level])))
        ]

    def keep(self, candidates: list[int], topk: int) -> list[int]:
        if self.choose is None:
            return candidates[:topk]
        return self.choose.sample(candidates, min(topk, len(candidates)))

    @property
    def pooling_adds(self) -> int:
        return sum(len(tokens) for tokens in self.tokens[:-1])

    @property
    def unpooling_adds(self) -> int:
        """Each attended coarse level hands its gradient to every token of the next attended level below."""
        attended = [0, *self.spec.enriched_levels]
        return sum(len(self.tokens[below]) for below in attended[:-1])

    def flops(self) -> tuple[int, int]:
        """Forward and backward, two for each multiply-add."""
        d, pairs = self.spec.head_dim, sum(self.seen)
        pooled = 3 if self.spec.enriched_levels else 2
        forward = d * (pooled * self.pooling_adds + 2 * self.pairs_scored + 2 * 2 * pairs)
        backward = d * (2 * 7 * pairs + 2 * self.unpooling_adds)
        return forward, backward


@settings(max_examples=40)
@given(st.data(), st.integers(1, 5))
def test_flops_are_those_of_a_walk_through_the_attention(data: st.DataObject, heads: int) -> None:
    spec = data.draw(specs(max_levels=5))
    n = data.draw(lengths(spec, 400))
    cost, walk = cost_of(spec), Walk(spec, n, None)
    assert evaluate(cost.keys, n) == max(walk.seen)
    totals = cost.totals
    found = evaluate(totals.forward.flops, n, heads), evaluate(totals.backward.flops, n, heads)
    # the last query tokens may see as many keys as the others: who keeps the first candidates never keeps a short one
    assert found == tuple(heads * flops for flops in walk.flops())


@settings(max_examples=40)
@given(st.data(), st.integers(0, 2**32))
def test_no_selection_costs_more_and_where_it_says_exact_none_costs_less(data: st.DataObject, seed: int) -> None:
    spec = data.draw(specs(max_levels=4))
    n = data.draw(lengths(spec, 300))
    cost, walk = cost_of(spec), Walk(spec, n, random.Random(seed))
    counted = evaluate(cost.totals.forward.flops, n), evaluate(cost.totals.backward.flops, n)
    assert max(walk.seen) <= evaluate(cost.keys, n)
    assert all(real <= most for real, most in zip(walk.flops(), counted, strict=True))
    if cost.exact(n):
        assert set(walk.seen) == {evaluate(cost.keys, n)}
        assert walk.flops() == counted


def test_a_query_that_keeps_a_short_last_token_sees_fewer_keys() -> None:
    cost = cost_of(Spec(name="short", head_dim=16, levels=(Level(block=4, topk=1),)))
    assert cost.exact(12) and not cost.exact(13)
    assert {seen for seed in range(9) for seen in Walk(cost.plan.spec, 13, random.Random(seed)).seen} == {4 + 4, 4 + 1}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shares_name_stages_of_the_plan_and_leave_out_none(name: str) -> None:
    cost = shipped(name)
    kinds = {stage: kind for stage, (kind, _) in cost.plan.stages.items()}
    counted = {share.stage for share in cost.shares}
    assert counted <= kinds.keys()
    assert {kinds[stage] for stage in kinds.keys() - counted} <= {"keep", "scan", "invert", "grad_sum", "grad_gather"}
    by_level = sum(evaluate(cost.level_flops(level), 5000, 3) for level in (0, *cost.plan.levels))
    assert by_level == evaluate(cost.totals.flops, 5000, 3)


@settings(max_examples=40)
@given(st.data(), st.integers(1, 5))
def test_the_kernels_add_up_to_the_passes(data: st.DataObject, heads: int) -> None:
    spec = data.draw(specs(max_levels=6))
    n = data.draw(lengths(spec, 3000))
    cost = cost_of(spec)
    for kernels, counted in ((cost.plan.forward, cost.totals.forward), (cost.plan.backward, cost.totals.backward)):
        flops = [evaluate(cost.kernel_flops(kernel), n, heads) for kernel in kernels]
        moved = [evaluate(cost.kernel_bytes(kernel), n, heads) for kernel in kernels]
        assert sum(flops) == evaluate(counted.flops, n, heads)
        assert sum(moved) == evaluate(counted.moved, n, heads)
        matmuls = [count for kernel, count in zip(kernels, flops, strict=True) if kernel.name == "attend_kernel"]
        assert all(matmuls)


def test_each_launch_of_the_pyramid_counts_its_own_levels() -> None:
    level = Level(block=4, topk=2)
    cost = cost_of(Spec(name="four", head_dim=16, levels=(level,) * 4))
    first, second = (kernel for kernel in cost.plan.kernels if kernel.stage.startswith("pool"))
    assert evaluate(cost.kernel_flops(first), 1024) == 3 * 16 * (1024 + 256)
    assert evaluate(cost.kernel_flops(second), 1024) == 3 * 16 * (64 + 16)


def test_the_floor_that_the_speed_targets_are_measured_by() -> None:
    """69 GFLOP forward for N = 65,536, 8 heads of 64, two levels of 16, K = 8: 512 keys a query."""
    cost = shipped("llsa_l2")
    assert evaluate(cost.keys, 65_536) == 512
    assert evaluate(cost.stage_flops("attend"), 65_536, 8) == 4 * 64 * 8 * 65_536 * 512
    assert evaluate(cost.totals.forward.flops, 65_536, 8) == pytest.approx(69e9, rel=0.01)


def test_dense_attention_takes_4_and_10_n_squared_d() -> None:
    totals = dense(64, 2)
    assert evaluate(totals.forward.flops, 1000, 3) == 4 * 1000**2 * 64 * 3
    assert evaluate(totals.backward.flops, 1000, 3) == 10 * 1000**2 * 64 * 3
    assert evaluate(totals.forward.moved, 1000, 3) == (4 * 64 * 2 + 4) * 1000 * 3
    assert evaluate(totals.saved, 1000, 3) == 4 * 1000 * 3


def test_an_expression_that_depends_on_more_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"expected an expression in lengths and numbers of heads, got .*splits"):
        evaluate(N * splits_of(2), 5)


# ---- bytes ------------------------------------------------------------------------------------------------------


def size_of(launches: list[Launch]) -> int:
    """Bytes of all tensors that launches are given, each once, however many views of it there are."""
    given = (x for launch in launches for x in launch.arguments.values())
    tensors = (x for x in given if isinstance(x, torch.Tensor) and x.nbytes)  # empty ones begin where others do
    return sum({(x.untyped_storage()._cdata, x.storage_offset() * x.itemsize): x.nbytes for x in tensors}.values())


def steps_of(cost: Cost, launches: list[Launch]) -> list[tuple[Kernel, Launch]]:
    steps = iter(cost.plan.kernels)
    return [(next(step for step in steps if step.name == launch.step), launch) for launch in launches if launch.step]


@pytest.mark.parametrize("n", [1, 300, 20_000, 100_003, 1 << 20])
@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_and_scratch_are_those_of_the_tensors_that_kernels_are_given(name: str, n: int) -> None:
    heads = 6
    attention = compile(ROOT / "spec" / f"{name}.yaml")
    cost = cost_of(attention.spec)
    recorded = record(attention, n, torch.bfloat16, "cuda:90", batch=2, heads=3)
    forward = [launch for launch in recorded if launch.phase == "forward"]
    backward = [launch for launch in recorded if launch.phase == "backward"]
    for step, launch in steps_of(cost, forward + backward):
        moved = evaluate(cost.kernel_bytes(step), n, heads)
        if step.name.endswith("_overflow_kernel"):
            assert moved == 0
            continue
        overflow = [cost.plan.buffers[x] for x in step.reads if x.startswith("overflow_grad")]
        assert moved == size_of([launch]) - sum(evaluate(cost.buffer_bytes(x), n, heads) for x in overflow), step.name

    totals = cost.totals
    token_rows, saved = heads * n * attention.spec.head_dim * 2, evaluate(totals.saved, n, heads)
    lse = heads * n * 4
    assert evaluate(totals.forward.scratch, n, heads) == size_of(forward) - 4 * token_rows - lse - saved
    scratch = size_of(backward) - 8 * token_rows - saved
    assert evaluate(totals.backward.scratch, n, heads) == scratch


@pytest.mark.parametrize("n", [300, 20_000])
@pytest.mark.parametrize("name", SHIPPED)
def test_bytes_of_global_tokens_are_those_of_the_tensors_that_kernels_are_given(name: str, n: int) -> None:
    attention, tokens = compile(ROOT / "spec" / f"{name}.yaml"), 77
    cost = cost_of(attention.spec)
    recorded = record(attention, n, torch.bfloat16, "cuda:90", batch=2, heads=3, g_tokens=tokens)
    steps = steps_of(cost, [launch for launch in recorded if launch.phase != "select"])
    taking = [(step, launch) for step, launch in steps if step.of_globals or "k_global" in step.takes]
    assert [step.name for step, _ in taking] == [
        "attend_kernel", "grad_q_kernel", "grad_kv_global_kernel", "grad_kv_global_sum_kernel",
    ]  # fmt: skip
    for step, launch in taking:
        assert evaluate(cost.kernel_bytes(step), n, 6, g_tokens=tokens) == size_of([launch]), step.name
    flops = cost.totals.flops
    of_globals = evaluate(flops, n, 6, g_tokens=tokens) - evaluate(flops, n, 6)
    assert of_globals == 9 * 2 * 6 * n * tokens * attention.spec.head_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 17, 1000])
@pytest.mark.parametrize("name", SHIPPED)
def test_saved_memory_is_what_autograd_keeps(name: str, n: int, dtype: torch.dtype) -> None:
    attention = compile(ROOT / "spec" / f"{name}.yaml")
    q, k, v = torch.randn(3, 2, 2, n, attention.spec.head_dim, dtype=dtype).requires_grad_().unbind(0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = attention(q, k, v)
    beside = kept[4:]  # q, k, v, o come first
    assert isinstance(o, torch.Tensor)
    assert [x.data_ptr() for x in kept[:4]] == [x.data_ptr() for x in (q, k, v, o)]
    counted = evaluate(cost_of(attention.spec, dtype_name(q.dtype)).totals.saved, n, 4)
    [memory] = beside
    padding = 4 * 256 * len(lower(attention.spec).saved)  # of a head, buffers begin at multiples of 256 bytes
    assert counted <= memory.untyped_storage().nbytes() < counted + padding


# ---- growth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "with_levels"),
    [
        ("llsa_l1", "N^2/16 from level 1 (linear below)", "N log N"),
        ("llsa_l2", "N^2/256 from level 2 (linear below)", "N log N"),
        ("llsa_l3", "N^2/4096 from level 3 (linear below)", "N log N"),
        ("topk_l1", "N^2/256 from the Top-K of level 1 (linear below)", "N"),
        ("topk_l2", "N^2/65536 from the Top-K of level 2 (linear below)", "N"),
        ("uneven", "N^2/60 from level 2 (linear below)", "N log N"),
    ],
)
def test_growth_of_the_shipped_specs(name: str, text: str, with_levels: str) -> None:
    grows = growth(shipped(name))
    assert (str(grows), grows.with_levels) == (text, with_levels)


@settings(max_examples=12)
@given(specs(max_levels=3))
def test_limits_are_those_of_the_numbers(spec: Spec) -> None:
    """At a length of 2^200 nothing but the leading term is left: of the expressions with all their ceilings."""
    cost, n = cost_of(spec), 2**200
    for expr in (cost.totals.flops, cost.totals.forward.moved, cost.totals.saved):
        exponent, coefficient = order(expr)
        assert evaluate(expr, n) / n**exponent == pytest.approx(float(coefficient), rel=1e-9)
    assert order(cost.totals.flops)[0] == 2
    assert order(cost.totals.saved)[0] == order(cost.totals.backward.moved)[0] == 1


@settings(max_examples=12)
@given(specs(max_levels=3))
def test_the_quadratic_part_is_half_of_the_work_where_it_says(spec: Spec) -> None:
    cost = cost_of(spec)
    beyond = growth(cost).beyond
    quadratic = order(cost.totals.flops)[1]
    rest = sympy.expand(smooth(cost.totals.flops).subs(HEADS, 1) - quadratic * N**2)
    assert quadratic * (beyond - 1) ** 2 < rest.subs(N, beyond - 1)
    assert quadratic * beyond**2 >= rest.subs(N, beyond)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_share_of_the_top_level_is_half_about_there(name: str) -> None:
    cost = shipped(name)
    beyond = growth(cost).beyond
    assert top_share(cost, int(beyond * 0.8)) < 0.5 < top_share(cost, int(beyond * 1.25))


@pytest.mark.parametrize("enrich", ["all", "none"])
def test_the_order_with_enough_levels_is_that_of_the_numbers(enrich: str) -> None:
    """Five specs of 2 to 6 levels at lengths that give each the same top level: FLOPs a token, and their increments."""
    flops = []
    for count in range(2, 7):
        spec = Spec.model_validate(
            {"name": "x", "head_dim": 16, "levels": [{"block": 8, "topk": 2}] * count, "enrich": enrich}
        )
        n = 8 * 8**count
        flops.append(evaluate(cost_of(spec).totals.flops, n) / n)
    increments = [after - before for before, after in pairwise(flops)]
    if enrich == "all":
        assert order_with_levels(lower(spec)) == "N log N"
        assert increments[-1] == pytest.approx(18 * 16 * 16, rel=1e-3), "each level adds K b keys a query"
    else:
        assert order_with_levels(lower(spec)) == "N"
        assert all(later < 0.2 * sooner for sooner, later in pairwise(increments))


@pytest.mark.parametrize(("enrich", "longer"), [("all", "all"), ("none", "none"), ((2,), (2, 3)), ((1,), (1,))])
def test_another_level_is_enriched_like_the_one_below(enrich: object, longer: object) -> None:
    levels = [{"block": 4, "topk": 2}, {"block": 8, "topk": 3}]
    spec = Spec.model_validate({"name": "x", "head_dim": 16, "levels": levels, "enrich": enrich})
    another = with_another_level(spec)
    assert another is not None
    assert (another.num_levels, another.levels[-1], another.enrich) == (3, spec.levels[-1], longer)


def test_there_are_six_levels_at_most() -> None:
    spec = Spec(name="x", head_dim=16, levels=(Level(block=256, topk=1),) * 6)
    assert with_another_level(spec) is None
    assert growth(cost_of(spec)).beyond > MAX_TOKENS
