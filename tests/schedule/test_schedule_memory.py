"""Shared memory: every stage of every target is cut until it fits, and what is taken for an upper bound is one."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import spec
from llsa_gen import Level, Spec, aot, compile
from llsa_gen.plan import Plan, lower
from llsa_gen.schedule import choices, pad, schedule, targets
from llsa_gen.schedule.fit import fitted, misfit
from llsa_gen.schedule.memory import shared_memory
from llsa_gen.schedule.table import stage_kind


@st.composite
def any_specs(draw: st.DrawFn) -> Spec:
    """Specs of the whole range, its ends and what lies around powers of two more often."""

    def sizes(least: int, most: int) -> st.SearchStrategy[int]:
        powers = [least, most, *(2**i + more for i in range(1, 10) for more in (-1, 0, 1))]
        return st.sampled_from([size for size in powers if least <= size <= most]) | st.integers(least, most)

    levels = draw(st.lists(st.builds(Level, block=sizes(2, 256), topk=sizes(1, 512)), min_size=1, max_size=6))
    some = st.sets(st.integers(1, len(levels)), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    whole: st.SearchStrategy[Literal["all", "none"]] = st.sampled_from(("all", "none"))
    enrich = draw(st.one_of(whole, some))
    return Spec(
        name="any", head_dim=draw(sizes(8, 256)), levels=tuple(levels), enrich=enrich, reweight=draw(st.booleans())
    )


def too_wide(plan: Plan, target: str, element: int, stage: str) -> bool:
    """The one thing that fits nowhere: two tiles of 32 queries stay, and they alone are all that there is."""
    wide = (pad(plan.head_dim), pad(plan.block(1))) == (256, 32) and plan.grouped
    return wide and (target, element, stage) == ("hip:gfx942", 4, "grad_q")


@given(any_specs())
@settings(max_examples=60)
@example(spec("half_selection", 136, (16, 8), (16, 8)))
@example(spec("half_selection_192", 192, (16, 4)))
@example(spec("float32_grouped", 256, (24, 8), (16, 8)))
@example(spec("float32_sorted", 256, (16, 64), (16, 64)))
@example(spec("float32_counted", 256, (256, 512), (256, 512)))
@example(spec("deep", 256, *[(2, 8)] * 6))
def test_every_stage_of_every_target_fits(chosen: Spec) -> None:
    plan = lower(chosen)
    for goal in targets().values():
        for element in (2, 4):
            for stage, choice in choices(plan, goal, element).items():
                reason = misfit(plan, stage, choice.entry, choice.entry, element, goal)
                assert (reason is not None) == too_wide(plan, goal.name, element, stage), (goal.name, stage, reason)


@given(any_specs(), st.sampled_from(sorted(targets())), st.sampled_from([2, 4]), st.integers(0, 262_144))
@settings(max_examples=60)
def test_what_is_cut_can_be_launched_and_fits_where_anything_does(
    chosen: Spec, name: str, element: int, limit: int
) -> None:
    plan = lower(chosen)
    goal, roomy = (replace(targets()[name], shared_memory=size, rows=()) for size in (limit, 2**30))
    for stage, wanted in schedule(plan, roomy, element).items():
        kind = stage_kind(plan, stage)
        made, said = fitted(plan, stage, wanted, element, goal)
        assert misfit(plan, stage, wanted, made, element, roomy) is None
        assert list(made) == list(wanted) and all(made[tile] <= wanted[tile] for tile in made)
        assert bool(said) == (made != wanted)
        if shared_memory(plan, kind, wanted, element, goal) <= limit:
            assert made == wanted, "what fits is left alone"
        elif shared_memory(plan, kind, made, element, goal) > limit:
            assert made == fitted(plan, stage, wanted, element, replace(goal, shared_memory=0))[0], (
                "there is no smaller one"
            )


CORNERS = [
    # what the report said: half precision, wide heads, few kept at the top
    ("cuda:86", "bfloat16", spec("wide", 256, (16, 8), (16, 8)), "select_l2"),
    ("hip:gfx942", "float16", spec("wide", 136, (16, 8), (16, 8)), "select_l2"),
    ("cuda:86", "float32", spec("grouped", 256, (24, 8)), "grad_q"),
    ("hip:gfx942", "float32", spec("wide_blocks", 256, (64, 8)), "grad_q"),
    ("hip:gfx942", "float32", spec("wide_blocks", 256, (64, 8)), "grad_kv_l1"),
    ("cuda:90", "bfloat16", spec("wide_blocks", 256, (64, 8)), "grad_kv_l1"),  # wgmma
    ("cuda:100", "bfloat16", spec("wide_blocks", 256, (64, 8)), "grad_q"),  # tcgen05
    ("cuda:86", "bfloat16", spec("odd", 131, (16, 8)), "grad_kv_l1"),  # rows are copied through registers
]


@pytest.mark.parametrize(
    ("target", "dtype", "chosen", "stage"), CORNERS, ids=lambda value: getattr(value, "name", value)
)
def test_the_bound_is_one(target: str, dtype: str, chosen: Spec, stage: str) -> None:
    plan, goal, element = lower(chosen), targets()[target], 4 if dtype == "float32" else 2
    bound = shared_memory(plan, stage_kind(plan, stage), schedule(plan, goal, element)[stage], element, goal)
    for report in aot.compile_kernels(compile(chosen), target, dtype, 65_536, kernels=[f"{stage}_kernel"]):
        assert report.shared_memory <= bound <= report.shared_memory_limit
        assert bound <= 1.35 * report.shared_memory, "and not a wild one"
