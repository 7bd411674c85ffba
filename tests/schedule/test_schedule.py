"""Tables of tile shapes: what they may say, which row decides, what does not fit, and one schedule for all lengths."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tables import row, table

from examples import spec
from llsa_gen import Spec, aot, compile, emit, load
from llsa_gen.aot.launches import record
from llsa_gen.errors import ScheduleTableError
from llsa_gen.fuzz.case import specs
from llsa_gen.plan import lower
from llsa_gen.runtime.backend import in_triton
from llsa_gen.schedule import Target, choices, schedule, schedules, target, targets
from llsa_gen.schedule.fit import misfit
from llsa_gen.schedule.table import LIMITS, STAGES, facts_of, parse, stage_kind
from llsa_gen.store.loading import load_text

ROOT = Path(__file__).resolve().parents[2]
L2 = load(ROOT / "spec" / "llsa_l2.yaml")
WIDE = load(ROOT / "spec" / "topk_b128.yaml")
BARE = Target("cuda:90", 232448, ())
OWN = {"KEEP", "KEYS", "PIPELINED_QK", "DOUBLES"}
"""What the spec or the target dictates, and no row may set."""
TWO_BACKENDS = {"backend", "triton_maxnreg"}
"""What an entry has if its launches are handed to Gluon."""


# ---- what a table may say ---------------------------------------------------------------------------------------

GOOD = row("attend", {"BLOCK_N": 64}, element=2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stage": "atend"}, "rows[1]: stage: expected one of pool, pool_sums, "),
        ({"stage": "atend"}, "got 'atend'"),
        ({"stage": ["attend"]}, "got ['attend']"),
        ({"when": {"elements": 2}}, "when: expected one of element, pad_dim, rows, grouped, got 'elements'"),
        ({"when": {"element": 3}}, "rows[1]: when.element: expected one of 2, 4, got 3"),
        ({"when": {"pad_dim": 80}}, "rows[1]: when.pad_dim: expected a power of two up to 1048576, got 80"),
        ({"when": {"pad_dim": [64, 80]}}, "when.pad_dim: expected a power of two up to 1048576, got 80"),
        ({"when": {"length": "long"}}, "when: expected one of element, pad_dim, rows, grouped, got 'length'"),
        ({"when": {"grouped": 1}}, "when.grouped: expected one of True, False, got 1"),
        ({"when": {"keep": 8}}, "when: expected one of"),
        ({"when": 7}, "rows[1]: when: expected an object of facts, got 7"),
        ({"set": {"BLOCKN": 32}}, "BLOCK_M, BLOCK_C, BLOCK_N, num_warps, num_stages, maxnreg, backend, got"),
        ({"set": {"KEEP": 8}}, "got 'KEEP'"),
        ({"set": {"BLOCK_N": 48}}, "rows[1]: set.BLOCK_N: expected a power of two up to 1048576, got 48"),
        ({"set": {"BLOCK_N": "64"}}, "got '64'"),
        ({"set": {"BLOCK_N": True}}, "got True"),
        ({"set": {"num_warps": 64}}, "set.num_warps: expected a power of two up to 32, got 64"),
        ({"set": {"HOPPER": 128}}, "got 'HOPPER'"),
        ({"set": {"triton_maxnreg": 128}}, "got 'triton_maxnreg'"),
        ({"set": {"backend": "cuda"}}, "rows[1]: set.backend: expected one of triton, gluon_sm90, got 'cuda'"),
        ({"set": {"num_stages": 0}}, "set.num_stages: expected a number from 1 to 8, got 0"),
        ({"set": {}}, "set: expected an object of tile shapes, got {}"),
        ({"why": ""}, "why: expected a sentence, got ''"),
        ({"why": None}, "rows[1]: expected either why or measured"),
        ({"measured": {}}, "rows[1]: expected either why or measured"),
        ({"why": None, "measured": {"gpu": "x", "date": "today", "before_us": 1}}, "measured.after_us: expected mic"),
        ({"note": "x"}, "rows[1]: keys: expected one of stage, when, set, why, measured, got 'note'"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_clear_error(wrong: dict[str, Any], said: str) -> None:
    bad = {name: value for name, value in {**GOOD, **wrong}.items() if value is not None}
    with pytest.raises(ScheduleTableError) as caught:
        table(GOOD, bad)
    assert str(caught.value).startswith("test.json: rows[1]: ") and "\n" not in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "test.json: expected an object with target, shared_memory and rows, got []"),
        ({"target": 90}, "test.json: target: expected a name such as 'cuda:90', got 90"),
        ({"target": "cuda:90"}, "test.json: shared_memory: expected a number of bytes, got None"),
        ({"target": "x", "shared_memory": 1, "rows": {}}, "test.json: rows: expected a list, got {}"),
        ({"target": "x", "shared_memory": 1, "row": []}, "got 'row'"),
        ({"target": "x", "shared_memory": 1, "rows": [1]}, "test.json: rows[0]: expected an object with stage"),
    ],
)
def test_a_wrong_table_is_one_clear_error(data: Any, said: str) -> None:
    with pytest.raises(ScheduleTableError, match=re.escape(said)):
        parse(data, "test.json")


def test_shipped_rows_say_where_they_come_from_and_are_used() -> None:
    plans = [lower(load(path)) for path in (ROOT / "spec").glob("*.yaml")]
    for goal in targets().values():
        for one in goal.rows:
            assert one.reason
            used = [choices(plan, goal, element)[stage] for plan in plans for element in (2, 4)
                    for stage in choices(plan, goal, element)]  # fmt: skip
            assert any(choice.origin.startswith(one.place) for choice in used), f"no shipped spec uses {one.place}"


@settings(max_examples=30)
@given(specs(max_levels=6))
def test_every_stage_has_a_kind_and_facts_and_rules_that_are_legal(chosen: Spec) -> None:
    plan = lower(chosen)
    for element in (2, 4):
        for stage, choice in choices(plan, BARE, element).items():
            kind = stage_kind(plan, stage)
            assert set(facts_of(plan, stage, element)) == {"element", "pad_dim", *STAGES[kind].facts}
            assert {*choice.entry} <= {*STAGES[kind].tiles, *LIMITS, *OWN, *TWO_BACKENDS}
            assert misfit(plan, stage, choice.entry, choice.entry, element, BARE) is None


@pytest.mark.parametrize("path", sorted((ROOT / "spec").glob("*.yaml")), ids=lambda path: path.stem)
def test_only_cuda_is_told_how_many_registers_to_use(path: Path) -> None:
    for option in ({"maxnreg": 128}, {"backend": "triton"}):
        with pytest.raises(ScheduleTableError, match=f"num_warps, num_stages, got '{next(iter(option))}'"):
            table(row("attend", option), name="hip:gfx942")
    assert table(row("attend", {"maxnreg": 128})).rows[0].set == {"maxnreg": 128}
    entries = schedule(lower(load(path)), targets()["hip:gfx942"], 2).values()
    assert not any({"maxnreg", "backend"} & {*entry} for entry in entries)


# ---- which row decides ------------------------------------------------------------------------------------------


def test_the_last_row_that_matches_decides_and_the_rules_give_the_rest() -> None:
    plan = lower(L2)
    rule = schedule(plan, BARE, 2)["attend"]
    goal = table(
        row("attend", {"BLOCK_N": 32, "num_warps": 4}, element=2),
        row("attend", {"BLOCK_N": 64}, pad_dim=[32, 64], grouped=True),
        row("attend", {"BLOCK_N": 16}, element=4),
        row("attend", {"BLOCK_N": 16}, rows=64),
    )
    choice = choices(plan, goal, 2)["attend"]
    assert choice.entry == {**rule, "BLOCK_N": 64} and choice.origin == "test.json: rows[1]: a test"
    assert choices(plan, goal, 4)["attend"].entry["BLOCK_N"] == 16
    assert choices(plan, goal, 2)["grad_q"].origin == "rule"


@pytest.mark.parametrize(
    ("chosen", "stage", "tiles", "reason"),
    [
        (L2, "attend", {"BLOCK_N": 256, "num_stages": 5, "GROUP": 16}, "bytes of shared memory, and there are 232,448"),
        (L2, "attend", {"BLOCK_M": 32}, "BLOCK_M 32: a block of 16 grouped tokens is a tile of 16 rows"),
        (spec("few", 64, (16, 8), (4, 8), (4, 8)), "attend", {"GROUP": 8}, "GROUP 8: only 4 query blocks share"),
        (WIDE, "attend", {"GROUP": 2}, "the kernel takes no GROUP"),
        (WIDE, "attend", {"backend": "gluon_sm90"}, "backend gluon_sm90: it has no kernel for this stage"),
        (L2, "attend", {"backend": "gluon_sm90", "num_warps": 8}, "backend gluon_sm90: its kernel has other tiles"),
        (L2, "grad_kv_tokens", {"BLOCK_N": 8}, "BLOCK_N 8: products need 16 rows and columns"),
        (L2, "select", {"BLOCK_N": 16}, "BLOCK_N 16: four threads take 8 candidates each, at least"),
        (spec("k", 64, (16, 33)), "select_top", {"BLOCK_N": 32}, "BLOCK_N 32: Top-64 of a tile needs as many"),
    ],
)
def test_what_does_not_fit_falls_back_and_says_why(
    chosen: Spec, stage: str, tiles: dict[str, Any], reason: str
) -> None:
    plan, fits = lower(chosen), row(stage, {"num_warps": 8})
    name = next(name for name in schedule(plan, BARE, 2) if stage_kind(plan, name) == stage)
    rule = schedule(plan, BARE, 2)[name]
    choice = choices(plan, table(row(stage, tiles)), 2)[name]
    assert choice.entry == rule and choice.origin == "rule"
    assert (
        len(choice.pruned) == 1 and choice.pruned[0].startswith("test.json: rows[0]: ") and reason in choice.pruned[0]
    )
    choice = choices(plan, table(fits, row(stage, tiles)), 2)[name]
    # the kernel in Gluon has four warps
    assert choice.entry == {**in_triton(rule), "num_warps": 8}, "a row before it is asked next"


CAPS = {
    "attend": (128, 128), "grad_q": (168, 128), "grad_kv_l2": (255, None), "grad_kv_l1": (128, 128),
    "grad_kv_l0": (168, 168), "grad_kv_global": (255, None),
}  # fmt: skip
"""Of stages that the rules hand to Gluon: registers of a thread there, and of what stays in Triton."""


def test_each_backend_has_a_register_cap_of_its_own() -> None:
    entries = schedule(lower(L2), BARE, 2)
    assert {stage for stage, entry in entries.items() if "backend" in entry} == {*CAPS}
    for stage, (own, triton) in CAPS.items():
        entry = entries[stage]
        assert (entry["backend"], entry["maxnreg"]) == ("gluon_sm90", own)
        rest = {name: value for name, value in entry.items() if name not in TWO_BACKENDS | {"maxnreg"}}
        assert in_triton(entry) == (rest if triton is None else rest | {"maxnreg": triton})
        assert in_triton(in_triton(entry)) == in_triton(entry) == in_triton({**in_triton(entry), "backend": "triton"})


@pytest.mark.parametrize(
    ("tiles", "wanted"),
    [
        ({"maxnreg": 96}, {"backend": "gluon_sm90", "maxnreg": 168, "triton_maxnreg": 96}),
        ({"backend": "gluon_sm90", "maxnreg": 96}, {"backend": "gluon_sm90", "maxnreg": 96, "triton_maxnreg": 128}),
        ({"backend": "gluon_sm90"}, {"backend": "gluon_sm90", "maxnreg": 168, "triton_maxnreg": 128}),
        ({"backend": "triton"}, {"maxnreg": 128}),
        ({"backend": "triton", "maxnreg": 96}, {"maxnreg": 96}),
        ({"num_warps": 8}, {"num_warps": 8, "maxnreg": 128}),
        ({"num_warps": 8, "maxnreg": 96}, {"num_warps": 8, "maxnreg": 96}),
    ],
)
def test_a_row_caps_the_backend_that_it_names(tiles: dict[str, Any], wanted: dict[str, Any]) -> None:
    choice = choices(lower(L2), table(row("grad_q", tiles)), 2)["grad_q"]
    rest = {"GROUP": 4, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3, "PIPELINED_QK": 1}
    assert choice.entry == rest | wanted and choice.origin == "test.json: rows[0]: a test"


def test_a_row_may_name_the_only_backend() -> None:
    tiles = {"backend": "triton", "num_warps": 8}
    rule = schedule(lower(WIDE), BARE, 2)["attend"]
    assert choices(lower(WIDE), table(row("attend", tiles)), 2)["attend"].entry == {**rule, "num_warps": 8}


def test_a_rule_that_is_cut_to_fit_says_so() -> None:
    plan = lower(spec("fat", 256, (16, 8), (16, 8)))
    (said,) = choices(plan, target("hip:gfx942"), 2)["attend"].pruned
    wanted = r"rule: its tiles take [\d,]+ bytes of shared memory, and there are 65,536: BLOCK_C \d+ to \d+"
    assert re.fullmatch(wanted, said)


# ---- one schedule for all lengths -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_module_is_compiled_once_whatever_its_lengths(dtype: str) -> None:
    """When only N changes: the constexprs and options of each kernel, which Triton compiles for, over many lengths.

    FULL, RUNS and EVICT_FIRST are not counted: for what is compiled, so is the other, at once (test_host.py).
    """
    plan = lower(L2)
    tables = schedules(plan)
    module = load_text("lengths", "f" * 64, emit.render(plan, tables))
    variants: dict[str, set[tuple[object, ...]]] = {}
    for n in [1, 17, 300, 4096, 8191, 8192, 8193, 10_000, 65_536, 65_537, 100_001, 2**20]:
        for launch in record(module, n, dtype, "cuda:90"):
            shapes = {name: value for name, value in launch.arguments.items() if name.isupper()}
            shapes = {name: value for name, value in shapes.items() if name not in ("FULL", "RUNS", "EVICT_FIRST")}
            variants.setdefault(launch.kernel, set()).add((*shapes.items(), *launch.options.items()))
            if launch.kernel == "attend_kernel":
                assert {**shapes, **launch.options} == tables["cuda:90"][4]["attend"] | module.OPTIONS
    assert ("attend_kernel" if dtype == "float32" else "attend_hopper_kernel") in variants
    assert {name: len(found) for name, found in variants.items()} == dict.fromkeys(variants, 1)


@pytest.mark.parametrize(("dtype", "kernel"), [("float32", "attend_kernel"), ("bfloat16", "attend_hopper_kernel")])
def test_without_a_length_all_variants_are_compiled(dtype: str, kernel: str) -> None:
    reports = aot.compile_kernels(compile(L2), "cuda:90", dtype, kernels=[kernel])
    assert sorted(report.constexprs["FULL"] for report in reports) == [False, True]


@pytest.mark.parametrize("topk", [8, 3])
def test_four_warps_where_they_take_64_rows_at_once(topk: int) -> None:
    plan = lower(spec("pixels", 64, (16, topk), (16, 8)))
    made = {name: schedule(plan, goal, 2) for name, goal in targets().items()}
    # 16 rows of v a warp would meet in the same banks, but tiles of two blocks have to fill lists (test_banks.py)
    assert made["cuda:90"]["attend"]["BLOCK_N"] == (32 if topk % 2 == 0 else 16)
    for stage in ("attend", "grad_q"):
        entries = {name: one[stage] for name, one in made.items()}
        assert {name for name, one in entries.items() if one["PIPELINED_QK"]} == {"cuda:90"}
        assert {name: one["num_warps"] for name, one in entries.items()} == {name: 2 for name in made} | {"cuda:90": 4}


def test_head_dims_that_share_the_rules_of_64_and_those_that_do_not() -> None:
    made = {
        dim: schedule(lower(spec("dims", dim, (16, 8), (16, 8))), targets()["cuda:90"], 2) for dim in (32, 64, 128, 256)
    }
    assert {dim: (one["attend"]["GROUP"], one["attend"]["num_warps"]) for dim, one in made.items()} == {
        32: (4, 4), 64: (4, 4), 128: (4, 4), 256: (4, 4),
    }  # fmt: skip
    assert [one["attend"].get("maxnreg") for one in made.values()] == [96, 128, 255, None]
    # beside gradients, registers do not hold 64 rows of 256
    assert [one["grad_q"]["GROUP"] for one in made.values()] == [4, 4, 4, 2]
    for one in made.values():  # a warp for 16 rows
        for stage in ("attend", "grad_q"):
            assert one[stage]["num_warps"] * 16 == one[stage]["GROUP"] * one[stage]["BLOCK_M"]


@pytest.mark.parametrize("topk", [1, 8, 32, 64])
def test_a_sorting_network_lives_in_one_warp(topk: int) -> None:
    for goal in targets().values():
        for element in (2, 4):
            entry = schedule(lower(spec("sort", 64, (16, topk), (16, 8))), goal, element)["select_l1"]
            assert entry["num_warps"] == 1
            assert entry["DOUBLES"] == (element == 2 and goal.name == "cuda:90")
