"""Runs a list of experiments, each with some seeds, on one device in one process, and says how they compare.

    python examples/pixel_dit/ablation.py examples/pixel_dit/experiments/table1_64.yaml --out runs/table1_64 --seeds 3
    python examples/pixel_dit/ablation.py examples/pixel_dit/experiments/table1_64.yaml --out runs/table1_64 --table

A seed gives all experiments the same first values, the same windows and the same noise, so that what they differ by is
what an experiment changes. Every run has a folder and is one of train.py's: what is killed goes on with the same
command, and what is done is not done again. rows.json holds a row a run. Flags change the base of all experiments.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import attention
import rows
import settings
import torch
import yaml
from data import DataError, Windows
from settings import Settings
from train import Run, process_of


def experiments(path: Path, options: argparse.Namespace) -> dict[str, Settings]:
    """The settings of each experiment of a file, by its name: the base, flags, then what it changes."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    flags = {name: getattr(options, name) for name in Settings.model_fields if getattr(options, name) is not None}
    chosen = {
        name: one for name, one in content["experiments"].items() if name in (options.only or content["experiments"])
    }
    if options.only and (unknown := set(options.only) - set(chosen)):
        sys.exit(f"--only: expected names of {', '.join(content['experiments'])}, got {', '.join(sorted(unknown))}")
    return {name: settings.checked(content["base"] | flags | one) for name, one in chosen.items()}


def run(folder: Path, wanted: Settings, windows: Windows) -> dict[str, Any]:
    """Train one experiment with one seed; its row without its name."""
    torch.compiler.reset()
    gc.collect()
    process = process_of(wanted.device)
    began = time.perf_counter()
    one = Run(folder, wanted, windows, process)
    one.train()
    lines = [json.loads(line) for line in one.log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tail = losses[-max(1, len(losses) // 10) :]
    rates = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    return {
        **rows.stamp(process.device.type),
        "settings": wanted.model_dump(mode="json"),
        "steps": one.step,
        "validation": [line["validation"] for line in lines if "validation" in line][-1],
        "loss": statistics.mean(tail),  # of the last tenth of the steps
        "tokens_per_s": statistics.median(rates) if rates else None,
        "train_seconds": one.seconds,
        "wall_seconds": time.perf_counter() - began,
    }


def is_done(name: str, wanted: Settings, stored: Path) -> bool:
    """Whether a row of an experiment and a seed is there that was trained as long as is wanted now."""
    for row in json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []:
        had = Settings.model_validate(row["settings"])
        same = not settings.changed(had, wanted) and (had.steps, had.seconds) == (wanted.steps, wanted.seconds)
        if row["experiment"] == name and same:
            return True
    return False


def shown(found: list[dict[str, Any]]) -> str:
    """A line an experiment: mean and spread over its seeds, and what differs from the first one, seed by seed.

    Of runs that were trained on later, the last row counts.
    """
    found = list({(row["experiment"], row["settings"]["seed"]): row for row in found}.values())
    names = list(dict.fromkeys(row["experiment"] for row in found))
    base = {row["settings"]["seed"]: row["validation"] for row in found if row["experiment"] == names[0]}
    lines = []
    for name in names:
        of = [row for row in found if row["experiment"] == name]
        values = [row["validation"] for row in of]
        spread = f"±{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        beside = [row["validation"] - base[row["settings"]["seed"]] for row in of if row["settings"]["seed"] in base]
        rates = [row["tokens_per_s"] for row in of if row["tokens_per_s"]]
        lines.append([
            name, f"{statistics.mean(values):.4f}", spread, f"{statistics.mean(beside):+.4f}" if beside else "-",
            f"{statistics.mean(row['loss'] for row in of):.4f}",
            f"{statistics.median(rates) / 1e3:,.0f}" if rates else "-", f"{of[0]['steps']:,}", str(len(of)),
        ])  # fmt: skip
    head = ["experiment", "validation", "spread", f"beside {names[0]}", "training", "k tokens/s", "steps", "seeds"]
    return rows.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train experiments one after the other and compare them.")
    parser.add_argument("file", type=Path, help="YAML: base, and experiments by name")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments alone")
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after so many; 0: run all")
    parser.add_argument("--table", action="store_true", help="run nothing: print what rows.json holds")
    settings.add_flags(parser)
    options = parser.parse_args()
    stored = options.out / "rows.json"
    if options.table:
        print(shown(json.loads(stored.read_text(encoding="utf-8"))))
        return
    wanted = experiments(options.file, options)
    began, windows = time.perf_counter(), dict[tuple[Any, ...], Windows]()
    first = int(options.seed or 0)
    seeds = range(first, first + options.seeds)
    for seed, (name, one) in itertools.product(seeds, wanted.items()):  # seed by seed: what is cut short is fair
        one = one.model_copy(update={"seed": seed})
        if is_done(name, one, stored):
            continue
        if options.minutes and time.perf_counter() - began > 60 * options.minutes:
            print(f"time is up before {name}, seed {seed}; the same command goes on")
            break
        try:
            key = (one.data, one.size, one.shrink)
            if key not in windows:
                windows[key] = Windows(Path(one.data), one.size, one.shrink)
            row = run(options.out / f"{name}-{seed}", one, windows[key])
        except (DataError, ValueError) as error:
            sys.exit(f"ablation.py: {error}")
        rows.add(stored, [{"experiment": name, "attention": attention.name_of(one.attention), **row}])
        rate = f"{row['tokens_per_s'] / 1e3:,.0f}k tokens/s, " if row["tokens_per_s"] else ""
        print(f"{name}, seed {seed}: validation {row['validation']:.4f}, {rate}{row['wall_seconds']:.0f} s", flush=True)
    print(shown(json.loads(stored.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
