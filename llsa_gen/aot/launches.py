"""What a module would launch on a GPU that is not there, recorded from its own host code.

The functions of a generated module that name the kernels of a pass are told how to launch one. Here they are told to
write it down. Over meta tensors, which have shapes and strides but no memory, that is all that happens; `perform` does
the same with real tensors, and makes the launches too. So grids, arguments and tile shapes come from the one place that
decides them. Nothing of the module changes and its caches see none of this, so other threads may use it meanwhile.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from triton import JITFunction, knobs

from llsa_gen import schedule
from llsa_gen.compiler import Attention
from llsa_gen.errors import LlsaGenError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Phase = Literal["forward", "backward", "select"]

_HOST_CODE = ("SCHEDULES", "LaunchPlan", "forward_launches", "grad_launches", "selection_launches")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, how many programs, and what it is given."""

    phase: Phase
    step: str | None
    """The name of the plan's kernel whose work it does; None for what only picks up what such a one leaves over."""
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


def module_of(source: Attention | ModuleType) -> ModuleType:
    """The generated module of a compiled operator, or the imported one itself.

    Raises TypeError for anything else, LlsaGenError where Triton's interpreter has taken the place of its compiler.
    """
    module = _any_module(source)
    if knobs.runtime.interpret or module.INTERPRETED:
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
    m_tokens: int | None = None,
    g_tokens: int = 0,
    masked: bool = False,
    given: bool = False,
) -> list[Launch]:
    """Every launch for q, k, v [batch, heads, n_tokens, D] of `dtype` on `target`: forward, backward, then `select`.

    With `m_tokens` q is [batch, heads, m_tokens, D]. `tiles` takes the place of the module's own schedule. With
    `g_tokens` there are so many global tokens, and a mask of them if `masked`; with `given`, attention is along given
    lists.

    Needs no GPU and no memory. Raises UnknownTargetError for a target without a schedule, TypeError or ValueError for
    a dtype or lengths that the operator does not take, LlsaGenError under TRITON_INTERPRET=1.
    """
    module = module_of(source)
    schedule.target(target)
    element = DTYPES[dtype_name(dtype)]
    m_tokens = n_tokens if m_tokens is None else m_tokens
    for name, tokens in (("n_tokens", n_tokens), ("m_tokens", m_tokens)):
        if not 1 <= tokens <= module.MAX_TOKENS:
            raise ValueError(f"{name}: expected 1 to {module.MAX_TOKENS}, got {tokens}")
    if batch < 1 or heads < 1:
        raise ValueError(f"batch and heads: expected at least 1 each, got {batch} and {heads}")
    head_dim = module.HEAD_DIM.value
    lengths = m_tokens, n_tokens, n_tokens, m_tokens
    shapes = ((batch, heads, tokens, head_dim) for tokens in lengths)
    q, k, v, grad_o = (torch.empty(shape, dtype=element, device="meta") for shape in shapes)
    extras: dict[str, Tensor] = {}
    if g_tokens:
        of_globals = (batch, heads, g_tokens, head_dim)
        extras |= {name: torch.empty(of_globals, dtype=element, device="meta") for name in ("k_global", "v_global")}
        if masked:
            extras["global_mask"] = torch.empty((batch, g_tokens), dtype=torch.uint8, device="meta")
    if given:
        lists = module.empty_selection(q, k)
        extras |= {f"given_l{level}": list_ for level, list_ in enumerate(lists, start=1)}
    passes = _Passes(module, module.schedule_for(target, element) if tiles is None else tiles, extras=extras)
    o, _, saved = passes.attend(q, k, v, head_dim**-0.5)
    passes.differentiate(q, k, v, grad_o, o, saved, head_dim**-0.5)
    passes.select(q, k)
    return passes.launches


def perform(
    source: Attention | ModuleType,
    tiles: schedule.Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_o: Tensor,
    scale: float,
) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """Attend forward and backward with the tile shapes `tiles`; also every launch that was made, with its tensors.

    Tensors are [B, H, N, D], on a GPU or, in Triton's interpreter, the CPU, where no launches are noted. Returns dq,
    dk, dv and o, [B, H, N, D]; lse [B, H, N]; and what the forward pass saves, in the order of the plan.
    """
    module = _any_module(source)
    passes = _Passes(module, tiles, real=True)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        o, lse, saved = passes.attend(q, k, v, scale)
        grads = passes.differentiate(q, k, v, grad_o, o, saved, scale)
    shapes = module.saved_shapes(q.shape[2], k.shape[2])
    return (*grads, o, lse, *module.views_of(saved, "saved", shapes, q.dtype)), passes.launches


class _Passes:
    """The passes of a module with the tile shapes `tiles`; `launches` are those that it names, made if `real`."""

    def __init__(
        self,
        module: ModuleType,
        tiles: schedule.Schedule,
        *,
        real: bool = False,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module, self.tiles, self.real, self.extras = module, tiles, real, dict(extras or {})
        self.launches: list[Launch] = []
        self.lists = [x for name, x in self.extras.items() if name.startswith("given")]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
        """o, lse and what is saved: `attend_kernels` of the module."""
        at, *inputs = self._prepare(q, k, v, extras=self.extras)
        outputs = self.module.empty_outputs(q, k)
        tensors = *inputs, *outputs, at.memory("selection"), *self.extras.values()
        launches = self.module.keeping_launches if self.lists else self.module.forward_launches
        at.launch(launches, partial(self._note, "forward", at), tensors, scale)
        return outputs

    def differentiate(
        self, q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor, o: Tensor, saved: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """dq, dk and dv: `grad_kernels` of the module, where lse has no gradient."""
        shared = {name: x for name, x in self.extras.items() if not name.startswith("given")}
        if shared:
            shared |= {f"grad_{name}": self.module.empty_like(shared[name]) for name in ("k_global", "v_global")}
        at, *inputs = self._prepare(q, k, v, grad_o, extras=shared)
        grads = tuple(map(self.module.empty_like, (q, k, v)))
        tensors = *inputs, o, saved, *grads, at.memory("gradients"), *shared.values()
        at.launch(self.module.grad_launches, partial(self._note, "backward", at), tensors, scale)
        return grads

    def select(self, q: Tensor, k: Tensor) -> None:
        """`select_kernels` of the module: k is in place of values, q of what is not looked at."""
        at, q, k, v = self._prepare(q, k, k)
        tensors = q, k, v, q, q, at.memory("saved"), at.memory("selection")
        at.launch(self.module.selection_launches, partial(self._note, "select", at), tensors, 0.0)

    def _prepare(self, *tensors: Tensor, extras: Mapping[str, Tensor] | None = None) -> tuple[Any, ...]:
        """`plan_launches` of the module, but with these tiles and in no cache: a `LaunchPlan`; tensors, `aligned`."""
        q, k, *_ = tensors = tuple(map(self.module.aligned, tensors))
        strides, starts = zip(*((x.stride(), x.data_ptr() % 16) for x in tensors), strict=True)
        extras = extras or {}
        g_tokens = extras["k_global"].shape[2] if "k_global" in extras else 0
        known = q.device, q.dtype, q.shape, k.shape, strides, starts, self.tiles
        widths = tuple(lists.shape[3] for lists in self.lists)
        return self.module.LaunchPlan(*known, tuple(extras), g_tokens, widths), *tensors

    def _note(self, phase: Phase, at: Any, kernel: Any, *arguments: Any) -> None:
        """`by_triton` of the module, which takes one of a pair: the plan's kernel or the one in Gluon for its place."""
        if not self.module.INTERPRETED:
            step, programs, tile = self.module.tile_of(at, kernel)
            function, taken = self.module.variant(kernel, tile)
            if function.is_gluon() and not isinstance(kernel, tuple):
                step = None  # it takes the place of none
            shapes = {name: value for name, value in taken.items() if name in function.arg_names}
            options = {name: value for name, value in taken.items() if name not in shapes} | self.module.OPTIONS
            bound = function.signature.bind(*self.module.values_of(arguments), **shapes).arguments
            self.launches.append(Launch(phase, step, function, (programs,), bound, options))
        if self.real:
            self.module.by_triton(at, kernel, *arguments)
