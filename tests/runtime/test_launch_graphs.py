"""CUDA graphs of passes: made late, few, the least recently used first to go, and never a reason to wait."""

import gc
import os
import random
import signal
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from pretended_gpu import ROOT, PretendedGpu, attend, draw, drop_kernels, knowing, pretended, step
from triton.runtime import JITFunction

from llsa_gen import compile

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a callback from C

SHAPES = 600


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended() as made:
        yield made


@pytest.fixture
def module(gpu: PretendedGpu) -> Iterator[ModuleType]:
    with knowing(gpu, compile(ROOT / "spec" / "llsa_l2.yaml").module) as made:
        yield made


def replays_of(module: ModuleType, tensors: list[Any]) -> list[Any]:
    q, k, v, grad_o = tensors
    return [
        replay for each in ((q, k, v), (q, k, v, grad_o)) for replay in module.plan_launches(each)[0].replays.values()
    ]


def test_a_tape_keeps_its_kernels_and_goes_before_them(gpu: PretendedGpu, module: ModuleType) -> None:
    tensors = draw(4096)
    for _ in range(3):
        step(module, tensors)
    replays = replays_of(module, tensors)
    kernels = weakref.WeakSet(kernel for replay in replays for kernel in replay.kernels)
    assert len(kernels) == 15 and {launch.by for launch in gpu.log} >= {"graph"}
    for forget_shapes in (False, True):
        if forget_shapes:
            module.launch_plan.cache_clear()
        module.parameters_of.cache_clear()
        drop_kernels(module)
        assert len(kernels) == 15 and not gpu.unloaded
        gpu.log.clear()
        for replay, count in zip(replays, (9, 10), strict=True):
            assert replay.run(0, 1.0, [draw(4096)[0]] * count) == 0
        assert len(gpu.log) == 15 and {launch.by for launch in gpu.log} == {"graph"}
    replays.clear()
    del replay
    gc.collect()
    assert not kernels and not gpu.nodes and not module.GRAPHS
    assert len(gpu.unloaded) in (0, 15), "where Triton unloads them"


def rounds(gpu: PretendedGpu, module: ModuleType, order: list[int], tensors: dict[int, Any]) -> None:
    for n in order:
        step(module, tensors[n])
        gpu.log.clear()
        assert len(gpu.nodes) <= module.MANY_GRAPHS


@pytest.mark.slow
def test_a_loader_of_many_resolutions(gpu: PretendedGpu, module: ModuleType) -> None:
    # passes of 600 shapes are 1,200; what a graph costs to make is a hundred times what it saves
    tensors = {n: draw(n, heads=1) for n in range(500, 500 + SHAPES)}
    order = list(tensors)
    rounds(gpu, module, order, tensors)
    assert gpu.calls["cuFuncGetParamInfo"] < 50 * len(gpu.loaded), "asked once a kernel, not once a shape"
    with patch.object(JITFunction, "run", side_effect=AssertionError("Triton looks for a kernel again")):
        rounds(gpu, module, order, tensors)
        assert gpu.calls["cuGraphCreate"] == 0, "not at the second call of a shape"
        tracemalloc.start()
        rounds(gpu, module, order, tensors)
        own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, str(module.__file__))])
        tracemalloc.stop()
        assert sum(one.size for one in own.statistics("filename")) < 1000 * module.MANY_GRAPHS
        assert gpu.calls["cuGraphCreate"] == module.MANY_GRAPHS == 512
        rounds(gpu, module, order, tensors)
        assert gpu.calls["cuGraphCreate"] == 512, "nobody's place is taken in vain"
        before = gpu.calls["cuLaunchKernel"]
        rounds(gpu, module, order[:250], tensors)
        assert gpu.calls["cuLaunchKernel"] == before, "those that have graphs keep them"
        shuffled = random.Random(1).sample(order, len(order))
        rounds(gpu, module, shuffled, tensors)
        assert gpu.calls["cuGraphCreate"] < 512 + 0.1 * 2 * SHAPES
    module.launch_plan.cache_clear()
    assert not gpu.nodes


def test_the_least_recently_used_graph_goes(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY_GRAPHS", 3)
    tensors = {n: draw(n, heads=1) for n in (64, 80, 96, 112)}

    def by(n: int) -> str:
        gpu.log.clear()
        attend(module, tensors[n])
        (found,) = {launch.by for launch in gpu.log}
        return found

    for n in (64, 80, 96):
        assert [by(n) for _ in range(4)] == ["triton", "launch", "graph", "graph"]
    assert by(64) == "graph"
    assert [by(112) for _ in range(3)] == ["triton", "launch", "graph"]
    made = gpu.calls["cuGraphCreate"]
    assert [by(64), by(96), by(112)] == ["graph"] * 3 and gpu.calls["cuGraphCreate"] == made
    assert by(80) == "graph" and gpu.calls["cuGraphCreate"] == made + 1, "soon enough to get it back"
    monkeypatch.setattr(module, "SOON", 1)
    assert by(64) == "launch" and gpu.calls["cuGraphCreate"] == made + 1, "too late"
    assert by(64) == "graph"


def test_threads_share_few_graphs(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY_GRAPHS", 3)
    streams: dict[int, int] = {}
    monkeypatch.setattr(gpu, "get_current_stream", lambda device: streams[threading.get_ident()])
    tensors = [draw(n, heads=1) for n in (64, 80)]
    most = 0

    def work(thread: int) -> None:
        nonlocal most
        streams[threading.get_ident()] = thread // 2  # two threads a stream
        for call in range(40):
            attend(module, tensors[call // 4 % 2])
            most = max(most, len(gpu.nodes))

    streams[threading.get_ident()] = 0
    for one in tensors:
        attend(module, one)
    names = [launch.name for launch in gpu.log]
    gpu.log.clear()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(gpu.log) == 4 * 40 * 5 and {launch.name for launch in gpu.log} == set(names)
    assert {launch.by for launch in gpu.log} == {"launch", "graph"}
    assert most <= 3 + 4, "each thread makes one before another goes, or replays one that has gone"
    assert len(module.GRAPHS) <= 3 and not module.PLAIN and not module.TOLD


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_waits_for_no_thread_of_its_parent(gpu: PretendedGpu, module: ModuleType) -> None:
    tensors, others = draw(64), draw(80)
    for _ in range(3):
        step(module, tensors)
    step(module, others)
    busy, go = threading.Barrier(3), threading.Event()

    def hold() -> None:
        busy.wait()
        go.wait()

    def make() -> None:
        with module.MAKING:
            hold()

    gpu.before_graph = hold
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(attend, module, tensors), pool.submit(make)]
        busy.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends who waits
            try:
                gpu.log.clear()
                gpu.calls.clear()
                attend(module, tensors)
                for _ in range(3):
                    step(module, others)
                by = {launch.by for launch in gpu.log}
                module.launch_plan.cache_clear()
                destroyed = gpu.calls["cuGraphExecDestroy"] + gpu.calls["cuGraphDestroy"]
                # the frame of the thread that is gone has one still
                os._exit(0 if by == {"launch"} and not destroyed and len(module.GRAPHS) <= 1 else 1)
            finally:
                os._exit(2)
        go.set()
        for one in pending:
            one.result()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
