"""What a person can do wrong in a spec, and the exact sentence that each mistake gets."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llsa_gen.errors import (
    CheckFailed,
    KernelCompileError,
    LlsaGenError,
    MissingSpecFile,
    Mistake,
    SpecError,
    TemplateError,
)
from llsa_gen.spec import Level, Spec, load

GOOD = """\
name: good
description: two levels
head_dim: 64
levels:
  - {block: 16, topk: 8}
  - block: 16
    topk: 8
enrich: all
reweight: true
"""

HEAD_DIM = "expected an integer >= 8 and <= 256"
BLOCK = "expected an integer >= 2 and <= 256"
TOPK = "expected an integer >= 1 and <= 512"
LEVELS = "expected a list of 1 to 6 levels, finest first"
LEVEL = "expected a mapping with block and topk"
ENRICH = "expected all, none or a list of level numbers"
ENRICHED = "expected a level number, an integer >= 1"
REWEIGHT = "expected true or false"
NAME = "expected a Python identifier of at most 64 ASCII letters, digits and _ that starts with a letter"
DESCRIPTION = "expected a text of at most 500 characters"
CONTROL = "expected text without control characters other than newlines"
KEY = "expected name, description, head_dim, levels, enrich or reweight, got the unknown key"
KEY_OF_LEVEL = "expected block or topk, got the unknown key"
AGAIN = "expected each key once, got it again"


def mistakes_of(text: str, folder: Path) -> list[str]:
    """The lines of the error that a file with this text raises, without the path of its folder."""
    file = folder / "spec.yaml"
    file.write_bytes(text.encode())
    with pytest.raises(SpecError) as caught:
        load(file)
    assert caught.value.__cause__ is None
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.mistakes)
    assert all(line.startswith(f"{file}:") for line in lines)
    return [line.removeprefix(f"{file}:") for line in lines]


def changed(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # numbers
        ("head_dim: 64", "head_dim: 7", f"3:11: head_dim: {HEAD_DIM}, got 7"),
        ("head_dim: 64", "head_dim: 257", f"3:11: head_dim: {HEAD_DIM}, got 257"),
        ("head_dim: 64", "head_dim: -64", f"3:11: head_dim: {HEAD_DIM}, got -64"),
        ("head_dim: 64", "head_dim: 64.0", f"3:11: head_dim: {HEAD_DIM}, got 64.0"),
        ("head_dim: 64", "head_dim: 6.4e1", f"3:11: head_dim: {HEAD_DIM}, got 64.0"),
        ("head_dim: 64", "head_dim: '64'", f"3:11: head_dim: {HEAD_DIM}, got '64'"),
        ("head_dim: 64", "head_dim: true", f"3:11: head_dim: {HEAD_DIM}, got true"),
        ("head_dim: 64", "head_dim:", f"3:10: head_dim: {HEAD_DIM}, got null"),
        ("head_dim: 64", "head_dim: [64]", f"3:11: head_dim: {HEAD_DIM}, got a list of 1"),
        ("head_dim: 64", "head_dim: {}", f"3:11: head_dim: {HEAD_DIM}, got an empty mapping"),
        ("head_dim: 64", "head_dim: 010", f"3:11: head_dim: {HEAD_DIM}, got '010'"),  # 8 in YAML 1.1, 10 elsewhere
        ("head_dim: 64", "head_dim: 1:30", f"3:11: head_dim: {HEAD_DIM}, got '1:30'"),  # 90 in YAML 1.1
        ("head_dim: 64", "head_dim: 1_00", f"3:11: head_dim: {HEAD_DIM}, got '1_00'"),
        ("head_dim: 64", f"head_dim: {10**90}",
         f"3:11: head_dim: {HEAD_DIM}, got 1{'0' * 44}...{'0' * 15} (91 characters)"),
        ("head_dim: 64", f"head_dim: {'9' * 5000}",
         f"3:11: head_dim: {HEAD_DIM}, got '{'9' * 60}'... (5000 characters)"),
        ("{block: 16,", "{block: 1,", f"5:13: levels[0].block: {BLOCK}, got 1"),
        ("{block: 16,", "{block: 257,", f"5:13: levels[0].block: {BLOCK}, got 257"),
        ("    topk: 8", "    topk: eight", f"7:11: levels[1].topk: {TOPK}, got 'eight'"),
        ("    topk: 8", "    topk: 0", f"7:11: levels[1].topk: {TOPK}, got 0"),
        ("    topk: 8", "    topk: 513", f"7:11: levels[1].topk: {TOPK}, got 513"),
        # levels
        (", topk: 8}", "}", f"5:5: levels[0].topk: {TOPK}, but the key is missing"),
        ("    topk: 8\n", "", f"6:5: levels[1].topk: {TOPK}, but the key is missing"),
        ("  - {block: 16, topk: 8}", "  - 16", f"5:5: levels[0]: {LEVEL}, got 16"),
        ("  - {block: 16, topk: 8}", "  -", f"5:4: levels[0]: {LEVEL}, got null"),
        ("  - {block: 16, topk: 8}", "  - [16, 8]", f"5:5: levels[0]: {LEVEL}, got a list of 2"),
        (", topk: 8}", ", topk: 8, heads: 2}", f"5:26: levels[0].heads: {KEY_OF_LEVEL} 'heads'"),
        # enrich
        ("enrich: all", "enrich: everything", f"8:9: enrich: {ENRICH}, got 'everything'"),
        ("enrich: all", "enrich: non", f"8:9: enrich: {ENRICH}, got 'non'; did you mean none?"),
        ("enrich: all", "enrich: ALL", f"8:9: enrich: {ENRICH}, got 'ALL'; did you mean all?"),
        ("enrich: all", "enrich: null", f"8:9: enrich: {ENRICH}, got null"),
        ("enrich: all", "enrich: 1", f"8:9: enrich: {ENRICH}, got 1"),
        ("enrich: all", "enrich: {1: 2}", f"8:9: enrich: {ENRICH}, got a mapping"),
        ("enrich: all", "enrich: [all]", f"8:10: enrich[0]: {ENRICHED}, got 'all'"),
        ("enrich: all", "enrich: [1, true]", f"8:13: enrich[1]: {ENRICHED}, got true"),
        ("enrich: all", "enrich: [1, 2.0]", f"8:13: enrich[1]: {ENRICHED}, got 2.0"),
        ("enrich: all", "enrich: [0]", f"8:10: enrich[0]: {ENRICHED}, got 0"),
        ("enrich: all", "enrich: [-1]", f"8:10: enrich[0]: {ENRICHED}, got -1"),
        ("enrich: all", "enrich: [2, 3]", "8:13: enrich[1]: expected a level that exists, got 3 (there are 2 levels)"),
        ("enrich: all", "enrich: [2, 2]", "8:13: enrich[1]: expected each level once, got 2 again"),
        ("enrich: all", "enrich: 'none '", f"8:9: enrich: {ENRICH}, got 'none '; did you mean none?"),
        # reweight
        ("reweight: true", "reweight: 'true'", f"9:11: reweight: {REWEIGHT}, got 'true'"),  # no advice to type the same
        ("reweight: true", "reweight: yes", f"9:11: reweight: {REWEIGHT}, got 'yes'"),
        ("reweight: true", "reweight: 1", f"9:11: reweight: {REWEIGHT}, got 1"),
        ("reweight: true", "reweight: ture", f"9:11: reweight: {REWEIGHT}, got 'ture'; did you mean true?"),
        ("reweight: true", "reweight:", f"9:10: reweight: {REWEIGHT}, got null"),
        # texts
        ("name: good", "name: 2fast", f"1:7: name: {NAME}, got '2fast'; did you mean fast?"),
        ("name: good", "name: my-spec.v2", f"1:7: name: {NAME}, got 'my-spec.v2'; did you mean my_spec_v2?"),
        ("name: good", "name: _good", f"1:7: name: {NAME}, got '_good'; did you mean good?"),
        ("name: good", "name: größe", f"1:7: name: {NAME}, got 'größe'; did you mean gr__e?"),
        ("name: good", "name: ''", f"1:7: name: {NAME}, got ''"),
        ("name: good", "name: ../../etc/passwd",
         f"1:7: name: {NAME}, got '../../etc/passwd'; did you mean etc_passwd?"),
        ("name: good", "name: '{message}'", f"1:7: name: {NAME}, got '{{message}}'; did you mean message?"),
        ("name: good", "name: class",
         "1:7: name: expected a name that is no Python keyword, got 'class'; did you mean class_?"),
        ("name: good", f"name: {'n' * 65}",
         f"1:7: name: {NAME}, got '{'n' * 60}'... (65 characters); did you mean {'n' * 64}?"),
        ("name: good", "name: true", f"1:7: name: {NAME}, got true"),
        ("name: good", "name: 5", f"1:7: name: {NAME}, got 5"),
        ("name: good", "name: [good]", f"1:7: name: {NAME}, got a list of 1"),
        ("two levels", f"{'d' * 501}", f"2:14: description: {DESCRIPTION}, got '{'d' * 60}'... (501 characters)"),
        ("two levels", "", f"2:13: description: {DESCRIPTION}, got null"),
        ("two levels", r'"a\e[31mb"', f"2:14: description: {CONTROL}, got U+001B as character 2"),
        ("two levels", r'"a\r\nb"', f"2:14: description: {CONTROL}, got U+000D as character 2"),
        ("two levels", r'"a\0b"', f"2:14: description: {CONTROL}, got U+0000 as character 2"),
        ("two levels", r'"a\u202eb"', f"2:14: description: {CONTROL}, got U+202E as character 2"),
        ("two levels", r'"\ud800"', "2:14: expected text, got an escape for half a character"),
        # keys
        ("enrich: all", "enriched: all", f"8:1: enriched: {KEY} 'enriched'; did you mean enrich?"),
        ("enrich: all", "zebra: 1", f"8:1: zebra: {KEY} 'zebra'"),
        ("enrich: all", "1: 1", f"8:1: ['1']: {KEY} '1'"),
        ("enrich: all", "<<: {}", f"8:1: ['<<']: {KEY} '<<'"),
        ("enrich: all", r'"a\nb": 1', rf"8:1: ['a\nb']: {KEY} 'a\nb'"),
        ("enrich: all", "head_dim: 7", f"8:1: head_dim: {AGAIN} (first at 3:1)"),
        ("    topk: 8", "    topk: 8\n    block: 4", f"8:5: levels[1].block: {AGAIN} (first at 6:5)"),
        # one slip, one sentence: the field that the unknown key was meant to be is not called missing as well
        ("head_dim", "head-dim", f"3:1: ['head-dim']: {KEY} 'head-dim'; did you mean head_dim?"),
        ("{block", "{Block", f"5:6: levels[0].Block: {KEY_OF_LEVEL} 'Block'; did you mean block?"),
        ("name: good", "nmae: good", f"1:1: nmae: {KEY} 'nmae'; did you mean name?"),
    ],
)  # fmt: skip
def test_one_mistake_one_sentence(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert mistakes_of(changed((old, new)), tmp_path) == [expected]


@pytest.mark.parametrize(
    ("levels", "got"),
    [("8", "8"), ("", "null"), ("[]", "an empty list"), ("{block: 16, topk: 8}", "a mapping"), ("llsa", "'llsa'")],
)
def test_levels_are_a_list(tmp_path: Path, levels: str, got: str) -> None:
    text = f"name: a\nhead_dim: 64\nenrich: [5]\nlevels: {levels}\n"
    assert mistakes_of(text, tmp_path) == [f"4:{9 if levels else 8}: levels: {LEVELS}, got {got}"]


def test_too_many_levels(tmp_path: Path) -> None:
    text = "name: a\nhead_dim: 64\nlevels:\n" + "- {block: 2, topk: 1}\n" * 7
    assert mistakes_of(text, tmp_path) == [f"4:1: levels: {LEVELS}, got a list of 7"]


def test_missing_fields(tmp_path: Path) -> None:
    assert mistakes_of("description: a\n", tmp_path) == [
        f"1:1: name: {NAME}, but the key is missing",
        f"1:1: head_dim: {HEAD_DIM}, but the key is missing",
        f"1:1: levels: {LEVELS}, but the key is missing",
    ]


def test_all_mistakes_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
reweight: maybe
enrich: [2, 3, 2, x]
levels:
  - {block: 1, topk: 8, bock: 3}
  - {topk: 8.5}
reweight: false
head_dim: '64'
nmae: a
"""
    assert mistakes_of(text, tmp_path) == [
        f"1:11: reweight: {REWEIGHT}, got 'maybe'",
        "2:13: enrich[1]: expected a level that exists, got 3 (there are 2 levels)",
        "2:16: enrich[2]: expected each level once, got 2 again",
        f"2:19: enrich[3]: {ENRICHED}, got 'x'",
        f"4:13: levels[0].block: {BLOCK}, got 1",
        f"4:25: levels[0].bock: {KEY_OF_LEVEL} 'bock'; did you mean block?",
        f"5:5: levels[1].block: {BLOCK}, but the key is missing",
        f"5:12: levels[1].topk: {TOPK}, got 8.5",
        f"6:1: reweight: {AGAIN} (first at 1:1)",
        f"7:11: head_dim: {HEAD_DIM}, got '64'",
        f"8:1: nmae: {KEY} 'nmae'; did you mean name?",
    ]


def test_a_mistake_in_a_repeated_level_is_reported_where_it_is_written(tmp_path: Path) -> None:
    text = "name: a\nhead_dim: 64\nlevels:\n- &level {block: 16, topk: 0}\n- *level\n"
    assert mistakes_of(text, tmp_path) == [
        f"4:28: levels[0].topk: {TOPK}, got 0",
        f"4:28: levels[1].topk: {TOPK}, got 0",
    ]


def bad(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "head_dim": 64, "levels": [{"block": 16, "topk": 8}], **fields}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bad(head_dim=True), [f"head_dim: {HEAD_DIM}, got True"]),
        (bad(head_dim=10**5000), [f"head_dim: {HEAD_DIM}, got a value of type int"]),
        (bad(head_dim=None), [f"head_dim: {HEAD_DIM}, got None"]),
        (bad(reweight=1), [f"reweight: {REWEIGHT}, got 1"]),
        (bad(name=b"a"), [f"name: {NAME}, got b'a'"]),
        (bad(levels={"block": 16, "topk": 8}), [f"levels: {LEVELS}, got a mapping"]),
        (bad(levels={Level(block=2, topk=1)}), [f"levels: {LEVELS}, got {{Level(block=2, topk=1)}}"]),
        (bad(levels=[Level.model_construct(block=1, topk=1)]), [f"levels[0].block: {BLOCK}, got 1"]),
        (bad(enrich={1}), [f"enrich: {ENRICH}, got {{1}}"]),
        (bad(enrich=(2,)), ["enrich[0]: expected a level that exists, got 2 (there is 1 level)"]),
        (bad(topk=8), [f"topk: {KEY} 'topk'"]),
        (bad(enrich="al", head_dim=0), [f"head_dim: {HEAD_DIM}, got 0",
         f"enrich: {ENRICH}, got 'al'; did you mean all?"]),
    ],
)  # fmt: skip
def test_python_sources_say_where_they_came_from(data: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load(data)
    assert str(caught.value).splitlines() == [f"<dict>: {line}" for line in expected]
    with pytest.raises(SpecError) as caught:
        Spec(**data)
    assert str(caught.value).splitlines() == [f"<Spec>: {line}" for line in expected]
    assert caught.value.__suppress_context__


def test_keys_that_are_no_words() -> None:
    data: Any = bad(levels=[{"block": 16, "topk": 8, None: 1}]) | {1: 2}
    with pytest.raises(SpecError) as caught:
        load(data)
    assert [mistake.message for mistake in caught.value.mistakes] == [
        f"{KEY_OF_LEVEL} None",
        f"{KEY} 1",
    ]


def test_a_level_of_its_own() -> None:
    with pytest.raises(SpecError) as caught:
        Level(block=1, topk="8")  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == f"<Level>: block: {BLOCK}, got 1\n<Level>: topk: {TOPK}, got '8'"
    with pytest.raises(SpecError, match=r"topk: .* but the key is missing"):
        Level(block=16)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("source", "got"), [(None, "None"), (5, "5"), (["a"], "a list of 1"), (b"a.yaml", "b'a.yaml'")]
)
def test_what_is_no_source(source: Any, got: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(source)
    assert str(caught.value) == f"load: expected a path, a mapping or a Spec, got {got}"


class _Escaping:
    def __repr__(self) -> str:
        return "\x1b[31mred" + "x" * 10**6


HUGE: dict[str, Any] = {
    "text": "x" * 10**6, "bytes": b"x" * 10**6, "int": 10**5000, "shorter int": -(10**4000), "texts": ["x" * 10**6],
    "ints": [10**4000] * 2, "key": {"x" * 10**6: 1}, "set": {10**4000}, "range": range(10**9), "escapes": _Escaping(),
    "lists": [[]] * 10**4, "keys": {str(key): 0 for key in range(10**4)}, "numbers": list(range(10**4)),
}  # fmt: skip
FIELDS = {name: name for name in (*Spec.model_fields, *Level.model_fields)} | {"long": "x" * 10**6}


@settings(max_examples=60)
@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(sorted(HUGE)), st.booleans())
def test_no_value_makes_a_long_message(named: str, huge: str, inner: bool) -> None:
    field, value = FIELDS[named], HUGE[huge]
    inside = {"block": 16, "topk": 8, field: value} if inner else {"block": 16, "topk": 8}
    data = {"name": "a", "head_dim": 64, "levels": [inside]} | ({} if inner else {field: value})
    with pytest.raises(SpecError) as caught:
        load(data)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 21
    assert max(map(len, lines)) < 400
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("count", [1, 20, 21, 9000])
def test_of_many_mistakes_the_first_are_printed_and_the_others_counted(tmp_path: Path, count: int) -> None:
    file = tmp_path / "many.yaml"
    file.write_text(f"name: a\nhead_dim: 64\nlevels: [{{block: 16, topk: 8}}]\nenrich: [{'1,' * count}1]\n")
    for source, first in (
        (file, f"{file}:4:12: enrich[1]: "),
        (bad(**{f"z{n}": n for n in range(count)}), "<dict>: z0: "),
    ):
        with pytest.raises(SpecError) as caught:
            load(source)
        lines = str(caught.value).splitlines()
        assert len(caught.value.mistakes) == count
        assert lines[0].startswith(first)
        assert lines[:20] == list(map(str, caught.value.mistakes[:20]))
        assert lines[20:] == ([f"... and {count - 20:,} more"] if count > 20 else [])


leaves = st.none() | st.booleans() | st.integers(-3, 600) | st.floats() | st.text(max_size=8) | st.just("all")
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
almost = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("a") | anything,
        "description": anything,
        "head_dim": st.just(64) | anything,
        "levels": st.lists(
            st.fixed_dictionaries({}, optional={"block": st.integers(0, 300), "topk": leaves, "tok": leaves})
            | anything,
            max_size=7,
        ),
        "enrich": st.lists(st.integers(-1, 7) | leaves) | anything,
        "reweight": anything,
        "head": leaves,
    },
)


@settings(max_examples=300)
@given(almost)
def test_a_dict_and_the_same_in_a_file_fail_alike(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    """Whatever is wrong, both ways in find it, in the same order; JSON is the file, being YAML as well."""

    def outcome(source: Any) -> Spec | list[tuple[str, str]]:
        try:
            return load(source)
        except SpecError as error:
            return [(mistake.path, mistake.message.partition(", got ")[0]) for mistake in error.mistakes]

    file = tmp_path_factory.mktemp("almost") / "spec.yaml"
    file.write_text(json.dumps(data))
    assert outcome(file) == outcome(data)


def test_every_error_is_one_family_and_survives_pickling() -> None:
    errors = [
        SpecError([Mistake("a.yaml:1:2", "name", "wrong"), Mistake("a.yaml:2:2", "", "wrong")]),
        MissingSpecFile("a.yaml: missing"),
        TemplateError("undefined", "attend.py.j2", 3, "llsa_l2", "llsa-gen build spec/llsa_l2.yaml"),
        KernelCompileError("no", "attend_kernel", 7, "attend.py.j2", "llsa_l2", "llsa-gen build spec/llsa_l2.yaml"),
        CheckFailed("o differs", "import llsa_gen"),
    ]
    for error in errors:
        same = pickle.loads(pickle.dumps(error))
        assert isinstance(same, LlsaGenError)
        assert type(same) is type(error)
        assert str(same) == str(error)
        assert vars(same) == vars(error)
    spec, missing, template, kernel, check = errors
    assert isinstance(spec, ValueError)
    assert isinstance(missing, FileNotFoundError)
    assert str(spec) == "a.yaml:1:2: name: wrong\na.yaml:2:2: wrong"
    assert str(template).startswith("attend.py.j2:3: undefined (spec llsa_l2)")
    assert str(kernel).startswith("llsa_l2.py:7: no (kernel attend_kernel, from attend.py.j2, spec llsa_l2)")
    assert isinstance(check, CheckFailed)
    assert check.reproducer == "import llsa_gen"
