"""The store when things go wrong: broken entries, directories that cannot be written, locks, crashes."""

import errno
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen.errors import CacheError
from llsa_gen.store import CACHE_DIR_VARIABLE, LOCK_FILE, STAGING_PREFIX, Key, Store
from llsa_gen.store import store as store_module
from llsa_gen.store.entry import RECORD_FILE

TEXT = "VALUE = 1\n" * 100
KEY = Key("llsa_l2", {"spec": "a" * 64, "template:forward.py.j2": "b" * 64, "torch": "2.13.0"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not complained yet."""
    monkeypatch.setattr(store_module, "_warned_about", set())


@contextmanager
def fresh_store() -> Iterator[Store]:
    """For properties, which a fixture would give one directory for all examples."""
    with tempfile.TemporaryDirectory() as root:
        yield Store(root)


def with_part(key: Key, part: str, value: str) -> Key:
    return Key(key.name, {**key.parts, part: value})


def staged(root: Path) -> list[Path]:
    return list(root.glob(f"{STAGING_PREFIX}*"))


# --- broken entries


def check_replaced(store: Store) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None and path.read_text() == TEXT
    assert store.get(KEY) == path
    [entry] = store.entries()
    assert entry.intact and entry.parts == KEY.parts
    assert staged(store.root) == []


@given(st.data())
def test_any_changed_byte_or_length_of_the_module_is_a_miss(data: st.DataObject) -> None:
    with fresh_store() as store:
        path = store.put(KEY, TEXT)
        assert path is not None
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        other = data.draw(st.integers(1, 255))
        flipped = content[:place] + bytes([content[place] ^ other]) + content[place + 1 :]
        path.write_bytes(data.draw(st.sampled_from([flipped, content[:place], content + b"\n"])))
        assert store.get(KEY) is None and store.read(KEY) is None
        assert not store.entries()[0].intact
        assert store.why(KEY).outcome == "broken"
        check_replaced(store)


@given(st.data())
def test_a_damaged_record_never_gives_a_wrong_text(data: st.DataObject) -> None:
    with fresh_store() as store:
        path = store.put(KEY, TEXT)
        assert path is not None
        record = path.with_name(RECORD_FILE)
        content = record.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        flipped = content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
        record.write_bytes(data.draw(st.sampled_from([flipped, content[:place]])))
        assert store.read(KEY) in (None, TEXT)  # a damaged date is still the right entry
        store.entries()
        check_replaced(store)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"name": 1, "parts": []}',
        b'{"name": "..", "parts": {}}',
        b'{"name": "a", "parts": {}, "created": "0001-01-01T00:00:00+23:00", "sha256": ""}',
    ],
)
def test_a_garbage_record_is_a_miss_and_replaced(store: Store, garbage: bytes) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None
    path.with_name(RECORD_FILE).write_bytes(garbage)
    assert store.get(KEY) is None
    [entry] = store.entries()
    assert (entry.name, entry.intact, entry.path) == ("llsa_l2", False, path)
    check_replaced(store)


@pytest.mark.parametrize("missing", [RECORD_FILE, "llsa_l2.py"])
def test_a_missing_piece_is_a_miss_and_replaced(store: Store, missing: str) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None
    path.with_name(missing).unlink()
    assert store.get(KEY) is None
    check_replaced(store)


def test_the_record_of_another_key_is_a_miss(store: Store) -> None:
    other = with_part(KEY, "torch", "2.14.0")
    path, other_path = store.put(KEY, TEXT), store.put(other, "VALUE = 2\n")
    assert path is not None and other_path is not None
    for file in (RECORD_FILE, "llsa_l2.py"):  # a consistent pair, in the wrong place
        path.with_name(file).write_bytes(other_path.with_name(file).read_bytes())
    assert store.get(KEY) is None
    assert store.get(other) is not None


def test_a_cache_that_vanishes_while_it_is_written_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def replace_after_a_clear(source: Path, target: Path) -> None:
        monkeypatch.undo()
        shutil.rmtree(store.root)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_a_clear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.put(KEY, TEXT) == store.get(KEY) != None  # noqa: E711


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_entry_that_vanishes_while_it_is_mended_is_published_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = store.put(KEY, TEXT)
    assert path is not None
    path.write_text("broken")
    replace, calls = os.replace, itertools.count(1)

    def replace_after_a_clear(source: Path, target: Path) -> None:
        if next(calls) == step:  # the directory (refused, as it is not empty), the module, the record
            shutil.rmtree(path.parent)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_a_clear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.put(KEY, TEXT) == store.get(KEY) == path
    assert staged(store.root) == []


# --- directories that cannot be written


def check_degrades(store: Store, error: str) -> None:
    """put gives None, once with a warning that names the directory and the error; fetch still gives the text."""
    with pytest.warns(RuntimeWarning) as caught:
        assert store.put(KEY, TEXT) is None
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(store.root) in message and error in message and CACHE_DIR_VARIABLE in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.put(KEY, TEXT) is None
        assert store.put(with_part(KEY, "torch", "2"), TEXT) is None
        assert store.fetch(KEY, lambda: TEXT) == (TEXT, None)
        assert store.get(KEY) is None


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: object, **_: object) -> None:
        raise OSError(code, os.strerror(code), str(args[0]))

    return fail


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("function", ["pathlib.Path.mkdir", "pathlib.Path.write_bytes", "os.replace"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT])
def test_no_step_of_publishing_may_fail_the_caller(
    store: Store, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    monkeypatch.setattr(function, failing(code))
    check_degrades(store, os.strerror(code))
    monkeypatch.undo()
    assert staged(store.root) == []


@pytest.mark.usefixtures("unwarned")
def test_a_disk_that_fills_up_half_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        failing(errno.ENOSPC)(path)

    monkeypatch.setattr(Path, "write_bytes", write_half)
    check_degrades(store, os.strerror(errno.ENOSPC))
    assert staged(store.root) == [] and store.entries() == []


@pytest.mark.usefixtures("unwarned")
def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    store = Store(tmp_path / "cache")
    check_degrades(store, os.strerror(errno.EEXIST))
    assert (tmp_path / "cache").read_text() == "not a directory"
    for human_asks in (store.entries, store.clear, lambda: store.why(KEY)):
        with pytest.raises(CacheError, match="cannot be listed"):
            human_asks()


@pytest.mark.usefixtures("unwarned")
def test_a_file_where_the_entry_should_be_is_not_ours_to_remove(store: Store) -> None:
    store.root.mkdir()
    (store.root / KEY.digest).write_text("somebody's")
    with pytest.warns(RuntimeWarning, match=os.strerror(errno.ENOTDIR)):
        assert store.fetch(KEY, lambda: TEXT) == (TEXT, None)
    assert store.clear() == 0
    assert (store.root / KEY.digest).read_text() == "somebody's"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not stop root")
@pytest.mark.usefixtures("unwarned")
def test_a_directory_without_permission(store: Store) -> None:
    store.root.mkdir(mode=0o500)
    check_degrades(store, os.strerror(errno.EACCES))


@pytest.mark.usefixtures("unwarned")
def test_without_a_home_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CACHE_DIR_VARIABLE)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_args, **_kwargs: Path("~/.cache/llsa_gen"))
    with pytest.warns(RuntimeWarning, match=CACHE_DIR_VARIABLE):
        assert Store().put(KEY, TEXT) is None
    assert Store().get(KEY) is None and Store().entries() == []
    assert "no entry of this name" in str(Store().why(KEY))
    assert list(tmp_path.iterdir()) == []


def test_what_is_stored_is_still_found_where_nothing_can_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.put(KEY, TEXT)
    for function in ("pathlib.Path.mkdir", "pathlib.Path.write_bytes", "os.replace"):
        monkeypatch.setattr(function, failing(errno.EROFS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(KEY) == path
        assert store.put(KEY, TEXT) == path
        assert store.fetch(KEY, pytest.fail) == (TEXT, path)


def test_an_entry_that_cannot_be_removed_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, TEXT)
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with pytest.raises(CacheError, match=r"cannot be cleared.*llsa_l2\.py"):
        store.clear()


# --- locks and crashes


def test_a_lock_that_is_held_too_long_is_done_without(store: Store) -> None:
    store.root.mkdir()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(store.root / LOCK_FILE):
            held.set()
            done.wait(600)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(600)
        impatient = Store(store.root, lock_timeout=0.3)
        start = time.monotonic()
        assert impatient.put(KEY, TEXT) is not None
        assert time.monotonic() - start > 0.25  # it did wait, or the lock would be for nothing
        assert holder.is_alive()  # and not until it got the lock
        assert impatient.get(KEY) is not None
        assert impatient.clear() == 1
    finally:
        done.set()
        holder.join()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks(store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def acquire(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert store.put(KEY, TEXT) == store.get(KEY) != None  # noqa: E711
    assert store.clear() == 1


# Dies as hard as a process can while it holds the lock and everything but the last step is done.
CRASH = """
import os, signal, sys
from llsa_gen.store import store
store.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.Store(sys.argv[1]).put(store.Key("llsa_l2", {"spec": "1"}), "VALUE = 1")
"""


def test_a_crash_while_publishing_is_harmless(store: Store) -> None:
    assert subprocess.run([sys.executable, "-c", CRASH, str(store.root)]).returncode != 0
    [left] = staged(store.root)
    assert (store.root / LOCK_FILE).exists()
    key = Key("llsa_l2", {"spec": "1"})
    assert store.get(key) is None and store.entries() == []

    with FileLock(store.root / LOCK_FILE, timeout=0):
        pass  # a dead process holds no lock
    assert store.put(key, "VALUE = 1") is not None
    assert left.exists()  # it could still be somebody's

    two_days_ago = time.time() - 2 * 86_400
    os.utime(left, (two_days_ago, two_days_ago))
    store.put(with_part(key, "torch", "2"), "VALUE = 1")
    assert not left.exists()
    assert len(store.entries()) == 2


def test_clear_removes_stale_staging_too(store: Store) -> None:
    left = store.root / f"{STAGING_PREFIX}0"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    assert store.clear() == 0
    assert not left.exists()


def test_entries_that_vanish_while_they_are_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [with_part(KEY, "torch", str(version)) for version in range(3)]
    for key in keys:
        store.put(key, TEXT)
    listing = Path.iterdir

    def listing_before_a_clear(path: Path) -> Iterator[Path]:
        found = list(listing(path))
        monkeypatch.undo()
        Store(store.root).clear()
        store.put(keys[0], TEXT)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", listing_before_a_clear)
    assert [entry.digest for entry in store.entries()] == [keys[0].digest]


# --- places that are occupied


@pytest.fixture
def impatient() -> Iterator[None]:
    """Nothing may be waited for: not a FIFO, which nobody writes."""

    def give_up(*_: object) -> None:
        pytest.fail("it waits for ever")  # a BaseException: no handler takes it for a broken file

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_full_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def make_link_to_directory(path: Path) -> None:
    outside = path.with_name("outside")
    make_full_directory(outside)
    path.symlink_to(outside)


def make_socket(path: Path) -> None:
    # by a short name: the name of a socket has at most some 100 bytes
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{folder}/it")
        os.rename(f"{folder}/it", path)


OCCUPANTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("somebody's"),
    "an empty file": Path.touch,
    "a huge file": lambda path: path.touch() or os.truncate(path, 2**40),
    "an empty directory": Path.mkdir,
    "a full directory": make_full_directory,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a directory": make_link_to_directory,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
}

PLACES = [".", KEY.digest, f"{KEY.digest}/llsa_l2.py", f"{KEY.digest}/{RECORD_FILE}", LOCK_FILE]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such things here")
@pytest.mark.usefixtures("unwarned", "impatient")
@pytest.mark.parametrize("occupant", OCCUPANTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_complete", [False, True])
def test_an_occupied_place_is_repaired_or_passed_over(
    store: Store, place: str, occupant: str, is_complete: bool
) -> None:
    if is_complete:
        store.put(KEY, TEXT)
    occupied = store.root / place
    if occupied.is_dir() and not occupied.is_symlink():
        shutil.rmtree(occupied)
    occupied.unlink(missing_ok=True)
    occupied.parent.mkdir(parents=True, exist_ok=True)
    OCCUPANTS[occupant](occupied)
    precious = list(store.root.parent.rglob("thesis.tex"))
    assert len(precious) == ("full" in occupant or "to a directory" in occupant)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            text, path = store.fetch(KEY, lambda: TEXT)
            assert text == TEXT and path == store.get(KEY)
    assert len(caught) == (0 if path is not None else 1)
    if path is not None:
        assert path.read_text() == TEXT
    for human_asks in (store.entries, lambda: store.why(KEY), store.clear):
        with suppress(CacheError):
            human_asks()
    for file in precious:
        assert file.read_text() == "years of work"
        if "link" in occupant and place != ".":
            assert list(file.parent.iterdir()) == [file], "it is not ours to fill"
    assert staged(store.root) == [] if store.root.is_dir() else True
    if place == LOCK_FILE:
        assert path is not None, "the lock only spares work"
