"""The store: emitted modules kept as files under the hash of everything that made them.

It knows directories, locks and who else may be writing; `llsa_gen.store.entry` knows the files of one entry, and
`llsa_gen.store.trust` whose they may be. None knows what the texts are: `llsa_gen.store.loading` turns them into
Python modules.
"""

import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llsa_gen import forks
from llsa_gen.errors import CacheError, CacheRefused
from llsa_gen.store import trust
from llsa_gen.store.entry import DIGEST, Entry, Key, inspect_entry, publish, read_entry, remove_entry, stage

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["CACHE_DIR_VARIABLE", "Difference", "Entry", "Explanation", "Key", "Store", "Stored", "locked"]

CACHE_DIR_VARIABLE = "LLSA_GEN_CACHE_DIR"
LOCK_FILE = ".llsa-gen.lock"
STAGING_PREFIX = ".llsa-gen-staging-"
PUBLISHING_ATTEMPTS = 10  # a second one is needed only where somebody removes files in the very moment of publishing
STALE_STAGING_SECONDS = 24 * 60 * 60

_warned_about: set[str] = set()
_warning_lock = forks.Lock()


class Stored(NamedTuple):
    """A module's verified text, and the file that holds it; None when it could not be written."""

    text: str
    path: Path | None


class Difference(NamedTuple):
    """A part of the key that is not as it was: `stored` is None where it was added, `current` where it was removed."""

    part: str
    kind: Literal["added", "removed", "changed"]
    stored: str | None
    current: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a key hits or misses; `closest` and `differences` are set when `outcome` is "differs"."""

    key: Key
    outcome: Literal["hit", "refused", "broken", "unknown name", "differs"]
    detail: str
    closest: Entry | None = None
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.key.name} ({self.key.digest[:12]}): {self.detail}"]
        width = max((len(difference.part) for difference in self.differences), default=0)
        for part, kind, stored, current in self.differences:
            values = " -> ".join(_abbreviate(value) for value in (stored, current) if value is not None)
            lines.append(f"  {part:<{width}}  {kind:<7}  {values}")
        return "\n".join(lines)


class Store:
    """Modules by key, in `root`; by default in $LLSA_GEN_CACHE_DIR, else in the platform's cache directory.

    Nothing is read from the environment and nothing is written before it is needed. Any number of threads and
    processes may share a directory. `lock_timeout`, in seconds, is how long a writer waits for another one before it
    goes ahead without the lock, which is safe: the lock only spares work, the rename is what keeps entries whole.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, *, lock_timeout: float = 5.0) -> None:
        self._root = None if root is None else Path(root).absolute()
        self._lock_timeout = lock_timeout

    @property
    def root(self) -> Path:
        """The directory in use now. Raises FileNotFoundError where the platform has none to offer (no home)."""
        return _default_root() if self._root is None else self._root

    def get(self, key: Key) -> Path | None:
        """The file of the entry, verified a moment ago; None on a miss, as a broken or refused entry is too."""
        return None if self.read(key) is None else self._path(key)

    def read(self, key: Key) -> str | None:
        """The verified text of the entry, None on a miss. Nobody can change it between check and use, unlike a file."""
        with suppress(OSError, CacheRefused):
            return self._read(key)
        return None

    def refusal(self) -> str | None:
        """Why the directory in use is not used: somebody else may write it. None where it is used, or not there yet."""
        try:
            trust.check_directory(self.root)
        except CacheRefused as error:
            return str(error)
        except OSError:
            return None

    def check(self) -> None:
        """Raise CacheRefused where the directory in use is refused: nothing is stored there then, nothing removed."""
        reason = self.refusal()
        if reason is not None:
            raise CacheRefused(f"the cache is refused: {reason}; remove it if it is yours, or set {CACHE_DIR_VARIABLE}")

    def trusted(self) -> bool:
        """Whether the directory in use may be read; where it may not, one warning per process and directory says so."""
        reason = self.refusal()
        if reason is not None:
            _warn_once(CacheRefused(reason), self._place())
        return reason is None

    def put(self, key: Key, text: str) -> Path | None:
        """Publish `text` and return its file; None, with one warning per process and directory, when that fails.

        Replaces an entry that is broken or holds another text; leaves alone what is refused. Writers that
        race on one key all succeed.
        """
        try:
            path = self._path(key)
            if self._read(key) == text:
                return path
            for attempts_left in reversed(range(PUBLISHING_ATTEMPTS)):
                try:
                    self._stage_and_publish(key, text, path)
                    break
                except FileNotFoundError:
                    if not attempts_left:
                        raise
            _remove_stale_staging(self)
            return path
        except (OSError, CacheRefused) as error:
            _warn_once(error, self._place())
            return None

    def fetch(self, key: Key, render: Callable[[], str]) -> Stored:
        """The entry of `key`; on a miss, `render()` makes the text, which is then published if possible."""
        text = self.read(key)
        if text is not None:
            return Stored(text, self._path(key))
        text = render()
        return Stored(text, self.put(key, text))

    def entries(self) -> list[Entry]:
        """All entries, newest first, broken ones included. Raises CacheError when the directory cannot be listed."""
        try:
            directories = list(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CacheError(f"the cache directory cannot be listed: {error}") from error
        found = filter(None, map(inspect_entry, directories))
        return sorted(found, key=lambda entry: entry.created, reverse=True)

    def clear(self, name: str | None = None) -> int:
        """Remove the entries of one spec, or all of them; returns how many.

        Other files in the directory are left alone, also those that somebody put inside an entry. Raises CacheError
        when an entry cannot be removed, or the directory is refused.
        """
        self.check()
        doomed = [entry for entry in self.entries() if name is None or entry.name == name]
        try:
            if doomed:  # or else a directory that may not even exist would get a lock file
                with locked(self.root / LOCK_FILE, self._lock_timeout):
                    for entry in doomed:
                        remove_entry(entry)
        except OSError as error:
            raise CacheError(f"the cache cannot be cleared: {error}") from error
        _remove_stale_staging(self)
        return len(doomed)

    def why(self, key: Key) -> Explanation:
        """Whether `key` hits, and if not, in what it differs from the closest intact entry of the same name.

        Raises CacheError when the directory cannot be listed.
        """
        try:
            with suppress(OSError):
                self._read(key)
        except CacheRefused as error:
            return Explanation(key, "refused", f"miss, and nothing will be stored, for the cache is refused: {error}")
        entries = self.entries()
        for entry in entries:
            if entry.digest == key.digest and entry.intact:
                return Explanation(key, "hit", f"hit, {entry.path}")
            if entry.digest == key.digest:
                return Explanation(key, "broken", f"miss, the entry is broken and will be replaced: {entry.path}")
        namesakes = [entry for entry in entries if entry.intact and entry.name == key.name]
        if not namesakes:
            return Explanation(key, "unknown name", f"miss, no entry of this name in {self._place()}")
        # entries come newest first, and min keeps the first of equals
        closest = min(namesakes, key=lambda entry: len(_differences(entry.parts, key.parts)))
        differences = _differences(closest.parts, key.parts)
        share = f"{len(differences)} of {len(key.parts.keys() | closest.parts.keys())} parts"
        detail = f"miss, the closest entry ({closest.digest[:12]}, {closest.created}) differs in {share}:"
        return Explanation(key, "differs", detail, closest, differences)

    def _read(self, key: Key) -> str | None:
        """As `read`. Raises CacheRefused, and OSError where there is no cache directory."""
        directory = self._path(key).parent
        try:
            return read_entry(directory)[1]
        except CacheRefused:
            raise
        except CacheError:
            return None

    def _place(self) -> str:
        """The directory, for messages, which must not fail."""
        try:
            return str(self.root)
        except OSError:
            return "the platform's cache directory"

    def _stage_and_publish(self, key: Key, text: str, path: Path) -> None:
        root = path.parent.parent
        trust.make_directory(root)
        trust.check_directory(root)
        staged = root / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
        try:
            stage(staged, key, text)
            with locked(root / LOCK_FILE, self._lock_timeout):
                publish(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _path(self, key: Key) -> Path:
        return self.root / key.digest / f"{key.name}.py"


@contextmanager
def locked(file: Path, seconds: float) -> Iterator[None]:
    """Hold the lock in `file`, or nothing when it cannot be had: held too long, no file, no locks on that disk."""
    lock = _file_lock_class()(file, timeout=seconds, mode=0o600, poll_interval=0.01)
    with forks.whole():  # or a child would hold it too, without knowing
        with suppress(OSError, NotImplementedError):  # filelock's Timeout is an OSError
            lock.acquire()
        try:
            yield
        finally:
            lock.release()  # does nothing when it is not held


@cache
def _file_lock_class() -> "type[FileLock]":
    from filelock import FileLock  # here, because only writers need it and a warm start should not pay for it

    forks.go_first()
    return FileLock


def _default_root() -> Path:
    configured = os.environ.get(CACHE_DIR_VARIABLE)
    if configured:
        return Path(os.path.expanduser(configured)).absolute()
    from platformdirs import user_cache_path

    root = user_cache_path("llsa_gen", appauthor=False)
    if not root.is_absolute():  # without a home, platformdirs answers "~/...", which would become a directory here
        raise FileNotFoundError(f"no cache directory for this account ({root}); set {CACHE_DIR_VARIABLE}")
    return root


def _remove_stale_staging(store: Store) -> None:
    """Remove what crashed writers left; not what a living one is about to rename."""
    with suppress(OSError):
        for staged in store.root.glob(f"{STAGING_PREFIX}*"):
            if time.time() - staged.lstat().st_mtime > STALE_STAGING_SECONDS:
                shutil.rmtree(staged, ignore_errors=True)


def _differences(stored: Mapping[str, str], current: Mapping[str, str]) -> tuple[Difference, ...]:
    found: list[Difference] = []
    for part in dict.fromkeys([*current, *stored]):  # in the key's order, then what is gone
        before, now = stored.get(part), current.get(part)
        if before != now:
            kind = "added" if before is None else "removed" if now is None else "changed"
            found.append(Difference(part, kind, before, now))
    return tuple(found)


def _warn_once(error: OSError | CacheRefused, place: str) -> None:
    refused = isinstance(error, CacheRefused)
    with _warning_lock:
        if (told := f"refused: {place}" if refused else place) in _warned_about:
            return
        _warned_about.add(told)
    which = "remove it if it is yours, or " if refused else ""
    wanted = "that only you can write" if refused else "that can be written"
    warnings.warn(
        f"llsa_gen cannot {'use' if refused else 'write to'} its cache, {place} ({error}); compiled modules are kept "
        f"in memory, for this process only; {which}set {CACHE_DIR_VARIABLE} to a directory {wanted}",
        RuntimeWarning,
        stacklevel=3,  # the caller of put
    )


def _abbreviate(value: str) -> str:
    return value[:12] if DIGEST.fullmatch(value) else value
