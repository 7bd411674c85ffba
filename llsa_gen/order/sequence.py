"""An order of tokens: which token stands at each place, and where each token stands. Permuting in and out with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llsa_gen.errors import short

__all__ = ["Order", "Ordered", "from_codes"]


@dataclass(frozen=True, eq=False)
class Order:
    """An order of N tokens. Do not write into its tensors: `grid` hands the same ones to everybody who asks."""

    permutation: Tensor
    """int64 [N]: for each place in the sequence, the token that stands there."""
    inverse: Tensor
    """int64 [N]: for each token, the place where it stands."""

    def __len__(self) -> int:
        """N, the number of tokens."""
        return self.permutation.shape[0]

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """The tokens of x, along a dimension of size N, put into this order: a copy, differentiable.

        The default is right for [B, H, N, D] and for [B, N, C]. Raises TypeError or ValueError naming the argument.
        """
        return _taken(x, self.permutation, self.inverse, dim)

    def restore(self, x: Tensor, dim: int = -2) -> Tensor:
        """The tokens of x back as they were before `apply`: a copy, differentiable."""
        return _taken(x, self.inverse, self.permutation, dim)

    def to(self, device: torch.device | str | int) -> "Order":
        """The same order on a device."""
        return Order(self.permutation.to(device), self.inverse.to(device))


class Ordered(nn.Module):
    """Permutes tokens in and out around something that pools consecutive ones: an attention, a layer, all layers.

    Called like `inner`. Positional tensors are put into the order along `dim`, and what `inner` returns is brought
    back, a tensor or a tuple of tensors; other arguments pass as they are, keywords too. The order is in buffers that
    move with the module and are no part of its state dict.

    Args:
        inner: a module or any callable, such as what `compile` gives.
        order: the order of the N tokens.
        dim: where the N tokens are, in what comes and in what `inner` returns: 2 for [B, H, N, D] and the lse
            [B, H, N], 1 for [B, N, C]. A negative one counts from the end of the first tensor.
    """

    permutation: Tensor
    inverse: Tensor

    def __init__(self, inner: Callable[..., Any], order: Order, dim: int = 2) -> None:
        super().__init__()
        if not callable(inner):
            raise TypeError(f"inner: expected a module or another callable, got {type(inner).__name__}")
        if not isinstance(order, Order):
            raise TypeError(f"order: expected an llsa_gen.order.Order, got {type(order).__name__}")
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
        self.inner = inner
        self.dim = dim
        self.register_buffer("permutation", order.permutation, persistent=False)
        self.register_buffer("inverse", order.inverse, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `inner` gives, in the order in which the tokens came."""
        first = next((x for x in args if isinstance(x, Tensor)), None)
        if first is None:
            raise TypeError("Ordered: expected at least one positional tensor, got none")
        dim = self.dim + first.ndim if self.dim < 0 else self.dim
        there, back = (self.permutation, self.inverse), (self.inverse, self.permutation)
        result = self.inner(*(_taken(x, *there, dim) if isinstance(x, Tensor) else x for x in args), **kwargs)
        if isinstance(result, tuple | list):
            return tuple(_taken(x, *back, dim, "result") if isinstance(x, Tensor) else x for x in result)
        return _taken(result, *back, dim, "result")

    def extra_repr(self) -> str:
        return f"tokens={self.permutation.shape[0]}, dim={self.dim}"


def from_codes(codes: Any) -> Order:
    """The order of tokens by an integer code of each: nested HEALPix indices, Morton or Hilbert codes of points.

    codes: integers [N], a tensor on any device or an array; tokens of equal codes stay in the order in which they come.
    Codes of neighbours have to be near to each other. Raises TypeError or ValueError for anything else.
    """
    expected = "codes: expected integers [N], one for each token"
    try:
        codes = codes if isinstance(codes, Tensor) else torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected}, got {type(codes).__name__}") from None
    if codes.ndim != 1:
        raise ValueError(f"{expected}, got shape {[*codes.shape]}")
    empty = not torch.compiler.is_compiling() and codes.shape[0] == 0  # torch makes floats of an empty list
    if not empty and (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool):
        raise TypeError(f"{expected}, got {codes.dtype}")
    return of_permutation(torch.argsort(codes.detach(), stable=True))


def of_permutation(permutation: Tensor) -> Order:
    """The order with this permutation, int64 [N]."""
    places = torch.arange(permutation.shape[0], device=permutation.device)
    return Order(permutation, torch.empty_like(permutation).scatter_(0, permutation, places))


class _Permuted(torch.autograd.Function):
    """index_select by a permutation, with another one for the gradient: torch before 2.13 shards no index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.dim = dim
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        return _Permuted.apply(grad, inverse, index, ctx.dim), None, None, None


def permuted(x: Any, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """x with the tokens along `dim` as a permutation says; `inverse` is the one that undoes it.

    x may be a DTensor, and both be plain: every process has the whole order.
    """
    if not (hasattr(x, "placements") and hasattr(x, "device_mesh")):  # a DTensor, known without an import
        return x.index_select(dim, index)
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * x.device_mesh.ndim
    there, back = (
        one if isinstance(one, DTensor) else DTensor.from_local(one, x.device_mesh, everywhere, run_check=False)
        for one in (index, inverse)
    )
    return _Permuted.apply(x, there, back, dim)


def _taken(x: Any, index: Tensor, inverse: Tensor, dim: int, name: str = "x") -> Tensor:
    """x in another order along a dimension, by index_select, whose gradient writes every element once."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {short(repr(type(x).__name__))}")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: expected a dimension of {name}, which has shape {[*x.shape]}, got {dim}")
    if x.shape[dim] != index.shape[0]:
        raise ValueError(f"{name}: expected {index.shape[0]} tokens along dim {dim}, got shape {[*x.shape]}")
    if x.device != index.device:
        raise ValueError(f"{name}: expected device {index.device} like the order, got {x.device}")
    return permuted(x, index, inverse, dim)
