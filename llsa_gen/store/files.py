"""Files: written whole or not at all, and a place found out about before the work that is to be kept there."""

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["must_take", "write_whole"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and move it there in one step: who reads it sees the old one or the new one.

    Text is UTF-8. A link that leads to a file stays, and the file is replaced; a device or a pipe is written to. Raises
    OSError with the name of the file, also where the disk is full; then nothing has changed.
    """
    data = content.encode() if isinstance(content, str) else content
    staged = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        place = path.resolve() if path.exists() else path
        handle, staged = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(staged, 0o644)
        os.replace(staged, place)
    except BaseException as error:
        if staged is not None:
            with suppress(OSError):
                os.unlink(staged)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def must_take(path: Path, *, folders: bool = False) -> None:
    """Whether `write_whole` could put a file at `path`, found out by trying, without a trace; raises OSError if not.

    A file that is there is not replaced where it may not be written to. With `folders`, those on the way may be
    missing: the nearest that is there has to take a new one. The error names the path, or the folder that is at fault.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not path.is_file():
            return
        path = path.resolve()
    folder = path.parent
    while folders and not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    name = path.name if folder == path.parent else "folder"
    try:
        handle, tried = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent if folders else path)) from None
    os.close(handle)
    os.unlink(tried)
