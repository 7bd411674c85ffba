"""Run the tests of llsa_gen.integrations with other releases of the libraries than the pinned ones.

    .venv/bin/python tests/libraries.py diffusers==0.37.0

A release is unpacked into a folder of `.versions/`, without what it needs, and laid over .venv by PYTHONPATH.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from overlay import FOLDER, ROOT

LIBRARIES = ("diffusers", "transformers")
"""Each with its tests, tests/integrations/test_NAME_*.py."""


def release_of(text: str) -> tuple[str, str]:
    """NAME==VERSION as its two parts."""
    name, equal, release = text.partition("==")
    if name not in LIBRARIES or not equal or not release:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(LIBRARIES)}, == and a version, got {text!r}")
    return name, release


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
    over = [] if release == version(library) else [str(install(library, release))]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*over, *inherited])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    print(f"--- {library} {release}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=variables).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests of integrations with other releases of the libraries.")
    parser.add_argument("releases", nargs="+", type=release_of, metavar="NAME==VERSION")
    passed = [run(name, release) for name, release in parser.parse_args().releases]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
