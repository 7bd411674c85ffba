"""The emulator itself, by kernels of a few instructions: what it computes, and what it refuses."""

import pytest
import torch
from emulator import machine, ptx
from emulator.errors import EmulatorError, OutOfBounds, Race, UnknownInstruction
from emulator.memory import GlobalMemory
from torch import Tensor

STORE = "shl.b32 %r2, %r1, 2; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2; st.global.b32 [ %rd3 + 0 ], { %r9 };"
"""A number of each thread, in the order of threads."""

NEIGHBOUR = "xor.b32 %r4, %r1, 32; shl.b32 %r5, %r4, 2;"
"""Where a thread of the other warp of two has stored its number: 4 bytes each."""


def run(body: str, to: Tensor, threads: int = 64, programs: int = 1, shared: int = 1024) -> list[int]:
    """What a kernel leaves in a tensor; its address is in %rd1, the thread in %r1, the program in %r3."""
    text = f""".visible .entry small(
        .param .u64 .ptr .global .align 1 small_param_0
    )
    .reqntid {threads}
    {{
        .reg .b32 %r<20>;
        ld.param.b64 %rd1, [small_param_0];
        mov.u32 %r1, %tid.x;
        mov.u32 %r3, %ctaid.x;
        {body}
        ret;
    }}"""
    memory = GlobalMemory([to])
    machine.run(ptx.parse(text), [memory.address(to)], memory, shared, programs)
    memory.write_back()
    return to.flatten().tolist()


def made(instructions: str) -> int:
    """What is in %r9 in the end."""
    return run(f"{instructions} {STORE}", torch.zeros(32, dtype=torch.int32), 32)[0]


@pytest.mark.parametrize(
    ("instructions", "wanted"),
    [
        ("add.s32 %r9, 2147483647, 1;", -(2**31)),
        ("mov.b32 %r8, -7; div.s32 %r9, %r8, 2;", -3),
        ("mov.b32 %r8, -7; rem.s32 %r9, %r8, 2;", -1),
        ("mov.b32 %r8, -7; div.u32 %r9, %r8, 2;", (2**32 - 7) // 2),
        ("mov.b32 %r8, -8; shr.s32 %r9, %r8, 40;", -1),
        ("mov.b32 %r8, -8; shr.u32 %r9, %r8, 32;", 0),
        ("mov.b32 %r8, 1; shl.b32 %r9, %r8, 31;", -(2**31)),
        ("mov.b32 %r8, 0xB4; bfe.u32 %r9, %r8, 2, 3;", 5),
        ("mov.b32 %r8, 0xB4; bfe.s32 %r9, %r8, 2, 3;", -3),
        ("mov.b32 %r8, -2004318071; mul.hi.s32 %r9, %r8, 300;", -2004318071 * 300 >> 32),
        ("mov.b32 %r8, -3; mul.wide.s32 %rd8, %r8, 5; cvt.u32.u64 %r9, %rd8;", -15),
        ("mov.b32 %r8, 0x80000001; shf.l.wrap.b32 %r9, %r8, 5, 4;", 88),
        ("mov.b32 %r8, 0f3F800000; fma.rn.f32 %r9, %r8, 0f40000000, 0f40400000;", 0x40A00000),
        ("mov.b32 %r8, 0f3F808000; cvt.rn.bf16x2.f32 %r9, %r8, 0f3F818000;", 0x3F803F82),  # ties go to even
        ("mov.b32 %r8, 0f40490FDB; cvt.rn.f16x2.f32 %r9, %r8, 0f3F800000;", 0x42483C00),
        ("mov.b32 %r8, 7; setp.lt.s32 %p1, %r8, 8; selp.b32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %r8, 7; setp.lt.s32 %p1, %r8, 7; selp.b32 %r9, 1, 2, %p1;", 2),
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", 5),
        ("shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;", 7),
        ("redux.sync.max.s32 %r9, %r1, -1;", 31),
    ],
)
def test_arithmetic(instructions: str, wanted: int) -> None:
    assert made(instructions) == (wanted + 2**31) % 2**32 - 2**31


def test_threads_part_and_meet_again() -> None:
    body = f"""mov.b32 %r9, 0; mov.b32 %r7, 0;
    $L__BB0_1: add.s32 %r9, %r9, %r7; add.s32 %r7, %r7, 1; setp.le.s32 %p1, %r7, %r1; @%p1 bra $L__BB0_1;
    bar.sync 0; @!%p1 add.s32 %r9, %r9, 1000; {STORE}"""
    assert run(body, torch.zeros(64, dtype=torch.int32)) == [1000 + i * (i + 1) // 2 for i in range(64)]


def test_programs_have_their_own_numbers_and_shared_memory() -> None:
    body = f"""shl.b32 %r6, %r1, 2; st.shared.b32 [%r6], %r3; bar.sync 0; {NEIGHBOUR} ld.shared.b32 %r9, [%r5];
    mul.lo.s32 %r8, %r3, 64; add.s32 %r1, %r1, %r8; {STORE}"""
    found = run(body, torch.zeros(100 * 64, dtype=torch.int32), programs=100)
    assert found == [program for program in range(100) for _ in range(64)]


@pytest.mark.parametrize("what", ["frobnicate.b32 %r9, %r1;", "cvt.rz.s32.f32 %r9, %r1;", "ld.local.b32 %r9, [%r1];"])
def test_what_is_unknown_is_named(what: str) -> None:
    with pytest.raises(UnknownInstruction, match=r"frobnicate|cvt\.rz|ld\.local"):
        made(what)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("ld.global.b32 %r9, [ %rd1 + 128 ];", "0 bytes after the end of one of 128 bytes"),
        ("ld.global.b32 %r9, [ %rd1 + -4 ];", "4 bytes before one of 128 bytes"),
        ("st.global.v2.b32 [ %rd1 + 124 ], { %r1, %r1 };", "misaligned"),
        ("mov.b32 %r8, 1024; ld.shared.b32 %r9, [%r8];", "of shared memory at 0x400, of 0x400"),
        ("ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [global_smem+8];", "misaligned"),
    ],
)
def test_addresses_of_nothing_are_refused(body: str, told: str) -> None:
    with pytest.raises(OutOfBounds, match=told) as caught:
        run(body, torch.zeros(32, dtype=torch.int32), 32)
    assert "small, line 0 of the module, instruction" in str(caught.value)


def test_barriers_are_for_all_threads() -> None:
    with pytest.raises(EmulatorError, match="divergent"):
        run("setp.lt.s32 %p1, %r1, 9; @%p1 bra $L__BB0_2; bar.sync 0; $L__BB0_2: ", torch.zeros(1, dtype=torch.int32))


# ---- who meets whom -----------------------------------------------------------------------------------------------

OWN = "shl.b32 %r6, %r1, 2; "
WRITE = f"{OWN} st.shared.b32 [%r6], %r1; "
READ = f"{NEIGHBOUR} ld.shared.b32 %r9, [%r5]; "
COPY = (
    f"{OWN} cvt.u64.u32 %rd2, %r6; add.s64 %rd3, %rd1, %rd2; cp.async.ca.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 4; "
)
COMMIT, WAIT, BARRIER = "cp.async.commit_group; ", "cp.async.wait_group 0; ", "bar.sync 0; "
OWN_READ = "ld.shared.b32 %r9, [%r6]; "
WITHIN = "xor.b32 %r4, %r1, 1; shl.b32 %r5, %r4, 2; ld.shared.b32 %r9, [%r5]; "


@pytest.mark.parametrize(
    "body",
    [
        WRITE + BARRIER + READ,
        WRITE + WITHIN,  # by the same warp
        WRITE + BARRIER + READ + BARRIER + WRITE,
        COPY + COMMIT + WAIT + OWN_READ,
        COPY + COMMIT + WAIT + BARRIER + READ,
        WRITE + COPY + COMMIT + WAIT,
    ],
)
def test_what_is_in_order_passes(body: str) -> None:
    run(body, torch.zeros(64, dtype=torch.int32))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (WRITE + READ, "read with no barrier since others wrote it"),
        (WRITE + BARRIER + READ + WRITE, "written with no barrier since others read it"),
        ("st.shared.b32 [global_smem+0], %r1; ", "different numbers to one place"),
        (COPY + COMMIT + OWN_READ, "read while a copy"),
        (COPY + WAIT + OWN_READ, "read while a copy"),  # which is in no group
        (COPY + COMMIT + COPY + COMMIT + WAIT, "written while a copy"),
        (COPY + COMMIT + WAIT + READ, "read with no barrier since others wrote it"),
        (COPY + COMMIT + BARRIER + WAIT + READ, "read with no barrier since others wrote it"),
        (COPY + COMMIT + "cp.async.wait_group 1; " + BARRIER + READ, "read while a copy"),
    ],
)
def test_what_is_not_is_a_race(body: str, told: str) -> None:
    with pytest.raises(Race, match=told):
        run(body, torch.zeros(64, dtype=torch.int32))


def test_threads_of_one_warp_meet_too_where_there_is_no_other() -> None:
    to = torch.zeros(32, dtype=torch.int32)
    run(WRITE + "bar.warp.sync -1; " + WITHIN, to, 32)
    with pytest.raises(Race, match="read with no barrier"):
        run(WRITE + WITHIN, to, 32)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("st.global.b32 [ %rd1 + 0 ], { %r3 };", "written while another writes it"),
        ("ld.global.b32 %r9, [ %rd1 + 0 ]; st.global.b32 [ %rd1 + 0 ], { %r3 };", "while another"),
    ],
)
def test_programs_do_not_meet_in_memory(body: str, told: str) -> None:
    with pytest.raises(Race, match=told):
        run(body, torch.zeros(1, dtype=torch.int32), 32, programs=2)
