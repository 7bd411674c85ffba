"""Reads a spec file into bare data that remembers line and column, and trusts nothing in the file.

The YAML is that of version 1.2, the one that editors check: `010`, `1:30` and `yes` are no numbers and no booleans but
text. Tags cannot make objects, aliases cannot explode, and size and depth are bounded before anything is built.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from llsa_gen.errors import MissingSpecFile, Mistake, SpecError, short
from llsa_gen.spec.mistakes import Document, Keys, Mark, describe, spell

__all__ = ["plain_yaml", "read"]

_MAX_BYTES = 65_536  # the longest legal spec is a twentieth of this
_MAX_DEPTH = 16
_MAX_NODES = 10_000  # as written, and again after aliases are expanded
_MAX_PATH = 4096  # characters of a path that a message repeats: no longer one names a file
_MAX_SYNTAX = 160  # characters of what PyYAML says
_TOO_DEEP = f"expected at most {_MAX_DEPTH} levels of nesting, got more"
_CORE = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2's core schema; constructs nothing."""

    yaml_implicit_resolvers: ClassVar = {}  # not those of version 1.1, which reads 010 as 8 and 1:30 as 90

    def __init__(self, text: str, fail: Callable[[yaml.Mark, str], NoReturn]) -> None:
        super().__init__(text)
        self._fail = fail
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > _MAX_DEPTH:  # the composer is recursive: stop it before Python's stack does
            self._fail(self.peek_event().start_mark, _TOO_DEEP)
        if self._nodes > _MAX_NODES:
            self._fail(self.peek_event().start_mark, f"expected a spec, got more than {_MAX_NODES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read back as text, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Block style for paragraphs, but not for text with space around it, which PyYAML writes wrong.
        return self.represent_scalar(_CORE + "str", data, style="|" if "\n" in data and data == data.strip() else None)


_Dumper.add_representer(str, _Dumper.represent_str)


_SCALARS: dict[str, tuple[re.Pattern[str], str, Callable[[str], Any]]] = {
    "null": (re.compile(r"~|null|Null|NULL|"), "~nN", lambda text: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF", lambda text: text.lower() == "true"),
    "int": (
        re.compile(r"[-+]?(0|[1-9][0-9]{0,99})|0x[0-9a-fA-F]{1,99}|0o[0-7]{1,99}"),
        "-+0123456789",
        lambda text: int(text, 0),
    ),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
        "-+.0123456789",
        float,
    ),
}
for _name, (_pattern, _first, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_CORE + _name, re.compile(f"(?:{_pattern.pattern})\\Z"), list(_first))
_Loader.add_implicit_resolver(_CORE + "null", re.compile(r"\Z"), [""])


def plain_yaml(data: dict[str, Any]) -> str:
    """One key after the other in the given order; of a list, the innermost lists and mappings each in one line."""
    return "".join(
        yaml.dump(
            {key: value},
            Dumper=_Dumper,
            default_flow_style=None if isinstance(value, list) else False,
            allow_unicode=True,
            width=100,
        )
        for key, value in data.items()
    )


def read(path: str | os.PathLike[str]) -> Document:
    """The data of a spec file, and where each part of it stands.

    Raises `MissingSpecFile` when there is no such file and `SpecError`, with one mistake, when what is there cannot be
    read as one YAML document. What can be read but is wrong is left to be found later, keys that are given twice
    excepted: those are in the document's list of mistakes.
    """
    label = short(os.fspath(path), _MAX_PATH) or "''"

    def fail(mark: Mark | yaml.Mark | None, message: str) -> NoReturn:
        if isinstance(mark, yaml.Mark):
            mark = mark.line + 1, mark.column + 1
        raise SpecError([Mistake(f"{label}:{mark[0]}:{mark[1]}" if mark else label, "", message)]) from None

    root = _compose(_text(Path(path), label, fail), fail)
    document = Document(None, label, in_file=True)
    data = _Builder(document, fail).build(root, ())
    return Document(data, label, True, document.values, document.keys, document.mistakes)


def _compose(text: str, fail: Callable[[Mark | yaml.Mark | None, str], NoReturn]) -> yaml.Node:
    """The one document of a text."""
    try:
        loader = _Loader(text, fail)
    except yaml.reader.ReaderError as error:
        fail(_position(text[: error.position]), f"expected text, got the control character U+{error.character:04X}")
    try:
        root = loader.get_node() if loader.check_node() else None
        if root is None:
            fail((1, 1), "expected a spec, got an empty file")
        if loader.check_node():
            fail(loader.peek_event().start_mark, "expected one YAML document, got a second one")
        return root
    except yaml.MarkedYAMLError as error:
        context = f" {error.context}" if error.context else ""
        begun = error.context_mark
        if begun and error.problem_mark and begun.index != error.problem_mark.index:
            context += f" (begun at {begun.line + 1}:{begun.column + 1})"
        problem = short(str(error.problem), _MAX_SYNTAX)  # which may repeat a word of the file, however long
        fail(error.problem_mark or begun, f"expected YAML, got a syntax error{context}: {problem}")
    except SpecError:  # a ValueError as well, but one that has its sentence already
        raise
    except (ValueError, OverflowError):  # what chr() says to "\UFFFFFFFF" is not caught by PyYAML
        fail(loader.get_mark(), "expected YAML, got a syntax error: the escape names no character")


class _Builder:
    """Turns nodes into dicts, lists and scalars, writing down the mark of each."""

    def __init__(self, document: Document, fail: Callable[[yaml.Mark, str], NoReturn]) -> None:
        self._document, self._fail, self._nodes = document, fail, 0
        self._open: set[int] = set()  # nodes that are being built

    def build(self, node: yaml.Node, keys: Keys) -> Any:
        """What a node stands for. Beyond the composer's bounds lead only aliases, for each is built where it stands."""
        self._nodes += 1
        if id(node) in self._open:
            self._fail(node.start_mark, "expected a spec, got an alias inside of what it stands for")
        if len(keys) >= _MAX_DEPTH:
            self._fail(node.start_mark, f"{_TOO_DEEP} by aliases")
        if self._nodes > _MAX_NODES:
            self._fail(node.start_mark, f"expected a spec, got aliases that expand to more than {_MAX_NODES} values")
        self._open.add(id(node))
        data = self._of(node, keys)
        self._open.remove(id(node))
        return data

    def _of(self, node: yaml.Node, keys: Keys) -> Any:
        self._document.values[keys] = _mark(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
            return [self.build(child, (*keys, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag == _CORE + "str":
            return self._whole(node)
        kind = node.tag.removeprefix(_CORE)
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            pattern, _, convert = _SCALARS[kind]
            if pattern.fullmatch(node.value):  # always, unless the kind was named by a tag: !!int eight
                return convert(node.value)
        self._refuse_tag(node)

    def _refuse_tag(self, node: yaml.Node) -> NoReturn:
        tag = node.tag.replace(_CORE, "!!")
        self._fail(node.start_mark, f"expected plain YAML without tags of its own, got the tag {describe(tag)}")

    def _whole(self, node: yaml.ScalarNode) -> str:
        """The text with its surrogate pairs joined: JSON writes most emoji as two escapes, and JSON is YAML."""
        try:
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._fail(node.start_mark, "expected text, got an escape for half a character")

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node.start_mark, "expected a word as a key, got a list or a mapping")
            if key_node.tag.removeprefix(_CORE) not in (*_SCALARS, "str"):
                self._refuse_tag(key_node)
            key, mark = self._whole(key_node), _mark(key_node)
            if key in data:
                first = self._document.keys[(*keys, key)]
                message = f"expected each key once, got it again (first at {first[0]}:{first[1]})"
                self._document.mistakes.append(
                    (mark, Mistake(self._document.where(mark), spell((*keys, key)), message))
                )
                continue
            self._document.keys[(*keys, key)] = mark
            data[key] = self.build(value_node, (*keys, key))
        return data


def _mark(node: yaml.Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _position(before: str) -> Mark:
    """Line and column of the character after `before`."""
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _text(path: Path, label: str, fail: Callable[[Mark | None, str], NoReturn]) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # bounded, for the sake of pipes and devices
    except (FileNotFoundError, NotADirectoryError):
        came = _loose_link(path) or f"no such file{_similar(path)}"
        raise MissingSpecFile(f"{label}: expected a spec file, got {came}") from None
    except IsADirectoryError:
        fail(None, "expected a spec file, got a directory")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fail(None, f"expected a spec file, got one that cannot be read: {reason}")
    if len(raw) > _MAX_BYTES:
        fail(None, f"expected a spec file of at most {_MAX_BYTES} bytes, got a longer one")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mark = _position(raw[: error.start].decode("utf-8-sig", "replace"))
        fail(mark, f"expected UTF-8 text, got the byte 0x{raw[error.start]:02x}")


def _loose_link(path: Path) -> str | None:
    """What to say where the path, or a folder on its way, is a link to nothing."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            link = "a link" if part == path else f"the link {part} on its way,"
            return f"{link} to {short(os.readlink(part), _MAX_PATH)}, where nothing is"
    return None


def _similar(path: Path) -> str:
    """A did-you-mean among the spec files beside the missing one, and in `spec/` for a name without a folder."""
    folders = [path.parent] + ([Path("spec")] if path.parent == Path() else [])
    there = {file.stem: file for folder in folders for file in sorted(folder.glob("*.y*ml")) if file.is_file()}
    nearest = difflib.get_close_matches(path.stem, there, n=1)
    return f"; did you mean {there[nearest[0]]}?" if nearest else ""
