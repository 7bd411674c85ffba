"""Draw loss curves of runs: by step, and by seconds of training.

    python examples/pixel_dit/draw_curves.py runs/equal/dense-0 runs/equal/llsa-0 --along seconds --out curves.png
    python examples/pixel_dit/draw_curves.py dense.jsonl llsa.jsonl --out curves.png

Needs matplotlib; nothing that trains does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Lines = list[dict[str, Any]]
SCALES = {"step": "steps", "seconds": "seconds of training"}


def lines_of(path: Path) -> Lines:
    """The log of a run, by its folder or the file itself. Raises ValueError where there is none."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file() or log.suffix != ".jsonl":
        raise ValueError(f"{path}: expected the folder of a run, with log.jsonl in it, or such a file, got none")
    whole = (line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return [json.loads(line) for line in whole]  # a kill may have cut off the last one


def series(lines: Lines, value: str, along: str) -> tuple[list[float], list[float]]:
    """(places, values) of one value of the log, such as `loss` or `validation`, along `step` or `seconds`."""
    chosen = [line for line in lines if value in line]
    return [line[along] for line in chosen], [line[value] for line in chosen]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over the last `width` values: what comes later has no part in them."""
    sums = np.cumsum([0.0, *values])
    begins = np.maximum(np.arange(1, len(sums)) - width, 0)
    return ((sums[1:] - sums[begins]) / (np.arange(1, len(sums)) - begins)).tolist()


def validation(lines: Lines, along: str) -> tuple[list[float], list[float]]:
    """The series of validation after the first step: before, it is 1, about, for all, and would press the rest flat."""
    return series([line for line in lines if line["step"]], "validation", along)


def draw(runs: dict[str, Lines], out: Path, along: Sequence[str] = tuple(SCALES)) -> None:
    """A panel a scale: the loss on what is learnt from, smoothed, and over it that on pictures that are not."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(along), figsize=(1 + 6.5 * len(along), 4.5), squeeze=False)
    for panel, scale in zip(panels[0], along, strict=True):
        for name, lines in runs.items():
            places, losses = series(lines, "loss", scale)
            smooth = dict(zip(places, smoothed(losses, max(1, len(losses) // 50)), strict=True))  # lines share seconds
            (line,) = panel.plot(list(smooth), list(smooth.values()), alpha=0.4, linewidth=1)
            panel.plot(*validation(lines, scale), marker=".", color=line.get_color(), label=name)
        panel.set(title="validation loss (pale: training)", xlabel=SCALES[scale], yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw_validation(experiments: dict[str, list[Lines]], out: Path) -> None:
    """Validation by step of experiments with some runs each: the mean, and from the lowest to the highest run."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(7, 4.5))
    for name, runs in experiments.items():
        found = [dict(zip(*validation(lines, "step"), strict=True)) for lines in runs]
        steps = sorted(set.intersection(*map(set, found)))
        values = np.array([[one[step] for step in steps] for one in found])
        (line,) = panel.plot(steps, values.mean(0), marker=".", label=name)
        panel.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    panel.set(title="validation loss", xlabel="steps", yscale="log")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    """matplotlib's, which draws into files. Imported when it is used: what trains does without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss curves of runs into one picture.")
    parser.add_argument("folders", type=Path, nargs="+", help="of the runs, or their log.jsonl under any name")
    parser.add_argument("--along", nargs="+", choices=tuple(SCALES), default=list(SCALES), help="a panel each")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    try:
        runs = {path.stem if path.is_file() else path.name: lines_of(path) for path in options.folders}
    except ValueError as error:
        sys.exit(f"draw_curves.py: {error}")
    draw(runs, options.out, options.along)
    for name, lines in runs.items():
        last = {key: value for line in lines for key, value in line.items()}
        reached = f"step {last['step']:,}, {last['seconds']:.0f} s"
        print(f"{name}: {reached}, validation {last.get('validation', float('nan')):.4f}")
    print(options.out)


if __name__ == "__main__":
    main()
