"""The runtime: what is the same in every generated module, as real files that are spliced into it word for word.

What stands above the line `SPLICED` in a file is for tools and tests, and does not travel. The names that a file takes
from the first part of a module, which differs from spec to spec, are declared in `module`. Nothing here imports the
rest of the package: a generated module stands alone.
"""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
SPLICED = "# ---- spliced into every module from here on\n"

FILES = (
    "replay.c", "driver.py", "backend.py", "replay.py", "sizes.py", "launch_plan.py", "kernels.py", "cpu.py",
    "cpu_stages.py", "guards.py", "passes.py", "transforms.py", "stages.py", "sharding.py",
    "operator.py",
)  # fmt: skip
"""Everything that is spliced, in the order of a module."""


def text(name: str) -> str:
    """What a module has of one of `FILES`."""
    content = (FOLDER / name).read_text(encoding="utf-8")
    return content if name.endswith(".c") else content.split(SPLICED, 1)[1].strip("\n") + "\n"


def digests() -> dict[str, str]:
    """Content hash of what modules have of each of `FILES`."""
    return {name: hashlib.sha256(text(name).encode()).hexdigest() for name in FILES}
