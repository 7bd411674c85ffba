"""Tuned tables that hold anything, or are no files: ignored with one warning, whatever it is."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llsa_gen import Level, Spec, compile
from llsa_gen.errors import ScheduleTableError
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
from llsa_gen.schedule.table import BACKENDS, FACTS, LIMITS, STAGES, parse
from llsa_gen.schedule.table import targets as shipped
from llsa_gen.store import Store, tuned

SPEC = Spec(name="tuned", head_dim=16, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))
PLAN = lower(SPEC)
ROW = {"stage": "attend", "when": {}, "set": {"num_warps": 2}, "why": "a test"}
MEASURED = {"gpu": "A GPU", "date": "2026-11-29", "before_us": 2.0, "after_us": 1.0}


def table(**changes: Any) -> dict[str, Any]:
    """A good table whose only row differs in something."""
    return {"target": "cuda:80", "rows": [ROW | changes]}


def measured(**changes: Any) -> dict[str, Any]:
    row = {name: value for name, value in ROW.items() if name != "why"}
    return {"target": "cuda:80", "rows": [row | {"measured": MEASURED | changes}]}


def nested(depth: int, inside: str = "") -> str:
    return "[" * depth + inside + "]" * depth


BROKEN: dict[str, bytes] = {
    "nested lists": nested(100_000).encode(),
    "nested objects": ('{"rows": ' * 100_000).encode(),
    "a nested target": f'{{"target": {nested(100_000)}}}'.encode(),
    "a nested row": f'{{"target": "cuda:80", "rows": {nested(100_000)}}}'.encode(),
    "not UTF-8": b'{"target": "cuda:80\xff", "rows": []}',
    "half a character": json.dumps(measured(gpu="\ud800")).encode(),
    "a number of a million digits": b'{"target": "cuda:80", "shared_memory": ' + b"9" * 10**6 + b"}",
    "a number of 4000 digits": json.dumps(measured(before_us=10**4000)).encode(),
    "NaN": json.dumps(measured(before_us=float("nan"))).encode(),
    "an infinite time": json.dumps(measured(after_us=float("inf"))).encode(),
    "numbers as rows": b'{"target": "cuda:80", "rows": [1, null]}',
    "a true stage": json.dumps(table(stage=True)).encode(),
    "a list as a stage": json.dumps(table(stage=[])).encode(),
    "a field of an older version": json.dumps(table(set={"HOPPER": 128})).encode(),
    "a fact of an older version": json.dumps(table(when={"element": 2, "length": "long"})).encode(),
    "another target": b'{"target": "cuda:90", "rows": []}',
    "five mebibytes": b" " * (5 * 2**20),
}

NO_FILES: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a dangling link": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a huge file": lambda file: file.touch() or os.truncate(file, 2**40),
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table of a target belongs, in a process that has not complained yet."""
    monkeypatch.setattr(tuned, "_told", set())
    file = tuned.path(Store(tmp_path), "cuda:80")
    file.parent.mkdir()
    return file


def check_ignored(file: Path) -> None:
    store = Store(file.parent.parent)
    with pytest.warns(RuntimeWarning, match=r"tuned schedules are ignored: .*cuda_80\.json") as caught:
        attention = compile(SPEC, store=store)
    assert len(caught) == 1 and len(str(caught[0].message)) < 1000 + len(str(file))
    assert attention.source == compile(SPEC, store=Store(file.parent.parent / "elsewhere")).source
    assert tuned.files(store) == [file]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.targets(store) == shipped()  # told once
    with pytest.warns(RuntimeWarning, match=r"set aside as cuda_80\.json\.broken"):
        tuned.add(store, "cuda:80", [ROW])
    assert os.path.lexists(file.with_name("cuda_80.json.broken"))
    assert tuned.targets(store)["cuda:80"].rows[-1].set == ROW["set"]


@pytest.mark.parametrize("content", BROKEN)
def test_any_broken_content_is_ignored_with_one_warning(content: str, file: Path) -> None:
    file.write_bytes(BROKEN[content])
    check_ignored(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such things here")
@pytest.mark.parametrize("occupant", NO_FILES)
def test_what_is_no_file_is_ignored_with_one_warning(occupant: str, file: Path) -> None:
    NO_FILES[occupant](file)
    check_ignored(file)


def test_a_folder_that_is_a_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "schedules").write_text("somebody's")
    assert tuned.targets(Store(tmp_path)) == shipped()


def test_a_lock_that_cannot_be_had_is_done_without(file: Path) -> None:
    file.with_name(f"{file.name}.lock").mkdir()
    assert tuned.add(Store(file.parent.parent), "cuda:80", [ROW]) == file


def test_a_table_without_rows_takes_new_ones(file: Path) -> None:
    file.write_text('{"target": "cuda:80"}')
    tuned.add(Store(file.parent.parent), "cuda:80", [ROW])
    assert json.loads(file.read_text())["rows"] == [ROW]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
row_fields = {"stage": anything, "when": anything, "set": anything, "why": anything, "measured": anything}
rows = st.fixed_dictionaries({}, optional=row_fields) | anything
good_fields = {
    "stage": st.sampled_from(sorted(STAGES)),
    "when": st.dictionaries(st.sampled_from(sorted(FACTS)), anything, max_size=2),
    "set": st.dictionaries(st.sampled_from(["BLOCK_M", "num_warps", "backend"]), anything, max_size=2),
    "measured": st.fixed_dictionaries(dict.fromkeys(MEASURED, anything)),
}
tables = st.fixed_dictionaries(
    {"target": st.just("cuda:80")},
    optional={"rows": st.lists(rows | st.fixed_dictionaries(good_fields), max_size=3) | anything, "more": anything},
)


@given(anything | tables)
@example({"target": "cuda:80", "rows": [{"stage": {}}]})
def test_what_a_table_says_is_taken_or_one_clear_error(data: Any) -> None:
    try:
        parse(data, "file.json", 1)
    except ScheduleTableError as error:
        assert "file.json" in str(error) and "\n" not in str(error) and len(str(error)) < 1000


@given(st.integers(2, 3 * sys.getrecursionlimit()), st.sampled_from(["{}", '{{"target": {}}}', '{{"rows": {}}}']))
def test_any_depth_is_refused(depth: int, around: str) -> None:
    """Also where reading it goes well, and telling what came would go too deep."""
    try:
        data = json.loads(around.format(nested(depth)))
    except RecursionError:
        return  # `targets` takes care of it
    with pytest.raises(ScheduleTableError) as caught:
        parse({"target": "cuda:80"} | data if "rows" in around else data, "file.json", 1)
    assert len(str(caught.value)) < 1000


powers = st.integers(0, 20).map(lambda power: 2**power)


@st.composite
def legal_rows(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(STAGES)))
    sizes = {tile: powers for tile in STAGES[name].tiles}
    sizes |= {option: powers.filter(lambda size, most=most: size <= most) for option, most in LIMITS.items()}
    sizes["backend"] = st.sampled_from(BACKENDS)
    chosen = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, unique=True))
    return {"stage": name, "when": {}, "set": {size: draw(sizes[size]) for size in chosen}, "why": "drawn"}


@given(st.lists(legal_rows(), min_size=1, max_size=4))
def test_any_rows_that_a_table_may_hold_make_schedules(drawn: list[dict[str, Any]]) -> None:
    own = parse({"target": "cuda:90", "rows": drawn}, "file.json", 232_448)
    assert schedules(PLAN, shipped() | {"cuda:90": own})
