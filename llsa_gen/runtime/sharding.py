"""The operator over DTensors: which placements it takes, and how tensors come to them.

Batch and heads are independent of each other, so a process needs its own part of them and nothing else. What is sharded
in another way is brought to heads by torch's `redistribute`: of tokens, that is one all-to-all a tensor.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.module import OPERATOR

# ---- spliced into every module from here on

PLACEMENTS_KNOWN: list[bool] = []
"""Whether torch knows the operators' placements: what that imports, only those who have DTensors import anyway."""


def is_sharded(x: Any) -> bool:
    """Whether this is a DTensor, known without an import; of methods torch.compile says that they are not there."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def make_placements_known() -> None:
    """Register the placements of the operators with torch, once."""
    if not PLACEMENTS_KNOWN:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(getattr(torch.ops.llsa, OPERATOR).default)(placements_of_attention)
        register_sharding(getattr(torch.ops.llsa, OPERATOR + "_backward").default)(placements_of_gradients)
        PLACEMENTS_KNOWN.append(True)


# What torch.compiler.assume_constant_result sets, which imports all of torch._dynamo: it is called, not traced.
make_placements_known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def placements_of_attention(
    q: Any, k: Any, v: Any, scale: float, k_global: Any = None, v_global: Any = None, global_mask: Any = None,
    kept: Any = None,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """Of the outputs and of the inputs that are tensors: replicated, by batch, or by heads, which masks do not have."""
    return placements_alike(3, 0, (q, k, v), k_global, v_global, global_mask, kept)


def placements_of_gradients(
    grad_o: Any, grad_lse: Any, q: Any, k: Any, v: Any, o: Any, saved: Any, scale: float, k_global: Any = None,
    v_global: Any = None, global_mask: Any = None, kept: Any = None,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """The same for the backward pass, whose last two outputs hold nothing where there are no global tokens."""
    of_nothing = 2 if k_global is None else 0
    tensors = (grad_o, grad_lse, q, k, v, o, saved)
    return placements_alike(5 - of_nothing, of_nothing, tensors, k_global, v_global, global_mask, kept)


def placements_alike(
    outputs: int, of_nothing: int, tensors: Sequence[Any], k_global: Any, v_global: Any, global_mask: Any, kept: Any
) -> list[tuple[list[Any], list[Any]]]:
    """What each dimension of a mesh may do."""
    from torch.distributed.tensor import Replicate, Shard

    before = len([x for x in (*tensors, k_global, v_global) if x is not None])
    found: list[tuple[list[Any], list[Any]]] = []
    for place in (Replicate(), Shard(0), Shard(1)):
        of_mask = [] if global_mask is None else [Replicate() if place == Shard(1) else place]
        inputs = [place] * before + of_mask + [place] * len(kept or ())
        found.append(([place] * outputs + [Replicate()] * of_nothing, inputs))
    return found


def common_placements(tensors: dict[str, Any]) -> tuple[Any, ...]:
    """For each dimension of the mesh, the first placement by batch or heads that a tensor has; else by heads.

    Only where all are replicated they stay so.
    """
    from torch.distributed.tensor import Replicate, Shard

    places: list[Any] = []
    for own in zip(*(x.placements for x in tensors.values()), strict=True):
        place = Replicate() if all(one.is_replicate() for one in own) else Shard(1)
        for one in reversed(own):
            place = one if one.is_shard(0) or one.is_shard(1) else place
        places.append(place)
    return tuple(places)


def check_sharded(tensors: dict[str, Any]) -> None:
    """One clear error for a plain tensor among DTensors, and for two meshes."""
    (first, mesh), *_ = [(name, x.device_mesh) for name, x in tensors.items() if is_sharded(x)]
    for name, x in tensors.items():
        if not is_sharded(x):
            raise TypeError(
                f"{name}: expected a DTensor like {first}, got a plain tensor; distribute_tensor(x, mesh, placements) "
                "makes one of the whole tensor, DTensor.from_local of each process's part"
            )
        if x.device_mesh != mesh:
            raise ValueError(f"{name}: expected a DTensor on {mesh} like {first}, got one on {x.device_mesh}")


def redistributed(x: Any, places: tuple[Any, ...]) -> Any:
    """A DTensor with these placements. Also where it has them: so its gradient comes back with its own."""
    return x.redistribute(placements=places)


def place_alike(
    q: Any, k: Any, v: Any, k_global: Any = None, v_global: Any = None, global_mask: Any = None, kept: Any = None
) -> list[Any]:
    """DTensors, or None, in placements that the operator takes: torch's rules would find some, for one pass alone."""
    from torch.distributed.tensor import Replicate

    make_placements_known()
    named = {"q": q, "k": k, "v": v, "k_global": k_global, "v_global": v_global}
    named |= {f"kept, level {level}": lists for level, lists in enumerate(kept or (), start=1)}
    named = {name: x for name, x in named.items() if x is not None}
    check_sharded(named if global_mask is None else named | {"global_mask": global_mask})
    places = common_placements(named)
    of_mask = tuple(place if place.is_shard(0) else Replicate() for place in places)
    placed = [None if x is None else redistributed(x, places) for x in (q, k, v, k_global, v_global)]
    placed.append(None if global_mask is None else redistributed(global_mask, of_mask))
    return [*placed, None if kept is None else [redistributed(lists, places) for lists in kept]]


def select_sharded(q: Any, k: Any) -> list[Any]:
    """The selection, placed as queries and keys come to be: torch has no rules for an operator that gives a list."""
    from torch.distributed.tensor import DTensor

    check_sharded({"q": q, "k": k})
    places = common_placements({"q": q, "k": k})
    run = getattr(torch.ops.llsa, OPERATOR + "_select")
    found: list[Any] = []
    for lists in run(*(redistributed(x, places).to_local() for x in (q, k))):
        shape = torch.Size((*q.shape[:2], *lists.shape[2:]))
        stride = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        found.append(DTensor.from_local(lists, q.device_mesh, places, shape=shape, stride=stride))
    return found
