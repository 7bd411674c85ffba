"""The two passes and the selection by the Triton kernels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.launch_plan import empty_like, named_views, plan_launches, views_of
    from llsa_gen.runtime.module import ENRICHED, GIVEN, GIVEN_NAMES, LEVELS, forward_launches, grad_launches

# ---- spliced into every module from here on


def selection_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of the selection alone, in the order of `forward_launches`; o and lse are not looked at."""
    forward_launches(at, launch, scale, *tensors, stages=("pool", "select"))


def select_kernels(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, [B, H, T_l, width] each."""
    at, q, k, v = plan_launches((q, k, k))  # k in place of v, whose means nobody will look at
    saved = at.memory("saved")
    at.run(selection_launches, (q, k, v, q, q, saved, at.memory("selection")))
    lists = views_of(saved, "saved", at.shapes, q.dtype)[-LEVELS:]
    return [kept.clone(memory_format=torch.contiguous_format) for kept in lists]


def keeping_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of the forward pass along given lists."""
    forward_launches(at, launch, scale, *tensors, stages=("pool", "keep", "attend"))


GlobalTokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
SHARED_NAMES = "k_global", "v_global", "global_mask"


def shared_tensors(shared: GlobalTokens) -> tuple[torch.Tensor, ...]:
    """Global tokens and their mask, if there is one, as kernels take it."""
    k, v, mask = shared
    return (k, v) if mask is None else (k, v, mask.view(torch.uint8))


def attend_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, shared: GlobalTokens | None = None,
    kept: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, memory of the layout `saved`.

    `shared`: global tokens [B, H, G, D], twice, and their mask [B, G] or None. `kept`: given lists, finest first.
    """
    extras: tuple[Any, ...] = ()
    if shared is None and kept is None:
        at, q, k, v = plan_launches((q, k, v))
    else:
        names: tuple[str, ...] = ()
        if shared is not None:
            extras = shared_tensors(shared)
            names = SHARED_NAMES[: len(extras)]
        if kept is not None:
            extras, names = (*extras, *kept), (*names, *GIVEN_NAMES)
        widths = () if kept is None else tuple([lists.shape[3] for lists in kept])
        at, q, k, v = plan_launches((q, k, v), names, 0 if shared is None else shared[0].shape[2], widths)
    # of sizes one by one, as in `memory`: half the time
    lse = torch.empty(*at.rows, dtype=torch.float32, device=at.device)
    o, saved = empty_like(q), at.memory("saved")
    launches = forward_launches if kept is None else keeping_launches
    at.run(launches, (q, k, v, o, lse, saved, at.memory("selection"), *extras), scale)
    return o, lse, saved


def where_attended(
    saved: torch.Tensor, q: torch.Tensor, k: torch.Tensor, grad_o: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of o and lse, 0 for queries that had nothing to attend to, whatever came in there: NaN, say."""
    nothing = named_views(None, (q, k), saved=saved)["peak"] == float("inf")
    grad_o = grad_o.masked_fill(nothing[..., None], 0.0)
    return grad_o, None if grad_lse is None else grad_lse.masked_fill(nothing, 0.0)


def grad_kernels(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float, shared: GlobalTokens | None = None, given: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv from what `attend_kernels` returned, and those of global tokens; grad_lse may be None.

    `given`: whether lists were.
    """
    if given and LEVELS not in ENRICHED and (shared is None or shared[2] is not None):
        grad_o, grad_lse = where_attended(saved, q, k, grad_o, grad_lse)
    extras: tuple[Any, ...] = () if grad_lse is None else (grad_lse,)
    names: tuple[str, ...] = () if grad_lse is None else ("grad_lse",)
    of_shared: tuple[torch.Tensor, ...] = ()
    if shared is not None:
        of_shared, tensors = (empty_like(shared[0]), empty_like(shared[1])), shared_tensors(shared)
        extras = (*extras, *tensors, *of_shared)
        names = (*names, *SHARED_NAMES[: len(tensors)], "grad_k_global", "grad_v_global")
    g_tokens = 0 if shared is None else shared[0].shape[2]
    at, q, k, v, grad_o = plan_launches((q, k, v, grad_o), names, g_tokens, GIVEN if given else ())
    grads = empty_like(q), empty_like(k), empty_like(v)
    at.run(grad_launches, (q, k, v, grad_o, o, saved, *grads, at.memory("gradients"), *extras), scale)
    return *grads, *of_shared
