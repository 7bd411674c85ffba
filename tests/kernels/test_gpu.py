"""On a GPU: every shipped spec and drawn ones, all dtypes, 1 to 262,144 tokens, and how the operator behaves there.

Most of the time goes into Triton's compiler: `pytest -m gpu -n 8` shares that out over the cores.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

import llsa_gen
from examples import BRANCHES, GLUON
from examples import spec as make_spec
from llsa_gen import Spec, fuzz, reference
from llsa_gen.fuzz.case import Kept, Layouts

pytestmark = pytest.mark.gpu

SPECS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "spec").glob("*.yaml"))}
DTYPES: tuple[fuzz.DType, ...] = ("float32", "float16", "bfloat16")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()  # other workers use the same GPU


def shipped(name: str) -> Spec:
    return llsa_gen.load(SPECS[name])


def draw(n: int, head_dim: int, heads: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v that require gradients, and a gradient of o, [1, heads, n, head_dim], made on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = [torch.randn(1, heads, n, head_dim, generator=generator, device=DEVICE, dtype=dtype) for _ in range(4)]
    return *(x.requires_grad_() for x in made[:3]), made[3]


def results(attention: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """o, dq, dk, dv for q, k, v and the gradient of o."""
    *leaves, grad_o = inputs
    o = attention(*leaves)
    return o, *torch.autograd.grad(o, leaves, grad_o)


def fill_with_one(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a module take one program for enough to fill the GPU; what it prepared before is forgotten meanwhile."""
    monkeypatch.setattr(module, "launch_plan", functools.lru_cache(module.launch_plan.__wrapped__))
    monkeypatch.setattr(module, "FILLING", 1)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_shipped_specs_agree_with_the_reference(name: str, dtype: fuzz.DType) -> None:
    spec = shipped(name)
    for n in (1, spec.block(1) + 1, 1021, 4096):
        fuzz.run(fuzz.Case(spec, n=n, heads=2, dtype=dtype, seed=n, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_inputs(dtype: fuzz.DType) -> None:
    spec = shipped("llsa_l2")
    for std in (0.1, 8.0):
        fuzz.run(fuzz.Case(spec, n=1500, heads=2, dtype=dtype, std=std, device=DEVICE)).raise_if_failed()
    for values in ("integers", "constant", "zero_queries"):
        fuzz.run(fuzz.Case(spec, n=1024, dtype=dtype, values=values, device=DEVICE)).raise_if_failed()
    for scale in (1.0, 0.0, 1e-46, -0.3):
        for n in (777, 768):
            fuzz.run(fuzz.Case(spec, n=n, dtype=dtype, scale=scale, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
@pytest.mark.parametrize("topk", [1, 3, 8])
def test_candidates_by_the_thousand(topk: int, head_dim: int) -> None:
    # from 1,024 on, runs of them are ranked before they are
    spec = make_spec("many_candidates", head_dim, (16, topk))
    for values in ("normal", "integers"):
        fuzz.run(fuzz.Case(spec, n=16 * 1031 + 5, dtype="bfloat16", values=values, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["topk_b128", "llsa_l2"])
def test_a_peak_that_turns_out_too_low(name: str, dtype: fuzz.DType) -> None:
    # deviations of 4 leave it to some programs, of 8 and more to nearly all
    for n, std in itertools.product((2048, 2045), (0.1, 4.0, 8.0, 24.0)):
        fuzz.run(fuzz.Case(shipped(name), n=n, dtype=dtype, std=std, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize(("dtype", "far"), [("float16", 12.0), ("bfloat16", 30.0)])
@pytest.mark.parametrize(
    ("chosen", "n"), [(shipped("llsa_l2"), 2048), (shipped("llsa_l2"), 1999), (GLUON["gaps_l3"][0], 801)]
)
def test_sums_that_are_next_to_nothing(
    chosen: Spec, n: int, dtype: fuzz.DType, far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in one channel every query is far from every key: e^lse is tiny, and what does not exist must not weigh beside it
    attention = llsa_gen.compile(chosen)
    module = attention.module
    tiles = module.schedule_for(module.target_of(torch.device(DEVICE)), getattr(torch, dtype))
    plain = {stage: module.in_triton(entry) for stage, entry in tiles.items()}
    found = []
    for entries in (tiles, plain):
        monkeypatch.setattr(module, "schedule_for", lambda *_, entries=entries: entries)
        module.launch_plan.cache_clear()
        q, k, v, grad_o = (x.detach() for x in draw(n, 64, 2, getattr(torch, dtype)))
        q[..., 0], k[..., 0] = far, -far
        found.append(results(attention, (*(x.requires_grad_() for x in (q, k, v)), grad_o)))
    module.launch_plan.cache_clear()
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        one, other = one[..., 1:].float(), other[..., 1:].float()  # that channel is a difference of large numbers
        assert (one - other).norm() < 1e-2 * other.norm()


class Missing:
    """Stands where a kernel stood, and does nothing."""

    __name__ = "attend_hopper_recompute_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def test_sums_that_do_not_fit_are_found_and_left_to_a_second_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llsa_gen.compile(SPECS["llsa_l2"]).module
    monkeypatch.setattr(module, "attend_hopper_recompute_kernel", Missing())

    def totals(n: int, std: float, towards_last: float) -> list[float]:
        module.launch_plan.cache_clear()
        q, k, v, _ = (x.detach() * std for x in draw(n, 64, 2, torch.bfloat16))
        q[..., 0] += towards_last
        k[:, :, 2048:, 0] += towards_last
        _, _, saved = module.attend_kernels(q, k, v, 0.125)
        _, total, *_ = module.views_of(saved, "saved", module.saved_shapes(n, n), q.dtype)
        module.launch_plan.cache_clear()
        return total.unique().tolist()

    assert totals(2048, 1.0, 0.0) == totals(2052, 1.0, 0.0) == [1.0]
    assert totals(2048, 24.0, 0.0) == [0.0]
    # the last of nine tokens of level 2 covers 4 tokens and has the largest logit: sums still fit
    assert totals(2052, 1.0, 10.0) == [1.0]


@pytest.mark.parametrize("n", [1, 17, 1021, 4001])
@pytest.mark.parametrize(
    ("head_dim", "enrich"), [(40, (2,)), (56, "none"), (48, "all"), (72, "none"), (80, (2,)), (88, "all"), (96, (2,))]
)
def test_gradients_of_tokens_in_gluon(head_dim: int, enrich: Any, n: int) -> None:
    # padded heads, a share from level 2, none, or from level 1; loose ends, and lists that are cut
    chosen = make_spec("tokens", head_dim, (16, 4), (16, 3), enrich=enrich)
    for dtype in ("float16", "bfloat16"):
        for popular in (False, True):
            case = fuzz.Case(chosen, n=n, heads=2, batch=2, dtype=dtype, popular=popular, device=DEVICE)
            fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(GLUON))
def test_lengths_for_kernels_in_gluon(name: str, dtype: fuzz.DType) -> None:
    spec, lengths = GLUON[name]
    for n in lengths:
        case = fuzz.Case(spec, n=n, heads=2, dtype=dtype, device=DEVICE, scale=-0.2 if name == "l1" else None)
        fuzz.run(case).raise_if_failed()
    layouts: Layouts = ("transposed", "sliced", "expanded", "every_second")
    case = fuzz.Case(spec, n=lengths[0], heads=3, batch=2, layouts=layouts, dtype=dtype, device=DEVICE)
    fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_global_tokens(name: str, dtype: fuzz.DType) -> None:
    spec = shipped(name)
    for n, tokens, masked in ((1, 1, False), (1021, 64, False), (2048, 77, True), (4096, 512, False)):
        case = fuzz.Case(spec, n=n, heads=2, dtype=dtype, global_tokens=tokens, masked=masked, grad_lse=masked, seed=n)
        fuzz.run(replace(case, batch=2 if masked else 1, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_given_lists(name: str, dtype: fuzz.DType) -> None:
    spec = shipped(name)
    lists: tuple[tuple[int, Kept], ...] = (
        (1021, "own"), (4096, "own"), (3000, "thinned"), (4096, "thinned"), (2048, "other"),
    )  # fmt: skip
    for n, kept in lists:
        fuzz.run(fuzz.Case(spec, n=n, heads=2, dtype=dtype, kept=kept, seed=n, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("name", ["l1_40", "l2", "l3", "l4", "d72", "d96"])
def test_gaps_in_some_lists_change_no_bit_for_other_queries(name: str) -> None:
    # who shares a program with them walks as they do, with masks, and all others without
    spec, (n, *_) = GLUON[name]
    q, k, v, grad_o = draw(n, spec.head_dim, 2, torch.bfloat16)
    attention = llsa_gen.compile(spec)
    kept = attention.select(q, k)
    holed = [kept[0].clone(), *kept[1:]]
    holed[0][:, 1, ::9, 2] = -1
    outputs = [attention(q, k, v, kept=lists) for lists in (holed, kept)]
    found, wanted = ((o, *torch.autograd.grad(o, q, grad_o)) for o in outputs)
    with_gaps = torch.zeros(1, 2, n, dtype=torch.bool, device=DEVICE)
    with_gaps.view(1, 2, -1, 16)[:, 1, ::9] = True
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x[~with_gaps], y[~with_gaps]) and not torch.equal(x[with_gaps], y[with_gaps])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(GLUON))
def test_global_tokens_and_given_lists_for_kernels_in_gluon(name: str, dtype: fuzz.DType) -> None:
    spec, (first, *_) = GLUON[name]
    for n, m, tokens in ((first, None, 100), (first // 2 + 3, first + 5, 128)):
        case = fuzz.Case(spec, n=n, m=m, dtype=dtype, global_tokens=tokens, device=DEVICE)
        fuzz.run(replace(case, heads=2, batch=2, masked=True)).raise_if_failed()
        fuzz.run(replace(case, kept="own")).raise_if_failed()
        fuzz.run(replace(case, kept="thinned", loud=True)).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["topk_b128", "llsa_l2", "uneven"])
def test_a_global_token_that_outweighs_all_others(name: str, dtype: fuzz.DType) -> None:
    for scale in (None, -0.3, 0.0):
        case = fuzz.Case(shipped(name), n=1024, dtype=dtype, global_tokens=70, loud=True, scale=scale, device=DEVICE)
        fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["l2", "d72", "d96", "d128", "wide_128", "wide_l1", "wide_72"])
def test_global_tokens_where_many_sums_are_recomputed(name: str, dtype: fuzz.DType) -> None:
    # one program of the recompute kernel takes several groups of queries, of heads beyond the first too
    case = fuzz.Case(GLUON[name][0], n=4096, heads=3, dtype=dtype, std=8.0, global_tokens=70, device=DEVICE)
    fuzz.run(case).raise_if_failed()
    fuzz.run(replace(case, masked=True, n=4000)).raise_if_failed()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 128, 200])
def test_global_tokens_behind_a_single_tile(tokens: int, masked: bool) -> None:
    # they are its second tile, which is copied before the walk begins
    for n in (1, 64):
        case = fuzz.Case(GLUON["wide"][0], n=n, m=130, heads=2, dtype="bfloat16", global_tokens=tokens, device=DEVICE)
        fuzz.run(replace(case, masked=masked, batch=2)).raise_if_failed()


@pytest.mark.parametrize("spec", BRANCHES, ids=lambda spec: spec.name)
def test_global_tokens_and_given_lists_in_every_branch(spec: Spec) -> None:
    case = fuzz.Case(spec, n=701, m=333, heads=2, dtype="bfloat16", global_tokens=45, masked=True, device=DEVICE)
    fuzz.run(replace(case, kept="thinned")).raise_if_failed()
    fuzz.run(replace(case, kept="own", dtype="float16")).raise_if_failed()


def test_inputs_that_begin_anywhere_beside_those_that_do_not() -> None:
    # one launch plan for both: what kernels were compiled for has to hold for each
    attention = llsa_gen.compile(shipped("llsa_l2"))
    q, k, v, _ = draw(1024, 64, 2, torch.bfloat16)
    wide, masks = torch.randn(2, 1, 2, 40 * 64 + 1, device=DEVICE).bfloat16(), torch.ones(1, 41, device=DEVICE).bool()
    lists = [torch.cat([x.flatten(), x.flatten()[:1]]) for x in attention.select(q, k)]
    shapes = [x.shape for x in attention.select(q, k)]
    for start in (0, 1):
        k_global, v_global = (x.flatten()[start : start + 2 * 40 * 64].view(1, 2, 40, 64) for x in wide)
        mask = masks.flatten()[start : start + 40].view(1, 40)
        for flat, shape in zip(lists, shapes, strict=True):
            flat[start : start + shape.numel()] = flat[: shape.numel()].clone()
        kept = [flat[start : start + shape.numel()].view(shape) for flat, shape in zip(lists, shapes, strict=True)]
        attend = functools.partial(attention, q, k, v, k_global=k_global, v_global=v_global, global_mask=mask)
        assert all(map(torch.equal, attend(kept=kept, return_lse=True), attend(return_lse=True)))


@pytest.mark.parametrize("name", ["llsa_l1", "llsa_l2", "topk_b128", "uneven"])
def test_popular_keys(name: str) -> None:
    # every list names the same blocks, so that theirs are cut into many parts
    case = fuzz.Case(shipped(name), n=4001, heads=2, dtype="bfloat16", popular=True, device=DEVICE)
    fuzz.run(case).raise_if_failed()


@pytest.mark.parametrize("name", ["l2_keepers", "l3_keepers"])
def test_keys_that_every_keeper_keeps(name: str) -> None:
    # so that a key's shares are many more than are summed at a time
    chosen = next(spec for spec in BRANCHES if spec.name == name)
    fuzz.run(fuzz.Case(chosen, n=1999, heads=2, dtype="bfloat16", popular=True, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize(
    "layouts",
    [
        ("transposed", "columns", "sliced", "every_second"),
        ("sliced", "expanded", "transposed", "expanded"),
        ("every_second", "sliced", "expanded", "columns"),
        ("shifted", "contiguous", "shifted", "shifted"),
    ],
)
@pytest.mark.parametrize("head_dim", [80, 72])
def test_strides(layouts: Layouts, head_dim: int) -> None:
    spec = shipped("uneven").model_copy(update={"head_dim": head_dim})
    case = fuzz.Case(spec, n=700, heads=3, batch=2, layouts=layouts, dtype="float16", device=DEVICE)
    fuzz.run(case).raise_if_failed()


def test_a_single_row_that_begins_anywhere() -> None:
    layouts: Layouts = ("sliced", "sliced", "sliced", "sliced")
    spec = shipped("llsa_l2").model_copy(update={"head_dim": 24})
    fuzz.run(fuzz.Case(spec, n=1, layouts=layouts, dtype="bfloat16", device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("head_dim", [40, 72, 80, 88, 96, 12])
def test_rows_of_an_odd_number_of_vectors(head_dim: int) -> None:
    spec = shipped("llsa_l2").model_copy(update={"head_dim": head_dim})
    for n in (1021, 4096):  # heads begin at odd multiples of 16 bytes, or at even ones
        fuzz.run(fuzz.Case(spec, n=n, heads=3, dtype="bfloat16", device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("spec", BRANCHES, ids=lambda spec: spec.name)
def test_every_branch_of_the_templates(spec: Spec) -> None:
    dtype = DTYPES[BRANCHES.index(spec) % 3]
    for n in (2, 130, 1201):
        fuzz.run(fuzz.Case(spec, n=n, heads=2, dtype=dtype, seed=n, device=DEVICE)).raise_if_failed()


@pytest.mark.parametrize("seed", range(6))
def test_drawn_specs(seed: int) -> None:
    fuzz.check(examples=1, device=DEVICE, seed=1000 + seed)


@pytest.mark.parametrize("name", ["llsa_l2", "topk_l1"])
def test_drawn_cases_of_a_shipped_spec(name: str) -> None:
    fuzz.check(SPECS[name], examples=25, device=DEVICE, seed=7)


@pytest.mark.parametrize(
    ("name", "n", "dtype"),
    [
        ("llsa_l1", 16385, "float32"),
        ("llsa_l2", 65537, "float16"),
        ("llsa_l2", 262_145, "bfloat16"),
        ("topk_l2", 65536, "bfloat16"),
        ("uneven", 99991, "float32"),
        ("llsa_l3", 262144, "bfloat16"),
        ("llsa_l3", 262143, "float16"),
    ],
)
def test_long_sequences(name: str, n: int, dtype: fuzz.DType) -> None:
    fuzz.run(fuzz.Case(shipped(name), n=n, dtype=dtype, device=DEVICE)).raise_if_failed()


def test_a_sample_of_queries_in_many_heads() -> None:
    attention = llsa_gen.compile(SPECS["llsa_l3"])
    q, k, v, _ = (x.detach() for x in draw(200_001, 64, 8, torch.bfloat16))
    o, lse = attention(q, k, v, return_lse=True)
    rows = torch.cat([torch.arange(32), torch.randint(200_001, (64,)), torch.arange(199_990, 200_001)])
    expected = reference.attention_rows(attention.spec, q, k, v, rows, attention.select(q, k))
    assert reference.relative_error(o[:, :, rows], expected[0]) < reference.tolerance(torch.bfloat16)
    torch.testing.assert_close(lse[:, :, rows].double(), expected[1], rtol=0, atol=1e-3)


def test_more_than_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # [B, N, H, D] in memory: the rows of one head lie 2^31 elements apart, and the results, [B, H, N, D], as much
    heads, n = 257, 1 << 17
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free GPU memory")
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    fill_with_one(attention.module, monkeypatch)  # one split for one head, too: sums have one order
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, n, heads, 64)
    made = [torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    assert made[0].numel() > 2**31
    inputs = [x.transpose(1, 2).requires_grad_() for x in made]
    whole = results(attention, inputs)
    for head in (0, 128, 256):
        alone = results(attention, [x.detach()[:, head : head + 1].contiguous().requires_grad_() for x in inputs])
        for name, x, y in zip(("o", "dq", "dk", "dv"), whole, alone, strict=True):
            x = x[:, head : head + 1]
            # shares of the top's gradients may be more for more heads, so that their sums differ in order
            assert torch.equal(x, y) if name in ("o", "dq") else reference.relative_error(x, y) < 4e-3, (name, head)


# ---- the operator ---------------------------------------------------------------------------------------------------


def test_bits_are_the_same_in_every_run() -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    inputs = draw(50_001, 64, 4, torch.bfloat16)
    first = results(attention, inputs)
    for _ in range(4):
        again = results(attention, inputs)
        assert all(fuzz.same_bits(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["llsa_l2", "topk_b128"])
def test_cuda_graphs_from_the_second_call_on(name: str) -> None:
    attention = llsa_gen.compile(SPECS[name])
    inputs = draw(5000, 64, 2, torch.bfloat16)
    results(attention, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attention, inputs)
    with torch.no_grad():
        for x, new in zip(inputs, draw(5000, 64, 2, torch.bfloat16, seed=1), strict=True):
            x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, results(attention, inputs), strict=True):
        assert fuzz.same_bits(x, y)


@pytest.mark.parametrize("name", ["llsa_l2", "topk_b128"])
def test_cuda_graphs_of_global_tokens_and_given_lists(name: str) -> None:
    attention = llsa_gen.compile(SPECS[name])
    inputs, (k_global, v_global, *_) = draw(5000, 64, 2, torch.bfloat16), draw(70, 64, 2, torch.bfloat16, seed=2)
    mask = torch.arange(70, device=DEVICE)[None] % 3 > 0
    with torch.no_grad():
        kept = attention.select(*inputs[:2])
    shared = {"k_global": k_global, "v_global": v_global, "global_mask": mask, "kept": kept}

    def attend() -> tuple[Tensor, ...]:
        *leaves, grad_o = inputs
        o = attention(*leaves, **shared)
        return o, *torch.autograd.grad(o, (*leaves, k_global, v_global), grad_o)  # type: ignore[arg-type]

    attend()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    with torch.no_grad():
        for x, new in zip(inputs, draw(5000, 64, 2, torch.bfloat16, seed=1), strict=True):
            x.copy_(new)
        v_global.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, attend(), strict=True):
        assert fuzz.same_bits(x, y)


@pytest.fixture
def through_triton() -> Iterator[Callable[[], None]]:
    """From when it is called on, Triton launches every kernel itself, for somebody wants to be told of that."""

    def told(metadata: Any) -> None:
        pass

    yield lambda: knobs.runtime.launch_enter_hook.add(told)
    knobs.runtime.launch_enter_hook.remove(told)


@pytest.mark.parametrize("name", SPECS)
def test_many_calls_in_flight(name: str, through_triton: Callable[[], None]) -> None:
    # launched from the third call on as a CUDA graph whose nodes are set before, while those before it still run
    attention, head_dim = llsa_gen.compile(SPECS[name]), shipped(name).head_dim
    inputs = [draw(2048, head_dim, 2, torch.bfloat16, seed) for seed in range(40)]
    for _ in range(2):
        results(attention, inputs[0])
    found = [results(attention, one) for one in inputs]
    replays = replays_of(attention.module, inputs[0])
    stream = torch.cuda.current_stream().cuda_stream
    assert len(replays) == 2 and all(replay.graphs[stream].made for replay in replays)
    through_triton()
    for one, replayed in zip(inputs, found, strict=True):
        assert all(map(torch.equal, results(attention, one), replayed))


def replays_of(module: Any, inputs: Sequence[Tensor]) -> list[Any]:
    """The replays for inputs like these, of the forward pass and of the backward pass."""
    q, k, v, grad_o = (x.detach() for x in inputs)
    return [
        replay
        for tensors in ((q, k, v), (q, k, v, grad_o))
        for replay in module.plan_launches(tensors)[0].replays.values()
    ]


def test_threads_and_streams(through_triton: Callable[[], None]) -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    inputs = [draw(1024, 64, 2, torch.bfloat16, seed) for seed in range(64)]
    torch.cuda.synchronize()

    def work(thread: int) -> list[tuple[Tensor, ...]]:
        # two threads a stream, so that they set and launch the same graphs
        with torch.cuda.stream(streams[thread % 4]):
            return [results(attention, one) for one in inputs[8 * thread : 8 * thread + 8]]

    streams = [torch.cuda.Stream() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        found = [one for part in pool.map(work, range(8)) for one in part]
    torch.cuda.synchronize()
    through_triton()
    for one, replayed in zip(inputs, found, strict=True):
        assert all(map(torch.equal, results(attention, one), replayed))


@pytest.mark.parametrize("own_stream", [True, False])
def test_a_thread_that_has_done_nothing_on_the_gpu(own_stream: bool) -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    q, k, v, _ = (x.detach() for x in draw(1024, 64, 2, torch.bfloat16))
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()  # what is drawn is there for every stream

    def work() -> Tensor:
        with torch.cuda.stream(stream):
            found = attention(q, k, v)
        assert isinstance(found, Tensor)
        return found

    wanted, *_ = (work() for _ in range(3))
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(work).result()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


def test_graphs_made_and_destroyed_while_another_thread_captures() -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    module = attention.module
    q, k, v, _ = (x.detach() for x in draw(2048, 64, 2, torch.bfloat16))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()  # what is drawn is there for every stream

    def work() -> tuple[Any, ...]:
        with torch.cuda.stream(stream):
            found = tuple(attention(q, k, v) for _ in range(3))
        module.launch_plan.cache_clear()  # and the graphs
        return found

    with ThreadPoolExecutor(1) as pool:
        wanted, *_ = pool.submit(work).result()
        with torch.cuda.stream(stream):
            spare = [torch.empty(1 << 19, dtype=torch.uint8, device=DEVICE) for _ in range(64)]
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = q * 2
            spare.clear()  # torch gets no memory while a stream is captured, and has given back what was free before
            found = pool.submit(work).result()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, q * 2)
    assert all(torch.equal(one, wanted) for one in found)


def test_torch_compile_of_a_cold_operator() -> None:
    # a spec that nothing else compiles: its very first call is traced
    spec = Spec.model_validate({**shipped("llsa_l2").model_dump(), "name": "cold", "head_dim": 48})
    attention = llsa_gen.compile(spec)
    inputs = draw(600, 48, 2, torch.bfloat16)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(2 * q, k, v, scale=0.2) + 1  # type: ignore[operator]

    found = results(torch.compile(function, fullgraph=True), inputs)
    for x, y in zip(found, results(function, inputs), strict=True):
        assert fuzz.same_bits(x, y)


def test_nothing_waits_for_the_gpu() -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    inputs = draw(3000, 64, 2, torch.bfloat16)
    results(attention, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(attention, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stream_of_its_own() -> None:
    attention = llsa_gen.compile(SPECS["llsa_l2"])
    inputs = draw(3000, 64, 2, torch.bfloat16)
    expected = results(attention, inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # the default stream would run ahead
        found = results(attention, inputs)
    torch.cuda.synchronize()
    assert all(fuzz.same_bits(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("values", ["normal", "integers"])
def test_large_top_k(values: fuzz.Values, dtype: fuzz.DType) -> None:
    """More is kept than a sorting network holds: the rank of the last one is searched, ties included."""
    levels = (llsa_gen.Level(block=8, topk=512), llsa_gen.Level(block=32, topk=100))
    spec = llsa_gen.Spec(name="large_k", head_dim=32, levels=levels)
    for n in (700, 9000, 33_000):
        fuzz.run(fuzz.Case(spec, n=n, dtype=dtype, values=values, device="cuda")).raise_if_failed()
