"""The two passes and the selection by the Triton kernels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.launch_plan import empty_like, plan_launches, views_of
    from llsa_gen.runtime.module import LEVELS, forward_launches, grad_launches

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


def attend_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, lse and what the backward pass needs, memory of the layout `saved`."""
    at, q, k, v = plan_launches((q, k, v))
    o, lse, saved = empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), at.memory("saved")
    at.run(forward_launches, (q, k, v, o, lse, saved, at.memory("selection")), scale)
    return o, lse, saved


def grad_kernels(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv from what `attend_kernels` returned; grad_lse may be None."""
    at, q, k, v, grad_o = plan_launches((q, k, v, grad_o), grad_lse is not None)
    grads = empty_like(q), empty_like(k), empty_like(v)
    tensors = q, k, v, grad_o, o, saved, *grads, at.memory("gradients")
    at.run(grad_launches, tensors if grad_lse is None else (*tensors, grad_lse), scale)
    return grads
