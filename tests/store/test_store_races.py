"""The store under sixteen real processes at once: no torn text, no failed writer, whatever the lock and the files do.

The processes start together, on a signal, and work on the same few keys and on keys of their own. Every text says
which key it is for and is long enough to be torn, so that one look at what was read tells whether it is right.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from llsa_gen.store import LOCK_FILE, STAGING_PREFIX, Key, Store

PROCESSES = 16
ROUNDS = 25
SHARED_KEYS = 3

# What every process, and the test, agree on.
COMMON = """
from llsa_gen.store import Key, Store

def key_of(label):
    return Key("raced", {"label": label})

def text_of(label):
    return f"LABEL = {label!r}\\n" + "# padding, so that a file takes more than one write\\n" * 4000
"""

WORKER = (
    COMMON
    + """
import random, shutil, sys, time, warnings
from pathlib import Path
from llsa_gen.store.loading import load_module, load_text
from llsa_gen.errors import CacheError

root, me, shared, rounds, timeout = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
store = Store(root, lock_timeout=timeout)
chance = random.Random(me)
warnings.simplefilter("error")  # a writer that gives up says so
Path(root + ".ready", str(me)).touch()
while not Path(root + ".go").exists():
    time.sleep(0.001)

for turn in range(rounds):
    label = chance.choice([*map(str, range(shared)), f"own {me} {turn}"])
    stored = store.fetch(key_of(label), lambda: text_of(label))
    assert stored.text == text_of(label), "torn"
    assert stored.path is not None, "not published"
    assert load_text("raced", key_of(label).digest, stored.text, stored.path).LABEL == label
    text = store.read(key_of(label))
    assert text in (None, text_of(label)), "torn"
    assert text is not None or __VANDALS__, "a published entry is gone"
    if __VANDALS__ and me < 3:
        try:
            piece = chance.choice([stored.path, stored.path.with_name("entry.json")])
            if chance.random() < 0.2:
                shutil.rmtree(piece.parent)
            elif chance.random() < 0.4:
                piece.unlink()
            else:
                with open(piece, "r+b") as file:
                    file.truncate(chance.randrange(piece.stat().st_size + 1))
                    file.write(b"garbage")
        except (OSError, ValueError):
            pass  # another one was quicker
print("done")
"""
)


def race(root: Path, *, vandals: bool = False, lock_timeout: float = 60.0) -> None:
    """Runs the workers against `root`; every one of them must come through."""
    ready, go = Path(f"{root}.ready"), Path(f"{root}.go")
    ready.mkdir()
    program = WORKER.replace("__VANDALS__", str(vandals))
    arguments = [str(SHARED_KEYS), str(ROUNDS), str(lock_timeout)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(root), str(number), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    try:
        deadline = time.monotonic() + 600
        while len(list(ready.iterdir())) < PROCESSES and time.monotonic() < deadline:
            time.sleep(0.01)
        go.touch()
        for worker in workers:
            output, errors = worker.communicate(timeout=600)
            assert (worker.returncode, output) == (0, "done\n"), errors
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def check_all_intact(root: Path) -> None:
    entries = Store(root).entries()
    assert len(entries) > SHARED_KEYS + PROCESSES
    assert all(entry.intact for entry in entries)
    assert not list(root.glob(f"{STAGING_PREFIX}*"))


def test_sixteen_processes_publish_and_read(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    race(root)
    check_all_intact(root)


def test_sixteen_processes_without_a_lock(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    with FileLock(root / LOCK_FILE):  # never given up, so everybody goes ahead without it
        race(root, lock_timeout=0.01)
    check_all_intact(root)


@pytest.mark.parametrize("lock_timeout", [60.0, 0.0])
def test_sixteen_processes_while_three_of_them_break_files(tmp_path: Path, lock_timeout: float) -> None:
    root = tmp_path / "cache"
    race(root, vandals=True, lock_timeout=lock_timeout)
    # What lies broken is mended by whoever comes next.
    namespace: dict[str, object] = {}
    exec(COMMON, namespace)
    store = Store(root)
    for label in map(str, range(SHARED_KEYS)):
        key, text = Key("raced", {"label": label}), namespace["text_of"](label)  # pyright: ignore[reportCallIssue]
        assert store.fetch(key, lambda text=text: text) == (text, store.get(key))


def test_a_store_starts_quickly(tmp_path: Path) -> None:
    """Without torch and triton: `cache ls` and a warm start should not wait for them."""
    code = (
        "import llsa_gen.store.loading, llsa_gen.store, sys; print({'torch', 'triton', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout.strip() == "set()", done.stderr
