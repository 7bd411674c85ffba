"""The plan: its sizes against integer arithmetic and real tensors, its kernels against each other and the host code."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sympy.parsing.sympy_parser import parse_expr

from llsa_gen import Level, Spec, compile
from llsa_gen.aot.launches import record
from llsa_gen.fuzz.case import lengths, specs
from llsa_gen.plan import Role, lower
from llsa_gen.plan.sizes import HEADS, KV_HEADS, MAX_TOKENS, G, M, N, ceil_div, tile

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "spec").glob("*.yaml"))

DEEP = Spec(name="deep", head_dim=8, levels=(Level(block=256, topk=1),) * 6)


def value(expr: sympy.Expr, n: int, heads: int = 1, **more: int) -> int:
    """A size for a length, a number of heads, and what the host code decides, by the names of the plan's symbols."""
    known = {M.name: n, N.name: n, HEADS.name: heads, KV_HEADS.name: heads, **more}
    size: Any = sympy.sympify(expr)
    result = size.subs({symbol: known[symbol.name] for symbol in size.free_symbols if symbol.name in known})
    assert result.is_Integer, expr
    return int(result)


def up(numerator: int, divisor: int) -> int:
    return -(-numerator // divisor)


# ---- sizes ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 2**30))
def test_nested_ceil_divisions_collapse_into_one(divisors: list[int], n: int) -> None:
    nested, count, product = N, n, 1
    for divisor in divisors:
        nested, count, product = ceil_div(nested, divisor), up(count, divisor), product * divisor
    assert nested == (sympy.ceiling(N / product) if product > 1 else N)
    assert value(nested, n) == count


@given(st.integers(1, 60), st.integers(2, 60), st.integers(2, 60), st.integers(1, 10**6))
def test_what_does_not_collapse_is_still_right(factor: int, inner: int, outer: int, n: int) -> None:
    numerators = {
        factor * ceil_div(N, inner): factor * up(n, inner),
        ceil_div(factor * N, inner): up(factor * n, inner),
        sympy.Min(factor, ceil_div(N, inner)): min(factor, up(n, inner)),
        ceil_div(N, inner) + factor: up(n, inner) + factor,
    }
    for numerator, count in numerators.items():
        assert value(ceil_div(numerator, outer), n) == up(count, outer), numerator


@settings(max_examples=30)
@given(st.data())
def test_level_sizes_are_those_of_the_semantics(data: st.DataObject) -> None:
    spec = data.draw(specs(max_levels=6))
    n, plan = data.draw(lengths(spec, 10**6)), lower(spec)
    tokens, width = n, None
    sizes = [tokens := up(tokens, level.block) for level in spec.levels]
    for tokens_of in (plan.query_tokens, plan.key_tokens):
        assert [value(tokens_of(level), n) for level in plan.levels] == sizes
    for level in reversed(plan.levels):
        candidates = sizes[level - 1] if width is None else min(sizes[level - 1], width * spec.block(level + 1))
        width = min(spec.topk(level), candidates)
        assert value(plan.width(level), n) == width


@given(st.integers(1, MAX_TOKENS))
@example(1)
@example(MAX_TOKENS)
def test_spans_beyond_the_longest_sequence_change_nothing(n: int) -> None:
    plan = lower(DEEP)
    assert [value(plan.key_tokens(level), n) for level in plan.levels] == [up(n, 256**level) for level in plan.levels]
    assert max(plan.spans) == MAX_TOKENS < DEEP.span(6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 60, 257, 1001])
@pytest.mark.parametrize("name", SHIPPED)
def test_tensors_have_the_sizes_of_the_plan(name: str, n: int) -> None:
    attention = compile(ROOT / "spec" / f"{name}.yaml")
    plan = lower(attention.spec)
    q, k, v = torch.randn(3, 2, 3, n, plan.head_dim, dtype=torch.bfloat16).unbind(0)
    o, lse, memory = getattr(torch.ops.llsa, attention.module.OPERATOR)(q, k, v, 0.1)
    saved = attention.module.views_of(memory, "saved", attention.module.saved_shapes(n, n), q.dtype)
    assert o.shape == q.shape
    dtypes = {"input": q.dtype, "float32": torch.float32, "int32": torch.int32}
    for buffer_name, tensor in zip(("lse", *plan.saved), (lse, *saved), strict=True):
        buffer = plan.buffers[buffer_name]
        assert list(tensor.shape) == [2, 3, *(value(size, n) for size in buffer.shape[1:])], buffer_name
        assert tensor.dtype == dtypes[buffer.dtype], buffer_name
        assert tensor[0, 0].is_contiguous(), buffer_name


# ---- kernels ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(specs(max_levels=6))
def test_kernels_read_only_what_is_there(spec: Spec) -> None:
    plan = lower(spec)
    pooling = tuple(kernel for kernel in plan.forward if kernel.kind.startswith("pool"))
    for given_roles, kernels in (
        ({Role.INPUT}, plan.forward),
        ({Role.INPUT, Role.OPTIONAL}, (*pooling, plan.keep, plan.forward[-1])),
        ({Role.INPUT, Role.SAVED}, plan.backward),
    ):
        there = {name for name, buffer in plan.buffers.items() if buffer.role in given_roles} | {"o"}
        if kernels is not plan.backward:
            there -= {"o", "grad_o"}
        for kernel in kernels:
            of_globals = {"k_global", "v_global"} if kernel.of_globals else set()
            missing = set(kernel.reads) - there - of_globals
            assert not missing, f"{kernel.name} reads {missing}, which nobody has written"
            assert not set(kernel.reads) & set(kernel.writes), f"{kernel.name} reads what it writes"
            assert not {plan.buffers[name].role for name in kernel.writes} & {Role.INPUT}
            there.update(kernel.writes)


@settings(max_examples=30)
@given(specs(max_levels=6))
def test_every_buffer_is_made_once_and_used(spec: Spec) -> None:
    plan = lower(spec)
    written = Counter(name for kernel in (*plan.forward, *plan.backward) for name in kernel.writes)
    read = {name for kernel in plan.kernels for name in kernel.reads}
    inputs = {name for name, buffer in plan.buffers.items() if buffer.role in (Role.INPUT, Role.OPTIONAL)}
    given_lists = {f"given_l{level}" for level in plan.levels}
    assert inputs == {"q", "k", "v", "grad_o", "grad_lse", "k_global", "v_global", "global_mask"} | given_lists
    read |= {name for kernel in plan.kernels for name in kernel.optional}
    zeroed = [f"counts_l{level}" for level in plan.levels]  # by the pooling; the selection adds to them
    assert written == Counter([*(plan.buffers.keys() - inputs), *zeroed])
    outputs = {name for name, buffer in plan.buffers.items() if buffer.role is Role.OUTPUT}
    # means that nobody attends to or selects with: pooled on the way to a level that is
    on_the_way = {f"v_l{level}" for level in plan.levels if level not in plan.enriched}
    assert plan.buffers.keys() - read <= outputs | on_the_way
    saved_and_read = {name for kernel in plan.backward for name in kernel.reads} & set(plan.saved)
    assert saved_and_read == set(plan.saved), "what is saved is what the backward pass reads"


@pytest.mark.parametrize("n", [1, 300, 20_000])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_host_code_hands_each_kernel_what_the_plan_says(name: str, n: int) -> None:
    """Every parameter the buffer of its name, of the plan's size and dtype, or the number of its name."""
    attention = compile(ROOT / "spec" / f"{name}.yaml")
    plan = lower(attention.spec)
    recorded = record(attention, n, torch.float16, "cuda:90", batch=2, heads=3)
    launches = [launch for launch in recorded if launch.phase != "select" and launch.step]
    dtypes = {"input": torch.float16, "partial": torch.float32, "float32": torch.float32, "int32": torch.int32}
    of_input = {"m_tokens": n, "n_tokens": n, "heads": 6, "heads_per_batch": 3, "scale": plan.head_dim**-0.5}
    of_input |= {f"width_l{level}": value(plan.width(level), n) for level in plan.levels}
    steps = iter(plan.kernels)
    for launch in launches:
        step = next(step for step in steps if step.name == launch.step)
        numbers: dict[str, Any] = {key: x for key, x in launch.arguments.items() if isinstance(x, int | float)}
        for buffer in map(plan.buffers.__getitem__, step.takes):
            given_one = launch.arguments[f"{buffer.name}_ptr"]
            if given_one is None:
                assert buffer.name in step.optional
                continue
            elements = value(buffer.elements, n, 6, **{key: x for key, x in numbers.items() if key != "heads"})
            assert isinstance(given_one, torch.Tensor)
            assert (given_one.numel(), given_one.dtype) == (elements, dtypes[buffer.dtype]), (step.name, buffer.name)
        for number in step.scalars:
            assert numbers[number.name] == of_input.get(number.name, numbers[number.name]), (step.name, number.name)


@settings(max_examples=30)
@given(specs(max_levels=4))
def test_axes_of_a_signature_are_the_shape(spec: Spec) -> None:
    plan = lower(spec)
    names = {"M": M, "N": N, "G": G, "B": HEADS, "H": 1, "H_kv": 1, "D": spec.head_dim}
    for level in plan.levels:
        names |= {
            f"T_{level}M": plan.query_tokens(level),
            f"T_{level}N": plan.key_tokens(level),
            f"b_{level}": plan.block(level),
            f"width_l{level}": plan.width(level),
            f"given_width_l{level}": plan.width(level),
        }
    for buffer in plan.buffers.values():
        for axis, size in zip(buffer.axes, buffer.shape, strict=True):
            decided = {str(symbol): symbol for symbol in size.free_symbols}
            text = axis.replace("(M)", "M").replace("(N)", "N")
            more = {"g_tokens": 7, "batch": 6}  # of which each entry has one head
            assert value(parse_expr(text, names | decided) - size, 1000, 6, **more) == 0, (buffer.name, axis)


# ---- printing ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(specs(max_levels=6), st.integers(1, 10**6))
def test_a_plan_survives_json(spec: Spec, n: int) -> None:
    plan = lower(spec)
    data = json.loads(json.dumps(plan.to_dict()))
    assert Spec(**data["spec"]) == spec
    assert [step["name"] for step in data["forward"]] == [step.name for step in plan.forward]
    assert [step["name"] for step in data["backward"]] == [step.name for step in plan.backward]
    assert data["keep"]["name"] == "keep_kernel"
    for level in plan.levels:
        text = data["levels"][str(level)]["key_tokens"]
        assert parse_expr(text, {"n_tokens": N}).subs(N, n) == value(plan.key_tokens(level), n)
    assert data["buffers"].keys() == plan.buffers.keys()


@given(specs(max_levels=6))
@settings(max_examples=20)
def test_equal_specs_have_equal_plans(spec: Spec) -> None:
    again = lower(Spec.model_validate_json(spec.model_dump_json()))
    assert lower(spec) == again
    assert lower(spec).to_dict() == again.to_dict()


@given(tokens=st.integers(1, 60), topk=st.integers(1, 9), part=st.integers(1, 80), data=st.data())
def test_there_is_room_for_every_part_of_a_popular_list(tokens: int, topk: int, part: int, data: st.DataObject) -> None:
    plan = lower(Spec(name="s", head_dim=8, levels=(Level(block=2, topk=topk),)))
    room = int(plan.overflow_parts(0).subs([(M, 2 * tokens), (N, 2 * tokens), (tile("PART"), part)]))
    width = min(topk, tokens)
    popular = range(data.draw(st.integers(width, tokens), label="how many key tokens are kept at all"))
    kept = data.draw(st.lists(st.permutations(popular), min_size=tokens, max_size=tokens))
    entries = Counter(key for row in kept for key in row[:width])
    assert sum(-(-count // part) - 1 for count in entries.values()) <= room
    assert room == 0 or tokens > part, "a list is no longer than there are query tokens"
