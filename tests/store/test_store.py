"""The store when all is well: keys, places, round trips, listing, clearing, explaining."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen.errors import CacheError
from llsa_gen.store import CACHE_DIR_VARIABLE, LOCK_FILE, STAGING_PREFIX, Key, Store
from llsa_gen.store.entry import RECORD_FILE

TEXT = "VALUE = 1\n" * 100
KEY = Key("llsa_l2", {"spec": "a" * 64, "template:forward.py.j2": "b" * 64, "torch": "2.13.0"})

names = st.text("abcxyz_é", min_size=1, max_size=8)
part_names = st.text(max_size=6)
part_values = st.text(max_size=6)
part_maps = st.dictionaries(part_names, part_values, max_size=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@contextmanager
def fresh_store() -> Iterator[Store]:
    """For properties, which a fixture would give one directory for all examples."""
    with tempfile.TemporaryDirectory() as root:
        yield Store(root)


def with_part(key: Key, part: str, value: str) -> Key:
    return Key(key.name, {**key.parts, part: value})


# --- keys


@given(names, part_maps, names, part_maps)
def test_digests_are_equal_exactly_when_keys_are(name: str, parts: Any, other_name: str, other_parts: Any) -> None:
    one, two = Key(name, parts), Key(other_name, other_parts)
    assert (one.digest == two.digest) == ((name, parts) == (other_name, other_parts))
    assert (one == two) == (one.digest == two.digest)


@given(names, st.dictionaries(part_names, part_values, min_size=1, max_size=5), st.data())
def test_every_part_changes_the_digest(name: str, parts: dict[str, str], data: st.DataObject) -> None:
    key = Key(name, parts)
    part = data.draw(st.sampled_from(sorted(parts)))
    rest = {other: value for other, value in parts.items() if other != part}
    value = data.draw(part_values.filter(lambda value: value != parts[part]))
    renamed = data.draw(part_names.filter(lambda other: other not in parts))
    changed, removed, moved = {**parts, part: value}, rest, {**rest, renamed: parts[part]}
    digests = {Key(name, variant).digest for variant in (changed, removed, moved)} | {Key(name + "_", parts).digest}
    assert len(digests) == 4
    assert key.digest not in digests


@given(names, part_maps, st.randoms(use_true_random=False))
def test_the_order_of_parts_does_not_matter(name: str, parts: dict[str, str], random: Any) -> None:
    items = list(parts.items())
    random.shuffle(items)
    assert Key(name, dict(items)).digest == Key(name, parts).digest
    assert hash(Key(name, dict(items))) == hash(Key(name, parts))


def test_a_key_is_not_changed_from_outside() -> None:
    parts = {"spec": "1"}
    key = Key("a", parts)
    parts["spec"] = "2"
    assert key.parts == {"spec": "1"}
    with pytest.raises(TypeError):
        key.parts["spec"] = "2"  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "a b", "1a", "a.py", "a\0"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(CacheError, match="expected a Python identifier"):
        Key(name, {})


def test_a_part_that_is_no_string_is_refused() -> None:
    with pytest.raises(CacheError, match="'torch', got None"):
        Key("a", {"torch": None})  # pyright: ignore[reportArgumentType]


# --- where it is


def test_the_environment_is_read_when_the_store_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "early"))
    store = Store()
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "late"))
    assert store.get(KEY) is None and store.entries() == [] and store.clear() == 0
    assert list(tmp_path.iterdir()) == []  # looking makes no directory
    path = store.put(KEY, TEXT)
    assert path == tmp_path / "late" / KEY.digest / "llsa_l2.py"


def test_the_default_is_the_platform_s_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_DIR_VARIABLE)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_args, **_kwargs: tmp_path / "platform")
    assert Store().root == tmp_path / "platform"


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "~/kernels")
    assert Store().root == tmp_path / "kernels"


def test_a_relative_directory_gives_paths_that_outlive_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("cache")
    path = store.put(KEY, TEXT)
    monkeypatch.chdir("/")
    assert path is not None and path.read_text() == TEXT and store.get(KEY) == path


# --- round trips


@given(names, part_maps, st.text())
def test_what_is_put_is_read(name: str, parts: dict[str, str], text: str) -> None:
    key = Key(name, parts)
    with fresh_store() as store:
        assert store.get(key) is None and store.read(key) is None
        path = store.put(key, text)
        assert path is not None and path == store.get(key)
        assert path.read_bytes() == text.encode()
        assert store.read(key) == text
        assert not list(store.root.glob(f"{STAGING_PREFIX}*"))


def test_putting_again_leaves_the_entry_as_it_is(store: Store) -> None:
    store.put(KEY, TEXT)
    [before] = store.entries()
    store.put(KEY, TEXT)
    assert store.entries() == [before]


def test_another_text_under_the_same_key_replaces_it(store: Store) -> None:
    store.put(KEY, TEXT)
    store.put(KEY, "VALUE = 2\n")
    assert store.read(KEY) == "VALUE = 2\n"
    assert len(store.entries()) == 1


def test_fetch_renders_on_a_miss_only(store: Store) -> None:
    rendered: list[str] = []

    def render() -> str:
        rendered.append(TEXT)
        return TEXT

    first, second = store.fetch(KEY, render), store.fetch(KEY, render)
    assert first == second == (TEXT, store.get(KEY))
    assert len(rendered) == 1


# --- listing and clearing


def test_entries_say_what_is_there_newest_first(store: Store) -> None:
    before = datetime.now(UTC)
    keys = [with_part(KEY, "torch", str(version)) for version in range(3)]
    for key in keys:
        store.put(key, TEXT)
    entries = store.entries()
    assert [entry.digest for entry in entries] == [key.digest for key in reversed(keys)]
    entry = entries[-1]
    assert (entry.name, entry.size_bytes, entry.parts) == ("llsa_l2", len(TEXT), keys[0].parts)
    assert entry.intact and entry.path == store.get(keys[0])
    created = datetime.fromisoformat(entry.created)
    assert created.utcoffset() == timedelta(0) and before <= created <= datetime.now(UTC)


def test_the_record_is_for_people_too(store: Store) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None
    record = json.loads(path.with_name(RECORD_FILE).read_text())
    assert record["name"] == "llsa_l2" and list(record["parts"].items()) == list(KEY.parts.items())


def test_clear_by_name(store: Store) -> None:
    other = Key("topk_l1", KEY.parts)
    for key in (KEY, with_part(KEY, "torch", "2"), other):
        store.put(key, TEXT)
    assert store.clear("no_such_name") == 0
    assert store.clear("llsa_l2") == 2
    assert [entry.name for entry in store.entries()] == ["topk_l1"] and store.get(other) is not None
    assert store.clear() == 1
    assert store.entries() == []


def test_clear_takes_broken_entries_along(store: Store) -> None:
    for version, damage in enumerate(["truncate", "garble", "no module", "no record's module"]):
        path = store.put(with_part(KEY, "torch", str(version)), TEXT)
        assert path is not None
        if damage == "truncate":
            path.write_text("")
        if damage.startswith("no"):
            path.unlink()
        if damage in ("garble", "no record's module"):
            path.with_name(RECORD_FILE).write_text("{")
    assert store.clear() == 4
    assert [file.name for file in store.root.iterdir()] == [LOCK_FILE]


def test_clear_spares_what_is_not_an_entry(store: Store, tmp_path: Path) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / RECORD_FILE).write_text("{")
    foreign = {
        "thesis.tex": "years of work",
        "llsa_l2.py": "mine",
        "entry.json": "{}",
        f"{'a' * 63}/entry.json": "too short a name",
        f"{'A' * 64}/entry.json": "not a digest",
        f"{'b' * 64}/notes.txt": "no record",
        f"{'c' * 64}/entry.json": "somebody else's record",
        f"{'c' * 64}/data.bin": "and data",
        f"{'d' * 64}/entry.json": "{}",
        f"{'d' * 64}/one.py": "two",
        f"{'d' * 64}/two.py": "modules",
        f"{'e' * 64}/only.py": "no record",
        f"{KEY.digest}/notes.txt": "in an entry of ours",
        ".git/config": "[core]",
    }
    for name, content in foreign.items():
        (store.root / name).parent.mkdir(exist_ok=True)
        (store.root / name).write_text(content)
    (store.root / ("f" * 64)).symlink_to(outside)
    (path.parent / "__pycache__").mkdir()

    assert store.clear() == 1
    assert store.get(KEY) is None and not path.exists() and not (path.parent / "__pycache__").exists()
    assert {name: (store.root / name).read_text() for name in foreign} == foreign
    assert (outside / RECORD_FILE).exists()


# --- explaining


def test_why_a_hit(store: Store) -> None:
    path = store.put(KEY, TEXT)
    explanation = store.why(KEY)
    assert explanation.outcome == "hit" and str(path) in str(explanation)


def test_why_an_unknown_name_misses(store: Store) -> None:
    store.put(Key("topk_l1", KEY.parts), TEXT)
    explanation = store.why(KEY)
    assert explanation.outcome == "unknown name" and explanation.differences == ()
    assert str(explanation).startswith(f"llsa_l2 ({KEY.digest[:12]}): miss, no entry of this name in {store.root}")


@given(part_maps, part_maps)
def test_the_differences_lead_from_what_is_stored_to_what_is_asked(
    stored: dict[str, str], current: dict[str, str]
) -> None:
    with fresh_store() as store:
        store.put(Key("a", stored), TEXT)
        explanation = store.why(Key("a", current))
        assert (explanation.outcome == "hit") == (stored == current)
        rebuilt = dict(stored)
        for part, kind, before, now in explanation.differences:
            expected = "added" if part not in stored else "removed" if part not in current else "changed"
            assert kind == expected
            assert rebuilt.pop(part, None) == before != now
            if now is not None:
                rebuilt[part] = now
        assert rebuilt == current


def test_why_compares_with_the_closest_intact_entry(store: Store) -> None:
    near, far = with_part(KEY, "torch", "2.12.0"), Key("llsa_l2", {"spec": "c" * 64})
    store.put(near, TEXT)
    store.put(far, TEXT)  # newer
    explanation = store.why(KEY)
    assert explanation.closest is not None and explanation.closest.digest == near.digest
    assert explanation.differences == (("torch", "changed", "2.12.0", "2.13.0"),)

    near_path = store.get(near)
    assert near_path is not None
    near_path.write_text("")
    explanation = store.why(KEY)
    assert explanation.closest is not None and explanation.closest.digest == far.digest


def test_of_equally_close_entries_the_newest_is_meant(store: Store) -> None:
    for version in ("1", "2"):
        store.put(with_part(KEY, "torch", version), TEXT)
    assert store.why(KEY).differences[0].stored == "2"


def test_an_explanation_reads_as_a_table(store: Store) -> None:
    store.put(Key("llsa_l2", {"spec": "a" * 64, "torch": "2.12.0", "gone": "1"}), TEXT)
    first, *rows = str(store.why(KEY)).splitlines()
    assert first.endswith("differs in 3 of 4 parts:")
    assert rows == [
        "  template:forward.py.j2  added    bbbbbbbbbbbb",
        "  torch                   changed  2.12.0 -> 2.13.0",
        "  gone                    removed  1",
    ]
