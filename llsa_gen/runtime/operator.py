"""Registration with torch, and what a user calls."""

import ast
import itertools
import linecache
import math
import numbers
import operator as python_operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from llsa_gen.runtime.guards import MANY_HEADS, check_layout, look_at_layout
    from llsa_gen.runtime.launch_plan import empty_like, empty_outputs, empty_selection
    from llsa_gen.runtime.module import (
        BLOCKS,
        DTYPES,
        HEAD_DIM,
        LEVELS,
        MAX_SCALE,
        MAX_TOKENS,
        OPERATOR,
        SPANS,
        SPEC,
        flops,
    )
    from llsa_gen.runtime.passes import (
        attend_eagerly,
        differentiate,
        five_gradients,
        forward,
        in_five,
        is_plain,
        is_transformed,
        operator,
        present,
        save_for_backward,
        select_forward,
    )
    from llsa_gen.runtime.sharding import (
        common_placements,
        is_sharded,
        place_alike,
        redistributed,
        select_sharded,
    )
    from llsa_gen.runtime.stages import check_entries, register_stages
    from llsa_gen.runtime.transforms import AttendTransformed, select_batched

# ---- spliced into every module from here on


def register() -> torch.library.Library | None:
    """Make the operators known to torch, once a process: their name carries the hash of this text.

    Raises RuntimeError if another text has taken it: one of the two was edited, and not only in header and comments.
    """
    source = "".join(linecache.getlines(__file__, globals()))
    if hasattr(torch.ops.llsa, OPERATOR):
        taken = getattr(torch.ops.llsa, OPERATOR)
        if meaning(taken.source) != meaning(source):
            raise RuntimeError(
                f"{OPERATOR}: expected one text under this name, got another in {__file__}; the first is {taken.file}. "
                "A module that was edited needs an OPERATOR of its own"
            )
        return None
    library = torch.library.Library("llsa", "FRAGMENT")
    more = "Tensor? k_global=None, Tensor? v_global=None, Tensor? global_mask=None, Tensor[]? kept=None"
    library.define(f"{OPERATOR}(Tensor q, Tensor k, Tensor v, float scale, {more}) -> (Tensor, Tensor, Tensor)")
    library.define(
        f"{OPERATOR}_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor saved,"
        f" float scale, {more}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(f"{OPERATOR}_select(Tensor q, Tensor k) -> Tensor[]")
    for suffix, function in (("", forward), ("_backward", five_gradients), ("_select", select_forward)):
        library.impl(OPERATOR + suffix, function, "CPU")
        library.impl(OPERATOR + suffix, function, "CUDA")

    def fake_backward(
        grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        o: torch.Tensor, saved: torch.Tensor, scale: float, k_global: torch.Tensor | None = None,
        v_global: torch.Tensor | None = None, *_: object, **__: object,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        return in_five(q, [*map(empty_like, present(q, k, v, k_global, v_global))])

    name = f"llsa::{OPERATOR}"
    torch.library.register_fake(name, lambda q, k, *_, **__: empty_outputs(q, k), lib=library)
    torch.library.register_fake(name + "_backward", fake_backward, lib=library)
    torch.library.register_fake(name + "_select", empty_selection, lib=library)
    torch.library.register_autograd(name, differentiate, setup_context=save_for_backward, lib=library)
    torch.library.register_vmap(name + "_select", select_batched, lib=library)

    register_stages(library)

    def count(q: Sequence[int], k: Sequence[int], k_global: Sequence[int] | None = None) -> Sequence[int]:
        return flops(q[0] * q[1], k[0] * k[1], q[2], k[2], *(k_global or ())[2:3])

    def of_attention(
        q: Sequence[int], k: Sequence[int], v: object, scale: object, k_global: Sequence[int] | None = None,
        v_global: object = None, global_mask: object = None, kept: object = None, **_: object,
    ) -> int:  # fmt: skip
        counted = count(q, k, k_global)
        return counted[0] if kept is None else counted[0] - counted[3]

    def of_gradients(
        grad_o: object, grad_lse: object, q: Sequence[int], k: Sequence[int], v: object, o: object, saved: object,
        scale: object, k_global: Sequence[int] | None = None, *_: object, **__: object,
    ) -> int:  # fmt: skip
        return count(q, k, k_global)[1]

    operators = [getattr(torch.ops.llsa, OPERATOR + suffix) for suffix in ("", "_backward", "_select")]
    register_flop_formula(operators[0])(of_attention)
    register_flop_formula(operators[1])(of_gradients)
    register_flop_formula(operators[2])(lambda q, k, **__: count(q, k)[2])
    operators[0].source, operators[0].file = source, __file__
    return library


def meaning(source: str) -> str:
    """What a module's text means to Python: all but comments, the header, and the description in SPEC."""
    _, *body = ast.parse(source).body
    for statement in body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "SPEC":
            statement.value = ast.Constant(ast.literal_eval(statement.value) | {"description": ""})
    return ast.dump(ast.Module(body, []))


def may_be_dual() -> bool:
    """Whether tensors may carry forward-mode tangents: not outside all of torch's levels of those."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def check(tensors: dict[str, torch.Tensor], second: str = "k", tokens: str = "N") -> None:
    """One clear error for tensors that the operator does not take: queries first, then keys, and values like them.

    The keys are `second`; of keys and values there are `tokens`.
    """
    first, q = next(iter(tensors.items()))
    dual = may_be_dual() and not torch.compiler.is_compiling()
    like: Any = None
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor [B, H, {tokens}, {HEAD_DIM.value}], got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}{', nested' * x.is_nested}")
        shape, dtype, device = x.shape, x.dtype, x.device
        if x is q:
            like = shape, dtype, device
        if len(shape) != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [B, H, {tokens}, {HEAD_DIM.value}], got shape {list(shape)}"
            )
        if shape[3] != HEAD_DIM.value:
            raise ValueError(f"{name}: expected head dim {HEAD_DIM.value}, got {shape[3]} in shape {list(shape)}")
        if dtype not in DTYPES:
            raise TypeError(f"{name}: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
        batch, heads, queries, head_dim = like[0]
        if shape[0] != batch or shape[1] != heads:  # lengths may differ, and nothing may ask whether they do
            raise ValueError(
                f"{name}: expected [{batch}, {heads}, {tokens}, {head_dim}] like {first}, got {list(shape)}"
            )
        if dtype != like[1]:
            raise TypeError(f"{name}: expected {like[1]} like {first}, got {dtype}")
        if device != like[2]:
            raise ValueError(f"{name}: expected device {like[2]} like {first}, got {device}")
        if dual and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: forward-mode derivatives are not available, got a dual tensor")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{first}: expected a tensor on the CPU, a GPU (cuda) or meta, got device {q.device}")
    of_keys = tensors[second].shape
    if shape != of_keys:  # of the last, v
        raise ValueError(f"{name}: expected shape {list(of_keys)} like {second}, got {list(shape)}")
    # a bound of dynamic lengths would be a guard
    if not torch.compiler.is_compiling() and (queries > MAX_TOKENS or of_keys[2] > MAX_TOKENS):
        name, came = (first, f"M = {queries}") if queries > MAX_TOKENS else (second, f"{tokens} = {of_keys[2]}")
        raise ValueError(
            f"{name}: expected at most {MAX_TOKENS} tokens, got {came} in shape {list(tensors[name].shape)}"
        )


def check_globals(q: torch.Tensor, k_global: Any, v_global: Any, global_mask: Any) -> None:
    """The same for what all queries attend to."""
    if k_global is None or v_global is None:
        given = {"k_global": k_global, "v_global": v_global, "global_mask": global_mask}
        came = " and ".join(name for name, x in given.items() if x is not None)
        raise ValueError(f"k_global, v_global: expected both or neither, got {came} alone")
    check({"q": q, "k_global": k_global, "v_global": v_global}, "k_global", "G")
    if global_mask is None:
        return
    expected = "expected a bool tensor [B, G], True where a token takes part"
    if not isinstance(global_mask, torch.Tensor):
        raise TypeError(f"global_mask: {expected}, got {type(global_mask).__name__}")
    if global_mask.dtype != torch.bool or global_mask.layout is not torch.strided or global_mask.is_nested:
        raise TypeError(f"global_mask: {expected}, got {global_mask.dtype}, layout {global_mask.layout}")
    shape = [k_global.shape[0], k_global.shape[2]]
    if global_mask.ndim != 2 or list(global_mask.shape) != shape:
        raise ValueError(f"global_mask: {expected}, here {shape}, got {list(global_mask.shape)}")
    if global_mask.device != q.device:
        raise ValueError(f"global_mask: expected device {q.device} like q, got {global_mask.device}")


def lists_of(kept: Any, q: torch.Tensor, k: torch.Tensor, ahead: Any, look: bool) -> list[torch.Tensor]:
    """Given lists for queries with `ahead` rows before them: one clear error, of their entries too if it has to look.

    The query tokens of those rows alone keep what zeros select, so that sums have the order of the plain call.
    """
    if not isinstance(kept, list | tuple):
        raise TypeError(f"kept: expected {LEVELS} tensors, one a level, finest first, got {type(kept).__name__}")
    if len(kept) != LEVELS:
        raise ValueError(f"kept: expected {LEVELS} tensors, one a level, finest first, got {len(kept)}")
    compiling = torch.compiler.is_compiling()  # then nothing may ask for lengths
    batch, heads, queries, _ = q.shape
    whole: list[torch.Tensor] = []
    for level, lists in enumerate(kept, start=1):
        name, most = f"kept, level {level}", SPEC["levels"][level - 1]["topk"]
        if not isinstance(lists, torch.Tensor):
            raise TypeError(f"{name}: expected an int32 tensor, got {type(lists).__name__}")
        if lists.dtype != torch.int32 or lists.layout is not torch.strided or lists.is_nested:
            raise TypeError(f"{name}: expected a dense int32 tensor, got {lists.dtype}, layout {lists.layout}")
        if lists.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q, got {lists.device}")
        before = 0 if ahead is None else ahead // SPANS[level]
        shape, fits = lists.shape, lists.ndim == 4 and lists.shape[0] == batch and lists.shape[1] == heads
        if fits and not compiling:
            fits = (
                shape[2] == -(-queries // SPANS[level]) - before and (0 if k.shape[2] == 0 else 1) <= shape[3] <= most
            )
        if not fits:
            rows = "T_l(M)" if compiling else -(-queries // SPANS[level]) - before
            raise ValueError(f"{name}: expected [{batch}, {heads}, {rows}, 1 to {most}], got {list(shape)}")
        pads = ahead is not None if compiling else before > 0
        whole.append(torch.cat([first_tokens(lists, before, level, k), lists], 2) if pads else lists)
    if look:
        check_entries([x.full_tensor() if is_sharded(x) else x for x in kept], k.shape[2], ahead or 0)
    return whole


def first_tokens(lists: torch.Tensor, rows: Any, level: int, k: torch.Tensor) -> torch.Tensor:
    """What query tokens select whose scores are all equal, as `rows` more of the lists: the first tokens of a level."""
    token = lists.new_ones(lists.shape[3]).cumsum(0, dtype=lists.dtype) - 1  # on a mesh, if the lists are
    token = token.masked_fill(token * SPANS[level] >= k.shape[2], -1)
    return token.expand(lists.shape[0], lists.shape[1], rows, lists.shape[3])


def autocast(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tensors in the dtype of torch.autocast where that is on, as torch's own attention takes them."""
    if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
        return tensors
    return [autocast_one(x) for x in tensors]


def autocast_one(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype of torch.autocast on its device."""
    takes_part = isinstance(x, torch.Tensor) and x.dtype in DTYPES and x.device.type in ("cpu", "cuda")
    if takes_part and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    query_offset: int = 0,
    k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
    check_kept: bool = False,
    layout: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-linear sparse attention of q [B, H, M, D] over k, v [B, H, N, D]: o [B, H, M, D], differentiable.

    Lengths may differ, and either may be 0; nothing is assumed of where queries stand among the keys.
    Queries are cut into blocks as if the first were token `query_offset` of a sequence: a shard's as in the whole.
    Any strides; float32, float16 or bfloat16, on a GPU or the CPU; under torch.autocast in its dtype. The logits are
    `scale` * q.k, 1/sqrt(D) unless given. With return_lse also the natural logarithm of the sum of weights, [B, H, M]
    float32, differentiable too.
    Every query also attends to k_global, v_global [B, H, G, D], differentiable too, where global_mask [B, G] is True.
    With `kept`, lists as `select` gives them, int32 [B, H, T_l(M), 1 to K_l], finest first, -1 for none, nothing is
    selected. Their entries are trusted, unless check_kept has them looked at, which waits for the GPU.
    What looks like [B, N, H, D] is warned of once; layout="BHND" says that it is not, and is the only layout.
    """
    if layout is not None:
        check_layout(layout)
    q, k, v = autocast(q, k, v)
    check({"q": q, "k": k, "v": v})
    if scale is None:
        scale = HEAD_DIM.value**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    elif not abs(scale) <= MAX_SCALE:  # nor NaN
        came = "a larger one" if isinstance(scale, int) else scale  # which may have thousands of digits
        raise ValueError(f"scale: expected a number from -{MAX_SCALE} to {MAX_SCALE}, got {came}")
    if k_global is not None or v_global is not None or global_mask is not None:
        k_global, v_global = autocast(k_global, v_global)  # type: ignore[arg-type]
        check_globals(q, k_global, v_global, global_mask)
    ahead = None
    if type(query_offset) is not int or query_offset != 0:  # as nearly always: not even a call is made then
        q, ahead = with_rows_ahead(q, query_offset)
    if kept is not None:
        kept = lists_of(kept, q, k, ahead, check_kept)
    more: tuple[Any, ...] = ()
    if k_global is not None or kept is not None:
        more = k_global, v_global, global_mask, kept
    if is_plain(q, k, v, *present(*more)) if more else is_plain(q, k, v):
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if more and torch.is_grad_enabled():
            needs_grad = needs_grad or any(x.requires_grad for x in present(*more[:2]))
        run = attend_eagerly if needs_grad else forward
        if k.shape[1] > MANY_HEADS and layout is None:
            look_at_layout(q, k)
    else:
        if any(is_sharded(x) for x in (q, k, v, *present(*more))):
            q, k, v, *placed = place_alike(q, k, v, *more)
            more = tuple(placed) if more else ()
        run = AttendTransformed.apply if is_transformed() else getattr(torch.ops.llsa, OPERATOR)
    o, lse, _ = run(q, k, v, float(scale), *more)  # type: ignore[arg-type]
    if ahead is not None:
        o, lse = o[:, :, ahead:], lse[:, :, ahead:]
    return (o, lse) if return_lse else o


def select(q: torch.Tensor, k: torch.Tensor, *, query_offset: int = 0) -> tuple[torch.Tensor, ...]:
    """What `attention` selects: a level, finest first, [B, H, T_l(M), width] int32 kept key tokens, -1 where fewer."""
    q, k = autocast(q, k)
    check({"q": q, "k": k})
    q, ahead = with_rows_ahead(q, query_offset)
    if not type(q) is type(k) is torch.Tensor and (is_sharded(q) or is_sharded(k)):
        kept = select_sharded(q, k)
    else:
        kept = operator("_select", select_forward, q, k)(q, k)
    if ahead is None:
        return tuple(kept)
    return tuple(lists[:, :, ahead // span :] for lists, span in zip(kept, SPANS[1:], strict=True))


def with_rows_ahead(q: torch.Tensor, query_offset: Any) -> tuple[torch.Tensor, Any]:
    """The queries with rows of zeros before them, which cut them into blocks as if the first were token `query_offset`.

    And how many rows, or None. The first block's mean is then a fraction of the mean over what there is of it: the same
    scores but for that factor, and for what rounding the fraction in place of the mean makes of them.
    """
    if type(query_offset) is int and query_offset == 0:
        return q, None
    ahead: Any
    if isinstance(query_offset, torch.SymInt) or torch.compiler.is_compiling():  # nothing may depend on lengths
        if not isinstance(query_offset, int | torch.SymInt) or isinstance(query_offset, bool) or query_offset < 0:
            raise ValueError("query_offset: expected an integer of at least 0")
        ahead = query_offset % math.prod(BLOCKS)
    else:
        queries = q.shape[2]
        ahead = rows_ahead(query_offset, queries)
        if ahead == 0:
            return q, None
        if ahead + queries > MAX_TOKENS:
            came = f"{ahead} before the first query, and M = {queries}"
            raise ValueError(f"query_offset: expected {MAX_TOKENS} tokens at most from a coarsest block on, got {came}")
    if is_sharded(q):  # tokens that lie apart would be gathered
        q = redistributed(q, common_placements({"q": q}))
    return torch.nn.functional.pad(q, (0, 0, ahead, 0)), ahead


def rows_ahead(query_offset: Any, queries: int) -> int:
    """How far before the queries the blocks begin that they are cut by: of levels where all are in one block, none."""
    try:
        offset = python_operator.index(query_offset)
    except TypeError:
        offset = None
    if offset is None or isinstance(query_offset, bool):
        raise TypeError(f"query_offset: expected an integer, got {type(query_offset).__name__}")
    if offset < 0:
        raise ValueError("query_offset: expected an integer of at least 0, got a negative one")
    ahead = 0
    for span in itertools.accumulate(BLOCKS, lambda a, b: a * b) if queries else ():
        ahead = offset % span
        if ahead + queries <= span:  # so they are at every coarser level, whatever comes before
            return 0 if span == BLOCKS[0] else ahead
    return ahead
