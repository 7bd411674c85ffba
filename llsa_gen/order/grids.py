"""Orders of grids, `grid`: made once for each shape, blocks and device, and kept; and how compact they are."""

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from llsa_gen.errors import short
from llsa_gen.forks import Lock
from llsa_gen.order.cut import compact
from llsa_gen.order.measure import Compactness, measure
from llsa_gen.order.sequence import Order
from llsa_gen.spec import Spec, load

__all__ = ["compactness", "grid"]

MAX_TOKENS = 1 << 30
KEPT_TOKENS = 1 << 24
"""Tokens of all orders that are kept, 16 bytes each; the least recently used ones go. The last one always stays."""

Blocks = Spec | Mapping[str, Any] | str | PathLike[str] | Sequence[int]

_kept: "OrderedDict[tuple[tuple[int, ...], tuple[int, ...], torch.device], Order]" = OrderedDict()
_lock = Lock()


def grid(shape: int | Sequence[int], blocks: Blocks, *, device: torch.device | str | int | None = None) -> Order:
    """The order of a grid's cells in which the blocks of every level are as compact as the grid allows.

    Cells are counted in raster order, the last axis fastest, as `x.flatten()` does. No block crosses a border into the
    next row. Any sizes; a size that the blocks do not divide makes some blocks ragged, none short but the last. The
    same tensors come again for the same arguments: do not write into them. In `torch.compile` and `torch.export` the
    shape may be symbolic; then the order is made by an operator, `llsa_gen::grid_order`.

    Args:
        shape: sizes of the grid, such as (height, width) or (frames, height, width): 1 or more integers, N in all.
        blocks: a spec, or what `llsa_gen.load` takes; or its blocks alone, the finest first, such as (16, 16).
        device: where the order is to be; torch's default device unless given.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `load` raises for a spec.
    """
    spans = _spans(blocks)
    sizes = _sizes(shape)
    if torch.compiler.is_compiling():
        where = torch.get_default_device() if device is None else torch.device(device)
        return Order(*torch.ops.llsa_gen.grid_order(sizes, spans, where))
    try:
        where = torch.empty(0, device=device).device  # with its index
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"device: expected a device of torch, got {short(repr(device))}") from None
    return _order(tuple(sizes), tuple(spans), where)


def compactness(order: Order, shape: int | Sequence[int], blocks: Blocks) -> tuple[Compactness, ...]:
    """How compact the blocks of every level are, the finest first, in any order of a grid's cells.

    Raises TypeError or ValueError as `grid` does, and if the order is of another number of cells, or of none.
    """
    sizes, spans = _sizes(shape), _spans(blocks)
    if not isinstance(order, Order):
        raise TypeError(f"order: expected an llsa_gen.order.Order, got {type(order).__name__}")
    if len(order) != math.prod(sizes) or not len(order):
        raise ValueError(f"order: expected one of {math.prod(sizes)} cells, at least 1, got one of {len(order)}")
    return measure(order.permutation.cpu().numpy(), tuple(sizes), tuple(spans))


def _order(shape: tuple[int, ...], spans: tuple[int, ...], device: torch.device) -> Order:
    """From what is kept, or made. Two threads may make the same; the first to end is who everybody gets it from."""
    spans = tuple(span for span in spans if span < math.prod(shape))  # the others make no difference
    key = (shape, spans, device)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    if device.type == "cpu":
        with torch.inference_mode(False), torch.device("cpu"):
            permutation = torch.from_numpy(compact(shape, spans))
            inverse = torch.empty_like(permutation)
            inverse[permutation] = torch.arange(len(permutation))
            made = Order(permutation, inverse)
    else:
        with torch.inference_mode(False):
            made = _order(shape, spans, torch.device("cpu")).to(device)
    if type(made.inverse) is not Tensor:  # a mode is at work that makes other tensors than real ones
        return made
    with _lock:
        kept = _kept.setdefault(key, made)
        _kept.move_to_end(key)
        while len(_kept) > 1 and sum(map(len, _kept.values())) > KEPT_TOKENS:
            _kept.popitem(last=False)
    return kept


@torch.library.custom_op("llsa_gen::grid_order", mutates_args=())
def _grid_order(shape: Sequence[int], spans: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies, for a compiler may reuse the memory of what it gets."""
    made = _order(tuple(shape), tuple(spans), torch.empty(0, device=device).device)
    return made.permutation.clone(), made.inverse.clone()


@_grid_order.register_fake
def _(shape: Sequence[int], spans: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    permutation = torch.empty(math.prod(shape), dtype=torch.int64, device=device)
    return permutation, torch.empty_like(permutation)


def _spans(blocks: Any) -> list[int]:
    """P_1, P_2, ... of a spec or of blocks."""
    if isinstance(blocks, Spec):
        return [blocks.span(level) for level in range(1, blocks.num_levels + 1)]
    if isinstance(blocks, Mapping | str | PathLike):
        return _spans(load(blocks))
    expected = "blocks: expected a spec, or its blocks, 1 or more integers of at least 2"
    if isinstance(blocks, int) or not isinstance(blocks, Sequence):
        raise TypeError(f"{expected}, got {type(blocks).__name__}")
    found = _integers(blocks, expected, 2)
    return [math.prod(found[: level + 1]) for level in range(len(found))]


def _sizes(shape: Any) -> list[int]:
    expected = "shape: expected 1 or more integers of at least 0, such as (height, width)"
    if isinstance(shape, int | torch.SymInt) and not isinstance(shape, bool):
        shape = (shape,)
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{expected}, got {type(shape).__name__}")
    sizes = _integers(shape, expected, 0)
    if not torch.compiler.is_compiling() and math.prod(sizes) > MAX_TOKENS:
        raise ValueError(f"shape: expected at most {MAX_TOKENS} cells, got {sizes}")
    return sizes


def _integers(values: Sequence[Any], expected: str, least: int) -> list[Any]:
    if not len(values):
        raise ValueError(f"{expected}, got none")
    found = []
    for value in values:
        if not isinstance(value, torch.SymInt):
            try:
                if isinstance(value, bool):
                    raise TypeError
                value = operator.index(value)
            except TypeError:
                raise TypeError(f"{expected}, got {short(repr(value))} among them") from None
        if value < least:
            raise ValueError(f"{expected}, got {value} among them")
        found.append(value)
    return found
