"""How fast whole steps of training are: dense attention beside specs, from 64×64 pixels to 512×512.

    python examples/pixel_dit/throughput.py --sizes 64 128 256 --attentions dense llsa_l2 none --out throughput.json
    python examples/pixel_dit/throughput.py --sizes 256 512 --attentions dense llsa_l2 none --without 512:dense
    python examples/pixel_dit/throughput.py --table throughput.json

A step is all of it: noise onto the pictures, forward, backward, clipping, AdamW, averaged weights. Windows are random
bytes, already on the GPU. Time is that between two events around some steps in a row, without a wait between them.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention
import rows
import settings
import torch
from graphs import WARM_UPS, Batch, Replayed
from learner import Learner
from settings import Settings
from train import process_of

MODES = {"model": "compiled", "blocks": "blocks compiled", "none": "eager"}
"""What tables call the settings of `compile`."""

DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}

BUDGET_SECONDS = 4.0
"""What the timed steps of one row take together, at least two of them and at most a hundred."""


def measure(wanted: Settings) -> dict[str, Any]:
    """One row. What could not be measured, for want of memory, has `missing` with the reason."""
    process = process_of(wanted.device)
    on_gpu = process.device.type == "cuda"
    tokens = wanted.batch * wanted.size[0] * wanted.size[1]
    row: dict[str, Any] = {
        **rows.stamp(process.device.type),
        "attention": attention.name_of(wanted.attention),
        "settings": wanted.model_dump(mode="json"),
        "tokens": tokens,
    }
    torch.compiler.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        learner, step = prepared(wanted)
        row["replayed"] = isinstance(learner.step, Replayed)
        for _ in range(WARM_UPS + 1):  # compiles and, in the last one, records
            step()
        _wait(on_gpu)
        began = time.perf_counter()
        step()
        _wait(on_gpu)
        repeats = min(100, max(2, int(BUDGET_SECONDS / 3 / (time.perf_counter() - began))))
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            _wait(on_gpu)
            times.append((time.perf_counter() - began) / repeats)
        row |= {"step_ms": 1e3 * statistics.median(times), "fastest_ms": 1e3 * min(times), "repeats": 3 * repeats}
        row |= {"tokens_per_s": tokens / statistics.median(times)}
        row |= {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}
        del learner, step
    except torch.OutOfMemoryError as error:
        row["missing"] = str(error).splitlines()[0]
    return row


def prepared(wanted: Settings) -> tuple[Learner, Any]:
    """A learner, and a function that makes it take a step, always on the same random windows."""
    process = process_of(wanted.device)
    learner = Learner(wanted, process)
    shape = (learner.part, *wanted.size)
    generator = torch.Generator(process.device).manual_seed(wanted.seed)
    windows = torch.randint(256, (*shape, 3), dtype=torch.uint8, device=process.device, generator=generator)
    t = torch.rand(shape[0], device=process.device, generator=generator)
    eps = torch.randn((shape[0], 3, *wanted.size), device=process.device, generator=generator)

    def parts() -> Iterator[Batch]:
        for _ in range(wanted.accumulate):
            yield learner.batch(windows, t, eps)

    return learner, lambda: learner.learn(wanted.warmup, parts())


def shown(found: list[dict[str, Any]]) -> str:
    """The rows as a table: of one size and mode together, each beside the dense one."""
    lines = []
    for row in found:
        of = row["settings"]
        replayed = row.get("replayed", False)
        key = (of["size"], of["batch"], of["compile"], of["checkpointing"])
        dense = [
            one["tokens_per_s"] for one in found
            if one["attention"] == "dense" and "tokens_per_s" in one and one.get("replayed", False) == replayed
            and key == tuple(one["settings"][name] for name in ("size", "batch", "compile", "checkpointing"))
        ]  # fmt: skip
        name = ", ".join([row["attention"], *(of[x] for x in ("layout", "modulate") if of[x] != DEFAULTS[x])])
        head = [
            f"{of['size'][0]}×{of['size'][1]}",
            str(of["batch"]),
            MODES[of["compile"]] + ", replayed" * replayed,
            name,
        ]
        if "missing" in row:
            lines.append([*head, "-", "-", "-", row["missing"][:40]])
            continue
        ratio = f"{row['tokens_per_s'] / dense[-1]:.2f}" if dense else "-"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        lines.append([*head, f"{row['step_ms']:,.1f}", f"{row['tokens_per_s'] / 1e3:,.0f}", ratio, peak])
    return rows.table(["pixels", "B", "mode", "attention", "ms a step", "k tokens/s", "× dense", "peak GiB"], lines)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole training steps.")
    parser.add_argument("--sizes", nargs="+", default=["64", "128", "256"], metavar="N", help="64, or 24x40")
    parser.add_argument("--attentions", nargs="+", default=["dense", "llsa_l2", "none"], metavar="A")
    parser.add_argument("--without", nargs="+", default=[], metavar="N:A", help="a size with an attention, left out")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["model"], help="what is compiled")
    parser.add_argument("--layouts", nargs="+", choices=("tokens", "heads"), default=["tokens"])
    parser.add_argument("--modulates", nargs="+", choices=("weights", "tokens"), default=["weights"])
    parser.add_argument(
        "--tokens", type=int, default=0, help="batch such that a step has at least so many; B=1 unless given"
    )
    parser.add_argument("--out", type=Path, default=Path("throughput.json"))
    parser.add_argument("--table", type=Path, help="measure nothing: print the rows of a file")
    settings.add_flags(parser, varied=("size", "attention", "compile", "layout", "modulate", "accumulate"))
    options = parser.parse_args()
    if options.table:
        print(shown(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    base = settings.from_flags(options).model_dump() | {"accumulate": 1}
    made = []
    variants = itertools.product(options.sizes, options.modes, options.layouts, options.modulates, options.attentions)
    for size, mode, layout, modulate, one in variants:
        if f"{size}:{one}" in options.without:
            continue
        height, width = pixels = settings.checked({"size": size}).size
        batch = max(1, options.tokens // (height * width)) if options.tokens else int(options.batch or 1)
        varied = {"size": pixels, "compile": mode, "layout": layout, "modulate": modulate}
        try:
            row = measure(settings.checked(base | varied | {"attention": one, "batch": batch}))
        except ValueError as error:
            sys.exit(f"throughput.py: {error}")
        rows.add(options.out, [row])  # each at once: a program that is killed later has not lost it
        made.append(row)
        print(f"{size} {mode} {one} {layout} {modulate}: {row.get('step_ms') or row['missing']}", flush=True)
    print(shown(made))


if __name__ == "__main__":
    main()
