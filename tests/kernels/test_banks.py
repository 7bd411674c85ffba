"""Rows of a tile that lie in the same banks are read one after the other: eight times slower, and nothing shows it."""

from pathlib import Path

import pytest
import triton
from banks import steps
from tables import row, table

from llsa_gen import aot, emit, load
from llsa_gen.aot.launches import record
from llsa_gen.plan import lower
from llsa_gen.runtime.backend import in_triton as entry_in_triton
from llsa_gen.schedule import schedule, schedules
from llsa_gen.store.loading import load_text

SPECS = Path(__file__).resolve().parents[2] / "spec"
GPU = aot.gpu_target("cuda:90")
NAMES = ("llsa_l1", "llsa_l2", "llsa_d128", "topk_l2")


def reads(name: str, step: str, n_tokens: int, *rows: dict[str, object], in_triton: bool = False) -> list[int]:
    """What `steps` says of one kernel of a shipped spec, with rows in place of the shipped table; or of Triton's."""
    plan = lower(load(SPECS / f"{name}.yaml"))
    text = emit.render(plan, schedules(plan, {"cuda:90": table(*rows)}))
    module = load_text(name, f"{len(rows)}" * 64, text)
    tiles = schedule(plan, table(*rows), 2)
    if in_triton:
        tiles = {stage: entry_in_triton(entry) for stage, entry in tiles.items()}
    (launch,) = (one for one in record(module, n_tokens, "bfloat16", "cuda:90", tiles=tiles) if one.step == step)
    source, options = aot.specialise(launch, GPU)
    return steps(triton.compile(source, target=GPU, options=options).asm["ptx"])


@pytest.mark.parametrize(("n_tokens", "in_triton"), [(65_536, False), (65_535, False), (65_535, True)])
@pytest.mark.parametrize("step", ["attend_kernel", "grad_q_kernel", "grad_kv_l0_kernel"])
@pytest.mark.parametrize("name", NAMES)
def test_no_rows_meet_in_the_same_banks(name: str, step: str, n_tokens: int, in_triton: bool) -> None:
    found = reads(name, step, n_tokens, in_triton=in_triton)
    assert len(found) > (20 if in_triton else 15)
    # Triton 3.7, other than 3.6, swizzles k by the block where two products read it: in the first tile, and in the loop
    known = 8 if step == "grad_q_kernel" and name in ("llsa_l1", "llsa_l2") and in_triton else 0
    assert len([step for step in found if step > 1]) <= known


def test_rows_that_meet_are_found() -> None:
    # four warps that copy 16 rows of each of four blocks: Triton swizzles by the block, not by the row
    assert 8 in reads("llsa_l2", "attend_kernel", 65_535, row("attend", {"BLOCK_N": 16}), in_triton=True)
