"""Run the tests of llsa_gen.integrations with other releases of the libraries than the pinned ones.

    .venv/bin/python tests/libraries.py                     # the newest of each
    .venv/bin/python tests/libraries.py diffusers==0.37.0   # this one

A release is unpacked into a folder of `.versions/`, without what it needs, and laid over .venv by PYTHONPATH.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from overlay import FOLDER, ROOT

LIBRARIES = ("diffusers", "transformers")
"""Each with its tests, tests/integrations/test_NAME_*.py; one without such tests is passed over."""


def newest(library: str) -> str:
    """The last release that the registry serves. Raises SystemExit where it cannot be asked."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", library], capture_output=True, text=True, check=False
    )
    served = re.search(r"^Available versions: ([^,\n]*)", asked.stdout, re.MULTILINE)
    if served is None:
        raise SystemExit(f"pip index versions {library}: expected a list of versions, got {asked.stdout}{asked.stderr}")
    return served[1]


def install(library: str, release: str) -> Path:
    """The folder with a release, unpacked into it unless it is there."""
    place = FOLDER / f"{library}-{release}"
    if not place.exists():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as staged:  # renamed when it is whole
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
            subprocess.run([*pip, f"{staged}/new", f"{library}=={release}"], check=True)
            shutil.move(f"{staged}/new", place)
    return place


def run(library: str, release: str) -> bool:
    """Whether the tests of a library pass with a release of it."""
    tests = sorted(str(path) for path in (ROOT / "tests" / "integrations").glob(f"test_{library}_*.py"))
    if not tests:
        return True
    over = [] if release == version(library) else [str(install(library, release))]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*over, *inherited])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    print(f"--- {library} {release}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=variables).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests of integrations with other releases of the libraries.")
    parser.add_argument("releases", nargs="*", metavar="NAME==VERSION", help="by default the newest of each")
    chosen = [tuple(one.split("==")) for one in parser.parse_args().releases]
    passed = [run(name, release) for name, release in chosen or [(name, newest(name)) for name in LIBRARIES]]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
