"""The kernels in Gluon compute what they should: their PTX runs in `tests/emulator`, on a CPU.

Outputs of whole passes are held against the float64 reference, as `fuzz.oracle` allows. Whatever may be late is as late
as can be, and threads that meet in shared memory, or programs in that of the GPU, with nothing between raise an error.
The emulator is proved: kernels are broken, one way at a time, and every fault is found.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mutating
import pytest
from emulator import passes
from emulator.cases import CASES, case, load, module_for
from emulator.errors import EmulatorError

ATTENTION = {"attend_hopper_kernel", "attend_hopper_recompute_kernel", "grad_q_hopper_kernel"}


OTHER_VERSIONS = ("of_72_few", "of_128")
"""Cases that run with the oldest and the newest Triton, too: dq of heads of 128 is another one from 3.9 on."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.versions if name in OTHER_VERSIONS else ()) for name in CASES]
)
def test_a_pass_is_right(name: str) -> None:
    made = passes.check(module_for(CASES[name].spec), CASES[name])
    assert {*made.runs} > ATTENTION


@cache
def runs(name: str) -> dict[str, passes.Run]:
    return passes.run(module_for(CASES[name].spec), CASES[name]).runs


def test_sums_that_do_not_fit_are_made_again() -> None:
    chosen = case("l2", 300, std=8.0)
    made = passes.check(module_for(chosen.spec), chosen).runs
    executed = [x["attend_hopper_recompute_kernel"].executed for x in (runs("partial"), made)]
    assert executed[1] > 100 * executed[0]


# ---- kernels that are broken ------------------------------------------------------------------------------------


def found(run: passes.Run, text: str) -> str:
    """What is wrong with other PTX for a kernel, or nothing."""
    assert text != run.text
    try:
        return "" if run.again(text) else "other results"
    except EmulatorError as error:
        return str(error)


ONE_MORE = {
    "copies": (r"(cp\.async\.wait_group\s+)(\d)", "copy"),
    "products": (r"(wgmma\.wait_group\.sync\.aligned\s+)(\d)", "product"),
}
"""Instructions that wait until but some groups are left, and what is found where there is one more."""

FOUR_WARPS = ("attend_hopper_kernel", "grad_q_hopper_kernel", "grad_kv_l2_hopper_kernel", "grad_kv_l1_hopper_kernel")
TOKENS = "grad_kv_l0_hopper_kernel"


@pytest.mark.parametrize(
    ("kernel", "what"), [*((kernel, what) for kernel in FOUR_WARPS for what in ONE_MORE), (TOKENS, "copies")]
)
def test_every_wait_that_is_too_lax_is_found(kernel: str, what: str) -> None:
    run, (pattern, told) = runs("partial")[kernel], ONE_MORE[what]
    waits = list(re.finditer(pattern, run.text))
    assert waits
    for at in waits if what == "products" else waits[:-1]:  # where a kernel ends, nobody reads what arrives
        text = run.text[: at.start()] + at[1] + str(int(at[2]) + 1) + run.text[at.end() :]
        assert told in found(run, text), at[0]


@pytest.mark.parametrize("kernel", [*FOUR_WARPS, TOKENS])
def test_barriers_that_are_missing_are_found(kernel: str) -> None:
    run = runs("partial")[kernel]
    barrier = r"bar\.warp\.sync\s+-1;" if kernel == TOKENS else r"bar\.sync\s+0;"
    barriers = list(re.finditer(barrier, run.text))
    missed = [at for at in barriers if not found(run, run.text[: at.start()] + ";" + run.text[at.end() :])]
    assert len(missed) < len(barriers) * 2 / 3  # Triton makes some where another would do, or which are not reached
    assert "no barrier" in found(run, re.sub(barrier, ";", run.text))


@pytest.mark.parametrize("fence", ["fence.proxy.async", "wgmma.fence"])
@pytest.mark.parametrize("kernel", FOUR_WARPS)
def test_a_fence_that_is_missing_is_found(kernel: str, fence: str) -> None:
    run = runs("partial")[kernel]
    assert f"no {fence}" in found(run, re.sub(rf"{re.escape(fence)}[^;]*;", ";", run.text))


RESTS = "float16"
"""The case of rows that come in two tiles."""


@dataclass(frozen=True)
class Fault:
    name: str
    template: str
    old: str
    new: str
    told: str
    case: str = "partial"


FAULTS = (
    Fault("two bits of a swizzle", "tiles.py.j2", "[0, 2, 16], [0, 4, 32]", "[0, 2, 32], [0, 4, 16]", "o: error"),
    Fault("one child too many", "keys.py.j2", ".to(gl.uint32) < end", ".to(gl.uint32) <= end", "of every tensor"),
    Fault("a token cut short left out", "loose.py.j2", '">" if shares else ">="', '">="', "o: error"),
    Fault("one query too many", "attend.py.j2", "token < m_tokens, {{ c", "token <= m_tokens, {{ c", "of every tensor"),
    Fault("the ring's next place", "grad_kv_tokens.py.j2", "to = before(stage)", "to = next_of(stage)", "on its way"),
)
SLOW_FAULTS = (
    Fault("the walk's next place", "walk.j2", "to = before(stage)", "to = next_of(stage)", "on its way"),
    Fault("parents of another row", "keys.py.j2", "(block * keys.w", "((keys.first + 0 * block) * keys.w", "o: error"),
    Fault("a swizzle of the rest", "tiles.py.j2", "[0, 2, 0], [0, 4, 8]", "[0, 2, 8], [0, 4, 0]", "o: er", RESTS),
    Fault("a row of the rest left out", "tiles.py.j2", "row_rest >= 0", "row_rest > 0", "o: error nan", RESTS),
    Fault("a copy too late", "grad_kv.py.j2", "async_copy.wait_group(0)", "async_copy.wait_group(1)", "on its way"),
)


@pytest.mark.parametrize("fault", [*FAULTS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_FAULTS)],
                         ids=lambda fault: fault.name)  # fmt: skip
def test_a_fault_of_a_template_is_found(fault: Fault, tmp_path: Path) -> None:
    chosen = CASES[fault.case]
    with mutating.broken(fault.template, [(fault.old, fault.new)], tmp_path / "templates", ["gluon_sm90"]):
        module = load(chosen.spec)
    with pytest.raises((EmulatorError, AssertionError), match=fault.told):
        passes.check(module, chosen)
