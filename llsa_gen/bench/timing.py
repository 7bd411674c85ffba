"""Timing: how long a call takes, how long it takes to issue, and what memory it needs at its peak.

As `triton.testing.do_bench` does, every timed call finds the caches cold: before it, a buffer larger than they are is
rewritten. On a GPU time is that between two events of the stream, so that a call which Python issues more slowly than
the GPU runs it is as slow as Python. How often a call is repeated follows from a budget of time.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

from llsa_gen.bench.rows import Timing

__all__ = ["BUDGET_MS", "CpuStopwatch", "GpuStopwatch", "Stopwatch", "captured", "host_us", "measure", "peak_bytes"]

Run = Callable[[], object]

BUDGET_MS = 500.0
"""What the timed calls of one number take together, caches driven out included, but for the few of a slow one."""

LEAST, MOST = 3, 1000
"""Repeats."""

HOST_LEAST, HOST_MOST = 3, 100
"""Repeats of the time to issue a call."""

CPU_CACHE_BYTES = 1 << 26
GPU_CACHE_BYTES = 1 << 28
"""What is rewritten between two calls, at least."""


class Stopwatch(Protocol):
    """Times calls on one device."""

    def flush(self) -> None:
        """Drive out of the caches whatever a call could find there."""
        ...

    def samples(self, run: Run, repeats: int) -> list[float]:
        """Milliseconds of each of some calls, with cold caches."""
        ...


class CpuStopwatch:
    """Wall-clock time."""

    def __init__(self) -> None:
        self._cache = torch.zeros(CPU_CACHE_BYTES, dtype=torch.int8)

    def flush(self) -> None:
        self._cache.bitwise_not_()

    def samples(self, run: Run, repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            self.flush()
            start = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - start))
        return found


class GpuStopwatch:
    """Time between two events on the current stream of `device`."""

    def __init__(self, device: torch.device) -> None:
        known = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._device = device
        self._cache = torch.zeros(max(GPU_CACHE_BYTES, 2 * known), dtype=torch.int8, device=device)

    def flush(self) -> None:
        self._cache.bitwise_not_()

    def samples(self, run: Run, repeats: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in pairs:
            self.flush()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in pairs]


def repeats_for(milliseconds: float, least: int = LEAST, most: int = MOST) -> int:
    """How often a call of so many milliseconds fits into the budget, within bounds."""
    return min(most, max(least, int(BUDGET_MS / max(milliseconds, 1e-6))))


def measure(watch: Stopwatch, run: Run) -> Timing:
    """Median and percentiles of a call, after a first one, which compiles, and a tenth of the repeats to warm up.

    A call that the budget holds fewer than ten times is warm after the two that find out how long it takes.
    """
    watch.samples(run, 1)
    start = time.perf_counter()
    sample = watch.samples(run, 1)[0]
    repeats = repeats_for(max(sample, 1e3 * (time.perf_counter() - start)))  # what comes before a call takes time too
    if repeats >= 10:
        watch.samples(run, repeats // 10)
    samples = watch.samples(run, repeats)
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(median_ms=statistics.median(samples), p20_ms=p20, p80_ms=p80, repeats=repeats)


def host_us(run: Run, milliseconds: float) -> float:
    """Median microseconds that a warm call on the current GPU takes to return, which is before the GPU is done.

    The GPU is idle when each call begins, so that none waits for room in the queue. `milliseconds` is what a call takes
    in all; it decides how often one is made.
    """
    found = []
    for _ in range(repeats_for(milliseconds, HOST_LEAST, HOST_MOST)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(found)


def peak_bytes(run: Run) -> int:
    """Bytes that a call holds on the current GPU at its peak, beyond what was allocated before."""
    gc.collect()  # what is garbage by now must not be taken for memory that the call gave back
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(run: Run) -> Run:
    """A call that replays the kernels of `run` as one CUDA graph, and returns the tensors that `run` made then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever happens at first calls only must not be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> object:
        graph.replay()
        return results

    return replay
