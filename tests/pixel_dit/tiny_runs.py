"""Pictures and settings that are small enough for a CPU."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from settings import Settings

SMALL: dict[str, Any] = {
    "size": 16, "attention": "small", "channels": 64, "heads": 2, "depth": 2, "batch": 4, "steps": 6, "warmup": 2,
    "lr": 3e-3, "ema": 0.9, "precision": "float32", "compile": "none", "device": "cpu", "log_every": 2,
    "validate_every": 100, "validation": 8, "checkpoint_every": 2, "samples": 0,
}  # fmt: skip


def small(**changes: Any) -> Settings:
    return Settings.model_validate(SMALL | changes)


def draw_pictures(folder: Path, count: int = 6, height: int = 60, width: int = 90) -> Path:
    """A folder of smooth coloured pictures, each another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder
