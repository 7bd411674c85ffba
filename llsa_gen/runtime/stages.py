"""The stages of attention as operators of their own: pool, select from means, attend along given lists.

They share the launch lists of `attention`, which stays one operator. Gathered means (context parallel), a selection
that is used again and attention over disjoint keys build on them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llsa_gen.runtime.cpu import covered_tokens, token_means
    from llsa_gen.runtime.cpu_stages import attend_along, grad_along, select_means_torch
    from llsa_gen.runtime.launch_plan import empty_like, empty_outputs, named_views, plan_launches
    from llsa_gen.runtime.module import (
        BLOCKS,
        ENRICHED,
        GIVEN,
        LEVELS,
        OPERATOR,
        SPANS,
        forward_launches,
        grad_launches,
        saved_shapes,
    )
    from llsa_gen.runtime.passes import in_one_piece, on_device_of, runs_kernels, without_autocast, without_keys
    from llsa_gen.runtime.sizes import level_tokens

# ---- spliced into every module from here on


def pool(x: torch.Tensor) -> list[torch.Tensor]:
    """The means of every level of x [B, H, N, D], finest first, [B, H, T_l(N), D] each; differentiable."""
    return getattr(torch.ops.llsa, OPERATOR + "_pool")(x)


def select_means(q_means: Sequence[torch.Tensor], k_means: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The kept key tokens of each level, finest first, [B, H, T_l(M), width] int32, from `pool` of q and of k."""
    return getattr(torch.ops.llsa, OPERATOR + "_select_means")(list(q_means), list(k_means))


def attend_means(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_means: Sequence[torch.Tensor], v_means: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o [B, H, M, D] and lse [B, H, M] along given lists; differentiable in q, k, v and the means.

    The lists are [B, H, T_l(M), W], W at most the width that `select` gives, -1 for fewer. What a list below the
    coarsest level holds has to be a child of what the list above holds: nothing checks that. A query with nothing to
    attend to has o = 0, lse = -inf and zero gradients. Of the means, the enriched levels count. Gradients of the first
    order only, and nothing of torch.func.
    """
    run = getattr(torch.ops.llsa, OPERATOR + "_attend_means")
    return run(q, k, v, list(k_means), list(v_means), list(kept), scale)[:2]


# ---- pooling


def pooling_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of the pooling alone."""
    forward_launches(at, launch, scale, *tensors, stages=("pool",))


def pool_forward(x: torch.Tensor) -> list[torch.Tensor]:
    """`pool`, on whichever device x is: on a GPU as the queries of a call with one key."""
    if x.numel() == 0 or not runs_kernels(x):
        if x.numel() == 0:
            return empty_means(x)
        return [level.to(x.dtype).view(*x.shape[:2], -1, x.shape[3]) for level in token_means(x.flatten(0, 1))]
    with on_device_of(x):
        at, x, k, v = plan_launches((x, x[:, :, :1], x[:, :, :1]))
        memory = at.memory("selection")
        at.run(pooling_launches, (x, k, v, x, x, at.memory("saved"), memory))
        named = named_views(at, selection=memory)
        return [named[f"q_l{level}"].view(*x.shape[:2], -1, x.shape[3]).clone() for level in range(1, LEVELS + 1)]


def empty_means(x: torch.Tensor) -> list[torch.Tensor]:
    """What `pool` gives, not filled in."""
    return [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for tokens in level_tokens(x.shape[2])[1:]]


def save_length(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what `unpool` needs."""
    ctx.length = inputs[0].shape[2]


def unpool(ctx: Any, grads: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The gradient of what was pooled: of every mean, its part for each token covered."""
    total: Any = None
    dtype = torch.float32
    for level, grad in enumerate(grads, start=1):
        if grad is not None:
            of_token = grad.float() / covered_tokens(level, ctx.length, grad.device)[:, None]
            token = torch.arange(ctx.length, device=grad.device)
            rows = of_token.index_select(2, token // SPANS[level])
            total, dtype = rows if total is None else total + rows, grad.dtype
    return None if total is None else total.to(dtype)


# ---- selection


def selecting_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of the selection from means."""
    forward_launches(at, launch, scale, *tensors, stages=("select",))


def put(buffer: torch.Tensor, x: torch.Tensor) -> None:
    """Copy x [B, H, ...] to a buffer, [B, H, ...] or [B*H, ...]."""
    buffer.view(buffer.shape if buffer.ndim == x.ndim else x.shape).copy_(x)


def select_means_forward(q_means: list[torch.Tensor], k_means: list[torch.Tensor]) -> list[torch.Tensor]:
    """`select_means`, on whichever device they are. Lengths do not matter but by the tokens of level 1."""
    kept = empty_lists(q_means, k_means)
    if q_means[0].numel() == 0 or k_means[0].numel() == 0:
        return kept
    if not runs_kernels(q_means[0]):
        with without_autocast():
            return select_means_torch(kept, q_means, k_means)
    with on_device_of(q_means[0]):
        row = q_means[0].new_empty(q_means[0].shape[3])
        q, k = (
            row.expand(*x.shape[:2], x.shape[2] * SPANS[1], row.shape[0]) for x in (q_means[0], k_means[0])
        )  # fmt: skip
        at, *_ = plan_launches((q, k, k))
        saved, memory = at.memory("saved"), at.memory("selection")
        named = named_views(at, saved=saved, selection=memory)
        for level in range(1, LEVELS + 1):
            put(named[f"q_l{level}"], q_means[level - 1])
            put(named[f"k_l{level}"], k_means[level - 1])
            named[f"counts_l{level}"].zero_()
        at.run(selecting_launches, (q, k, k, row, row, saved, memory))
        return [named[f"kept_l{level}"].clone(memory_format=torch.contiguous_format) for level in range(1, LEVELS + 1)]


def empty_lists(q_means: list[torch.Tensor], k_means: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `select_means` gives, not filled in."""
    shapes = saved_shapes(q_means[0].shape[2] * SPANS[1], k_means[0].shape[2] * SPANS[1])
    lists = [shapes[f"kept_l{level}"] for level in range(1, LEVELS + 1)]
    return [q_means[0].new_empty((*q_means[0].shape[:2], *shape), dtype=torch.int32) for shape in lists]


# ---- lists that are given


def check_entries(kept: Sequence[torch.Tensor], n_tokens: int, ahead: int) -> None:
    """ValueError for an entry out of range, doubled in its row, or no child of what is kept one level above.

    The lists are those of queries before which the blocks begin by `ahead`. Nothing is seen where there are no data.
    """
    if torch.compiler.is_compiling():
        raise ValueError("check_kept: expected False under torch.compile, which cannot look at entries, got True")
    if any(torch._C._functorch.is_batchedtensor(lists) for lists in kept):  # type: ignore[attr-defined]
        raise ValueError("check_kept: expected False under torch.func.vmap, which cannot look at entries, got True")
    if kept[0].is_meta:
        return
    tokens = level_tokens(n_tokens)
    for level, lists in enumerate(kept, start=1):
        refuse(level, lists, (lists < -1) | (lists >= tokens[level]), f"-1 or a token from 0 to {tokens[level] - 1}")
        ranked, place = lists.sort(dim=-1, stable=True)
        again = torch.zeros_like(lists, dtype=torch.bool)
        again[..., 1:] = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)
        refuse(level, lists, torch.empty_like(again).scatter_(-1, place, again), "no token twice in a row")
        if level == LEVELS:
            return
        block = BLOCKS[level]
        row = torch.arange(lists.shape[2], device=lists.device) + ahead // SPANS[level]
        above = kept[level].index_select(2, row // block - ahead // SPANS[level + 1])
        parent, found = lists // block, lists < 0
        for column in above.unbind(-1):
            found |= parent == column[..., None]
        expected = f"a child, {block} each, of a token that its parent keeps at level {level + 1}"
        refuse(level, lists, ~found, expected, above)


def refuse(
    level: int, lists: torch.Tensor, wrong: torch.Tensor, expected: str, above: torch.Tensor | None = None
) -> None:
    """ValueError for the first entry that is wrong; `above`: what the parent of each row keeps, to be named."""
    for place in wrong.nonzero()[:1].tolist():
        batch, head, row, _ = place
        where, came = f"kept, level {level}, batch {batch}, head {head}, row {row}", int(lists[tuple(place)])
        named = "" if above is None else f", {sorted(x for x in above[batch, head, row].tolist() if x >= 0)}"
        raise ValueError(f"{where}: expected {expected}{named}, got {came}")


# ---- attention


def attending_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of attention alone."""
    forward_launches(at, launch, scale, *tensors, stages=("attend",))


def apart_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None:
    """The launches of the backward pass; no level hands its gradient down, for there are zeros among `at.extras`."""
    grad_launches(at, launch, scale, *tensors)


def gaps_last(kept: torch.Tensor) -> torch.Tensor:
    """A list with its -1 at the end, all else in its order."""
    return kept.gather(-1, (kept < 0).sort(dim=-1, stable=True).indices)


def attend_means_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_means: list[torch.Tensor], v_means: list[torch.Tensor],
    kept: list[torch.Tensor], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, memory of the layout `saved`: with it go the means and the lists."""
    if q.numel() == 0 or k.numel() == 0:
        return without_keys(q, k)
    o, lse, saved = empty_outputs(q, k)
    if not runs_kernels(q):
        saved.zero_()  # what nothing fills in
    named = named_views(None, (q, k), saved=saved)
    for level in range(1, LEVELS + 1):
        lists, counts = named[f"kept_l{level}"], named[f"counts_l{level}"]
        lists.fill_(-1)[..., : kept[level - 1].shape[3]].copy_(gaps_last(kept[level - 1]))
        counts.zero_()
        counts.scatter_add_(2, lists.clamp(min=0).flatten(2).long(), (lists >= 0).int().flatten(2))
        if level in ENRICHED:
            named[f"k_l{level}"].copy_(k_means[level - 1])
            named[f"v_l{level}"].copy_(v_means[level - 1])
    if not runs_kernels(q):
        with without_autocast():
            attend_along(o, lse, named, q, k, v, scale)
        return o, lse, saved
    with on_device_of(q):
        at, q, k, v = plan_launches((q, k, v), given=GIVEN)
        at.run(attending_launches, (q, k, v, o, lse, saved, at.memory("selection")), scale)
    return o, lse, saved


def attend_means_backward(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """dq, dk, dv, then the gradients of the means of k, every level, and those of the means of v."""
    means = [mean.zero_() for x in (k, v) for mean in empty_means(x)]
    if q.numel() == 0 or k.numel() == 0:
        return [*(empty_like(x).zero_() for x in (q, k, v)), *means]
    saved = in_one_piece(saved)
    if not runs_kernels(q):
        with without_autocast():
            return grad_along(means, grad_o, grad_lse, q, k, v, named_views(None, (q, k), saved=saved), scale)
    with on_device_of(q):
        of_lse = [] if grad_lse is None else [in_one_piece(grad_lse)]
        names = ("grad_lse", "zeros")[-1 - len(of_lse) :]
        at, q, k, v, grad_o = plan_launches((q, k, v, grad_o), names, given=GIVEN)
        grads, memory = [empty_like(x) for x in (q, k, v)], at.memory("gradients")
        zeros = k.new_zeros((*k.shape[:2], level_tokens(k.shape[2])[1], k.shape[3]), dtype=torch.float32)
        tensors = q, k, v, grad_o, in_one_piece(o), saved, *grads, memory, *of_lse, zeros
        at.run(apart_launches, tensors, scale)
        named = named_views(at, gradients=memory)
    for level in ENRICHED:  # of which the kernels have the part for each token covered
        covered = covered_tokens(level, k.shape[2], k.device)[:, None]
        for name, mean in (("k", means[level - 1]), ("v", means[LEVELS + level - 1])):
            mean.copy_(named[f"grad_{name}_l{level}"].view(mean.shape) * covered)
    return [*grads, *means]


def save_for_means(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what `differentiate_means` reads."""
    q, k, v, _, _, _, ctx.scale = inputs
    o, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(q, k, v, o, saved)


def differentiate_means(
    ctx: Any, grad_o: torch.Tensor | None, grad_lse: torch.Tensor | None, *_: object
) -> tuple[Any, ...]:
    """Gradients of what `attend_means` takes; lists have none."""
    if grad_o is None and grad_lse is None:
        return (None,) * 7
    q, k, v, o, saved = ctx.saved_tensors
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    run = getattr(torch.ops.llsa, OPERATOR + "_attend_means_backward")
    dq, dk, dv, *means = run(grad_o, grad_lse, q, k, v, o, saved, ctx.scale)
    return dq, dk, dv, means[:LEVELS], means[LEVELS:], [None] * LEVELS, None


def register_stages(library: torch.library.Library) -> None:
    """Make the stages known to torch, beside the operator."""
    qkv, name = "Tensor q, Tensor k, Tensor v", f"llsa::{OPERATOR}"

    def fake_backward(grad_o: torch.Tensor, grad_lse: torch.Tensor | None, *inputs: Any) -> list[torch.Tensor]:
        q, k, v, *_ = inputs
        return [*map(empty_like, (q, k, v)), *empty_means(k), *empty_means(v)]

    stages: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
        "_pool": ("(Tensor x) -> Tensor[]", pool_forward, empty_means),
        "_select_means": ("(Tensor[] q_means, Tensor[] k_means) -> Tensor[]", select_means_forward, empty_lists),
        "_attend_means": (
            f"({qkv}, Tensor[] k_means, Tensor[] v_means, Tensor[] kept, float scale) -> (Tensor, Tensor, Tensor)",
            attend_means_forward,
            lambda q, k, *_: empty_outputs(q, k),
        ),
        "_attend_means_backward": (
            f"(Tensor grad_o, Tensor? grad_lse, {qkv}, Tensor o, Tensor saved, float scale) -> Tensor[]",
            attend_means_backward,
            fake_backward,
        ),
    }
    for suffix, (schema, function, fake) in stages.items():
        library.define(f"{OPERATOR}{suffix}{schema}")
        library.impl(OPERATOR + suffix, function, "CPU")
        library.impl(OPERATOR + suffix, function, "CUDA")
        torch.library.register_fake(name + suffix, fake, lib=library)
    torch.library.register_autograd(name + "_pool", unpool, setup_context=save_length, lib=library)
    register = torch.library.register_autograd
    register(name + "_attend_means", differentiate_means, setup_context=save_for_means, lib=library)
