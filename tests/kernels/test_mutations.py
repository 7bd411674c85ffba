"""The fuzzer is proved: the templates are broken, one way at a time, and every fault is caught.

A mutation replaces text of a template in a copy of the folder; when a template no longer holds that text, its test says
so, and the mutation has to be moved along with the code. The cases are few and fixed, and the templates as they are
pass all of them.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import mutating
import pytest

from examples import spec
from llsa_gen import fuzz, runtime
from llsa_gen.errors import CheckFailed
from llsa_gen.fuzz import search

# 27 tokens: the last one of level 1 covers 3 of 4, the last one of level 2 as many of 12
TAILS = fuzz.Case(spec("tails", 16, (4, 2), (3, 2)), n=27, heads=2)
THREE_LEVELS = fuzz.Case(spec("three", 16, (2, 2), (2, 2), (3, 2)), n=33)
HALF = fuzz.Case(spec("half", 16, (64, 1)), n=190, dtype="float16", values="constant", std=8.0)
# half precision takes tiles whose products are not worked out ahead
HALF_TAILS = fuzz.Case(TAILS.spec, n=27, heads=2, dtype="float16")
# lists of 96 keys, three tiles
LONG_LISTS = fuzz.Case(spec("long", 16, (16, 6)), n=112)
# every score is the same
TIES = fuzz.Case(TAILS.spec, n=48, values="zero_queries")
# the second token of level 2 has one child, and three are wanted
FEW = fuzz.Case(spec("few", 16, (4, 4), (3, 1)), n=14, heads=4)
# all 20 query blocks keep the same key block, and lists are cut after 8 entries
POPULAR = fuzz.Case(spec("popular", 16, (2, 1)), n=40, popular=True)
# few keys at the top, so that 48 queries are shared out over several programs
PARTIALS = fuzz.Case(spec("partials", 16, (16, 2), (4, 1)), n=48)
# the keys of level 1 keeper by keeper, each of 72 queries in three splits
KEEPERS = fuzz.Case(spec("keepers", 16, (24, 2), (3, 1)), n=3 * 72 + 5)
# the same, two kept by each
PAIRS = fuzz.Case(spec("pairs", 16, (32, 2), (2, 2)), n=3 * 64 + 5)
# more queries than keys
LENGTHS = fuzz.Case(spec("lengths", 16, (4, 3), (4, 2)), n=37, m=150)
# one that all twelve keepers keep: more than are summed at a time
CROWD = fuzz.Case(spec("crowd", 16, (32, 2), (2, 1)), n=12 * 64, popular=True)
# 100 candidates, dealt to four warps in half precision
RUNS = "    elif RUNS:", "    elif BLOCK_N >= 8 * KEEP:"
MANY = fuzz.Case(spec("many", 16, (2, 3)), n=200, dtype="float16")
# 50 candidates, of which threads keep lists of 8
SEVEN = fuzz.Case(spec("seven", 16, (2, 7)), n=100)
# blocks that are no power of two
FIVES = fuzz.Case(spec("fives", 16, (5, 2)), n=23)
# a K too large to sort for, of 70 candidates
WIDE = fuzz.Case(spec("wide", 16, (2, 65)), n=139)
# no loose ends, so that the peak stays where it begins
WHOLE_NONE = fuzz.Case(spec("whole_none", 16, (64, 2), enrich="none"), n=192, dtype="float16")
# the same; logits of several hundred
NEGATIVE = fuzz.Case(spec("negative", 16, (64, 2), enrich="none"), n=192, std=8.0, scale=-3.0)
# tokens that everybody sees, two tiles of them, some masked; two batch entries
GLOBALS = fuzz.Case(TAILS.spec, n=27, heads=2, batch=2, global_tokens=40, masked=True, seed=3)
# enough queries for several splits
SPLIT_GLOBALS = fuzz.Case(PARTIALS.spec, n=48, global_tokens=3)
# lists that are given: three levels, gaps anywhere, rows without any
GIVEN = fuzz.Case(THREE_LEVELS.spec, n=33, m=40, kept="thinned", seed=5)
GIVEN_NONE = fuzz.Case(WHOLE_NONE.spec, n=192, dtype="float16", kept="thinned", seed=6)
OWN_LISTS = fuzz.Case(WHOLE_NONE.spec, n=192, dtype="float16", kept="own")
# lse in the loss
LSE = fuzz.Case(TAILS.spec, n=27, heads=2, grad_lse=True)
STRIDES = fuzz.Case(TAILS.spec, n=13, heads=2, layouts=("contiguous", "transposed", "contiguous", "contiguous"))


FOLDERS = ("shared", "triton", "host", "runtime")
"""Of templates, and of what is spliced; the interpreter runs nothing in Gluon."""


@dataclass(frozen=True)
class Mutation:
    name: str
    template: str
    changes: tuple[tuple[str, str], ...]
    case: fuzz.Case = TAILS


def mutation(name: str, template: str, old: str, new: str, case: fuzz.Case = TAILS) -> Mutation:
    return Mutation(name, template if template in runtime.FILES else f"{template}.j2", ((old, new),), case)


KERNELS = (
    # two lengths
    mutation(
        "one query too few", "grad_kv.py", "tl.minimum(m_tokens - last", "tl.minimum(m_tokens - 1 - last", LENGTHS
    ),
    mutation("no queries beyond the keys", "walk", "& (token < m_tokens)", "& (token < n_tokens)", LENGTHS),
    mutation("means of queries over the keys", "pool.py", '"q", "m_tokens")', '"q", "n_tokens")', LENGTHS),
    # weights
    mutation("weight dropped", "tiles.py", "where(inside, weight, float", "where(inside, 0.0, float"),
    mutation("weight of a tail", "tiles.py", "if not FULL:", "if False:"),
    mutation(
        "weight of another level",
        "walk",
        'pairs.bias(level, "FULL")',
        'pairs.bias(1, "FULL")',
    ),
    mutation(
        "coarse dk without weight",
        "grad_kv.py",
        'pairs.bias(level, "False")',
        'pairs.bias(0, "False")',
    ),
    # the softmax
    mutation("sum not rescaled", "tiles.py", "total * shrink +", "total +"),
    mutation("values not rescaled", "tiles.py", "acc * tl.expand_dims(shrink, -1)", "acc"),
    mutation("a sum of some", "attend.py", "total += tl.sum(p, 1)", "total += tl.max(p, 1)", WHOLE_NONE),
    mutation("a peak that is too low", "attend.py", "tl.int32), 0) == 0:", "tl.int32), 0) == 9:", NEGATIVE),
    mutation("lse in base 2", "attend.py", "log_sum * LN2", "log_sum"),
    # tails
    mutation("list of a tile before", "walk", "(list_ptr, start + BLOCK_N,", "(list_ptr, start,", LONG_LISTS),
    mutation("last coarse key", "walk", "exists = key < n_l{{ level }}", "exists = key < n_l{{ level }} - 1"),
    mutation("the coarse keys' last tile left out", "walk", "if filled < n_l{{ level }}:", "if filled < 0:"),
    mutation("the first fine tile twice", "walk", "range(BLOCK_N if PIPELINED_QK else 0,", "range(0,", LONG_LISTS),
    mutation(
        "values of another key", "attend.py", "v = load_rows(v_base, key,", "v = load_rows(v_base, key * 0,", LONG_LISTS
    ),
    mutation(
        "products of a later tile",
        "attend.py",
        "parents(list_ptr, after + BLOCK_N,",
        "parents(list_ptr, start,",
        LONG_LISTS,
    ),
    mutation("fine keys that do not exist", "attend.py", '{{ pairs.bias(0, "FULL") }}', "tl.where(exists, 0.0, 0.0)"),
    mutation(
        "keys that do not exist",
        "walk",
        '{{ pairs.bias(0, "FULL") }}',
        "tl.where(exists, 0.0, 0.0)",
        HALF_TAILS,
    ),
    mutation("no key ever left out", "pairs", 'tl.where(exists, 0.0, float("-inf"))', "tl.where(exists, 0.0, 0.0)"),
    mutation(
        "last query", "grad_kv.py", "+ rows_l{{ level }}, m_tokens)", "+ rows_l{{ level }}, m_tokens - 1)", PARTIALS
    ),
    # pooling and un-pooling
    mutation(
        "mean of a tail",
        "pool.py",
        "tl.minimum(length - token * SPAN_{{ low }}, SPAN_{{ low }}).to",
        "(token * 0 + SPAN_{{ low }}).to",
    ),
    mutation(
        "tokens under a coarse gradient",
        "grad_kv.py",
        "tl.minimum(n_tokens - key * SPAN_{{ level }}, SPAN_{{ level }}).to",
        "(key * 0 + SPAN_{{ level }}).to",
    ),
    mutation(
        "tokens under the top's gradient",
        "grad_kv.py",
        "n_keys, grad_k / covered)",
        "n_keys, grad_k / SPAN_{{ level }})",
    ),
    mutation(
        "coarse dk not handed down",
        "grad_kv.py",
        "grad_k += from_above_k",
        "grad_k += 0.0",
    ),
    mutation(
        "coarse dk not handed down to a keeper's keys",
        "grad_kv.py",
        'grad_k += load_rows({{ base("grad_k_l%d" % above) }}',
        'grad_k += 0.0 * load_rows({{ base("grad_k_l%d" % above) }}',
        KEEPERS,
    ),
    mutation("the same keepers in every tile", "grad_kv.py", "start + ROWS + entry,", "start + entry,", CROWD),
    mutation("partial sums of another key", "grad_kv.py", "kept == parent, slot, 0", "kept == parent, 0, 0", PAIRS),
    mutation("queries of the next keeper", "grad_kv.py", "(keeper + 1) * SPAN", "(keeper + 2) * SPAN", KEEPERS),
    mutation(
        "all splits but the first",
        "grad_kv.py",
        "range(0, splits_l{{ level }}):\n            row",
        "range(0, 1):\n            row",
        KEEPERS,
    ),
    mutation(
        "sums in half precision",
        "pool.py",
        "return tl.sum(total, 1)",
        "return tl.sum(total.to(tl.float16), 1).to(tl.float32)",
        HALF,
    ),
    mutation("the last sum dropped", "pool.py", "tl.static_range(1, SUMS)", "tl.static_range(1, SUMS - 1)"),
    mutation("rows of the next token", "pool.py", " & (below < BLOCK)[None, :]", "", FIVES),
    mutation(
        "sums handed on twice",
        "pool.py",
        "token, HEAD_DIM, token >= 0, whole[None, :])",
        "token, HEAD_DIM, token >= 0, 2.0 * whole[None, :])",
        THREE_LEVELS,
    ),
    # selection
    mutation(
        "the same candidates to every warp", "select.py", "SPLIT)[:, None] * BLOCK_N", "SPLIT)[:, None] * 0", MANY
    ),
    mutation("lists merged as they are", "best.py", "{{ keep - 1 - i }}, b{{ keep - 1 - i }}", "{{ i }}, b{{ i }}"),
    mutation("half of a thread's candidates", "best.py", "tl.split(x45)", "tl.split(x01)", SEVEN),
    Mutation(
        "a run by its lowest score",
        "select.py.j2",
        (RUNS, ("tl.max(tl.max(high, 5), 3)", "tl.min(tl.max(high, 5), 3)")),
        MANY,
    ),
    Mutation(
        "runs of tokens that lie apart",
        "select.py.j2",
        (RUNS, ("* RUN + eight %", "+ 4 * KEEP * eight %")),
        MANY,
    ),
    Mutation(
        "the best run alone",
        "select.py.j2",
        (
            RUNS,
            (
                "run = tokens_of(best, DOUBLES)",
                "run = tl.where(tl.arange(0, KEEP) == 0, tokens_of(best, DOUBLES), -1)",
            ),
        ),
        MANY,
    ),
    mutation(
        "last of the best dropped",
        "select.py",
        "token = tokens_of(best, DOUBLES)",
        "token = tl.where((place == width - 1)[None, :], -1, tokens_of(best, DOUBLES))",
    ),
    Mutation(
        "ties to the higher index",
        "select.py.j2",
        (
            ("(0x7FFFFFFF - token).to(tl.int64)", "token.to(tl.int64)"),
            ("0x7FFFFFFF - (best & 0x7FFFFFFF)", "best & 0x7FFFFFFF"),
        ),
        TIES,
    ),
    mutation(
        "too few filled with a token", "select.py", "tl.where(best == EMPTY, -1,", "tl.where(best == EMPTY, 0,", FEW
    ),
    mutation("order of negative scores", "select.py", "bits ^ 0x7FFFFFFF", "bits"),
    mutation("list of another block", "walk", "tl.minimum(block, m_l1 - 1)[:, None]", "tl.minimum(block, 0)[:, None]"),
    # gradients
    mutation("delta missing in dq", "grad_q.py", "dp - {{ rows.delta }}", "dp"),
    mutation("gradient of lse missing", "grad_q.py", "delta -= tl.load(", "delta -= 0.0 * tl.load(", LSE),
    mutation("delta missing in dk", "grad_kv.py", "dp - delta[None, :]", "dp"),
    mutation("scale missing in dk", "grad_kv.py", "return grad_k * scale, grad_v", "return grad_k, grad_v"),
    mutation(
        "inverted lists off by one",
        "invert.py",
        "tl.broadcast_to(row[:, None], keeps.shape)",
        "tl.broadcast_to(tl.maximum(row - 1, 0)[:, None], keeps.shape)",
    ),
    mutation(
        "counts not zero", "pool.py", 'base("counts_l%d" % low) }} + token, 0', 'base("counts_l%d" % low) }} + token, 1'
    ),
    mutation(
        "counts of the top not zero",
        "pool.py",
        'base("counts_l%d" % high) }} + tile, 0',
        'base("counts_l%d" % high) }} + tile, 1',
    ),
    mutation(
        "counts of another head", "select.py", '{{ base("counts_l%d" % level) }}  #', "counts_l{{ level }}_ptr  #"
    ),
    mutation("one too few counted", "select.py", "inside & (token >= 0)", "inside & (token > 0)"),
    mutation(
        "one too few of many counted", "select.py", "ids, 1, mask=stored", "ids, 1, mask=stored & (ids > 0)", WIDE
    ),
    mutation("lists begin where they end", "invert.py", "sums - value, mask", "sums, mask"),
    mutation(
        "extra parts dropped",
        "grad_kv.py",
        "in range(first_overflow, last_overflow)",
        "in range(first_overflow, first_overflow)",
        POPULAR,
    ),
    # global tokens
    mutation("all global tokens take part", "tiles.py", "other=0) != 0", "other=0) >= 0", GLOBALS),
    mutation(
        "the mask of the first batch entry", "tiles.py", "of_head(mask_ptr, batch,", "of_head(mask_ptr, 0,", GLOBALS
    ),
    mutation(
        "the last tile of globals left out",
        "walk",
        "range(0, g_tokens, {{ block",
        "range(0, g_tokens - 8, {{ block",
        GLOBALS,
    ),
    mutation(
        "globals beyond the last",
        "tiles.py",
        "exists = token < g_tokens",
        "exists = token < g_tokens + 1",
        SPLIT_GLOBALS,
    ),
    mutation(
        "dk of globals by one split",
        "grad_kv.py",
        "    for split in range(0, splits):",
        "    for split in range(0, 1):",
        SPLIT_GLOBALS,
    ),
    mutation(
        "a global left out of dk",
        "grad_kv.py",
        "key, HEAD_DIM, key < g_tokens, grad_k)",
        "key, HEAD_DIM, key < g_tokens, grad_k * (key > 0).to(tl.float32)[:, None])",
        SPLIT_GLOBALS,
    ),
    mutation(
        "last query of globals",
        "grad_kv.py",
        "tl.minimum(begin + rows_global, m_tokens)",
        "tl.minimum(begin + rows_global, m_tokens - 1)",
        GLOBALS,
    ),
    mutation("globals not in dq", "grad_q.py", "    if k_global_ptr is not None:", "    if False:", GLOBALS),
    # given lists
    mutation(
        "a given entry not counted", "keep.py", "token, 1, mask=counted", "token, 1, mask=counted & (token > 0)", GIVEN
    ),
    mutation(
        "the last of a given list left out",
        "keep.py",
        "(exists > 0) & (to < width)",
        "(exists > 0) & (to < width - 1)",
        GIVEN,
    ),
    mutation(
        "lists of another level",
        "keep.py",
        'base("given_l%d" % level) }}, given_width',
        'base("given_l%d" % plan.top) }}, given_width',
        GIVEN,
    ),
    mutation(
        "a row of nothing is no number",
        "attend.py",
        "total = tl.where(nothing, 1.0, total)",
        "total = tl.where(nothing, 0.0, total)",
        GIVEN_NONE,
    ),
    mutation(
        "nothing weighs something",
        "attend.py",
        'peak = tl.where(nothing, float("inf"), peak)',
        "peak = peak + 0.0",
        GIVEN_NONE,
    ),
    mutation(
        "other bits where lists are given",
        "attend.py",
        "if not FULL:\n                p =",
        "if not FULL:\n                p = 1.0001 *",
        OWN_LISTS,
    ),
    mutation(
        "the selection in place of given lists",
        "kernels.py",
        "forward_launches if kept is None else keeping_launches",
        "forward_launches",
        GIVEN,
    ),
    mutation("strides of another tensor", "launches.py", "k_steps, v_steps =", "v_steps, k_steps =", STRIDES),
)

TORCH = (
    mutation("weight dropped", "cpu.py", ".clamp(max=SPANS[level]).float().log()", ".clamp(max=1).float().log()"),
    mutation("weight of a tail", "cpu.py", "(n_tokens - token * SPANS[level])", "(n_tokens + 0 * token)"),
    mutation("mean of a tail", "cpu.py", "(sums / covered[:, None])", "(sums / SPANS[level])"),
    mutation(
        "tokens under a coarse gradient",
        "cpu.py",
        "1.0 / covered_tokens(level, n_tokens, to.device)[above]",
        "1.0 / torch.full_like(above, SPANS[level])",
    ),
    mutation("lists of another level", "cpu.py", "SPANS[1] // SPANS[level + 1]", "SPANS[1] // SPANS[-1]"),
    mutation(
        "last of the best dropped",
        "cpu_stages.py",
        "torch.where(best == EMPTY.value, -1,",
        "torch.where((best == EMPTY.value) | (torch.arange(width) == width - 1), -1,",
    ),
    mutation("too few filled with a token", "cpu_stages.py", "(best == EMPTY.value, -1,", "(best == EMPTY.value, 0,"),
    mutation("keys that do not exist", "cpu.py", "(child >= 0) & (child < n_tokens)", "child >= 0"),
    mutation("gradient of lse missing", "cpu.py", "else grad_lse)\n", "else 0.0 * grad_lse)\n"),
    mutation("scale missing", "cpu.py", ".mul_(scale).add_(weight[:, :, None])", ".add_(weight[:, :, None])"),
    mutation("shared keys counted once", "cpu.py", ".index_add_(0,", ".index_copy_(0,"),
    Mutation(
        "ties to the higher index",
        "cpu_stages.py",
        (
            ("0x7FFFFFFF - token[:, :, None]", "token[:, :, None]"),
            ("0x7FFFFFFF - (best & 0x7FFFFFFF)", "best & 0x7FFFFFFF"),
        ),
    ),
    mutation("order of negative scores", "cpu_stages.py", "(bits >> 31) & 0x7FFFFFFF", "0"),
)


def broken(fault: Mutation, folder: Path) -> AbstractContextManager[None]:
    """Emit from a copy of the templates, in `folder`, with a fault in it."""
    return mutating.broken(fault.template, fault.changes, folder, FOLDERS)


def by_name(fault: Mutation) -> str:
    return fault.name


@pytest.mark.interpret
@pytest.mark.parametrize("case", sorted({fault.case for fault in KERNELS}, key=repr), ids=lambda case: case.spec.name)
def test_the_kernels_as_they_are_pass(case: fuzz.Case) -> None:
    fuzz.run(case).raise_if_failed()


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that a fault makes
@pytest.mark.parametrize("fault", KERNELS, ids=by_name)
def test_a_fault_in_the_kernels_is_caught(fault: Mutation, tmp_path: Path) -> None:
    with broken(fault, tmp_path / "templates"):
        outcome = fuzz.run(fault.case)
    assert outcome.failures


# What `fuzz.check` draws for one spec, without any case of ours.
DRAWN = spec("drawn", 16, (5, 4), (3, 1), (2, 3))


def test_the_torch_path_as_it_is_passes() -> None:
    assert fuzz.check(DRAWN, examples=100, seed=1).examples == 100


@pytest.mark.parametrize("fault", TORCH, ids=by_name)
def test_a_fault_in_the_torch_path_is_found(fault: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHRINKING_SECONDS", 1.0)
    with broken(fault, tmp_path / "templates"), pytest.raises(CheckFailed) as caught:
        fuzz.check(DRAWN, examples=100, seed=1)
    assert "TemplateError" not in caught.value.message
