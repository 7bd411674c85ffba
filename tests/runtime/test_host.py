"""The host code on a GPU that is pretended: what it launches is what Triton launches, call after call."""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import permutations
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pretended_gpu import (
    LOWEST_ADDRESS,
    ROOT,
    PretendedGpu,
    attend,
    draw,
    forget,
    knowing,
    launches,
    pretended,
    rounded,
    select,
    step,
    warned_once,
)
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction

from llsa_gen import compile

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a callback from C


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended() as made:
        yield made


@pytest.fixture
def load(gpu: PretendedGpu) -> Iterator[Callable[[Any], ModuleType]]:
    """Compiles a spec to a module that knows the pretended GPU and no other."""
    with ExitStack() as known:
        yield lambda spec: known.enter_context(knowing(gpu, compile(spec).module))


@pytest.fixture
def module(load: Callable[[Any], ModuleType]) -> ModuleType:
    return load(ROOT / "spec" / "llsa_l2.yaml")


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
    # other tensors of the same shapes, too
    for again, by in ((tensors, "launch"), (draw(4096), "graph"), (tensors, "graph"), (draw(4096), "graph")):
        assert launches(gpu, module, again, run) == first
        assert {launch.by for launch in gpu.log} == {by}


def test_a_launch_without_programs_is_only_compiled(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(1024), step)
    assert len(gpu.log) == 15 and len(first) == 14, "no list is long enough to be cut"


def test_the_order_of_calls_does_not_matter(gpu: PretendedGpu, module: ModuleType) -> None:
    tensors = draw(4096)
    runs = step, attend, select
    wanted = {}
    for run in runs:
        module.launch_plan.cache_clear()
        wanted[run] = launches(gpu, module, tensors, run)
    for order in permutations(runs):
        module.launch_plan.cache_clear()
        for run in (*order, *order):
            assert launches(gpu, module, tensors, run) == wanted[run], order
    assert len(gpu.loaded) == 15, "nothing is compiled for the second of them"


def test_tensors_that_were_one_in_the_first_call_are_told_apart(gpu: PretendedGpu, module: ModuleType) -> None:
    q, k, v, grad_o = draw(4096)
    step(module, [q, q, q, q])
    found = [launches(gpu, module, [q, k, v, grad_o]) for _ in range(2)]
    assert {launch.by for launch in gpu.log} == {"graph"}
    module.launch_plan.cache_clear()
    assert found == 2 * [launches(gpu, module, [q, k, v, grad_o])]


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
def test_what_cannot_be_replayed_goes_through_triton_and_one_warning_says_why(
    gpu: PretendedGpu, module: ModuleType, without: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(gpu, module, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"llsa_l2.*takes longer: .") as told:
        first = launches(gpu, module, draw(4096))
    assert len(told) == 1, "not one a kernel"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launches(gpu, module, draw(4096)) == first
        with patch.object(JITFunction, "run", side_effect=AssertionError("Triton looks for a kernel again")):
            step(module, draw(4096))
    assert {launch.by for launch in gpu.log} == {"triton"}


@pytest.mark.parametrize("graphs", [True, False])
def test_a_launch_that_fails_is_an_error(gpu: PretendedGpu, module: ModuleType, graphs: bool) -> None:
    for _ in range(3 if graphs else 1):
        step(module, draw(4096))
    gpu.log.clear()
    gpu.error = 700
    with pytest.raises(RuntimeError, match="CUDA error 700 at a launch: out of luck"):
        step(module, draw(4096))
    assert len(gpu.log) == (5 if graphs else 0) + 1, "the graph, and the first of those one by one"
    assert not module.PLAIN, "the way of launching was not the reason"


def test_without_graphs_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    gpu.refuses_graphs = True
    first = launches(gpu, module, draw(4096))
    with warned_once(module):
        for _ in range(3):
            assert launches(gpu, module, draw(4096)) == first
            assert {launch.by for launch in gpu.log} == {"launch"}
    assert len(gpu.graphs) == 2 and not gpu.nodes, "asked once a pass"
    assert gpu.mode == 1


def test_while_a_stream_is_captured_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(4096))
    step(module, draw(4096))
    for capturing in (True, False, True):  # from the third call on
        gpu.capturing = capturing
        assert launches(gpu, module, draw(4096)) == first
        assert {launch.by for launch in gpu.log} == {"launch" if capturing else "graph"}
        assert len(gpu.graphs) == (0 if capturing and not gpu.graphs else 2)


def test_each_stream_has_graphs_of_its_own_and_few_are_kept(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY_GRAPHS", 6)
    for _ in range(2):
        step(module, draw(4096))
    for gpu.stream in (0, 7, 9, 0, 7, 9, 0):
        gpu.log.clear()
        step(module, draw(4096))
        assert {(launch.stream, launch.by) for launch in gpu.log} == {(gpu.stream, "graph")}
    assert sum(map(bool, gpu.graphs.values())) == len(gpu.graphs) == len(gpu.nodes) == 6
    for gpu.stream in (5, 0, 9):  # instead of those of stream 7, which was used least recently
        step(module, draw(4096))
    assert len(gpu.graphs) == 8 and len(gpu.nodes) == len(module.GRAPHS) == 6
    gpu.capturing = True
    for gpu.stream in range(20, 40):
        step(module, draw(4096))
    assert len(gpu.graphs) == 8 and len(gpu.nodes) == 6, "what is captured costs none its place"
    forget(module)
    assert not any(gpu.graphs.values()) and not gpu.nodes and not module.GRAPHS


def test_where_nodes_cannot_be_set_launches_go_one_by_one(gpu: PretendedGpu, module: ModuleType) -> None:
    first = launches(gpu, module, draw(4096))
    step(module, draw(4096))
    gpu.refuses_nodes = True
    with warned_once(module):
        for _ in range(3):
            assert launches(gpu, module, draw(4096)) == first
            assert {launch.by for launch in gpu.log} == {"launch"}
    assert len(gpu.graphs) == 2 and not gpu.nodes, "tried once a pass"


def test_who_waits_for_each_launch_gets_them_one_by_one(
    gpu: PretendedGpu, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONE_BY_ONE", True)  # CUDA_LAUNCH_BLOCKING=1
    first = launches(gpu, module, draw(4096))
    for _ in range(3):
        assert launches(gpu, module, draw(4096)) == first
        assert {launch.by for launch in gpu.log} == {"launch"}
    assert not gpu.graphs


@pytest.mark.filterwarnings("ignore:.*CUDA refuses a graph")
@pytest.mark.parametrize("graphs", [True, False])
def test_a_thread_that_has_done_nothing_on_the_gpu(gpu: PretendedGpu, module: ModuleType, graphs: bool) -> None:
    # has no context until something makes one current, as Triton does
    gpu.refuses_graphs = not graphs
    first = launches(gpu, module, draw(4096))
    step(module, draw(4096))
    for made in (False, True):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(launches, gpu, module, draw(4096)).result() == first, made
        assert {launch.by for launch in gpu.log} == {"graph" if graphs else "launch"}


def test_play_says_what_it_expects(gpu: PretendedGpu, module: ModuleType) -> None:
    replay, _, driver = module.replayer()
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
            replay(*wrong)
    assert replay(driver, b"", None, 0, 1.0, *range(module.BASES - 2)) == 0 and not gpu.log


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
    class Capture(list[str]):  # false while it is empty
        def __call__(self, metadata: Any) -> None:
            self.append(metadata.get()["name"])

    step(module, draw(4096))
    capture = Capture()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", capture)
    gpu.log.clear()
    step(module, draw(4096))
    assert capture == [launch.name for launch in gpu.log]


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
        "beyond the cache": draw(131_072),
    }
    alone = {}
    for name, tensors in calls.items():
        module.launch_plan.cache_clear()
        alone[name] = launches(gpu, module, tensors)
    assert len({str(found) for found in alone.values()}) == len(calls)
    module.launch_plan.cache_clear()
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
    assert "attend_hopper_recompute_kernel" in names
    for name in names:
        module.launch_plan.cache_clear()
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
    assert sorted(gpu.loaded[len(loaded) :]) == ["attend_hopper_kernel", "grad_q_hopper_kernel"], (
        "but the variants for loose ends"
    )


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
    at, *_ = module.plan_launches((q, q, q))
    memory = at.memory(layout)
    arguments = at.buffers(module.Argument(memory, 5), layout)
    tensors = [argument.value for argument in arguments]
    heads = memory.shape[:2] if layout == "saved" else ()  # of which each has its own part
    begins = [x.data_ptr() - memory.data_ptr() for x in tensors if x.numel()]
    sizes = [x[0, 0].nbytes if heads else x.nbytes for x in tensors if x.numel()]
    assert all(begin % 256 == 0 for begin in begins), "as torch's own allocations"
    ends = [*begins[1:], memory.shape[-1]]
    assert all(begin + size <= end for begin, size, end in zip(begins, sizes, ends, strict=True))
    assert [tuple(x.shape) for x in tensors] == [(*heads, *at.shapes[name]) for name in module.LAYOUTS[layout]]
    own = {"input": torch.bfloat16, "partial": torch.bfloat16}
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
        module.backward(grad_o, None, q, k, v, o, memory, 0.125)
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for one in gpu.log for x in one.arguments]
        addresses = [x for x in addresses if isinstance(x, int) and x >= LOWEST_ADDRESS]
        assert addresses and all(x % 16 == 0 for x in addresses)
        apart = range(scattered.data_ptr(), scattered.data_ptr() + 2 * scattered.numel())
        assert not any(x in apart for x in addresses)
    moved = [torch.zeros(o.numel() + 1, dtype=o.dtype)[1:].view(o.shape), o.mT.contiguous().mT]
    for one in moved:
        held = range(one.data_ptr(), one.data_ptr() + one.nbytes)
        gpu.log.clear()
        module.backward(grad_o, None, q, k, v, one, saved, 0.125)
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
    for name in module.DRIVER:
        monkeypatch.setattr(gpu, name, ctypes.CDLL(None).sched_yield)  # does nothing, and in C, where ours are Python
    for _ in range(3):
        step(module, tensors)
    assert len(module.GRAPHS) == 2
    found = calls_of(lambda: step(module, tensors))
    assert found < 90, found
