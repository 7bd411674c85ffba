"""Whose files the cache may hold: what others can write is never read, what is written here nobody else can write."""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llsa_gen import Level, Spec, compile, compiler
from llsa_gen.errors import CacheRefused
from llsa_gen.store import CACHE_DIR_VARIABLE, LOCK_FILE, Key, Store, trust, tuned
from llsa_gen.store import store as store_module
from llsa_gen.store.entry import RECORD_FILE
from llsa_gen.store.loading import load_module

TEXT = "VALUE = 1\n"
KEY = Key("llsa_l2", {"spec": "a" * 64})
SPEC = Spec(name="trusted", head_dim=16, levels=(Level(block=4, topk=2),))
STRANGER = 4242

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not complained yet, nor compiled."""
    monkeypatch.setattr(store_module, "_warned_about", set())
    monkeypatch.setattr(tuned, "_told", set())
    monkeypatch.setattr(compiler, "_compiled", {})


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def put(store: Store) -> Path:
    path = store.put(KEY, TEXT)
    assert path is not None
    return path


def opened(mode: int) -> Callable[[Path], None]:
    """What lets more people write a file or directory."""
    return lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, -1, follow_symlinks=False)


SPOILED = [
    pytest.param(opened(0o020), "may be written by others than its owner", id="group"),
    pytest.param(opened(0o002), "may be written by others than its owner", id="others"),
    pytest.param(give_away, f"belongs to user {STRANGER}, neither", id="stranger", marks=as_root),
]


# ---- what is written --------------------------------------------------------------------------------------------


def test_what_is_written_is_trusted_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    store = Store(tmp_path / "above" / "further above" / "cache")
    row = {"stage": "attend", "when": {"element": 2}, "set": {"num_warps": 8}, "why": "a test"}
    with no_warning():
        path = put(store)
        tuned.add(store, "cuda:80", [row])
        assert store.get(KEY) == path and store.fetch(KEY, pytest.fail) == (TEXT, path)
        assert tuned.targets(store)["cuda:80"].rows[-1].set == {"num_warps": 8}
        path.write_text("broken")
        assert store.put(KEY, TEXT) == store.get(KEY) == path
        compiled = compile(SPEC, store=store)
        assert compiled.path is not None and store.refusal() is None
    everything = [tmp_path / "above", *(tmp_path / "above").rglob("*")]
    assert len(everything) > 8 and not [file for file in everything if file.stat().st_mode & 0o022]


def test_the_modes_are_those_of_the_umask_so_that_an_image_can_bring_a_cache(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = put(Store(tmp_path / "cache"))
    finally:
        os.umask(before)
    assert all(piece.stat().st_mode & 0o444 == 0o444 for piece in (path, path.parent, path.with_name(RECORD_FILE)))


# ---- what is refused --------------------------------------------------------------------------------------------


def check_refused(store: Store, reason: str) -> None:
    """One warning that says why, a text that is rendered, nothing read, nothing changed."""
    before = {file: file.lstat().st_mtime_ns for file in store.root.rglob("*")}
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert store.fetch(KEY, lambda: "VALUE = 2\n") == ("VALUE = 2\n", None)
    assert len(caught) == 1 and CACHE_DIR_VARIABLE in str(caught[0].message)
    with no_warning():
        assert store.fetch(KEY, lambda: "VALUE = 3\n") == ("VALUE = 3\n", None)
        assert store.get(KEY) is None and store.read(KEY) is None
    why = store.why(KEY)
    assert why.outcome == "refused" and reason in str(why)
    [entry] = store.entries()
    assert entry.refused is not None and reason in entry.refused and not entry.intact
    with pytest.raises(CacheRefused, match=reason):
        load_module(store.root / KEY.digest / "llsa_l2.py")
    assert {file: file.lstat().st_mtime_ns for file in store.root.rglob("*")} == before


@pytest.mark.parametrize("place", [".", KEY.digest, f"{KEY.digest}/llsa_l2.py", f"{KEY.digest}/{RECORD_FILE}"])
@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_what_somebody_else_may_have_written_is_refused(
    store: Store, place: str, spoil: Callable[[Path], None], reason: str
) -> None:
    put(store)
    spoil(store.root / place)
    check_refused(store, reason)
    if place == ".":
        with pytest.raises(CacheRefused, match=reason):
            store.clear()
    else:
        assert store.refusal() is None
        assert store.clear() == 1 and store.entries() == []


def test_what_belongs_to_neither_the_user_nor_root_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store)
    with no_warning():
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
        if store.root.stat().st_uid == 0:
            assert store.read(KEY) == TEXT, "an image may bring what root has filled"
        else:
            assert store.read(KEY) is None and store.refusal() is not None


@as_root
def test_root_trusts_no_user_s_cache(store: Store) -> None:
    path = put(store)
    for piece in (store.root, path.parent, path, path.with_name(RECORD_FILE)):
        give_away(piece)
    check_refused(store, f"belongs to user {STRANGER}, neither to the one who runs this")


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o1777, False), (0o775, False), (0o755, False)])
@pytest.mark.parametrize("is_there", [True, False])
def test_above_it_everybody_may_write_only_where_nobody_may_replace(
    tmp_path: Path, mode: int, refused: bool, is_there: bool
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    store = Store(above / "between" / "cache")
    if is_there:
        put(store)
    above.chmod(mode)
    if refused:
        with pytest.warns(RuntimeWarning, match="everybody may replace what is in it"):
            assert store.fetch(KEY, lambda: TEXT) == (TEXT, None)
        assert is_there or list(above.iterdir()) == []
    else:
        with no_warning():
            assert store.fetch(KEY, lambda: TEXT).path is not None


@pytest.mark.parametrize("target", ["real", "{}/real", "../{}/real", "second"])
def test_links_to_the_cache_are_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "second").symlink_to("real")
    (tmp_path / "link").symlink_to(target.format(tmp_path if target.startswith("{") else tmp_path.name))
    store = Store(tmp_path / "link" / "cache")
    with no_warning():
        assert put(store) == store.get(KEY)
    assert (tmp_path / "real" / "cache" / KEY.digest).is_dir()
    (tmp_path / "real").chmod(0o777)
    assert "lies above it" in str(store.refusal())


@as_root
def test_a_link_that_a_stranger_made_is_not_followed(tmp_path: Path) -> None:
    real, link = Store(tmp_path / "real"), tmp_path / "link"
    put(real)
    link.symlink_to("real")
    store = Store(link)
    assert store.read(KEY) == TEXT
    give_away(link)
    assert store.read(KEY) is None and f"{link} belongs to user {STRANGER}" in str(store.refusal())


def test_a_planted_module_is_not_executed(store: Store) -> None:
    with no_warning():
        known = compile(SPEC, store=store)
    assert known.path is not None
    [entry] = store.entries()
    store.put(Key(entry.name, entry.parts), "raise SystemExit('planted')\n")
    store.root.chmod(0o777)
    compiler._compiled.clear()
    with pytest.warns(RuntimeWarning, match="cannot use its cache") as caught:
        attention = compile(SPEC, store=store)
    assert len(caught) == 1, "also where tuned schedules are looked for"
    assert attention.path is None and attention.source == known.source


def test_a_file_that_changes_hands_after_the_check_is_not_what_was_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened once: what lies in its place later makes no difference, in either direction."""
    path = put(store)
    fstat, swapped = os.fstat, []

    def swap(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        if not swapped:
            swapped.append(True)
            path.unlink()
            path.write_text("planted")
        return status

    monkeypatch.setattr(os, "fstat", swap)
    assert trust.read(path) == TEXT.encode() and swapped
    assert trust.read(path) == b"planted", "or the test would show nothing"


# ---- tuned tables -----------------------------------------------------------------------------------------------

ROW = {"stage": "attend", "when": {"element": 2}, "set": {"num_warps": 8}, "why": "a test"}


@pytest.mark.parametrize("place", ["schedules", "schedules/cuda_80.json"])
@pytest.mark.parametrize(("spoil", "reason"), SPOILED)
def test_a_table_that_others_may_write_is_ignored(
    store: Store, place: str, spoil: Callable[[Path], None], reason: str
) -> None:
    plain = tuned.targets(store)["cuda:80"].rows
    file = tuned.add(store, "cuda:80", [ROW])
    assert tuned.targets(store)["cuda:80"].rows != plain
    spoil(store.root / place)
    with pytest.warns(RuntimeWarning, match=f"tuned schedules are ignored: .*{reason}") as caught:
        assert tuned.targets(store)["cuda:80"].rows == plain
    assert len(caught) == 1
    with no_warning():
        assert tuned.targets(store)["cuda:80"].rows == plain
    with pytest.raises(CacheRefused, match=reason):
        tuned.add(store, "cuda:80", [ROW])
    assert file.exists()


def test_nothing_tuned_is_read_from_or_written_to_a_cache_that_is_refused(store: Store) -> None:
    plain = tuned.targets(store)["cuda:80"].rows
    tuned.add(store, "cuda:80", [ROW])
    store.root.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="cannot use its cache") as caught:
        assert tuned.targets(store)["cuda:80"].rows == plain
        assert store.put(KEY, TEXT) is None
    assert len(caught) == 1
    with pytest.raises(CacheRefused):
        tuned.add(store, "cuda:80", [ROW])
    assert not (store.root / LOCK_FILE).exists()
