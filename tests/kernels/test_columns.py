"""Rows of heads of 65 to 96 in two tiles: which columns each has, and that both views of one in shared memory agree."""

import pytest
from triton._C.libtriton import gluon_ir, ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from examples import GLUON
from llsa_gen import emit
from llsa_gen.plan import lower
from llsa_gen.schedule import columns_of, schedules
from llsa_gen.schedule.columns import kept_columns, take_turns
from llsa_gen.store.loading import load_text


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(8, [16]), (33, [64]), (64, [64]), (65, [64, 16]), (72, [64, 16]), (80, [64, 16]), (81, [64, 32]), (88, [64, 32]),
     (96, [64, 32]), (97, [128]), (120, [128]), (128, [128]), (129, [256]), (256, [256])],
)  # fmt: skip
def test_tiles_hold_every_column_once_and_are_powers_of_two(head_dim: int, widths: list[int]) -> None:
    columns = columns_of(head_dim)
    assert [some.width for some in columns] == widths and kept_columns(head_dim) == sum(widths) >= head_dim
    assert [some.first for some in columns] == [0, *widths[:-1]]
    assert [str(some) for some in columns] == ["", "_rest"][: len(widths)]
    assert [some.padded for some in columns] == [False] * (len(widths) - 1) + [sum(widths) > head_dim]
    assert take_turns(head_dim) == (sum(widths) in (16, 64, 80))
    assert [some.size for some in columns] == (["PAD_DIM"] if len(widths) == 1 else ["WIDTH", "WIDTH_REST"])


@pytest.mark.parametrize("name", ["l2", "d72", "d80_l3", "d88_gaps", "d96", "d128"])
def test_four_blocks_of_16_rows_lie_where_64_rows_do(name: str) -> None:
    # what products of four warps read as a tile of 64 rows, those of one warp read as blocks of 16
    plan = lower(GLUON[name][0])
    module = load_text(plan.spec.name, "c" * 64, emit.render(plan, schedules(plan)))
    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    for some in columns_of(plan.head_dim):
        ending = str(some).upper()
        rows, batch = (getattr(module, f"{layout}{ending}").value for layout in ("SHARED", "SHARED_BATCH"))
        of_rows = builder.to_linear_layout(rows._to_ir(builder), [64, some.width])
        assert [[block * 16 + row, column] for block, row, column in batch.offset_bases] == of_rows.offset_bases
        assert batch.alignment >= of_rows.alignment
