"""Run the tests with the newest releases that pyproject.toml admits, torch's among them: what a plain install takes.

    .venv/bin/python tests/newest.py                       # a part of `make versions`; fetches some 5 GB
    .venv/bin/python tests/newest.py tests/facilities -x   # only these, with what else pytest takes

They are installed into an environment of their own, `.versions/newest`, which is brought up to date at every run.
"""

import subprocess
import sys
import venv
from collections.abc import Sequence

from overlay import FOLDER, ROOT

SHOWN = ("torch", "triton", "numpy", "pydantic", "accelerate", "diffusers", "lightning", "transformers")


def main(arguments: Sequence[str]) -> int:
    """What pytest returns."""
    place = FOLDER / "newest"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "--upgrade-strategy", "eager", "-e", ".[dev,demo]"], cwd=ROOT, check=True)
    releases = f"from importlib.metadata import version; print(*(f'{{x}} {{version(x)}}' for x in {SHOWN}), sep=', ')"
    subprocess.run([python, "-c", releases], cwd=ROOT, check=True)
    chosen = ["-n", "2", "--dist", "worksteal", "-m", "not interpret", "-q", "-p", "no:cacheprovider"]
    return subprocess.run([python, "-m", "pytest", *chosen, *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
