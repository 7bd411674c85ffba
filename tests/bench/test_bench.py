"""`llsa-gen bench`: the whole on a CPU with short sequences, timers that are fakes, and everything on a GPU."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_examples import h100
from commands import call
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen import bench, compiler, fuzz, load, reference
from llsa_gen.bench import baselines as bench_baselines
from llsa_gen.bench import cell as bench_cell
from llsa_gen.bench import check as bench_check
from llsa_gen.bench import timing as bench_timing
from llsa_gen.bench.rows import Timing, dumps, read
from llsa_gen.bench.timing import Call
from llsa_gen.errors import CheckFailed, LlsaGenError
from llsa_gen.fuzz import oracle as fuzz_oracle
from llsa_gen.fuzz.case import Case

ROOT = Path(__file__).resolve().parents[2]

BASELINES = """\
import torch
from torch.nn.functional import scaled_dot_product_attention

number = 3

class Space:
    attend = staticmethod(scaled_dot_product_attention)

class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return torch.zeros_like(q)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("no way\\nback")

def one_way(q, k, v):
    return OneWay.apply(q, k, v)

def raises(q, k, v):
    raise ValueError("not today")

def full(q, k, v):
    raise torch.OutOfMemoryError("full")

def leaves(q, k, v):
    raise SystemExit(0)

def narrow(q, k, v):
    return q[..., 1:]

def nothing(q, k, v):
    return None

def nan(q, k, v):
    return q * torch.nan
"""


@pytest.fixture
def baselines(place: Path) -> Iterator[str]:
    """A module in the working directory; its name."""
    before = list(sys.path)
    (place / "dense_attention.py").write_text(BASELINES)
    yield "dense_attention"
    sys.modules.pop("dense_attention", None)
    sys.path[:] = before


def alter(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Lets every result of a compiled spec that is checked go through a function first."""
    attend = fuzz.attend

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        found = attend(*args)
        change(found)
        return found

    monkeypatch.setattr(fuzz, "attend", wrong)


# ---- the command on a CPU -------------------------------------------------------------------------------------------

CPU = "bench tiny --device cpu --batch 1 --heads 2"


def test_a_bench_from_end_to_end(place: Path, baselines: str) -> None:
    result = call(f"{CPU} -n 70 -n 33 --dtype float32 --against {baselines}:Space.attend --json rows.json --plot p.png")
    assert (result.code, result.err) == (0, ""), "no bar where there is no terminal"
    rows = read([place / "rows.json"])
    names = ["llsa_gen", "sdpa", "dense_attention:Space.attend"]
    assert [(row.n_tokens, row.implementation) for row in rows] == [(n, name) for n in (70, 33) for name in names]
    for row in rows:
        assert (row.batch, row.heads, row.head_dim, row.dtype, row.mode) == (1, 2, 8, "float32", "eager")
        assert row.spec == load("spec/tiny.yaml").canonical() and row.digest == load("spec/tiny.yaml").digest
        assert row.machine.torch == torch.__version__ and row.machine.driver is None
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.date)
        for timing in (row.forward, row.forward_backward):
            assert timing is not None and 0 < timing.p20_ms <= timing.median_ms <= timing.p80_ms
            assert timing.repeats >= 3
        assert (row.error is None) == (row.kind == "other") and (row.error or 0) <= 1
        assert (row.host_us, row.memory, row.breakdown, row.ceilings) == (None, None, None, None)
        assert row.missing == dict.fromkeys(("host_us", "memory"), "measured on a GPU only")
    for said in ("B=1, H=2, D=8, float32, called from Python", "tiny", "sdpa", "dense_attention:Space.attend"):
        assert said in result.out
    assert (place / "p.png").stat().st_size > 1000

    again = call("bench --from rows.json --plot again.png")
    assert (again.code, again.out) == (0, result.out)
    assert (place / "again.png").read_bytes() == (place / "p.png").read_bytes()


def test_a_bench_of_other_lengths_of_queries(place: Path, baselines: str) -> None:
    command = (
        f"{CPU} -n 70 -n 33 -m 33 --dtype float32 --against {baselines}:Space.attend --json rows.json --plot p.png"
    )
    result = call(command)
    assert (result.code, result.err) == (0, "")
    rows = read([place / "rows.json"])
    names = ["llsa_gen", "sdpa", "dense_attention:Space.attend"]
    told = [(row.n_tokens, row.m_tokens, row.implementation) for row in rows]
    assert told == [(n, m, name) for n, m in ((70, 33), (33, None)) for name in names], "as many as keys is as usual"
    assert all(row.forward is not None and row.forward_backward is not None for row in rows)
    assert all((row.error is None) == (row.kind == "other") for row in rows)
    assert "B=1, H=2, D=8, M=33, float32, called from Python" in result.out
    again = call("bench --from rows.json --plot again.png")
    assert (again.code, again.out) == (0, result.out)
    assert (place / "again.png").read_bytes() == (place / "p.png").read_bytes()


@pytest.mark.parametrize(("n", "m", "dense"), [(40, 9, True), (9, 40, True), (41, 9, False), (20, 20, False)])
def test_dense_attention_is_left_out_where_there_are_many_pairs(n: int, m: int, dense: bool) -> None:
    request = bench.Request(
        (load(ROOT / "spec" / "llsa_l1.yaml"),), (n,), ("float32",), batch=1, heads=1, queries=m, dense_up_to=19
    )
    rows = tuple(bench.bench(request))
    assert len(rows) == request.cells == 1 + dense


def test_what_is_sampled_is_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load(ROOT / "spec" / "llsa_l2.yaml")
    for n, m in ((500, 3000), (3000, 5)):
        case = Case(spec, n=n, m=m, heads=2)
        queries = bench_check.sample(case)
        assert {0, m - 1} <= set(queries.tolist()) and queries.max() < m
        attention, inputs = compiler.compile(spec), case.tensors()
        assert bench_check.check_ours(attention, case, inputs) < 1
        (sdpa,) = bench_baselines.dense("cpu", "float32")
        assert sdpa.function is not None
        assert bench_check.check_dense(sdpa, case, inputs, sdpa.function(*inputs[:3])) < 1
        with pytest.raises(LlsaGenError, match=f"sdpa at {n:,} keys, {m:,} queries, float32: expected o"):
            bench_check.check_other(sdpa, case, inputs[1])


def test_json_alone_is_on_stdout(place: Path) -> None:
    result = call(f"{CPU} -n 20 --dtype bfloat16 --dense-up-to 19 --json -")
    assert (result.code, result.err) == (0, "")
    (row,) = result.json
    assert (row["implementation"], row["dtype"]) == ("llsa_gen", "bfloat16")


def test_what_is_not_said_depends_on_the_device(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bench.Request] = []
    monkeypatch.setattr(bench, "bench", lambda request, step: asked.append(request) or h100())
    assert call("bench tiny --device cpu").code == 0
    (request,) = asked
    assert (request.lengths, request.dtypes, request.modes) == ((1024, 4096), ("float32",), ("eager",))
    assert request.cells == 2 * 2 and not request.on_gpu
    assert call("bench tiny --device cpu -n 5 -n 5 -n 300000 --dtype float32 --dtype float16 --against a:b").code == 0
    assert asked[1].lengths == (5, 300_000)
    assert asked[1].cells == 2 * (3 + 2), "no dense attention beyond --dense-up-to"


def test_progress_tells_every_cell(place: Path) -> None:
    told: list[str] = []
    request = bench.Request((load("spec/tiny.yaml"),), (9, 8), ("float32",), batch=1, heads=1)
    rows = tuple(bench.bench(request, told.append))
    assert told == [*(f"{row.implementation}, {row.n_tokens} tokens, float32, eager" for row in rows), ""]
    assert len(rows) == request.cells == 4
    told.clear()
    tuple(bench.bench(bench.Request(request.specs, (9,), ("float32",), batch=1, heads=1, queries=4), told.append))
    assert told == ["llsa_gen, 9 keys, 4 queries, float32, eager", "sdpa, 9 keys, 4 queries, float32, eager", ""]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench tiny --device cpu --mode graph", "--mode graph: expected a GPU to capture a CUDA graph on, got"),
        ("bench tiny --device cpu --json no/rows.json", "no/rows.json: expected a file in a folder that exists"),
        ("bench tiny --device cpu --plot no/p.png", "no/p.png: expected a file in a folder that exists, got no folder"),
        ("bench tiny --device tpu", "--device: expected cpu or a GPU such as cuda, got 'tpu'"),
        ("bench tiny --device cpu --against json", "--against: expected module:function, got 'json'"),
        ("bench --from gone.json", "gone.json: No such file or directory"),
        ("bench --from spec/tiny.yaml", "spec/tiny.yaml: expected rows as `llsa-gen bench --json` writes them, got"),
        ("bench --from rows.json --plot p.what", "--plot p.what: expected a name that ends in one of ."),
        ("bench tiny --device cpu --plot p.what", "--plot p.what: expected a name that ends in one of ."),
        ("bench tiny --device cpu --plot p", "--plot p: expected a name that ends in one of ."),
        ("bench tiny --device cpu --plot -", "--plot -: expected a name that ends in one of ."),
        ("bench tiny --device cpu --json spec", "spec: Is a directory"),
        ("bench tiny --device cpu --plot folder.png", "folder.png: Is a directory"),
        ("bench tiny --device cpu --json rows.json/x", "rows.json/x: expected a file in a folder that exists, got no"),
        ("bench tiny --device cpu --json /proc/x", "/proc/x: No such file or directory"),
        ("bench tiny --device cpu --json kept.json", "kept.json: Permission denied"),
        ("bench tiny --device cpu --plot kept.png", "kept.png: Permission denied"),
        ("bench tiny --device cpu --json a.png --plot ./spec/../a.png", "--plot spec/../a.png: expected another file"),
        ("bench --from rows.png --plot rows.png", "--plot rows.png: expected another file than those of --from"),
        (f"bench tiny --device {'x' * 10**5}", "--device: expected cpu or a GPU such as cuda, got 'xxx"),
        (f"bench tiny --device cpu --against {'x' * 10**5}", "--against: expected module:function, got 'xxx"),
    ],
)
def test_mistakes_are_one_message(
    command: str,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("nothing is measured"))
    if "--against" in command:
        monkeypatch.undo()
        monkeypatch.chdir(place)
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: (mode != os.W_OK or "kept" not in str(path)) and may(path, mode)
    )
    (place / "rows.json").write_text(dumps(h100()))
    (place / "rows.png").write_text(dumps(h100()))
    (place / "folder.png").mkdir()
    for name in ("kept.json", "kept.png"):
        (place / name).write_text("precious")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in str(path)}
    result = call(command)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1 and len(result.err) < 500
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in str(path)}
    assert after == before


def test_either_a_spec_or_rows(place: Path) -> None:
    for command in ("bench", "bench tiny --from rows.json"):
        result = call(command)
        assert result.code == 2
        assert "expected a spec to measure, or --from and rows to read" in result.err


def test_a_plot_without_matplotlib_names_the_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llsa_gen.bench.plot", raising=False)
    monkeypatch.setattr("llsa_gen.bench.plot", None, raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    result = call(f"{CPU} -n 20 --plot p.png")
    assert result.code == 1
    assert re.fullmatch(r"--plot needs matplotlib\S*: pip install 'llsa-gen\[demo\]'\n", result.err)


# ---- nothing that was measured is lost ------------------------------------------------------------------------------


def allocate(size: int = 2**50) -> torch.Tensor:
    """What the allocator says to a length that is too long."""
    return torch.empty(size, dtype=torch.uint8)


def interrupt() -> None:
    raise KeyboardInterrupt


def broken() -> None:
    raise RuntimeError("something else\nis broken")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(60)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    threading.Event().wait(60)


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP ends a process, also where the tests run under nohup, which lets all that it starts ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def no_python_memory() -> None:
    raise MemoryError


ENDS = [
    (interrupt, 130, "interrupted at: {0}, 33 tokens, float32, eager; {1} of 6 rows were measured"),
    (terminate, 143, "interrupted at: {0}, 33 tokens, float32, eager; {1} of 6 rows were measured"),
    (hang_up, 129, "interrupted at: {0}, 33 tokens, float32, eager; {1} of 6 rows were measured"),
]


@pytest.mark.parametrize(("end", "code", "said"), [*ENDS, (broken, 1, "tiny")])
@pytest.mark.parametrize("whose", ["llsa_gen", "sdpa"])
@pytest.mark.usefixtures("hangups")
def test_what_ends_a_bench_leaves_what_was_measured(
    end: Callable[[], None],
    code: int,
    said: str,
    whose: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure, count = bench_timing.measure, 0

    def ends(*given: Any) -> object:
        nonlocal count
        count += 1  # two for each row: forward, and forward and backward
        if count == 2 * (3 if whose == "llsa_gen" else 4):
            end()
        return measure(*given)

    monkeypatch.setattr(bench_timing, "measure", ends)
    result = call(f"{CPU} -n 70 -n 33 -n 34 --dense-up-to 70 --json rows.json --plot p.png")
    if whose == "sdpa" and end is broken:
        assert result.code == 0 and "sdpa at 33 tokens: RuntimeError: something else is broken" in result.out
        return
    measured = 2 if whose == "llsa_gen" else 3
    rows = read([place / "rows.json"])
    assert [(row.n_tokens, row.kind) for row in rows] == [(70, "ours"), (70, "dense"), (33, "ours")][:measured]
    assert result.code == code and "tiny" in result.out and (place / "p.png").exists()
    assert "Traceback" not in result.err
    if end is broken:
        assert result.err == "llsa_gen at 33 tokens, float32: raised RuntimeError: something else is broken\n"
    else:
        assert result.err == f"warning: {said.format(whose, measured)}\n"


@pytest.mark.parametrize("where", ["inputs", "check", "backward", "time"])
@pytest.mark.parametrize("end", [allocate, no_python_memory])
def test_a_length_without_memory_is_told_and_the_others_are_measured(
    where: str,
    end: Callable[[], object],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def at_33(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(one: Any, *args: Any) -> Any:
            if (one.n if isinstance(one, Case) else one.case.n) == 33:
                end()
            return inner(one, *args)

        return outer

    owner, name = {
        "inputs": (Case, "tensors"), "check": (bench_cell.Cell, "_checked"),
        "backward": (bench_cell.Cell, "forward_backward"), "time": (bench_cell.Cell, "forward"),
    }[where]  # fmt: skip
    if where == "check":
        check = bench_check.check_ours
        monkeypatch.setattr(
            bench_check,
            "check_ours",
            lambda attention, case, inputs: at_33(lambda case: check(attention, case, inputs))(case),
        )
    else:
        monkeypatch.setattr(owner, name, at_33(getattr(owner, name)))
    result = call(f"{CPU} -n 70 -n 33 -n 34 --json rows.json")
    rows = read([place / "rows.json"])
    assert [(row.n_tokens, row.kind) for row in rows] == [(n, kind) for n in (70, 33, 34) for kind in ("ours", "dense")]
    for row in rows:
        lacking = {what for what in ("forward", "forward_backward") if getattr(row, what) is None}
        assert lacking == set(row.missing) - {"host_us", "memory"}
        assert bool(lacking) == (row.n_tokens == 33 and (where != "check" or row.kind == "ours"))
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.startswith("tiny at 33 tokens: ") and result.err.count("\n") == 1
    assert ("MemoryError" if end is no_python_memory else "DefaultCPUAllocator") in result.err


def test_rows_that_cannot_be_written_are_printed(place: Path) -> None:
    result = call(f"{CPU} -n 20 --json /dev/full --plot p.png")
    assert (result.code, result.err) == (1, "/dev/full: No space left on device\n")
    assert "tiny" in result.out and (place / "p.png").exists()


def test_every_row_is_in_the_file_before_the_next_is_measured(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing can be done once the kernel kills a process that takes too much memory."""
    found = h100()

    def slowly(request: bench.Request, step: object) -> Iterator[object]:
        for number, row in enumerate(found):
            assert number == 0 or read([place / "rows.json"]) == found[:number]
            yield row

    monkeypatch.setattr(bench, "bench", slowly)
    assert call(f"{CPU} --json rows.json").code == 0
    assert read([place / "rows.json"]) == found


@given(st.integers(0, 10**4).map(lambda size: "x" * size))
def test_what_an_exception_says_is_one_line_that_ends(text: str) -> None:
    assert len(bench_cell.said(ValueError(f"{text}\n\x1b[31m{text}"))) < 600


# ---- correct first --------------------------------------------------------------------------------------------------


def spoil(name: str, by: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found[name].mul_(1 + by)


def late_nan(found: dict[str, torch.Tensor]) -> None:
    found["o"][0, 0, 5, 2] = torch.nan


def wrong_selection(found: dict[str, torch.Tensor]) -> None:
    found["kept_l1"][0, 0, 0] = found["kept_l1"][0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((spoil(name, 1e-3), f"{name}: error") for name in ("o", "lse", "dq", "dk", "dv")),
        (late_nan, "o: expected finite numbers, got 1 of 1,120 that are not"),
        (wrong_selection, "level 1"),
    ],
)
def test_a_wrong_result_stops_the_bench(
    change: Callable[[dict[str, torch.Tensor]], object],
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alter(monkeypatch, change)
    measured: list[object] = []
    monkeypatch.setattr(bench_timing, "measure", lambda *_: measured.append(1))
    result = call(f"{CPU} -n 70 --json rows.json --plot p.png")
    assert result.code == 1
    assert said in result.err and "it is not timed" in result.err
    assert "run(Case(spec=Spec(" in result.out, "a script that runs the case"
    assert not measured and not (place / "rows.json").exists() and not (place / "p.png").exists()


def test_what_is_sampled_of_many_queries_is_right_where_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fuzz.Case(load(ROOT / "spec" / "llsa_l2.yaml"), n=3000, heads=3).spec
    case = Case(spec, n=3000, heads=3)
    queries = bench_check.sample(case)
    assert 16 <= len(queries) < 1000 and {0, 2999} <= set(queries.tolist())
    attention, inputs = compiler.compile(spec), case.tensors()
    assert bench_check.check_ours(attention, case, inputs) < 1
    others = sorted(set(range(3000)) - set(queries.tolist()))
    attend = fuzz.attend

    def gradient_where_none_is(*args: Any) -> dict[str, torch.Tensor]:
        found = attend(*args)
        found["dq"][0, 0, others[0], 0] = 1e-6
        return found

    monkeypatch.setattr(fuzz, "attend", gradient_where_none_is)
    with pytest.raises(CheckFailed, match="expected zeros for queries without a gradient"):
        bench_check.check_ours(attention, case, inputs)


def test_the_truth_of_a_sample_is_that_of_all_where_the_others_have_no_gradient() -> None:
    case = Case(load(ROOT / "spec" / "uneven.yaml"), n=300, heads=2)
    q, k, v, grad_o = case.tensors()
    queries = torch.tensor([0, 7, 120, 299])
    sparse = torch.zeros_like(grad_o)
    sparse[:, :, queries] = grad_o[:, :, queries]
    kept = reference.select(case.spec, q, k)
    whole = fuzz_oracle.truth(case.spec, q, k, v, sparse, kept, case.softmax_scale)
    part = fuzz_oracle.truth(case.spec, q, k, v, sparse, kept, case.softmax_scale, queries)
    for name, found in part.values.items():
        wanted = whole.values[name]
        torch.testing.assert_close(found, wanted if name in ("dk", "dv") else wanted[:, :, queries])


def test_memory_is_poisoned_when_ours_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    alter(monkeypatch, lambda found: seen.append(bool(torch.empty(100).isnan().all())))
    case = Case(load(ROOT / "spec" / "llsa_l1.yaml"), n=50)
    bench_check.check_ours(compiler.compile(case.spec), case, case.tensors())
    assert seen == [True]


def test_a_replay_has_to_give_the_same_bits() -> None:
    case = Case(load(ROOT / "spec" / "llsa_l1.yaml"), n=4)
    eager = torch.randn(4, 1, 1, 4, 64).unbind(0)
    bench_check.check_replay(case, eager, eager)
    with pytest.raises(CheckFailed, match="dk: the replay of a CUDA graph gave other bits"):
        bench_check.check_replay(case, eager, (*eager[:2], eager[2] * (1 + 1e-7) * 2, eager[3]))


def test_a_wrong_baseline_stops_the_bench(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_baselines, "_attend", lambda q, k, v: v)
    result = call(f"{CPU} -n 70 --json rows.json")
    assert result.code == 1 and result.err.startswith("sdpa at 70 tokens, float32: error of o")
    assert [row.kind for row in read([place / "rows.json"])] == ["ours"], "which was right"


# ---- other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "dense_attention:raises at 20 tokens, float32: raised ValueError: not today"),
        ("narrow", "dense_attention:narrow at 20 tokens, float32: expected o, torch.float32 [1, 2, 20, 8], got"),
        (
            "nothing",
            "dense_attention:nothing at 20 tokens, float32: expected o, torch.float32 [1, 2, 20, 8], got None",
        ),
        ("nan", "dense_attention:nan at 20 tokens, float32: expected finite numbers in o, got 320 of 320"),
        ("leaves", "dense_attention:leaves at 20 tokens, float32: raised SystemExit: 0"),
        ("number", "--against dense_attention:number: expected a callable f(q, k, v), got int"),
        ("gone", "--against dense_attention:gone: expected 'gone' in dense_attention, got no such name"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_one_message(
    name: str,
    message: str,
    baselines: str,
    place: Path,
) -> None:
    result = call(f"{CPU} -n 20 --against {baselines}:{name} --json rows.json")
    assert result.code == 1
    assert result.err.startswith(message) and result.err.count("\n") == 1
    if message.startswith("--against"):
        assert (result.out, (place / "rows.json").exists()) == ("", False), "known before anything is measured"
    else:
        assert [row.kind for row in read([place / "rows.json"])] == ["ours", "dense"]
        assert "tiny" in result.out and "sdpa" in result.out


def test_a_baseline_that_cannot_be_imported(baselines: str, tmp_path: Path) -> None:
    with pytest.raises(LlsaGenError, match=r"--against no_such_module:f: importing no_such_module raised ModuleNotF"):
        bench_baselines.named("no_such_module:f")
    (tmp_path / "broken_baseline.py").write_text("1 / 0")
    with pytest.raises(LlsaGenError, match="importing broken_baseline raised ZeroDivisionError"):
        bench_baselines.named("broken_baseline:f")
    (tmp_path / "leaving_baseline.py").write_text("raise SystemExit('x' * 10**6)")
    with pytest.raises(LlsaGenError, match="importing leaving_baseline raised SystemExit: xxx") as caught:
        bench_baselines.named("leaving_baseline:f")
    assert len(str(caught.value)) < 1000


def test_a_backward_that_fails_leaves_one_cell_empty(baselines: str) -> None:
    rows = call(f"{CPU} -n 20 --against {baselines}:one_way --json -").json
    row = rows[-1]
    assert row["forward"]["median_ms"] > 0 and row["forward_backward"] is None
    assert row["missing"]["forward_backward"] == "backward raised RuntimeError: no way back"
    assert (
        "dense_attention:one_way at 20 tokens: backward raised"
        in call(f"{CPU} -n 20 --against {baselines}:one_way").out
    )


def test_a_baseline_without_memory_leaves_its_row_empty(baselines: str) -> None:
    row = call(f"{CPU} -n 20 --against {baselines}:full --json -").json[-1]
    assert (row["forward"], row["forward_backward"]) == (None, None)
    assert row["missing"] == dict.fromkeys(bench_cell.MEASURED, "not available: OutOfMemoryError: full")


def test_a_backend_that_refuses_is_told_with_its_reason(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench_baselines.SDPBackend.CUDNN_ATTENTION
    refusing = bench_baselines.Implementation("sdpa-cudnn", "dense", bench_baselines._attend, backend)
    monkeypatch.setattr(bench_baselines, "dense", lambda *_: (refusing,))
    result = call(f"{CPU} -n 20")
    assert result.code == 0
    assert "sdpa-cudnn at 20 tokens: not available: RuntimeError: No" in result.out


def test_backends_by_device_and_dtype() -> None:
    def names(*where: str) -> list[str]:
        return [one.name for one in bench_baselines.dense(*where)]

    assert names("cpu", "float32") == ["sdpa"]
    assert names("cuda:1", "bfloat16") == ["sdpa-flash", "sdpa-cudnn"]
    assert names("cuda", "float32") == ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]


# ---- timing ---------------------------------------------------------------------------------------------------------


class Watch:
    """A stopwatch that shows what it is told to, and counts calls; time does not pass."""

    def __init__(self, first: float, *then: float) -> None:
        self.first, self.then, self.calls, self.batches = first, then, 0, []

    def flush(self) -> None:
        pass

    def samples(self, calls: Sequence[Call]) -> list[float]:
        self.batches.append(len(calls))
        found = []
        for one in calls:
            with one.around():
                one.run()
            found.append(self.then[self.calls % len(self.then)] if self.then else self.first)
            self.calls += 1
        return found


def timed(watch: Watch, repeats: int | None = None) -> Timing:
    """What a call that does nothing takes."""
    (found,) = bench_timing.measure(watch, [Call(lambda: None)], repeats)
    assert isinstance(found, Timing)
    return found


@given(st.floats(1e-4, 1e6))
def test_repeats_keep_to_the_budget(milliseconds: float) -> None:
    repeats = bench_timing.repeats_for(milliseconds)
    assert bench_timing.LEAST <= repeats <= bench_timing.MOST
    assert repeats * milliseconds <= bench_timing.BUDGET_MS or repeats == bench_timing.LEAST


def test_a_slow_call_is_made_a_few_times_and_a_fast_one_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "BUDGET_MS", 500.0)
    slow, fast = Watch(1500.0), Watch(5.0)
    assert timed(slow).repeats == 3
    assert slow.batches == [1, 1, 3]
    timing = timed(fast)
    assert (timing.repeats, timing.median_ms, timing.p20_ms, timing.p80_ms) == (100, 5.0, 5.0, 5.0)
    assert fast.batches == [1, 1, 10, 100]


def test_median_and_percentiles_are_those_of_the_last_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "BUDGET_MS", 500.0)
    timing = timed(Watch(0, 900.0, 100.0, 50.0, 10.0, 40.0, 20.0, 30.0))
    assert (timing.repeats, timing.median_ms) == (5, 30.0)
    assert (timing.p20_ms, timing.p80_ms) == (pytest.approx(18.0), pytest.approx(42.0))


def test_the_cpu_is_timed_by_the_wall() -> None:
    watch = bench_timing.CpuStopwatch()
    calls: list[int] = []
    samples = watch.samples([Call(lambda: calls.append(len(calls)))] * 4)
    assert calls == [0, 1, 2, 3] and all(0 < sample < 1000 for sample in samples)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_field_is_filled_on_a_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "BUDGET_MS", 100.0)
    spec = ROOT / "spec" / "llsa_l2.yaml"
    result = call(f"bench {spec} -n 4096 --mode eager --mode graph --device cuda --json rows.json --plot p.png")
    assert result.code == 0, result.err
    rows = read([place / "rows.json"])
    assert [(row.implementation, row.mode) for row in rows] == [
        (name, mode) for name in ("llsa_gen", "sdpa-flash", "sdpa-cudnn") for mode in ("eager", "graph")
    ]
    for row in rows:
        assert row.missing == {}, row.implementation
        assert row.machine.device == torch.cuda.get_device_name() and row.machine.driver
        assert row.forward is not None and row.forward_backward is not None and row.memory is not None
        assert row.forward.median_ms < row.forward_backward.median_ms
        assert row.host_us is not None and row.host_us > 0
        assert row.error is not None and row.error <= 1
        assert 1 <= row.memory.ratio < 3
    ours = rows[1]
    assert ours.breakdown is not None and ours.ceilings is not None
    assert ours.ceilings.bytes_per_s > 1e11 and ours.ceilings.flops_per_s > 1e13
    profiled = {kernel.kernel.replace("_hopper_", "_"): kernel for kernel in ours.breakdown}
    for name in ("pool_l1_kernel", "attend_kernel", "grad_q_kernel", "grad_kv_l0_kernel"):
        kernel = profiled[name]
        assert kernel.launches == 1 and kernel.us > 0 and kernel.flops and kernel.moved_bytes
        # some work fits into a cache that a copy of a gigabyte does not
        assert kernel.roofline is not None and 0 < kernel.roofline < 2
    assert not any("bitwise_not" in name for name in profiled), "what drives out the caches is no kernel of ours"
    assert sum(kernel.share for kernel in ours.breakdown) == pytest.approx(1)
    kernels_ms = sum(kernel.us for kernel in ours.breakdown) / 1e3
    assert ours.forward_backward is not None and 0.5 < kernels_ms / ours.forward_backward.median_ms < 2
    assert "of the roofline" in result.out
    assert json.loads((place / "rows.json").read_text())[0]["dtype"] == "bfloat16"
