"""The two passes and the selection, on whichever device the tensors are, and how autograd joins them."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.cpu_stages import attend_torch, grad_torch, select_torch
    from llsa_gen.runtime.guards import DENSE_ATTENTION, refuse_context_parallel
    from llsa_gen.runtime.kernels import GlobalTokens, attend_kernels, grad_kernels, select_kernels
    from llsa_gen.runtime.launch_plan import empty_like, empty_outputs, empty_selection
    from llsa_gen.runtime.module import INTERPRETED, OPERATOR, Differentiate, saved_shapes

# ---- spliced into every module from here on

try:
    from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor, peek_interpreter_stack
    from torch.autograd import _profiler_enabled
except ImportError:  # torch's own names: where they are gone, every call is taken for a watched one
    _len_torch_dispatch_stack = None

    def is_legacy_batchedtensor(tensor: torch.Tensor) -> bool:
        return False


USUAL = {torch.Tensor, torch.nn.Parameter}


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether nothing watches what happens to these tensors: no compiler, mode, transform, profiler, no subclass.

    Torch's dispatcher then has nothing to add, and takes longer than the kernels up to some 16,000 tokens.
    """
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack is None or tensors[0].is_meta:
        return False
    for x in tensors:
        if type(x) not in USUAL or is_functorch_wrapped_tensor(x):
            return False
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack()
        or _profiler_enabled()
        or torch.jit.is_tracing()
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which knows `Attend` but not how torch differentiates operators."""
    return torch._C._are_functorch_transforms_active()


ON_CURRENT_DEVICE = contextlib.nullcontext()


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: make it that of `x`."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return ON_CURRENT_DEVICE


def without_autocast(x: torch.Tensor | None = None) -> contextlib.AbstractContextManager[Any]:
    """What the CPU path multiplies, on the CPU or where `x` is, is float32 on purpose, and autocast would round it."""
    return torch.autocast("cpu" if x is None else x.device.type, enabled=False)


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take `x`: on a GPU, or anywhere in Triton's interpreter."""
    return x.is_cuda or INTERPRETED


def without_keys(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator's outputs where there are no queries or no keys: o = 0, lse = -inf."""
    o, lse, saved = empty_outputs(q, k)
    return o.zero_(), lse.fill_(float("-inf")), saved.zero_()


def in_one_piece(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if it lies apart or begins at no multiple of 16 bytes: what was saved, hooks may keep anywhere.

    Kernels that have been compiled for the one kind are not told of the other.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def seen_by_all(
    k_global: torch.Tensor | None, v_global: torch.Tensor | None, global_mask: torch.Tensor | None
) -> "GlobalTokens | None":
    """Global keys, values and their mask or None, as kernels take them; None where there are no global tokens.

    Those that take no part are zeros: they weigh nothing, but nothing times infinity is no number.
    """
    if k_global is None or v_global is None or k_global.shape[2] == 0:
        return None
    if global_mask is None:
        return in_one_piece(k_global), in_one_piece(v_global), None
    k_global, v_global = (torch.where(global_mask[:, None, :, None], x, 0.0) for x in (k_global, v_global))
    return in_one_piece(k_global), in_one_piece(v_global), in_one_piece(global_mask)


def rows_checked(kept: Sequence[torch.Tensor] | None, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor] | None:
    """Lists as kernels take them. Under torch.compile nothing has looked at their rows, which index memory."""
    if kept is None:
        return None
    shapes = saved_shapes(q.shape[2], k.shape[2])
    for level, lists in enumerate(kept, start=1):
        rows, _ = shapes[f"kept_l{level}"]
        if lists.shape[2] != rows:
            raise ValueError(f"kept, level {level}: expected {rows} rows for M = {q.shape[2]}, got {lists.shape[2]}")
    return [in_one_piece(lists) for lists in kept]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None, global_mask: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, memory of the layout `saved`."""
    if torch.nn.functional.scaled_dot_product_attention is not DENSE_ATTENTION:  # here compiled programs come, too
        refuse_context_parallel(q, k)
    shared: GlobalTokens | None = None
    more: tuple[Any, ...] = ()
    if k_global is not None or kept is not None:
        shared = seen_by_all(k_global, v_global, global_mask)
        more = shared, rows_checked(kept, q, k)
    if q.numel() == 0 or k.numel() == 0:
        if q.numel() == 0 or shared is None:
            return without_keys(q, k)
        with without_autocast(q):
            return attend_torch(q, k, v, scale, shared, empty_selection(q, k))
    if not runs_kernels(q):
        with without_autocast():
            return attend_torch(q, k, v, scale, *more)
    with on_device_of(q):
        return attend_kernels(q, k, v, scale, *more)


def backward(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float, k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None, global_mask: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq [B, H, M, D], dk and dv [B, H, N, D], from the gradient of o and, if it has one, that of lse.

    With global tokens also the gradients of their keys and values, [B, H, G, D].
    """
    shared: GlobalTokens | None = None
    of_none: tuple[torch.Tensor, ...] = ()
    more: tuple[Any, ...] = ()
    if k_global is not None or kept is not None:
        shared = seen_by_all(k_global, v_global, global_mask)
        more = shared, kept is not None
        if k_global is not None and shared is None:
            of_none = empty_like(k_global), empty_like(k_global)
    if grad_lse is not None:
        grad_lse = in_one_piece(grad_lse)
    if q.numel() == 0 or k.numel() == 0:
        if q.numel() == 0 or shared is None:
            return tuple(empty_like(x).zero_() for x in (q, k, v, *(shared or of_none)[:2]))
        with without_autocast(q):
            return grad_torch(grad_o, grad_lse, q, k, v, saved, scale, shared, empty_selection(q, k))
    saved = in_one_piece(saved)
    if not runs_kernels(q):
        with without_autocast():
            grads = grad_torch(grad_o, grad_lse, q, k, v, saved, scale, shared, kept)
    else:
        with on_device_of(q):
            grads = grad_kernels(grad_o, grad_lse, q, k, v, in_one_piece(o), saved, scale, *more)
    return (*grads, *of_none) if of_none else grads


def in_five(q: torch.Tensor, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients as torch's operator has them, for which vmap wants a fixed number: without globals two of nothing."""
    return *grads, *[q.new_empty(0) for _ in range(5 - len(grads))]


def five_gradients(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """`backward` for torch's operator."""
    return in_five(inputs[2], backward(*inputs))


def select_forward(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept key tokens of each level, finest first, [B, H, T_l(M), width] each."""
    if torch.nn.functional.scaled_dot_product_attention is not DENSE_ATTENTION:
        refuse_context_parallel(q, k)
    if q.numel() == 0 or k.numel() == 0:
        return empty_selection(q, k)
    if not runs_kernels(q):
        with without_autocast():
            return select_torch(q, k)
    with on_device_of(q):
        return select_kernels(q, k)


def operator(suffix: str, function: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """What computes over these tensors: the function itself or, if anything watches, torch's operator of that name."""
    return function if is_plain(*tensors) else getattr(torch.ops.llsa, OPERATOR + suffix)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what `differentiate` reads."""
    q, k, v, ctx.scale = inputs[:4]
    o, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.more = None
    if len(inputs) == 4:
        ctx.save_for_backward(q, k, v, o, saved)
        return
    more = present(*inputs[4:])  # global keys and values, their mask, and the lists, each of which may be None
    if more:
        ctx.more = [x is not None for x in inputs[4:]]
    ctx.save_for_backward(q, k, v, o, saved, *more)


def present(*inputs: torch.Tensor | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """The tensors among what may be a tensor, a list of them, or None."""
    found: list[torch.Tensor] = []
    for x in inputs:
        if x is not None:
            found += [x] if isinstance(x, torch.Tensor) else x
    return found


def as_saved(given: Sequence[bool], tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What `save_for_backward` has kept beside the usual: global keys and values, their mask, the lists, or None."""
    left = iter(tensors)
    shared = [next(left) if there else None for there in given[:3]]
    return *shared, list(left) if given[3] else None


def differentiate(ctx: Any, grad_o: torch.Tensor | None, grad_lse: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
    """Gradients of the operator's inputs from those of o and lse; the selection is held fixed."""
    grads: Sequence[torch.Tensor | None] = (None,) * 5
    if grad_o is not None or grad_lse is not None:
        q, k, v, o, saved, *tensors = ctx.saved_tensors
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        inputs = grad_o, grad_lse, q, k, v, o, saved, ctx.scale
        if torch.is_grad_enabled() or is_transformed():
            run = Differentiate.apply
        elif is_legacy_batchedtensor(grad_o) or (grad_lse is not None and is_legacy_batchedtensor(grad_lse)):
            # by is_grads_batched
            run = getattr(torch.ops.llsa, OPERATOR + "_backward")
        else:
            run = operator("_backward", backward, grad_o, q)
        grads = run(*inputs) if ctx.more is None else run(*inputs, *as_saved(ctx.more, tensors))
    if ctx.more is None:
        return *grads[:3], None
    of_globals = grads[3:5] if ctx.more[0] else (None, None)
    needed = ctx.needs_input_grad  # torch's operator wants a list for a list, and nothing for what was left out
    of_kept = [None] * len(needed[7]) if len(needed) == 8 and isinstance(needed[7], list) else None
    return (*grads[:3], None, *of_globals, None, of_kept)[: len(needed)]


class Attend(torch.autograd.Function):
    """The operator without torch's dispatcher: o, lse and what is saved, of tensors that are plain."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        """`forward`. In torch 2.15 arguments with a default would be inputs, given or not, and want gradients."""
        return forward(*inputs)

    setup_context = staticmethod(save_for_backward)
    backward = staticmethod(differentiate)


# Without transforms: torch's own `apply` looks up the signature of `forward` at every call.
attend_eagerly = super(torch.autograd.Function, Attend).apply  # type: ignore[attr-defined]
