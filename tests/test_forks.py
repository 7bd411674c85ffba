"""Forks: while threads compile, load and import, a child can compile; locks, modules half executed, cached properties.

Every test forks in a process of its own. A child that hangs is the fault that is looked for: it ends itself after some
time, which is plenty for one that does not hang.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")]

ROOT = Path(__file__).resolve().parents[1]

# What the programs share: `in_child` forks, runs a function in the child and says how that went.
COMMON = """
import faulthandler, os, sys, threading, time, traceback, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on

SPEC = {"name": "forked", "head_dim": 16, "levels": [{"block": 4, "topk": 2}]}

def spec(number):
    return SPEC | {"head_dim": 16 + number}

def in_child(run):
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(100, exit=True)  # ends a child that hangs, and says where
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"child: {status}"
"""


def run(program: str, folder: Path) -> None:
    environment = os.environ | {"LLSA_GEN_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_child_compiles_whatever_threads_were_compiling(tmp_path: Path) -> None:
    program = """
import llsa_gen
known = llsa_gen.compile(spec(0))
numbers, over = iter(range(1, 10**6)), threading.Event()

def compile_on():
    while not over.is_set():
        llsa_gen.compile(spec(8 * (next(numbers) % 30)))  # new and known ones

def child():
    assert llsa_gen.compile(spec(0)) is known
    assert llsa_gen.compile(spec(200)).spec.head_dim == 216

threads = [threading.Thread(target=compile_on) for _ in range(2)]
for thread in threads:
    thread.start()
for attempt in range(6):
    time.sleep(0.1 * attempt)
    in_child(child)
over.set()
for thread in threads:
    thread.join()
print("done")
"""
    run(program, tmp_path)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_child_compiles_while_the_parent_imports_what_compiling_needs(tmp_path: Path, seconds: float) -> None:
    program = f"""
import llsa_gen
thread = threading.Thread(target=lambda: llsa_gen.compile(spec(0)))
thread.start()
time.sleep({seconds})
in_child(lambda: [llsa_gen.compile(spec(number)) for number in (0, 8)])
thread.join()
print("done")
"""
    run(program, tmp_path)


def test_a_thread_that_never_finishes_does_not_hold_a_fork_for_ever(tmp_path: Path) -> None:
    """One holds the lock of compiles, another is half through a module and a third inside a cached property."""
    program = """
import llsa_gen
from llsa_gen import compiler, emit, forks, plan
from llsa_gen.store import loading
for lock in (compiler._lock, loading._lock):
    lock._seconds = 0.1
forks.whole.__wrapped__.__defaults__ = (0.1,)
known = llsa_gen.compile(spec(0))
never, reached = threading.Event(), threading.Semaphore(0)

def stop():
    if threading.current_thread().daemon:
        reached.release()
        never.wait()

sys.stop = stop
text = "import sys\\nsys.stop()\\nWHOLE = True\\n"
render = emit.render
emit.render = lambda *arguments: (stop(), render(*arguments))[1]
name = next(name for name, value in vars(plan.Plan).items() if hasattr(value, "attrname"))
work_out = vars(plan.Plan)[name].func
vars(plan.Plan)[name].func = lambda self: (stop(), work_out(self))[1]

jobs = [
    lambda: getattr(plan.lower(known.spec), name),
    lambda: loading.load_text("half", "0" * 64, text),
    lambda: llsa_gen.compile(spec(8)),
]
for job in jobs:
    threading.Thread(target=job, daemon=True).start()
    assert reached.acquire(timeout=30)

def child():
    assert llsa_gen.compile(spec(0)) is known
    assert loading.load_text("half", "0" * 64, text).WHOLE
    llsa_gen.compile(spec(8))

for _ in range(3):
    in_child(child)
print("done", flush=True)
os._exit(0)
"""
    run(program, tmp_path)


def test_a_fork_inside_a_compile_goes_on_in_the_child(tmp_path: Path) -> None:
    program = """
import llsa_gen
from llsa_gen import emit
render, forked = emit.render, []

def forking(*arguments):
    if not forked:
        forked.append(True)
        in_child(lambda: llsa_gen.compile(spec(8)))
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(100, exit=True)
            os.environ["CHILD"] = "1"  # and on, out of `compile`
        else:
            assert os.waitpid(child, 0)[1] == 0
    return render(*arguments)

emit.render = forking
assert llsa_gen.compile(spec(0)) is llsa_gen.compile(spec(0))
if "CHILD" in os.environ:
    os._exit(0)
print("done")
"""
    run(program, tmp_path)


def test_a_fork_does_not_keep_a_thread_from_the_lock_that_it_waits_for(tmp_path: Path) -> None:
    """filelock lets nobody take a lock from the moment when its hook has run: this package's runs before."""
    program = """
import llsa_gen
from llsa_gen import forks
from llsa_gen.store.store import Store, locked
llsa_gen.compile(spec(0))  # imports filelock
started, finished = threading.Event(), []

def work():
    with forks.whole():
        started.set()
        time.sleep(0.3)
        with locked(Store().root / "a.lock", 5.0):
            finished.append(True)

threading.Thread(target=work).start()
started.wait()

def child():
    assert finished

in_child(child)
print("done")
"""
    run(program, tmp_path)


def test_no_other_locks() -> None:
    """Of the package, nor of generated modules, but for one that nobody waits for."""
    made = re.compile(r"threading\.(Lock|RLock|Condition|Semaphore|Event|Barrier)\b|from threading import")
    waits = re.compile(r"\bwith MAKING\b|\bMAKING\.acquire\((?!blocking=False\))")
    for path in [*(ROOT / "llsa_gen").rglob("*.py"), *(ROOT / "generated").glob("*.py")]:
        text = path.read_text()
        lines = [line for line in text.splitlines() if made.search(line) and not line.startswith("MAKING = ")]
        assert path.name == "forks.py" or not lines, f"{path.name}: a lock that a child may find locked: {lines}"
        assert not waits.search(text), f"{path.name}: who waits for MAKING may wait for ever after a fork"
