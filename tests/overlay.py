"""Other versions of Triton than the pinned one: each is unpacked into a folder of its own and laid over .venv.

A folder in front of `site-packages` on PYTHONPATH is all that an environment takes here: torch, which is a hundred
times the work to install, stays the one of .venv, built for the CPU.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"

PINNED = version("triton")
"""The version of .venv, where no other is laid over it."""


BESIDE: dict[tuple[int, ...], list[str]] = {(3, 6): ["numpy<2.4"]}
"""What a minor version needs that .venv has not: 3.6's interpreter makes numbers of arrays, which numpy 2.4 refuses."""


def admitted() -> list[str]:
    """The releases of Triton that the registry serves and pyproject.toml admits, oldest first, of each minor the last.

    Raises SystemExit where the registry cannot be asked.
    """
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "triton"], capture_output=True, text=True, check=False
    )
    served = re.search(r"^Available versions: (.*)$", asked.stdout, re.MULTILINE)
    if served is None:
        raise SystemExit(f"pip index versions triton: expected a list of versions, got {asked.stdout}{asked.stderr}")
    return choose(served[1].split(", "))


def choose(served: list[str]) -> list[str]:
    """Of the versions that are served, those that pyproject.toml admits, oldest first, of each minor the last."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ours,) = (one for one in map(Requirement, project["dependencies"]) if one.name == "triton")
    last = {one.release[:2]: one for one in sorted(map(Version, served)) if one in ours.specifier}
    return [str(last[minor]) for minor in sorted(last)]


def folder(triton: str, torch: str | None = None) -> Path:
    """Where a version lies, or a pair of versions."""
    return FOLDER / (f"triton-{triton}" + (f"-torch-{torch}" if torch else ""))


def install(triton: str, torch: str | None = None) -> Path:
    """The folder with a version of Triton, unpacked into it unless it is there; with `torch` also with all it needs."""
    place = folder(triton, torch)
    if not place.exists():
        FOLDER.mkdir(exist_ok=True)
        wanted = [f"triton=={triton}", *BESIDE.get(Version(triton).release[:2], [])]
        wanted = [*wanted, f"torch=={torch}"] if torch else ["--no-deps", *wanted]
        with tempfile.TemporaryDirectory(dir=FOLDER) as staged:  # renamed when it is whole
            print(f"unpacking {' '.join(wanted)} into {place.relative_to(ROOT)}", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target"]
            subprocess.run([*pip, f"{staged}/new", *wanted], check=True)
            shutil.move(f"{staged}/new", place)
    return place


def environment(triton: str, torch: str | None = None) -> dict[str, str]:
    """The variables under which Python has these versions; all but the pinned one have to be installed before."""
    over = [] if triton == PINNED and torch is None else [str(folder(triton, torch))]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*over, *inherited])}
