"""Draw pictures from a checkpoint: of the size that it was trained at, or of another one.

python examples/pixel_dit/sample.py runs/first samples.png --count 16 --steps 50 --size 192x256
"""

import argparse
import sys
from pathlib import Path

import checkpoints
import numpy as np
import settings
import torch
from graphs import Process
from learner import Learner
from PIL import Image, ImageDraw
from settings import Settings
from torch import Tensor

GAP = 2
"""White pixels between two pictures of a grid."""


def write_grid(pictures: Tensor, path: Path, columns: int = 0) -> None:
    """Pictures [B, 3, height, width] in -1 ... 1, beside each other in a PNG: about a square, or so many columns."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for place, one in enumerate(pixels):
        y, x = place // columns * (height + GAP), place % columns * (width + GAP)
        grid[y : y + height, x : x + width] = one
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)


def write_beside(grids: dict[str, Path], path: Path) -> None:
    """Pictures of several runs beside each other in a PNG, their names above. Nothing, where there are none."""
    pictures = {name: Image.open(one).convert("RGB") for name, one in grids.items()}
    if not pictures:
        return
    gap, head = 4 * GAP, 14
    width = sum(one.width + gap for one in pictures.values()) - gap
    sheet = Image.new("RGB", (width, head + max(one.height for one in pictures.values())), "white")
    left = 0
    for name, one in pictures.items():
        ImageDraw.Draw(sheet).text((left, 0), name, "black")
        sheet.paste(one, (left, head))
        left += one.width + gap
    sheet.save(path)


def learner_of(folder: Path, device: torch.device, size: tuple[int, int] | None = None) -> Learner:
    """What the last checkpoint of a run has learnt, at its size or another one. Raises ValueError without one."""
    found = checkpoints.there(folder / "checkpoints")
    if not found:
        raise ValueError(f"{folder}: expected the folder of a run with a checkpoint, got none")
    content = checkpoints.load(found[-1], device)
    trained = content["settings"] | {"compile": "none", "cuda_graph": False} | ({"size": list(size)} if size else {})
    learner = Learner(Settings.model_validate(trained), Process(device))
    learner.load(content)
    return learner


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw pictures from the last checkpoint of a run.")
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="of Heun's method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", help="64, or 24x40 for height 24; that of the training unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    size = settings.checked({"size": options.size}).size if options.size else None
    try:
        learner = learner_of(options.folder, torch.device(options.device), size)
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    write_grid(learner.sample(options.count, options.steps, options.seed), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
