"""The operator under torch.func: what vmap has batched becomes part of the batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.module import OPERATOR
    from llsa_gen.runtime.passes import Attend, backward, forward, operator, present
else:  # for the class below, which in a module stands after it
    Attend = object

# ---- spliced into every module from here on


def folded(size: int, dims: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """Tensors that vmap has batched, `size` times: that dimension, at `dims` or missing, as part of the batch.

    In their place there may be None, and lists of tensors.
    """
    found: list[Any] = []
    for x, at in zip(tensors, dims, strict=True):
        if isinstance(x, torch.Tensor):
            whole = x.expand(size, *x.shape) if at is None else x.movedim(at, 0)
            found.append(whole.flatten(0, 1))
        else:
            found.append(None if x is None else folded(size, at or [None] * len(x), x))
    return found


def unfolded(size: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The batch of each in `size` parts, which become the first dimension, as vmap wants it."""
    return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in tensors)


class AttendTransformed(Attend):
    """The same under torch.func. `more` is global keys and values, their mask and the lists, or nothing."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *more: Any) -> Any:
        return operator("", forward, q, k, v, *present(*more))(q, k, v, scale, *more)

    @staticmethod
    def jvp(ctx: Any, *_: object) -> Any:
        raise NotImplementedError(f"{OPERATOR}: forward-mode derivatives are not available")

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *more: Any
    ) -> Any:
        size = info.batch_size
        qkv, others = folded(size, dims[:3], (q, k, v)), folded(size, dims[4:], more)
        o, lse, saved = AttendTransformed.apply(*qkv, scale, *others)
        return unfolded(size, o, lse, saved), (0, 0, 0)


class Differentiate(torch.autograd.Function):
    """The backward pass where torch may differentiate it: that raises, better than terms that are missing."""

    @staticmethod
    def forward(
        grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        o: torch.Tensor, saved: torch.Tensor, scale: float, *more: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        run = operator("_backward", backward, grad_o, q, k, v, *present(*more))
        grads = run(grad_o, grad_lse, q, k, v, o, saved, scale, *more)
        return grads[: 5 if more and more[0] is not None else 3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: object) -> Any:
        raise NotImplementedError(f"{OPERATOR}: gradients of gradients are not available")

    jvp = backward

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, saved: torch.Tensor, scale: float, *more: Any,
    ) -> Any:  # fmt: skip
        size, tensors = info.batch_size, (grad_o, grad_lse, q, k, v, o, saved)
        grads = Differentiate.apply(*folded(size, dims[:7], tensors), scale, *folded(size, dims[8:], more))
        return unfolded(size, *grads), (0,) * len(grads)


def select_batched(info: Any, dims: tuple[int | None, ...], q: torch.Tensor, k: torch.Tensor) -> Any:
    """torch.func.vmap of the selection."""
    kept = getattr(torch.ops.llsa, OPERATOR + "_select")(*folded(info.batch_size, dims, (q, k)))
    return list(unfolded(info.batch_size, *kept)), [0] * len(kept)
