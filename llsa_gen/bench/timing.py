"""Timing: how long a call takes, how long it takes to issue, and what memory it needs at its peak.

As `triton.testing.do_bench` does, every timed call finds the caches cold: before it, a buffer larger than they are is
rewritten. On a GPU time is that between two events of the stream, so that a call which Python issues more slowly than
the GPU runs it is as slow as Python. How often a call is repeated follows from a budget of time, or is said. Several
calls are timed in turns, so that whatever the machine does meanwhile, its clock above all, happens to each of them.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch

from llsa_gen.bench.rows import Timing

__all__ = [
    "BUDGET_MS",
    "Call",
    "CpuStopwatch",
    "GpuStopwatch",
    "Stopwatch",
    "captured",
    "host_us",
    "measure",
    "peak_bytes",
    "turns",
]

Run = Callable[[], object]


class Call(NamedTuple):
    """A call that is timed, and what it is called in, which is not."""

    run: Run
    around: Callable[[], AbstractContextManager[None]] = nullcontext


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

    def samples(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each of some calls, one after the other, with cold caches."""
        ...


class CpuStopwatch:
    """Wall-clock time."""

    def __init__(self) -> None:
        self._cache = torch.zeros(CPU_CACHE_BYTES, dtype=torch.int8)

    def flush(self) -> None:
        self._cache.bitwise_not_()

    def samples(self, calls: Sequence[Call]) -> list[float]:
        found = []
        for run, around in calls:
            with around():
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

    def samples(self, calls: Sequence[Call]) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in calls]
        for (run, around), (start, end) in zip(calls, pairs, strict=True):
            with around():  # before the flush: while that runs, Python may be ahead, of each call by as much
                self.flush()
                start.record()
                run()
                end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in pairs]


def repeats_for(milliseconds: float, least: int = LEAST, most: int = MOST) -> int:
    """How often a call of so many milliseconds fits into the budget, within bounds."""
    return min(most, max(least, int(BUDGET_MS / max(milliseconds, 1e-6))))


def turns(repeats: Sequence[int]) -> list[int]:
    """Whose turn it is: each index as often as it says, spread evenly over all turns. Equal numbers alternate."""
    places = ((turn + 0.5) / count for count in repeats for turn in range(count))
    owners = (index for index, count in enumerate(repeats) for _ in range(count))
    return [owner for _, owner in sorted(zip(places, owners, strict=True))]


def measure(watch: Stopwatch, calls: Sequence[Call], repeats: int | None = None) -> list[Timing | BaseException]:
    """Median and percentiles of each call, timed in turns; in the place of one that fails, what it raised.

    Each is made `repeats` times, or as often as its budget of time holds, after a first one, which compiles, and a
    tenth of the repeats to warm up. A call that is made fewer than ten times is warm after the two that find out how
    long it takes.
    """
    counts: dict[int, int] = {}
    failed: dict[int, BaseException] = {}
    for index, call in enumerate(calls):
        try:
            counts[index] = _warm(watch, call, repeats)
        except (Exception, SystemExit) as why:  # whatever somebody else's code may raise
            failed[index] = why
    samples: dict[int, list[float]] = {}
    while counts.keys() != samples.keys():
        samples = _samples(watch, calls, counts, failed)
        counts = {index: count for index, count in counts.items() if index not in failed}
    return [failed[index] if index in failed else _timing(samples[index]) for index in range(len(calls))]


def _warm(watch: Stopwatch, call: Call, repeats: int | None) -> int:
    """How often a call is to be made; it is warm then."""
    watch.samples([call])
    start = time.perf_counter()
    sample = watch.samples([call])[0]
    if repeats is None:
        # what comes before a call takes time too
        repeats = repeats_for(max(sample, 1e3 * (time.perf_counter() - start)))
    if repeats >= 10:
        watch.samples([call] * (repeats // 10))
    return repeats


def _samples(
    watch: Stopwatch, calls: Sequence[Call], counts: Mapping[int, int], failed: dict[int, BaseException]
) -> dict[int, list[float]]:
    """The milliseconds of each call, so many of each; none where one fails, which goes into `failed`."""
    order = [list(counts)[turn] for turn in turns(list(counts.values()))]
    present = order[0]

    def told(index: int) -> Call:
        @contextmanager
        def around() -> Iterator[None]:
            nonlocal present
            present = index
            with calls[index].around():
                yield

        return Call(calls[index].run, around)

    queued = {index: told(index) for index in counts}
    try:
        found = watch.samples([queued[index] for index in order])
    except (Exception, SystemExit) as why:
        failed[present] = why
        return {}
    samples: dict[int, list[float]] = {index: [] for index in counts}
    for index, sample in zip(order, found, strict=True):
        samples[index].append(sample)
    return samples


def _timing(samples: Sequence[float]) -> Timing:
    """Of one sample, which has no percentiles, all three numbers are that."""
    ordered = [*samples] if len(samples) > 1 else [*samples, *samples]
    p20, _, _, p80 = statistics.quantiles(ordered, n=5, method="inclusive")
    return Timing(median_ms=statistics.median(samples), p20_ms=p20, p80_ms=p80, repeats=len(samples))


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
