"""Trust: what lies in the cache is executed, so it is read only where nobody but the user and root can have put it.

Every file is opened once; what is checked is what is read. Nothing here waits: a FIFO or a device is not a file.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llsa_gen.errors import CacheRefused

__all__ = ["check_directory", "make_directory", "read", "write"]

MOST_BYTES = 64 * 2**20
"""Of a file; no module comes near."""

MANY_LINKS = 40  # as many as Linux follows

OWNED = hasattr(os, "geteuid")
"""Whether this platform has owners and modes that mean something."""


def check_directory(path: Path) -> None:
    """Raise CacheRefused where somebody else may decide what is in the directory `path`, OSError where there is none.

    It and the links on the way belong to the user or root; nobody else may write it. Above it may be directories of
    anybody, also shared ones, but no directory where everybody may put another one in its place.
    """
    if not OWNED:
        return
    for place, status, is_last in _way(path):
        if stat.S_ISLNK(status.st_mode):
            _check_owner(place, status)
        elif not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), place)
        elif is_last:
            _check_owner(place, status)
            _check_mode(place, status)
        elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            _refuse(place, f"lies above it, and everybody may replace what is in it ({_mode(status)})")


def read(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of the file `path`, and of no link, device or FIFO. Raises CacheRefused where others may write it.

    Its directory has to be checked before. Raises OSError where there is no such file, or a larger one.
    """
    descriptor = os.open(path, os.O_RDONLY | _flags("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if OWNED:
            _check_owner(str(path), status)
            _check_mode(str(path), status)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
        return data
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, that nobody else may write, whatever the umask; one that is there stays."""
    for place in reversed(path.parents):
        if not place.exists():
            place.mkdir(mode=0o755, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a new file that nobody else may write, whatever the umask."""
    path.touch(mode=0o644, exist_ok=False)
    path.write_bytes(data)


def _way(path: Path) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Every directory and every link that leads to `path`, links followed: place, status, whether it is the last."""
    here, ahead, links = os.sep, _parts(path.absolute()), 0
    yield here, os.lstat(here), not ahead
    while ahead:
        place = os.path.join(here, ahead.pop())
        status = os.lstat(place)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > MANY_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            yield place, status, False
            target = Path(os.readlink(place))
            ahead += _parts(target)
            if target.is_absolute():
                here = os.sep
        else:
            yield place, status, not ahead
            here = place


def _parts(path: Path) -> list[str]:
    """The names along a path, the first one last."""
    return [part for part in reversed(path.parts) if part != path.anchor]


def _check_owner(place: str, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        _refuse(place, f"belongs to user {status.st_uid}, neither to the one who runs this ({user}) nor to root")


def _check_mode(place: str, status: os.stat_result) -> None:
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _refuse(place, f"may be written by others than its owner ({_mode(status)})")


def _refuse(place: str, reason: str) -> None:
    raise CacheRefused(f"{place} {reason}")


def _mode(status: os.stat_result) -> str:
    return stat.filemode(status.st_mode)


def _flags(*names: str) -> int:
    """Flags of `os.open`, those that this platform has."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags
