"""The launches of a pass: by Triton and captured at the first call, one call of C from the second on."""

import contextlib
import ctypes
import functools
import itertools
import os
import struct
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.knobs

if TYPE_CHECKING:
    from llsa_gen.runtime.backend import variant
    from llsa_gen.runtime.driver import PARAMETERS, libcuda, parameter_sizes, replayer, said
    from llsa_gen.runtime.module import LISTS_FILL, OPERATOR, OPTIONS

INTERPRETED = triton.knobs.runtime.interpret

# ---- spliced into every module from here on

MANY_GRAPHS = 512  # are kept: each takes some 100 KB of the GPU, and half a millisecond to make
SOON = 32  # replays of any pass: what comes back within so many takes the place of another's graph
ONE_BY_ONE = (
    os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
)  # whoever asks which launch it was will not be told of a graph
SIZES = {"i32": 4, "i64": 8, "fp32": 4}  # of a parameter, bytes, by Triton's name of its type; addresses take 8
LAUNCH = os.environ.get("LLSA_GEN_LAUNCH") or "auto"
if LAUNCH not in ("auto", "triton"):
    raise ValueError(f"LLSA_GEN_LAUNCH: expected auto or triton, got {LAUNCH!r}")
PLAIN = LAUNCH == "triton" or INTERPRETED or bool(torch.version.hip)  # every launch as Triton does it; see `give_up`
TOLD = []  # why launches take longer, once somebody was told
CLOCK = itertools.count(1)  # ticks at every replay of a pass
GRAPHS = weakref.WeakSet()  # of all passes
MAKING = threading.Lock()  # a graph; nobody waits for it, for who has it may be a thread that a fork left behind


class Argument(NamedTuple):
    """What differs from call to call in the arguments of a launch, as REPLAY_C puts it together; its value now."""

    value: torch.Tensor | float
    base: int
    offset: int = 0


def tell(why: str) -> None:
    """One warning, whatever else goes wrong later."""
    if not TOLD:
        TOLD.append(why)
        warnings.warn(f"{OPERATOR}: launching its kernels takes longer: {why}", RuntimeWarning, stacklevel=3)


def give_up(error: Exception) -> None:
    """From now on every launch is Triton's, as after LLSA_GEN_LAUNCH=triton."""
    global PLAIN
    PLAIN = True
    tell(said(error))


@functools.lru_cache(maxsize=256)
def parameters_of(compiled: Any) -> list[bool]:
    """Which arguments of a kernel are its parameters, one bool each; a RuntimeError where it takes more than these."""
    known = compiled.metadata
    kinds = list(compiled.src.signature.values())
    taken = [kind != "constexpr" for kind in kinds]  # nor numbers that Triton has made constants
    sizes = [8 if kind[0] == "*" else SIZES.get(kind) for kind in itertools.compress(kinds, taken)]
    more = known.num_ctas > 1 or known.launch_cooperative_grid or known.launch_pdl
    more = more or known.global_scratch_size or known.profile_scratch_size or len(sizes) + 2 > PARAMETERS
    if more or parameter_sizes(compiled.function) != [*sizes, 8, 8]:
        raise RuntimeError(f"{known.name} takes more than its arguments and two addresses of scratch memory")
    return taken


def captured(compiled: Any, programs: int, arguments: Sequence[Any]) -> bytes:
    """A launch as REPLAY_C reads it; a RuntimeError where that cannot replay it."""
    parameters = []
    for argument in itertools.compress(arguments, parameters_of(compiled)):
        parameters += argument[1:] if isinstance(argument, Argument) else (0, argument % 2**64)
    parameters += 0, 0, 0, 0  # no scratch memory of either kind
    known = compiled.metadata
    launch = compiled.function, programs, 32 * known.num_warps, known.shared, len(parameters) // 2
    return struct.pack(f"=Q4I{len(parameters)}Q", *launch, *parameters)


class Graph:
    """A pass as a CUDA graph, `made` until another takes its place, and the tick of CLOCK when it ran last."""

    def __init__(self, made: Any, replayed: int) -> None:
        self.made, self.replayed = made, replayed


class Replay:
    """The launches of a pass, `parts`, on the GPU whose context is current; `kernels` are theirs and stay loaded.

    graphs: by stream, for launches of one graph wait for each other. replayed: the tick of CLOCK of the last run, or 0.
    """

    def __init__(self, kernels: list[Any], parts: list[bytes]) -> None:
        context = ctypes.c_void_p()
        libcuda().cuCtxGetCurrent(ctypes.byref(context))
        self.graphs, self.replayed, self.refused = {}, 0, ONE_BY_ONE
        self.run_replay, self.make_graph, self.driver = replayer()
        self.text, self.count = b"".join([struct.pack("P", context.value or 0), *parts]), len(parts)
        self.kernels = kernels  # the last to go, after graphs of them

    def run(self, stream: int, scale: float, tensors: Sequence[torch.Tensor]) -> int:
        """Launch them all for these tensors; what the driver says of the launch that fails, or 0."""
        before, self.replayed = self.replayed, next(CLOCK)
        graph = self.graphs.get(stream)
        made = graph and graph.made
        if graph and made:
            graph.replayed = self.replayed
        elif before and not self.refused:
            made = self.graph(stream, before)
        error = self.run_replay(self.driver, self.text, made, stream, scale, *[x.data_ptr() for x in tensors])
        if error < 0:  # all are launched, one by one
            self.refuse()
            return 0
        return error

    def graph(self, stream: int, before: int) -> Any:
        """The pass as a graph; None where there will be none now. `before` is the tick of the replay before this one.

        If there are as many as there may be, the least recently used one has to go, but only for a pass that comes back
        soon: who goes round and round more shapes than that would make all of them in vain.
        """
        if (len(GRAPHS) >= MANY_GRAPHS and self.replayed - before > SOON) or not MAKING.acquire(blocking=False):
            return None
        try:
            made = self.make_graph(self.driver, self.text, self.count, stream)
            if made is False:
                self.refuse()
            if not made:  # a stream that is captured needs none
                return None
            if len(GRAPHS) >= MANY_GRAPHS:
                oldest = min(GRAPHS, key=lambda graph: graph.replayed)
                oldest.made = None
                GRAPHS.discard(oldest)
            graph = Graph(made, self.replayed)
            GRAPHS.add(graph)
            self.graphs = {place: other for place, other in self.graphs.items() if other.made} | {stream: graph}
            return made
        finally:
            MAKING.release()

    def refuse(self) -> None:
        """No graph any more: the driver takes none of this pass."""
        self.refused, self.graphs = True, {}
        tell("CUDA refuses a graph of them")


def tile_of(at: Any, kernel: Any) -> tuple[str, int, dict[str, Any]]:
    """The name of a kernel, its programs and its tile shapes."""
    name = (kernel[0] if isinstance(kernel, tuple) else kernel).__name__
    return name, *at.grids[name]


def values_of(arguments: Sequence[Any]) -> list[Any]:
    """What Triton takes."""
    return [x.value if isinstance(x, Argument) else x for x in arguments]


def by_triton(at: Any, kernel: Any, *arguments: Any) -> None:
    """Launch a kernel with its grid and tile shapes, or the one of a pair that fits, as Triton does it."""
    _, programs, tile = tile_of(at, kernel)
    kernel, tile = variant(kernel, tile)
    kernel[(programs,)](*values_of(arguments), **tile, **OPTIONS)


def by_what_is_ready(at: Any, kernel: Any, *arguments: Any) -> None:
    """Launch what Triton made of a kernel at the first call, so that it need not look for it again."""
    name, programs, _ = tile_of(at, kernel)
    compiled, shapes = at.ready[name]
    if programs:
        compiled[programs, 1, 1](*values_of(arguments), *shapes)


class Capture:
    """Launches the kernels of a pass through Triton at the first call, and notes how: Triton needs to see no other.

    Others are those that Triton does not tell apart, the calls of one `LaunchPlan`. `why` says, in words, what went
    wrong in noting, which is no reason to stop.
    """

    def __init__(self, at: Any) -> None:
        self.at, self.kernels, self.parts, self.why, self.unknown = at, [], [], None, False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.why = self.why or said(error)

    def __call__(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel with its grid and tile shapes, or one of a pair; without programs, only compile it."""
        values = values_of(arguments)
        name, programs, tile = tile_of(self.at, kernel)
        chosen, taken = variant(kernel, tile)
        compiled = chosen[(programs,)](*values, **taken, **OPTIONS)
        if compiled is None:  # a stand-in, or somebody has told Triton not to compile
            self.unknown = True
            return
        with self.noting():
            warm_others(kernel, tile, programs, values, bool(self.at.given))
        with self.noting():
            self.at.ready[name] = compiled, [taken[parameter] for parameter in chosen.arg_names[len(values) :]]
        with self.noting():
            if programs:
                self.kernels.append(compiled)
                self.parts.append(captured(compiled, programs, arguments))

    def replay(self) -> Replay | None:
        """What was launched; None where that cannot be replayed."""
        if len(self.parts) < len(self.kernels):
            return None
        if isinstance(replayer(), str):
            self.why = self.why or replayer()
            return None
        with self.noting():
            return Replay(self.kernels, self.parts)


def warm_others(kernel: Any, tile: dict[str, Any], programs: int, values: list[Any], given: bool) -> None:
    """Compile the variants of a kernel that another length may need: nothing is compiled then.

    Along `given` lists no call is FULL; of many levels, other lengths may leave Gluon.
    """
    if "EVICT_FIRST" in tile:
        warm(kernel, tile | {"EVICT_FIRST": not tile["EVICT_FIRST"]}, programs, values)
    if "FULL" in tile and LISTS_FILL and not given:
        warm(kernel, tile | {"FULL": not tile["FULL"]}, programs, values)
    for gaps in ("GAPS", "PARTIAL"):
        if gaps in tile and given:
            warm(kernel, tile | {gaps: not tile[gaps]}, programs, values)
    if "RUNS" in tile and has_runs(MANY_CANDIDATES, tile):
        warm(kernel, tile | {"RUNS": not tile["RUNS"]}, programs, values)


def warm(kernel: Any, tile: dict[str, Any], programs: int, values: list[Any]) -> None:
    """Compile a kernel, or the one of a pair that fits, and do not launch it."""
    kernel, tile = variant(kernel, tile)
    kernel.warmup(*values, **tile, **OPTIONS, grid=(programs,))


MANY_CANDIDATES = 1024  # of the coarsest level: from so many on, `best_by_runs` is the faster


def has_runs(n_candidates: int, tile: dict[str, int]) -> bool:
    """Whether runs of candidates are ranked first: many, dealt to several warps, and at least two to a run."""
    return tile["SPLIT"] > 1 and tile["BLOCK_N"] >= 8 * tile["KEEP"] and n_candidates >= MANY_CANDIDATES


def is_watched() -> bool:
    """Whether Triton tells somebody of launches, a profiler say: by a chain of its own, or what was put there."""
    runtime, chain = triton.knobs.runtime, triton.knobs.HookChain
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook.calls if isinstance(hook, chain) else hook is not None:
            return True
    return False
