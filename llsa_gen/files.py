"""Files: written whole or not at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and move it there in one step: who reads it sees the old one or the new one.

    Text is UTF-8. Raises OSError with the name of the file, also where the disk is full; then nothing has changed.
    """
    data = content.encode() if isinstance(content, str) else content
    staged = None
    try:
        handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    except BaseException as error:
        if staged is not None:
            with suppress(OSError):
                os.unlink(staged)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
