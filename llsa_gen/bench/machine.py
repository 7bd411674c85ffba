"""The machine: GPU, driver, versions and commit that every stored row carries."""

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from llsa_gen.bench.rows import Machine
from llsa_gen.emit import generator_version

__all__ = ["commit", "machine"]

PACKAGE = Path(__file__).resolve().parents[1]


def machine(device: str) -> Machine:
    """This machine with `device`, `cpu` or a GPU."""
    sha, dirty = commit(PACKAGE.parent)
    return Machine(
        device=_name(torch.device(device)),
        driver=_driver() if torch.device(device).type == "cuda" else None,
        llsa_gen=generator_version(),
        torch=torch.__version__,
        triton=version("triton"),
        python=platform.python_version(),
        commit=sha,
        dirty=dirty,
    )


def commit(root: Path) -> tuple[str | None, bool | None]:
    """The commit checked out in `root` and whether what runs differs from it; None twice where `root` is no checkout.

    A folder inside somebody else's checkout, such as a virtual environment there, is none.
    """
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return None, None
    sha = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not sha:  # nothing is committed yet
        return None, None
    return sha, _output("git", "-C", str(root), "status", "--porcelain", "--", "llsa_gen", "templates") != ""


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def _driver() -> str | None:
    """The version of the GPU's kernel driver; None where nothing says it."""
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if said:
        return said.splitlines()[0].strip()
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text())
            return found[0] if found else None
    return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
