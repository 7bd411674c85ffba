"""Kernels: where the time of one forward and backward pass goes, and how near each kernel comes to the hardware.

The profiler says what ran and for how long; the cost model says what each kernel of the plan had to compute and to move
at least; two measurements say what this GPU can do. Together they give the achieved share of the roofline,

    max(FLOPs / peak FLOP/s, bytes / bandwidth) / time

with every buffer read and written once: what is gathered several times and comes from memory again is not counted, nor
are exponentials, sorts and integers. A share of 30% may so be a kernel that could be three times faster, or one whose
gathers miss the cache.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from llsa_gen.aot import Launch
from llsa_gen.bench.rows import Ceilings, KernelRow
from llsa_gen.bench.timing import Call, Stopwatch
from llsa_gen.plan.cost import Cost, evaluate

__all__ = ["Event", "Work", "breakdown", "ceilings", "events", "profiled", "work"]

COPY_BYTES = 1 << 30
MATRIX = 8192
"""Rows and columns of the matrix product that measures FLOP/s."""

CEILING_REPEATS = 20
PASSES = 10
"""Passes that are profiled."""

LONGEST_NAME = 60


class Event(NamedTuple):
    """Something that ran on the GPU, and for how long."""

    name: str
    us: float


class Work(NamedTuple):
    """What all launches of a kernel in one pass have to do at least."""

    flops: int
    moved_bytes: int


def work(
    cost: Cost, n_tokens: int, heads: int, launches: Iterable[Launch] = (), m_tokens: int | None = None
) -> dict[str, Work]:  # fmt: skip
    """FLOPs and bytes of every kernel of a plan in one forward and backward pass, over all `heads` (B*H).

    `m_tokens` queries, as many as keys unless given. Kernels of `launches` that take the place of one of the plan are
    there too, by their own names.
    """
    found: dict[str, Work] = {}
    for kernel in cost.plan.usual:
        before = found.get(kernel.name, Work(0, 0))
        flops = evaluate(cost.kernel_flops(kernel), n_tokens, heads, m_tokens)
        moved = evaluate(cost.kernel_bytes(kernel), n_tokens, heads, m_tokens)
        found[kernel.name] = Work(before.flops + flops, before.moved_bytes + moved)
    return found | {launch.kernel: found[launch.step] for launch in launches if launch.step}


def breakdown(
    happened: Iterable[Event], passes: int, needed: Mapping[str, Work], limits: Ceilings
) -> tuple[KernelRow, ...]:
    """The kernels of `passes` equal passes, per pass, those that take longest first.

    `needed` is the `work` of the kernels of the plan; others may have run too.
    """
    us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in happened:
        us[event.name] += event.us  # type: ignore[assignment]  (a counter of microseconds)
        launches[event.name] += 1
    total = sum(us.values())
    rows = []
    for name, spent in us.most_common():
        known, each_us = needed.get(name), spent / passes
        floor_s = known and max(known.flops / limits.flops_per_s, known.moved_bytes / limits.bytes_per_s)
        rows.append(
            KernelRow(
                kernel=name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}...",
                launches=launches[name] / passes,
                us=each_us,
                share=spent / total if total else 0.0,
                flops=known and known.flops,
                moved_bytes=known and known.moved_bytes,
                roofline=None if floor_s is None or not each_us else 1e6 * floor_s / each_us,
            )
        )
    return tuple(rows)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def profiled(run: Callable[[], object], watch: Stopwatch) -> list[Event]:
    """What `PASSES` warm calls ran on the current GPU, each with cold caches; what makes them cold is left out."""
    run()
    flushing = {event.name for event in events(watch.flush, 3)}  # also gets the profiler going

    def cold() -> None:
        watch.flush()
        run()

    return [event for event in events(cold, PASSES) if event.name not in flushing]


def events(run: Callable[[], object], repeats: int) -> list[Event]:
    """What some calls ran on the current GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return [
        Event(event.name, event.time_range.elapsed_us())
        for event in seen.events() or ()
        if event.device_type.name == "CUDA"  # ROCm's too
    ]


def ceilings(watch: Stopwatch, device: str, dtype: str) -> Ceilings:
    """What this GPU does now: bytes/s of a copy in its memory, FLOP/s of a square matrix product in `dtype`."""

    def seconds(run: Callable[[], object]) -> float:
        watch.samples([Call(run)] * (CEILING_REPEATS // 2))
        return statistics.median(watch.samples([Call(run)] * CEILING_REPEATS)) / 1e3

    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    x = torch.randn(MATRIX, MATRIX, device=device, dtype=getattr(torch, dtype))
    y = torch.empty_like(x)
    return Ceilings(
        bytes_per_s=2 * COPY_BYTES / seconds(lambda: target.copy_(source)),
        flops_per_s=2 * MATRIX**3 / seconds(lambda: torch.mm(x, x, out=y)),
    )
