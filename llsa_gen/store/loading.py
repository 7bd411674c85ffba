"""Loading: a stored or emitted text becomes a Python module, by way of the text and never of the file.

The text is executed just as it was verified, whatever happens to its file afterwards, and its lines are known to
`linecache`: tracebacks show them and `inspect.getsource`, which triton.jit needs, finds them, also where no file could
be written.
"""

import importlib.util
import io
import linecache
import sys
import threading
from importlib.abc import ExecutionLoader
from pathlib import Path
from types import ModuleType

from llsa_gen import forks
from llsa_gen.errors import CacheError
from llsa_gen.store.entry import read_entry

PACKAGE = "llsa_gen_modules"

# One lock for all: generated modules import torch, triton and the standard library, never each other. Reentrant, as
# the lock of an import is.
_lock = forks.Lock(forks.IMPORT_SECONDS)

_under_way: dict[str, int] = {}
"""Modules that are being executed, by name, and the thread that does it."""


def _forget_the_unfinished() -> None:
    """In a child process: what another thread was executing at the fork stays half done, and is executed anew."""
    for name, thread in list(_under_way.items()):
        if thread != threading.get_ident():
            del _under_way[name]
            sys.modules.pop(name, None)


forks.in_child(_forget_the_unfinished)


class _TextLoader(ExecutionLoader):
    """Executes a text under a file name; Python's import machinery does the rest."""

    def __init__(self, text: str, filename: str) -> None:
        self._text = text
        self._filename = filename

    def get_filename(self, fullname: str) -> str:
        return self._filename

    def get_source(self, fullname: str) -> str:
        return self._text


def load_module(path: Path) -> ModuleType:
    """Import the stored module at `path`, as `Store.get` and `Store.put` return it.

    Raises CacheError, and executes nothing, when the file is not, byte for byte, what was published.
    """
    path = path.absolute()
    record, text = read_entry(path.parent)
    if path.name != f"{record.key.name}.py":
        raise CacheError(f"{path}: expected the module of this entry, {record.key.name}.py")
    return load_text(record.key.name, path.parent.name, text, path)


def load_text(name: str, digest: str, text: str, path: Path | None = None) -> ModuleType:
    """Import `text` as `llsa_gen_modules.<name>_<start of digest>`; the same digest gives the same module object.

    `path` is the file that holds the text, None when there is none. The module stands in `sys.modules` once it is
    executed; when that raises, it does not, and the exception comes through as it is.
    """
    label = f"{name}_{digest[:16]}"
    full_name = f"{PACKAGE}.{label}"
    # Not "<...>": linecache and inspect look no further at a name that starts and ends so.
    filename = f"<llsa_gen memory>/{label}.py" if path is None else str(path)
    with _lock:
        if full_name in sys.modules:
            return sys.modules[full_name]
        spec = importlib.util.spec_from_loader(full_name, _TextLoader(text, filename))
        assert spec is not None and spec.loader is not None  # it is made from a loader
        module = importlib.util.module_from_spec(spec)
        _remember_lines(filename, text)
        _ensure_package()
        _under_way[full_name] = threading.get_ident()
        sys.modules[full_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
        finally:
            del _under_way[full_name]
        return module


def _remember_lines(filename: str, text: str) -> None:
    """Tell linecache the lines that run. Without a time stamp it never compares them with a file."""
    # the lines that Python counts; str.splitlines would also break at form feeds and the like
    lines = io.StringIO(text, newline=None).readlines()
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    linecache.cache[filename] = (len(text), None, lines, filename)


def _ensure_package() -> None:
    """Importing or pickling by the name `llsa_gen_modules.x` needs an `llsa_gen_modules`; it holds nothing."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE, "Modules that llsa_gen has generated in this process.")
        package.__path__ = []
        sys.modules[PACKAGE] = package
