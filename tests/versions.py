"""Run the package with other versions of Triton: `make versions`, and the short set of every run of CI.

    .venv/bin/python tests/versions.py                  # every admitted version: the interpreter's tests, and the table
    .venv/bin/python tests/versions.py 3.9.0            # of one; what is stored of the others stays, while it holds
    .venv/bin/python tests/versions.py --short          # the oldest and the newest: the tests marked `versions`
    .venv/bin/python tests/versions.py --torch 2.15.0   # with another torch, too: several gigabytes, and no table

The table says what every kernel of the shipped specs takes in each version, and which grew: benchmarks/triton_versions.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import overlay
import version_table
from overlay import FOLDER, PINNED, ROOT

FILE = ROOT / "benchmarks" / "triton_versions.json"


def pytest(triton: str, torch: str | None, *options: str, interpret: bool) -> tuple[bool, str]:
    """Run tests with these versions; whether all passed, and what pytest said."""
    variables = overlay.environment(triton, torch) | {"LLSA_GEN_TEST_TRITON": triton}
    variables.pop("TRITON_INTERPRET", None)
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode == 0, done.stdout


def short(versions: Sequence[str], torch: str | None) -> int:
    """The tests marked `versions`, one version beside the other; the exit status."""

    # only files that have such tests: to collect all of them takes as long as to run these
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.versions" in path.read_text()]

    def run(triton: str) -> bool:
        passed = True
        for interpret in (True, False):
            ok, said = pytest(triton, torch, "-m", "versions", *files, interpret=interpret)
            where = "the interpreter" if interpret else "the CPU path and the compiler"
            print(f"--- triton {triton}, {where}: {'passed' if ok else 'FAILED'}\n{said}", flush=True)
            passed &= ok
        return passed

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 0 if all(list(pool.map(run, versions))) else 1


def measure(triton: str) -> dict[str, Any]:
    """What is stored of a version: how the interpreter's tests went, and the row of every kernel."""
    passed, said = pytest(triton, None, "-n", "2", "-m", "interpret", interpret=True)
    if not passed:
        print(said, flush=True)
    summary = said.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
    rows = FOLDER / f"rows-{triton}.json"
    command = [sys.executable, str(ROOT / "tests" / "version_rows.py"), str(rows)]
    subprocess.run(command, cwd=ROOT, env=overlay.environment(triton), check=True)
    found = json.loads(rows.read_text())
    if found["triton"] != triton:
        raise SystemExit(f"{overlay.folder(triton)}: expected triton {triton}, got {found['triton']}")
    return {"interpreter": summary, "passed": passed, "kernels": found["kernels"]}


def kernels() -> str:
    """A hash of all kernels that are compiled: figures of others do not stand beside theirs."""
    import budgets  # which imports torch, and only the table needs it
    import compiled

    from llsa_gen import aot, compile

    made = {
        compiled.identity(one)
        for cell in budgets.CELLS
        for one in aot.distinct(compile(ROOT / "spec" / f"{cell.spec}.yaml"), cell.target, cell.dtype, aot.USUAL_TOKENS)
    }
    return hashlib.sha256("\n".join(sorted(made)).encode()).hexdigest()


def stored() -> dict[str, Any]:
    """The file, with the versions that were measured with the kernels of today."""
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    now = kernels()
    return content if content.get("kernels") == now else {"kernels": now, "versions": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the package with other versions of Triton.")
    parser.add_argument("triton", nargs="*", help="versions; by default all that pyproject.toml admits")
    parser.add_argument("--torch", help="a version of torch to lay over .venv, too")
    parser.add_argument("--short", action="store_true", help="only the tests marked `versions`: by default with two")
    parser.add_argument("--install", action="store_true", help="only unpack what --short runs with")
    options = parser.parse_args()
    brief = options.short or options.install or options.torch is not None
    chosen = options.triton or overlay.admitted()
    if brief and not options.triton:
        chosen = [chosen[0], chosen[-1]]
    for triton in chosen:
        if triton != PINNED or options.torch:
            overlay.install(triton, options.torch)
    if brief:
        return 0 if options.install else short(chosen, options.torch)
    FOLDER.mkdir(exist_ok=True)
    content = stored()
    for triton in chosen:
        content["versions"][triton] = measure(triton)
        version_table.write(FILE, content)
    print("\n".join(version_table.flags(content["versions"])))
    measured = [content["versions"][triton] for triton in chosen]
    return 0 if all(one["passed"] and not version_table.errors(one["kernels"]) for one in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
