"""Checkpoints that a killed run finds again: each is there as a whole or not at all, and the last two are kept."""

import os
import re
from pathlib import Path
from typing import Any

import torch

KEPT = 2
NAME = re.compile(r"step_(\d{9})\.pt")


def save(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of so many steps, then remove old ones.

    The file gets its name after it is on the disk: a kill at any moment leaves the checkpoints before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09}.pt"
    part = path.with_suffix(".part")
    with part.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    for old in there(folder)[:-KEPT]:
        old.unlink()
    return path


def there(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if NAME.fullmatch(path.name))


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What `save` was given."""
    return torch.load(path, map_location=device, weights_only=True)
