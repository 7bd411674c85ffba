"""One test for every fault that implementations of sparse attention are known to have: the list in docs/semantics.md.

Each runs on the CPU path, on the Triton kernels in the interpreter, and on a GPU, where there is one.
"""

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from examples import every_schedule, spec
from llsa_gen import fuzz, reference
from llsa_gen.compiler import compile
from llsa_gen.fuzz.oracle import truth

pytestmark = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="torch"),
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpret),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)


def half(device: str) -> fuzz.DType:
    """The half precision that a place computes in; the interpreter has no bfloat16."""
    return "float16" if fuzz.on_interpreter(device) else "bfloat16"


@pytest.mark.versions
def test_1_coarse_gradients_carry_the_weight_of_their_level(device: str) -> None:
    # Small logits, so that the weights decide: coarse tokens take most of the attention, and most of the gradients.
    chosen = spec("weights", 16, (4, 1), (4, 2))
    case = fuzz.Case(chosen, n=61, std=0.1, device=device)
    fuzz.run(case).raise_if_failed()
    q, k, v, grad_o = case.tensors()
    kept = reference.select(chosen, q, k)
    right = truth(chosen, q, k, v, grad_o, kept, 0.25)
    wrong = truth(chosen.model_copy(update={"reweight": False}), q, k, v, grad_o, kept, 0.25)
    for name in ("dk", "dv"):  # without it this test would fail
        assert reference.relative_error(wrong.values[name], right.values[name]) > 0.1


@pytest.mark.parametrize("topk", [1, 3, 5, 11])
def test_2_exactly_k_are_kept_whatever_a_tile_holds(device: str, topk: int) -> None:
    case = fuzz.Case(spec("exact_k", 16, (3, topk)), n=37, device=device)
    fuzz.run(case).raise_if_failed()
    (kept,) = compile(case.spec).select(*case.tensors()[:2])
    assert kept.shape[-1] == topk and (kept >= 0).all()


@pytest.mark.parametrize("n", [4, 16, 33])
def test_3_the_top_is_attended_however_few_tokens_it_has(device: str, n: int) -> None:
    # One, one and three tokens: fewer than any tile holds.
    chosen = spec("small_top", 16, (4, 1), (4, 1), enrich=(2,))
    case = fuzz.Case(chosen, n=n, device=device)
    fuzz.run(case).raise_if_failed()
    q, k, v, _ = case.tensors()
    without = reference.attention(chosen.model_copy(update={"enrich": "none"}), q, k, v)
    assert reference.relative_error(without, reference.attention(chosen, q, k, v)) > 0.1


@pytest.mark.parametrize("blocks", [(12, 5), (2, 7), (5, 3)])
def test_4_blocks_differ_from_level_to_level(device: str, blocks: tuple[int, int]) -> None:
    chosen = spec("not_square", 16, (blocks[0], 2), (blocks[1], 2))
    fuzz.run(fuzz.Case(chosen, n=2 * chosen.span(2) + blocks[0] + 1, device=device)).raise_if_failed()


@pytest.mark.parametrize(("head_dim", "topk", "n"), [(9, 3, 29), (33, 5, 31), (80, 7, 41), (200, 1, 17)])
def test_5_nothing_has_to_be_a_power_of_two(device: str, head_dim: int, topk: int, n: int) -> None:
    fuzz.run(fuzz.Case(spec("odd", head_dim, (3, topk), (2, 2)), n=n, device=device)).raise_if_failed()


def test_6_pooling_sums_in_float32(device: str) -> None:
    # All keys are 1 + 1/128 but for the last element, so that the running sum of 256 of them in half precision loses
    # the fraction, and for bfloat16 stops growing at 256. All logits are equal: lse says what the pooled keys are.
    chosen = spec("pooling", 16, (64, 1), (4, 1))
    dtype = getattr(torch, half(device))
    n, value = 257, 1 + 2.0**-7
    q = torch.full((1, 1, n, 16), 16.0, dtype=dtype, device=device)
    k = torch.full_like(q, value)
    _, lse = compile(chosen)(q, k, torch.zeros_like(k), return_lse=True)
    kept = compile(chosen).select(q, k)
    weights = reference.weight_rows(chosen, kept, torch.arange(n, device=device), n).sum(-1)
    torch.testing.assert_close(lse.double(), weights.log() + 0.25 * 16 * 16 * value, rtol=1e-6, atol=0)


def test_7_the_same_inputs_give_the_same_bits(device: str) -> None:
    n = 20_000 if device == "cuda" else 60
    case = fuzz.Case(spec("bits", 16, (4, 2), (4, 2)), n=n, heads=2, popular=True, dtype=half(device), device=device)
    attention, inputs = compile(case.spec), case.tensors()
    runs = [fuzz.attend(attention, case, *inputs) for _ in range(4 if device == "cuda" else 2)]
    for again in runs[1:]:
        assert all(fuzz.same_bits(runs[0][name], again[name]) for name in runs[0])


def test_8_too_few_candidates_are_filled_with_nothing(device: str) -> None:
    # The second token of level 2 has one child: queries that keep it have one candidate, of three that they may keep.
    case = fuzz.Case(spec("few", 16, (4, 4), (3, 1)), n=14, heads=4, device=device)
    fuzz.run(case).raise_if_failed()
    fine, coarse = compile(case.spec).select(*case.tensors()[:2])
    short = (coarse == 1).repeat_interleave(3, dim=2)[:, :, : fine.shape[2], 0]
    assert short.any() and ((fine == -1).sum(-1) == torch.where(short, 2, 0)).all()


def far_apart(x: Tensor, stride: int, memory: Tensor, offset: int) -> Tensor:
    """The values of `x` [1, 1, N, D] in rows that lie `stride` elements apart."""
    rows = torch.as_strided(memory, x.shape, (0, 0, stride, 1), offset)
    return rows.copy_(x)


def test_9_offsets_beyond_2_to_the_31_elements(device: str) -> None:
    # Nobody writes to most of this memory, so that a CPU does not have to have it.
    case = fuzz.Case(spec("far", 16, (2, 2), (2, 2)), n=9, dtype="float16", device=device)
    stride = 2**31 // (case.n - 1)
    memory = torch.empty(2**31 + 1024, dtype=torch.float16, device=device)
    inputs = [far_apart(x, stride, memory, 16 * i) for i, x in enumerate(case.tensors())]
    found = fuzz.attend(compile(case.spec), case, *inputs)
    kept = [found["kept_l1"], found["kept_l2"]]
    failures, _ = fuzz.compare(case, tuple(inputs), kept, found)  # type: ignore[arg-type]
    assert not failures


@pytest.mark.parametrize("std", [8.0, 24.0])
def test_10_the_backward_pass_recomputes_the_logits_of_the_forward_pass(device: str, std: float) -> None:
    # Logits of thousands: rounded to half precision anywhere, they would be off by more than 1 from the saved lse.
    case = fuzz.Case(spec("large", 64, (5, 2), (4, 2)), n=47, std=std, dtype=half(device), device=device)
    fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_11_rows_that_attend_to_almost_nothing_are_finite(device: str, n: int) -> None:
    # The last block has one token, which is all that some queries see; tiles are mostly padding.
    case = fuzz.Case(spec("lonely", 16, (4, 1), (3, 1), enrich="none"), n=n, heads=2, popular=True, device=device)
    fuzz.run(case).raise_if_failed()
    found = fuzz.attend(compile(case.spec), case, *case.tensors())
    assert all(found[name].isfinite().all() for name in ("o", "lse", "dq", "dk", "dv"))


def test_12_a_key_that_all_queries_keep_is_shared_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = spec("popular", 16, (4, 1), (4, 1)) if device == "cpu" else spec("popular", 64, (16, 8), (16, 8))
    if device == "cpu":
        for tiles in every_schedule(compile(chosen)):
            for stage in ("grad_kv_l0", "grad_kv_l1"):
                monkeypatch.setitem(tiles[stage], "PART", 2)
        fuzz.run(fuzz.Case(chosen, n=63, popular=True)).raise_if_failed()
        return
    # On a GPU the time tells. One program for a list of all 4,096 query blocks would take hundreds of times as long.
    seconds = {}
    for popular in (False, True):
        case = fuzz.Case(chosen, n=65536, heads=2, dtype="bfloat16", popular=popular, device=device)
        q, k, v, grad_o = case.tensors()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attention = compile(chosen)
        o = attention(*leaves)
        assert isinstance(o, Tensor)
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(o, leaves, grad_o, retain_graph=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[popular] = min(times)
    assert math.isfinite(seconds[True]) and seconds[True] < 6 * seconds[False], seconds


# ---- faults that this implementation had

CUT = spec("cut", 16, (4, 2))
CUT_FOUR = spec("l4", 16, (2, 3), (3, 2), (2, 2), (2, 2))


@pytest.mark.parametrize(
    "case",
    [
        fuzz.Case(spec=CUT, n=160, dtype="bfloat16", heads=3, batch=3, seed=294, query_offset=1),
        fuzz.Case(spec=CUT_FOUR, n=160, heads=2, dtype="bfloat16", seed=1, query_offset=1),
        fuzz.Case(spec=CUT_FOUR, n=160, m=50, heads=3, dtype="float16", std=1e-4, seed=2, query_offset=23),
    ],
    ids=["one level", "four levels", "small numbers"],
)
def test_a_cut_first_block_is_judged_by_the_rounding_of_its_mean(case: fuzz.Case, device: str) -> None:
    # The operator rounds 3/4 of the mean, not the mean; the check allowed for no such rounding.
    dtype = half(device) if case.dtype == "bfloat16" else case.dtype
    fuzz.run(replace(case, device=device, dtype=dtype)).raise_if_failed()


@pytest.mark.parametrize("query_token", [0, 1])
def test_a_wrong_choice_in_a_cut_first_block_is_found(query_token: int, device: str) -> None:
    # The worst key in place of the worst of those kept, and the one that comes next: the cut block has no free choice.
    case = fuzz.Case(spec=CUT, n=160, dtype=half(device), seed=294, query_offset=1, device=device)
    q, k, _, _ = case.tensors()
    (kept,) = compile(CUT).select(q, k, query_offset=1)
    reference.check_selection(CUT, q, k, [kept], query_offset=1)
    scores = reference.pool(q, 4, offset=1)[0, 0, query_token] @ reference.pool(k, 4)[0, 0].mT
    order = scores.argsort(descending=True)
    assert scores[order[1]] - scores[order[2]] > 0.05, "far more than bfloat16 rounds away"
    for wrong in (order[2], order[-1]):
        other = kept.clone()
        other[0, 0, query_token] = torch.stack([order[0], wrong])
        with pytest.raises(AssertionError, match=f"query token {query_token}: kept key token {wrong} .* further apart"):
            reference.check_selection(CUT, q, k, [other], query_offset=1)
