"""Runs a list of experiments, each with some seeds, on one device, and says how they compare.

    python examples/pixel_dit/ablation.py examples/pixel_dit/experiments/table1_64.yaml --out runs/table1_64 --seeds 3
    python examples/pixel_dit/ablation.py --table runs/table1_64/rows.json --curves curves.png

A seed gives all experiments the same first values, the same windows and the same noise, so that what they differ by is
what an experiment changes. Every run has a folder and is one of train.py's: what is killed goes on with the same
command, and what is done is not done again. rows.json holds a row a run, samples.png what the first seed drew. Flags
change the base of all experiments. With --parallel, runs share the device, so that it computes while some of them
compile, validate or write: losses stay, and no throughput is measured.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

import attention
import draw_curves
import rows
import settings
import torch
from data import DataError, Windows
from sample import write_beside
from settings import Settings
from train import Run, process_of

Job = tuple[str, Settings]
"""The name of an experiment, and its settings with one seed."""


def experiments(path: Path, options: argparse.Namespace) -> dict[str, Settings]:
    """The settings of each experiment of a file, by its name: the base, flags, then what it changes."""
    content = settings.read(path)
    if not {"base", "experiments"} <= content.keys():
        sys.exit(f"{path}: expected base and experiments, got {', '.join(content) or 'nothing'}")
    flags = {name: getattr(options, name) for name in Settings.model_fields if getattr(options, name) is not None}
    known = content["experiments"]
    if unknown := set(options.only or []) - set(known):
        sys.exit(f"--only: expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen = [name for name in known if name in (options.only or known)]
    return {name: settings.checked(content["base"] | flags | known[name]) for name in chosen}


def jobs_of(wanted: dict[str, Settings], seeds: range) -> list[Job]:
    """Every experiment with every seed, seed by seed: what is cut short is fair. Samples are drawn with the first seed
    alone, for no others are shown."""
    changes = {seed: {"seed": seed} if seed == seeds[0] else {"seed": seed, "samples": 0} for seed in seeds}
    return [(name, one.model_copy(update=changes[seed])) for seed in seeds for name, one in wanted.items()]


@functools.cache
def windows_of(data: str, size: tuple[int, int], shrink: int) -> Windows:
    """Windows, read once a process: pictures take longer to decode than some runs to train."""
    return Windows(Path(data), size, shrink)


def run(folder: Path, wanted: Settings) -> dict[str, Any]:
    """Train one experiment with one seed; its row without its name."""
    torch.compiler.reset()
    gc.collect()
    process = process_of(wanted.device)
    began = time.perf_counter()
    one = Run(folder, wanted, windows_of(wanted.data, wanted.size, wanted.shrink), process)
    one.train()
    lines = draw_curves.lines_of(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    tail = losses[-max(1, len(losses) // 10) :]
    rates = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    curve = [line for line in lines if "validation" in line]
    return {
        **rows.stamp(process.device.type),
        "settings": wanted.model_dump(mode="json"),
        "steps": one.step,
        "validation": curve[-1]["validation"],
        "curve": curve,
        "loss": statistics.mean(tail),  # of the last tenth of the steps
        "tokens_per_s": statistics.median(rates) if rates else None,
        "train_seconds": one.seconds,
        "wall_seconds": time.perf_counter() - began,
    }


def run_all(out: Path, jobs: Sequence[Job], parallel: int, minutes: float) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Rows as they come, of so many runs at once; after so many minutes none is begun."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    todo = list(jobs)[::-1]
    if parallel == 1:
        while todo and time.monotonic() < end:
            name, wanted = todo.pop()
            yield (name, wanted), run(folder_of(out, name, wanted), wanted)
    else:
        spawn = multiprocessing.get_context("spawn")
        running: dict[futures.Future[dict[str, Any]], Job] = {}
        with futures.ProcessPoolExecutor(parallel, mp_context=spawn, initializer=end_with_parent) as pool:
            while running or (todo and time.monotonic() < end):
                while todo and len(running) < parallel and time.monotonic() < end:
                    name, wanted = todo.pop()
                    running[pool.submit(run, folder_of(out, name, wanted), wanted)] = name, wanted
                for done in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
    if todo:
        name, wanted = todo[-1]
        print(f"time is up before {name}, seed {wanted.seed}; the same command goes on")


def end_with_parent() -> None:
    """A kill of the program ends its processes too: when the command comes again, nothing else writes into a folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def folder_of(out: Path, name: str, wanted: Settings) -> Path:
    """Of a run."""
    return out / f"{name}-{wanted.seed}"


def is_done(name: str, wanted: Settings, stored: Path) -> bool:
    """Whether a row of an experiment and a seed is there that was trained as long as is wanted now."""
    for row in rows.read(stored):
        had = Settings.model_validate(row["settings"])
        as_long = (had.steps, had.seconds) == (wanted.steps, wanted.seconds)
        if row["experiment"] == name and as_long and not settings.changed(had, wanted):
            return True
    return False


def latest(found: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by experiment and seed, in the order of the file of experiments, whichever run was done first. Of runs that
    were trained on later, the last row counts."""
    made: dict[str, dict[int, dict[str, Any]]] = {}
    for row in sorted(found, key=lambda row: row["place"]):
        made.setdefault(row["experiment"], {})[row["settings"]["seed"]] = row
    return made


def comparable(found: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The latest rows of the seeds that every experiment was trained with; all of them, while there is no such seed."""
    made = latest(found)
    seeds = set.intersection(*map(set, made.values()))
    return {name: {seed: row for seed, row in of.items() if seed in seeds or not seeds} for name, of in made.items()}


def shown(found: list[dict[str, Any]]) -> str:
    """A line an experiment: means over its seeds with their deviation, and how much more than the first one, seed by
    seed. Under them, how many rows are not comparable, if any."""
    by_name = comparable(found)
    first, base = next(iter(by_name.items()))
    lines = []
    for name, of in by_name.items():
        rates = [row["tokens_per_s"] for row in of.values() if row["tokens_per_s"] and row.get("parallel", 1) == 1]
        beside = [100 * (row["validation"] / base[seed]["validation"] - 1) for seed, row in of.items() if seed in base]
        lines.append([
            name, spread([row["validation"] for row in of.values()], ".4f"),
            "-" if name == first or not beside else f"{spread(beside, '+.1f')}%",
            spread([row["loss"] for row in of.values()], ".4f"),
            f"{statistics.median(rates) / 1e3:,.0f}" if rates else "-",
            f"{min(row['steps'] for row in of.values()):,}", str(len(of)),
        ])  # fmt: skip
    head = ["experiment", "validation", f"beside {first}", "training", "k tokens/s", "steps", "seeds"]
    more = sum(map(len, latest(found).values())) - sum(map(len, by_name.values()))
    left_out = f"\n\nleft out: {more} of seeds that not every experiment was trained with" if more else ""
    return rows.table(head, lines) + left_out


def spread(values: Sequence[float], kind: str) -> str:
    """The mean, and the deviation of more than one."""
    mean = f"{statistics.mean(values):{kind}}"
    return f"{mean} ±{statistics.stdev(values):{kind.lstrip('+')}}" if len(values) > 1 else mean


def print_table(stored: list[Path], curves: Path | None) -> None:
    """Compare what files of rows hold."""
    found = [row for path in stored for row in rows.read(path)]
    if not found:
        sys.exit(f"--table: expected files with rows, got {', '.join(map(str, stored))}")
    print(shown(found))
    if curves:
        by_name = {name: [row["curve"] for row in of.values()] for name, of in comparable(found).items()}
        draw_curves.draw_validation(by_name, curves)


def train_all(options: argparse.Namespace) -> None:
    """Run what has no row yet, store each row as it comes, and compare them."""
    stored, wanted = options.out / "rows.json", experiments(options.file, options)
    places = list(settings.read(options.file)["experiments"])
    first = int(options.seed or 0)
    jobs = jobs_of(wanted, range(first, first + options.seeds))
    jobs = [(name, one) for name, one in jobs if not is_done(name, one, stored)]
    for (name, one), row in run_all(options.out, jobs, options.parallel, options.minutes):
        named = {"experiment": name, "place": places.index(name), "attention": attention.name_of(one.attention)}
        rows.add(stored, [named | {"parallel": options.parallel} | row])
        said = f"validation {row['validation']:.4f}, {row['wall_seconds']:.0f} s"
        print(f"{name}, seed {one.seed}: {said}", flush=True)
        drawn = {name: options.out / f"{name}-{first}" / "samples.png" for name in wanted}
        write_beside({name: path for name, path in drawn.items() if path.exists()}, options.out / "samples.png")
    if found := rows.read(stored):
        print(shown(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train experiments and compare them.")
    parser.add_argument("file", type=Path, nargs="?", help="YAML: base, and experiments by name")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments alone")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, each a process, all on one device")
    parser.add_argument("--minutes", type=float, default=0, help="begin no run after so many; 0: run all")
    parser.add_argument("--table", type=Path, nargs="+", metavar="ROWS", help="run nothing: print what such files hold")
    parser.add_argument("--curves", type=Path, help="with --table: draw validation by step")
    settings.add_flags(parser)
    options = parser.parse_args()
    if options.table:
        print_table(options.table, options.curves)
        return
    if not options.file or not options.out:
        parser.error("expected a file of experiments and --out, or --table")
    if options.parallel < 1 or options.seeds < 1:
        parser.error(f"--parallel, --seeds: expected 1 or more, got {options.parallel}, {options.seeds}")
    try:
        train_all(options)
    except BrokenProcessPool:
        sys.exit("ablation.py: a process died, and with it all runs; the same command goes on")
    except (DataError, ValueError) as error:
        sys.exit(f"ablation.py: {error}")


if __name__ == "__main__":
    main()
