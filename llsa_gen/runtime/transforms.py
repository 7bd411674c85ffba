"""The operator under torch.func: what vmap has batched becomes part of the batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.module import OPERATOR
    from llsa_gen.runtime.passes import Attend, backward, forward, operator
else:  # for the class below, which in a module stands after it
    Attend = object

# ---- spliced into every module from here on


def folded(size: int, dims: Sequence[int | None], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that vmap has batched, `size` times: that dimension, at `dims` or missing, as part of the batch."""
    batched = [x if at is None else x.movedim(at, 0) for x, at in zip(tensors, dims, strict=True)]
    return [(x.expand(size, *x.shape) if at is None else x).flatten(0, 1) for x, at in zip(batched, dims, strict=True)]


def unfolded(size: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The batch of each in `size` parts, which become the first dimension, as vmap wants it."""
    return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in tensors)


class AttendTransformed(Attend):
    """The same under the transforms of torch.func."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
        return operator("", forward, q, k, v)(q, k, v, scale)

    @staticmethod
    def jvp(ctx: Any, *_: object) -> Any:
        raise NotImplementedError(f"{OPERATOR}: forward-mode derivatives are not available")

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> Any:
        size = info.batch_size
        q, k, v = folded(size, dims[:3], (q, k, v))
        o, lse, saved = AttendTransformed.apply(q, k, v, scale)
        return unfolded(size, o, lse, saved), (0, 0, 0)


class Differentiate(torch.autograd.Function):
    """The backward pass where torch may differentiate it: that raises, better than terms that are missing."""

    @staticmethod
    def forward(
        grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        o: torch.Tensor, saved: torch.Tensor, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        run = operator("_backward", backward, grad_o, q, k, v)
        return tuple(run(grad_o, grad_lse, q, k, v, o, saved, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: object) -> Any:
        raise NotImplementedError(f"{OPERATOR}: gradients of gradients are not available")

    jvp = backward

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, saved: torch.Tensor, scale: float,
    ) -> Any:  # fmt: skip
        size, (at_o, at_lse, *at, _) = info.batch_size, dims
        grad_o, q, k, v, o, saved = folded(size, (at_o, *at), (grad_o, q, k, v, o, saved))
        if grad_lse is not None:
            (grad_lse,) = folded(size, (at_lse,), (grad_lse,))
        grads = Differentiate.apply(grad_o, grad_lse, q, k, v, o, saved, scale)
        return unfolded(size, *grads), (0, 0, 0)


def select_batched(info: Any, dims: tuple[int | None, ...], q: torch.Tensor, k: torch.Tensor) -> Any:
    """torch.func.vmap of the selection."""
    kept = getattr(torch.ops.llsa, OPERATOR + "_select")(*folded(info.batch_size, dims, (q, k)))
    return list(unfolded(info.batch_size, *kept)), [0] * len(kept)
