"""`llsa-gen bench` with several specs side by side, in turns, and along the blocks that a spec keeps."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_examples import row
from commands import call
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen import Level, Spec, bench, compile, load, reference
from llsa_gen.bench import cell as bench_cell
from llsa_gen.bench import timing as bench_timing
from llsa_gen.bench.rows import Row, Timing, read, tflops
from llsa_gen.bench.table import tables
from llsa_gen.bench.timing import Call, turns
from llsa_gen.errors import LlsaGenError
from llsa_gen.fuzz.case import Case

ROOT = Path(__file__).resolve().parents[2]

SPECS = {
    "blocks": "{name: blocks, head_dim: 8, levels: [{block: 4, topk: 3}], enrich: none}",
    "deep": "{name: deep, head_dim: 8, levels: [{block: 4, topk: 3}, {block: 2, topk: 2}], enrich: none}",
    "wide": "{name: wide, head_dim: 16, levels: [{block: 4, topk: 2}]}",
}

MAKERS = """\
import torch
from torch.nn.functional import scaled_dot_product_attention

asked = []

def blocks(spec, kept, m, n):
    asked.append((spec.name, kept.dtype, tuple(kept.shape), m, n))
    size = spec.block(1)
    table = torch.zeros(*kept.shape[:3], -(-n // size) + 1, dtype=torch.bool)
    table = table.scatter(-1, torch.where(kept < 0, table.shape[-1] - 1, kept).long(), True)[..., :-1]
    rows, columns = torch.arange(m) // size, torch.arange(n) // size
    mask = table[:, :, rows][..., columns]
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)

def everything(spec, kept, m, n):
    return scaled_dot_product_attention

def picky(spec, kept, m, n):
    raise ValueError("expected blocks of 128,\\ngot 4")

def nothing(spec, kept, m, n):
    return None

def breaks(spec, kept, m, n):
    def attend(q, k, v):
        raise RuntimeError("no kernel")
    return attend

number = 3
"""


@pytest.fixture
def makers(place: Path) -> Iterator[str]:
    """Specs beside `tiny`, and a module in the working directory; its name."""
    before = list(sys.path)
    for name, text in SPECS.items():
        (place / "spec" / f"{name}.yaml").write_text(text)
    (place / "makers.py").write_text(MAKERS)
    yield "makers"
    sys.modules.pop("makers", None)
    sys.path[:] = before


CPU = "--device cpu --batch 1 --heads 2 --dtype float32 --json rows.json"


def measured(command: str) -> tuple[Row, ...]:
    """The rows of a command that ends well."""
    result = call(command)
    assert (result.code, result.err) == (0, "")
    return read([Path("rows.json")])


# ---- several specs --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("makers")
def test_specs_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int, int]] = []
    tensors = Case.tensors

    def counted(case: Case) -> Any:
        made.append((case.spec.name, case.spec.head_dim, case.n))
        return tensors(case)

    monkeypatch.setattr(Case, "tensors", counted)
    rows = measured(f"bench tiny wide blocks tiny -n 20 -n 9 {CPU}")
    tiny, wide, blocks = (load(f"spec/{name}.yaml") for name in ("tiny", "wide", "blocks"))
    assert [(one.n_tokens, one.kind, one.head_dim, one.digest) for one in rows] == [
        (n, kind, spec.head_dim, spec.digest)
        for n in (20, 9)
        for kind, spec in (("ours", tiny), ("ours", blocks), ("dense", tiny), ("ours", wide), ("dense", wide))
    ]
    assert made == [("tiny", 8, 20), ("wide", 16, 20), ("tiny", 8, 9), ("wide", 16, 9)], "the same inputs for all"
    request = bench.Request((tiny, wide, blocks), (20, 9), ("float32",), batch=1, heads=2)
    assert request.cells == len(rows)


def test_a_length_must_suit_every_spec() -> None:
    short, long = (
        Spec(name=name, head_dim=8, levels=(Level(block=2, topk=1),) * levels)
        for name, levels in (("short", 1), ("long", 2))
    )
    with pytest.raises(LlsaGenError, match="the most that short takes, got 4000000000"):
        bench.Request((short, long), (4_000_000_000,), ("float32",))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--dense sdpa-cudnn", "--dense: expected sdpa, got 'sdpa-cudnn'"),
        ("--along makers", "--along: expected module:function, got 'makers'"),
        ("--along makers:gone", "--along makers:gone: expected 'gone' in makers, got no such name"),
        ("--along makers:number", "--along makers:number: expected a callable f(spec, kept, m, n), got int"),
    ],
)
@pytest.mark.usefixtures("makers")
def test_mistakes_are_one_message(command: str, message: str) -> None:
    result = call(f"bench blocks {command} -n 20 {CPU}")
    assert (result.code, result.out, result.err) == (1, "", f"{message}\n")
    assert not Path("rows.json").exists()


@pytest.mark.usefixtures("makers")
def test_blocks_of_enriched_specs_are_not_all_that_a_query_sees() -> None:
    result = call(f"bench tiny --along makers:blocks -n 20 {CPU}")
    assert (result.code, result.err) == (1, "--along: expected a spec without enrichment, got tiny\n")


@pytest.mark.usefixtures("makers")
def test_dense_attention_by_name() -> None:
    assert [one.implementation for one in measured(f"bench blocks --dense sdpa -n 20 {CPU}")] == ["llsa_gen", "sdpa"]


# ---- in turns -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_turns_are_spread_evenly(counts: list[int]) -> None:
    order = turns(counts)
    assert [order.count(index) for index in range(len(counts))] == counts
    for place, owner in enumerate(order, start=1):
        share = (order[:place].count(owner) - 0.5) / counts[owner]  # of all turns, how much is over
        for index, count in enumerate(counts):
            assert abs(order[:place].count(index) - share * count) <= 0.5 + 1e-9


@given(st.integers(1, 5), st.integers(1, 50))
def test_as_many_turns_alternate(several: int, repeats: int) -> None:
    assert turns([repeats] * several) == [*range(several)] * repeats


class Clock:
    """A stopwatch by which each call takes what it says; it notes what is timed."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def flush(self) -> None:
        pass

    def samples(self, calls: Sequence[Call]) -> list[float]:
        self.batches.append(len(calls))
        found = []
        for one in calls:
            with one.around():
                found.append(one.run())
        return found


def test_calls_are_timed_in_turns_each_in_what_it_needs() -> None:
    told: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        told.append(f"<{name}")
        yield
        told.append(f"{name}>")

    def run(name: str, ms: float) -> float:
        told.append(name)
        return ms

    calls = [Call(partial(run, name, ms), partial(around, name)) for name, ms in (("a", 1.0), ("b", 7.0))]
    found = bench_timing.measure(Clock(), calls, repeats=5)
    assert [(one.median_ms, one.repeats) for one in found if isinstance(one, Timing)] == [(1.0, 5), (7.0, 5)]
    assert told == [*["<a", "a", "a>"] * 2, *["<b", "b", "b>"] * 2, *["<a", "a", "a>", "<b", "b", "b>"] * 5]


def test_what_fails_in_its_turn_leaves_the_others() -> None:
    done = {"first": 0, "later": 0, "never": 0}

    def run(name: str, last: int) -> float:
        done[name] += 1
        if done[name] > last:
            raise ValueError(name)
        return 2.0

    calls = [Call(partial(run, *one)) for one in (("first", 0), ("never", 1000), ("later", 4))]
    first, never, later = bench_timing.measure(Clock(), calls, repeats=6)
    assert (str(first), str(later)) == ("first", "later")
    assert isinstance(never, Timing) and (never.median_ms, never.repeats) == (2.0, 6)
    with pytest.raises(KeyboardInterrupt):
        bench_timing.measure(Clock(), [Call(lambda: 1.0), Call(_interrupt)], repeats=2)


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("repeats", "batches"), [(1, [1, 1, 1]), (9, [1, 1, 9]), (30, [1, 1, 3, 30])])
def test_repeats_are_as_many_as_is_said(repeats: int, batches: list[int]) -> None:
    clock = Clock()
    (found,) = bench_timing.measure(clock, [Call(lambda: 3.0)], repeats)
    assert clock.batches == batches
    assert found == Timing(median_ms=3.0, p20_ms=3.0, p80_ms=3.0, repeats=repeats)


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.usefixtures("makers")
def test_all_implementations_of_a_length_take_turns(in_turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    order: list[str] = []
    measure, prepared = bench_timing.measure, bench_cell.Cell.prepared

    def noted(watch: Any, calls: Sequence[Call], *rest: Any) -> Any:
        groups.append(len(calls))
        order.append("timed")
        return measure(watch, calls, *rest)

    def checked(cell: bench_cell.Cell) -> Any:
        order.append("checked")
        return prepared(cell)

    monkeypatch.setattr(bench_timing, "measure", noted)
    monkeypatch.setattr(bench_cell.Cell, "prepared", checked)
    option = "--in-turns" if in_turns else ""
    rows = measured(f"bench tiny blocks {option} --repeats 4 --along makers:blocks -n 20 -n 9 {CPU}")
    names = ["llsa_gen", "llsa_gen", "sdpa", "makers:blocks(blocks)"]
    assert [(one.n_tokens, one.implementation) for one in rows] == [(n, name) for n in (20, 9) for name in names]
    assert all(one.forward and one.forward_backward and one.forward.repeats == 4 for one in rows)
    assert groups == ([4] * 4 if in_turns else [1] * 16)
    of_a_length = [*["checked"] * 4, "timed", "timed"] if in_turns else ["checked", "timed", "timed"] * 4
    assert order == of_a_length * 2


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.usefixtures("makers")
def test_progress_tells_every_row_once(in_turns: bool) -> None:
    told: list[str] = []
    specs = (load("spec/blocks.yaml"), load("spec/deep.yaml"))
    request = bench.Request(
        specs, (9,), ("float32",), batch=1, heads=1, in_turns=in_turns, repeats=1, along=("makers:blocks",)
    )
    rows = tuple(bench.bench(request, told.append))
    assert told == [*(f"{one.implementation}, 9 tokens, float32, eager" for one in rows), ""]
    assert len(rows) == request.cells == 5


@pytest.mark.usefixtures("makers")
def test_ours_that_fails_in_its_turn_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(watch: object, calls: Sequence[Call], repeats: object) -> list[object]:
        return [RuntimeError("broken")] * len(calls)

    monkeypatch.setattr(bench_timing, "measure", failing)
    result = call(f"bench tiny blocks --in-turns -n 20 {CPU}")
    assert (result.code, result.err) == (1, "llsa_gen at 20 tokens, float32: raised RuntimeError: broken\n")


# ---- along the blocks of a spec -------------------------------------------------------------------------------------


def test_blocks_are_handed_to_whoever_attends_along_them(makers: str) -> None:
    rows = measured(f"bench tiny blocks deep --along {makers}:blocks -n 70 -m 33 {CPU}")
    assert [one.implementation for one in rows] == [
        "llsa_gen", "llsa_gen", "llsa_gen", "sdpa", "makers:blocks(blocks)", "makers:blocks(deep)",
    ]  # fmt: skip
    assert sys.modules["makers"].asked == [(name, torch.int32, (1, 2, 9, 3), 33, 70) for name in ("blocks", "deep")], (
        "asked once, whatever is measured"
    )
    for ours, along in zip(rows[1:3], rows[4:], strict=True):
        assert (along.digest, along.keys, along.kind) == (ours.digest, ours.keys, "other")
        assert along.error is not None and along.error <= 1, "by the reference"
        assert along.forward is not None and along.forward_backward is not None


def test_what_does_not_keep_to_the_blocks_stops_the_bench(makers: str) -> None:
    result = call(f"bench blocks --along {makers}:everything -n 70 {CPU}")
    assert result.code == 1
    assert result.err.startswith("makers:everything(blocks) at 70 tokens, float32: error of o ")
    assert [one.kind for one in read([Path("rows.json")])] == ["ours", "dense"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("picky", "ValueError: expected blocks of 128, got 4"),
        ("nothing", "TypeError: expected a callable f(q, k, v), got NoneType"),
        ("breaks", "RuntimeError: no kernel"),
    ],
)
@pytest.mark.parametrize("option", ["", "--in-turns"])
def test_a_maker_that_refuses_leaves_an_empty_row(name: str, reason: str, option: str, makers: str) -> None:
    *others, empty = measured(f"bench blocks {option} --along {makers}:{name} -n 70 {CPU}")
    assert empty.missing == dict.fromkeys(bench_cell.MEASURED, f"not available: {reason}")
    assert (empty.forward, empty.forward_backward, empty.error) == (None, None, None)
    assert all(one.forward and one.forward_backward for one in others)


# ---- keys and TFLOP/s -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llsa_l1", "llsa_l2", "topk_l2", "topk_b128", "uneven"])
def test_keys_are_the_most_that_a_query_has_a_weight_for(name: str) -> None:
    spec = load(ROOT / "spec" / f"{name}.yaml")
    for n in (50, 960):
        case = Case(spec, n)
        q, k, _, _ = case.tensors()
        kept = reference.select(spec, q, k)
        seen = int(reference.weight_rows(spec, kept, torch.arange(n), n).ne(0).sum(-1).max())
        assert bench_cell._keys(case, bench_cell.ours(compile(spec))) == seen


def test_tflops_count_what_is_attended_to() -> None:
    wan: dict[str, Any] = {"batch": 1, "heads": 12, "head_dim": 128}
    ours = row(109_632, 8.79, 34.8, keys=4096, **wan)
    dense = row(109_632, 137.0, 466.0, keys=109_632, kind="dense", **wan)
    assert [round(tflops(one, what) or 0) for one in (ours, dense) for what in ("forward", "forward_backward")] == [
        314, 277, 539, 555,
    ]  # fmt: skip
    fewer = row(109_632, 8.79, None, keys=4096, m_tokens=109_632 // 2, **wan)
    assert tflops(fewer, "forward") == pytest.approx((tflops(ours, "forward") or 0) / 2)
    assert tflops(fewer, "forward_backward") is None
    assert tflops(row(64, 1.0, 1.0), "forward") is None, "nobody knows the keys"


def test_the_table_has_tflops(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    wan: dict[str, Any] = {"batch": 1, "heads": 12, "head_dim": 128}
    Console(width=200).print(tables([row(109_632, 8.79, 34.8, keys=4096, **wan), row(64, 1.0, 1.0)]))
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "314/277" in printed


# ---- FlexAttention --------------------------------------------------------------------------------------------------


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/flex.py`."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import flex

    return flex


def test_the_mask_of_flex_attention_has_the_blocks_that_are_kept(flex: Any) -> None:
    kept = torch.tensor([[2, 0], [1, -1], [-1, -1]])[None, None]
    mask = flex.block_mask(kept, 128, 300, 257)
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert mask.shape == (1, 1, 300, 257) and mask.BLOCK_SIZE == (128, 128)
    assert mask.full_kv_num_blocks.flatten().tolist() == [2, 1, 0] and not mask.kv_num_blocks.any()
    assert mask.full_q_num_blocks.flatten().tolist() == [1, 1, 1]


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("lengths", ["-n 300", "-n 700 -m 390"])
def test_flex_attention_along_blocks_of_128(lengths: str, place: Path) -> None:
    (place / "spec" / "big.yaml").write_text("{name: big, head_dim: 16, levels: [{block: 128, topk: 2}], enrich: none}")
    (place / "spec" / "small.yaml").write_text(
        "{name: small, head_dim: 16, levels: [{block: 64, topk: 2}], enrich: none}"
    )
    along, refused = measured(f"bench big small --along benchmarks.flex:attend {lengths} {CPU}")[-2:]
    assert along.error is not None and along.error <= 1 and along.forward is not None
    assert along.missing["forward_backward"].startswith("backward raised NotImplementedError: FlexAttention")
    assert "need blocks of 128 or a multiple of it, got 64" in refused.missing["forward"]


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("flex")
def test_specs_dense_and_flex_attention_take_turns_on_a_gpu(place: Path) -> None:
    specs = f"{ROOT / 'spec' / 'topk_b128.yaml'} {ROOT / 'spec' / 'llsa_l2.yaml'}"
    result = call(
        f"bench {specs} -n 4000 --in-turns --repeats 5 --mode eager --mode graph --dense sdpa-cudnn --device cuda "
        "--along benchmarks.flex:attend --json rows.json"
    )
    assert result.code == 0, result.err
    rows = read([place / "rows.json"])
    names = ["llsa_gen", "llsa_gen", "sdpa-cudnn", "benchmarks.flex:attend(topk_b128)"]
    assert [(one.mode, one.implementation) for one in rows] == [(m, name) for m in ("eager", "graph") for name in names]
    for one in rows:
        assert one.missing == {}, one.implementation
        assert one.error is not None and one.error <= 1 and one.keys is not None
        assert one.forward is not None and one.forward_backward is not None
        assert one.forward.repeats == one.forward_backward.repeats == 5


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["normal", "integers", "constant", "zero_queries"])
def test_inputs_drawn_on_a_gpu_are_always_the_same(values: Any) -> None:
    case = Case(load(ROOT / "spec" / "llsa_l2.yaml"), 100, device="cuda", drawn_there=True, values=values, popular=True)
    assert "drawn_there=True" in repr(case)
    for x, y in zip(case.tensors(), case.tensors(), strict=True):
        assert x.is_cuda and torch.equal(x, y)


def test_inputs_drawn_there_are_the_usual_ones_on_a_cpu() -> None:
    spec = load(ROOT / "spec" / "llsa_l2.yaml")
    usual = Case(spec, 100, loud=True, popular=True).tensors()
    for x, y in zip(usual, Case(spec, 100, loud=True, popular=True, drawn_there=True).tensors(), strict=True):
        assert torch.equal(x, y)
