"""Queries and keys of two lengths, and queries that begin inside a block: as the reference has them, everywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

from llsa_gen import compile, fuzz, reference
from llsa_gen.fuzz.case import Layouts
from llsa_gen.plan import lower
from llsa_gen.plan.cost import Cost, evaluate
from llsa_gen.spec import Level, Spec, load

ROOT = Path(__file__).resolve().parents[2]


def spec(name: str, head_dim: int, *levels: tuple[int, int], **more: Any) -> Spec:
    return Spec(name=name, head_dim=head_dim, levels=tuple(Level(block=b, topk=k) for b, k in levels), **more)


TWO = spec("lengths_two", 16, (4, 3), (4, 2))
SPECS = [
    TWO,
    spec("lengths_uneven", 24, (5, 2), (3, 2), (2, 2)),
    spec("lengths_some", 16, (4, 2), (4, 3), (2, 2), enrich=(1, 3)),
    spec("lengths_none", 16, (64, 2), (2, 2), enrich="none"),
    spec("lengths_wide_k", 16, (2, 65)),
]
LENGTHS = [(64, 192), (37, 190), (190, 37), (1, 150), (150, 1)]
SLICED: Layouts = ("sliced", "sliced", "sliced", "sliced")
EVERYWHERE = [
    pytest.param("cpu"),
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("m", "n"), LENGTHS)
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_two_lengths(chosen: Spec, m: int, n: int, device: str) -> None:
    dtypes: tuple[fuzz.DType, ...] = ("float32", "float16")
    if knobs.runtime.interpret:  # ten seconds each: every spec has both, at one length or another
        dtypes = (dtypes[(m + n) % 2],)
    for dtype in dtypes:
        fuzz.run(fuzz.Case(chosen, n, m=m, heads=2, dtype=dtype, grad_lse=True, device=device)).raise_if_failed()


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("offset", [1, 3, 5, 16, 1000])
def test_queries_that_begin_inside_a_block(offset: int, device: str) -> None:
    for m, n in ((37, 50), (2, 50)):
        case = fuzz.Case(TWO, n, m=m, query_offset=offset, grad_lse=True, layouts=SLICED, device=device)
        fuzz.run(case).raise_if_failed()


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n"), [(4096, 16_384), (1021, 4099), (16_384, 4096), (70_001, 300), (5, 20_000)])
@pytest.mark.parametrize("name", ["llsa_l1", "llsa_l2", "llsa_l3", "llsa_d128", "llsa_b64", "topk_b128", "uneven"])
def test_two_lengths_of_the_shipped_specs(name: str, m: int, n: int) -> None:
    chosen = load(ROOT / "spec" / f"{name}.yaml")
    for dtype, offset in (("bfloat16", 0), ("float32", 0), ("bfloat16", 7)):
        case = fuzz.Case(chosen, n, m=m, heads=2, dtype=dtype, query_offset=offset, device="cuda")  # type: ignore[arg-type]
        fuzz.run(case).raise_if_failed()


def draw(m: int, n: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m + n)
    return tuple(torch.randn(batch, 2, x, 16, generator=generator).requires_grad_() for x in (m, n, n))


def test_shards_of_the_queries_are_the_whole() -> None:
    """Cut where a coarsest token ends, shards select and attend as the whole does, bit for bit."""
    attention = compile(TWO)
    q, k, v = draw(100, 70)
    whole, lists = attention(q, k, v), attention.select(q, k)
    assert isinstance(whole, torch.Tensor)
    for begin, end in ((0, 32), (32, 48), (48, 100)):
        shard = q[:, :, begin:end]
        found = attention(shard, k, v, query_offset=begin)
        assert isinstance(found, torch.Tensor) and torch.equal(found, whole[:, :, begin:end])
        for level, kept in enumerate(attention.select(shard, k, query_offset=begin), start=1):
            span = TWO.span(level)
            assert torch.equal(kept, lists[level - 1][:, :, begin // span : -(-end // span)])


def test_a_shard_has_the_blocks_of_the_whole_wherever_it_is_cut() -> None:
    attention = compile(TWO)
    q, k, _ = draw(100, 70)
    for begin, end in ((0, 7), (7, 9), (9, 55), (55, 100)):
        kept = attention.select(q[:, :, begin:end], k, query_offset=begin)
        reference.check_selection(TWO, q[:, :, begin:end], k, kept, query_offset=begin)


@pytest.mark.parametrize(("m", "n"), [(0, 9), (9, 0), (0, 0)])
def test_no_queries_or_no_keys(m: int, n: int) -> None:
    attention = compile(TWO)
    q, k, v = draw(m, n)
    o, lse = attention(q, k, v, return_lse=True)
    assert o.shape == q.shape and not o.any() and bool((lse == float("-inf")).all())
    grads = torch.autograd.grad((o, lse), (q, k, v), (torch.ones_like(o), torch.ones_like(lse)))
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, (q, k, v), strict=True))
    widths = [min(TWO.topk(level), -(-n // TWO.span(level))) for level in (1, 2)]
    assert [list(x.shape) for x in attention.select(q, k)] == [
        [2, 2, -(-m // TWO.span(level)), width] for level, width in zip((1, 2), widths, strict=True)
    ]


def test_compiled_once_for_all_lengths() -> None:
    attention = compile(TWO)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o = attention(q, k, v)
        assert isinstance(o, torch.Tensor)
        return o

    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, n in ((37, 50), (90, 21), (64, 64)):
            inputs = draw(m, n)
            found, wanted = attend(*inputs), attention(*inputs)
            assert isinstance(wanted, torch.Tensor) and torch.equal(found, wanted)
            pairs = zip(*(torch.autograd.grad(x.sum(), inputs) for x in (found, wanted)), strict=True)
            assert all(map(torch.equal, *zip(*pairs, strict=True)))


def test_torch_knows_the_operator_for_two_lengths() -> None:
    module = compile(TWO).module
    q, k, v = draw(37, 50)
    torch.library.opcheck(getattr(torch.ops.llsa, module.OPERATOR), (q, k, v, 0.25))
    batched = torch.func.vmap(module.attention)(*(torch.stack([x, -x]) for x in (q, k, v)))
    assert torch.equal(batched[0], module.attention(q, k, v))
    meta = module.attention(*(x.to("meta") for x in (q, k, v)), return_lse=True)
    assert [list(x.shape) for x in meta] == [[2, 2, 37, 16], [2, 2, 37]]


def test_flops_are_those_of_the_cost_model() -> None:
    attention, cost = compile(TWO), Cost(lower(TWO), {})
    with FlopCounterMode(display=False) as counted:
        attention(*(x.detach() for x in draw(37, 50)))
    assert counted.get_total_flops() == evaluate(cost.flops(cost.plan.forward), 50, 4, 37)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:1], v), r"k: expected \[2, 2, N, 16\] like q, got \[1, 2, 50, 16\]"),
        (lambda q, k, v: (q, k[:, :1], v), r"k: expected \[2, 2, N, 16\] like q, got \[2, 1, 50, 16\]"),
        (lambda q, k, v: (q, k, v[:, :, :49]), r"v: expected shape \[2, 2, 50, 16\] like k, got \[2, 2, 49, 16\]"),
    ],
)
def test_other_shapes_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile(TWO)(*change(*draw(37, 50)))


@pytest.mark.parametrize("offset", [-1, pytest.param(-(10**5000), id="huge"), 1.0, True, "1", None])
def test_an_offset_is_an_integer(offset: Any) -> None:
    q, k, v = draw(5, 5)
    for call in (
        lambda: compile(TWO)(q, k, v, query_offset=offset),
        lambda: compile(TWO).select(q, k, query_offset=offset),
    ):
        with pytest.raises((TypeError, ValueError), match="query_offset: expected an integer"):
            call()


BIG = spec("lengths_big", 8, (3, 1), *[(255, 1)] * 4)  # its coarsest blocks span more than 2^30 tokens


@pytest.mark.parametrize("offset", [2**30, 3 * 255**4, 3 * 255**4 - 1 - 3 * 255, 10**15 + 7])
def test_offsets_beyond_all_tokens_that_there_can_be(offset: int) -> None:
    q, k, v = (torch.randn(1, 1, n, 8) for n in (7, 30, 30))
    kept = compile(BIG).select(q, k, query_offset=offset)
    reference.check_selection(BIG, q, k, kept, query_offset=offset)
    assert compile(BIG)(q, k, v, query_offset=offset).shape == q.shape  # type: ignore[union-attr]


def test_without_queries_an_offset_changes_nothing() -> None:
    q, k, v = draw(0, 9)
    assert [list(x.shape) for x in compile(TWO).select(q, k, query_offset=5)] == [[2, 2, 0, 3], [2, 2, 0, 1]]
    assert compile(TWO)(q, k, v, query_offset=5).shape == q.shape  # type: ignore[union-attr]


def test_exported_for_any_two_lengths() -> None:
    attention = compile(TWO)

    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            o = attention(q, k, v)
            assert isinstance(o, torch.Tensor)
            return o

    m, n = torch.export.Dim("m", min=2, max=4096), torch.export.Dim("n", min=2, max=4096)
    inputs = tuple(x.detach() for x in draw(40, 40))
    exported = torch.export.export(Module(), inputs, dynamic_shapes=({2: m}, {2: n}, {2: n})).module()
    for lengths in ((20, 20), (37, 50), (90, 21)):
        others = tuple(x.detach() for x in draw(*lengths))
        assert torch.equal(exported(*others), Module()(*others))


def test_blocks_that_would_begin_too_far_ahead_are_refused() -> None:
    # two queries on both sides of the end of a coarsest block of 3 * 255^4 tokens
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 9, 8)
    message = r"query_offset: expected \d+ tokens at most from a coarsest block on, got 12684751874 before .* M = 2"
    with pytest.raises(ValueError, match=message):
        compile(BIG).select(q, k, query_offset=3 * 255**4 - 1)


def test_an_offset_may_be_a_symbol() -> None:
    attention = compile(TWO)

    class Half(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            half = q.shape[2] // 2
            o = attention(q[:, :, half:], k, v, query_offset=half)
            assert isinstance(o, torch.Tensor)
            return o

    inputs = tuple(x.detach() for x in draw(40, 50))
    dynamic = ({2: torch.export.Dim.DYNAMIC},) * 3
    exported = torch.export.export(Half(), inputs, dynamic_shapes=dynamic, strict=False).module()
    for lengths in ((38, 20), (90, 30), (40, 50)):
        others = tuple(x.detach() for x in draw(*lengths))
        assert torch.equal(exported(*others), Half()(*others))


@pytest.mark.parametrize("offset", [-1, 1.0, True])
def test_an_offset_is_an_integer_under_compile_too(offset: Any) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return compile(TWO)(q, k, v, query_offset=offset)

    with pytest.raises(Exception, match="query_offset: expected an integer"):
        torch.compile(attend, backend="eager")(*draw(5, 5))
