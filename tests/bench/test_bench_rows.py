"""What is made of rows: stored and read back, tables, the plot; what is made of a profile; all without measuring."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from bench_examples import CEILINGS, MACHINE, SPECS, h100, row
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib import image
from rich.console import Console

from llsa_gen import compile
from llsa_gen.aot import record
from llsa_gen.bench import machine as bench_machine
from llsa_gen.bench import plot as bench_plot
from llsa_gen.bench.kernels import Event, Work, breakdown, work
from llsa_gen.bench.plot import NEAREST, best, lines, spread
from llsa_gen.bench.rows import Row, dumps, label, read
from llsa_gen.bench.table import fastest_dense, tables
from llsa_gen.errors import LlsaGenError
from llsa_gen.plan import lower
from llsa_gen.plan.cost import Cost, evaluate
from llsa_gen.schedule import schedule, target

times = st.one_of(st.none(), st.floats(1e-3, 1e5))
drawn_rows = st.builds(
    lambda n, forward, both, kind, mode, levels: row(
        n, forward, both, kind=kind, mode=mode, spec=SPECS[levels], implementation=kind
    ),
    st.integers(1, 1 << 22), times, times, st.sampled_from(["ours", "dense", "other"]),
    st.sampled_from(["eager", "graph"]), st.sampled_from([2, 3]),
)  # fmt: skip


# ---- stored ---------------------------------------------------------------------------------------------------------


@given(st.lists(drawn_rows, max_size=5))
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(dumps(rows))
    assert read([path, path]) == (*rows, *rows)


def test_a_row_can_be_read_alone() -> None:
    told = json.loads(dumps(h100()))[0]
    assert told["machine"] == {
        "device": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "llsa_gen": "0.1.0", "torch": "2.11.0+cu130",
        "triton": "3.6.0", "python": "3.12.3", "commit": MACHINE.commit, "dirty": False,
    }  # fmt: skip
    assert json.loads(told["spec"])["name"] == "llsa_l2" and told["digest"] == SPECS[2].digest
    assert (told["n_tokens"], told["batch"], told["heads"], told["head_dim"]) == (4096, 2, 4, 64)
    assert (told["dtype"], told["mode"], told["implementation"]) == ("bfloat16", "graph", "llsa_gen")
    assert set(told["forward"]) == {"median_ms", "p20_ms", "p80_ms", "repeats"}
    assert told["breakdown"][0]["kernel"] == "attend_kernel" and told["ceilings"]["bytes_per_s"] == 3e12


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"date": "today"}]', dumps(h100()).replace('"mode"', '"mood"')])
def test_a_file_of_something_else_is_one_message(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(LlsaGenError, match=r"other\.json: expected rows as `llsa-gen bench --json` writes them, got"):
        read([path])


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


def test_the_commit_is_that_of_the_package_and_of_no_folder_around_it(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "llsa_gen").mkdir(parents=True)
    assert bench_machine.commit(root) == (None, None)
    git(root, "init", "-q")
    assert bench_machine.commit(root) == (None, None), "nothing is committed"
    (root / "llsa_gen" / "x.py").write_text("")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    sha, dirty = bench_machine.commit(root)
    assert sha and len(sha) == 40 and dirty is False
    (root / "notes.txt").write_text("")
    assert bench_machine.commit(root) == (sha, False), "which does not run"
    (root / "llsa_gen" / "y.py").write_text("")
    assert bench_machine.commit(root) == (sha, True)
    assert bench_machine.commit(root / "llsa_gen") == (None, None), "a folder in a checkout is none"


# ---- tables ---------------------------------------------------------------------------------------------------------


def printed(rows: tuple[Row, ...]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables(rows))
    return capture.get()


def test_the_table_says_what_the_rows_say() -> None:
    text = printed(h100())
    for said in (
        "NVIDIA H100 80GB HBM3, driver 580.159.04", "(7cdd7579ba)", "B=2, H=4, D=64, bfloat16, CUDA graph replay",
        "65,536", "llsa_l2", "llsa_l3", "sdpa-cudnn", "sla:attend", "28.8", "735/212", "(1.25x)", "3.00 TB/s copied",
        "attend_kernel", "69.0 GFLOP", "18%", "sdpa-flash at 262,144 tokens: backward raised OutOfMemoryError",
    ):  # fmt: skip
        assert said in text, said
    assert "and changes" not in text
    changed = MACHINE.model_copy(update={"dirty": True})
    assert "(7cdd7579ba and changes)" in printed((row(64, 1.0, None, machine=changed),))


def test_ratios_are_to_the_fastest_dense_attention_of_the_same_run() -> None:
    ours = row(4096, 1.0, 4.0)
    baselines = [
        row(4096, 6.0, 9.0, kind="dense", implementation="a"),
        row(4096, 5.0, None, kind="dense", implementation="b"),
    ]
    others = [
        row(4096, 0.1, 0.1, kind="other", implementation="c"),
        row(4096, 0.1, 0.1, kind="dense", mode="eager"),
        row(4096, 0.1, 0.1, kind="dense", dtype="float32"),
        row(4096, 0.1, 0.1, kind="dense", date="2026-11-24T00:00:00+00:00"),
        row(4097, 0.1, 0.1, kind="dense"),
        row(4096, 0.1, 0.1, kind="dense", batch=1),
    ]
    assert fastest_dense([ours, *others, *baselines], ours, "forward") == 5.0
    assert fastest_dense([ours, *others, *baselines], ours, "forward_backward") == 9.0
    assert fastest_dense([ours, *others], ours, "forward") is None


@given(st.lists(drawn_rows, max_size=6))
def test_any_rows_make_a_table(rows: list[Row]) -> None:
    text = printed(tuple(rows))
    assert all(f"{one.n_tokens:,}" in text and label(one) in text for one in rows)


# ---- the plot -------------------------------------------------------------------------------------------------------


def test_lines_are_implementations_with_dense_first_and_ours_on_top() -> None:
    found = {line.name: line for line in lines(h100(), "forward")}
    assert list(found) == ["sdpa-flash", "sdpa-cudnn", "sla:attend", "llsa_l2", "llsa_l3"]
    assert found["llsa_l3"].points == ((262144, 2.66), (1048576, 10.9))
    assert found["llsa_l2"].ratios[65536] == pytest.approx(19.6 / 0.68)
    assert [n for n, _ in {line.name: line for line in lines(h100(), "forward_backward")}["sdpa-cudnn"].points] == [
        4096, 16384, 65536,
    ]  # fmt: skip
    assert [(n, ms) for n, ms, _ in best(list(found.values()))][-1] == (262144, 2.66)


def test_a_graph_counts_where_both_were_measured() -> None:
    eager, graph = row(64, 3.0, 3.0, mode="eager"), row(64, 2.0, 2.0, mode="graph")
    for rows in ((eager, graph), (graph, eager)):
        (line,) = lines(rows, "forward")
        assert line.points == ((64, 2.0),)
    (line,) = lines((eager, row(128, 1.0, 1.0)), "forward")
    assert line.points == ((64, 3.0), (128, 1.0))


def test_lines_of_several_dtypes_and_shapes_are_told_apart() -> None:
    rows = (row(64, 1.0, 1.0), row(64, 2.0, 2.0, dtype="float32"), row(64, 3.0, 3.0, batch=1))
    assert {line.name for line in lines(rows, "forward")} == {
        "llsa_l2 bfloat16 B=2 H=4 D=64", "llsa_l2 float32 B=2 H=4 D=64", "llsa_l2 bfloat16 B=1 H=4 D=64",
    }  # fmt: skip
    rows = (row(64, 1.0, 1.0), row(64, 2.0, 2.0, m_tokens=7))
    assert {line.name for line in lines(rows, "forward")} == {"llsa_l2 B=2 H=4 D=64", "llsa_l2 B=2 H=4 D=64 M=7"}


def test_dense_attention_of_as_many_queries_is_compared_with() -> None:
    ours = row(64, 1.0, 1.0, m_tokens=7)
    others = [row(64, ms, ms, kind="dense", m_tokens=m) for ms, m in ((3.0, None), (4.0, 8), (5.0, 7))]
    assert fastest_dense([ours, *others], ours, "forward") == 5.0
    assert fastest_dense([ours, *others], row(64, 1.0, 1.0), "forward") == 3.0


def test_rows_without_a_number_of_queries_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(dumps(h100()).replace(' "m_tokens": null,\n', ""))
    assert read([tmp_path / "old.json"]) == h100()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted))
def test_names_are_kept_apart(heights: list[float]) -> None:
    places = spread(heights)
    assert all(high - low >= NEAREST - 1e-9 for low, high in pairwise(places))
    assert sum(places) == pytest.approx(sum(heights))
    roomy = all(high - low >= NEAREST for low, high in pairwise(heights))
    assert not roomy or places == pytest.approx(heights)


@pytest.mark.parametrize("rows", [h100(), (row(64, 1.0, None),), (row(64, None, 2.0, mode="eager"),)])
def test_a_plot_is_drawn(rows: tuple[Row, ...], tmp_path: Path) -> None:
    bench_plot.draw(rows, tmp_path / "plot.png")
    assert image.imread(tmp_path / "plot.png").shape[:2] == (bench_plot.HEIGHT, bench_plot.WIDTH)


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one with a time"):
        bench_plot.draw((row(64, None, None),), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_a_profile_becomes_kernels_beside_the_roofline() -> None:
    long = "void at::native::" + "x" * 100
    happened = [Event("attend_kernel", 30.0), Event("scan_kernel", 1.0), Event("scan_kernel", 3.0), Event(long, 6.0)]
    needed = {
        "attend_kernel": Work(flops=int(744e6 * 6), moved_bytes=int(3e6 * 3)),  # 6 us of products, 3 us of copying
        "scan_kernel": Work(flops=0, moved_bytes=int(3e6 * 1)),
        "never_launched": Work(1, 1),
    }
    attend, fill, scan = breakdown(happened * 2, 2, needed, CEILINGS)
    assert (attend.kernel, attend.launches, attend.us, attend.share) == ("attend_kernel", 1, 30.0, 0.75)
    assert attend.roofline == pytest.approx(6 / 30)
    assert (scan.launches, scan.us, scan.flops, scan.moved_bytes) == (2, 4.0, 0, 3_000_000)
    assert scan.roofline == pytest.approx(1 / 4)
    assert len(fill.kernel) == 60 and (fill.flops, fill.moved_bytes, fill.roofline) == (None, None, None)
    assert breakdown([], 2, needed, CEILINGS) == ()


@given(st.lists(st.builds(Event, st.sampled_from("abc"), st.floats(0, 1e4))), st.integers(1, 5))
@example([Event("a", 5e-324)], 2)  # the smallest number there is: half of it is zero
def test_nothing_of_a_profile_is_lost(happened: list[Event], passes: int) -> None:
    rows = breakdown(happened, passes, {"a": Work(1, 1)}, CEILINGS)
    assert sum(one.us for one in rows) * passes == pytest.approx(sum(event.us for event in happened))
    assert sum(one.launches for one in rows) * passes == pytest.approx(len(happened))
    assert [one.us for one in rows] == sorted((one.us for one in rows), reverse=True)
    spent = sum(event.us for event in happened)
    assert sum(one.share for one in rows) == pytest.approx(1 if spent else 0)


@pytest.mark.parametrize("levels", [2, 3])
def test_the_work_of_the_kernels_is_that_of_the_cost_model(levels: int) -> None:
    plan = lower(SPECS[levels])
    cost = Cost(plan, schedule(plan, target("cuda:90"), 2))
    needed, totals = work(cost, 65_536, 8), cost.totals
    assert set(needed) == {kernel.name for kernel in plan.usual}
    assert sum(one.flops for one in needed.values()) == evaluate(totals.flops, 65_536, 8)
    moved = totals.forward.moved + totals.backward.moved
    assert sum(one.moved_bytes for one in needed.values()) == evaluate(moved, 65_536, 8)
    needed = work(cost, 65_536, 8, m_tokens=777)
    assert sum(one.flops for one in needed.values()) == evaluate(totals.flops, 65_536, 8, 777)
    assert sum(one.moved_bytes for one in needed.values()) == evaluate(moved, 65_536, 8, 777)


def test_the_work_of_a_kernel_in_gluon_is_that_of_the_one_whose_place_it_takes() -> None:
    attention = compile(Path(__file__).resolve().parents[2] / "spec" / "llsa_l2.yaml")
    plan = lower(attention.spec)
    cost = Cost(plan, schedule(plan, target("cuda:90"), 2))
    needed = work(cost, 65_535, 8, record(attention, 65_535, "bfloat16", "cuda:90"))
    assert needed["attend_hopper_kernel"] == needed["attend_kernel"] != needed["grad_q_kernel"]
    assert needed["grad_kv_l0_hopper_kernel"] == needed["grad_kv_l0_kernel"]
    assert "attend_hopper_recompute_kernel" not in needed, "it has nothing to do, as a rule"
