"""The host code on a GPU that is pretended: Triton compiles and launches as ever, but nothing runs.

Triton is given a driver that notes every launch, and so is the call of C that launches a whole pass from the second
call with the same shapes on: these tests hold both ways against each other.
"""

import ctypes
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from llsa_gen import compile

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a callback from C

ROOT = Path(__file__).resolve().parents[1]
TARGET = "cuda:90"
LOWEST_ADDRESS = 2**32
"""Of memory; other numbers that these tests hand to kernels are smaller."""


@dataclass
class Launched:
    """One launch as the driver gets it."""

    programs: int
    threads: int
    shared: int
    function: int
    name: str
    arguments: tuple[object, ...]
    """Parameters of the kernel: numbers and, by Triton, tensors or, by the tape, addresses."""
    stream: int
    by: Literal["triton", "launch", "graph"]

    def told_apart(self, places: "Places") -> tuple[object, ...]:
        """All of it, with places for tensors and for addresses: equal for equal inputs."""
        return self.programs, self.threads, self.shared, self.function, tuple(map(places.of, self.arguments))


class Places:
    """Where arguments point to: which memory, counted in the order of appearance, and how many bytes from its start."""

    def __init__(self, held: list[Tensor]) -> None:
        storages = [x.untyped_storage() for x in held]  # all alive, so that no two are in the same place
        self._sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self._seen: dict[int, int] = {}

    def of(self, argument: object) -> object:
        """The place of a tensor or an address; any other argument as it is."""
        if isinstance(argument, Tensor):
            argument = argument.untyped_storage().data_ptr() + argument.storage_offset() * argument.itemsize
        if not isinstance(argument, int) or argument < LOWEST_ADDRESS:
            return argument
        begin = next(begin for begin, size in self._sizes.items() if begin <= argument <= begin + size)
        return "place", self._seen.setdefault(begin, len(self._seen)), argument - begin


class Kernel(NamedTuple):
    """What the driver knows of a kernel that is loaded."""

    name: str
    kinds: tuple[str, ...]
    """Of its parameters, by Triton's names."""


SIZES = {"i32": 4, "i64": 8, "fp32": 4}
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


class Node(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 3),
    )


Address, Number = ctypes.c_void_p, ctypes.c_uint


class PretendedGpu:
    """What Triton and the host code ask of a driver: one H100, on which all binaries load and all launches succeed."""

    def __init__(self) -> None:
        self.log: list[Launched] = []
        self.loaded: list[str] = []
        self.kernels: dict[int, Kernel] = {}
        self.stream = 0
        self.scratch: tuple[str, ...] = ("*i8", "*i8")
        """What kernels have after their own parameters."""
        self.error = 0
        """What the driver says of a launch."""
        self.capturing = False
        self.graphs: dict[int, list[Launched]] = {}
        """Nodes by graph; a graph is its own instance, and node i the number i + 1."""
        self.nodes: set[int] = set()
        """Graphs that are not destroyed; their instances may be."""
        self.refuses_graphs, self.refuses_nodes = False, False
        self.context = threading.local()
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 232_448}
        )
        for name, method, *kinds in (
            ("cuLaunchKernel", self._play, Address, *[Number] * 7, Address, Address, Address),
            ("cuStreamIsCapturing", self._is_capturing, Address, ctypes.POINTER(ctypes.c_int)),
            ("cuThreadExchangeStreamCaptureMode", self._exchange, ctypes.POINTER(ctypes.c_int)),
            ("cuGraphCreate", self._create, ctypes.POINTER(Address), Number),
            ("cuGraphDestroy", self._destroy_nodes, Address),
            (
                "cuGraphAddKernelNode_v2",
                self._add,
                ctypes.POINTER(Address),
                Address,
                Address,
                ctypes.c_size_t,
                ctypes.POINTER(Node),
            ),
            ("cuGraphInstantiateWithFlags", self._instantiate, ctypes.POINTER(Address), Address, ctypes.c_ulonglong),
            ("cuGraphExecDestroy", self._destroy, Address),
            ("cuGraphExecKernelNodeSetParams_v2", self._set, Address, Address, ctypes.POINTER(Node)),
            ("cuGraphLaunch", self._launch_graph, Address, Address),
            ("cuCtxGetCurrent", self._get_context, ctypes.POINTER(Address)),
            ("cuCtxSetCurrent", self._set_context, Address),
        ):
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(method))  # held here, for C does not

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, int, int, int, int]:
        self.loaded.append(name)
        return name, len(self.loaded), 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = tuple(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            _metadata, for_hooks, enter, leave, *arguments = rest
            assert (y, z) == (1, 1)
            for hook in (enter, leave):  # as Triton's own launchers do
                if hook is not None:
                    hook(for_hooks)
            given = [(kind, value) for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
            self.kernels[function] = Kernel(metadata.name, tuple(kind for kind, _ in given))
            threads, values = 32 * metadata.num_warps, tuple(rounded(*one) for one in given)
            self.log.append(Launched(x, threads, metadata.shared, function, metadata.name, values, stream, "triton"))

        return launch

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:  # noqa: N802
        kinds = (*self.kernels[function.value].kinds, *self.scratch)
        if index.value >= len(kinds):
            return 1
        size._obj.value = SIZES.get(kinds[index.value], 8)
        return 0

    def cuGetErrorString(self, error: int, text: Any) -> None:  # noqa: N802
        text._obj.value = b"out of luck"

    def _read(self, function: int, programs: int, threads: int, shared: int, parameters: int) -> Launched:
        name, kinds = self.kernels[function]
        given = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        values: list[object] = []
        for i, kind in enumerate((*kinds, *self.scratch)):
            values += struct.unpack(FORMATS.get(kind, "Q"), ctypes.string_at(given[i] or 0, SIZES.get(kind, 8)))
        assert values[len(kinds) :] == [0] * len(self.scratch)
        return Launched(programs, threads, shared, function, name, tuple(values[: len(kinds)]), 0, "launch")

    def _play(self, function: int, x: int, y: int, z: int, threads: int, *rest: int) -> int:
        *one, shared, stream, parameters, extra = rest
        if self._now() != 77:
            return 201
        assert (y, z, one, extra) == (1, 1, [1, 1], None)
        self.log.append(replace(self._read(function, x, threads, shared, parameters), stream=stream or 0))
        return self.error

    def _get_context(self, context: Any) -> int:
        context[0] = self._now()
        return 0

    def _now(self) -> int:
        """The context of this thread: 77, or 0 where nothing has set it."""
        return 77 if threading.current_thread() is threading.main_thread() else getattr(self.context, "now", 0)

    def _set_context(self, context: int) -> int:
        self.context.now = context
        return 0

    def _is_capturing(self, stream: int, status: Any) -> int:
        if self._now() != 77:
            return 201
        status[0] = self.capturing
        return 0

    def _exchange(self, mode: Any) -> int:
        self.mode, mode[0] = mode[0], self.mode
        return 0

    mode = 1
    """Of capturing, of this thread: 0 is global, 2 relaxed."""

    def _create(self, graph: Any, flags: int) -> int:
        assert (flags, self.mode) == (0, 2)
        graph[0] = len(self.graphs) + 1
        self.graphs[len(self.graphs) + 1] = []
        self.nodes.add(len(self.graphs))
        return 0

    def _add(self, node: Any, graph: int, after: int, count: int, made: Any) -> int:
        nodes = self.graphs[graph]
        before = list(ctypes.cast(after, ctypes.POINTER(ctypes.c_void_p))[:count])
        assert before == ([len(nodes)] if nodes else []), "one after the other"
        nodes.append(self._node(made.contents))
        node[0] = len(nodes)
        return 0

    def _node(self, node: Node) -> Launched:
        assert list(node.grid[1:]) == list(node.block[1:]) == [1, 1] and not any(node.others)
        return self._read(node.kernel or 0, node.grid[0], node.block[0], node.shared, node.parameters or 0)

    def _instantiate(self, exec_: Any, graph: int, flags: int) -> int:
        assert (flags, self.mode) == (0, 2)
        exec_[0] = graph
        return int(self.refuses_graphs)

    def _destroy(self, exec_: int) -> int:
        assert self.mode == 2
        self.graphs[exec_] = []
        return 0

    def _destroy_nodes(self, graph: int) -> int:
        assert self.mode == 2
        self.nodes.remove(graph)
        return 0

    def _set(self, exec_: int, node: int, made: Any) -> int:
        if self.refuses_nodes and node == 2:
            return 1
        assert exec_ in self.nodes, "or the driver does not know the node"
        self.graphs[exec_][node - 1] = self._node(made.contents)
        return 0

    def _launch_graph(self, exec_: int, stream: int) -> int:
        self.log += [replace(node, stream=stream or 0, by="graph") for node in self.graphs[exec_]]
        return self.error

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def rounded(kind: str, value: object) -> object:
    """An argument as the kernel sees it."""
    return struct.unpack("f", struct.pack("f", value))[0] if kind == "fp32" else value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    pretended = PretendedGpu()
    monkeypatch.setattr(driver, "_active", pretended)  # reset_active() would look for a real one
    return pretended


@pytest.fixture
def load(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], ModuleType]]:
    """Compiles a spec to a module that knows the pretended GPU and no other."""
    made = []

    def load(spec: Any) -> ModuleType:
        module = compile(spec).module
        made.append(module)
        monkeypatch.setattr(module, "target_of", lambda device: TARGET)
        monkeypatch.setattr(module, "libcuda", lambda: gpu)
        forget(module)
        return module

    yield load
    for module in made:
        forget(module)


def forget(module: ModuleType) -> None:
    """What was made for a GPU that is gone."""
    module.prepared.cache_clear()
    module.player.cache_clear()
    module.GRAPHS.clear()
    for value in vars(module).values():
        if hasattr(value, "device_caches"):
            value.device_caches.clear()


@pytest.fixture
def module(load: Callable[[Any], ModuleType]) -> ModuleType:
    return load(ROOT / "spec" / "llsa_l2.yaml")


def draw(n: int, batch: int = 1, heads: int = 2, offset: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of o, bfloat16 [batch, heads, n, 64]; q begins `offset` elements into its memory."""
    made = [torch.zeros(batch * heads * n * 64 + 64, dtype=torch.bfloat16) for _ in range(4)]
    at = [offset, 0, 0, 0]
    return [x[i : i + batch * heads * n * 64].view(batch, heads, n, 64) for x, i in zip(made, at, strict=True)]


def step(module: ModuleType, tensors: list[Tensor]) -> None:
    """Forward and backward, as a GPU does them."""
    q, k, v, grad_o = tensors
    o, _, saved = module.attend_kernels(q, k, v, 0.125)
    module.grad_kernels(grad_o, None, q, k, v, o, saved, 0.125)


def attend(module: ModuleType, tensors: list[Tensor]) -> None:
    """The forward pass alone."""
    o, lse, _ = module.attend_kernels(*tensors[:3], 0.125)
    assert (o.shape, lse.shape) == (tensors[0].shape, (o.shape[0] * o.shape[1], o.shape[2]))


def select(module: ModuleType, tensors: list[Tensor]) -> None:
    """The selection alone."""
    batch, heads, n, _ = tensors[0].shape
    kept = module.select_kernels(*tensors[:2])
    assert [x.shape for x in kept] == [(batch * heads, rows, min(8, rows)) for rows in (-(-n // 16), -(-n // 256))]


def launches(
    gpu: PretendedGpu, module: ModuleType, tensors: list[Tensor], run: Callable[..., None] = step
) -> list[tuple[object, ...]]:
    gpu.log.clear()
    held: list[Tensor] = []
    run_pass = module.Prepared.run

    def hold(at: Any, launches: Any, pass_tensors: Any, *scale: float) -> None:
        held.extend(pass_tensors)
        run_pass(at, launches, pass_tensors, *scale)

    with patch.object(module.Prepared, "run", hold):
        run(module, tensors)
    places = Places(held)
    return [launch.told_apart(places) for launch in gpu.log if launch.programs]


@pytest.mark.parametrize("run", [step, attend, select])
def test_the_second_call_launches_what_triton_launched_in_the_first(
    gpu: PretendedGpu, module: ModuleType, run: Callable[..., None]
) -> None:
    tensors = draw(4096)
    first = launches(gpu, module, tensors, run)
    assert len(gpu.log) == len(first) == (15 if run is step else 5 if run is attend else 3)
    assert {x.data_ptr() for x in tensors[: 2 if run is select else 3]} <= {
        x.data_ptr() for launch in gpu.log for x in launch.arguments if isinstance(x, Tensor)
    }
    assert {launch.by for launch in gpu.log} == {"triton"}
    for again in (tensors, draw(4096)):  # other tensors of the same shapes, too
        assert launches(gpu, module, again, run) == first
        assert {launch.by for launch in gpu.log} == {"graph"}


def test_a_launch_without_programs_is_only_compiled(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(1024), step)
    assert len(gpu.log) == 15 and len(first) == 14, "no list is long enough to be cut"


def test_the_order_of_calls_does_not_matter(gpu: PretendedGpu, module: ModuleType) -> None:
    tensors = draw(4096)
    runs = step, attend, select
    wanted = {}
    for run in runs:
        module.prepared.cache_clear()
        wanted[run] = launches(gpu, module, tensors, run)
    for order in permutations(runs):
        module.prepared.cache_clear()
        for run in (*order, *order):
            assert launches(gpu, module, tensors, run) == wanted[run], order
    assert len(gpu.loaded) == 15, "nothing is compiled for the second of them"


def test_tensors_that_were_one_in_the_first_call_are_told_apart(gpu: PretendedGpu, module: ModuleType) -> None:
    q, k, v, grad_o = draw(4096)
    step(module, [q, q, q, q])
    found = launches(gpu, module, [q, k, v, grad_o])
    assert {launch.by for launch in gpu.log} == {"graph"}
    module.prepared.cache_clear()
    assert launches(gpu, module, [q, k, v, grad_o]) == found


def test_the_scale_is_that_of_the_call(gpu: PretendedGpu, module: ModuleType) -> None:
    q, k, v, grad_o = draw(4096)
    for scale in (0.125, -3.0, 1e-30, 0.1):
        gpu.log.clear()
        o, _, saved = module.attend_kernels(q, k, v, scale)
        module.grad_kernels(grad_o, None, q, k, v, o, saved, scale)
        floats = [x for launch in gpu.log for x in launch.arguments if isinstance(x, float)]
        assert floats == [rounded("fp32", scale)] * 7


def no_driver(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(module, "libcuda", missing)


def driver_of_cuda_12_3(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name: getattr(gpu, name) for name in module.DRIVER}
    monkeypatch.setattr(module, "libcuda", lambda: SimpleNamespace(**functions))


def driver_of_cuda_11(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name: getattr(gpu, name) for name in module.DRIVER if not name.endswith("_v2")}
    known = SimpleNamespace(**functions, cuFuncGetParamInfo=gpu.cuFuncGetParamInfo)
    monkeypatch.setattr(module, "libcuda", lambda: known)


def unknown_parameters(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.scratch = ("*i8", "*i8", "i32")


def no_compiler(gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(module.triton.runtime.build, "compile_module_from_src", build)


@pytest.mark.parametrize(
    "without", [no_driver, driver_of_cuda_12_3, driver_of_cuda_11, unknown_parameters, no_compiler]
)
def test_what_cannot_be_played_goes_through_triton_and_one_warning_says_why(
    gpu: PretendedGpu, module: ModuleType, without: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(gpu, module, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"llsa_l2.*takes longer: .") as told:
        first = launches(gpu, module, draw(4096))
    assert len(told) == (1 if without is not unknown_parameters else 15), "or one a kernel"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launches(gpu, module, draw(4096)) == first
        with patch.object(module.Recorder, "first", side_effect=AssertionError("Triton looks for a kernel again")):
            step(module, draw(4096))
    assert {launch.by for launch in gpu.log} == {"triton"}


@pytest.mark.parametrize("graphs", [True, False])
def test_a_launch_that_fails_is_an_error(gpu: PretendedGpu, module: ModuleType, graphs: bool) -> None:
    step(module, draw(4096))
    gpu.log.clear()
    gpu.error, gpu.refuses_graphs = 700, not graphs
    with pytest.raises(RuntimeError, match="CUDA error 700 at a launch: out of luck"):
        step(module, draw(4096))
    assert len(gpu.log) == (5 if graphs else 1), "and the last"


def test_without_graphs_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    gpu.refuses_graphs = True
    first = launches(gpu, module, draw(4096))
    for _ in range(2):
        assert launches(gpu, module, draw(4096)) == first
        assert {launch.by for launch in gpu.log} == {"launch"}
    assert len(gpu.graphs) == 2 and not gpu.nodes, "asked once a pass"
    assert gpu.mode == 1


def test_while_a_stream_is_captured_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(4096))
    for capturing in (True, False, True):  # from the second call on
        gpu.capturing = capturing
        assert launches(gpu, module, draw(4096)) == first
        assert {launch.by for launch in gpu.log} == {"launch" if capturing else "graph"}
        assert len(gpu.graphs) == (0 if capturing and not gpu.graphs else 2)


def test_each_stream_has_graphs_of_its_own_and_few_are_kept(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY_GRAPHS", 6)
    step(module, draw(4096))
    for gpu.stream in (0, 7, 9, 0, 7, 9):
        gpu.log.clear()
        step(module, draw(4096))
        assert {(launch.stream, launch.by) for launch in gpu.log} == {(gpu.stream, "graph")}
    assert sum(map(bool, gpu.graphs.values())) == len(gpu.graphs) == len(gpu.nodes) == 6
    for gpu.stream in (5, 7, 9):  # instead of those of stream 0, which are the oldest
        step(module, draw(4096))
    assert len(gpu.graphs) == 8 and len(gpu.nodes) == len(module.GRAPHS) == 6
    gpu.capturing = True
    for gpu.stream in range(20, 40):
        step(module, draw(4096))
    assert len(gpu.graphs) == 8 and len(gpu.nodes) == 6, "what is captured costs none its place"
    forget(module)
    assert not any(gpu.graphs.values()) and not gpu.nodes


def test_where_nodes_cannot_be_set_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(4096))
    gpu.refuses_nodes = True
    assert launches(gpu, module, draw(4096)) == first
    assert {launch.by for launch in gpu.log} == {"launch"}


def test_who_waits_for_each_launch_gets_them_one_by_one(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONE_BY_ONE", True)  # CUDA_LAUNCH_BLOCKING=1
    first = launches(gpu, module, draw(4096))
    assert launches(gpu, module, draw(4096)) == first
    assert {launch.by for launch in gpu.log} == {"launch"}


@pytest.mark.parametrize("graphs", [True, False])
def test_a_thread_that_has_done_nothing_on_the_gpu(gpu: PretendedGpu, module: ModuleType, graphs: bool) -> None:
    # has no context until something makes one current, as Triton does
    gpu.refuses_graphs = not graphs
    first = launches(gpu, module, draw(4096))
    for made in (False, True):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(launches, gpu, module, draw(4096)).result() == first, made
        assert {launch.by for launch in gpu.log} == {"graph" if graphs else "launch"}


def test_play_says_what_it_expects(gpu: PretendedGpu, module: ModuleType) -> None:
    compiled, driver = module.player()
    for wrong in (
        (),
        (driver, b"", None, 0),
        (driver, "", None, 0, 1.0),
        (None, b"", None, 0, 1.0),
        (driver, b"", None, 0, "1"),
        (driver, b"", None, 0, 1.0, -1),
        (driver, b"", None, 0, 1.0, *range(module.BASES - 1)),
    ):
        with pytest.raises((TypeError, OverflowError)):
            compiled.play(*wrong)
    assert compiled.play(driver, b"", None, 0, 1.0, *range(module.BASES - 2)) == 0 and not gpu.log


def test_hooks_are_told_of_every_launch(gpu: PretendedGpu, module: ModuleType) -> None:
    told: list[tuple[str, str]] = []

    def enter(metadata: Any) -> None:
        told.append(("enter", metadata.get()["name"]))

    def leave(metadata: Any) -> None:
        told.append(("leave", metadata.get()["name"]))

    tensors = draw(4096)
    for listening in (False, True, False):  # a profiler may come and go
        told.clear()
        gpu.log.clear()
        if listening:
            knobs.runtime.launch_enter_hook.add(enter)
            knobs.runtime.launch_exit_hook.add(leave)
        try:
            step(module, tensors)
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
            knobs.runtime.launch_exit_hook.remove(leave)
        assert told == [(when, launch.name) for launch in gpu.log for when in ("enter", "leave") if listening]


def test_a_hook_may_take_the_place_of_triton_s_own_list(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder(list[str]):  # false while it is empty
        def __call__(self, metadata: Any) -> None:
            self.append(metadata.get()["name"])

    step(module, draw(4096))
    recorder = Recorder()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", recorder)
    gpu.log.clear()
    step(module, draw(4096))
    assert recorder == [launch.name for launch in gpu.log]


def test_launches_go_to_the_stream_that_is_current_at_the_call(gpu: PretendedGpu, module: ModuleType) -> None:
    tensors = draw(4096)
    for stream in (0, 7, 8, 7):
        gpu.stream = stream
        gpu.log.clear()
        step(module, tensors)
        assert {launch.stream for launch in gpu.log} == {stream}


def test_calls_do_not_get_in_each_others_way(gpu: PretendedGpu, module: ModuleType) -> None:
    # lengths with and without remainders, other heads, a q that does not begin at a multiple of 16 bytes, strides
    calls = {
        "plain": draw(4096),
        "one more": draw(4097),
        "short": draw(5),
        "heads": draw(4096, batch=2, heads=1),
        "offset": draw(4096, offset=1),
        "transposed": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(4096)],
        "late values": draw(131_072),
    }
    alone = {}
    for name, tensors in calls.items():
        module.prepared.cache_clear()
        alone[name] = launches(gpu, module, tensors)
    assert len({str(found) for found in alone.values()}) == len(calls)
    module.prepared.cache_clear()
    for _ in range(3):
        for name, tensors in calls.items():
            assert launches(gpu, module, tensors) == alone[name], name


def test_another_length_compiles_nothing(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(module, draw(4096))
    assert len(gpu.loaded) == 15

    def compiled(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    # those that do not fill their coarsest tokens need other kernels, as do 512 and 1,536, whose lists fill no 64 rows
    # and 1,024 tokens of the coarsest level, of which runs are ranked first; 100,003 no cache holds
    for n in (4097, 8191, 65_536, 100_003, 512, 1536, 200, 9, 262_144):  # of 200 and 9 tokens, lists have one
        step(module, draw(n, heads=1))
    other = ["attend_hopper_kernel", "grad_q_hopper_kernel", "pool_l1_kernel", "select_l2_kernel"]
    assert sorted(gpu.loaded[15:]) == other


def test_another_length_compiles_nothing_in_triton(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tensors that do not begin at multiples of 16 bytes: kernels in Triton, with masks and without
    step(module, draw(4096, offset=1))
    loaded = list(gpu.loaded)

    def compiled(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    for n in (4097, 65_536, 512, 1536, 200):
        step(module, draw(n, heads=1, offset=1))
    assert sorted(gpu.loaded[len(loaded) :]) == ["attend_kernel", "grad_q_kernel"]


def test_lists_of_another_width_compile_nothing(gpu: PretendedGpu, load: Callable[[Any], ModuleType]) -> None:
    # of 16, 12, 2 and 1 tokens: Triton would make a kernel of its own for the first and the last
    wide = load({"name": "wide", "head_dim": 64, "levels": [{"block": 16, "topk": 16}] * 2})
    for n in (4095, 4096):
        step(wide, draw(n))
    loaded = list(gpu.loaded)
    for n in (3071, 3072, 300, 100):
        step(wide, draw(n))
    assert gpu.loaded == loaded


def test_a_first_call_may_be_interrupted_anywhere(gpu: PretendedGpu, module: ModuleType) -> None:
    class Interrupted:
        arg_names = ()

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            raise KeyboardInterrupt

        def warmup(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    tensors = draw(4096)
    wanted = launches(gpu, module, tensors)
    names = [name for name in vars(module) if name.endswith("_kernel")]
    assert "attend_hopper_again_kernel" in names
    for name in names:
        module.prepared.cache_clear()
        with patch.object(module, name, Interrupted(name)), suppress(KeyboardInterrupt):
            step(module, tensors)
        assert launches(gpu, module, tensors) == launches(gpu, module, tensors) == wanted, name


def test_a_length_that_moves_where_heads_begin_compiles_nothing(
    gpu: PretendedGpu, load: Callable[[Any], ModuleType]
) -> None:
    # D = 72: heads of an even length begin at multiples of 16 elements, and of an odd length at multiples of 8
    dit = load({"name": "dit", "head_dim": 72, "levels": [{"block": 16, "topk": 8}]})
    step(dit, [torch.zeros(1, 2, 512, 72, dtype=torch.bfloat16) for _ in range(4)])
    loaded = list(gpu.loaded)
    for n in (513, 528, 77):
        step(dit, [torch.zeros(1, 2, n, 72, dtype=torch.bfloat16) for _ in range(4)])
    assert sorted(gpu.loaded[len(loaded) :]) == ["attend_kernel", "grad_q_kernel"], "but the variants for loose ends"


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((7, 5), 80), ((8, 0), 80), ((8, 9), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_a_gpu_takes_its_own_schedule_or_the_nearest_older_one(
    capability: tuple[int, int], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target_of = compile(ROOT / "spec" / "topk_l1.yaml").module.target_of.__wrapped__  # without what it remembers
    assert target_of(torch.device("cuda")) == f"cuda:{wanted}"


@pytest.mark.parametrize(("head_dim", "unit"), [(64, 8), (72, 8), (12, 4), (9, 1)])
def test_rows_that_begin_anywhere_are_copied(head_dim: int, unit: int) -> None:
    aligned = compile({"name": "rows", "head_dim": head_dim, "levels": [{"block": 4, "topk": 1}]}).module.aligned
    for rest in range(17):
        x = torch.randn(2, 3, 5, head_dim + rest)[..., :head_dim]
        same = aligned(x)
        assert torch.equal(same, x) and same.stride(3) == 1
        assert all(step % unit == 0 for step in same.stride()[:3])
        assert (same.data_ptr() == x.data_ptr()) == (x.stride(2) % unit == 0), "no copy without need"
    for shape in ((1, 1, 1), (2, 3, 1), (1, 3, 5), (2, 1, 5)):  # contiguous for torch, whatever the stride
        one = aligned(torch.randn(*shape, head_dim + 17)[..., :head_dim])
        assert all(step % unit == 0 for step in one.stride()[:3]), shape
    assert aligned(x.mT.contiguous().mT).is_contiguous()
    heads = x[:, :1].expand(2, 3, 5, head_dim)
    assert aligned(heads).stride(1) == (0 if x.stride(2) % unit == 0 else 5 * head_dim)


@pytest.mark.parametrize("n", [1, 300, 4096, 65_537])
@pytest.mark.parametrize("layout", ["selection", "saved", "gradients"])
def test_buffers_have_their_own_part_of_their_memory(
    gpu: PretendedGpu, module: ModuleType, layout: str, n: int
) -> None:
    q = torch.empty(1, 2, n, 64, dtype=torch.bfloat16)
    at, *_ = module.prepare((q, q, q))
    memory = at.memory(layout)
    arguments = at.buffers(module.Argument(memory, 5), layout)
    tensors = [argument.value for argument in arguments]
    begins = [x.data_ptr() - memory.data_ptr() for x in tensors if x.numel()]
    ends = [begin + x.nbytes for begin, x in zip(begins, (x for x in tensors if x.numel()), strict=True)]
    assert all(begin % 256 == 0 for begin in begins), "as torch's own allocations"
    assert all(end <= begin for end, begin in zip(ends, [*begins[1:], memory.nbytes], strict=True))
    assert [tuple(x.shape) for x in tensors] == [at.shapes[name] for name in module.LAYOUTS[layout]]
    own = {"input": torch.bfloat16, "share": torch.bfloat16}
    assert [x.dtype for x in tensors] == [own.get(kind, kind) for kind in module.LAYOUTS[layout].values()]
    assert {argument.base for argument in arguments} == {5}
    assert [argument.offset for argument, x in zip(arguments, tensors, strict=True) if x.numel()] == begins


def test_what_was_saved_may_be_kept_anywhere(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hooks of autograd's may have moved it, into one piece with other tensors, say.
    monkeypatch.setattr(module, "runs_kernels", lambda x: True)
    q, k, v, grad_o = draw(4096)
    o, _, saved = module.attend_kernels(q, k, v, 0.125)
    elsewhere = torch.zeros(saved.numel() + 1, dtype=torch.uint8)[1:]
    scattered = torch.zeros(saved.numel(), 2, dtype=torch.uint8)[:, 0]
    for memory in (saved, elsewhere, scattered, saved):
        gpu.log.clear()
        module.backward(grad_o, q, k, v, o, memory, 0.125)
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for one in gpu.log for x in one.arguments]
        addresses = [x for x in addresses if isinstance(x, int) and x >= LOWEST_ADDRESS]
        assert addresses and all(x % 16 == 0 for x in addresses)
        apart = range(scattered.data_ptr(), scattered.data_ptr() + 2 * scattered.numel())
        assert not any(x in apart for x in addresses)
    moved = [torch.zeros(o.numel() + 1, dtype=o.dtype)[1:].view(o.shape), o.mT.contiguous().mT]
    for one in moved:
        held = range(one.data_ptr(), one.data_ptr() + one.nbytes)
        gpu.log.clear()
        module.backward(grad_o, q, k, v, one, saved, 0.125)
        assert gpu.log and not any(x in held for launch in gpu.log for x in launch.arguments if isinstance(x, int))
    assert len(gpu.loaded) == 15, "nothing is compiled for it"


def calls_of(run: Callable[[], None]) -> int:
    """Calls of functions instead of microseconds, which differ from run to run."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_from_the_second_call_on_little_python_runs(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(4096)
    step(module, tensors)
    for name in module.DRIVER:
        monkeypatch.setattr(gpu, name, ctypes.CDLL(None).sched_yield)  # does nothing, and in C, where ours are Python
    module.player.cache_clear()
    step(module, tensors)
    found = calls_of(lambda: step(module, tensors))
    assert found < 90, found
