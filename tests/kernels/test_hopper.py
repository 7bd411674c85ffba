"""The kernels in Gluon, without a GPU: where they are launched, and that they compile.

What they compute is held against the reference in an emulator, test_emulated.py, and on an H100, test_gpu.py.
"""

import hashlib
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import compiled
import pytest
import torch
import triton
from tables import row, table
from triton import knobs

from examples import GLUON, GLUON_COMPILED, spec
from llsa_gen import Spec, aot, emit
from llsa_gen.aot.launches import record
from llsa_gen.plan import lower
from llsa_gen.schedule import columns_of, schedule, schedules
from llsa_gen.schedule.columns import kept_columns
from llsa_gen.schedule.table import stage_kind, target
from llsa_gen.store.loading import load_text

PIXELS = GLUON["l2"][0]
ATTENTION = {"attend_hopper_kernel", "attend_hopper_recompute_kernel", "grad_q_hopper_kernel"}


@cache
def module_for(chosen: Spec) -> ModuleType:
    plan = lower(chosen)
    return load_text(chosen.name, "a" * 64, emit.render(plan, schedules(plan)))


def launched(chosen: Spec, n_tokens: int, dtype: str = "bfloat16", where: str = "cuda:90") -> set[str]:
    """Names of the kernels that have programs in a forward and a backward pass."""
    made = record(module_for(chosen), n_tokens, dtype, where)
    return {launch.kernel for launch in made if launch.grid[0]}


@pytest.mark.parametrize("name", sorted({*GLUON} - {"l4"}))
def test_attention_is_in_gluon_at_every_length(name: str) -> None:
    chosen, lengths = GLUON[name]
    for n in (*lengths, 1, lengths[0] - 1, 3 * lengths[0] + 1):
        assert launched(chosen, n) >= ATTENTION, n
        assert not launched(chosen, n) & {"attend_kernel", "grad_q_kernel"}, n


def test_with_four_levels_it_is_where_nothing_needs_a_mask() -> None:
    chosen, lengths = GLUON["l4"]
    assert launched(chosen, lengths[0]) >= ATTENTION
    for n in (1, lengths[0] - 1, lengths[0] + 1, lengths[0] // 17):
        assert not launched(chosen, n) & ATTENTION, n


@pytest.mark.parametrize(
    "chosen",
    [
        spec("short_heads", 32, (16, 8), (16, 8)),
        spec("long_heads", 256, (16, 8), (16, 8)),
        spec("odd_heads", 60, (16, 8), (16, 8)),  # rows begin at multiples of 8 bytes
        spec("blocks_of_8", 64, (8, 8), (16, 8)),
        spec("blocks_of_12", 64, (12, 8), (16, 8)),
        spec("some_levels", 64, (16, 8), (16, 8), enrich=(2,)),
        spec("odd_families", 64, (16, 8), (6, 32)),  # groups of four blocks would be of two parents
        spec("gaps_in_four", 64, (16, 40), (16, 2), (4, 16), (4, 16)),  # lists of up to 40 of 32
        spec("short_lists_in_four", 64, (16, 8), (16, 3), (4, 16), (4, 16)),  # 48 keys of level 1
    ],
    ids=lambda chosen: chosen.name,
)
def test_other_specs_keep_attention_in_triton(chosen: Spec) -> None:
    assert not launched(chosen, 3 * 2**14) & ATTENTION


@pytest.mark.parametrize(
    ("dtype", "where"),
    [("float32", "cuda:90"), ("bfloat16", "cuda:80"), ("float16", "cuda:100"), ("float16", "hip:gfx942")],
)
def test_other_dtypes_and_gpus_have_no_kernels_in_gluon(dtype: str, where: str) -> None:
    assert not {name for name in launched(PIXELS, 65_536, dtype, where) if "hopper" in name}


def test_tensors_that_begin_anywhere_are_left_to_triton() -> None:
    module = module_for(PIXELS)
    shape = (1, 2, 4096, 64)
    strides = [(2 * 4096 * 64, 4096 * 64, 64, 1)] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "target_of", lambda device: "cuda:90")
        found = [
            module.launch_plan.__wrapped__(
                torch.device("cuda"), torch.bfloat16, shape, shape, strides, starts, (), 0, ()
            )
            for starts in ((0, 0, 0), (0, 2, 0))
        ]
    names = ("backend", "maxnreg", "triton_maxnreg")
    for stage, told in (("attend", [("gluon_sm90", 128, 128), (None, 128, None)]),
                        ("grad_q", [("gluon_sm90", 168, 128), (None, 128, None)]),
                        ("grad_kv_l2", [("gluon_sm90", 255, None), (None, None, None)])):  # fmt: skip
        tiles = [at.grids[f"{stage}_kernel"][1] for at in found]
        assert [tuple(tile.get(name) for name in names) for tile in tiles] == told
    assert ["attend_hopper_recompute_kernel" in at.grids for at in found] == [True, False]


@pytest.mark.parametrize(
    ("stage", "tiles"),
    [
        ("attend", {"backend": "triton"}),
        ("attend", {"num_warps": 8}),
        ("grad_q", {"GROUP": 2}),
        ("grad_kv_top", {"BLOCK_M": 128}),
        ("grad_kv_keeper", {"BLOCK_N": 32}),
        ("grad_kv_tokens", {"num_warps": 2}),
    ],
)
def test_rows_with_other_tiles_get_the_kernels_in_triton(stage: str, tiles: dict[str, int | str]) -> None:
    plan = lower(PIXELS)
    text = emit.render(plan, schedules(plan, {"cuda:90": table(row(stage, tiles))}))
    module = load_text("rows", hashlib.sha256(text.encode()).hexdigest(), text)
    made = {launch.kernel for launch in record(module, 65_536, "bfloat16", "cuda:90") if launch.grid[0]}
    (name,) = (name for name in schedule(plan, table(), 2) if stage_kind(plan, name) == stage)
    assert f"{name}_kernel" in made and f"{name}_hopper_kernel" not in made
    assert {kernel for kernel in made if "hopper" in kernel}, "the others stay"
    assert ("attend_hopper_recompute_kernel" in made) == (stage != "attend")


def test_each_launch_has_the_register_cap_of_its_own_kernel() -> None:
    chosen, lengths = GLUON["l4"]  # loose ends of attention stay in Triton; of lists, all parts but the first
    for n, attend, grad_q in ((lengths[0], 128, 168), (lengths[0] + 1, 128, 128)):
        launches = record(module_for(chosen), n, "bfloat16", "cuda:90")
        made = {launch.kernel: launch.options.get("maxnreg") for launch in launches if launch.grid[0]}
        twin = "" if n % lengths[0] else "_hopper"
        caps = {f"attend{twin}_kernel": attend, f"grad_q{twin}_kernel": grad_q, "grad_kv_l0_hopper_kernel": 168}
        assert caps.items() <= made.items() and made["grad_kv_l4_hopper_kernel"] == 255
        assert made.get("grad_kv_l0_overflow_kernel", 168) == 168


@pytest.mark.parametrize("n", [5, 4096, 4097])
@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (PIXELS, True),
        (spec("no_coarse_keys", 64, (16, 8), (16, 8), enrich="none"), True),
        (spec("outer", 40, (16, 8), (16, 8), enrich=(2,)), True),
        (spec("wide", 64, (32, 8)), False),
        (spec("wide_rows", 128, (64, 4), (4, 4), enrich=(2,)), True),
        (spec("wide_rows_in_four", 128, (64, 4), (4, 4), (4, 4), (4, 4)), True),
        (spec("narrow", 64, (12, 8)), False),
    ],
    ids=lambda value: value.name if isinstance(value, Spec) else "",
)
def test_the_tokens_gradients_are_in_gluon_at_every_length(chosen: Spec, wanted: bool, n: int) -> None:
    assert ("grad_kv_l0_hopper_kernel" in launched(chosen, n)) == wanted


def test_rules_that_have_to_be_cut_get_the_kernels_in_triton() -> None:
    small = replace(target("cuda:90"), shared_memory=40_000)
    entry = schedule(lower(PIXELS), small, 2)["grad_q"]
    assert entry["GROUP"] < 4 and entry["maxnreg"] == 128 and not {"backend", "triton_maxnreg"} & {*entry}


def test_a_keeper_with_few_keys_is_left_to_triton() -> None:
    entries = schedule(lower(spec("few", 64, (32, 2), (8, 4))), target("cuda:90"), 2)
    assert "backend" not in entries["grad_kv_l1"] and entries["grad_kv_l1"]["BLOCK_N"] == 32
    assert entries["grad_kv_l2"]["backend"] == "gluon_sm90"


@pytest.mark.parametrize(
    ("name", "more", "dtype"),
    [
        pytest.param(*case, marks=pytest.mark.versions if case == ("l1_40", 1, "bfloat16") else ())
        for case in GLUON_COMPILED
    ],
)
def test_they_compile_and_fit(name: str, more: int, dtype: str) -> None:
    chosen, lengths = GLUON[name]
    module = module_for(chosen)
    in_gluon = {kernel for kernel in launched(chosen, lengths[0] + more, dtype) if "hopper" in kernel}
    # those in Triton once: of one half precision, at one length; those of three levels stand in four, too
    whole = dtype == "bfloat16" and not more and name != "l3"
    kernels = None if whole else in_gluon
    reports = compiled.compile_kernels(module, "cuda:90", dtype, lengths[0] + more, kernels=kernels)
    assert all(report.fits for report in reports)
    found = [report for report in reports if "hopper" in report.kernel]
    assert {report.kernel for report in found} > ATTENTION
    usual = [report for report in found if "recompute" not in report.kernel]
    # where keys have weights of their own, three levels spill; little of it is for every tile
    allowed = {report.kernel: 64 if report.constexprs.get("FULL", True) else 128 for report in usual}
    kept = kept_columns(chosen.head_dim)
    if kept == 80:  # so that three programs fit, in walks over coarse tiles; over fine ones next to none
        allowed["grad_q_hopper_kernel"] = 80 if more == 0 else 216
    assert {report.kernel: x for report in usual if (x := report.spilled_bytes) > allowed[report.kernel]} == {}
    (attend,) = (report for report in found if report.kernel == "attend_hopper_kernel")
    (grad_q,) = (report for report in found if report.kernel == "grad_q_hopper_kernel")
    # programs on a multiprocessor: four, three, or two of wide rows
    assert has_room_for(attend, {64: 4, 80: 3}.get(kept, 2))
    assert has_room_for(grad_q, 3 if kept <= 80 else 2)
    (tokens,) = (report for report in found if report.kernel == "grad_kv_l0_hopper_kernel")
    # of one warp: twelve, or fewer; of the four warps of wide blocks two
    assert has_room_for(tokens, 2 if tokens.num_warps == 4 else {64: 12, 80: 12, 96: 10}.get(kept, 8))


def has_room_for(report: aot.Report, programs: int) -> bool:
    """Whether a multiprocessor has, of 65,536 registers and 228 KiB, where each program takes 1 KiB for itself."""
    registers = programs * report.num_warps * 32 * -(-report.registers // 8) * 8
    return registers <= 65_536 and programs * (report.shared_memory + 1024) <= 228 * 1024


ASYNCHRONOUS = [
    *((name, more, kind) for name, more in (("l2", 0), ("l2", 300), ("d128_l3", 0), ("d128_l3", 1))
      for kind in ("attend", "grad_q", "grad_kv_l3" if name == "d128_l3" else "grad_kv_l2")),
    *(("wide_128", 1, kind) for kind in ("attend", "grad_q", "grad_kv_l0")),
    *(("wide_72", 1, kind) for kind in ("attend", "grad_kv_l0")),
    *(("d72", more, kind) for more in (0, 1) for kind in ("attend", "grad_q")),
    *(("d72", 1, kind) for kind in ("grad_kv_l2", "grad_kv_l1")),
    *(("d96", 1, kind) for kind in ("attend", "grad_q", "grad_kv_l1")),
]  # fmt: skip
OTHER_VERSIONS = {
    ("wide_128", 1, "attend"), ("wide_128", 1, "grad_q"), ("d128_l3", 1, "grad_q"),
    *(("d72", more, kind) for more in (0, 1) for kind in ("attend", "grad_q")),
}  # fmt: skip
"""Of these, what is compiled with the oldest and the newest Triton, too."""


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [pytest.param(*one, marks=pytest.mark.versions if one in OTHER_VERSIONS else ()) for one in ASYNCHRONOUS],
)
def test_products_are_not_waited_for_one_by_one(name: str, more: int, kind: str, tmp_path: Path) -> None:
    # ptxas may serialise all of a kernel's: each `wgmma` then is a group of its own, where four or eight should be; of
    # rows in two tiles, the second may be one or two alone
    chosen, lengths = GLUON[name]
    module, kernel = module_for(chosen), f"{kind}_hopper_kernel"
    (one,) = aot.distinct(module, "cuda:90", "bfloat16", lengths[0] + more, kernels=[kernel])
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(
        triton.compile(one.source, target=aot.gpu_target("cuda:90"), options=dict(one.options)).asm["cubin"]
    )
    command = [knobs.nvidia.cuobjdump.path, "-sass", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = [line for line in text.splitlines() if "HGMMA" in line]
    groups = [line for line in products if "gsb0" in line]
    assert 1 <= len(groups) <= len(products) // (4 if len(columns_of(chosen.head_dim)) == 1 else 3)
