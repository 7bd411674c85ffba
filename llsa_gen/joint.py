"""Attention over several sets of keys: `merge` makes one of what was attended apart.

`joint_attention` attends over text and image in one sequence.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["joint_attention", "merge"]


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys together, from those over disjoint parts of them: exact, and differentiable.

        lse = log sum_n exp(lse_n)        o = sum_n exp(lse_n - lse) o_n

    A part with an lse of -inf (no keys) takes no part in that query, whatever its o holds, and gets no gradient there.
    A query that has no other has o = 0 and lse = -inf. Sums are float32, or float64 if a part is.

    Args:
        parts: one or more of (o, lse), as `attention(..., return_lse=True)` gives them: o [B, H, M, D] and lse
            [B, H, M], all of the same shapes and on one device. Either gradient may be missing.

    Returns:
        o [B, H, M, D] in the dtype of the first o, and lse [B, H, M], float32 or float64.

    Raises:
        TypeError, ValueError: naming the part, what came and what was expected.
    """
    _check(parts)
    wide = torch.float64 if any(x.dtype == torch.float64 for part in parts for x in part) else torch.float32
    present = torch.stack([lse != float("-inf") for _, lse in parts])
    anything = present.any(0)
    # where all are -inf, differences of them would be no numbers: 0 stands for them, and is thrown away at the end
    lse = torch.stack([lse.to(wide) for _, lse in parts]).masked_fill(~anything, 0.0)
    total = lse.logsumexp(0)
    weight = lse.softmax(0).masked_fill(~present, 0.0)  # not exp(lse - total), for total is rounded
    merged: Tensor | None = None
    for number, (o, _) in enumerate(parts):
        part = weight[number][..., None] * o.to(wide).masked_fill(~present[number][..., None], 0.0)
        merged = part if merged is None else merged + part
    assert merged is not None  # `_check` wants a part
    return merged.to(parts[0][0].dtype), total.masked_fill(~anything, float("-inf"))


def joint_attention(
    attention: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    globals_first: int = 0,
    globals_last: int = 0,
    global_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Text and image in one sequence: image tokens attend sparsely and to all text, text tokens to everything.

    The N image queries attend by `attention` over the N image keys, with the T text tokens as globals: blocks begin at
    the first image token, and text is neither pooled nor selected. The T text queries attend densely to all T + N
    tokens, by torch's scaled_dot_product_attention, without a mask unless one is given. Differentiable in q, k and v.

    Args:
        attention: what `compile` gives, or the function `attention` of an exported module.
        q, k, v: [B, H, T + N, D], of one shape, dtype and device: `globals_first` text tokens, the image, then
            `globals_last` text tokens. Either of T and N may be 0.
        globals_first, globals_last: how many text tokens there are before and after the image; T is their sum.
        global_mask: bool [B, T], True where a text token takes part; first the first ones, then the last ones. The
            others are seen by nobody and may hold anything, NaN too; their rows of o and all their gradients are 0.
        scale: the factor of the logits, 1/sqrt(D) unless given.

    Returns:
        o [B, H, T + N, D], in the order of the input. The image's rows, and the gradients that come from them, are
        bitwise reproducible, as those of `attention` are; the text's are as far as torch's dense attention is.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    first, last = _tokens("globals_first", globals_first), _tokens("globals_last", globals_last)
    _check_sequence(q, k, v, first, last)
    text = first + last
    _check_mask(global_mask, q, text)
    if text == 0:
        return attention(q, k, v, scale=scale)
    sizes = [first, q.shape[2] - text, last]
    parts = [x.split(sizes, 2) for x in (q, k, v)]
    sees: Tensor | None = None
    if global_mask is not None:
        masks = global_mask.split([first, last], 1)
        parts = [(_present(a, masks[0]), image, _present(b, masks[1])) for a, image, b in parts]
        k, v = (torch.cat(x, 2) for x in parts[1:])
        image_mask = global_mask.new_ones((1, 1)).expand(q.shape[0], sizes[1])
        taking_part = torch.cat([masks[0], image_mask, masks[1]], 1)
        # where nobody takes part all do, for a row without keys is no number: none of their rows is used
        sees = (taking_part | ~taking_part.any(1, keepdim=True))[:, None, None]

    (q_first, q_image, q_last), *keys_and_values = parts
    o_text = torch.nn.functional.scaled_dot_product_attention(
        _together(q_first, q_last, first, last), k, v, attn_mask=sees, scale=scale
    )
    if global_mask is not None:
        o_text = _present(o_text, global_mask)
    compiling = torch.compiler.is_compiling()  # then nothing may ask for lengths, and an image of no tokens is fine too
    if not compiling and sizes[1] == 0:
        return o_text
    (k_image, k_global), (v_image, v_global) = (
        (image, _together(a, b, first, last)) for a, image, b in keys_and_values
    )  # fmt: skip
    o_image = attention(
        q_image, k_image, v_image, scale=scale, k_global=k_global, v_global=v_global, global_mask=global_mask
    )
    o_first, o_last = o_text.split([first, last], 2)
    return torch.cat([o_first, o_image, o_last], 2)


def _together(first: Tensor, last: Tensor, n_first: int, n_last: int) -> Tensor:
    """The text tokens, copied only if there are some on both sides."""
    if n_last == 0:
        return first
    return last if n_first == 0 else torch.cat([first, last], 2)


def _present(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, H, T, D] with zeros in place of what takes no part."""
    return x.masked_fill(~mask[:, None, :, None], 0.0)


def _tokens(name: str, count: Any) -> Any:
    """A number of tokens, or what is wrong with it."""
    if not isinstance(count, torch.SymInt):  # a symbol is an integer
        try:
            if isinstance(count, bool):
                raise TypeError
            count = operator.index(count)
        except TypeError:
            raise TypeError(f"{name}: expected an integer of at least 0, got {type(count).__name__}") from None
    if count < 0:
        raise ValueError(f"{name}: expected an integer of at least 0, got {count}")
    return count


def _check_sequence(q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor [B, H, T + N, D], got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, H, T + N, D], got shape {[*x.shape]}")
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected shape {[*q.shape]} like q, got {[*x.shape]}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q, got {x.device}")
    if not torch.compiler.is_compiling() and first + last > q.shape[2]:
        raise ValueError(
            f"globals_first, globals_last: expected together at most {q.shape[2]} tokens, got {first} and {last}"
        )


def _check_mask(mask: Tensor | None, q: Tensor, text: int) -> None:
    if mask is None:
        return
    expected = "expected a bool tensor [B, T], True where a text token takes part"
    if not isinstance(mask, Tensor):
        raise TypeError(f"global_mask: {expected}, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"global_mask: {expected}, got {mask.dtype}")
    if mask.ndim != 2 or [*mask.shape] != [q.shape[0], text]:
        raise ValueError(f"global_mask: {expected}, here {[q.shape[0], text]}, got {[*mask.shape]}")
    if mask.device != q.device:
        raise ValueError(f"global_mask: expected device {q.device} like q, got {mask.device}")


def _check(parts: tuple[tuple[Tensor, Tensor], ...]) -> None:
    if not parts:
        raise ValueError("merge: expected one or more of (o, lse), got none")
    for number, part in enumerate(parts):
        where = f"merge, part {number}"
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise TypeError(f"{where}: expected a pair of tensors (o, lse), got {type(part).__name__}")
        (o, lse), first = part, parts[0][0]
        if not (o.is_floating_point() and lse.is_floating_point()):
            raise TypeError(f"{where}: expected floating dtypes, got {o.dtype} and {lse.dtype}")
        if o.ndim != 4 or o.shape != first.shape or lse.shape != o.shape[:3]:
            shapes = [[*first.shape], [*first.shape[:3]]] if first.ndim == 4 else ["[B, H, M, D]", "[B, H, M]"]
            raise ValueError(
                f"{where}: expected o {shapes[0]} and lse {shapes[1]}, got {[*o.shape]} and {[*lse.shape]}"
            )
        if not o.device == lse.device == first.device:
            raise ValueError(f"{where}: expected tensors on {first.device}, got {o.device} and {lse.device}")
