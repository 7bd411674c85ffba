"""The search for tile shapes without a GPU: what is tried, who wins, what is kept; the rows of the user's own."""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import spec
from llsa_gen import Spec, aot, compile, fuzz, load
from llsa_gen.aot.launches import record
from llsa_gen.compiler import explain_miss
from llsa_gen.emit import golden
from llsa_gen.errors import DeviceLost, LlsaGenError, ScheduleTableError
from llsa_gen.fuzz.case import Case
from llsa_gen.plan import Plan, lower
from llsa_gen.runtime.backend import in_triton
from llsa_gen.schedule import Entry, Schedule, schedule, targets
from llsa_gen.schedule.fit import misfit
from llsa_gen.store import Store, tuned
from llsa_gen.tune import tune
from llsa_gen.tune.bench import DeviceBench, kernels_of
from llsa_gen.tune.candidates import candidates
from llsa_gen.tune.search import StageResult, search

ROOT = Path(__file__).resolve().parents[2]
SMALL = spec("small", 16, (4, 2), (3, 2))
TRIALS = 5
"""Of a search in the interpreter, where each takes a second or more: the third of these tiles wins."""
L2 = load(ROOT / "spec" / "llsa_l2.yaml")
GOAL = targets()["cuda:90"]


class Fake:
    """A bench that computes nothing: `times` and `wrong` say what an entry comes to."""

    def __init__(
        self,
        times: Callable[[str, Entry], float] = lambda stage, entry: 100.0,
        wrong: Callable[[Entry], str | None] = lambda entry: None,
        verdict: Callable[[Schedule], str | None] = lambda entries: None,
    ) -> None:
        self.times, self.wrong, self.verdict = times, wrong, verdict
        self.timed: list[Entry] = []
        self.checked: list[Entry] = []
        self.verified: list[Schedule] = []

    def check(self, stage: str, entry: Entry) -> str | None:
        self.checked.append(entry)
        return self.wrong(entry)

    def microseconds(self, stage: str, entry: Entry) -> float:
        self.timed.append(entry)
        return self.times(stage, entry)

    def verify(self, entries: Schedule) -> str | None:
        self.verified.append(entries)
        return self.verdict(entries)


def run(bench: Fake, *stages: str, chosen: Spec = L2, **more: Any) -> list[StageResult]:
    plan = lower(chosen)
    present = schedule(plan, targets()["cuda:80"], 2)
    options: dict[str, Any] = {"element": 2, "goal": GOAL, "seconds": 60.0} | more
    return search(plan, present, stages, bench, **options)


def reasons(result: StageResult) -> list[str]:
    return [trial.reason for trial in result.trials if trial.reason is not None]


# ---- what to try ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llsa_l2", "topk_b128", "llsa_d128", "uneven"])
def test_candidates_are_near_and_can_be_launched(name: str) -> None:
    plan = lower(load(ROOT / "spec" / f"{name}.yaml"))
    for stage, entry in schedule(plan, targets()["cuda:90"], 2).items():
        found = list(candidates(plan, stage, entry, 2, GOAL))
        legal = [one.entry for one in found if one.reason is None]
        assert legal, stage
        # what the kernel in Gluon has no tiles for is in Triton, with the register cap of that kernel
        near = [entry if "backend" in one else in_triton(entry) for one in legal]
        changes = [sum(one[key] != other[key] for key in one) for one, other in zip(legal, near, strict=True)]
        assert changes == sorted(changes) and {1} <= set(changes) <= {1, 2}
        for one in legal:
            assert list(one) == [key for key in entry if key in one], "in the order of the launch"
            assert {*one} == {*(entry if "backend" in one else in_triton(entry))}
            assert misfit(plan, stage, entry, one, 2, GOAL) is None
            assert {key: one[key] for key in ("KEEP",) if key in one} == {
                key: entry[key] for key in ("KEEP",) if key in one
            }


def test_every_candidate_in_gluon_is_launched_differently() -> None:
    plan = lower(L2)
    attention, present = compile(L2), schedule(plan, targets()["cuda:90"], 2)

    def launched(stage: str, entry: Entry) -> list[object]:
        made = record(attention, 65_536, "bfloat16", "cuda:90", tiles={**present, stage: entry})
        shapes = [{name: x for name, x in launch.arguments.items() if name.isupper()} for launch in made]
        return [(launch.kernel, launch.grid, launch.options, one) for launch, one in zip(made, shapes, strict=True)]

    launches = {kernel.stage for kernel in plan.usual}
    stages = [stage for stage, entry in present.items() if "backend" in entry and stage in launches]
    assert len(stages) == 5
    for stage in stages:
        found = [one.entry for one in candidates(plan, stage, present[stage], 2, GOAL) if not one.reason]
        made = [launched(stage, entry) for entry in (present[stage], *found) if "backend" in entry]
        assert len(made) > 3 and all(one not in made[:at] for at, one in enumerate(made)), stage


def test_candidates_that_cannot_be_right_or_fast_are_left_out_with_a_reason() -> None:
    plan = lower(L2)
    entry = schedule(plan, targets()["cuda:90"], 2)["attend"]
    found = [one for one in candidates(plan, "attend", {**entry, "BLOCK_N": 256, "num_stages": 4}, 2, GOAL)]
    assert any(one.reason and "shared memory" in one.reason for one in found)
    assert all(one.reason for one in found if one.entry["BLOCK_M"] != 16)


def test_a_stage_is_timed_with_all_that_it_launches() -> None:
    plan = lower(L2)
    assert kernels_of(plan, "grad_kv_l0") == {"grad_kv_l0_kernel", "grad_kv_l0_overflow_kernel"}
    assert kernels_of(plan, "grad_kv_l2") == {"grad_kv_l2_kernel", "grad_kv_l2_sum_kernel"}
    assert kernels_of(plan, "attend") == {"attend_kernel"}
    assert kernels_of(lower(load(ROOT / "spec" / "llsa_l3.yaml")), "pool") == {"pool_l1_kernel"}
    for name in schedule(plan, targets()["cuda:90"], 2):
        assert kernels_of(plan, name), name


def test_a_launch_is_compiled_with_other_tile_shapes_than_the_modules() -> None:
    plan = lower(L2)
    entries = schedule(plan, targets()["cuda:90"], 2)
    entries["invert_l1"] = {**entries["invert_l1"], "BLOCK_M": 32, "num_warps": 8}
    (launch,) = [one for one in record(compile(L2), 4096, "bfloat16", "cuda:90", tiles=entries)
                 if one.kernel == "invert_l1_kernel"]  # fmt: skip
    report = aot.compile_launch(launch, "cuda:90", "bfloat16")
    assert (report.constexprs["BLOCK_M"], report.num_warps, report.fits) == (32, 8, True)


# ---- who wins ---------------------------------------------------------------------------------------------------


def test_the_search_climbs_to_the_fastest_and_no_time_counts_unchecked() -> None:
    def times(stage: str, entry: Entry) -> float:  # fastest at 128 keys and 8 warps, three and two steps away
        return 100 + 10 * abs(entry["BLOCK_N"] - 128) / 32 + 10 * abs(entry["num_warps"] - 8)

    bench = Fake(times)
    (result,) = run(bench, "attend")
    assert result.improved and (result.after["BLOCK_N"], result.after["num_warps"]) == (128, 8)
    assert result.before_us == times("attend", result.before) and result.after_us == 100
    timed = [trial.entry for trial in result.trials if trial.microseconds is not None]
    assert timed and all(entry in bench.checked for entry in timed)
    assert len(bench.checked) == len({str(entry) for entry in bench.checked}), "nothing is tried twice"
    assert bench.verified[-1]["attend"] == result.after


def test_a_candidate_with_wrong_results_never_wins() -> None:
    bench = Fake(
        times=lambda stage, entry: 1.0 if entry["BLOCK_C"] > 64 else 50.0 if entry["num_warps"] == 4 else 100.0,
        wrong=lambda entry: "o: a row is off" if entry["BLOCK_C"] > 64 else None,
    )
    (result,) = run(bench, "attend")
    assert result.improved and result.after["BLOCK_C"] <= 64 and result.after["num_warps"] == 4
    assert "wrong: o: a row is off" in reasons(result)
    assert all(entry["BLOCK_C"] <= 64 for entry in bench.timed)


def test_a_winner_that_the_reference_contradicts_gives_way_to_the_next() -> None:
    bench = Fake(
        times=lambda stage, entry: 90.0 / entry["num_warps"] if entry["num_warps"] > 2 else 100.0,
        verdict=lambda entries: "dq: error" if entries["attend"]["num_warps"] == 16 else None,
    )
    (result,) = run(bench, "attend")
    assert result.improved and result.after["num_warps"] == 8 and "wrong: dq: error" in reasons(result)
    bench.verdict = lambda entries: 1 / 0  # type: ignore[assignment,return-value]
    (result,) = run(bench, "attend")
    assert not result.improved and "wrong: ZeroDivisionError: division by zero" in reasons(result)


def test_failures_are_recorded_and_skipped() -> None:
    def wrong(entry: Entry) -> str | None:
        if entry["num_warps"] == 4:
            raise RuntimeError("out of resource: shared memory\nand a long story")
        return None

    (result,) = run(Fake(lambda stage, entry: 50.0 if entry["BLOCK_N"] == 32 else 100.0, wrong), "attend")
    assert result.improved and result.after["BLOCK_N"] == 32 and result.after["num_warps"] != 4
    assert "RuntimeError: out of resource: shared memory" in reasons(result)


def test_a_little_faster_is_noise() -> None:
    (result,) = run(Fake(lambda stage, entry: 98.0 if entry["num_warps"] == 4 else 100.0), "attend")
    assert not result.improved and result.after_us == result.before_us == 100.0
    first = iter([50.0])  # fast once, and never again

    def lucky(stage: str, entry: Entry) -> float:
        return next(first, 100.0) if entry["num_warps"] == 4 else 100.0

    (result,) = run(Fake(lucky), "attend")
    assert not result.improved


def test_the_time_is_shared_among_the_stages() -> None:
    now = [0.0]

    def times(stage: str, entry: Entry) -> float:
        now[0] += 1.0
        return 100.0

    shares: list[float] = []
    results = run(Fake(times), "attend", "grad_q", seconds=20.0, clock=lambda: now[0],
                  progress=lambda result, share: shares.append(share))  # fmt: skip
    tried = [sum(trial.microseconds is not None for trial in result.trials) for result in results]
    assert tried == [9, 9] and now[0] <= 22 and shares == sorted(shares)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceLost("an illegal address")])
def test_what_was_found_before_an_interrupt_is_kept(error: BaseException) -> None:
    def wrong(entry: Entry) -> str | None:
        if "BLOCK_N" in entry and entry["num_warps"] == 8:
            raise error
        return None

    def times(stage: str, entry: Entry) -> float:
        return 50.0 if "BLOCK_N" in entry and entry["num_warps"] == 4 else 100.0

    results = run(Fake(times, lambda entry: None), "attend")
    assert results[0].after["num_warps"] == 4
    bench = Fake(times, wrong)
    results = run(bench, "scan", "attend", "grad_q", seconds=1e9)
    assert [result.stage for result in results] == ["scan", "attend"]
    assert not results[0].improved
    if isinstance(error, KeyboardInterrupt):
        assert results[1].after["num_warps"] == 4, "confirmed, and kept"
    else:
        assert not results[1].improved and reasons(results[1])[-1].endswith("an illegal address")


# ---- what is kept -----------------------------------------------------------------------------------------------


def fast_with_4_warps(stage: str, entry: Entry) -> float:
    return 50.0 if entry["num_warps"] == 4 else 100.0


def tuned_report(store: Store, chosen: Spec = SMALL, **more: Any) -> Any:
    return tune(chosen, stages=["attend"], store=store, make_bench=lambda *_: Fake(fast_with_4_warps), **more)


def test_a_winner_is_stored_and_used_by_the_next_compile(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = compile(SMALL, store=store)
    report = tuned_report(store, n_tokens=100_000)
    assert report.path == tmp_path / "schedules" / "cuda_80.json", "the table that the interpreter's device uses"
    (row,) = report.rows
    assert (row["stage"], row["set"]["num_warps"]) == ("attend", 4)
    assert row["when"] == {"element": 2, "pad_dim": 16, "rows": 16, "grouped": True}
    assert {"gpu", "date", "before_us", "after_us", "spec"} <= row["measured"].keys()
    assert row["measured"]["n_tokens"] == 100_000, "a row holds for every length, and says which it was measured at"
    miss = explain_miss(SMALL, store)
    assert miss.outcome == "differs" and [difference.part for difference in miss.differences] == ["schedule"]
    after = compile(SMALL, store=store)
    assert after.source != before.source
    by_size = after.module.SCHEDULES["cuda:80"]
    assert {size: tiles["attend"]["num_warps"] == 4 for size, tiles in by_size.items()} == {2: True, 4: False}
    assert compile(SMALL, store=Store(tmp_path / "elsewhere")).source == before.source
    assert golden.check(golden.files(golden.modules())) == [], "what is committed does not depend on a machine"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"backend": "gluon_sm90", "maxnreg": 255}, {"backend": "gluon_sm90", "maxnreg": 255}),
        ({"num_warps": 8}, {"backend": "triton", "maxnreg": 128, "num_warps": 8}),
        # in two steps: the tiles of the kernel in Gluon again, but measured in Triton
        ({"num_warps": 4, "BLOCK_C": 64}, {"backend": "triton", "maxnreg": 128, "num_warps": 4, "BLOCK_C": 64}),
    ],
)
def test_a_row_names_the_backend_that_was_measured(
    wanted: Entry, told: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = schedule(lower(L2), GOAL, 2)["grad_q"]
    winner = {**(present if "backend" in wanted else in_triton(present)), **wanted}

    def found(plan: Plan, entries: Schedule, *_: object, **__: object) -> list[StageResult]:
        return [StageResult("grad_q", entries["grad_q"], 100.0, winner, 50.0)]

    store = Store(tmp_path)
    module = compile(L2, store=store).module
    monkeypatch.setattr(module, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr("llsa_gen.tune.tuner.search", found)
    report = tune(L2, stages=["grad_q"], store=store, make_bench=lambda *_: Fake())
    assert told.items() <= report.rows[0]["set"].items()
    assert schedule(lower(L2), tuned.targets(store)["cuda:90"], 2)["grad_q"] == winner


def test_rows_of_the_same_facts_take_each_others_place(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tuned_report(store)
    tuned_report(store, dtype="float32")
    assert [row.when["element"] for row in tuned.targets(store)["cuda:80"].rows] == [2, 4]
    row = json.loads(tuned.files(store)[0].read_text())["rows"][0]
    tuned.add(store, "cuda:80", [{**row, "set": {"num_warps": 2}}])
    rows = tuned.targets(store)["cuda:80"].rows
    assert len(rows) == 2 and rows[-1].set == {"num_warps": 2}
    assert tuned.remove(store) == 1 and tuned.files(store) == []


def test_a_store_that_can_keep_nothing_is_told_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "schedules").write_text("a file")
    with pytest.raises(NotADirectoryError):
        tune(SMALL, store=Store(tmp_path), make_bench=lambda *_: pytest.fail("nothing is searched"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["schedules"], "nor left behind"


def test_rows_that_can_not_be_stored_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cuda_80.json")

    monkeypatch.setattr(tuned, "write_whole", full)
    report = tuned_report(Store(tmp_path))
    assert (report.path, report.unsaved) == (None, "cuda_80.json: No space left on device")
    assert [row["set"]["num_warps"] for row in report.rows] == [4]


def test_a_present_entry_that_does_not_run_keeps_the_stages_before() -> None:
    def times(stage: str, entry: Entry) -> float:
        if stage == "grad_q":
            raise torch.OutOfMemoryError("full")
        return fast_with_4_warps(stage, entry)

    results = run(Fake(times), "attend", "grad_q", "scan", seconds=1e9)
    assert [result.stage for result in results] == ["attend"] and results[0].improved
    assert reasons(results[0])[-1] == "the search ended here: OutOfMemoryError: full"
    with pytest.raises(torch.OutOfMemoryError):
        run(Fake(times), "grad_q")


def test_nothing_better_stores_nothing(tmp_path: Path) -> None:
    report = tune(SMALL, stages=["attend"], store=Store(tmp_path), make_bench=lambda *_: Fake())
    assert report.rows == () and report.path is None and not (tmp_path / "schedules").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"target": "cuda:90"}', '{"target": "cuda:80", "rows": [{}]}', "\x00", "{" * 9]
)
def test_a_broken_file_is_reported_and_ignored(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = tuned.path(store, "cuda:80")
    file.parent.mkdir()
    file.write_text(text)
    tuned._told.clear()
    with pytest.warns(RuntimeWarning, match="tuned schedules are ignored: .*cuda_80.json"):
        attention = compile(SMALL, store=store)
    assert attention.source == compile(SMALL, store=Store(tmp_path / "elsewhere")).source
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(SMALL, store=store)  # told once
    with pytest.warns(RuntimeWarning, match="set aside as cuda_80.json.broken"):
        tuned_report(store)
    assert file.with_name("cuda_80.json.broken").read_text() == text
    assert len(tuned.targets(store)["cuda:80"].rows) == 1


def test_rows_that_no_table_may_hold_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ScheduleTableError, match="got 48"):
        tuned.add(Store(tmp_path), "cuda:90", [{"stage": "attend", "when": {}, "set": {"BLOCK_N": 48}, "why": "no"}])
    assert tuned.files(Store(tmp_path)) == []


def test_what_cannot_be_tuned_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LlsaGenError, match="tune: expected a CUDA or ROCm GPU to measure on, and torch finds none"):
        tune(SMALL, store=store)
    with pytest.raises(LlsaGenError, match=r"stage: expected one of pool, select_l1, .* got 'atend'"):
        tune(SMALL, stages=["atend"], store=store, make_bench=lambda *_: Fake())
    with pytest.raises(LlsaGenError, match="n: expected 1 to"):
        tune(SMALL, n_tokens=2**31, store=store, make_bench=lambda *_: Fake())


# ---- right or wrong, in the interpreter -------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_entries_are_checked_with_the_kernels_themselves(dtype: Any) -> None:
    plan, element = lower(SMALL), 4 if dtype == "float32" else 2
    present = schedule(plan, targets()["cuda:80"], element)
    bench = DeviceBench(
        compile(SMALL), present, [Case(SMALL, 29, dtype=dtype)], 29, dtype, "cuda:80", device="cpu", batch=1, heads=1
    )
    plans = compile(SMALL).module.launch_plan
    before = plans.cache_info()
    for stage in ("attend", "grad_q", "grad_kv_l0", "grad_kv_l2", "select_l1", "scan", "pool"):
        legal = [one.entry for one in candidates(plan, stage, present[stage], element, GOAL) if one.reason is None]
        tiles = [entry for entry in legal if entry | {"num_warps": 1} != present[stage] | {"num_warps": 1}]
        assert bench.check(stage, tiles[0]) is None, stage
    assert bench.verify(present) is None
    # tiles of 2 rows for blocks of 4: half of the rows are not written
    assert bench.check("attend", {**present["attend"], "BLOCK_M": 2}) is not None
    assert bench.verify({**present, "attend": {**present["attend"], "BLOCK_M": 2}}) is not None
    assert plans.cache_info() == before, "what the operator uses knows nothing of such tiles"


@pytest.mark.interpret
def test_a_search_whose_times_alone_are_invented(tmp_path: Path) -> None:
    tried: list[Entry] = []  # by their number the time goes by: how many fit into seconds is a matter of the machine

    class Invented(DeviceBench):
        def check(self, stage: str, entry: Entry) -> str | None:
            tried.append(entry)
            return super().check(stage, entry)

        def microseconds(self, stage: str, entry: Entry) -> float:
            return {32: 10.0, 128: 50.0}.get(entry["BLOCK_C"], 100.0)

        def _run(self, tiles: Schedule, inputs: Any, scale: float) -> Any:
            found, launches = super()._run(tiles, inputs, scale)
            if tiles["attend"]["BLOCK_C"] == 32:  # the fastest are wrong, in one row
                found["o"][0, 0, -1] *= 1.5
            return found, launches

    def make(attention: Any, present: Schedule, target: str) -> Invented:
        return Invented(attention, present, [Case(SMALL, 29, dtype="float16")], 29, "float16", target,
                        device="cpu", batch=1, heads=1)  # fmt: skip

    store = Store(tmp_path)
    report = tune(
        SMALL, n_tokens=29, dtype="float16", stages=["attend"], seconds=TRIALS, store=store,
        make_bench=make, clock=lambda: float(len(tried)),
    )  # fmt: skip
    (result,) = report.results
    assert result.improved and result.after["BLOCK_C"] == 128
    wrong = [trial for trial in result.trials if trial.entry["BLOCK_C"] == 32]
    assert any("o: a row is off by" in str(trial.reason) for trial in wrong)
    assert all(trial.microseconds is None for trial in wrong)
    attention, case = compile(SMALL, store=store), Case(SMALL, 29, dtype="float16")
    target = attention.module.target_of(torch.device("cpu"))
    assert attention.module.schedule_for(target, torch.float16)["attend"] == result.after
    found = fuzz.attend(attention, case, *case.tensors())
    kept = [found[f"kept_l{level}"] for level in (1, 2)]
    assert fuzz.compare(case, case.tensors(), kept, found)[0] == []


# ---- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_stage_is_tuned_on_the_gpu(tmp_path: Path) -> None:
    """In a process of its own: the tuned rows come from the environment's cache, as a user's do."""
    code = (
        "import llsa_gen, json; from llsa_gen import fuzz, load\n"
        "from llsa_gen.tune import tune\n"
        f"spec = load({str(ROOT / 'spec' / 'llsa_l2.yaml')!r})\n"
        "report = tune(spec, n_tokens=8192, stages=['grad_kv_l0'], seconds=40)\n"
        "(result,) = report.results\n"
        "assert result.before_us > 0 and result.trials\n"
        "timed = [trial for trial in result.trials if trial.microseconds is not None]\n"
        "assert timed, [trial.reason for trial in result.trials]\n"
        "module = llsa_gen.compile(spec).module\n"
        "import torch\n"
        "target = module.target_of(torch.device('cuda'))\n"
        "tiles = module.schedule_for(target, torch.bfloat16)\n"
        "assert tiles['grad_kv_l0'] == result.after\n"
        "for n in (8192, 1021):\n"
        "    fuzz.run(fuzz.Case(spec, n=n, heads=2, dtype='bfloat16', device='cuda')).raise_if_failed()\n"
        "print(json.dumps([result.before_us, result.after_us, len(timed)]))\n"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"LLSA_GEN_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
