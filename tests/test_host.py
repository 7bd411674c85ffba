"""The host code on a GPU that is pretended: Triton compiles and launches as ever, but nothing runs.

Triton is given a driver that notes every launch. From the second call with the same shapes on, the host code launches
without Triton's own search for the kernel: these tests hold both ways against each other.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from llsa_gen import compile

ROOT = Path(__file__).resolve().parents[1]
TARGET = "cuda:90"
LOWEST_ADDRESS = 2**32
"""Of memory; other numbers that these tests hand to kernels are smaller."""


@dataclass
class Launched:
    """One launch as the driver gets it."""

    programs: tuple[int, int, int]
    function: int
    name: str
    arguments: tuple[object, ...]
    stream: int

    def told_apart(self, places: "Places") -> tuple[object, ...]:
        """All of it, with places for tensors and for addresses: equal for equal inputs."""
        return self.programs, self.function, self.name, tuple(map(places.of, self.arguments))


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


class PretendedGpu:
    """What Triton asks of a driver: one H100, on which every binary loads and every launch succeeds."""

    def __init__(self) -> None:
        self.log: list[Launched] = []
        self.loaded: list[str] = []
        self.stream = 0
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 232_448}
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, int, int, int, int]:
        self.loaded.append(name)
        return name, len(self.loaded), 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: object, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            _metadata, for_hooks, enter, leave, *arguments = rest
            for hook in (enter, leave):  # as Triton's own launchers do
                if hook is not None:
                    hook(for_hooks)
            self.log.append(Launched((x, y, z), function, metadata.name, tuple(arguments), stream))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    pretended = PretendedGpu()
    monkeypatch.setattr(driver, "_active", pretended)  # reset_active() would look for a real one
    return pretended


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = compile(ROOT / "spec" / "llsa_l2.yaml").module
    monkeypatch.setattr(found, "target_of", lambda device: TARGET)
    found.prepared.cache_clear()
    return found


@pytest.fixture(autouse=True)
def forget(module: ModuleType) -> Iterator[None]:
    yield
    module.prepared.cache_clear()  # functions of a GPU that is gone
    for value in vars(module).values():
        if hasattr(value, "device_caches"):
            value.device_caches.clear()


def draw(n: int, batch: int = 1, heads: int = 2, offset: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of o, bfloat16 [batch, heads, n, 64]; q begins `offset` elements into its memory."""
    made = [torch.zeros(batch * heads * n * 64 + 64, dtype=torch.bfloat16) for _ in range(4)]
    at = [offset, 0, 0, 0]
    return [x[i : i + batch * heads * n * 64].view(batch, heads, n, 64) for x, i in zip(made, at, strict=True)]


def step(module: ModuleType, tensors: list[Tensor]) -> None:
    """Forward and backward, as a GPU does them."""
    q, k, v, grad_o = tensors
    o, _, saved = module.attend_kernels(q, k, v, 0.125)
    module.grad_kernels(grad_o, q, k, v, o, saved, 0.125)


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
    pointers, memory = module.Prepared.pointers, module.Prepared.memory

    def hold_pointers(at: Any, last: str, *made: Tensor) -> Any:
        held.extend(made)
        return pointers(at, last, *made)

    def hold_memory(at: Any, q: Tensor, layout: str) -> Tensor:
        held.append(memory(at, q, layout))
        return held[-1]

    with patch.multiple(module.Prepared, pointers=hold_pointers, memory=hold_memory):
        run(module, tensors)
    places = Places(held)
    return [launch.told_apart(places) for launch in gpu.log if launch.programs[0]]


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
    assert launches(gpu, module, tensors, run) == first
    assert not any(isinstance(x, Tensor) for launch in gpu.log for x in launch.arguments), "but addresses"
    assert launches(gpu, module, draw(4096), run) == first, "other tensors of the same shapes"


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


class CudaLauncher:
    """Triton 3.6's: what stands in front of the function in C."""

    global_scratch_size, profile_scratch_size = 0, 0
    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, started: Callable[..., None]) -> None:
        self.started, self.calls = started, 0

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        self.calls += 1
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *rest)

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        grid, pdl, global_scratch, profile_scratch, *arguments = rest
        assert (grid, pdl, global_scratch, profile_scratch) == (False, True, None, None)
        self.started(x, y, z, stream, function, *arguments)


@pytest.mark.parametrize(("version", "scratch"), [("3.6.0", 0), ("3.6.0", 16), ("3.7.1", 0)])
def test_triton_s_launcher_is_passed_by_where_it_is_known(
    gpu: PretendedGpu, module: ModuleType, version: str, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CudaLauncher] = []
    launcher_cls = gpu.launcher_cls

    def launcher(source: object, metadata: Any) -> CudaLauncher:
        made.append(CudaLauncher(launcher_cls(source, metadata)))
        return made[-1]

    monkeypatch.setattr(gpu, "launcher_cls", launcher)
    monkeypatch.setattr(CudaLauncher, "global_scratch_size", scratch)
    monkeypatch.setattr(module.triton, "__version__", version)
    tensors = draw(4096)
    first = launches(gpu, module, tensors)
    passed = [one.calls for one in made]
    assert launches(gpu, module, tensors) == first
    again = sum(one.calls for one in made) - sum(passed)
    assert again == (0 if (version, scratch) == ("3.6.0", 0) else len(first))


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
    for n in (4097, 8191, 65_536, 100_003, 512, 1536, 200, 9):  # the last two have lists of one
        step(module, draw(n, heads=1))
    assert sorted(gpu.loaded[15:]) == ["attend_kernel", "grad_q_kernel"]


def test_lists_of_another_width_compile_nothing(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    # of 16, 12, 2 and 1 tokens: Triton would make a kernel of its own for the first and the last
    wide = compile({"name": "wide", "head_dim": 64, "levels": [{"block": 16, "topk": 16}] * 2}).module
    monkeypatch.setattr(wide, "target_of", lambda device: TARGET)
    for n in (4095, 4096):
        step(wide, draw(n))
    loaded = list(gpu.loaded)
    for n in (3071, 3072, 300, 100):
        step(wide, draw(n))
    assert gpu.loaded == loaded
    wide.prepared.cache_clear()


def test_a_first_call_may_be_interrupted_anywhere(gpu: PretendedGpu, module: ModuleType) -> None:
    class Interrupted:
        arg_names = ()

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
        with patch.object(module, name, Interrupted()), suppress(KeyboardInterrupt):
            step(module, tensors)
        assert launches(gpu, module, tensors) == launches(gpu, module, tensors) == wanted, name


def test_a_length_that_moves_where_heads_begin_compiles_nothing(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # D = 72: heads of an even length begin at multiples of 16 elements, and of an odd length at multiples of 8
    dit = compile({"name": "dit", "head_dim": 72, "levels": [{"block": 16, "topk": 8}]}).module
    monkeypatch.setattr(dit, "target_of", lambda device: TARGET)
    step(dit, [torch.zeros(1, 2, 512, 72, dtype=torch.bfloat16) for _ in range(4)])
    loaded = list(gpu.loaded)
    for n in (513, 528, 77):
        step(dit, [torch.zeros(1, 2, n, 72, dtype=torch.bfloat16) for _ in range(4)])
    assert sorted(gpu.loaded[len(loaded) :]) == ["attend_kernel", "grad_q_kernel"], "but the variants for loose ends"
    dit.prepared.cache_clear()


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
    memory = at.memory(q, layout)
    tensors = at.buffers(memory, layout, "grad_kv_l0_kernel")
    begins = [x.data_ptr() - memory.data_ptr() for x in tensors if x.numel()]
    ends = [begin + x.nbytes for begin, x in zip(begins, (x for x in tensors if x.numel()), strict=True)]
    assert all(begin % 256 == 0 for begin in begins), "as torch's own allocations"
    assert all(end <= begin for end, begin in zip(ends, [*begins[1:], memory.nbytes], strict=True))
    assert [tuple(x.shape) for x in tensors] == [at.shapes[name] for name in module.LAYOUTS[layout]]
    own = {"input": torch.bfloat16, "share": torch.bfloat16}
    assert [x.dtype for x in tensors] == [own.get(kind, kind) for kind in module.LAYOUTS[layout].values()]
    at.ready["grad_kv_l0_kernel"] = ()
    places = [begin for begin, _ in at.places[layout]]
    assert at.buffers(memory, layout, "grad_kv_l0_kernel") == [memory.data_ptr() + begin for begin in places]
    assert [begin for begin, x in zip(places, tensors, strict=True) if x.numel()] == begins


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
    assert len(gpu.loaded) == 15, "nothing is compiled for it"


def test_from_the_second_call_on_little_python_runs(gpu: PretendedGpu, module: ModuleType) -> None:
    # Calls of functions instead of microseconds, which differ from run to run. Triton's own search takes 2,200 here.
    tensors = draw(4096)
    step(module, tensors)
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step(module, tensors)
    finally:
        sys.setprofile(None)
    assert count < 260, count
