"""What a legal spec is: every way in gives the same one, equality is that of the canonical text, files round-trip."""

import copy
import json
import keyword
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llsa_gen.errors import LlsaGenError, SpecError
from llsa_gen.spec import Level, Spec, json_schema, load, schema_text, starter

SHIPPED = Path(__file__).resolve().parents[2] / "spec"
SCHEMA_LINE = "# yaml-language-server: $schema=schema.json"

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,63}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
) | st.sampled_from(["null", "true", "no", "on", "y", "e1", "o17", "match", "x" * 64])
# Everything printable, with what YAML, Python and Jinja could trip over drawn often.
texts = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\u202a\u202b\u202c\u202d\u202e")
    | st.sampled_from("\n #:-'\"\\{}[]|>%&*!?~,"),
    max_size=80,
).filter(lambda text: not re.search("[\u2066-\u2069]", text))
tricky_texts = st.sampled_from(
    ["1e3", "0o17", "0x1F", "010", "null", "~", "yes", "1:30", "2020-01-01", "<<", "=", " ", "\n", "\na", "a\n\n"]
)
level_lists = st.lists(
    st.builds(Level, block=st.integers(2, 256), topk=st.integers(1, 512)), min_size=1, max_size=6
).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    levels = draw(level_lists)
    some = st.lists(st.integers(1, len(levels)), unique=True).map(tuple)
    return load(
        {
            "name": draw(names),
            "description": draw(texts | tricky_texts),
            "head_dim": draw(st.integers(8, 256)),
            "levels": levels,
            "enrich": draw(st.one_of(st.just("all"), st.just("none"), some)),
            "reweight": draw(st.booleans()),
        }
    )


def as_data(spec: Spec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def minimal(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "head_dim": 64, "levels": [{"block": 16, "topk": 8}, {"block": 4, "topk": 2}], **fields}


def test_every_way_in_gives_the_same_spec(tmp_path: Path) -> None:
    spec = Spec(name="a", head_dim=64, levels=(Level(block=16, topk=8), Level(block=4, topk=2)))
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nhead_dim: 64\nlevels:\n- {block: 16, topk: 8}\n- {block: 4, topk: 2}\n")
    assert load(spec) is spec
    ways: list[Any] = [
        file,
        str(file),
        minimal(),
        MappingProxyType(minimal(levels=[MappingProxyType({"block": 16, "topk": 8}), spec.levels[1]])),
    ]
    for way in ways:
        assert load(way) == spec
        assert load(way).digest == spec.digest
    assert (spec.description, spec.enrich, spec.reweight) == ("", "all", True)


@given(specs())
def test_a_spec_written_as_a_file_loads_as_itself(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> None:
    file = tmp_path_factory.mktemp("specs") / "spec.yaml"
    text = spec.to_yaml()
    file.write_text(text, encoding="utf-8")
    assert text.splitlines()[0] == SCHEMA_LINE
    assert load(file) == spec


@given(specs())
def test_data_canonical_text_pickle_and_copy_give_the_spec_back(spec: Spec) -> None:
    for same in (
        load(as_data(spec)),
        load(json.loads(spec.canonical())),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
        spec.model_copy(),
    ):
        assert same == spec
        assert hash(same) == hash(spec)
        assert same.canonical() == spec.canonical()


@given(specs(), specs())
def test_equal_specs_are_those_with_equal_text(one: Spec, other: Spec) -> None:
    other = other.model_copy(update={"name": one.name, "description": one.description})
    assert (one == other) == (one.canonical() == other.canonical()) == (one.digest == other.digest)
    # close relatives, that differ in nothing but how enrich is written
    written = one.model_copy(update={"enrich": one.enriched_levels[::-1]})
    assert written == one
    assert written.digest == one.digest
    assert len({one, written}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"description": "b"},
        {"head_dim": 65},
        {"levels": [{"block": 4, "topk": 2}, {"block": 16, "topk": 8}]},
        {"levels": [{"block": 16, "topk": 8}]},
        {"levels": [{"block": 16, "topk": 9}, {"block": 4, "topk": 2}]},
        {"levels": [{"block": 16, "topk": 8}, {"block": 5, "topk": 2}]},
        {"enrich": "none"},
        {"enrich": [1]},
        {"enrich": [2]},
        {"reweight": False},
    ],
)
def test_every_field_changes_the_digest(change: dict[str, Any]) -> None:
    assert load(minimal(**change)).digest != load(minimal()).digest
    assert load(minimal(**change)) != load(minimal())


def test_the_digest_stays_what_it_is() -> None:
    """It names what people have cached and exported: when this fails, all of that is made again under other names."""
    assert load(minimal()).canonical() == (
        '{"description":"","enrich":[1,2],"head_dim":64,'
        '"levels":[{"block":16,"topk":8},{"block":4,"topk":2}],"name":"a","reweight":true}'
    )
    assert re.fullmatch("[0-9a-f]{64}", load(minimal()).digest)


@pytest.mark.parametrize(
    ("written", "enrich", "levels"),
    [
        ("all", "all", (1, 2)),
        ([2, 1], "all", (1, 2)),
        ((1, 2), "all", (1, 2)),
        ("none", "none", ()),
        ([], "none", ()),
        ([2], (2,), (2,)),
    ],
)
def test_enrich_has_one_form(written: Any, enrich: object, levels: tuple[int, ...]) -> None:
    spec = load(minimal(enrich=written))
    assert spec.enrich == enrich
    assert spec.enriched_levels == levels


@given(specs())
def test_levels_are_numbered_from_the_finest(spec: Spec) -> None:
    span = 1
    assert spec.span(0) == 1
    for number, level in enumerate(spec.levels, start=1):
        span *= level.block
        assert (spec.block(number), spec.topk(number), spec.span(number)) == (level.block, level.topk, span)
    assert number == spec.num_levels == len(spec.levels)
    for ask in (spec.block, spec.topk, spec.span):
        for missing in (-1, spec.num_levels + 1):
            with pytest.raises(IndexError, match=f"from 1 to {spec.num_levels}, got {missing}"):
                ask(missing)
    with pytest.raises(IndexError):
        spec.block(0)


def test_a_spec_is_frozen() -> None:
    spec = load(minimal())
    for thing, field in ((spec, "head_dim"), (spec.levels[0], "topk")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, field, 9)


def test_a_copy_with_other_fields_is_checked() -> None:
    assert load(minimal()).model_copy(update={"head_dim": 65}).head_dim == 65
    with pytest.raises(SpecError, match="head_dim"):
        load(minimal()).model_copy(update={"head_dim": 7})


class _Number(int):
    def __repr__(self) -> str:
        return "__import__('os').abort()"


class _Text(str):
    __slots__ = ()
    __str__ = __repr__ = lambda self: "__import__('os').abort()"


def test_what_prints_itself_as_code_becomes_plain_text_and_numbers() -> None:
    """Values reach generated source through repr(): no subclass may smuggle its own into a spec."""
    spec = load(
        minimal(
            name=_Text("a"),
            description=_Text("b"),
            head_dim=_Number(8),
            levels=[{"block": _Number(2), "topk": _Number(1)}] * 2,
            enrich=[_Number(2)],
        )
    )
    values = [spec.name, spec.description, spec.head_dim, spec.block(1), spec.topk(1), spec.enriched_levels[0]]
    assert {type(value) for value in values} == {str, int}
    assert "import" not in repr(spec) + spec.canonical() + spec.to_yaml()


@given(specs(), st.data())
def test_the_integers_of_numpy_are_integers(spec: Spec, data: st.DataObject) -> None:
    def of_numpy(value: int) -> Any:
        kinds = [kind for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint64, np.intp)
                 if value <= np.iinfo(kind).max]  # fmt: skip
        return data.draw(st.sampled_from([*kinds, int]))(value)

    given: dict[str, Any] = {
        "name": np.str_(spec.name),
        "description": np.str_(spec.description),
        "head_dim": of_numpy(spec.head_dim),
        "levels": [{"block": of_numpy(level.block), "topk": of_numpy(level.topk)} for level in spec.levels],
        "enrich": [of_numpy(level) for level in spec.enriched_levels],
        "reweight": np.bool_(spec.reweight),
    }
    declared: dict[str, Any] = {**given, "levels": tuple(Level(**level) for level in given["levels"])}
    for same in (load(given), Spec(**given), Spec(**declared), load(spec.model_copy(update=given))):
        assert same == spec and hash(same) == hash(spec)
        assert (same.canonical(), same.digest, same.to_yaml()) == (spec.canonical(), spec.digest, spec.to_yaml())
        numbers = [same.head_dim, *same.enriched_levels, *(value for level in same.levels for _, value in level)]
        assert {type(value) for value in (*numbers, same.name, same.description, same.reweight)} == {int, str, bool}


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("head_dim", np.float64(16.0), "np.float64(16.0)"),  # as 16.0 is none
        ("head_dim", np.bool_(True), "np.True_"),
        ("head_dim", np.int64(7), "7"),
        ("head_dim", np.uint64(2**64 - 1), str(2**64 - 1)),
        ("head_dim", np.array(16), "array(16)"),
        ("head_dim", torch.tensor(16), "tensor(16)"),
        ("reweight", np.int64(1), "np.int64(1)"),
        ("enrich", np.int64(1), "np.int64(1)"),
        ("enrich", np.array([1]), "array([1])"),
        ("enrich", [np.int64(3)], "3 (there are 2 levels)"),
        ("enrich", [1, np.int64(1)], "1 again"),
        ("enrich", [np.bool_(True)], "np.True_"),
    ],
)  # fmt: skip
def test_what_is_no_integer_of_numpy(field: str, value: Any, got: str) -> None:
    for declare in (load, lambda data: Spec(**data)):
        with pytest.raises(SpecError) as caught:
            declare(minimal(**{field: value}))
        (mistake,) = caught.value.mistakes
        assert mistake.path.startswith(field) and mistake.message.endswith(f"got {got}")


def test_a_spec_needs_no_numpy_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    assert load(minimal(reweight=False)).reweight is False
    assert "numpy" not in sys.modules


@pytest.mark.parametrize(
    "body",
    [
        "{name: a, head_dim: 64, levels: [{block: 16, topk: 8}, {block: 4, topk: 2}]}",  # flow style
        '{"name": "a", "head_dim": 64, "levels": [{"block": 16, "topk": 8}, {"block": 4, "topk": 2}]}',  # JSON
        "%YAML 1.2\n---\nname: a\nhead_dim: 64\nlevels: [{block: 16, topk: 8}, {block: 4, topk: 2}]\n...\n",
        "name: a\r\nhead_dim: 64\r\nlevels: [{block: 16, topk: 8}, {block: 4, topk: 2}]\r\n",
        "\ufeffname: a\nhead_dim: 64\nlevels: [{block: 16, topk: 8}, {block: 4, topk: 2}]",  # a byte order mark
        "name: 'a'\nhead_dim: 0x40\nlevels: [{block: +16, topk: 0o10}, {block: !!int 4, topk: 2}]",
        "name: a\nhead_dim: 64\nlevels:\n- &fine {block: 16, topk: 8}\n- {block: 4, topk: 2}\nenrich: [2, 1]",
    ],
)
def test_any_yaml_will_do(tmp_path: Path, body: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(body.encode())
    assert load(file) == load(minimal())


def test_an_alias_repeats_a_level(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nhead_dim: 64\nlevels:\n- &level {block: 16, topk: 8}\n- *level\n- *level\n")
    assert load(file).levels == (Level(block=16, topk=8),) * 3


@pytest.mark.parametrize("word", ["no", "on", "y", "null", "true", "nan"])
def test_a_word_that_yaml_may_read_as_something_else_can_be_a_name(tmp_path: Path, word: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(load(minimal(name=word)).to_yaml())
    assert load(file).name == word
    file.write_text(starter(word))
    assert load(file).name == word


SHIPPED_SPECS: Mapping[str, tuple[int, list[tuple[int, int]], str]] = {
    "llsa_b64": (64, [(64, 8)] * 2, "all"),
    "llsa_d128": (128, [(16, 8)] * 2, "all"),
    "llsa_l1": (64, [(16, 8)], "all"),
    "llsa_l2": (64, [(16, 8)] * 2, "all"),
    "llsa_l3": (64, [(16, 8)] * 3, "all"),
    "topk_b128": (64, [(128, 4)], "none"),
    "topk_l1": (64, [(16, 8)], "none"),
    "topk_l2": (64, [(16, 8)] * 2, "none"),
    "uneven": (80, [(12, 7), (5, 3)], "all"),
}


@pytest.mark.parametrize("name", SHIPPED_SPECS)
def test_shipped_spec(name: str) -> None:
    head_dim, levels, enrich = SHIPPED_SPECS[name]
    spec = load(SHIPPED / f"{name}.yaml")
    assert (spec.name, spec.head_dim, spec.enrich, spec.reweight) == (name, head_dim, enrich, True)
    assert [(level.block, level.topk) for level in spec.levels] == levels
    assert spec.description


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_in_spec_names_itself_and_its_schema(file: Path) -> None:
    first, second, *_ = file.read_text().splitlines()
    assert first == SCHEMA_LINE
    assert second.startswith("# ")
    assert load(file).name == file.stem


def test_the_committed_schema_is_that_of_the_model() -> None:
    remedy = "python -c 'from llsa_gen.spec import schema_text; print(schema_text(), end=\"\")' > spec/schema.json"
    assert (SHIPPED / "schema.json").read_text() == schema_text(), f"make it again: {remedy}"


def test_the_schema_says_what_the_model_checks() -> None:
    schema = json_schema()
    fields, level = schema["properties"], schema["$defs"]["Level"]
    assert set(fields) == set(Spec.model_fields)
    assert schema["required"] == ["name", "head_dim", "levels"]
    assert schema["additionalProperties"] is level["additionalProperties"] is False
    assert (fields["head_dim"]["minimum"], fields["head_dim"]["maximum"]) == (8, 256)
    assert (fields["levels"]["minItems"], fields["levels"]["maxItems"]) == (1, 6)
    assert (level["properties"]["block"]["minimum"], level["properties"]["block"]["maximum"]) == (2, 256)
    assert (level["properties"]["topk"]["minimum"], level["properties"]["topk"]["maximum"]) == (1, 512)
    assert all(field["description"] for field in [*fields.values(), *level["properties"].values()])
    for name in ("a", "A_1", "x" * 64, "1a", "_a", "a-b", "", "x" * 65, "é", "a\n"):
        try:
            accepted = bool(load(minimal(name=name)))
        except LlsaGenError:
            accepted = False
        assert accepted == bool(re.search(fields["name"]["pattern"].replace("$", r"\Z"), name)), name


def test_a_starter_explains_every_field(tmp_path: Path) -> None:
    file = tmp_path / "pixel_256.yaml"
    text = starter("pixel_256")
    file.write_text(text)
    spec = load(file)
    assert spec.name == "pixel_256"
    assert text.splitlines()[0] == SCHEMA_LINE
    assert max(map(len, text.splitlines())) <= 120
    lines = text.splitlines()
    for field in Spec.model_fields:
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"{field}:")]
        assert lines[at - 1].startswith("#"), f"no comment above {field}"


def test_a_starter_needs_a_good_name() -> None:
    with pytest.raises(SpecError, match=r"did you mean my_spec\?"):
        starter("my-spec")
