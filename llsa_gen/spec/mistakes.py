"""Turns what pydantic found wrong with a spec into sentences for the person who wrote the spec.

Pydantic knows the field and the value. A `Document` adds the place where that value was written, and a table of
`Expected` the words for what belongs there.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from llsa_gen.errors import Mistake, short

__all__ = ["Document", "Expected", "Keys", "Mark", "describe", "explain", "from_python", "spell"]

Keys = tuple[str | int, ...]  # the way from the top of a spec to a value: ("levels", 1, "topk")
Mark = tuple[int, int]  # line and column, both from 1; for a spec from Python any numbers that sort alike

_MAX_SHOWN = 60  # characters of a wrong value that a message repeats
_MAX_DEPTH = 3  # no field of a spec lies deeper than levels[0].topk
_MAX_GUESSED = 100  # unknown keys that are compared with the known ones, which takes a while


@dataclass(frozen=True)
class Document:
    """The bare data of a spec, before it is checked, with the place where each of its values was written."""

    data: Any
    label: str
    in_file: bool = False
    values: dict[Keys, Mark] = field(default_factory=dict)
    keys: dict[Keys, Mark] = field(default_factory=dict)
    mistakes: list[tuple[Mark, Mistake]] = field(default_factory=list)  # those that reading alone has found

    def where(self, mark: Mark) -> str:
        """`file:line:column`, or the label alone for a spec that came from Python."""
        return f"{self.label}:{mark[0]}:{mark[1]}" if self.in_file else self.label

    def mark(self, keys: Keys, *, of_key: bool = False) -> Mark:
        """Where the value (or the key) at `keys` is written; of a missing one, where what should hold it begins."""
        if of_key and keys in self.keys:
            return self.keys[keys]
        while keys and keys not in self.values:
            keys = keys[:-1]
        return self.values.get(keys, (1, 1))


class Expected(NamedTuple):
    """What belongs at a field: a phrase, and the words to choose among where there are any."""

    phrase: str
    words: tuple[str, ...] = ()


def from_python(label: str, data: Any) -> Document:
    """A document of data that has no file; its mistakes come in the order in which the data lists its values."""
    document = Document(data, label)
    for order, keys in enumerate(_walk(data, ())):
        document.values[keys] = document.keys[keys] = (order, 0)
    return document


def _walk(data: Any, keys: Keys) -> Iterator[Keys]:
    yield keys
    if len(keys) >= _MAX_DEPTH:
        return
    inside = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in inside:
        yield from _walk(value, (*keys, key if isinstance(key, str | int) else str(key)))


def explain(
    error: ValidationError | None,
    document: Document,
    expected: Mapping[str, Expected],
    found: Iterable[tuple[Keys, str]] = (),
) -> list[Mistake]:
    """All the mistakes in a document, in the order of the file.

    `expected` is keyed by paths with empty brackets, `levels[].topk`; it also says which keys exist. `found` are
    mistakes that pydantic cannot see, as way and message. An error of the type `mistake` brings its whole message
    along, one of the type `found` stands for something in `found`.
    """
    mistakes = list(document.mistakes)
    mistakes += [_at(document, document.mark(keys), keys, message) for keys, message in found]
    details = error.errors(include_url=False) if error else []
    unknown = [_keys(detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"][:_MAX_GUESSED]
    misspelt = {(*keys[:-1], nearest) for keys in unknown if (nearest := _nearest(keys[-1], _known(keys, expected)))}
    for detail in details:
        kind, keys, value, context = detail["type"], _keys(detail["loc"]), detail["input"], detail.get("ctx", {})
        if kind == "found" or (kind == "missing" and keys in misspelt):
            continue  # said already: by `found`, or by the did-you-mean of the key that was meant to be this one
        if kind in ("too_short", "too_long") and _fits(len(value), context):
            continue  # pydantic counts only the valid elements; the invalid ones are reported themselves
        if kind in ("extra_forbidden", "invalid_key"):
            key = keys[-1] if kind == "extra_forbidden" else value
            names = _known(keys, expected)
            guess = _hint(key, names) if keys in unknown else ""
            message = f"expected {_either(names)}, got the unknown key {describe(key)}{guess}"
            mistakes.append(_at(document, document.mark(keys, of_key=True), keys, message))
            continue
        if kind == "mistake":
            message = context["message"]
        elif kind == "missing":
            message = f"expected {expected[_shape(keys)].phrase}, but the key is missing"
        else:
            wanted = expected[_shape(keys)]
            shown = _in_yaml(value) if document.in_file else describe(value)
            message = f"expected {wanted.phrase}, got {shown}{_hint(value, wanted.words)}"
        mistakes.append(_at(document, document.mark(keys), keys, message))
    return [mistake for _, mistake in sorted(mistakes, key=lambda item: item[0])]


def describe(value: Any) -> str:
    """A wrong value in at most a few words, on one line; never fails, whatever the value is."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str):
        text = str.__str__(value)  # of a subclass too, whatever it makes of itself
        return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}... ({len(text)} characters)"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken __repr__, or an int of more digits than Python prints
        return f"a value of type {short(type(value).__name__)}"
    return short(text, _MAX_SHOWN)


def _in_yaml(value: Any) -> str:
    """`describe`, but null, true and false as YAML spells them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return describe(value)


def _at(document: Document, mark: Mark, keys: Keys, message: str) -> tuple[Mark, Mistake]:
    return mark, Mistake(document.where(mark), spell(keys), message)


def _keys(loc: tuple[str | int, ...]) -> Keys:
    """Pydantic's location without the tag of the union member, which stands after `enrich`."""
    return (loc[0], *loc[2:]) if loc[:1] == ("enrich",) else loc


def spell(keys: Keys) -> str:
    """`levels[1].topk`."""
    path = ""
    for key in keys:
        if isinstance(key, int) or not key.isidentifier() or len(key) > _MAX_SHOWN:
            path += f"[{describe(key)}]"
        else:
            path += f".{key}" if path else key
    return path


def _shape(keys: Keys) -> str:
    """`levels[].topk`."""
    return "".join("[]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _known(keys: Keys, expected: Mapping[str, Expected]) -> list[str]:
    """The keys that may stand in the mapping in which the key at the end of `keys` stands."""
    holder = _shape(keys[:-1])
    prefix = f"{holder}." if holder else ""
    names = [path.removeprefix(prefix) for path in expected if path.startswith(prefix)]
    return [name for name in names if name.isidentifier()]


def _fits(count: int, limits: Mapping[str, Any]) -> bool:
    return limits.get("min_length", 0) <= count <= limits.get("max_length", count)


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _nearest(word: Any, names: Iterable[str]) -> str | None:
    if not isinstance(word, str) or len(word) > _MAX_SHOWN:
        return None
    meant = difflib.get_close_matches(word.strip().lower().replace("-", "_"), names, n=1)
    return next((name for name in meant if name != word), None)  # what was typed is no advice


def _hint(word: Any, names: Iterable[str]) -> str:
    nearest = _nearest(word, names)
    return f"; did you mean {nearest}?" if nearest else ""
