"""A step that is recorded once and replayed: the host launches one CUDA graph instead of some two thousand kernels.

The first steps run as they are: they compile, choose kernels and make the optimiser's state. Then one step is recorded,
which computes nothing, and every step from there on is a replay of it. A replay reads and writes the memory that the
recording did. So batches are copied into the recorded one, and what changes from step to step has to be a tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from settings import Settings
from torch import Tensor

WARM_UPS = 3
"""Steps before the recording. The first compiles; compiled attention replays its own launches from the third on."""


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, and the device that it computes on."""

    device: torch.device
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Batch:
    """Tokens that the network is given, and ought to say, [B, N, 3] each, and times [B]."""

    given: Tensor
    t: Tensor
    wanted: Tensor

    def clone(self) -> "Batch":
        """Another one in memory of its own."""
        return Batch(self.given.clone(), self.t.clone(), self.wanted.clone())

    def take(self, other: "Batch") -> None:
        """The numbers of another one of the same shape, into the memory of this one."""
        for mine, its in ((self.given, other.given), (self.t, other.t), (self.wanted, other.wanted)):
            if mine.shape != its.shape:
                raise ValueError(f"batch: expected {tuple(mine.shape)}, as recorded, got {tuple(its.shape)}")
            mine.copy_(its)


class Graph(Protocol):
    """What records work and replays it."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do work where it will be recorded."""
        ...

    def capture(self, work: Callable[[], None]) -> None:
        """Record work, without an effect on any number."""
        ...

    def replay(self) -> None:
        """Do what was recorded last."""
        ...


class CudaGraph:
    """Of a GPU: work goes to a stream of its own until it is recorded, as torch asks for."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def capture(self, work: Callable[[], None]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            work()

    def replay(self) -> None:
        self.graph.replay()


class Replayed:
    """A step that a graph takes: called with batches as the step itself.

    Args:
        step: what is recorded. It must begin without gradients, so that those of the recording belong to the graph.
        graph: what records it.
    """

    def __init__(self, step: Callable[[Iterable[Batch]], None], graph: Graph) -> None:
        self.step, self.graph = step, graph
        self.taken, self.inputs = 0, list[Batch]()

    def __call__(self, batches: Iterable[Batch]) -> None:
        given = list(batches)
        if self.taken < WARM_UPS:
            self.graph.warm_up(lambda: self.step(given))
            self.taken += 1
            return
        if not self.inputs:
            self.inputs = [batch.clone() for batch in given]
            self.graph.capture(lambda: self.step(self.inputs))
        for mine, its in zip(self.inputs, given, strict=True):
            mine.take(its)
        self.graph.replay()

    def forget(self) -> None:
        """Begin anew, with steps that run as they are: tensors of the recording have been replaced."""
        self.taken, self.inputs = 0, []


def graph_of(settings: Settings, process: Process) -> CudaGraph | None:
    """The graph that settings ask for; None for steps that run as they are.

    Raises:
        ValueError: where settings ask for one that cannot be had.
    """
    obstacles = {
        "without a GPU": process.device.type != "cuda",
        "for several processes": process.ranks > 1,  # gradients of DistributedDataParallel are reduced by hooks
        "with checkpointing": settings.checkpointing,  # it asks for the state of random numbers
    }
    found = [obstacle for obstacle, there in obstacles.items() if there]
    if found and settings.cuda_graph is True:
        raise ValueError(f"cuda_graph: expected auto or false {found[0]}, got true")
    return None if found or not settings.cuda_graph else CudaGraph(process.device)
