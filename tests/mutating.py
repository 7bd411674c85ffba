"""Templates with a fault in them: tests are proved by what they find."""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from llsa_gen import emit, runtime
from llsa_gen.emit import module as emission


@contextmanager
def templates(folder: Path) -> Iterator[None]:
    """Emit from the templates in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emission, "TEMPLATES", folder)
        patch.setattr(runtime, "FOLDER", folder / "runtime")
        emit.environment.cache_clear()
        yield
    emit.environment.cache_clear()


@contextmanager
def broken(
    template: str, changes: Sequence[tuple[str, str]], folder: Path, among: Collection[str]
) -> Iterator[None]:  # fmt: skip
    """Emit from a copy of the templates, in `folder`, with changes of one, which lies in a folder `among` these."""
    shutil.copytree(emit.TEMPLATES, folder)
    shutil.copytree(runtime.FOLDER, folder / "runtime")
    (file,) = (path for path in folder.rglob(template) if path.parent.name in among)
    text = file.read_text()
    for old, new in changes:
        assert old in text, f"{template} no longer holds {old!r}: break it in another way"
        text = text.replace(old, new)
    file.write_text(text)
    with templates(folder):
        yield
