"""What cannot be read as a spec at all: files that are not there, not text, not YAML, or made to do harm."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llsa_gen.errors import MissingSpecFile, SpecError
from llsa_gen.spec import load

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

SYNTAX = "expected YAML, got a syntax error"
TAG = "expected plain YAML without tags of its own, got the tag"
ALIASES = "expected a spec, got aliases that expand to more than 10000 values"
MANY = "expected a spec, got more than 10000 values"
TOP = "expected a mapping with at least name, head_dim and levels"
# Aliases that grow tenfold a line.
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{key}: &{key} [{','.join([f'*{before}'] * 10)}]\n" for before, key in zip("abcdefg", "bcdefgh", strict=True)
)


def changed(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: expected a spec, got an empty file"),
        ("# nothing but a comment\n", "1:1: expected a spec, got an empty file"),
        ("---\n", f"2:1: {TOP}, got null"),
        ("llsa_l2", f"1:1: {TOP}, got 'llsa_l2'"),
        ("- name: a\n", f"1:1: {TOP}, got a list of 1"),
        (GOOD + "---\n" + GOOD, "10:1: expected one YAML document, got a second one"),
        (GOOD + "---\n", "10:1: expected one YAML document, got a second one"),
        (changed(("two levels", "!!python/object/apply:os.abort []")), f"2:14: {TAG} '!!python/object/apply:os.abort'"),
        (changed(("two levels", "!mine two")), f"2:14: {TAG} '!mine'"),
        (changed(("head_dim:", "!!python/name:os.abort head_dim:")), f"3:1: {TAG} '!!python/name:os.abort'"),
        (changed(("head_dim:", "!mine head_dim:")), f"3:1: {TAG} '!mine'"),
        (changed(("64", "!!int sixty")), f"3:11: {TAG} '!!int'"),
        (changed(("{block: 16, topk: 8}", "{block: 16, topk: 8")),
         f"6:10: {SYNTAX} while parsing a flow mapping (begun at 5:5): expected ',' or '}}', but got ':'"),
        (changed(("two levels", "two: levels")), f"2:17: {SYNTAX}: mapping values are not allowed here"),
        (changed(("two levels", "'two levels")),
         f"10:1: {SYNTAX} while scanning a quoted scalar (begun at 2:14): found unexpected end of stream"),
        (changed(("    topk: 8", "\ttopk: 8")),
         f"7:1: {SYNTAX} while scanning for the next token: found character '\\t' that cannot start any token"),
        (changed(("two levels", "*two")), f"2:14: {SYNTAX}: found undefined alias 'two'"),
        (changed(("two levels", r'"\UFFFFFFFF"')), f"2:17: {SYNTAX}: the escape names no character"),
        (changed(("two levels", "? [a]\n: b")), f"2:14: {SYNTAX}: mapping keys are not allowed here"),
        (changed(("enrich: all", "? [a]\n: b")), "8:3: expected a word as a key, got a list or a mapping"),
        (changed(("two levels", "two\x00levels")), "2:17: expected text, got the control character U+0000"),
        (changed(("two levels", "[" * 2000)), "2:29: expected at most 16 levels of nesting, got more"),
        (GOOD.encode("utf-16"), "1:1: expected UTF-8 text, got the byte 0xff"),
        (changed(("two levels", "größe")).encode("latin-1"), "2:16: expected UTF-8 text, got the byte 0xf6"),
        # aliases that grow tenfold a line, and one that contains itself
        (LAUGHS, f"1:26: {ALIASES}"),
        ("a: &a [*a]\n", "1:4: expected a spec, got an alias inside of what it stands for"),
        ("a: &a {b: &b [{c: *b}]}\n", "1:11: expected a spec, got an alias inside of what it stands for"),
        (f"a: &a {'[' * 10}1{']' * 10}\nb: {'[' * 10}*a{']' * 10}\n",
         "1:12: expected at most 16 levels of nesting, got more by aliases"),
        # many values without an alias, in every form
        ("-\n" * 30_000, f"10000:2: {MANY}"),
        ("[" + "1," * 30_000 + "]", f"1:20000: {MANY}"),
        ("- []\n" * 12_000, f"10000:3: {MANY}"),
        ("".join(f"k{n}: 1\n" for n in range(7_000)), f"5000:8: {MANY}"),
        ("- " * 30_000, "1:33: expected at most 16 levels of nesting, got more"),
        ("? " * 30_000, "1:33: expected at most 16 levels of nesting, got more"),
        ("*" + "x" * 60_000, f"1:1: {SYNTAX}: found undefined alias '{'x' * 97}...{'x' * 39}' (60024 characters)"),
    ],
)  # fmt: skip
def test_what_is_no_spec_at_all(tmp_path: Path, text: str | bytes, expected: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        load(file)
    assert str(caught.value) == f"{file}:{expected}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_text_of_a_spec_is_no_path() -> None:
    with pytest.raises(SpecError, match="got the text of a spec"):
        load(GOOD)


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "llsa_l2.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    for path in ("spec/llsa_2.yaml", "spec/llsa_l2", "llsa_l2"):
        with pytest.raises(MissingSpecFile) as caught:
            load(path)
        assert str(caught.value) == (
            f"{path}: expected a spec file, got no such file; did you mean {Path('spec/llsa_l2.yaml')}?"
        )
    for path in ("spec/zebra.yaml", "spec/llsa_l2.yaml/x.yaml", "nowhere/llsa_l2.yaml"):
        with pytest.raises(MissingSpecFile) as caught:
            load(Path(path))
        assert str(caught.value) == f"{path}: expected a spec file, got no such file"


def test_a_link_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").symlink_to("gone.yaml")
    Path("folder").symlink_to("/no/where")
    Path("b.yaml").symlink_to("a.yaml")
    for path, came in {
        "a.yaml": "a link to gone.yaml, where nothing is",
        "b.yaml": "a link to a.yaml, where nothing is",
        "folder/a.yaml": "the link folder on its way, to /no/where, where nothing is",
        "aa.yaml": "no such file",  # and no advice to take one of the links
    }.items():
        with pytest.raises(MissingSpecFile) as caught:
            load(path)
        assert str(caught.value) == f"{path}: expected a spec file, got {came}"
    Path("gone.yaml").write_text(GOOD)
    assert load("b.yaml") == load("gone.yaml")
    Path("round.yaml").symlink_to("round.yaml")
    with pytest.raises(SpecError, match="cannot be read: Too many levels of symbolic links"):
        load("round.yaml")


def test_what_is_there_but_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: expected a spec file, got a directory"
    with pytest.raises(SpecError, match=r"cannot be read: .*null byte"):
        load("a\0b")
    with pytest.raises(SpecError, match="cannot be read: File name too long"):
        load("a" * 5000)
    with pytest.raises(SpecError) as caught:
        load("a" * 10**6)
    assert len(str(caught.value)) < 5000
    with pytest.raises(SpecError, match="'': expected a spec file, got a directory"):
        load("")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # a mode of 0 would not keep root out
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpecError, match="cannot be read: Permission denied"):
        load(tmp_path / "spec.yaml")


def test_a_file_without_end(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(GOOD + "#" * 70_000)
    for path in (file, "/dev/zero"):
        with pytest.raises(SpecError, match="expected a spec file of at most 65536 bytes, got a longer one"):
            load(path)


# Pieces of YAML that are wrong in many ways when put together at random.
scraps = st.lists(
    st.sampled_from(
        [*GOOD.splitlines(), "- ", "  ", "\n", ": ", "&a ", "*a ", "!!int ", "! ", "{", "}", "[", "]", "'", '"', "|\n",
         "---\n", "...\n", "%YAML 1.1\n", "? ", "\\U", "0x", "~", "\t", "#", ",", "é", "\x85", "<<: *a\n", "1e9999"]
    )
).map("\n".join)  # fmt: skip


@settings(max_examples=300)
@given(
    st.binary()
    | st.text().map(str.encode)
    | scraps.map(str.encode)
    | scraps.map(lambda text: text.replace("\n", "").encode())
)
def test_any_bytes_give_a_spec_or_a_spec_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "spec.yaml"
    file.write_bytes(raw)
    try:
        assert load(file).name
    except SpecError as error:
        assert error.mistakes
        assert all(mistake.where.startswith(f"{file}:") and mistake.message for mistake in error.mistakes)
        assert len(str(error).splitlines()) == min(21, len(error.mistakes))
