"""A GPU that is pretended: Triton compiles and launches as ever, but nothing runs.

Triton is given a driver that notes every launch, and so is the call of C that launches a whole pass from the second
call with the same shapes on: tests hold both ways against each other.
"""

import ctypes
import gc
import itertools
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

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
    """Parameters of the kernel: numbers and, by Triton, tensors or, by the replay, addresses."""
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
        self.unloaded: list[int] = []
        """Modules of kernels that were launched; their number is that of their function."""
        self.graphs: dict[int, list[Launched]] = {}
        """Nodes by graph; a graph is its own instance, and node i the number i + 1."""
        self.nodes: set[int] = set()
        """Graphs that are not destroyed; their instances may be."""
        self.refuses_graphs, self.refuses_nodes = False, False
        self.calls: Counter[str] = Counter()
        """Of the driver's functions, by name."""
        self.before_graph: Callable[[], None] = lambda: None
        """Called where a graph is launched."""
        self.context = threading.local()
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=self._unload,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )
        for name, method, *kinds in (
            ("cuLaunchKernel", self._replay, Address, *[Number] * 7, Address, Address, Address),
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
            one = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(partial(self._counted, name, method))
            setattr(self, name, one)  # held here, for C does not

    def _counted(self, name: str, method: Callable[..., int], *arguments: Any) -> int:
        self.calls[name] += 1
        return method(*arguments)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append(name)
        number = next(self.numbers)
        return number, number, 0, 0, 1024  # module, function, registers, spills, threads at most

    numbers = itertools.count(1)
    """Of all kernels of all tests: one of another test may be unloaded late."""

    def _unload(self, module: int) -> None:
        used = {node.function for graph in self.nodes for node in self.graphs[graph]}
        assert module not in used, "a graph goes before its kernels"
        if self.kernels.pop(module, None) is not None:
            self.unloaded.append(module)

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
        self.calls["cuFuncGetParamInfo"] += 1
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

    def _replay(self, function: int, x: int, y: int, z: int, threads: int, *rest: int) -> int:
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
        self.context.mode, mode[0] = mode[0], self.mode
        return 0

    @property
    def mode(self) -> int:
        """Of capturing, of this thread: 0 is global, 2 relaxed."""
        return getattr(self.context, "mode", 1)

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
        self.before_graph()
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


@contextmanager
def pretended() -> Iterator[PretendedGpu]:
    """A pretended GPU, which Triton takes for the one there is."""
    with patch.object(driver, "_active", PretendedGpu()) as gpu:  # reset_active() would look for a real one
        yield gpu


@contextmanager
def knowing(gpu: PretendedGpu, made: ModuleType) -> Iterator[ModuleType]:
    """A generated module that knows the pretended GPU and no other."""
    with patch.object(made, "target_of", lambda device: TARGET), patch.object(made, "libcuda", lambda: gpu):
        forget(made)
        try:
            yield made
        finally:
            forget(made)


def forget(module: ModuleType) -> None:
    """What was made for a GPU that is gone, and what was wrong with it."""
    module.launch_plan.cache_clear()
    module.replayer.cache_clear()
    module.parameters_of.cache_clear()
    module.TOLD.clear()
    vars(module)["PLAIN"] = False
    drop_kernels(module)


def drop_kernels(module: ModuleType) -> None:
    """Empty Triton's caches."""
    for value in vars(module).values():
        if hasattr(value, "device_caches"):
            value.device_caches.clear()
    gc.collect()  # from Triton 3.8 on kernels that die are unloaded


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
    assert (o.shape, lse.shape) == (tensors[0].shape, o.shape[:3])


def select(module: ModuleType, tensors: list[Tensor]) -> None:
    """The selection alone."""
    batch, heads, n, _ = tensors[0].shape
    kept = module.select_kernels(*tensors[:2])
    assert [x.shape for x in kept] == [(batch, heads, rows, min(8, rows)) for rows in (-(-n // 16), -(-n // 256))]


def launches(
    gpu: PretendedGpu, module: ModuleType, tensors: list[Tensor], run: Callable[..., None] = step
) -> list[tuple[object, ...]]:
    gpu.log.clear()
    held: list[Tensor] = []
    run_pass = module.LaunchPlan.run

    def hold(at: Any, launches: Any, pass_tensors: Any, *scale: float) -> None:
        held.extend(pass_tensors)
        run_pass(at, launches, pass_tensors, *scale)

    with patch.object(module.LaunchPlan, "run", hold):
        run(module, tensors)
    places = Places(held)
    return [launch.told_apart(places) for launch in gpu.log if launch.programs]


@contextmanager
def warned_once(module: ModuleType) -> Iterator[None]:
    """There is one warning, of the operator and that its launches take longer, and no other."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    wanted = [module.OPERATOR, "launching its kernels takes longer"]
    assert [str(one.message).split(": ")[:2] for one in told] == [wanted], [str(one.message) for one in told]
