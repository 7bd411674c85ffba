"""One entry of the store: a directory named by the digest of its key, with a module and the record that proves it.

`<digest>/<name>.py` is the module, `<digest>/entry.json` says from what it was made and what its sha256 is. An entry is
staged beside its place and renamed into it, so it is there whole or not at all; what is read is hashed before it is
handed out, so whatever happened to the files, a wrong text is never returned.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from llsa_gen.errors import CacheError, CacheRefused
from llsa_gen.store import trust

RECORD_FILE = "entry.json"
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """What a module is made from: `name` for people, `parts` (name -> hash or version) for identity.

    Equal keys, in whatever order their parts come, have equal digests. Raises CacheError when `name`, which becomes a
    file name, is not a Python identifier, or when a part is not a string.
    """

    name: str
    parts: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise CacheError(f"cache key: expected a Python identifier as its name, got {self.name!r}")
        for part, value in self.parts.items():
            if not (isinstance(part, str) and isinstance(value, str)):
                raise CacheError(f"cache key of {self.name}: expected a string for the part {part!r}, got {value!r}")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of the canonical JSON of name and parts."""
        canonical = json.dumps([self.name, dict(self.parts)], sort_keys=True, separators=(",", ":"))
        return _sha256(canonical.encode())


@dataclass(frozen=True)
class Entry:
    """One stored module as it is listed; of a broken one (`intact` false), `parts` may be lost."""

    digest: str
    name: str
    created: str  # ISO 8601, UTC
    size_bytes: int  # of the module
    parts: Mapping[str, str]
    path: Path
    intact: bool
    refused: str | None = None  # why nothing of it is read, where somebody else may have written it


class Record(NamedTuple):
    """What `entry.json` says: the key, when the entry was made, and the sha256 of the module's bytes."""

    key: Key
    created: str  # ISO 8601, UTC
    sha256: str


def read_entry(directory: Path) -> tuple[Record, str]:
    """The record and the text of the entry in `directory`, each file read once and the text verified as read.

    Raises CacheError, naming the file, when a piece is missing, unreadable or not what was published; CacheRefused when
    somebody else than the user or root may have put it there.
    """
    record = _read_record(directory)
    path = directory / f"{record.key.name}.py"
    try:
        module = trust.read(path)
        if _sha256(module) != record.sha256:
            raise CacheError(f"{path}: expected sha256 {record.sha256}, got {_sha256(module)}")
        return record, module.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CacheError(f"{path}: expected the module that was published, got {error}") from error


def _read_record(directory: Path) -> Record:
    path = directory / RECORD_FILE
    try:
        if directory.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory but a link", str(directory))
        trust.check_directory(directory.parent)
        trust.check_directory(directory)
        fields = json.loads(trust.read(path))
        key = Key(fields["name"], fields["parts"])
        created = datetime.fromisoformat(fields["created"]).astimezone(UTC)
        record = Record(key, _iso(created), fields["sha256"])
    except CacheRefused:
        raise
    except Exception as error:  # a broken file may hold anything, so anything may go wrong
        raise CacheError(f"{path}: expected the record of an entry, got {type(error).__name__}: {error}") from error
    if key.digest != directory.name:
        raise CacheError(f"{path}: expected the record of {directory.name}, got that of {key.digest}")
    return record


def stage(staged: Path, key: Key, text: str) -> None:
    """Write the entry's files into the new directory `staged`. Raises OSError."""
    trust.make_directory(staged)
    module = text.encode()
    trust.write(staged / f"{key.name}.py", module)
    created = _iso(datetime.now(UTC))
    record = {"name": key.name, "created": created, "sha256": _sha256(module), "parts": dict(key.parts)}
    trust.write(staged / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())


def publish(staged: Path, path: Path) -> None:
    """Move what is staged to where its module is at `path`, in one step, or mend what is there.

    Raises OSError; FileNotFoundError when somebody removed something in between: the same, staged anew, may succeed.
    """
    try:
        os.replace(staged, path.parent)
    except OSError as refused:
        if refused.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not path.parent.is_dir():
            raise
        if path.parent.is_symlink():  # what it leads to is not ours to mend
            raise
        # Something is there: a broken entry, or one that another writer has just published. Mend it file by file; a
        # reader that sees one new and one old file either finds that they agree or takes it for a miss.
        for piece in (path.name, RECORD_FILE):
            with suppress(OSError):  # an empty directory in the file's place, as mounts leave them behind
                (path.parent / piece).rmdir()
            os.replace(staged / piece, path.parent / piece)


def inspect_entry(directory: Path) -> Entry | None:
    """The entry in `directory`; None when it is not, beyond doubt, a directory that this store made, or is gone."""
    if not DIGEST.fullmatch(directory.name) or directory.is_symlink():
        return None
    try:
        key, created, _ = _read_record(directory)
        name, parts = key.name, key.parts
    except CacheError:  # also where it is refused
        # The record proves nothing. Where nothing is beside it but what an entry has, it is ours; else perhaps not.
        try:
            files = {file.name for file in directory.iterdir()} - {"__pycache__"}
            created = _iso(datetime.fromtimestamp(directory.stat().st_mtime, UTC))
        except OSError:
            return None
        modules = [file for file in files if file.endswith(".py")]
        if RECORD_FILE not in files or len(modules) > 1 or len(files) > 1 + len(modules):
            return None
        name, parts = modules[0].removesuffix(".py") if modules else "unknown", {}
        if not name.isidentifier():
            return None
    intact, refused = False, None
    try:
        read_entry(directory)
        intact = True
    except CacheRefused as error:
        refused = str(error)
    except CacheError:
        pass
    path = directory / f"{name}.py"
    size_bytes = 0
    with suppress(OSError):
        size_bytes = path.lstat().st_size
    return Entry(directory.name, name, created, size_bytes, parts, path, intact, refused)


def remove_entry(entry: Entry) -> None:
    """Remove the files of an entry, the record last: until then, an interrupted removal can be taken up again."""
    entry.path.unlink(missing_ok=True)
    directory = entry.path.parent
    shutil.rmtree(directory / "__pycache__", ignore_errors=True)
    (directory / RECORD_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: somebody keeps other files there
        directory.rmdir()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _iso(moment: datetime) -> str:
    """One width for all, so that texts sort as times do."""
    return moment.isoformat(timespec="microseconds")
