"""What a module would launch on a GPU that is not there, recorded from its own host code.

The host code of a generated module runs on meta tensors, which have shapes and strides but no memory, in a copy of the
module's namespace where a launch is written down instead of made. So grids, arguments and tile shapes come from the
one place that decides them, the module itself is left alone, and other threads may use it meanwhile. `perform` does the
same with real tensors, and makes the launches too.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Literal

import torch
from triton import JITFunction, knobs

from llsa_gen import schedule
from llsa_gen.compiler import Attention
from llsa_gen.errors import LlsaGenError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Phase = Literal["forward", "backward", "select"]

_HOST_CODE = (
    "target_of", "schedule_for", "attend_kernels", "grad_kernels", "select_kernels", "saved_shapes", "views_of",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, how many programs, and what it is given."""

    phase: Phase
    function: JITFunction  # type: ignore[type-arg]
    grid: tuple[int, ...]
    arguments: Mapping[str, object]
    """By parameter, in order: tensors (meta ones, but for `perform`), numbers, and constexpr tile shapes."""
    options: Mapping[str, int]
    """`num_warps` and, where the schedule says, `num_stages`."""

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return self.function.__name__

    @property
    def step(self) -> str | None:
        """The name of the plan's kernel whose work it does; None for what only picks up what such a one leaves over."""
        return planned(self.kernel)


def planned(kernel: str) -> str | None:
    """The plan's name for what a kernel does, which those in Gluon share with those whose place they take."""
    return None if kernel == "attend_hopper_again_kernel" else kernel.replace("_hopper_kernel", "_kernel")


def module_of(source: Attention | ModuleType) -> ModuleType:
    """The generated module of a compiled operator, or the imported one itself.

    Raises TypeError for anything else, LlsaGenError where Triton's interpreter has taken the place of its compiler.
    """
    module = _any_module(source)
    if knobs.runtime.interpret or not any(isinstance(value, JITFunction) for value in vars(module).values()):
        raise LlsaGenError(
            f"{module.SPEC['name']}: its kernels run in Triton's interpreter and cannot be compiled; "
            "start Python with TRITON_INTERPRET unset"
        )
    return module


def _any_module(source: Attention | ModuleType) -> ModuleType:
    module = source.module if isinstance(source, Attention) else source
    if not isinstance(module, ModuleType) or any(not hasattr(module, name) for name in _HOST_CODE):
        raise TypeError(f"attention: expected a compiled attention or a generated module, got {source!r}")
    return module


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32`, `float16` or `bfloat16`, for torch's dtype or that name. Raises TypeError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")
    return name


def record(
    source: Attention | ModuleType,
    n_tokens: int,
    dtype: torch.dtype | str,
    target: str,
    *,
    batch: int = 2,
    heads: int = 4,
    tiles: schedule.Schedule | None = None,
) -> list[Launch]:
    """Every launch for q, k, v [batch, heads, n_tokens, D] of `dtype` on `target`: forward, backward, then `select`.

    `tiles` takes the place of the module's own schedule.

    Needs no GPU and no memory. Raises UnknownTargetError for a target without a schedule, TypeError or ValueError for
    a dtype or lengths that the operator does not take, LlsaGenError under TRITON_INTERPRET=1.
    """
    module = module_of(source)
    schedule.target(target)
    element = DTYPES[dtype_name(dtype)]
    if not 1 <= n_tokens <= module.MAX_TOKENS:
        raise ValueError(f"n_tokens: expected 1 to {module.MAX_TOKENS}, got {n_tokens}")
    if batch < 1 or heads < 1:
        raise ValueError(f"batch and heads: expected at least 1 each, got {batch} and {heads}")
    log: list[Launch] = []
    phase: Phase = "forward"

    def note(function: JITFunction, grid: tuple[int, ...], args: tuple[object, ...], kwargs: dict[str, int]) -> None:  # type: ignore[type-arg]
        log.append(_launch(phase, function, grid, args, kwargs))

    stand_ins: dict[str, object] = {"target_of": lambda device: target}
    if tiles is not None:
        stand_ins["schedule_for"] = lambda *_: tiles
    host = _rehearsal(module, stand_ins, note)
    head_dim = module.HEAD_DIM.value
    shape = (batch, heads, n_tokens, head_dim)
    q, k, v, grad_o = (torch.empty(shape, dtype=element, device="meta") for _ in range(4))
    scale = head_dim**-0.5
    o, _, saved = host["attend_kernels"](q, k, v, scale)
    phase = "backward"
    host["grad_kernels"](grad_o, None, q, k, v, o, saved, scale)
    phase = "select"
    host["select_kernels"](q, k)
    return log


def perform(
    source: Attention | ModuleType,
    tiles: schedule.Schedule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_o: torch.Tensor,
    scale: float,
) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """Attend forward and backward with the tile shapes `tiles`; also every launch that was made, with its tensors.

    Tensors are [B, H, N, D], on a GPU or, in Triton's interpreter, the CPU, where no launches are noted. Returns dq,
    dk, dv and o, [B, H, N, D]; lse [B*H, N]; and what the forward pass saves, in the order of the plan.
    """
    log: list[Launch] = []
    phase: Phase = "forward"

    def note(function: JITFunction, grid: tuple[int, ...], args: tuple[object, ...], kwargs: dict[str, int]) -> None:  # type: ignore[type-arg]
        log.append(_launch(phase, function, grid, args, kwargs))
        function[grid](*args, **kwargs)

    host = _rehearsal(_any_module(source), {"schedule_for": lambda *_: tiles}, note)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        o, lse, saved = host["attend_kernels"](q, k, v, scale)
        phase = "backward"
        grads = host["grad_kernels"](grad_o, None, q, k, v, o, saved, scale)
        shapes = host["saved_shapes"](q.shape[0] * q.shape[1], q.shape[2])
        buffers = host["views_of"](saved, "saved", shapes, q.dtype)
    return (*grads, o, lse, *buffers), log


Note = Callable[[JITFunction, tuple[int, ...], tuple[object, ...], dict[str, int]], None]  # type: ignore[type-arg]


class _Recorder:
    """Stands where a kernel stood: `recorder[grid](...)` notes what would have been launched."""

    def __init__(self, function: JITFunction, note: Note) -> None:  # type: ignore[type-arg]
        self._function, self._note = function, note
        self.__name__, self.arg_names = function.__name__, function.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._note(self._function, grid, args, kwargs)


def _launch(
    phase: Phase,
    function: JITFunction,  # type: ignore[type-arg]
    grid: tuple[int, ...],
    args: tuple[object, ...],
    kwargs: dict[str, int],
) -> Launch:
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    shapes = {name: value for name, value in kwargs.items() if name in function.arg_names}
    arguments = function.signature.bind(*args, **shapes).arguments
    return Launch(phase, function, tuple(grid), arguments, options)


def _rehearsal(
    module: ModuleType, stand_ins: Mapping[str, object], note: Note
) -> dict[str, Callable[..., list[torch.Tensor]]]:
    """The host functions of a module in a copy of its namespace, with stand-ins for some and recorders for kernels."""
    namespace = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            namespace[name] = _Recorder(value, note)
            continue
        value = getattr(value, "__wrapped__", value)  # without the cache around a function: what is cached is for real
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            twin = FunctionType(value.__code__, namespace, name, value.__defaults__, value.__closure__)
            twin.__kwdefaults__ = value.__kwdefaults__
            namespace[name] = twin
    namespace.update(stand_ins)
    return namespace
