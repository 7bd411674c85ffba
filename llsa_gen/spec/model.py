"""What a person declares: the spec of one attention, from a YAML file, a mapping or keyword arguments.

A `Spec` is always legal. It is frozen, two that mean the same are equal, and `canonical()` is the text by which
everything that is made from it is named. The names are those of docs/semantics.md: level 1 is the finest, `span(l)` is
`P_l`. Neither torch nor Triton is imported here.
"""

import hashlib
import json
import keyword
import numbers
import operator
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from llsa_gen.errors import Mistake, SpecError
from llsa_gen.spec.mistakes import Document, Expected, Keys, describe, explain, from_python
from llsa_gen.spec.yaml import plain_yaml, read

__all__ = ["Level", "Spec", "json_schema", "load", "schema_text"]

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MIN_BLOCK, MAX_BLOCK = 2, 256
MIN_TOPK, MAX_TOPK = 1, 512
MAX_LEVELS = 6
MAX_NAME = 64
MAX_DESCRIPTION = 500

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json"
_NAME_PATTERN = rf"[A-Za-z][A-Za-z0-9_]{{0,{MAX_NAME - 1}}}"

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: controls, surrogates, line and paragraph separators
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # Unicode bidirectional classes

# What belongs at each path: the words of every message, and the list of keys that exist.
_EXPECTED = {
    "": Expected("a mapping with at least name, head_dim and levels"),
    "name": Expected(
        f"a Python identifier of at most {MAX_NAME} ASCII letters, digits and _ that starts with a letter"
    ),
    "description": Expected(f"a text of at most {MAX_DESCRIPTION} characters"),
    "head_dim": Expected(f"an integer >= {MIN_HEAD_DIM} and <= {MAX_HEAD_DIM}"),
    "levels": Expected(f"a list of 1 to {MAX_LEVELS} levels, finest first"),
    "levels[]": Expected("a mapping with block and topk"),
    "levels[].block": Expected(f"an integer >= {MIN_BLOCK} and <= {MAX_BLOCK}"),
    "levels[].topk": Expected(f"an integer >= {MIN_TOPK} and <= {MAX_TOPK}"),
    "enrich": Expected("all, none or a list of level numbers", ("all", "none")),
    "enrich[]": Expected("a level number, an integer >= 1"),
    "reweight": Expected("true or false", ("true", "false")),
}


def _is_a_name(value: str) -> str:
    """A name becomes a file, a Python module and a part of an operator's name, so it must be good for all three."""
    if re.fullmatch(_NAME_PATTERN, value) and not keyword.iskeyword(value):
        return value
    better = re.sub(r"\W", "_", value[:MAX_NAME], flags=re.ASCII).lstrip("_0123456789").rstrip("_")
    if keyword.iskeyword(better):
        better += "_"
    expected = "a name that is no Python keyword" if keyword.iskeyword(value) else _EXPECTED["name"].phrase
    raise _mistake(f"expected {expected}, got {describe(value)}" + (f"; did you mean {better}?" if better else ""))


def _is_plain_text(value: str) -> str:
    """No terminal escapes, and nothing that makes a text look different from what it is (bidirectional overrides)."""
    for index, character in enumerate(value):
        unseen = unicodedata.category(character) in _UNSEEN or unicodedata.bidirectional(character) in _REORDERING
        if unseen and character != "\n":
            came = f"U+{ord(character):04X} as character {index + 1}"
            raise _mistake(f"expected text without control characters other than newlines, got {came}")
    return value


def _is_a_list(value: Any) -> Any:
    """A set or a generator is no list: the order of levels matters."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("not_a_list", "not a list")
    return value


def _as_integer(value: Any) -> Any:
    """numpy's integers, and whatever else registers as `numbers.Integral`, as an int; anything else as it is.

    int and bool are left to the check. A tensor of one number is a tensor, and 16.0 no integer, numpy's neither.
    """
    return operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, int) else value


def _as_bool(value: Any) -> Any:
    """numpy's booleans as a bool; anything else as it is."""
    numpy = sys.modules.get("numpy")  # where it was never imported there are none
    return bool(value) if numpy is not None and isinstance(value, numpy.bool_) else value


def _mistake(message: str) -> PydanticCustomError:
    return PydanticCustomError("mistake", "{message}", {"message": message})


class _Declared(type(BaseModel)):
    """Makes `Spec(...)` and `Level(...)` in Python raise a SpecError instead of pydantic's ValidationError.

    Pydantic builds the levels inside a spec without calling the class, so inner errors keep their place.
    """

    _expected: Mapping[str, Expected]

    def __call__(cls, /, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            document = from_python(f"<{cls.__name__}>", fields)
            raise SpecError(explain(error, document, cls._expected, _stray_in(fields))) from None


if TYPE_CHECKING:
    _Model = BaseModel  # whose metaclass tells type checkers which arguments a model takes
else:

    class _Model(BaseModel, metaclass=_Declared):
        pass


_AnInteger = BeforeValidator(_as_integer)


class Level(_Model, frozen=True, extra="forbid", revalidate_instances="always"):
    """One coarse level: how many tokens of the next finer level its tokens pool, and how many of them a query keeps.

    Raises `SpecError` for values out of range; any integers in range are legal, powers of two or not, numpy's too.
    """

    _expected: ClassVar = {
        path.removeprefix("levels[]").removeprefix("."): what
        for path, what in _EXPECTED.items()
        if path.startswith("levels[]")
    }

    block: Annotated[int, Field(strict=True, ge=MIN_BLOCK, le=MAX_BLOCK), _AnInteger] = Field(
        description="b_l: how many tokens of the next finer level one token of this level pools. Any integer."
    )
    topk: Annotated[int, Field(strict=True, ge=MIN_TOPK, le=MAX_TOPK), _AnInteger] = Field(
        description="K_l: how many tokens of this level each query keeps; all of them where there are fewer."
    )


_Enrich = Annotated[
    Annotated[Literal["all", "none"], Tag("word")]
    | Annotated[tuple[Annotated[int, Field(strict=True, ge=1), _AnInteger], ...], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "word"),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["all", "none"]},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1, "maximum": MAX_LEVELS},
                    "maxItems": MAX_LEVELS,
                    "uniqueItems": True,
                },
            ]
        }
    ),
]


class Spec(_Model, frozen=True, extra="forbid"):
    """A log-linear sparse attention: everything of docs/semantics.md that does not depend on the length.

    Raises `SpecError`, naming all mistakes at once, for anything that is not legal. `enrich` is brought into one form:
    a list of all levels is `"all"`, an empty one `"none"`, any other ascending; so specs that mean the same are equal.
    """

    _expected: ClassVar = _EXPECTED

    name: Annotated[str, Field(strict=True), AfterValidator(_is_a_name)] = Field(
        description="Names the module and its operator: a Python identifier, ASCII, starting with a letter.",
        json_schema_extra={"pattern": f"^{_NAME_PATTERN}$"},
    )
    description: Annotated[str, Field(strict=True, max_length=MAX_DESCRIPTION), AfterValidator(_is_plain_text)] = Field(
        default="", description="What this spec is for, in words."
    )
    head_dim: Annotated[int, Field(strict=True, ge=MIN_HEAD_DIM, le=MAX_HEAD_DIM), _AnInteger] = Field(
        description="D: the size of one head's vectors. Any integer."
    )
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=MAX_LEVELS), BeforeValidator(_is_a_list)] = (
        Field(description="The coarse levels, finest first: level 1 pools tokens, level 2 pools level 1, and so on.")
    )
    enrich: _Enrich = Field(
        default="all",
        description="The levels whose coarse tokens a query attends to beside the fine ones: all, none, or a list.",
    )
    reweight: Annotated[bool, Field(strict=True), BeforeValidator(_as_bool)] = Field(
        default=True, description="Whether a coarse token counts as often as the tokens it covers (true), or once."
    )

    @field_validator("enrich", mode="after")
    @classmethod
    def _one_form(
        cls, value: Literal["all", "none"] | tuple[int, ...], info: ValidationInfo
    ) -> Literal["all", "none"] | tuple[int, ...]:
        levels = info.data.get("levels")  # absent when they are wrong themselves; then there is an error anyway
        if isinstance(value, str) or levels is None:
            return value
        if any(_stray(value, len(levels))):
            raise PydanticCustomError("found", "see _stray_in, which finds these also in a spec with other mistakes")
        ascending = tuple(sorted(value))
        return "all" if len(ascending) == len(levels) else ascending or "none"

    @property
    def num_levels(self) -> int:
        """L, the number of coarse levels."""
        return len(self.levels)

    @property
    def enriched_levels(self) -> tuple[int, ...]:
        """The numbers of the levels that `enrich` names, ascending."""
        if isinstance(self.enrich, tuple):
            return self.enrich
        return tuple(range(1, self.num_levels + 1)) if self.enrich == "all" else ()

    def block(self, level: int) -> int:
        """b_l: how many tokens of level `level - 1` one token of `level` pools; IndexError without such a level."""
        return self._at(level).block

    def topk(self, level: int) -> int:
        """K_l: how many tokens of `level` each query token of that level keeps; IndexError without such a level."""
        return self._at(level).topk

    def span(self, level: int) -> int:
        """P_l: how many tokens one token of `level` covers; 1 at level 0. IndexError without such a level."""
        return 1 if level == 0 else self.block(level) * self.span(level - 1)

    def _at(self, level: int) -> Level:
        if not 1 <= level <= self.num_levels:
            raise IndexError(f"{self.name}: expected a level from 1 to {self.num_levels}, got {level}")
        return self.levels[level - 1]

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced and all of them checked, which pydantic's own method does not do."""
        return type(self)(**(dict(self) | dict(update or {})))

    def canonical(self) -> str:
        """JSON with sorted keys and `enrich` as a list: equal for two specs exactly when they are equal. ASCII."""
        content = self.model_dump(mode="json") | {"enrich": list(self.enriched_levels)}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """The SHA-256 of `canonical()`, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode("ascii")).hexdigest()

    def to_yaml(self) -> str:
        """The text of a spec file that loads as an equal spec."""
        return f"{SCHEMA_LINE}\n# The finest level comes first.\n{plain_yaml(self.model_dump(mode='json'))}"


def load(source: str | os.PathLike[str] | Mapping[str, Any] | Spec) -> Spec:
    """The spec in a file, in a mapping, or the one that is given.

    Raises `MissingSpecFile` when there is no file at the path, and `SpecError` for everything that is wrong with what
    is there: all mistakes together, each with file, line and column (or `<dict>`), in the order of the file.
    """
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return _checked(from_python("<dict>", source))
    if isinstance(source, str) and "\n" in source:
        raise _refused("the text of a spec (write it to a file, or pass a dict)")
    if isinstance(source, str | os.PathLike):
        return _checked(read(os.fsdecode(source)))
    raise _refused(describe(source))


def _refused(came: str) -> SpecError:
    return SpecError([Mistake("load", "", f"expected a path, a mapping or a Spec, got {came}")])


def _checked(document: Document) -> Spec:
    error = None
    try:
        spec = Spec.model_validate(document.data)
        if not document.mistakes:
            return spec
    except ValidationError as found:
        error = found
    raise SpecError(explain(error, document, _EXPECTED, _stray_in(document.data)))


def _stray(enrich: list[Any] | tuple[Any, ...], num_levels: int) -> Iterator[tuple[int, str]]:
    """The index and the message of every level number that names no level, or one that was named before."""
    named: set[int] = set()
    for index, level in enumerate(map(_as_integer, enrich)):
        if type(level) is not int or level < 1:
            continue  # no level number at all: the field's own check says so
        if level > num_levels:
            has = "there is 1 level" if num_levels == 1 else f"there are {num_levels} levels"
            yield index, f"expected a level that exists, got {describe(level)} ({has})"
        elif level in named:
            yield index, f"expected each level once, got {level} again"
        named.add(level)


def _stray_in(data: Any) -> Iterator[tuple[Keys, str]]:
    """`_stray` for data that may be wrong elsewhere too: a person wants to hear of all mistakes at once."""
    if not isinstance(data, Mapping):
        return
    enrich, levels = data.get("enrich"), data.get("levels")
    if isinstance(enrich, list | tuple) and isinstance(levels, list | tuple) and 1 <= len(levels) <= MAX_LEVELS:
        for index, message in _stray(enrich, len(levels)):
            yield ("enrich", index), message


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec file, by which editors complete and check it as it is typed."""
    schema = Spec.model_json_schema()
    schema.update(title="llsa_gen spec", description="A log-linear sparse attention for llsa_gen to compile.")
    schema["$defs"]["Level"]["description"] = "One coarse level."
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | schema


def schema_text() -> str:
    """What stands in `spec/schema.json`."""
    return json.dumps(json_schema(), indent=2) + "\n"
