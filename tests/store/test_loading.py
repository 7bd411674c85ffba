"""Loading: stored and in-memory modules, their source for inspect and tracebacks, threads, failed imports."""

import hashlib
import importlib
import inspect
import linecache
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen.errors import CacheError
from llsa_gen.store import Key, Store
from llsa_gen.store.loading import PACKAGE, load_module, load_text

TEXT = '''"""A module."""

def double(x):
    # twice
    return 2 * x


def fail():
    raise RuntimeError("on purpose")  # this very line'''

KEY = Key("made", {"spec": "1"})


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Tests use the same digests for other texts, which a process never does."""
    yield
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = Store(tmp_path).put(KEY, TEXT)
    assert path is not None
    return path


@pytest.fixture(params=["from a file", "from memory"])
def module(request: pytest.FixtureRequest, stored: Path) -> ModuleType:
    if request.param == "from a file":
        return load_module(stored)
    return load_text("made", KEY.digest, TEXT)


def test_the_module_runs_under_its_own_name(module: ModuleType) -> None:
    assert module.double(21) == 42
    assert module.__name__ == module.double.__module__ == f"{PACKAGE}.made_{KEY.digest[:16]}"
    assert sys.modules[module.__name__] is module
    assert importlib.import_module(module.__name__) is module


def test_the_file_is_named_where_there_is_one(stored: Path) -> None:
    assert load_module(stored).__file__ == str(stored)
    assert not (stored.parent / "__pycache__").exists()


def test_inspect_finds_the_source(module: ModuleType) -> None:
    assert inspect.getsource(module.double) == "def double(x):\n    # twice\n    return 2 * x\n"
    assert inspect.getsourcelines(module.fail)[1] == 8
    assert inspect.getsource(module).rstrip() == TEXT
    assert inspect.getmodule(module.double) is module


def test_inspect_finds_it_after_linecache_is_cleared(module: ModuleType) -> None:
    linecache.clearcache()
    assert "# twice" in inspect.getsource(module.double)


def test_the_source_is_that_which_runs_whatever_becomes_of_the_file(stored: Path) -> None:
    module = load_module(stored)
    stored.write_text("something else\n" * 20)
    linecache.checkcache()
    assert "# twice" in inspect.getsource(module.double)
    stored.unlink()
    linecache.checkcache()
    assert "# twice" in inspect.getsource(module.double)


def test_tracebacks_show_the_line(module: ModuleType) -> None:
    with pytest.raises(RuntimeError) as caught:
        module.fail()
    assert "# this very line" in "".join(traceback.format_exception(caught.value))


def test_functions_can_be_pickled_by_name(module: ModuleType) -> None:
    assert pickle.loads(pickle.dumps(module.double)) is module.double


@given(st.text(st.sampled_from("a\n\r\f\v\x1c\x85\u2028")))
def test_lines_are_counted_as_python_counts_them(comment: str) -> None:
    text = f"X = {comment!r}\nTEXT = '''{comment}'''\ndef f():\n    return 1  # here\n"
    module = load_text("lines", hashlib.sha256(text.encode()).hexdigest(), text)
    assert inspect.getsource(module.f) == "def f():\n    return 1  # here\n"


def test_the_same_digest_is_the_same_module(stored: Path) -> None:
    module = load_module(stored)
    assert load_module(stored) is module
    assert load_text("made", KEY.digest, TEXT) is module
    assert load_text("made", "f" * 64, TEXT) is not module


@pytest.mark.parametrize("damage", ["", TEXT[:-5], TEXT + "\n", TEXT.replace("2", "3")])
def test_a_torn_file_is_never_executed(stored: Path, damage: str) -> None:
    stored.write_text(damage)
    with pytest.raises(CacheError, match=str(stored)):
        load_module(stored)
    assert not [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]


def test_only_the_entry_s_own_module_is_loaded(stored: Path, tmp_path: Path) -> None:
    stray = stored.with_name("stray.py")
    stray.write_text(TEXT)
    with pytest.raises(CacheError, match=r"expected the module of this entry, made\.py"):
        load_module(stray)
    with pytest.raises(CacheError, match=r"entry\.json"):
        load_module(tmp_path / "no_such_entry" / "made.py")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import sys\nassert __name__ in sys.modules\n1 / 0\n", ZeroDivisionError),
        ("def broken(:\n", SyntaxError),
        ("import no_such_module\n", ModuleNotFoundError),
        ("raise KeyboardInterrupt\n", KeyboardInterrupt),
    ],
)
def test_a_failed_import_leaves_nothing_behind(text: str, error: type[BaseException]) -> None:
    for _ in range(2):  # it fails anew, it does not give a half-made module
        with pytest.raises(error):
            load_text("bad", "0" * 64, text)
        assert f"{PACKAGE}.bad_{'0' * 16}" not in sys.modules
    assert load_text("bad", "0" * 64, "GOOD = True\n").GOOD


def test_a_failed_import_shows_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        load_text("bad", "0" * 64, "zero = 0\nnumber = 1 / zero  # look here\n")
    assert "# look here" in "".join(traceback.format_exception(caught.value))


def test_threads_get_one_module_and_only_when_it_is_whole() -> None:
    slow = "import time\ntime.sleep(0.05)\nLOADS = []\nLOADS.append(1)\ntime.sleep(0.05)\nWHOLE = True\n"
    barrier = threading.Barrier(8)

    def load(_: int) -> tuple[ModuleType, bool]:
        barrier.wait()
        module = load_text("slow", "0" * 64, slow)
        return module, hasattr(module, "WHOLE")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load, range(8)))
    assert len({id(module) for module, _ in results}) == 1
    assert all(whole for _, whole in results)
    assert results[0][0].LOADS == [1]


KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + 1)


def run():
    x = torch.zeros(16)
    add_one[(1,)](x, BLOCK=16)
    return float(x.sum())
"""

RUN_KERNEL = """
import os, sys
os.environ["TRITON_INTERPRET"] = sys.argv[1]
from llsa_gen.store.loading import load_text
module = load_text("kernel", "0" * 64, sys.stdin.read())
print(module.run() if sys.argv[1] == "1" else "tl.store" in module.add_one.src)
"""


@pytest.mark.parametrize(("interpret", "expected"), [("0", "True"), ("1", "16.0")])
def test_triton_takes_a_kernel_that_lives_in_memory(interpret: str, expected: str) -> None:
    command = [sys.executable, "-c", RUN_KERNEL, interpret]
    done = subprocess.run(command, input=KERNEL, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
