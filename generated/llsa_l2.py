"""Log-linear sparse attention compiled from the spec `llsa_l2`: attention(q, k, v) and select(q, k).

Made by llsa_gen 0.1.0 from spec a53f1c088dc45f5e; do not edit: `llsa-gen export llsa_l2` makes it again.

    level   block b_l      span P_l   Top-K K_l   attended
        2          16           256           8   every token
        1          16            16           8   children of the tokens kept at level 2
        0           -             1           -   tokens of the blocks kept at level 1

Names: a token of level l pools b_l tokens of the level below and covers P_l = b_1 ... b_l tokens of the sequence, fewer
at its end; there are T_l(M) = ceil(M / P_l) of M queries and T_l(N) of N keys. Each query token of a level keeps at most K_l
key tokens of that level.
"""

import ast
import contextlib
import ctypes
import functools
import itertools
import linecache
import math
import numbers
import operator as python_operator
import os
import struct
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

SPEC = {
    "description": "Two enriched levels of 16.",
    "enrich": [1, 2],
    "head_dim": 64,
    "levels": [{"block": 16, "topk": 8}, {"block": 16, "topk": 8}],
    "name": "llsa_l2",
    "reweight": True,
}
OPERATOR = "llsa_l2_994f3f1c0f460ffa"  # in torch.ops.llsa: the name of the spec and the hash of what runs here
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on CPU tensors, in Python
DTYPES = torch.float32, torch.float16, torch.bfloat16
MAX_SCALE = 2.3e38  # times log2(e), the largest float32
MAX_TOKENS = 1073741824  # of queries or keys: tokens and the entries of index lists are counted in 32 bits

HEAD_DIM = tl.constexpr(64)  # D
PAD_DIM = tl.constexpr(64)  # columns of a tile: D rounded up to a power of two, at least 16
ROW_UNIT = tl.constexpr(8)  # rows of q, k, v and of the gradient of o begin at multiples of so many elements
BLOCK_1 = tl.constexpr(16)  # b_1
BLOCK_2 = tl.constexpr(16)  # b_2
SPAN_1 = tl.constexpr(16)  # P_1
SPAN_2 = tl.constexpr(256)  # P_2
LOG2E = tl.constexpr(1.4426950408889634)  # the softmax works in base 2
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # a running maximum before the first key: below all logits, and finite, so that differences are numbers
EMPTY = tl.constexpr(-(2**63))  # the rank of no token at all

# What differs from call to call: Triton makes no kernel of its own where one of these is 1 or a multiple of 16.
UNSPECIALISED = [
    "heads_per_batch", "heads", "m_tokens", "n_tokens", "saved_step", "g_tokens", "part_l1", "rows_global",
    "splits_global", "rows_l2", "splits_l2", "rows_l1", "splits_l1", "parts_l0", "given_width_l1", "given_width_l2",
    "width_l1", "width_l2",
]

# How every kernel is compiled: a product and a sum are rounded once, whatever the default of the Triton that is installed,
# so that the gradients work out the logits that attention has worked out.
OPTIONS = {"enable_fp_fusion": True}

# Tile shapes: target, bytes of an element, kernel.
TILES_1 = {
    "pool": {"CHILDREN": 16, "ROWS": 8, "num_warps": 2, "maxnreg": 96},
    "select_l1": {"BLOCK_M": 16, "BLOCK_N": 32, "KEEP": 8, "num_warps": 1, "num_stages": 2, "DOUBLES": 0},
    "select_l2": {"BLOCK_M": 16, "BLOCK_N": 64, "KEEP": 8, "num_warps": 4, "num_stages": 2, "DOUBLES": 0, "SPLIT": 4},
    "keep": {"BLOCK_M": 8, "num_warps": 1},
    "attend": {"GROUP": 4, "BLOCK_M": 16, "BLOCK_C": 64, "BLOCK_N": 16, "num_warps": 2, "num_stages": 2, "PIPELINED_QK": 0},
    "scan": {"BLOCK": 1024, "num_warps": 4},
    "invert_l1": {"BLOCK_M": 128, "KEYS": 16, "num_warps": 4},
    "invert_l2": {"BLOCK_M": 128, "KEYS": 32, "num_warps": 4},
    "grad_q": {"GROUP": 4, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_N": 16, "num_warps": 2, "num_stages": 3, "PIPELINED_QK": 0},
    "grad_sum": {"BLOCK": 1, "num_warps": 1},
    "grad_kv_l2": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "grad_kv_global": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "grad_kv_l1": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    "grad_gather_l1": {"ROWS": 8, "BLOCK": 2, "KEEP": 8, "num_warps": 1},
    "grad_kv_l0": {"PART": 64, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 3, "maxnreg": 168},
}
TILES_2 = {
    "pool": {"CHILDREN": 16, "ROWS": 8, "num_warps": 2},
    "select_l1": {"BLOCK_M": 16, "BLOCK_N": 32, "KEEP": 8, "num_warps": 1, "num_stages": 2, "DOUBLES": 0},
    "select_l2": {"BLOCK_M": 16, "BLOCK_N": 32, "KEEP": 8, "num_warps": 1, "num_stages": 2, "DOUBLES": 0, "SPLIT": 1},
    "keep": {"BLOCK_M": 8, "num_warps": 1},
    "attend": {"GROUP": 2, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "PIPELINED_QK": 1},
    "scan": {"BLOCK": 1024, "num_warps": 4},
    "invert_l1": {"BLOCK_M": 128, "KEYS": 16, "num_warps": 4},
    "invert_l2": {"BLOCK_M": 128, "KEYS": 32, "num_warps": 4},
    "grad_q": {"GROUP": 2, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "PIPELINED_QK": 1},
    "grad_sum": {"BLOCK": 1, "num_warps": 1},
    "grad_kv_l2": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
    "grad_kv_global": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
    "grad_kv_l1": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
    "grad_gather_l1": {"ROWS": 8, "BLOCK": 2, "KEEP": 8, "num_warps": 1},
    "grad_kv_l0": {"PART": 64, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
}
TILES_3 = {
    "pool": {"CHILDREN": 16, "ROWS": 8, "num_warps": 2, "maxnreg": 96},
    "select_l1": {"BLOCK_M": 16, "BLOCK_N": 32, "KEEP": 8, "num_warps": 1, "num_stages": 2, "DOUBLES": 1},
    "select_l2": {"BLOCK_M": 16, "BLOCK_N": 64, "KEEP": 8, "num_warps": 4, "num_stages": 2, "DOUBLES": 1, "SPLIT": 4},
    "keep": {"BLOCK_M": 8, "num_warps": 1},
    "attend": {"GROUP": 4, "BLOCK_M": 16, "BLOCK_C": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "PIPELINED_QK": 1, "backend": "gluon_sm90", "maxnreg": 128, "triton_maxnreg": 128},
    "scan": {"BLOCK": 1024, "num_warps": 4},
    "invert_l1": {"BLOCK_M": 128, "KEYS": 16, "num_warps": 4},
    "invert_l2": {"BLOCK_M": 128, "KEYS": 32, "num_warps": 4},
    "grad_q": {"GROUP": 4, "BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3, "PIPELINED_QK": 1, "backend": "gluon_sm90", "maxnreg": 168, "triton_maxnreg": 128},
    "grad_sum": {"BLOCK": 1, "num_warps": 1},
    "grad_kv_l2": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "backend": "gluon_sm90", "maxnreg": 255},
    "grad_kv_global": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "backend": "gluon_sm90", "maxnreg": 255},
    "grad_kv_l1": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1, "backend": "gluon_sm90", "maxnreg": 128, "triton_maxnreg": 128},
    "grad_gather_l1": {"ROWS": 8, "BLOCK": 2, "KEEP": 8, "num_warps": 1},
    "grad_kv_l0": {"PART": 64, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 3, "backend": "gluon_sm90", "maxnreg": 168, "triton_maxnreg": 168},
}
TILES_4 = TILES_1 | {
    "pool": {"CHILDREN": 16, "ROWS": 8, "num_warps": 2},
    "grad_kv_l0": {"PART": 64, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 1, "num_stages": 3},
}
SCHEDULES = {  # by target and bytes of an element
    "cuda:100": {2: TILES_1, 4: TILES_2},
    "cuda:120": {2: TILES_1, 4: TILES_2},
    "cuda:80": {2: TILES_1, 4: TILES_2},
    "cuda:86": {2: TILES_1, 4: TILES_2},
    "cuda:90": {2: TILES_3, 4: TILES_2},
    "hip:gfx942": {2: TILES_4, 4: TILES_2},
}

# ---- geometry and tiles ----------------------------------------------------------------------------------------------


@triton.jit
def head_and_tile(program, tiles):
    """The head of a program and which of the head's `tiles` it has."""
    return (program // tiles).to(tl.int64), program % tiles


@triton.jit
def head_token_and_tile(program, tokens, tiles):
    """The head of a program, which of the head's `tokens` it has, and which of the token's `tiles`."""
    return (program // tiles // tokens).to(tl.int64), program // tiles % tokens, program % tiles


@triton.jit
def kv_head_of(head):
    """The head of the keys that a query head attends to: there are as many of both."""
    return head


@triton.jit
def of_head(ptr, head, rows, width):
    """Start of one head of a contiguous buffer [B*H, rows, width]."""
    return ptr + head * rows * width


@triton.jit
def of_saved(ptr, head, step):
    """Start of one head of a buffer that is saved: what is saved of a head lies together, `step` times 256 bytes."""
    return ptr + head * step * (2048 // ptr.dtype.element_ty.primitive_bitwidth)


@triton.jit
def head_base(ptr, head, stride_batch, stride_head, heads_per_batch):
    """Start of one head of a [B, H, *, *] tensor whose strides are multiples of ROW_UNIT."""
    batch = (head // heads_per_batch).to(tl.int64)
    begin = batch * stride_batch + (head % heads_per_batch).to(tl.int64) * stride_head
    return ptr + tl.multiple_of(begin, [ROW_UNIT])


@triton.jit
def load_rows(ptr, row, stride, inside, EVICT_FIRST: tl.constexpr = False):
    """Rows `row` of a matrix [*, HEAD_DIM] as a tile [..., PAD_DIM]; zero where not `inside` and in the padding.

    `stride` is a multiple of ROW_UNIT: rows that begin at multiples of 16 bytes are loaded 16 bytes at a time. EVICT_FIRST: in
    the cache these rows are the first to make way, before anything that others may read again or that is still to be written.
    """
    dim = tl.arange(0, PAD_DIM)
    begin = tl.multiple_of(row.to(tl.int64) * stride, [ROW_UNIT] * len(row.shape))
    at = tl.expand_dims(begin, -1) + dim
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    return tl.load(ptr + at, mask=tl.expand_dims(inside, -1), other=0.0, eviction_policy=policy)


@triton.jit
def store_rows(ptr, row, stride, inside, tile):
    """Write a tile [..., PAD_DIM] to rows `row` of a matrix [*, HEAD_DIM], where `inside`."""
    dim = tl.arange(0, PAD_DIM)
    at = tl.expand_dims(row.to(tl.int64) * stride, -1) + dim
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=tl.expand_dims(inside, -1))


@triton.jit
def take_part(token, mask_ptr, batch, g_tokens):
    """Which of the global tokens `token` of a batch entry take part, by the mask [B, G]: all there are, if there is none.

    The host has filled the others with zeros, whatever the caller left there.
    """
    exists = token < g_tokens
    if mask_ptr is not None:
        exists &= tl.load(of_head(mask_ptr, batch, g_tokens, 1) + token, mask=exists, other=0) != 0
    return exists


@triton.jit
def parents(list_ptr, start, within, width, BLOCK: tl.constexpr):
    """The tokens of a list whose children, BLOCK each and one after the other, are at `start + within`; -1 beyond it.

    list_ptr points to `width` tokens. `within` counts up from 0 along a tile; tiles start at multiples of their length.
    """
    if within.shape[-1] == BLOCK:  # a tile is the children of one token, which is loaded once
        slot = start // BLOCK + tl.zeros([1] * len(within.shape), tl.int32)
    else:
        slot = (start + within) // BLOCK
    return tl.load(list_ptr + slot, mask=slot < width, other=-1)


@triton.jit
def children(parent, start, within, n_tokens, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """The tokens at `start + within` in the children of a list, of which `parents` are known, and which of them exist.

    Lists have -1 where there are fewer to keep; n_tokens of the children's level exist. Where FULL, all do, and the
    compiler drops the masks made of it.
    """
    token = parent * BLOCK + (start + within) % BLOCK
    if FULL:
        return token, tl.full(token.shape, True, tl.int1)
    else:
        return token, (token >= 0) & (token < n_tokens)


@triton.jit
def log_weight(token, inside, n_tokens, SPAN: tl.constexpr, FULL: tl.constexpr):
    """log2 of w(j) = c(j), the tokens that key token j of span P really covers; -inf where not `inside`.

    Only the last token of a level can cover fewer than P, and where FULL not even that.
    """
    weight = tl.log2(tl.full([1] * len(token.shape), SPAN, tl.float32))
    if not FULL:
        last = tl.cdiv(n_tokens, SPAN) - 1
        weight = tl.where(token == last, tl.log2((n_tokens - last * SPAN).to(tl.float32)), weight)
    return tl.where(inside, weight, float("-inf"))


@triton.jit
def add_product(a, b, acc):
    """acc + a b, in float32.

    A tile of float32 products is summed on its own first: many equal terms, added one by one to a large sum, would all
    be rounded the same way. Half precision has no use for such care, and matrix units add to `acc` for nothing.
    """
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")  # Triton would make one chain of acc + tl.dot(a, b) again
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softmax_step(logits, v, peak, total, acc):
    """Fold one tile of keys into the running softmax of its rows.

    logits [.., M, N] base-2 logits, v [.., N, D], peak [.., M] their running maximum, total [.., M] the sum of
    2^(logit - peak), acc [.., M, D] the same sum over the values.
    """
    new_peak = tl.maximum(peak, tl.max(logits, len(logits.shape) - 1))
    p = tl.exp2(logits - tl.expand_dims(new_peak, -1))
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, len(logits.shape) - 1)
    acc = add_product(p.to(v.dtype), v, acc * tl.expand_dims(shrink, -1))
    return new_peak, total, acc


# ---- the pyramid -----------------------------------------------------------------------------------------------------


@triton.jit
def sum_below(
    ptr, stride, token, inside, n_below,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr, EVICT_FIRST: tl.constexpr,
):
    """For each token [M], `inside` or not, the sum of the rows that it pools, ROWS of them at a time: [M, PAD_DIM], float32.

    Rows are added to SUMS sums in turn: the more, the more are on their way at once, and the more registers they take.
    Threads lie along tokens, and each sums up rows of its own; where there is but one token, along rows.
    """
    M: tl.constexpr = token.shape[0]
    SIDE: tl.constexpr = ROWS // SUMS if M == 1 else 1  # rows side by side in a tile
    sums = ()
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([M, SIDE, PAD_DIM], tl.float32),)
    for start in range(0, BLOCK, ROWS):
        for turn in tl.static_range(0, ROWS, SUMS * SIDE):
            more = ()
            for i in tl.static_range(SUMS):
                below = start + turn + i * SIDE + tl.arange(0, SIDE)
                row = token[:, None] * BLOCK + below[None, :]
                exists = inside[:, None] & (below < BLOCK)[None, :] & (row < n_below)
                more += (sums[i] + load_rows(ptr, row, stride, exists, EVICT_FIRST).to(tl.float32),)
            sums = more
    total = sums[0]
    for i in tl.static_range(1, SUMS):
        total += sums[i]
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=UNSPECIALISED)
def pool_l1_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    q_l1_ptr,  # [B*H, T_1(M), D], out: means
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D], out: means
    q_l2_ptr,  # [B*H, T_2(M), D], out: means
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D], out: means
    counts_l1_ptr,  # [B*H, T_1(N)] int32, out: how many query tokens keep each key token
    counts_l2_ptr,  # [B*H, T_2(N)] int32, out: how many query tokens keep each key token
    heads_per_batch, heads, m_tokens, n_tokens, saved_step,  # H, B*H, M, or 0 where queries are not pooled, N, 256 bytes each, from head to head of what is saved
    CHILDREN: tl.constexpr, ROWS: tl.constexpr, EVICT_FIRST: tl.constexpr,  # level-1 tokens summed at a time, and rows of each
):
    """Means over the tokens that each token of level 1 and 2 covers: float32 sums, rounded once.

    A program has a token of level 2, and those of level 1 that it covers, of one tensor. Grid, queries first, values last:
    B*H * T_2(M) + 2 * B*H_kv * T_2(N).
    """
    SUMS: tl.constexpr = 2 if CHILDREN > 1 and ROWS > 1 else 1  # registers for more programs: some ask while others add
    q_tiles, k_tiles = tl.cdiv(m_tokens, SPAN_2), tl.cdiv(n_tokens, SPAN_2)
    is_key = False
    if tl.program_id(0) < heads * q_tiles:
        head, tile = head_and_tile(tl.program_id(0), q_tiles)
        length = m_tokens
        rows, stride_n = head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn
        mean_l1_ptr = of_head(q_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), HEAD_DIM)
        mean_l2_ptr = of_head(q_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), HEAD_DIM)
    else:
        kv_head, tile = head_and_tile(tl.program_id(0) - heads * q_tiles, k_tiles)
        if kv_head < heads:
            is_key = True
            length = n_tokens
            rows, stride_n = head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn
            mean_l1_ptr = of_saved(k_l1_ptr, kv_head, saved_step)
            mean_l2_ptr = of_saved(k_l2_ptr, kv_head, saved_step)
        else:
            kv_head -= heads
            length = n_tokens
            rows, stride_n = head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn
            mean_l1_ptr = of_saved(v_l1_ptr, kv_head, saved_step)
            mean_l2_ptr = of_saved(v_l2_ptr, kv_head, saved_step)
        head = kv_head

    l1 = tl.cdiv(length, SPAN_1)
    whole = tl.zeros([PAD_DIM], tl.float32)
    for child in range(0, tl.minimum(BLOCK_2, l1 - tile * BLOCK_2), CHILDREN):
        place = child + tl.arange(0, CHILDREN)
        token = tile * BLOCK_2 + place
        inside = (place < BLOCK_2) & (token < l1)
        total = sum_below(rows, stride_n, token, inside, length, BLOCK_1, ROWS, SUMS, EVICT_FIRST)
        covered = tl.minimum(length - token * SPAN_1, SPAN_1).to(tl.float32)
        store_rows(mean_l1_ptr, token, HEAD_DIM, inside, total / covered[:, None])
        tl.store(of_saved(counts_l1_ptr, head, saved_step) + token, 0, mask=inside & is_key)
        whole += tl.sum(total, 0)
    token = tile + tl.arange(0, 1)
    covered = tl.minimum(length - token * SPAN_2, SPAN_2).to(tl.float32)
    store_rows(mean_l2_ptr, token, HEAD_DIM, token >= 0, whole[None, :] / covered[:, None])
    tl.store(of_saved(counts_l2_ptr, head, saved_step) + tile, 0, mask=is_key)


# ---- selection -------------------------------------------------------------------------------------------------------


@triton.jit
def rank_keys(scores, token, candidate, DOUBLES: tl.constexpr):
    """Keys that order candidates by score, of equal scores the lower token first; the lowest of all where no candidate.

    int64: the high half is the float's bit pattern made monotonic, the low half counts down with the token. DOUBLES: the
    same order as float64, which some GPUs compare in one instruction; bits as they are, and NaN a number above infinity.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # of -0, too, those of 0
    if DOUBLES:
        bits = tl.where(scores == scores, bits, 0x7F800001)
        low = tl.where(bits < 0, token, 0x7FFFFFFF - token)  # of negative numbers, the one with more bits is the lower
        key = ((bits.to(tl.int64) << 32) | low).to(tl.float64, bitcast=True)
        return tl.where(candidate, key, float("-inf"))
    else:
        high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32
        return tl.where(candidate, high | (0x7FFFFFFF - token).to(tl.int64), EMPTY)


@triton.jit
def no_keys(shape: tl.constexpr, DOUBLES: tl.constexpr):
    """Rank keys of no token at all."""
    if DOUBLES:
        return tl.full(shape, float("-inf"), tl.float64)
    else:
        return tl.full(shape, EMPTY, tl.int64)


@triton.jit
def in_order(a, b):
    """The smaller and the larger of two."""
    falls = b < a
    return tl.where(falls, b, a), tl.where(falls, a, b)


@triton.jit
def by_thread(keys):
    """The keys [M, N] of a tile by the thread of four that has them: [M, 4, N / 4]."""
    keys = tl.permute(tl.reshape(keys, [keys.shape[0], keys.shape[1] // 8, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(keys, [keys.shape[0], 4, keys.shape[2] * 2])


@triton.jit
def halves(keys):
    """Half of the keys [M, 4, n] of each thread, and the others: [M, 4, n / 2] each."""
    return tl.split(tl.reshape(keys, [keys.shape[0], 4, keys.shape[2] // 2, 2]))


@triton.jit
def best_8_of_both(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    """The 8 largest of two lists of 8; all three ascend."""
    # ascending against descending: the larger of each pair are the 8 largest of both, and fall, then rise
    a0 = tl.where(a0 < b7, b7, a0)
    a1 = tl.where(a1 < b6, b6, a1)
    a2 = tl.where(a2 < b5, b5, a2)
    a3 = tl.where(a3 < b4, b4, a3)
    a4 = tl.where(a4 < b3, b3, a4)
    a5 = tl.where(a5 < b2, b2, a5)
    a6 = tl.where(a6 < b1, b1, a6)
    a7 = tl.where(a7 < b0, b0, a7)
    a0, a4 = in_order(a0, a4)
    a1, a5 = in_order(a1, a5)
    a2, a6 = in_order(a2, a6)
    a3, a7 = in_order(a3, a7)
    a0, a2 = in_order(a0, a2)
    a1, a3 = in_order(a1, a3)
    a4, a6 = in_order(a4, a6)
    a5, a7 = in_order(a5, a7)
    a0, a1 = in_order(a0, a1)
    a2, a3 = in_order(a2, a3)
    a4, a5 = in_order(a4, a5)
    a6, a7 = in_order(a6, a7)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def no_best_8(M: tl.constexpr, DOUBLES: tl.constexpr):
    """Lists of 8 that hold nothing yet: 8 tensors [M, 4]."""
    none = no_keys([M, 4], DOUBLES)
    return none, none, none, none, none, none, none, none


@triton.jit
def add_to_best_8(best, keys):
    """Lists of 8, with the keys [M, 4, n] of the same threads taken in; n >= 8."""
    if keys.shape[2] > 8:
        some, others = halves(keys)
        best = add_to_best_8(add_to_best_8(best, some), others)
    else:
        some, others = halves(keys)
        x01, x23 = halves(some)
        x45, x67 = halves(others)
        x0, x1 = tl.split(x01)
        x2, x3 = tl.split(x23)
        x4, x5 = tl.split(x45)
        x6, x7 = tl.split(x67)
        x0, x1 = in_order(x0, x1)
        x2, x3 = in_order(x2, x3)
        x0, x2 = in_order(x0, x2)
        x1, x3 = in_order(x1, x3)
        x1, x2 = in_order(x1, x2)
        x4, x5 = in_order(x4, x5)
        x6, x7 = in_order(x6, x7)
        x4, x6 = in_order(x4, x6)
        x5, x7 = in_order(x5, x7)
        x5, x6 = in_order(x5, x6)
        x0, x4 = in_order(x0, x4)
        x2, x6 = in_order(x2, x6)
        x2, x4 = in_order(x2, x4)
        x1, x5 = in_order(x1, x5)
        x3, x7 = in_order(x3, x7)
        x3, x5 = in_order(x3, x5)
        x1, x2 = in_order(x1, x2)
        x3, x4 = in_order(x3, x4)
        x5, x6 = in_order(x5, x6)
        a0, a1, a2, a3, a4, a5, a6, a7 = best
        best = best_8_of_both(a0, a1, a2, a3, a4, a5, a6, a7, x0, x1, x2, x3, x4, x5, x6, x7)
    return best


@triton.jit
def rows_of_best_8(best, M: tl.constexpr):
    """The 8 best of each row, ascending, [M, 8]: of the lists [M, 4], or [S * M, 4], that threads have of it."""
    a0, a1, a2, a3, a4, a5, a6, a7 = tl.reduce(best, 1, best_8_of_both)
    S: tl.constexpr = a0.shape[0] // M
    if S > 1:
        a0 = tl.reshape(a0, [S, M])
        a1 = tl.reshape(a1, [S, M])
        a2 = tl.reshape(a2, [S, M])
        a3 = tl.reshape(a3, [S, M])
        a4 = tl.reshape(a4, [S, M])
        a5 = tl.reshape(a5, [S, M])
        a6 = tl.reshape(a6, [S, M])
        a7 = tl.reshape(a7, [S, M])
        a0, a1, a2, a3, a4, a5, a6, a7 = tl.reduce((a0, a1, a2, a3, a4, a5, a6, a7), 0, best_8_of_both)
    return tl.reshape(tl.join(tl.join(tl.join(a0, a4), tl.join(a2, a6)), tl.join(tl.join(a1, a5), tl.join(a3, a7))), [M, 8])


@triton.jit
def tokens_of(best, DOUBLES: tl.constexpr):
    """The tokens of rank keys, int32, -1 where there is none."""
    if DOUBLES:
        bits = best.to(tl.int64, bitcast=True)
        low = bits & 0x7FFFFFFF
        return tl.where(best == float("-inf"), -1, tl.where(bits < 0, low, 0x7FFFFFFF - low)).to(tl.int32)
    else:
        return tl.where(best == EMPTY, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def store_kept(kept_ptr, counts_ptr, row, width, inside, best, KEEP: tl.constexpr, DOUBLES: tl.constexpr):
    """Write the tokens of the best rank keys, best first, to rows of `width`, -1 where there are fewer; count them."""
    place = KEEP - 1 - tl.arange(0, KEEP)
    token = tokens_of(best, DOUBLES)
    at = row.to(tl.int64)[:, None] * width + place[None, :]
    inside = inside[:, None] & (place < width)[None, :]
    tl.store(kept_ptr + at, token, mask=inside)
    tl.atomic_add(counts_ptr + token, 1, mask=inside & (token >= 0), sem="relaxed")  # nothing waits for it here


@triton.jit
def best_of_all(
    q, k_ptr, n_candidates,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOUBLES: tl.constexpr, SPLIT: tl.constexpr,
):
    """The rank keys of the 8 best of all candidates for each row of q [BLOCK_M, D], ascending, dealt to SPLIT warps."""
    q = tl.broadcast_to(q[None, :, :], [SPLIT, BLOCK_M, PAD_DIM])
    best = no_best_8(SPLIT * BLOCK_M, DOUBLES)
    share = tl.arange(0, SPLIT)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for start in range(0, n_candidates, SPLIT * BLOCK_N):
        token = start + share
        candidate = token < n_candidates
        k = load_rows(k_ptr, token, HEAD_DIM, candidate)
        scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee")
        keys = rank_keys(scores, token[:, None, :], candidate[:, None, :], DOUBLES)
        best = add_to_best_8(best, by_thread(tl.reshape(keys, [SPLIT * BLOCK_M, BLOCK_N])))
    return rows_of_best_8(best, BLOCK_M)


@triton.jit
def ordered(bits):
    """The bits of a float as an integer in the order of floats, and that as bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def best_by_runs(
    q, k_ptr, n_candidates,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr, DOUBLES: tl.constexpr, SPLIT: tl.constexpr,
):
    """The same by way of runs of RUN tokens: the KEEP that have the best scores, and of their tokens the best.

    But for rounding, no other run has one of the best tokens, for it has KEEP above it; the second time, scores are sums in
    another order. NaN is taken for the positive one, which products make.

    A product leaves columns 2 t and 2 t + 1 of every eight to one thread; these hold runs of its own, of which it keeps a
    list, so that no step of the loop crosses threads.
    """
    RUN: tl.constexpr = BLOCK_N // (4 * KEEP)
    column = tl.arange(0, BLOCK_N)
    eight, t = column // 8, column % 8 // 2
    place = (t * KEEP + eight // (RUN // 2)) * RUN + eight % (RUN // 2) * 2 + column % 2
    share = tl.arange(0, SPLIT)[:, None] * BLOCK_N + place[None, :]
    run_share = tl.reshape(tl.arange(0, SPLIT * 4 * KEEP), [SPLIT, 4, KEEP])
    rows = tl.broadcast_to(q[None, :, :], [SPLIT, BLOCK_M, PAD_DIM])
    best = no_best_8(SPLIT * BLOCK_M, DOUBLES)
    for start in range(0, n_candidates, SPLIT * BLOCK_N):
        token = tl.minimum(start + share, n_candidates - 1)  # the last run may hold the last token twice
        k = load_rows(k_ptr, token, HEAD_DIM, token >= 0)
        scores = tl.dot(rows, tl.permute(k, (0, 2, 1)), input_precision="ieee")
        high = tl.reshape(ordered(scores.to(tl.int32, bitcast=True)), [SPLIT, BLOCK_M, KEEP, RUN // 2, 4, 2])
        high = tl.permute(tl.max(tl.max(high, 5), 3), (0, 1, 3, 2))  # of each run
        run = (start // RUN + run_share)[:, None, :, :]
        scores = ordered(high).to(tl.float32, bitcast=True)
        keys = rank_keys(scores, run, run * RUN < n_candidates, DOUBLES)
        best = add_to_best_8(best, tl.reshape(keys, [SPLIT * BLOCK_M, 4, KEEP]))
    best = rows_of_best_8(best, BLOCK_M)
    run = tokens_of(best, DOUBLES)

    # a candidate of every row after the other, so that all of a row's are one thread's, whatever lays them out
    token = tl.reshape(run[:, :, None] * RUN + tl.arange(0, RUN)[None, None, :], [BLOCK_M, KEEP * RUN])
    token = tl.reshape(tl.trans(token), [KEEP * RUN * BLOCK_M])
    candidate = (token >= 0) & (token < n_candidates)
    k = tl.reshape(load_rows(k_ptr, token, HEAD_DIM, candidate), [KEEP * RUN, BLOCK_M, PAD_DIM])
    scores = tl.reshape(tl.sum(q[None, :, :].to(tl.float32) * k.to(tl.float32), 2), [KEEP * RUN * BLOCK_M])
    keys = tl.reshape(rank_keys(scores, token, candidate, DOUBLES), [KEEP * RUN, BLOCK_M])
    return tl.bitonic_merge(tl.topk(tl.trans(keys), KEEP))


@triton.jit(do_not_specialize=UNSPECIALISED)
def select_l2_kernel(
    q_l2_ptr,  # [B*H, T_2(M), D]
    k_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32, out: kept key tokens, best first, then -1
    counts_l2_ptr,  # [B*H, T_2(N)] int32, out: how many query tokens keep each key token
    m_tokens, n_tokens, saved_step,  # M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr, DOUBLES: tl.constexpr, SPLIT: tl.constexpr, RUNS: tl.constexpr,
):
    """I^(2): the K_2 = 8 best of all T_2(N) key tokens, for each query token of the coarsest level.

    Grid: B*H * ceil(T_2(M) / BLOCK_M). KEEP is K_2 rounded up to a power of two, SPLIT how many share the candidates;
    RUNS: see `best_by_runs`.
    """
    m_l2, n_l2 = tl.cdiv(m_tokens, SPAN_2), tl.cdiv(n_tokens, SPAN_2)
    head, tile = head_and_tile(tl.program_id(0), tl.cdiv(m_l2, BLOCK_M))
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < m_l2
    n_candidates = n_l2
    kv_head = kv_head_of(head)
    counts_ptr = of_saved(counts_l2_ptr, head, saved_step)  # integer sums are the same in any order
    k_ptr = of_saved(k_l2_ptr, kv_head, saved_step)
    q = load_rows(of_head(q_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), HEAD_DIM), row, HEAD_DIM, inside)
    kept_ptr = of_saved(kept_l2_ptr, head, saved_step)

    if SPLIT == 1:
        best = no_best_8(BLOCK_M, DOUBLES)
        for start in range(0, n_candidates, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            candidate = token < n_l2
            k = load_rows(k_ptr, token, HEAD_DIM, candidate)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            keys = rank_keys(scores, token[None, :], candidate[None, :], DOUBLES)
            best = add_to_best_8(best, by_thread(keys))
        best = rows_of_best_8(best, BLOCK_M)
    elif RUNS:
        best = best_by_runs(q, k_ptr, n_candidates, BLOCK_M, BLOCK_N, KEEP, DOUBLES, SPLIT)
    else:
        best = best_of_all(q, k_ptr, n_candidates, BLOCK_M, BLOCK_N, DOUBLES, SPLIT)
    store_kept(kept_ptr, counts_ptr, row, width_l2, inside, best, KEEP, DOUBLES)


@triton.jit(do_not_specialize=UNSPECIALISED)
def select_l1_kernel(
    q_l1_ptr,  # [B*H, T_1(M), D]
    k_l1_ptr,  # [B*H_kv, T_1(N), D]
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32, out: kept key tokens, best first, then -1
    counts_l1_ptr,  # [B*H, T_1(N)] int32, out: how many query tokens keep each key token
    m_tokens, n_tokens, saved_step,  # M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr, DOUBLES: tl.constexpr,
):
    """I^(1): the K_1 = 8 best children of I^(2), for the query tokens under one parent.

    Grid: B*H * T_2(M) * ceil(min(b_2, T_1(M)) / BLOCK_M).
    """
    m_l1, n_l1 = tl.cdiv(m_tokens, SPAN_1), tl.cdiv(n_tokens, SPAN_1)
    m_l2 = tl.cdiv(m_tokens, SPAN_2)
    tiles = tl.cdiv(tl.minimum(BLOCK_2, m_l1), BLOCK_M)
    head, parent, tile = head_token_and_tile(tl.program_id(0), m_l2, tiles)
    child = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = parent * BLOCK_2 + child
    inside = (child < BLOCK_2) & (row < m_l1)
    kept_above_ptr = of_saved(kept_l2_ptr, head, saved_step) + parent * width_l2
    n_candidates = width_l2 * BLOCK_2
    kv_head = kv_head_of(head)
    counts_ptr = of_saved(counts_l1_ptr, head, saved_step)  # integer sums are the same in any order
    k_ptr = of_saved(k_l1_ptr, kv_head, saved_step)
    q = load_rows(of_head(q_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), HEAD_DIM), row, HEAD_DIM, inside)
    kept_ptr = of_saved(kept_l1_ptr, head, saved_step)

    best = no_best_8(BLOCK_M, DOUBLES)
    for start in range(0, n_candidates, BLOCK_N):
        within = tl.arange(0, BLOCK_N)
        kept_above = parents(kept_above_ptr, start, within, width_l2, BLOCK_2)
        token, _ = children(kept_above, start, within, n_l1, BLOCK_2, True)
        candidate = (token >= 0) & (token < n_l1)
        k = load_rows(k_ptr, token, HEAD_DIM, candidate)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        keys = rank_keys(scores, token[None, :], candidate[None, :], DOUBLES)
        best = add_to_best_8(best, by_thread(keys))
    best = rows_of_best_8(best, BLOCK_M)
    store_kept(kept_ptr, counts_ptr, row, width_l1, inside, best, KEEP, DOUBLES)


@triton.jit
def keep_rows(
    given_ptr, given_width, kept_ptr, width, row, inside, n_tokens, WIDTH: tl.constexpr
):
    """Copy the lists of the query tokens `row` [M], of one head, with -1 at their ends; key tokens that exist are below `n_tokens`.

    Returns the tokens [M, WIDTH], and which of these there are.
    """
    slot = tl.arange(0, WIDTH)[None, :]
    begin = row.to(tl.int64)[:, None]
    token = tl.load(given_ptr + begin * given_width + slot, mask=inside[:, None] & (slot < given_width), other=-1)
    exists = ((token >= 0) & (token < n_tokens)).to(tl.int32)
    to = tl.cumsum(exists, 1) - exists
    tl.store(kept_ptr + begin * width + slot, -1, mask=inside[:, None] & (slot >= tl.sum(exists, 1)[:, None]) & (slot < width))
    taken = (exists > 0) & (to < width)
    tl.store(kept_ptr + begin * width + to, token, mask=taken)
    return token, taken


@triton.jit
def are_in_list(token, list_ptr, width, row, inside):
    """Which of the tokens [M, *] are in the lists of the query tokens `row` [M]."""
    found = tl.zeros(token.shape, tl.int32)
    for slot in tl.range(0, width, loop_unroll_factor=8):  # as many reads at once
        listed = tl.load(list_ptr + row.to(tl.int64) * width + slot, mask=inside, other=-1)
        found |= (token == listed[:, None]).to(tl.int32)
    return found > 0


@triton.jit(do_not_specialize=UNSPECIALISED)
def keep_kernel(
    given_l1_ptr, given_width_l1,  # [B*H, T_1(M), given_width_l1] int32
    given_l2_ptr, given_width_l2,  # [B*H, T_2(M), given_width_l2] int32
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32, out: kept key tokens, best first, then -1
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32, out: kept key tokens, best first, then -1
    counts_l1_ptr,  # [B*H, T_1(N)] int32, out: how many query tokens keep each key token
    counts_l2_ptr,  # [B*H, T_2(N)] int32, out: how many query tokens keep each key token
    m_tokens, n_tokens, saved_step,  # M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr,
):
    """The lists of BLOCK_M query tokens of a level. Those are counted whose parents are kept: the inversion finds no others.

    Grid: B*H * (ceil(T_1(M) / BLOCK_M) + ceil(T_2(M) / BLOCK_M)).
    """
    m_l1 = tl.cdiv(m_tokens, SPAN_1)
    end_l1 = tl.cdiv(m_l1, BLOCK_M)
    m_l2 = tl.cdiv(m_tokens, SPAN_2)
    end_l2 = end_l1 + tl.cdiv(m_l2, BLOCK_M)
    head, tile = head_and_tile(tl.program_id(0), end_l2)
    if tile < end_l1:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < m_l1
        token, counted = keep_rows(
            of_head(given_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), given_width_l1), given_width_l1,
            of_saved(kept_l1_ptr, head, saved_step), width_l1,
            row, inside, tl.cdiv(n_tokens, SPAN_1), 8,
        )
        above = of_head(given_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), given_width_l2)
        counted &= are_in_list(token // 16, above, given_width_l2, row // 16, inside)
        tl.atomic_add(of_saved(counts_l1_ptr, head, saved_step) + token, 1, mask=counted, sem="relaxed")
    if (tile >= end_l1) & (tile < end_l2):
        row = (tile - end_l1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < m_l2
        token, counted = keep_rows(
            of_head(given_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), given_width_l2), given_width_l2,
            of_saved(kept_l2_ptr, head, saved_step), width_l2,
            row, inside, tl.cdiv(n_tokens, SPAN_2), 8,
        )
        tl.atomic_add(of_saved(counts_l2_ptr, head, saved_step) + token, 1, mask=counted, sem="relaxed")


# ---- attention -------------------------------------------------------------------------------------------------------


@triton.jit
def attend_globals(
    q, scale, peak, total, acc, head, kv_head, heads_per_batch, k_global_ptr, v_global_ptr, global_mask_ptr, g_tokens,
    BLOCK: tl.constexpr,
):
    """peak, total, acc of `softmax_step` after the global tokens. With a running maximum: their logits may well be the largest."""
    k_base = of_head(k_global_ptr, kv_head, g_tokens, HEAD_DIM)
    v_base = of_head(v_global_ptr, kv_head, g_tokens, HEAD_DIM)
    for start in range(0, g_tokens, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = take_part(key, global_mask_ptr, head // heads_per_batch, g_tokens)
        bias = tl.where(exists, 0.0, float("-inf"))
        k = load_rows(k_base, key, HEAD_DIM, key < g_tokens)
        v = load_rows(v_base, key, HEAD_DIM, key < g_tokens)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        peak, total, acc = softmax_step(logits, v, peak, total, acc)
    return peak, total, acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]: None where there are no globals
    global_mask_ptr,  # [B, G] uint8: None where all take part
    o_ptr,  # [B*H, M, D], out
    lse_ptr,  # [B*H, M] float32, out: natural logarithm of the sum of weights
    peak_ptr, total_ptr,  # [B*H, M] float32, out: the same sum as 2^peak * total
    scale, heads_per_batch, m_tokens, n_tokens, g_tokens, saved_step,  # s, H, M, N, G, 256 bytes each, from head to head of what is saved
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    PIPELINED_QK: tl.constexpr, FULL: tl.constexpr,
):
    """o_i = sum_j w_j exp(s q_i.k_j) v_j / sum_j w_j exp(s q_i.k_j) over the keys of levels 2, 1 and 0.

    Grid: B*H * T_2(M) * ceil(min(16, T_1(M)) / GROUP), GROUP query blocks of one level-2 token each.
    """
    m_l1 = tl.cdiv(m_tokens, SPAN_1)
    siblings = tl.minimum(16, m_l1)  # query blocks under one level-2 token
    m_l2 = tl.cdiv(m_tokens, SPAN_2)
    head, above, group = head_token_and_tile(tl.program_id(0), m_l2, tl.cdiv(siblings, GROUP))
    place = group * GROUP + tl.arange(0, GROUP)
    block = above * siblings + place
    mine = (place < siblings) & (block < m_l1)
    within = tl.arange(0, BLOCK_M)
    token = tl.reshape(block[:, None] * BLOCK_1 + within[None, :], [GROUP * BLOCK_M])
    inside = tl.reshape(mine[:, None] & (within < BLOCK_1)[None, :], [GROUP * BLOCK_M]) & (token < m_tokens)
    kv_head = kv_head_of(head)

    q = load_rows(head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), token, stride_qn, inside)
    scale *= LOG2E
    peak = tl.full([GROUP * BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([GROUP * BLOCK_M], tl.float32)
    acc = tl.zeros([GROUP * BLOCK_M, PAD_DIM], tl.float32)

    # level 2: all its tokens; the last tile, if they do not fill it, on its own, so that the loop needs no masks
    n_l2 = tl.cdiv(n_tokens, SPAN_2)
    k_base = of_saved(k_l2_ptr, kv_head, saved_step)
    v_base = of_saved(v_l2_ptr, kv_head, saved_step)
    filled = n_l2 // BLOCK_C * BLOCK_C
    for start in range(0, filled, BLOCK_C):
        key = start + tl.arange(0, BLOCK_C)
        exists = tl.full([BLOCK_C], True, tl.int1)
        bias = log_weight(key, exists, n_tokens, SPAN_2, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        peak, total, acc = softmax_step(logits, v, peak, total, acc)
    if filled < n_l2:
        key = filled + tl.arange(0, BLOCK_C)
        exists = key < n_l2
        bias = log_weight(key, exists, n_tokens, SPAN_2, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        peak, total, acc = softmax_step(logits, v, peak, total, acc)

    # level 1: the children of what the queries' level-2 token keeps
    n_l1 = tl.cdiv(n_tokens, SPAN_1)
    k_base = of_saved(k_l1_ptr, kv_head, saved_step)
    v_base = of_saved(v_l1_ptr, kv_head, saved_step)
    list_ptr = of_saved(kept_l2_ptr, head, saved_step) + above * width_l2
    place = tl.arange(0, BLOCK_C)
    parent = parents(list_ptr, 0, place, width_l2, BLOCK_2)
    for start in range(0, width_l2 * BLOCK_2, BLOCK_C):
        key, exists = children(parent, start, place, n_l1, BLOCK_2, FULL)
        parent = parents(list_ptr, start + BLOCK_C, place, width_l2, BLOCK_2)  # of the next tile, in time
        bias = log_weight(key, exists, n_tokens, SPAN_1, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        peak, total, acc = softmax_step(logits, v, peak, total, acc)

    q_blocks = tl.reshape(q, [GROUP, BLOCK_M, PAD_DIM])
    peak = tl.reshape(peak, [GROUP, BLOCK_M])
    total = tl.reshape(total, [GROUP, BLOCK_M])
    acc = tl.reshape(acc, [GROUP, BLOCK_M, PAD_DIM])
    # level 0: the tokens of the key blocks that each query block keeps
    k_base = head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch)
    v_base = head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch)
    list_ptr = of_saved(kept_l1_ptr, head, saved_step) + tl.minimum(block, m_l1 - 1)[:, None] * width_l1
    place = tl.arange(0, BLOCK_N)[None, :]
    parent = parents(list_ptr, 0, place, width_l1, BLOCK_1)
    if PIPELINED_QK:  # the products of the next tile need nothing of this one: they run while its softmax is worked out
        key, exists = children(parent, 0, place, n_tokens, BLOCK_1, FULL)
        parent = parents(list_ptr, BLOCK_N, place, width_l1, BLOCK_1)
        k = load_rows(k_base, key, stride_kn, exists)
        products = tl.dot(q_blocks, tl.permute(k, (0, 2, 1)), input_precision="ieee")
        for start in range(0, width_l1 * BLOCK_1, BLOCK_N):
            bias = tl.where(exists, 0.0, float("-inf"))
            v = load_rows(v_base, key, stride_vn, exists)
            after = start + BLOCK_N
            key, exists = children(parent, after, place, n_tokens, BLOCK_1, FULL)
            parent = parents(list_ptr, after + BLOCK_N, place, width_l1, BLOCK_1)
            k = load_rows(k_base, key, stride_kn, tl.where(after < width_l1 * BLOCK_1, exists, False))
            ahead = tl.dot(q_blocks, tl.permute(k, (0, 2, 1)), input_precision="ieee")
            logits = products * scale + bias[:, None, :]
            peak, total, acc = softmax_step(logits, v, peak, total, acc)
            products = ahead
    else:
        for start in range(0, width_l1 * BLOCK_1, BLOCK_N):
            key, exists = children(parent, start, place, n_tokens, BLOCK_1, FULL)
            parent = parents(list_ptr, start + BLOCK_N, place, width_l1, BLOCK_1)  # of the next tile, in time
            bias = tl.where(exists, 0.0, float("-inf"))
            k = load_rows(k_base, key, stride_kn, exists)
            v = load_rows(v_base, key, stride_vn, exists)
            logits = tl.dot(q_blocks, tl.permute(k, (0, 2, 1)), input_precision="ieee") * scale + bias[:, None, :]
            peak, total, acc = softmax_step(logits, v, peak, total, acc)
    peak = tl.reshape(peak, [GROUP * BLOCK_M])
    total = tl.reshape(total, [GROUP * BLOCK_M])
    acc = tl.reshape(acc, [GROUP * BLOCK_M, PAD_DIM])
    if k_global_ptr is not None:
        peak, total, acc = attend_globals(
            q, scale, peak, total, acc, head, kv_head, heads_per_batch, k_global_ptr, v_global_ptr, global_mask_ptr, g_tokens,
            BLOCK_C,
        )

    nothing = total == 0.0  # to attend to: o = 0, lse = -inf
    total = tl.where(nothing, 1.0, total)
    log_sum = tl.where(nothing, float("-inf"), peak + tl.log2(total))
    store_rows(of_head(o_ptr, head, m_tokens, HEAD_DIM), token, HEAD_DIM, inside, acc * (1.0 / total)[:, None])
    tl.store(of_head(lse_ptr, head, m_tokens, 1) + token, log_sum * LN2, mask=inside)
    if q.dtype != tl.float32:  # half precision rounds more than this sum: the backward pass is spared a product
        peak = log_sum
        total = tl.full([GROUP * BLOCK_M], 1.0, tl.float32)
    peak = tl.where(nothing, float("inf"), peak)  # so that p = 0 in the backward pass
    tl.store(of_saved(peak_ptr, head, saved_step) + token, peak, mask=inside)
    tl.store(of_saved(total_ptr, head, saved_step) + token, total, mask=inside)


# ---- gradients -------------------------------------------------------------------------------------------------------


@triton.jit
def running_sum(counts_ptr, sums_ptr, n_rows, part, BLOCK: tl.constexpr):
    """The exclusive running sum of one head's counts and, after the last row, the whole sum.

    Where `part` is not 0, of the parts of `part` entries instead that a list has beyond its first.
    """
    before = 0
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        value = tl.load(counts_ptr + row, mask=row < n_rows, other=0)
        if part > 0:
            value = tl.maximum(tl.cdiv(value, part) - 1, 0)
        sums = before + tl.cumsum(value, 0)
        tl.store(sums_ptr + row, sums - value, mask=row < n_rows)
        before += tl.sum(value, 0)
    tl.store(sums_ptr + n_rows, before)


@triton.jit(do_not_specialize=UNSPECIALISED)
def scan_kernel(
    counts_l1_ptr,  # [B*H, T_1(N)] int32
    counts_l2_ptr,  # [B*H, T_2(N)] int32
    offsets_l1_ptr,  # [B*H, T_1(N) + 1] int32, out: where the list of each key token begins
    overflow_l1_ptr,  # [B*H, T_1(N) + 1] int32, out: where its parts of part_l1 entries beyond the first begin
    offsets_l2_ptr,  # [B*H, T_2(N) + 1] int32, out: where the list of each key token begins
    part_l1, heads, n_tokens, saved_step,  # entries a part, B*H, N, 256 bytes each, from head to head of what is saved
    BLOCK: tl.constexpr,
):
    """Where lists begin, and their parts beyond the first: running sums, one a program.

    Grid: B*H * 3.
    """
    which, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    if which == 0:
        running_sum(of_saved(counts_l1_ptr, head, saved_step), of_head(offsets_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1), tl.cdiv(n_tokens, SPAN_1), 0, BLOCK)
    if which == 1:
        running_sum(of_saved(counts_l1_ptr, head, saved_step), of_head(overflow_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1), tl.cdiv(n_tokens, SPAN_1), part_l1, BLOCK)
    if which == 2:
        running_sum(of_saved(counts_l2_ptr, head, saved_step), of_head(offsets_l2_ptr, head, tl.cdiv(n_tokens, SPAN_2) + 1, 1), tl.cdiv(n_tokens, SPAN_2), 0, BLOCK)


@triton.jit
def scatter_keepers(keepers_ptr, cursor, key, kept_ptr, row, width, inside):
    """Append the query tokens `row` [M], ascending, to the lists of the key tokens `key` [KEYS] that they keep.

    kept_ptr [*, width] says what each query token keeps, cursor [KEYS] where each list goes on; returns where it goes
    on after this.
    """
    keeps = tl.zeros([row.shape[0], key.shape[0]], tl.int32)
    for slot in tl.range(0, width, loop_unroll_factor=8):  # as many reads at once
        kept = tl.load(kept_ptr + row.to(tl.int64) * width + slot, mask=inside, other=-1)
        keeps += (kept[:, None] == key[None, :]).to(tl.int32)
    rank = tl.cumsum(keeps, 0) - keeps
    tl.store(keepers_ptr + cursor[None, :] + rank, tl.broadcast_to(row[:, None], keeps.shape), mask=keeps > 0)
    return cursor + tl.sum(keeps, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def invert_l2_kernel(
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    offsets_l2_ptr,  # [B*H, T_2(N) + 1] int32
    keepers_l2_ptr,  # [B*H, T_2(M) * width_l2] int32, out: query tokens by the key token that they keep
    m_tokens, n_tokens, saved_step,  # M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
):
    """The query tokens that keep each of KEYS key tokens of level 2, found among all.

    Grid: B*H * ceil(T_2(N) / KEYS).
    """
    m_l2, n_l2 = tl.cdiv(m_tokens, SPAN_2), tl.cdiv(n_tokens, SPAN_2)
    head, tile = head_and_tile(tl.program_id(0), tl.cdiv(n_l2, KEYS))
    key = tile * KEYS + tl.arange(0, KEYS)
    cursor = tl.load(of_head(offsets_l2_ptr, head, tl.cdiv(n_tokens, SPAN_2) + 1, 1) + key, mask=key < n_l2, other=0)
    kept_ptr = of_saved(kept_l2_ptr, head, saved_step)
    keepers_ptr = of_head(keepers_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), width_l2)
    for start in range(0, m_l2, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        cursor = scatter_keepers(keepers_ptr, cursor, key, kept_ptr, row, width_l2, row < m_l2)


@triton.jit(do_not_specialize=UNSPECIALISED)
def invert_l1_kernel(
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    offsets_l1_ptr,  # [B*H, T_1(N) + 1] int32
    offsets_l2_ptr,  # [B*H, T_2(N) + 1] int32
    keepers_l2_ptr, width_l2,  # [B*H, T_2(M) * width_l2] int32
    keepers_l1_ptr,  # [B*H, T_1(M) * width_l1] int32, out: query tokens by the key token that they keep
    m_tokens, n_tokens, saved_step,  # M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
):
    """The query tokens that keep each child of a level-2 key token, found among the children of its keepers.

    Grid: B*H * T_2(N).
    """
    m_l1, n_l1 = tl.cdiv(m_tokens, SPAN_1), tl.cdiv(n_tokens, SPAN_1)
    n_l2 = tl.cdiv(n_tokens, SPAN_2)
    head, parent = head_and_tile(tl.program_id(0), n_l2)
    offsets_ptr = of_head(offsets_l2_ptr, head, tl.cdiv(n_tokens, SPAN_2) + 1, 1) + parent
    begin = tl.load(offsets_ptr)
    count = tl.load(offsets_ptr + 1) - begin
    list_ptr = of_head(keepers_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), width_l2) + begin
    child = tl.arange(0, KEYS)
    exists = (child < BLOCK_2) & (parent * BLOCK_2 + child < n_l1)
    key = tl.where(exists, parent * BLOCK_2 + child, -2)  # -2: nobody's, neither a token nor the -1 of short lists
    cursor = tl.load(of_head(offsets_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + key, mask=exists, other=0)
    kept_ptr = of_saved(kept_l1_ptr, head, saved_step)
    keepers_ptr = of_head(keepers_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), width_l1)
    for start in range(0, count * BLOCK_2, BLOCK_M):
        within = tl.arange(0, BLOCK_M)
        keeper = parents(list_ptr, start, within, count, BLOCK_2)
        row, inside = children(keeper, start, within, m_l1, BLOCK_2, False)
        cursor = scatter_keepers(keepers_ptr, cursor, key, kept_ptr, row, width_l1, inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_q_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    o_ptr,  # [B*H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr,  # [B*H, M] float32
    grad_lse_ptr,  # [B*H, M] float32: None where lse has no gradient
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]: None where there are no globals
    global_mask_ptr,  # [B, G] uint8: None where all take part
    grad_q_ptr,  # [B*H, M, D], out
    delta_ptr,  # [B*H, M] float32, out
    scale, heads_per_batch, m_tokens, n_tokens, g_tokens, saved_step,  # s, H, M, N, G, 256 bytes each, from head to head of what is saved
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    PIPELINED_QK: tl.constexpr, FULL: tl.constexpr,
):
    """dq_i = s sum_j p_ij (do_i.v_j - delta_i) k_j, with delta_i = o_i.do_i - dlse_i, over the keys of levels 2, 1 and 0.

    Grid: B*H * T_2(M) * ceil(min(16, T_1(M)) / GROUP), GROUP query blocks of one level-2 token each.
    """
    m_l1 = tl.cdiv(m_tokens, SPAN_1)
    siblings = tl.minimum(16, m_l1)  # query blocks under one level-2 token
    m_l2 = tl.cdiv(m_tokens, SPAN_2)
    head, above, group = head_token_and_tile(tl.program_id(0), m_l2, tl.cdiv(siblings, GROUP))
    place = group * GROUP + tl.arange(0, GROUP)
    block = above * siblings + place
    mine = (place < siblings) & (block < m_l1)
    within = tl.arange(0, BLOCK_M)
    token = tl.reshape(block[:, None] * BLOCK_1 + within[None, :], [GROUP * BLOCK_M])
    inside = tl.reshape(mine[:, None] & (within < BLOCK_1)[None, :], [GROUP * BLOCK_M]) & (token < m_tokens)
    kv_head = kv_head_of(head)

    q = load_rows(head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), token, stride_qn, inside)
    grad_o = load_rows(head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), token, stride_gn, inside)
    o = load_rows(of_head(o_ptr, head, m_tokens, HEAD_DIM), token, HEAD_DIM, inside)
    delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(of_head(grad_lse_ptr, head, m_tokens, 1) + token, mask=inside, other=0.0)
    tl.store(of_head(delta_ptr, head, m_tokens, 1) + token, delta, mask=inside)
    peak = tl.load(of_saved(peak_ptr, head, saved_step) + token, mask=inside, other=0.0)
    total = tl.load(of_saved(total_ptr, head, saved_step) + token, mask=inside, other=1.0)
    scale_log2e = scale * LOG2E
    grad_q = tl.zeros([GROUP * BLOCK_M, PAD_DIM], tl.float32)

    if k_global_ptr is not None:
        k_base = of_head(k_global_ptr, kv_head, g_tokens, HEAD_DIM)
        v_base = of_head(v_global_ptr, kv_head, g_tokens, HEAD_DIM)
        for start in range(0, g_tokens, BLOCK_C):
            key = start + tl.arange(0, BLOCK_C)
            exists = take_part(key, global_mask_ptr, head // heads_per_batch, g_tokens)
            bias = tl.where(exists, 0.0, float("-inf"))
            k = load_rows(k_base, key, HEAD_DIM, key < g_tokens)
            v = load_rows(v_base, key, HEAD_DIM, key < g_tokens)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e + (bias[None, :] - peak[:, None])
            dp = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
            grad_logits = tl.exp2(logits) * (dp - delta[:, None])
            grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)
    # level 2: all its tokens; the last tile, if they do not fill it, on its own, so that the loop needs no masks
    n_l2 = tl.cdiv(n_tokens, SPAN_2)
    k_base = of_saved(k_l2_ptr, kv_head, saved_step)
    v_base = of_saved(v_l2_ptr, kv_head, saved_step)
    filled = n_l2 // BLOCK_C * BLOCK_C
    for start in range(0, filled, BLOCK_C):
        key = start + tl.arange(0, BLOCK_C)
        exists = tl.full([BLOCK_C], True, tl.int1)
        bias = log_weight(key, exists, n_tokens, SPAN_2, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e + (bias[None, :] - peak[:, None])
        dp = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
        grad_logits = tl.exp2(logits) * (dp - delta[:, None])
        grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)
    if filled < n_l2:
        key = filled + tl.arange(0, BLOCK_C)
        exists = key < n_l2
        bias = log_weight(key, exists, n_tokens, SPAN_2, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e + (bias[None, :] - peak[:, None])
        dp = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
        grad_logits = tl.exp2(logits) * (dp - delta[:, None])
        grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)

    # level 1: the children of what the queries' level-2 token keeps
    n_l1 = tl.cdiv(n_tokens, SPAN_1)
    k_base = of_saved(k_l1_ptr, kv_head, saved_step)
    v_base = of_saved(v_l1_ptr, kv_head, saved_step)
    list_ptr = of_saved(kept_l2_ptr, head, saved_step) + above * width_l2
    place = tl.arange(0, BLOCK_C)
    parent = parents(list_ptr, 0, place, width_l2, BLOCK_2)
    for start in range(0, width_l2 * BLOCK_2, BLOCK_C):
        key, exists = children(parent, start, place, n_l1, BLOCK_2, FULL)
        parent = parents(list_ptr, start + BLOCK_C, place, width_l2, BLOCK_2)  # of the next tile, in time
        bias = log_weight(key, exists, n_tokens, SPAN_1, FULL)
        k = load_rows(k_base, key, HEAD_DIM, exists)
        v = load_rows(v_base, key, HEAD_DIM, exists)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e + (bias[None, :] - peak[:, None])
        dp = tl.dot(grad_o, tl.trans(v), input_precision="ieee")
        grad_logits = tl.exp2(logits) * (dp - delta[:, None])
        grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)

    q_blocks = tl.reshape(q, [GROUP, BLOCK_M, PAD_DIM])
    grad_o_blocks = tl.reshape(grad_o, [GROUP, BLOCK_M, PAD_DIM])
    peak = tl.reshape(peak, [GROUP, BLOCK_M, 1])
    delta = tl.reshape(delta, [GROUP, BLOCK_M, 1])
    grad_q = tl.reshape(grad_q, [GROUP, BLOCK_M, PAD_DIM])
    # level 0: the tokens of the key blocks that each query block keeps
    k_base = head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch)
    v_base = head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch)
    list_ptr = of_saved(kept_l1_ptr, head, saved_step) + tl.minimum(block, m_l1 - 1)[:, None] * width_l1
    place = tl.arange(0, BLOCK_N)[None, :]
    parent = parents(list_ptr, 0, place, width_l1, BLOCK_1)
    if PIPELINED_QK:  # the first tile on its own, so that the rows of the queries stay in registers
        start = 0
        key, exists = children(parent, start, place, n_tokens, BLOCK_1, FULL)
        parent = parents(list_ptr, start + BLOCK_N, place, width_l1, BLOCK_1)  # of the next tile, in time
        bias = tl.where(exists, 0.0, float("-inf"))
        k = load_rows(k_base, key, stride_kn, exists)
        v = load_rows(v_base, key, stride_vn, exists)
        logits = tl.dot(q_blocks, tl.permute(k, (0, 2, 1)), input_precision="ieee") * scale_log2e + (bias[:, None, :] - peak)
        dp = tl.dot(grad_o_blocks, tl.permute(v, (0, 2, 1)), input_precision="ieee")
        grad_logits = tl.exp2(logits) * (dp - delta)
        grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)
    for start in range(BLOCK_N if PIPELINED_QK else 0, width_l1 * BLOCK_1, BLOCK_N):
        key, exists = children(parent, start, place, n_tokens, BLOCK_1, FULL)
        parent = parents(list_ptr, start + BLOCK_N, place, width_l1, BLOCK_1)  # of the next tile, in time
        bias = tl.where(exists, 0.0, float("-inf"))
        k = load_rows(k_base, key, stride_kn, exists)
        v = load_rows(v_base, key, stride_vn, exists)
        logits = tl.dot(q_blocks, tl.permute(k, (0, 2, 1)), input_precision="ieee") * scale_log2e + (bias[:, None, :] - peak)
        dp = tl.dot(grad_o_blocks, tl.permute(v, (0, 2, 1)), input_precision="ieee")
        grad_logits = tl.exp2(logits) * (dp - delta)
        grad_q = add_product(grad_logits.to(k.dtype), k, grad_q)
    grad_q = tl.reshape(grad_q, [GROUP * BLOCK_M, PAD_DIM])

    store_rows(of_head(grad_q_ptr, head, m_tokens, HEAD_DIM), token, HEAD_DIM, inside, grad_q * (scale / total)[:, None])


@triton.jit
def grad_step(q, grad_o, k, v, bias, scale_log2e, peak, total, delta, grad_k, grad_v):
    """Add a tile of queries [M] to the gradients of a tile of keys [N]: dv += p^T do, dk += p^T (do.v - delta) q."""
    logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2e + bias[:, None]
    if q.dtype == tl.float32:
        p = tl.exp2(logits - peak[None, :]) * (1.0 / total)[None, :]
    else:  # `total` is 1
        p = tl.exp2(logits - peak[None, :])
    grad_v = add_product(p.to(q.dtype), grad_o, grad_v)
    dp = tl.dot(v, tl.trans(grad_o), input_precision="ieee")
    grad_k = add_product((p * (dp - delta[None, :])).to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit
def grad_queries(
    q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, total_ptr, delta_ptr,
    token, inside, k, v, bias, scale_log2e, grad_k, grad_v,
):
    """`grad_step` for the queries `token`, of one head, where `inside`."""
    # Other threads load rows than load `peak`. Nothing moves across a maximum, so tokens change threads, once, as 32 bits;
    # otherwise Triton 3.8 and later change two products with strides, as 64 bits.
    row = tl.reshape(tl.broadcast_to(token[:, None], [token.shape[0], 2]), [2 * token.shape[0]])
    row = tl.max(tl.reshape(row, [token.shape[0], 2]), 1)
    q = load_rows(q_ptr, row, stride_qn, inside)
    grad_o = load_rows(grad_o_ptr, row, stride_gn, inside)
    peak = tl.load(peak_ptr + token, mask=inside, other=float("inf"))  # so that p = 0 outside
    total = tl.load(total_ptr + token, mask=inside, other=1.0)
    delta = tl.load(delta_ptr + token, mask=inside, other=0.0)
    return grad_step(q, grad_o, k, v, bias, scale_log2e, peak, total, delta, grad_k, grad_v)


@triton.jit
def grad_run(
    q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, total_ptr, delta_ptr,
    begin, end, k, v, bias, scale, BLOCK_M: tl.constexpr,
):
    """dk, dv of a tile of keys from the queries begin..end of one head."""
    grad_k = tl.zeros(k.shape, tl.float32)
    grad_v = tl.zeros(v.shape, tl.float32)
    for start in range(begin, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        grad_k, grad_v = grad_queries(
            q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, total_ptr, delta_ptr,
            token, token < end, k, v, bias, scale * LOG2E, grad_k, grad_v,
        )
    return grad_k * scale, grad_v


@triton.jit
def sum_of_splits(grad_k_ptr, grad_v_ptr, head, splits, n_keys, key, exists):
    """dk, dv of a tile of keys of one head: the partial sums [B*H, splits, n_keys, D] in order, in float32."""
    grad_k = tl.zeros([key.shape[0], PAD_DIM], tl.float32)
    grad_v = tl.zeros([key.shape[0], PAD_DIM], tl.float32)
    for split in range(0, splits):
        of = head * splits + split
        grad_k += load_rows(of_head(grad_k_ptr, of, n_keys, HEAD_DIM), key, HEAD_DIM, exists).to(tl.float32)
        grad_v += load_rows(of_head(grad_v_ptr, of, n_keys, HEAD_DIM), key, HEAD_DIM, exists).to(tl.float32)
    return grad_k, grad_v


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_global_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]
    global_mask_ptr,  # [B, G] uint8: None where all take part
    partial_grad_k_global_ptr, partial_grad_v_global_ptr,  # [B*H, splits_global, G, D], out
    rows_global, splits_global, scale, heads_per_batch, m_tokens, g_tokens, saved_step,  # queries a split, how many splits, s, H, M, G, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv of BLOCK_N global tokens, which all queries attend to, from one split of the queries.

    Grid: B*H * splits_global * ceil(G / BLOCK_N).
    """
    head, split, tile = head_token_and_tile(tl.program_id(0), splits_global, tl.cdiv(g_tokens, BLOCK_N))
    kv_head = kv_head_of(head)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = take_part(key, global_mask_ptr, head // heads_per_batch, g_tokens)
    bias = tl.where(exists, 0.0, float("-inf"))
    k = load_rows(of_head(k_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, key < g_tokens)
    v = load_rows(of_head(v_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, key < g_tokens)
    begin = split * rows_global
    grad_k, grad_v = grad_run(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_saved(total_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1),
        begin, tl.minimum(begin + rows_global, m_tokens), k, v, bias, scale, BLOCK_M,
    )
    to = head * splits_global + split
    store_rows(of_head(partial_grad_k_global_ptr, to, g_tokens, HEAD_DIM), key, HEAD_DIM, key < g_tokens, grad_k)
    store_rows(of_head(partial_grad_v_global_ptr, to, g_tokens, HEAD_DIM), key, HEAD_DIM, key < g_tokens, grad_v)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_global_sum_kernel(
    partial_grad_k_global_ptr, partial_grad_v_global_ptr,  # [B*H, splits_global, G, D]
    grad_k_global_ptr, grad_v_global_ptr,  # [B*H_kv, G, D], out
    splits_global, g_tokens,  # how many splits, G
    BLOCK: tl.constexpr,
):
    """dk, dv of BLOCK global tokens: the splits summed in order, in float32.

    Grid: B*H_kv * ceil(G / BLOCK).
    """
    kv_head, tile = head_and_tile(tl.program_id(0), tl.cdiv(g_tokens, BLOCK))
    key = tile * BLOCK + tl.arange(0, BLOCK)
    exists = key < g_tokens
    grad_k, grad_v = sum_of_splits(partial_grad_k_global_ptr, partial_grad_v_global_ptr, kv_head, splits_global, g_tokens, key, exists)
    store_rows(of_head(grad_k_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, exists, grad_k)
    store_rows(of_head(grad_v_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, exists, grad_v)


@triton.jit
def overflow_owner(overflow_ptr, part, n_rows):
    """The list that overflow part number `part` belongs to: the last row whose running sum of parts is at most `part`."""
    low = part * 0
    high = low + n_rows
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(overflow_ptr + middle) <= part
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def keeper_and_slot(keepers_ptr, kept_ptr, entry, end, parent, width, KEEP: tl.constexpr):
    """The keepers at entries [M] of a parent's list, which ends at `end`, and where the parent is in what each keeps."""
    keeper = tl.load(keepers_ptr + entry, mask=entry < end, other=0).to(tl.int64)
    slot = tl.arange(0, KEEP)[None, :]
    kept = tl.load(kept_ptr + keeper[:, None] * width + slot, mask=slot < width, other=-1)
    return keeper, tl.sum(tl.where(kept == parent, slot, 0), 1)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l2_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    partial_grad_k_l2_ptr, partial_grad_v_l2_ptr,  # [B*H, splits_l2, T_2(N), D], out: per token covered
    rows_l2, splits_l2, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # queries a split, how many splits, s, H, M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv of BLOCK_N tokens of level 2, which all queries attend to, from one split of the queries.

    Grid: B*H * splits_l2 * ceil(T_2(N) / BLOCK_N).
    """
    n_l2 = tl.cdiv(n_tokens, SPAN_2)
    n_keys = n_l2
    head, split, tile = head_token_and_tile(tl.program_id(0), splits_l2, tl.cdiv(n_keys, BLOCK_N))
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key, exists = place, place < n_keys
    begin = split * rows_l2
    end = tl.minimum(begin + rows_l2, m_tokens)
    to = head * splits_l2 + split
    kv_head = kv_head_of(head)
    bias = log_weight(key, exists, n_tokens, SPAN_2, False)
    k = load_rows(of_saved(k_l2_ptr, kv_head, saved_step), key, HEAD_DIM, exists)
    v = load_rows(of_saved(v_l2_ptr, kv_head, saved_step), key, HEAD_DIM, exists)
    grad_k, grad_v = grad_run(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_saved(total_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1),
        begin, end, k, v, bias, scale, BLOCK_M,
    )
    covered = tl.where(exists, tl.minimum(n_tokens - key * SPAN_2, SPAN_2), 1).to(tl.float32)[:, None]
    store_rows(of_head(partial_grad_k_l2_ptr, to, n_keys, HEAD_DIM), place, HEAD_DIM, place < n_keys, grad_k / covered)
    store_rows(of_head(partial_grad_v_l2_ptr, to, n_keys, HEAD_DIM), place, HEAD_DIM, place < n_keys, grad_v / covered)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l2_sum_kernel(
    partial_grad_k_l2_ptr, partial_grad_v_l2_ptr,  # [B*H, splits_l2, T_2(N), D]
    grad_k_l2_ptr, grad_v_l2_ptr,  # [B*H_kv, T_2(N), D] float32, out: per token covered
    splits_l2, n_tokens,  # how many splits, N
    BLOCK: tl.constexpr,
):
    """dk, dv of BLOCK tokens of level 2: the splits summed in order, in float32.

    Grid: B*H_kv * ceil(T_2(N) / BLOCK).
    """
    n_l2 = tl.cdiv(n_tokens, SPAN_2)
    kv_head, tile = head_and_tile(tl.program_id(0), tl.cdiv(n_l2, BLOCK))
    key = tile * BLOCK + tl.arange(0, BLOCK)
    exists = key < n_l2
    grad_k, grad_v = sum_of_splits(
        partial_grad_k_l2_ptr, partial_grad_v_l2_ptr, kv_head, splits_l2, n_l2, key, exists
    )
    store_rows(of_head(grad_k_l2_ptr, kv_head, tl.cdiv(n_tokens, SPAN_2), HEAD_DIM), key, HEAD_DIM, exists, grad_k)
    store_rows(of_head(grad_v_l2_ptr, kv_head, tl.cdiv(n_tokens, SPAN_2), HEAD_DIM), key, HEAD_DIM, exists, grad_v)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l1_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    partial_grad_k_l1_ptr, partial_grad_v_l1_ptr,  # [B*H, T_2(M), splits_l1, width_l2 * b_2, D], out: per token covered
    rows_l1, splits_l1, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # queries a split, how many splits, s, H, M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv of BLOCK_N of the children of what a level-2 query token keeps, from one split of its queries.

    Grid: B*H * T_2(M) * splits_l1 * ceil(width_l2 * b_2 / BLOCK_N).
    """
    n_l1 = tl.cdiv(n_tokens, SPAN_1)
    n_keys = width_l2 * BLOCK_2
    tiles, m_l2 = tl.cdiv(n_keys, BLOCK_N), tl.cdiv(m_tokens, SPAN_2)
    head, keeper, tile = head_token_and_tile(tl.program_id(0), m_l2, splits_l1 * tiles)
    split, tile = tile // tiles, tile % tiles
    first = tile * BLOCK_N
    place = first + tl.arange(0, BLOCK_N)
    list_ptr = of_saved(kept_l2_ptr, head, saved_step) + keeper * width_l2
    parent = parents(list_ptr, first, tl.arange(0, BLOCK_N), width_l2, BLOCK_2)
    key, exists = children(parent, first, tl.arange(0, BLOCK_N), n_l1, BLOCK_2, False)
    begin = keeper * SPAN_2 + split * rows_l1
    end = tl.minimum(tl.minimum(begin + rows_l1, (keeper + 1) * SPAN_2), m_tokens)
    to = (head * m_l2 + keeper) * splits_l1 + split
    kv_head = kv_head_of(head)
    bias = log_weight(key, exists, n_tokens, SPAN_1, False)
    k = load_rows(of_saved(k_l1_ptr, kv_head, saved_step), key, HEAD_DIM, exists)
    v = load_rows(of_saved(v_l1_ptr, kv_head, saved_step), key, HEAD_DIM, exists)
    grad_k, grad_v = grad_run(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_saved(total_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1),
        begin, end, k, v, bias, scale, BLOCK_M,
    )
    covered = tl.where(exists, tl.minimum(n_tokens - key * SPAN_1, SPAN_1), 1).to(tl.float32)[:, None]
    store_rows(of_head(partial_grad_k_l1_ptr, to, n_keys, HEAD_DIM), place, HEAD_DIM, place < n_keys, grad_k / covered)
    store_rows(of_head(partial_grad_v_l1_ptr, to, n_keys, HEAD_DIM), place, HEAD_DIM, place < n_keys, grad_v / covered)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l1_sum_kernel(
    partial_grad_k_l1_ptr, partial_grad_v_l1_ptr,  # [B*H, T_2(M), splits_l1, width_l2 * b_2, D]
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    keepers_l2_ptr,  # [B*H, T_2(M) * width_l2] int32
    offsets_l2_ptr,  # [B*H, T_2(N) + 1] int32
    grad_k_l2_ptr, grad_v_l2_ptr,  # [B*H_kv, T_2(N), D] float32
    grad_k_l1_ptr, grad_v_l1_ptr,  # [B*H_kv, T_1(N), D] float32, out: per token covered
    splits_l1, m_tokens, n_tokens, saved_step,  # how many splits, M, N, 256 bytes each, from head to head of what is saved
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):
    """dk, dv of BLOCK children of a level-2 token: the partial sums of its keepers, ROWS at a time in order, and level 2's gradient, in float32.

    Grid: B*H_kv * T_2(N) * ceil(b_2 / BLOCK). KEEP is the largest width rounded up to a power of two.
    """
    n_l1, n_l2 = tl.cdiv(n_tokens, SPAN_1), tl.cdiv(n_tokens, SPAN_2)
    m_l2 = tl.cdiv(m_tokens, SPAN_2)
    kv_head, parent, tile = head_token_and_tile(tl.program_id(0), n_l2, tl.cdiv(BLOCK_2, BLOCK))
    head = kv_head  # whose partial sums they are
    child = tile * BLOCK + tl.arange(0, BLOCK)
    key = parent * BLOCK_2 + child
    exists = (child < BLOCK_2) & (key < n_l1)
    kept_ptr = of_saved(kept_l2_ptr, head, saved_step)
    keepers_ptr = of_head(keepers_l2_ptr, head, tl.cdiv(m_tokens, SPAN_2), width_l2)
    offsets_ptr = of_head(offsets_l2_ptr, head, tl.cdiv(n_tokens, SPAN_2) + 1, 1) + parent
    begin, end = tl.load(offsets_ptr), tl.load(offsets_ptr + 1)
    grad_k = tl.zeros([BLOCK, PAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK, PAD_DIM], tl.float32)
    entry = tl.arange(0, ROWS)
    keeper, slot = keeper_and_slot(keepers_ptr, kept_ptr, begin + entry, end, parent, width_l2, KEEP)
    for start in range(begin, end, ROWS):
        inside = (start + entry < end)[:, None] & exists[None, :]
        first = (head * m_l2 + keeper) * splits_l1
        for split in range(0, splits_l1):
            row = (((first + split) * width_l2 + slot) * BLOCK_2)[:, None] + child[None, :]
            grad_k += tl.sum(load_rows(partial_grad_k_l1_ptr, row, HEAD_DIM, inside).to(tl.float32), 0)
            grad_v += tl.sum(load_rows(partial_grad_v_l1_ptr, row, HEAD_DIM, inside).to(tl.float32), 0)
        keeper, slot = keeper_and_slot(keepers_ptr, kept_ptr, start + ROWS + entry, end, parent, width_l2, KEEP)  # in time
    coarse = parent + tl.zeros([1], tl.int32)
    grad_k += load_rows(of_head(grad_k_l2_ptr, kv_head, tl.cdiv(n_tokens, SPAN_2), HEAD_DIM), coarse, HEAD_DIM, coarse >= 0)
    grad_v += load_rows(of_head(grad_v_l2_ptr, kv_head, tl.cdiv(n_tokens, SPAN_2), HEAD_DIM), coarse, HEAD_DIM, coarse >= 0)
    store_rows(of_head(grad_k_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM), key, HEAD_DIM, exists, grad_k)
    store_rows(of_head(grad_v_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM), key, HEAD_DIM, exists, grad_v)


@triton.jit
def grad_kv_l0_part(
    q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, total_ptr, delta_ptr,
    k_ptr, stride_kn, v_ptr, stride_vn, keepers_ptr, begin, end, key, exists, scale, m_tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv [BLOCK_N, D] of the level-0 tokens `key`, from the queries under entries begin..end of a keepers list.

    All pointers are to one head. The entries are level-1 query tokens of 16 queries each; only the last token
    of the sequence has fewer, and lists are ascending, so that nothing but the last entry can be short.
    """
    bias = tl.where(exists, 0.0, float("-inf"))
    k = load_rows(k_ptr, key, stride_kn, exists)
    v = load_rows(v_ptr, key, stride_vn, exists)
    grad_k = tl.zeros([BLOCK_N, PAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, PAD_DIM], tl.float32)
    last = tl.load(keepers_ptr + end - 1, mask=begin < end, other=0)
    n_queries = (end - 1 - begin) * SPAN_1 + tl.minimum(m_tokens - last * SPAN_1, SPAN_1)
    n_queries = tl.where(begin < end, n_queries, 0)
    place = tl.arange(0, BLOCK_M)
    keeper = parents(keepers_ptr + begin, 0, place, end - begin, SPAN_1)
    for start in range(0, n_queries, BLOCK_M):
        token, _ = children(keeper, start, place, m_tokens, SPAN_1, True)
        inside = start + place < n_queries
        keeper = parents(keepers_ptr + begin, start + BLOCK_M, place, end - begin, SPAN_1)  # of the next tile, in time
        grad_k, grad_v = grad_queries(
            q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, total_ptr, delta_ptr,
            token, inside, k, v, bias, scale * LOG2E, grad_k, grad_v,
        )
    return grad_k * scale, grad_v


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l0_overflow_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    keepers_l1_ptr, width_l1,  # [B*H, T_1(M) * width_l1] int32
    offsets_l1_ptr, overflow_l1_ptr,  # [B*H, T_1(N) + 1] int32
    overflow_grad_k_l0_ptr, overflow_grad_v_l0_ptr,  # [B*H, parts_l0, b_1, D] float32, out
    parts_l0, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # room for overflow parts a head, s, H, M, N, 256 bytes each, from head to head of what is saved
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv of the children of a level-1 token from one part of its keepers: PART entries beyond the first PART.

    Popular key tokens, which many queries keep, are thereby spread over many programs.
    Grid: B*H * parts_l0 * ceil(b_1 / BLOCK_N); programs beyond the parts there are return at once.
    """
    n_l1 = tl.cdiv(n_tokens, SPAN_1)
    head, part, tile = head_token_and_tile(tl.program_id(0), parts_l0, tl.cdiv(BLOCK_1, BLOCK_N))
    kv_head = kv_head_of(head)
    overflow_ptr = of_head(overflow_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1)
    if part >= tl.load(overflow_ptr + n_l1):
        return
    parent = overflow_owner(overflow_ptr, part, n_l1)
    offsets_ptr = of_head(offsets_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + parent
    begin = tl.load(offsets_ptr) + (1 + part - tl.load(overflow_ptr + parent)) * PART
    child = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum(begin + PART, tl.load(offsets_ptr + 1))
    key = parent * BLOCK_1 + child
    exists = (child < BLOCK_1) & (key < n_tokens)
    grad_k, grad_v = grad_kv_l0_part(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_saved(total_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1),
        head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn,
        head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn,
        of_head(keepers_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), width_l1), begin, end, key, exists, scale, m_tokens,
        BLOCK_M, BLOCK_N,
    )
    to = head * parts_l0 + part
    store_rows(of_head(overflow_grad_k_l0_ptr, to, BLOCK_1, HEAD_DIM), child, HEAD_DIM, child < BLOCK_1, grad_k)
    store_rows(of_head(overflow_grad_v_l0_ptr, to, BLOCK_1, HEAD_DIM), child, HEAD_DIM, child < BLOCK_1, grad_v)


@triton.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l0_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    keepers_l1_ptr, width_l1,  # [B*H, T_1(M) * width_l1] int32
    offsets_l1_ptr, overflow_l1_ptr,  # [B*H, T_1(N) + 1] int32
    overflow_grad_k_l0_ptr, overflow_grad_v_l0_ptr,  # [B*H, parts_l0, b_1, D] float32
    grad_k_l1_ptr, grad_v_l1_ptr,  # [B*H_kv, T_1(N), D] float32
    grad_k_ptr, grad_v_ptr,  # [B*H_kv, N, D], out
    parts_l0, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # room for overflow parts a head, s, H, M, N, 256 bytes each, from head to head of what is saved
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk, dv of the children of a level-1 token: the first PART of its keepers, the overflow parts, and level 1's gradient.

    Grid: B*H_kv * T_1(N) * ceil(b_1 / BLOCK_N).
    """
    n_l1 = tl.cdiv(n_tokens, SPAN_1)
    head, parent, tile = head_token_and_tile(tl.program_id(0), n_l1, tl.cdiv(BLOCK_1, BLOCK_N))
    kv_head = kv_head_of(head)
    # added at the end, read now, while there is nothing else to do: overflow parts, and what the token above hands down
    overflow_ptr = of_head(overflow_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + parent
    first_overflow, last_overflow = tl.load(overflow_ptr), tl.load(overflow_ptr + 1)
    coarse = parent + tl.zeros([1], tl.int32)
    from_above_k = load_rows(of_head(grad_k_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM), coarse, HEAD_DIM, coarse >= 0)
    from_above_v = load_rows(of_head(grad_v_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM), coarse, HEAD_DIM, coarse >= 0)
    offsets_ptr = of_head(offsets_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + parent
    begin = tl.load(offsets_ptr)
    child = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum(begin + PART, tl.load(offsets_ptr + 1))
    key = parent * BLOCK_1 + child
    exists = (child < BLOCK_1) & (key < n_tokens)
    grad_k, grad_v = grad_kv_l0_part(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_saved(total_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1),
        head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn,
        head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn,
        of_head(keepers_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), width_l1), begin, end, key, exists, scale, m_tokens,
        BLOCK_M, BLOCK_N,
    )
    for part in range(first_overflow, last_overflow):
        of = head * parts_l0 + part
        grad_k += load_rows(of_head(overflow_grad_k_l0_ptr, of, BLOCK_1, HEAD_DIM), child, HEAD_DIM, child < BLOCK_1)
        grad_v += load_rows(of_head(overflow_grad_v_l0_ptr, of, BLOCK_1, HEAD_DIM), child, HEAD_DIM, child < BLOCK_1)
    grad_k += from_above_k
    grad_v += from_above_v
    store_rows(of_head(grad_k_ptr, kv_head, n_tokens, HEAD_DIM), key, HEAD_DIM, exists, grad_k)
    store_rows(of_head(grad_v_ptr, kv_head, n_tokens, HEAD_DIM), key, HEAD_DIM, exists, grad_v)


# ---- the same for the matrix units of H100 ---------------------------------------------------------------------------


# Layouts. In registers of four warps: rows that are copied, 16 bytes a thread; products of 64 rows (`warpgroup_mma`) with
# a tile of PAD_DIM columns, and the left operand of one; in shared memory: rows as products read them, 128 bytes each.
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
# The same of a batch of four blocks of 16 rows, a warp each.
# In shared memory they lie where SHARED has the 64 rows: of each row the places of 16 bytes are swapped by its last three bits.
BATCH = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
LEFT_BATCH = gl.constexpr(gl.DotOperandLayout(0, BATCH.value, 2))
RIGHT_BATCH = gl.constexpr(gl.DotOperandLayout(1, BATCH.value, 2))
SHARED_BATCH = gl.constexpr(gl.SharedLinearLayout(
    [
        [0, 0, 1], [0, 0, 2], [0, 0, 4],  # 16 bytes
        [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 1, 8], [0, 2, 16], [0, 4, 32],
        [0, 8, 0], [1, 0, 0], [2, 0, 0],
    ],
    alignment=1024,
))
WEIGHT_2 = gl.constexpr(math.log2(256))  # log2 of the weight of a whole token of level 2
WEIGHT_1 = gl.constexpr(math.log2(16))  # log2 of the weight of a whole token of level 1
# Triton's names for these changed from 3.8 to 3.9.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

# Buffers of a ring: one is read, and tiles are copied into the others, or into one of them while the last product
# still reads the other.
STAGES = gl.constexpr(3)


@gluon.jit
def row_tile(ptr, row, stride, LAYOUT: gl.constexpr):
    """Rows `row` [M] of a matrix [*, HEAD_DIM]: addresses [M, PAD_DIM] in a layout, and which columns exist."""
    dim = gl.arange(0, PAD_DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    begin = gl.multiple_of(row.to(gl.int64) * stride, [ROW_UNIT])
    return ptr + begin[:, None] + dim, dim < HEAD_DIM


@gluon.jit
def copy_rows(to, ptr, row, stride, inside):
    """Begin to copy rows `row` [M] to shared memory [M, PAD_DIM]; zero where not `inside` and in the padding.

    Here and in `write_rows`, `row` lies as the rows of a layout for copies, 16 bytes a thread.
    """
    LAYOUT: gl.constexpr = row.type.layout.parent
    at, _ = row_tile(ptr, row, stride, LAYOUT)
    async_load(to, at, mask=inside[:, None])


@gluon.jit
def write_rows(ptr, row, inside, tile):
    """Write a tile [M, PAD_DIM] of products to rows `row` [M] of a matrix [*, HEAD_DIM], where `inside`.

    By way of shared memory: as products lie, a thread would write 4 bytes at a time.
    """
    LAYOUT: gl.constexpr = row.type.layout.parent
    at, column = row_tile(ptr, row, HEAD_DIM, LAYOUT)
    tile = gl.convert_layout(tile.to(ptr.dtype.element_ty), LAYOUT)
    gl.store(at, tile, mask=inside[:, None] & column)


@gluon.jit
def next_of(stage):
    """Of a ring of STAGES buffers, the one after this one."""
    return gl.where(stage == STAGES - 1, 0, stage + 1)


@gluon.jit
def before(stage):
    """The one before this one: the last to be done with, and so the next to be filled."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def copy_queries(
    q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, delta_ptr, start, end,
    q_to, grad_o_to, peak_to, delta_to, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):
    """Begin to copy BLOCK_M queries of one head from `start` on, with what belongs to them; zeros beyond `end`."""
    row = start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    copy_rows(q_to, q_ptr, row, stride_qn, row < end)
    copy_rows(grad_o_to, grad_o_ptr, row, stride_gn, row < end)
    number = start + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    async_load(peak_to, peak_ptr + number, mask=number < end)
    async_load(delta_to, delta_ptr + number, mask=number < end)


@gluon.jit
def wide_product(a, b):
    """a * b of 32 bits each, as 64 bits: one instruction, where the compiler makes four once it has widened b before a loop."""
    return gl.inline_asm_elementwise(
        "mul.wide.s32 $0, $1, $2;", "=l,r,r", [a, b], dtype=gl.int64, is_pure=True, pack=1
    )


@gluon.jit
def as_batch(tile):
    """A tile of 64 rows in shared memory as four blocks of 16: [4, 16, D]."""
    return reinterpret(tile, tile.dtype, [4, 16, PAD_DIM], SHARED_BATCH)


class Keys(NamedTuple):
    """The keys that a program's queries attend to, of one head, as a row of tiles."""

    k_ptr: gl.tensor  # of the fine keys
    k_stride: gl.tensor
    v_ptr: gl.tensor
    v_stride: gl.tensor
    kept_l1_ptr: gl.tensor  # [T_1(M), width_l1]: whose children they are
    width_l1: gl.tensor
    end: gl.tensor  # how many tiles there are
    k_l1_ptr: gl.tensor
    v_l1_ptr: gl.tensor
    end_l1: gl.tensor  # how many of the tiles are of level 1 and those above
    kept_l2_ptr: gl.tensor  # [width_l2]: whose children they are
    width_l2: gl.tensor
    k_l2_ptr: gl.tensor
    v_l2_ptr: gl.tensor
    end_l2: gl.tensor  # how many of the tiles are of level 2
    m_tokens: gl.tensor  # M
    n_tokens: gl.tensor  # N
    first: gl.tensor  # of the query blocks


@gluon.jit
def copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile, k_to, v_to):
    """Begin to copy a tile of 64 global keys and values, if there is one; those that take no part are zeros already."""
    if (tile >= 0) & (tile * 64 < g_tokens):
        token = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
        copy_rows(k_to, of_head(k_global_ptr, kv_head, g_tokens, HEAD_DIM), token, HEAD_DIM, token < g_tokens)
        copy_rows(v_to, of_head(v_global_ptr, kv_head, g_tokens, HEAD_DIM), token, HEAD_DIM, token < g_tokens)


@gluon.jit
def parents_of_shared(keys, tile, FULL: gl.constexpr):
    """Of each row of a tile that all see, the kept token whose child it is: -1 for none, 0 at the coarsest level and beyond."""
    place = gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    parent = gl.zeros([64], gl.int32, layout=gl.SliceLayout(1, COPIED))
    if (tile >= keys.end_l2) & (tile < keys.end_l1):
        slot = ((tile - keys.end_l2) * 64 + place) // BLOCK_2
        if FULL:
            parent = gl.load(keys.kept_l2_ptr + slot)
        else:
            parent = gl.load(keys.kept_l2_ptr + slot, mask=slot < keys.width_l2, other=-1)
    return parent


@gluon.jit
def parents_of_fine(keys, tile):
    """Of each row of a fine tile, the kept token whose child it is: -1 for none, 0 beyond the last."""
    last = gl.cdiv(not_before(keys.m_tokens), SPAN_1) - 1  # or else a register would hold it through the loop
    block = gl.minimum(keys.first + gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED)) // 16, last)
    slot = tile - keys.end_l1
    inside = (block >= 0) & (slot >= 0) & (slot < keys.width_l1)
    return gl.load(keys.kept_l1_ptr + (block * keys.width_l1 + slot), mask=inside, other=0)


@gluon.jit
def copy_shared(keys, tile, parent, k_to, v_to, FULL: gl.constexpr):
    """Begin to copy a tile that all see of keys and values, the children of `parent`; zeros for keys that do not exist."""
    place = gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    if tile < keys.end_l2:
        key = tile * 64 + place
        inside = key < gl.cdiv(keys.n_tokens, SPAN_2)
        copy_rows(k_to, keys.k_l2_ptr, key, HEAD_DIM, inside)
        copy_rows(v_to, keys.v_l2_ptr, key, HEAD_DIM, inside)
    elif tile < keys.end_l1:
        key = parent * BLOCK_2 + ((tile - keys.end_l2) * 64 + place) % BLOCK_2
        inside = key >= 0 if FULL else (key >= 0) & (key < gl.cdiv(keys.n_tokens, SPAN_1))
        copy_rows(k_to, keys.k_l1_ptr, key, HEAD_DIM, inside)
        copy_rows(v_to, keys.v_l1_ptr, key, HEAD_DIM, inside)


@gluon.jit
def copy_listed(to, ptr, parent, stride, n_tokens, FULL: gl.constexpr):
    """`copy_rows` of 16 children each of four tokens, [64] of which `parent` names each sixteen times, -1 for none.

    A thread's rows are the same child of each: what differs between them, and from tile to tile, is one product.
    """
    child = gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED)) % 16
    at, _ = row_tile(ptr, child, stride, COPIED)
    at += (wide_product(parent, 2 * stride) * 8)[:, None]  # 8 elements are 16 bytes, which a thread copies
    if FULL:
        async_load(to, at)
    else:
        end = (n_tokens - child + 15) // 16  # of the tokens that have such a child
        inside = parent.to(gl.uint32) < end.to(gl.uint32)
        async_load(to, at, mask=inside[:, None])


@gluon.jit
def copy_fine(keys, tile, parent, k_to, v_to, FULL: gl.constexpr):
    """Begin to copy a fine tile of keys and values, the children of `parent`, if there is one."""
    if tile < keys.end:
        copy_listed(k_to, keys.k_ptr, parent, keys.k_stride, keys.n_tokens, FULL)
        copy_listed(v_to, keys.v_ptr, parent, keys.v_stride, keys.n_tokens, FULL)


@gluon.jit
def copy_tile(keys, tile, parent, k_to, v_to, FULL: gl.constexpr):
    """Begin to copy a tile, if there is one."""
    if tile < keys.end_l1:
        copy_shared(keys, tile, parent, k_to, v_to, FULL)
    else:
        copy_fine(keys, tile, parent, k_to, v_to, FULL)


@gluon.jit
def parents_of_tile(keys, tile, FULL: gl.constexpr):
    """`parents_of_shared` or `parents_of_fine`."""
    if tile < keys.end_l1:
        parent = parents_of_shared(keys, tile, FULL)
    else:
        parent = parents_of_fine(keys, tile)
    return parent


@gluon.jit
def read_list(list_ptr, width, MOST: gl.constexpr, other):
    """The tokens of a list, or of several in a row, of up to MOST: [MOST], `other` from `width` on."""
    # every warp reads all places, so that none has to tell the others by way of shared memory, of which tiles take all
    place = gl.arange(0, MOST, layout=gl.BlockedLayout([(MOST + 31) // 32], [32], [4], [0]))
    return gl.load(list_ptr + place, mask=place < width, other=other)


@gluon.jit
def loose_in_list(token, n_tokens, SPAN: gl.constexpr):
    """In which place of a list the token is that is cut short, -1 if in none, and how many places hold a token: the first ones."""
    place = gl.arange(0, token.shape[0], layout=token.type.layout)
    is_short = token == n_tokens // SPAN  # if the last token is whole, this one does not exist
    return gl.max(gl.where(is_short, place, -1), 0), gl.max(gl.where(token >= 0, place + 1, 0), 0)


@gluon.jit
def is_loose(place, short, filled, BLOCK: gl.constexpr):
    """Whether of the children of a list, in a tile that begins at `place`, some may not exist or be cut short."""
    return (place + 64 > filled * BLOCK) | ((short >= 0) & (place + 64 > short * BLOCK) & (place < short * BLOCK + BLOCK))


@gluon.jit
def read_fine(keys):
    """The tokens whose children are the fine keys of a program, of its four blocks: -1 for none, 0 beyond its blocks."""
    blocks = gl.minimum(4, gl.cdiv(keys.m_tokens, SPAN_1) - keys.first)
    return read_list(keys.kept_l1_ptr + keys.first * keys.width_l1, blocks * keys.width_l1, 32, 0)


@gluon.jit
def has_partial_fine(token, n_tokens):
    """Whether some fine keys of this program do not exist: it keeps a block that is cut short, or lists have gaps."""
    return gl.max(((token < 0) | (token == n_tokens // SPAN_1)).to(gl.int32), 0) > 0


@gluon.jit
def is_partial_tile(keys, tile, short_l2, filled_l2):
    """Whether some keys of a tile that all see may not exist, or weigh less than others of their level."""
    loose = tile * 64 + 64 > keys.n_tokens // SPAN_2
    loose = gl.where(tile < keys.end_l2, loose, is_loose((tile - keys.end_l2) * 64, short_l2, filled_l2, BLOCK_2))
    return loose


@gluon.jit
def not_before(number):
    """The number. What is made of it where few programs come is not worked out before a loop, for all to keep in registers."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def relative_weights(keys, tile, short_l2, filled_l2, LAYOUT: gl.constexpr):
    """What the keys of a tile that all see weigh, [64], in weights of a whole token of their level; 0 where there is none.

    Keys from `whole` on do not exist, but the first may weigh `share`, and those from `again` to `end`, children of the next
    entry of a list, are whole.
    """
    place = tile * 64 + gl.arange(0, 64, layout=LAYOUT)
    n_tokens = not_before(keys.n_tokens)
    whole = n_tokens // SPAN_2
    share = n_tokens % SPAN_2 * (1.0 / SPAN_2)
    again = whole
    end = whole + 1
    if (tile >= keys.end_l2) & (tile < keys.end_l1):
        place -= keys.end_l2 * 64
        whole = short_l2 * BLOCK_2 + (n_tokens // SPAN_1 - n_tokens // SPAN_2 * BLOCK_2)
        share = n_tokens % SPAN_1 * (1.0 / SPAN_1)
        again = short_l2 * BLOCK_2 + BLOCK_2
        end = filled_l2 * BLOCK_2
    missing = ((place > whole) & (place < again)) | (place >= end)
    return gl.where(missing, 0.0, gl.where(place == whole, share, 1.0))


@gluon.jit
def fine_exist(keys, tile):
    """Which keys of a fine tile exist, [4, 1, 16] as BATCH."""
    TILE: gl.constexpr = gl.SliceLayout(1, BATCH)
    n_tokens = not_before(keys.n_tokens)
    last = gl.cdiv(not_before(keys.m_tokens), SPAN_1) - 1
    block = gl.minimum(keys.first + gl.arange(0, 4, layout=gl.SliceLayout(1, TILE)), last)
    parent = gl.load(keys.kept_l1_ptr + (block * keys.width_l1 + (tile - keys.end_l1)))
    key = parent[:, None] * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, TILE))[None, :]
    return ((key >= 0) & (key < n_tokens))[:, None, :]


@gluon.jit
def sum_of_own(p):
    """Of each row of a tile [64, 64], as PRODUCT, what each of its four threads sums up of its own elements: [64, 4]."""
    return gl.sum(gl.sum(gl.reshape(p, [64, 8, 4, 2]), 3), 1)


@gluon.jit
def sum_of_own_batch(p):
    """The same of a batch of tiles [4, 16, 16], as BATCH: [4, 16, 4]."""
    return gl.sum(gl.sum(gl.reshape(p, [4, 16, 2, 4, 2]), 4), 2)


@gluon.jit
def attend_tiles(
    keys, k_global_ptr, v_global_ptr, global_mask_ptr, kv_head, batch, g_tokens, q_base, stride_qn, scale,
    FIXED_MAX: gl.constexpr, FULL: gl.constexpr,
):
    """peak, total [4, 16] and acc [4, 16, D] of four query blocks over all their keys, as `softmax_step` has them.

    FIXED_MAX: `peak` is the largest logit of the first tile and stays. Nothing waits for a maximum then, no sum is
    rescaled, and threads add up their sums at the end; but where other logits are much larger, a sum may not fit. Which
    sums do, is returned last. Global tokens, whose logits may well be much larger, have a running maximum anyway.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    dtype: gl.constexpr = q_base.dtype.element_ty
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, PAD_DIM], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, PAD_DIM], SHARED)
    q = gl.allocate_shared_memory(dtype, [64, PAD_DIM], SHARED)
    token = keys.first * 16 + gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    copy_rows(q, q_base, token, stride_qn, token < keys.m_tokens)
    if not FULL:  # read before copies begin, asked once they have
        list_l2 = read_list(keys.kept_l2_ptr, keys.width_l2, 8, -1)
        list_l1 = read_fine(keys)
    parent = parents_of_tile(keys, 0, FULL)
    for tile in range(2):
        copy_tile(keys, tile, parent, k_tiles.index(tile), v_tiles.index(tile), FULL)
        hopper.async_copy.commit_group()
        parent = parents_of_tile(keys, tile + 1, FULL)
    if FULL:
        short_l2: gl.constexpr = -1
        filled_l2 = keys.width_l2
        partial_fine: gl.constexpr = False
    else:
        short_l2, filled_l2 = loose_in_list(list_l2, keys.n_tokens, SPAN_2)
        partial_fine = has_partial_fine(list_l1, keys.n_tokens)

    peak = gl.full([64], float("-inf"), gl.float32, layout=ROWS)
    zeros = gl.zeros([64, 64], gl.float32, layout=PRODUCT)
    total = sum_of_own(zeros) if FIXED_MAX else gl.zeros([64], gl.float32, layout=ROWS)
    acc = hopper.warpgroup_mma_init(gl.zeros([64, PAD_DIM], gl.float32, layout=PRODUCT))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, PRODUCT))[None, :]
    stage = 0
    for tile in range(0, keys.end_l1):
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])  # of the tile before, whose place is filled again now
        hopper.async_copy.wait_group(1)
        hopper.fence_async_shared()
        to = before(stage)
        copy_tile(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), FULL)
        if k_global_ptr is not None:
            copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
        hopper.async_copy.commit_group()
        parent = parents_of_tile(keys, tile + 3, FULL)
        products = hopper.warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        products = hopper.warpgroup_mma_wait(0, deps=[products])
        weight = gl.where(tile < keys.end_l2, WEIGHT_2, WEIGHT_1)
        exist = gl.where(tile < keys.end_l2, gl.cdiv(keys.n_tokens, SPAN_2) - tile * 64, 64)
        loose = exist < 64 if FULL else is_partial_tile(keys, tile, short_l2, filled_l2)
        if FIXED_MAX:
            if tile == 0:
                # not of logits: those of the line below would then be kept apart from their bias
                taken = column < exist
                if not FULL:  # of whole tokens, so that the sum is 1 at least; if the only one is cut short, it weighs n_tokens
                    taken = column < gl.maximum(keys.n_tokens // SPAN_2, 1)
                high = gl.max(gl.where(taken, products * gl.where(scale < 0.0, -1.0, 1.0), float("-inf")), 1)
                # rounded once, in whichever variant: a query has the same bits beside one whose list has gaps
                peak = gl.fma(high, gl.abs(scale), (weight if FULL else gl.minimum(weight, gl.log2(keys.n_tokens.to(gl.float32)))))
            p = gl.exp2(products * scale + (weight - peak)[:, None])
            if loose:
                if FULL:
                    p = gl.where(column < exist, p, 0.0)
                else:
                    share = relative_weights(keys, tile, short_l2, filled_l2, gl.SliceLayout(0, PRODUCT))[None, :]
                    p = gl.where(share > 0.0, p * share, 0.0)
            total += sum_of_own(p)
        else:
            logits = products * scale + weight
            if loose:
                share = relative_weights(keys, tile, short_l2, filled_l2, gl.SliceLayout(0, PRODUCT))[None, :]
                logits = gl.where(share > 0.0, logits + gl.log2(share), float("-inf"))
            new_peak = gl.maximum(peak, gl.max(logits, 1))
            p = gl.exp2(logits - new_peak[:, None])
            shrink = gl.exp2(peak - new_peak)
            total = total * shrink + gl.sum(p, 1)
            peak = new_peak
            acc = acc * shrink[:, None]
        acc = hopper.warpgroup_mma(
            gl.convert_layout(p.to(dtype), LEFT), v_tiles.index(stage), hopper.warpgroup_mma_init(acc), is_async=True
        )
        stage = next_of(stage)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])

    # from here on a warp each has its own block: rows of products lie in registers as they did
    acc = gl.convert_layout(gl.reshape(acc, [4, 16, PAD_DIM]), BATCH)
    peak = gl.convert_layout(gl.reshape(peak, [4, 16]), gl.SliceLayout(2, BATCH))
    if FIXED_MAX:
        total = gl.convert_layout(gl.sum(total, 1), ROWS)
    total = gl.convert_layout(gl.reshape(total, [4, 16]), gl.SliceLayout(2, BATCH))
    q_batch = as_batch(q).load(LEFT_BATCH)
    zeros_batch = gl.zeros([4, 16, 16], gl.float32, layout=BATCH)
    if FIXED_MAX:
        fine_total = sum_of_own_batch(zeros_batch)
    if partial_fine:
        for tile in range(keys.end_l1, keys.end):
            hopper.async_copy.wait_group(1)
            to = before(stage)
            copy_fine(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), False)
            if k_global_ptr is not None:
                copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            parent = parents_of_fine(keys, tile + 3)
            k = as_batch(k_tiles.index(stage)).permute((0, 2, 1)).load(RIGHT_BATCH)
            products = hopper.mma_v2(q_batch, k, zeros_batch)
            if FIXED_MAX:
                p = gl.exp2(products * scale - peak[:, :, None])
                p = gl.where(fine_exist(keys, tile), p, 0.0)
                fine_total += sum_of_own_batch(p)
            else:
                logits = products * scale
                logits = gl.where(fine_exist(keys, tile), logits, float("-inf"))
                new_peak = gl.maximum(peak, gl.max(logits, 2))
                p = gl.exp2(logits - new_peak[:, :, None])
                shrink = gl.exp2(peak - new_peak)
                total = total * shrink + gl.sum(p, 2)
                peak = new_peak
                acc = acc * shrink[:, :, None]
            v = as_batch(v_tiles.index(stage)).load(RIGHT_BATCH)
            acc = hopper.mma_v2(gl.convert_layout(p.to(dtype), LEFT_BATCH), v, acc)
            stage = next_of(stage)
    else:
        for tile in range(keys.end_l1, keys.end):
            hopper.async_copy.wait_group(1)
            to = before(stage)
            copy_fine(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), True)
            if k_global_ptr is not None:
                copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            parent = parents_of_fine(keys, tile + 3)
            k = as_batch(k_tiles.index(stage)).permute((0, 2, 1)).load(RIGHT_BATCH)
            products = hopper.mma_v2(q_batch, k, zeros_batch)
            if FIXED_MAX:
                p = gl.exp2(products * scale - peak[:, :, None])
                fine_total += sum_of_own_batch(p)
            else:
                logits = products * scale
                new_peak = gl.maximum(peak, gl.max(logits, 2))
                p = gl.exp2(logits - new_peak[:, :, None])
                shrink = gl.exp2(peak - new_peak)
                total = total * shrink + gl.sum(p, 2)
                peak = new_peak
                acc = acc * shrink[:, :, None]
            v = as_batch(v_tiles.index(stage)).load(RIGHT_BATCH)
            acc = hopper.mma_v2(gl.convert_layout(p.to(dtype), LEFT_BATCH), v, acc)
            stage = next_of(stage)
    if FIXED_MAX:
        total += gl.convert_layout(gl.sum(fine_total, 2), gl.SliceLayout(2, BATCH))
        # not too large for the dtype of p, not rounded away, and a number
        fits = (total > 0.5) & (total < (2.0**15 if dtype == gl.float16 else 2.0**64))
    else:
        fits = gl.full([4, 16], True, gl.int1, layout=gl.SliceLayout(2, BATCH))
    if k_global_ptr is not None:
        acc = hopper.warpgroup_mma_init(gl.convert_layout(gl.reshape(acc, [64, PAD_DIM]), PRODUCT))
        peak = gl.convert_layout(gl.reshape(peak, [64]), ROWS)
        total = gl.convert_layout(gl.reshape(total, [64]), ROWS)
        for tile in range(0, gl.cdiv(g_tokens, 64)):
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            if global_mask_ptr is not None:
                place = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, PRODUCT))
                exists = take_part(place, global_mask_ptr, batch, g_tokens)[None, :]
            hopper.async_copy.wait_group(1)
            hopper.fence_async_shared()
            to = before(stage)
            copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            products = hopper.warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            products = hopper.warpgroup_mma_wait(0, deps=[products])
            logits = products * scale
            if global_mask_ptr is not None:
                logits = gl.where(exists, logits, float("-inf"))
            elif tile * 64 + 64 > g_tokens:
                logits = gl.where(tile * 64 + column < g_tokens, logits, float("-inf"))
            new_peak = gl.maximum(peak, gl.max(logits, 1))
            p = gl.exp2(logits - new_peak[:, None])
            shrink = gl.exp2(peak - new_peak)
            total = total * shrink + gl.sum(p, 1)
            peak = new_peak
            acc = hopper.warpgroup_mma_init(acc * shrink[:, None])
            acc = hopper.warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT), v_tiles.index(stage), acc, is_async=True)
            stage = next_of(stage)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        acc = gl.convert_layout(gl.reshape(acc, [4, 16, PAD_DIM]), BATCH)
        peak = gl.convert_layout(gl.reshape(peak, [4, 16]), gl.SliceLayout(2, BATCH))
        total = gl.convert_layout(gl.reshape(total, [4, 16]), gl.SliceLayout(2, BATCH))
    hopper.async_copy.wait_group(0)
    return peak, total, acc, fits


@gluon.jit
def batch_rows():
    """The number of each row of four blocks of 16, [4, 16] as BATCH."""
    ROWS: gl.constexpr = gl.SliceLayout(2, BATCH)
    block = gl.arange(0, 4, layout=gl.SliceLayout(1, ROWS))[:, None]
    return block * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS))[None, :]


@gluon.jit
def write_attended(keys, o_ptr, lse_ptr, peak_ptr, total_ptr, head, m_tokens, saved_step, peak, total, acc, fits):
    """Write what `attend_tiles` returned. `total`, 1 in half precision (attend_kernel), is 0 where the sum does not fit."""
    token = keys.first * 16 + gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    o = gl.reshape(acc * (1.0 / total)[:, :, None], [64, PAD_DIM])
    write_rows(of_head(o_ptr, head, m_tokens, HEAD_DIM), token, token < m_tokens, o)
    row = keys.first * 16 + batch_rows()
    inside = row < m_tokens
    log_sum = peak + gl.log2(total)
    gl.store(of_head(lse_ptr, head, m_tokens, 1) + row, log_sum * LN2, mask=inside)
    gl.store(of_saved(peak_ptr, head, saved_step) + row, log_sum, mask=inside)
    gl.store(of_saved(total_ptr, head, saved_step) + row, gl.where(fits, 1.0, 0.0), mask=inside)


@gluon.jit
def all_fit(totals_ptr, first, m_tokens, ROWS: gl.constexpr):
    """Whether the sums of ROWS queries of one head from `first` on fit, by what `write_attended` left in `total`."""
    row = first + gl.arange(0, ROWS, layout=gl.BlockedLayout([(ROWS + 127) // 128], [32], [4], [0]))
    return gl.min(gl.load(totals_ptr + row, mask=row < m_tokens, other=1.0), 0) > 0.0


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attend_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]: None where there are no globals
    global_mask_ptr,  # [B, G] uint8: None where all take part
    o_ptr,  # [B*H, M, D], out
    lse_ptr,  # [B*H, M] float32, out: natural logarithm of the sum of weights
    peak_ptr, total_ptr,  # [B*H, M] float32, out: the same sum as 2^peak * total
    scale, heads_per_batch, m_tokens, n_tokens, g_tokens, saved_step,  # s, H, M, N, G, 256 bytes each, from head to head of what is saved
    FULL: gl.constexpr,
):
    """What attend_kernel does, four query blocks a program, but for queries whose sums do not fit."""
    program = gl.program_id(0)
    head, group = head_and_tile(program, gl.cdiv(gl.cdiv(m_tokens, SPAN_1), 4))
    kv_head = kv_head_of(head)
    first = group * 4  # of the query blocks
    above = first // 16  # the level-2 token that they are under
    # tiles before the end of each level
    end_l2 = gl.cdiv(gl.cdiv(n_tokens, SPAN_2), 64)
    end_l1 = end_l2 + gl.cdiv(width_l2 * BLOCK_2, 64)
    keys = Keys(
        head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn,
        head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn,
        of_saved(kept_l1_ptr, head, saved_step), width_l1, end_l1 + width_l1,
        of_saved(k_l1_ptr, kv_head, saved_step), of_saved(v_l1_ptr, kv_head, saved_step), end_l1,
        of_saved(kept_l2_ptr, head, saved_step) + above * width_l2, width_l2,
        of_saved(k_l2_ptr, kv_head, saved_step), of_saved(v_l2_ptr, kv_head, saved_step), end_l2,
        m_tokens, n_tokens, first,
    )
    q_base = head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch)
    batch = head // heads_per_batch

    peak, total, acc, fits = attend_tiles(
        keys, k_global_ptr, v_global_ptr, global_mask_ptr, kv_head, batch, g_tokens, q_base, stride_qn, scale * LOG2E, FIXED_MAX=True, FULL=FULL
    )
    write_attended(keys, o_ptr, lse_ptr, peak_ptr, total_ptr, head, m_tokens, saved_step, peak, total, acc, fits)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attend_hopper_recompute_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]: None where there are no globals
    global_mask_ptr,  # [B, G] uint8: None where all take part
    o_ptr,  # [B*H, M, D], out
    lse_ptr,  # [B*H, M] float32, out: natural logarithm of the sum of weights
    peak_ptr, total_ptr,  # [B*H, M] float32, out: the same sum as 2^peak * total
    scale, heads_per_batch, m_tokens, n_tokens, g_tokens, saved_step,  # s, H, M, N, G, 256 bytes each, from head to head of what is saved
):
    """Attend again with a running maximum where attend_hopper_kernel found sums that do not fit: `total` is 0 there.

    A kernel of its own, since in the same one it would take registers from the usual case; it has next to nothing to do.
    Grid: B*H * ceil(ceil(T_1(M) / 4) / 16), 16 programs of the other one each.
    """
    groups_of_head = gl.cdiv(gl.cdiv(m_tokens, SPAN_1), 4)
    own_head, part = head_and_tile(gl.program_id(0), gl.cdiv(groups_of_head, 16))
    totals_ptr = of_saved(total_ptr, own_head, saved_step)
    if not all_fit(totals_ptr, part * 16 * 64, m_tokens, 16 * 64):
        for own_group in range(part * 16, gl.minimum(part * 16 + 16, groups_of_head)):
            if not all_fit(totals_ptr, own_group * 64, m_tokens, 64):
                program = (own_head * groups_of_head + own_group).to(gl.int32)
                head, group = head_and_tile(program, gl.cdiv(gl.cdiv(m_tokens, SPAN_1), 4))
                kv_head = kv_head_of(head)
                first = group * 4  # of the query blocks
                above = first // 16  # the level-2 token that they are under
                # tiles before the end of each level
                end_l2 = gl.cdiv(gl.cdiv(n_tokens, SPAN_2), 64)
                end_l1 = end_l2 + gl.cdiv(width_l2 * BLOCK_2, 64)
                keys = Keys(
                    head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn,
                    head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn,
                    of_saved(kept_l1_ptr, head, saved_step), width_l1, end_l1 + width_l1,
                    of_saved(k_l1_ptr, kv_head, saved_step), of_saved(v_l1_ptr, kv_head, saved_step), end_l1,
                    of_saved(kept_l2_ptr, head, saved_step) + above * width_l2, width_l2,
                    of_saved(k_l2_ptr, kv_head, saved_step), of_saved(v_l2_ptr, kv_head, saved_step), end_l2,
                    m_tokens, n_tokens, first,
                )
                q_base = head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch)
                batch = head // heads_per_batch
                peak, total, acc, fits = attend_tiles(
                    keys, k_global_ptr, v_global_ptr, global_mask_ptr, kv_head, batch, g_tokens, q_base, stride_qn, scale * LOG2E, FIXED_MAX=False, FULL=False
                )
                write_attended(keys, o_ptr, lse_ptr, peak_ptr, total_ptr, head, m_tokens, saved_step, peak, total, acc, fits)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def grad_q_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    kept_l1_ptr, width_l1,  # [B*H, T_1(M), width_l1] int32
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    o_ptr,  # [B*H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr,  # [B*H, M] float32
    grad_lse_ptr,  # [B*H, M] float32: None where lse has no gradient
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]: None where there are no globals
    global_mask_ptr,  # [B, G] uint8: None where all take part
    grad_q_ptr,  # [B*H, M, D], out
    delta_ptr,  # [B*H, M] float32, out
    scale, heads_per_batch, m_tokens, n_tokens, g_tokens, saved_step,  # s, H, M, N, G, 256 bytes each, from head to head of what is saved
    FULL: gl.constexpr,
):
    """What grad_q_kernel does, with four query blocks a program. `total` is 1 in half precision."""
    program = gl.program_id(0)
    head, group = head_and_tile(program, gl.cdiv(gl.cdiv(m_tokens, SPAN_1), 4))
    kv_head = kv_head_of(head)
    first = group * 4  # of the query blocks
    above = first // 16  # the level-2 token that they are under
    # tiles before the end of each level
    end_l2 = gl.cdiv(gl.cdiv(n_tokens, SPAN_2), 64)
    end_l1 = end_l2 + gl.cdiv(width_l2 * BLOCK_2, 64)
    keys = Keys(
        head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), stride_kn,
        head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), stride_vn,
        of_saved(kept_l1_ptr, head, saved_step), width_l1, end_l1 + width_l1,
        of_saved(k_l1_ptr, kv_head, saved_step), of_saved(v_l1_ptr, kv_head, saved_step), end_l1,
        of_saved(kept_l2_ptr, head, saved_step) + above * width_l2, width_l2,
        of_saved(k_l2_ptr, kv_head, saved_step), of_saved(v_l2_ptr, kv_head, saved_step), end_l2,
        m_tokens, n_tokens, first,
    )
    q_base = head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch)
    batch = head // heads_per_batch

    ROWS: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, PAD_DIM], SHARED)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, PAD_DIM], SHARED)
    q = gl.allocate_shared_memory(dtype, [64, PAD_DIM], SHARED)
    token = first * 16 + gl.arange(0, 64, layout=gl.SliceLayout(1, COPIED))
    inside = token < m_tokens
    copy_rows(q, q_base, token, stride_qn, inside)
    if not FULL:  # read before copies begin, asked once they have
        list_l2 = read_list(keys.kept_l2_ptr, keys.width_l2, 8, -1)
        list_l1 = read_fine(keys)
    parent = parents_of_tile(keys, 0, FULL)
    for tile in range(2):
        copy_tile(keys, tile, parent, k_tiles.index(tile), v_tiles.index(tile), FULL)
        hopper.async_copy.commit_group()
        parent = parents_of_tile(keys, tile + 1, FULL)
    if FULL:
        short_l2: gl.constexpr = -1
        filled_l2 = keys.width_l2
        partial_fine: gl.constexpr = False
    else:
        short_l2, filled_l2 = loose_in_list(list_l2, keys.n_tokens, SPAN_2)
        partial_fine = has_partial_fine(list_l1, keys.n_tokens)

    o_at, columns = row_tile(of_head(o_ptr, head, m_tokens, HEAD_DIM), token, HEAD_DIM, COPIED)
    o = gl.load(o_at, mask=inside[:, None] & columns, other=0.0)
    grad_o_base = head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch)
    grad_o_at, _ = row_tile(grad_o_base, token, stride_gn, COPIED)
    grad_o_rows = gl.load(grad_o_at, mask=inside[:, None] & columns, other=0.0)
    grad_o = gl.allocate_shared_memory(dtype, [64, PAD_DIM], SHARED, grad_o_rows)
    delta = gl.sum(o.to(gl.float32) * grad_o_rows.to(gl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= gl.load(of_head(grad_lse_ptr, head, m_tokens, 1) + token, mask=inside, other=0.0)
    gl.store(of_head(delta_ptr, head, m_tokens, 1) + token, delta, mask=inside)
    delta = gl.convert_layout(delta, ROWS)
    row = first * 16 + gl.arange(0, 64, layout=ROWS)
    peak = gl.load(of_saved(peak_ptr, head, saved_step) + row, mask=row < m_tokens, other=0.0)
    scale_log2e = scale * LOG2E
    grad_q = hopper.warpgroup_mma_init(gl.zeros([64, PAD_DIM], gl.float32, layout=PRODUCT))
    zeros = gl.zeros([64, 64], gl.float32, layout=PRODUCT)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, PRODUCT))[None, :]
    stage = 0
    for tile in range(0, keys.end_l1):
        grad_q = hopper.warpgroup_mma_wait(0, deps=[grad_q])  # of the tile before, whose place is filled again now
        grad_q = hopper.warpgroup_mma_init(grad_q)
        hopper.async_copy.wait_group(1)
        hopper.fence_async_shared()
        to = before(stage)
        copy_tile(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), FULL)
        if k_global_ptr is not None:
            copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
        hopper.async_copy.commit_group()
        parent = parents_of_tile(keys, tile + 3, FULL)
        k, v = k_tiles.index(stage), v_tiles.index(stage)
        products = hopper.warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = hopper.warpgroup_mma(grad_o, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        weight = gl.where(tile < keys.end_l2, WEIGHT_2, WEIGHT_1)
        products = hopper.warpgroup_mma_wait(1, deps=[products])
        p = gl.exp2(products * scale_log2e + (weight - peak)[:, None])
        dp = hopper.warpgroup_mma_wait(0, deps=[dp])
        # rows of zeros add nothing, but infinity times zero is no number
        exist = gl.where(tile < keys.end_l2, gl.cdiv(keys.n_tokens, SPAN_2) - tile * 64, 64)
        if FULL:
            if exist < 64:
                p = gl.where(column < exist, p, 0.0)
        elif is_partial_tile(keys, tile, short_l2, filled_l2):
            share = relative_weights(keys, tile, short_l2, filled_l2, gl.SliceLayout(0, PRODUCT))[None, :]
            p = gl.where(share > 0.0, p * share, 0.0)
        grad_logits = (p * (dp - delta[:, None])).to(dtype)
        grad_q = hopper.warpgroup_mma(gl.convert_layout(grad_logits, LEFT), k, grad_q, is_async=True)
        stage = next_of(stage)
    grad_q = hopper.warpgroup_mma_wait(0, deps=[grad_q])

    # from here on a warp each has its own block: rows of products lie in registers as they did
    grad_q = gl.convert_layout(gl.reshape(grad_q, [4, 16, PAD_DIM]), BATCH)
    peak = gl.convert_layout(gl.reshape(peak, [4, 16]), gl.SliceLayout(2, BATCH))
    delta = gl.convert_layout(gl.reshape(delta, [4, 16]), gl.SliceLayout(2, BATCH))
    q_batch = as_batch(q).load(LEFT_BATCH)
    grad_o_batch = as_batch(grad_o).load(LEFT_BATCH)
    zeros_batch = gl.zeros([4, 16, 16], gl.float32, layout=BATCH)
    if partial_fine:
        for tile in range(keys.end_l1, keys.end):
            hopper.async_copy.wait_group(1)
            to = before(stage)
            copy_fine(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), False)
            if k_global_ptr is not None:
                copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            parent = parents_of_fine(keys, tile + 3)
            k, v = as_batch(k_tiles.index(stage)), as_batch(v_tiles.index(stage))
            products = hopper.mma_v2(q_batch, k.permute((0, 2, 1)).load(RIGHT_BATCH), zeros_batch)
            dp = hopper.mma_v2(grad_o_batch, v.permute((0, 2, 1)).load(RIGHT_BATCH), zeros_batch)
            p = gl.exp2(products * scale_log2e - peak[:, :, None])
            p = gl.where(fine_exist(keys, tile), p, 0.0)
            grad_logits = (p * (dp - delta[:, :, None])).to(dtype)
            grad_q = hopper.mma_v2(gl.convert_layout(grad_logits, LEFT_BATCH), k.load(RIGHT_BATCH), grad_q)
            stage = next_of(stage)
    else:
        for tile in range(keys.end_l1, keys.end):
            hopper.async_copy.wait_group(1)
            to = before(stage)
            copy_fine(keys, tile + 2, parent, k_tiles.index(to), v_tiles.index(to), True)
            if k_global_ptr is not None:
                copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2 - keys.end, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            parent = parents_of_fine(keys, tile + 3)
            k, v = as_batch(k_tiles.index(stage)), as_batch(v_tiles.index(stage))
            products = hopper.mma_v2(q_batch, k.permute((0, 2, 1)).load(RIGHT_BATCH), zeros_batch)
            dp = hopper.mma_v2(grad_o_batch, v.permute((0, 2, 1)).load(RIGHT_BATCH), zeros_batch)
            p = gl.exp2(products * scale_log2e - peak[:, :, None])
            grad_logits = (p * (dp - delta[:, :, None])).to(dtype)
            grad_q = hopper.mma_v2(gl.convert_layout(grad_logits, LEFT_BATCH), k.load(RIGHT_BATCH), grad_q)
            stage = next_of(stage)
    grad_q = gl.reshape(grad_q, [64, PAD_DIM])
    if k_global_ptr is not None:
        grad_q = hopper.warpgroup_mma_init(gl.convert_layout(grad_q, PRODUCT))
        peak = gl.convert_layout(gl.reshape(peak, [64]), ROWS)
        delta = gl.convert_layout(gl.reshape(delta, [64]), ROWS)
        for tile in range(0, gl.cdiv(g_tokens, 64)):
            grad_q = hopper.warpgroup_mma_wait(0, deps=[grad_q])
            grad_q = hopper.warpgroup_mma_init(grad_q)
            if global_mask_ptr is not None:
                place = tile * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, PRODUCT))
                exists = take_part(place, global_mask_ptr, batch, g_tokens)[None, :]
            hopper.async_copy.wait_group(1)
            hopper.fence_async_shared()
            to = before(stage)
            copy_global(k_global_ptr, v_global_ptr, kv_head, g_tokens, tile + 2, k_tiles.index(to), v_tiles.index(to))
            hopper.async_copy.commit_group()
            k, v = k_tiles.index(stage), v_tiles.index(stage)
            products = hopper.warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp = hopper.warpgroup_mma(grad_o, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
            products = hopper.warpgroup_mma_wait(1, deps=[products])
            p = gl.exp2(products * scale_log2e - peak[:, None])
            dp = hopper.warpgroup_mma_wait(0, deps=[dp])
            if global_mask_ptr is not None:
                p = gl.where(exists, p, 0.0)
            elif tile * 64 + 64 > g_tokens:
                p = gl.where(tile * 64 + column < g_tokens, p, 0.0)
            grad_logits = (p * (dp - delta[:, None])).to(dtype)
            grad_q = hopper.warpgroup_mma(gl.convert_layout(grad_logits, LEFT), k, grad_q, is_async=True)
            stage = next_of(stage)
        grad_q = hopper.warpgroup_mma_wait(0, deps=[grad_q])
    hopper.async_copy.wait_group(0)

    grad_q *= scale
    write_rows(of_head(grad_q_ptr, head, m_tokens, HEAD_DIM), token, inside, grad_q)


@gluon.jit
def grad_run_hopper(
    q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, delta_ptr, begin, end, k, v, bias, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):
    """dk, dv of a tile of keys, k and v [N, D] as COPIED, from the queries begin..end of one head: `grad_run`.

    Keys are rows of all products, so that what a softmax makes of two products is in registers the left operand of the
    next two. Of a tile's four products, the first is waited for; then the second, while weights are worked out; the
    third runs while those of the fourth are, and the fourth while the next tile begins.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # [N, M]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    RING: gl.constexpr = STAGES if PAD_DIM == 64 else 2  # wide rows leave no room for three
    dtype: gl.constexpr = k.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [RING, BLOCK_M, PAD_DIM], SHARED)
    grad_o_tiles = gl.allocate_shared_memory(dtype, [RING, BLOCK_M, PAD_DIM], SHARED)
    peaks = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=LOGITS)
    grad_k = hopper.warpgroup_mma_init(gl.zeros([BLOCK_N, PAD_DIM], gl.float32, layout=PRODUCT))
    grad_v = hopper.warpgroup_mma_init(gl.zeros([BLOCK_N, PAD_DIM], gl.float32, layout=PRODUCT))
    place = gl.arange(0, BLOCK_M, layout=COLUMNS)
    stage = 0
    start = begin
    copy_queries(
        q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, delta_ptr, start, end,
        q_tiles.index(0), grad_o_tiles.index(0), peaks.index(0), deltas.index(0), BLOCK_M, COPIED,
    )
    hopper.async_copy.commit_group()
    k = gl.allocate_shared_memory(dtype, [BLOCK_N, PAD_DIM], SHARED, k)
    v = gl.allocate_shared_memory(dtype, [BLOCK_N, PAD_DIM], SHARED, v)
    bias = gl.convert_layout(bias, gl.SliceLayout(1, LOGITS))
    for start in range(begin, end, BLOCK_M):
        if RING == 2:
            grad_k, grad_v = hopper.warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        hopper.async_copy.wait_group(0)
        hopper.fence_async_shared()
        ahead = gl.where(stage == RING - 1, 0, stage + 1)
        copy_queries(
            q_ptr, stride_qn, grad_o_ptr, stride_gn, peak_ptr, delta_ptr, start + BLOCK_M, end,
            q_tiles.index(ahead), grad_o_tiles.index(ahead), peaks.index(ahead), deltas.index(ahead), BLOCK_M, COPIED,
        )
        hopper.async_copy.commit_group()
        q = q_tiles.index(stage)
        grad_o = grad_o_tiles.index(stage)
        products = hopper.warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = hopper.warpgroup_mma(v, grad_o.permute((1, 0)), zeros, use_acc=False, is_async=True)
        peak = gl.where(start + place < end, peaks.index(stage).load(COLUMNS), float("inf"))  # so that p = 0 beyond
        delta = deltas.index(stage).load(COLUMNS)
        products = hopper.warpgroup_mma_wait(1, deps=[products])
        p = gl.exp2(products * (scale * LOG2E) + bias[:, None] - peak[None, :])
        grad_v = hopper.warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT), grad_o, grad_v, is_async=True)
        dp = hopper.warpgroup_mma_wait(1, deps=[dp])
        grad_logits = (p * (dp - delta[None, :])).to(dtype)
        grad_k = hopper.warpgroup_mma(gl.convert_layout(grad_logits, LEFT), q, grad_k, is_async=True)
        stage = ahead
    hopper.async_copy.wait_group(0)
    grad_k, grad_v = hopper.warpgroup_mma_wait(0, deps=[grad_k, grad_v])
    return grad_k * scale, grad_v


@gluon.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_global_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_global_ptr, v_global_ptr,  # [B*H_kv, G, D]
    global_mask_ptr,  # [B, G] uint8: None where all take part
    partial_grad_k_global_ptr, partial_grad_v_global_ptr,  # [B*H, splits_global, G, D], out
    rows_global, splits_global, scale, heads_per_batch, m_tokens, g_tokens, saved_step,  # queries a split, how many splits, s, H, M, G, 256 bytes each, from head to head of what is saved
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):
    """What grad_kv_global_kernel does; BLOCK_N is 64. `total` is 1 in half precision."""
    head, split, tile = head_token_and_tile(gl.program_id(0), splits_global, gl.cdiv(g_tokens, BLOCK_N))
    kv_head = kv_head_of(head)
    key = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPIED))
    exists = take_part(key, global_mask_ptr, head // heads_per_batch, g_tokens)
    k_at, column = row_tile(of_head(k_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, COPIED)
    v_at, _ = row_tile(of_head(v_global_ptr, kv_head, g_tokens, HEAD_DIM), key, HEAD_DIM, COPIED)
    inside = (key < g_tokens)[:, None] & column
    k = gl.load(k_at, mask=inside, other=0.0)
    v = gl.load(v_at, mask=inside, other=0.0)
    bias = gl.where(exists, 0.0, float("-inf"))
    begin = split * rows_global
    grad_k, grad_v = grad_run_hopper(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1), begin, gl.minimum(begin + rows_global, m_tokens), k, v, bias, scale, BLOCK_M, BLOCK_N,
    )
    to = head * splits_global + split
    write_rows(of_head(partial_grad_k_global_ptr, to, g_tokens, HEAD_DIM), key, key < g_tokens, grad_k)
    write_rows(of_head(partial_grad_v_global_ptr, to, g_tokens, HEAD_DIM), key, key < g_tokens, grad_v)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l2_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_l2_ptr, v_l2_ptr,  # [B*H_kv, T_2(N), D]
    partial_grad_k_l2_ptr, partial_grad_v_l2_ptr,  # [B*H, splits_l2, T_2(N), D], out: per token covered
    rows_l2, splits_l2, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # queries a split, how many splits, s, H, M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):
    """What grad_kv_l2_kernel does; BLOCK_N is 64. `total` is 1 in half precision."""
    n_l2 = gl.cdiv(n_tokens, SPAN_2)
    place = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPIED))
    n_keys = n_l2
    head, split, tile = head_token_and_tile(gl.program_id(0), splits_l2, gl.cdiv(n_keys, BLOCK_N))
    first = tile * BLOCK_N
    key = first + place
    begin = split * rows_l2
    end = gl.minimum(begin + rows_l2, m_tokens)
    to = head * splits_l2 + split
    kv_head = kv_head_of(head)
    exists = (key >= 0) & (key < n_l2)
    k_at, column = row_tile(of_saved(k_l2_ptr, kv_head, saved_step), key, HEAD_DIM, COPIED)
    v_at, _ = row_tile(of_saved(v_l2_ptr, kv_head, saved_step), key, HEAD_DIM, COPIED)
    inside = exists[:, None] & column
    k = gl.load(k_at, mask=inside, other=0.0)
    v = gl.load(v_at, mask=inside, other=0.0)
    key = gl.convert_layout(key, gl.SliceLayout(1, PRODUCT))  # as rows of products lie
    exists = (key >= 0) & (key < n_l2)
    covered = gl.where(exists, gl.minimum(n_tokens - key * SPAN_2, SPAN_2), 1).to(gl.float32)
    bias = gl.where(exists, gl.log2(covered), float("-inf"))
    grad_k, grad_v = grad_run_hopper(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1), begin, end, k, v, bias, scale, BLOCK_M, BLOCK_N,
    )
    place += first
    write_rows(of_head(partial_grad_k_l2_ptr, to, n_keys, HEAD_DIM), place, place < n_keys, grad_k / covered[:, None])
    write_rows(of_head(partial_grad_v_l2_ptr, to, n_keys, HEAD_DIM), place, place < n_keys, grad_v / covered[:, None])


@gluon.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l1_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_l1_ptr, v_l1_ptr,  # [B*H_kv, T_1(N), D]
    kept_l2_ptr, width_l2,  # [B*H, T_2(M), width_l2] int32
    partial_grad_k_l1_ptr, partial_grad_v_l1_ptr,  # [B*H, T_2(M), splits_l1, width_l2 * b_2, D], out: per token covered
    rows_l1, splits_l1, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # queries a split, how many splits, s, H, M, N, 256 bytes each, from head to head of what is saved
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):
    """What grad_kv_l1_kernel does; BLOCK_N is 64. `total` is 1 in half precision."""
    n_l1 = gl.cdiv(n_tokens, SPAN_1)
    place = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, COPIED))
    n_keys = width_l2 * BLOCK_2
    tiles, m_l2 = gl.cdiv(n_keys, BLOCK_N), gl.cdiv(m_tokens, SPAN_2)
    head, keeper, tile = head_token_and_tile(gl.program_id(0), m_l2, splits_l1 * tiles)
    split, tile = tile // tiles, tile % tiles
    first = tile * BLOCK_N
    list_ptr = of_saved(kept_l2_ptr, head, saved_step) + keeper * width_l2
    slot = (first + place) // BLOCK_2
    parent = gl.load(list_ptr + slot, mask=slot < width_l2, other=-1)
    key = parent * BLOCK_2 + (first + place) % BLOCK_2
    begin = keeper * SPAN_2 + split * rows_l1
    end = gl.minimum(gl.minimum(begin + rows_l1, (keeper + 1) * SPAN_2), m_tokens)
    to = (head * m_l2 + keeper) * splits_l1 + split
    kv_head = kv_head_of(head)
    exists = (key >= 0) & (key < n_l1)
    k_at, column = row_tile(of_saved(k_l1_ptr, kv_head, saved_step), key, HEAD_DIM, COPIED)
    v_at, _ = row_tile(of_saved(v_l1_ptr, kv_head, saved_step), key, HEAD_DIM, COPIED)
    inside = exists[:, None] & column
    k = gl.load(k_at, mask=inside, other=0.0)
    v = gl.load(v_at, mask=inside, other=0.0)
    key = gl.convert_layout(key, gl.SliceLayout(1, PRODUCT))  # as rows of products lie
    exists = (key >= 0) & (key < n_l1)
    covered = gl.where(exists, gl.minimum(n_tokens - key * SPAN_1, SPAN_1), 1).to(gl.float32)
    bias = gl.where(exists, gl.log2(covered), float("-inf"))
    grad_k, grad_v = grad_run_hopper(
        head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch), stride_qn,
        head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch), stride_gn,
        of_saved(peak_ptr, head, saved_step), of_head(delta_ptr, head, m_tokens, 1), begin, end, k, v, bias, scale, BLOCK_M, BLOCK_N,
    )
    place += first
    write_rows(of_head(partial_grad_k_l1_ptr, to, n_keys, HEAD_DIM), place, place < n_keys, grad_k / covered[:, None])
    write_rows(of_head(partial_grad_v_l1_ptr, to, n_keys, HEAD_DIM), place, place < n_keys, grad_v / covered[:, None])


# Layouts of one warp: products of 16 rows and their operands; rows that are copied; rows in shared memory.
WARP = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
LEFT_WARP = gl.constexpr(gl.DotOperandLayout(0, WARP.value, 2))
RIGHT_WARP = gl.constexpr(gl.DotOperandLayout(1, WARP.value, 2))
COPIED_WARP = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
SHARED_WARP = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.jit
def keeper_at(keepers_ptr, entry, end):
    """The level-1 query token at an entry of a list; 0 from `end` on."""
    return gl.load(keepers_ptr + entry, mask=entry < end, other=0)


@gluon.jit
def copy_row(to, ptr):
    """Begin to copy a row of HEAD_DIM float32."""
    dim = gl.arange(0, PAD_DIM, layout=gl.BlockedLayout([2], [32], [1], [0]))
    async_load(to, ptr + dim)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def grad_kv_l0_hopper_kernel(
    q_ptr, stride_qb, stride_qh, stride_qn,  # [B, H, M, D]
    grad_o_ptr, stride_gb, stride_gh, stride_gn,  # [B, H, M, D]
    peak_ptr, total_ptr, delta_ptr,  # [B*H, M] float32
    k_ptr, stride_kb, stride_kh, stride_kn,  # [B, H_kv, N, D]
    v_ptr, stride_vb, stride_vh, stride_vn,  # [B, H_kv, N, D]
    keepers_l1_ptr, width_l1,  # [B*H, T_1(M) * width_l1] int32
    offsets_l1_ptr, overflow_l1_ptr,  # [B*H, T_1(N) + 1] int32
    overflow_grad_k_l0_ptr, overflow_grad_v_l0_ptr,  # [B*H, parts_l0, b_1, D] float32
    grad_k_l1_ptr, grad_v_l1_ptr,  # [B*H_kv, T_1(N), D] float32
    grad_k_ptr, grad_v_ptr,  # [B*H_kv, N, D], out
    parts_l0, scale, heads_per_batch, m_tokens, n_tokens, saved_step,  # room for overflow parts a head, s, H, M, N, 256 bytes each, from head to head of what is saved
    PART: gl.constexpr,
):
    """What grad_kv_l0_kernel does, a keeper's 16 queries a tile. `total` is 1 in half precision.

    Queries that do not exist, in the last block of the sequence, are rows of zeros, and so is what becomes of them.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, WARP)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    head, parent = head_and_tile(gl.program_id(0), gl.cdiv(n_tokens, SPAN_1))
    kv_head = kv_head_of(head)

    key = parent * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, COPIED_WARP))
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 16, PAD_DIM], SHARED_WARP)
    grad_o_tiles = gl.allocate_shared_memory(dtype, [STAGES, 16, PAD_DIM], SHARED_WARP)
    k_tile = q_tiles.index(STAGES - 1)  # which the queries of the third tile take over
    v_tile = grad_o_tiles.index(STAGES - 1)
    copy_rows(k_tile, head_base(k_ptr, kv_head, stride_kb, stride_kh, heads_per_batch), key, stride_kn, key < n_tokens)
    copy_rows(v_tile, head_base(v_ptr, kv_head, stride_vb, stride_vh, heads_per_batch), key, stride_vn, key < n_tokens)
    k_above = gl.allocate_shared_memory(gl.float32, [PAD_DIM], VECTOR)
    v_above = gl.allocate_shared_memory(gl.float32, [PAD_DIM], VECTOR)
    coarse = parent
    copy_row(k_above, of_head(grad_k_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM) + coarse * HEAD_DIM)
    copy_row(v_above, of_head(grad_v_l1_ptr, kv_head, tl.cdiv(n_tokens, SPAN_1), HEAD_DIM) + coarse * HEAD_DIM)

    offsets_ptr = of_head(offsets_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + parent
    begin = gl.load(offsets_ptr)
    end = gl.minimum(begin + PART, gl.load(offsets_ptr + 1))
    keepers_ptr = of_head(keepers_l1_ptr, head, tl.cdiv(m_tokens, SPAN_1), width_l1)
    q_base = head_base(q_ptr, head, stride_qb, stride_qh, heads_per_batch)
    grad_o_base = head_base(grad_o_ptr, head, stride_gb, stride_gh, heads_per_batch)
    peak_ptr = of_saved(peak_ptr, head, saved_step)
    delta_ptr = of_head(delta_ptr, head, m_tokens, 1)
    peaks = gl.allocate_shared_memory(gl.float32, [STAGES, 16], VECTOR)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, 16], VECTOR)
    keeper = keeper_at(keepers_ptr, begin, end)
    for tile in range(2):
        if begin + tile < end:
            copy_queries(
                q_base, stride_qn, grad_o_base, stride_gn, peak_ptr, delta_ptr, keeper * 16, m_tokens,
                q_tiles.index(tile), grad_o_tiles.index(tile), peaks.index(tile), deltas.index(tile), 16, COPIED_WARP,
            )
        hopper.async_copy.commit_group()
        keeper = keeper_at(keepers_ptr, begin + tile + 1, end)
    # added at the end, read now, while there is nothing else to do
    overflow_ptr = of_head(overflow_l1_ptr, head, tl.cdiv(n_tokens, SPAN_1) + 1, 1) + parent
    first_overflow, last_overflow = gl.load(overflow_ptr), gl.load(overflow_ptr + 1)

    hopper.async_copy.wait_group(1)
    k = k_tile.load(LEFT_WARP)
    v = v_tile.load(LEFT_WARP)
    zeros = gl.zeros([16, 16], gl.float32, layout=WARP)
    grad_k = gl.zeros([16, PAD_DIM], gl.float32, layout=WARP)
    grad_v = gl.zeros([16, PAD_DIM], gl.float32, layout=WARP)
    stage = 0
    for entry in range(begin, end):
        hopper.async_copy.wait_group(1)
        q = q_tiles.index(stage)
        grad_o = grad_o_tiles.index(stage)
        products = hopper.mma_v2(k, q.permute((1, 0)).load(RIGHT_WARP), zeros)
        dp = hopper.mma_v2(v, grad_o.permute((1, 0)).load(RIGHT_WARP), zeros)
        if entry + 2 < end:
            to = before(stage)
            copy_queries(
                q_base, stride_qn, grad_o_base, stride_gn, peak_ptr, delta_ptr, keeper * 16, m_tokens,
                q_tiles.index(to), grad_o_tiles.index(to), peaks.index(to), deltas.index(to), 16, COPIED_WARP,
            )
        hopper.async_copy.commit_group()
        keeper = keeper_at(keepers_ptr, entry + 3, end)
        p = gl.exp2(products * (scale * LOG2E) - peaks.index(stage).load(COLUMNS)[None, :])
        grad_v = hopper.mma_v2(gl.convert_layout(p.to(dtype), LEFT_WARP), grad_o.load(RIGHT_WARP), grad_v)
        grad_logits = p * (dp - deltas.index(stage).load(COLUMNS)[None, :])
        grad_k = hopper.mma_v2(gl.convert_layout(grad_logits.to(dtype), LEFT_WARP), q.load(RIGHT_WARP), grad_k)
        stage = next_of(stage)
    hopper.async_copy.wait_group(0)

    grad_k = grad_k * scale
    dim = gl.arange(0, PAD_DIM, layout=COLUMNS)
    child = gl.arange(0, 16, layout=gl.SliceLayout(1, WARP))
    for part in range(first_overflow, last_overflow):
        of, at = head * parts_l0 + part, child[:, None] * HEAD_DIM + dim[None, :]
        grad_k += gl.load(of_head(overflow_grad_k_l0_ptr, of, 16, HEAD_DIM) + at)
        grad_v += gl.load(of_head(overflow_grad_v_l0_ptr, of, 16, HEAD_DIM) + at)
    grad_k += k_above.load(COLUMNS)[None, :]
    grad_v += v_above.load(COLUMNS)[None, :]
    write_rows(of_head(grad_k_ptr, kv_head, n_tokens, HEAD_DIM), key, key < n_tokens, grad_k)
    write_rows(of_head(grad_v_ptr, kv_head, n_tokens, HEAD_DIM), key, key < n_tokens, grad_v)


# ---- launches --------------------------------------------------------------------------------------------------------


CACHED = 33554432  # bytes of q, k and v of which much may still be in the cache when attention reads them again
FORWARD_STAGES = "pool", "select", "attend"
FILLING = 1024  # programs that are enough to fill a GPU


# Buffers that share a piece of memory, with their dtypes, some of which depend on that of q: see `own_dtypes`.
LAYOUTS = {
    "selection": {
        "q_l1": "input", "q_l2": "input",
    },
    "saved": {
        "peak": torch.float32, "total": torch.float32, "k_l1": "input", "v_l1": "input",
        "k_l2": "input", "v_l2": "input", "counts_l1": torch.int32, "counts_l2": torch.int32,
        "kept_l1": torch.int32, "kept_l2": torch.int32,
    },
    "gradients": {
        "partial_grad_k_global": "partial", "partial_grad_v_global": "partial", "delta": torch.float32, "offsets_l1": torch.int32,
        "keepers_l1": torch.int32, "overflow_l1": torch.int32, "offsets_l2": torch.int32, "keepers_l2": torch.int32,
        "overflow_grad_k_l0": torch.float32, "overflow_grad_v_l0": torch.float32, "partial_grad_k_l1": "partial", "partial_grad_v_l1": "partial",
        "partial_grad_k_l2": "partial", "partial_grad_v_l2": "partial", "grad_k_l1": torch.float32, "grad_v_l1": torch.float32,
        "grad_k_l2": torch.float32, "grad_v_l2": torch.float32,
    },
}


def saved_shapes(m_tokens, n_tokens):
    """What the forward pass leaves to the backward pass of a head: the layout `saved`, symbols as in torch.compile or not."""
    queries, keys = level_tokens(m_tokens), level_tokens(n_tokens)
    return {
        "peak": (m_tokens,), "total": (m_tokens,),
        "k_l1": (keys[1], 64), "v_l1": (keys[1], 64),
        "k_l2": (keys[2], 64), "v_l2": (keys[2], 64),
        "counts_l1": (keys[1],), "counts_l2": (keys[2],),
        "kept_l1": (queries[1], torch.sym_min(8, keys[1])), "kept_l2": (queries[2], torch.sym_min(8, keys[2])),
    }


def work_out(at, tiles):
    """Fill in a `LaunchPlan`: shapes of buffers, programs and tile shapes of launches; `tiles` are those of every stage."""
    heads, kv_heads, m_tokens, n_tokens, g_tokens = at.heads, at.kv_heads, at.m_tokens, at.n_tokens, at.g_tokens
    queries, keys = level_tokens(m_tokens), level_tokens(n_tokens)
    pooled_tokens = at.pooled_tokens = 0 if at.given else m_tokens
    at.rows_l2, splits_l2 = split_queries(heads, m_tokens, keys[2], tiles["grad_kv_l2"])
    at.splits_l2 = splits_l2
    at.rows_l1, splits_l1 = split_queries(heads * queries[2], min(m_tokens, 256), 16 * min(8, keys[2]), tiles["grad_kv_l1"])
    at.splits_l1 = splits_l1
    at.rows_global, splits_global = split_queries(heads, m_tokens, g_tokens, tiles["grad_kv_global"])
    at.splits_global = splits_global
    tile = tiles["grad_kv_l0"]
    parts_l0 = at.parts_l0 = min(((queries[1] * min(8, keys[1])) // tile["PART"]), keys[1] * ((queries[1] - 1) // tile["PART"]))
    at.part_l1 = tile["PART"]
    at.shapes = saved_shapes(m_tokens, n_tokens) | {
        "o": (heads, m_tokens, 64), "lse": (heads, m_tokens),
        "q_l1": (heads, queries[1], 64), "q_l2": (heads, queries[2], 64),
        "grad_q": (heads, m_tokens, 64), "grad_k": (kv_heads, n_tokens, 64),
        "grad_v": (kv_heads, n_tokens, 64), "grad_k_global": (kv_heads, g_tokens, 64),
        "grad_v_global": (kv_heads, g_tokens, 64), "partial_grad_k_global": (heads, splits_global, g_tokens, 64),
        "partial_grad_v_global": (heads, splits_global, g_tokens, 64), "delta": (heads, m_tokens),
        "offsets_l1": (heads, keys[1] + 1), "keepers_l1": (heads, queries[1] * min(8, keys[1])),
        "overflow_l1": (heads, keys[1] + 1), "offsets_l2": (heads, keys[2] + 1),
        "keepers_l2": (heads, queries[2] * min(8, keys[2])), "overflow_grad_k_l0": (heads, parts_l0, 16, 64),
        "overflow_grad_v_l0": (heads, parts_l0, 16, 64), "partial_grad_k_l1": (heads, queries[2], splits_l1, 16 * min(8, keys[2]), 64),
        "partial_grad_v_l1": (heads, queries[2], splits_l1, 16 * min(8, keys[2]), 64), "partial_grad_k_l2": (heads, splits_l2, keys[2], 64),
        "partial_grad_v_l2": (heads, splits_l2, keys[2], 64), "grad_k_l1": (kv_heads, keys[1], 64),
        "grad_v_l1": (kv_heads, keys[1], 64), "grad_k_l2": (kv_heads, keys[2], 64),
        "grad_v_l2": (kv_heads, keys[2], 64),
    }
    rows = heads * m_tokens + 2 * kv_heads * n_tokens
    is_long = rows * HEAD_DIM.value * at.dtype.itemsize > CACHED
    at.width_l1 = at.shapes["kept_l1"][1]
    at.width_l2 = at.shapes["kept_l2"][1]
    [at.given_width_l1, at.given_width_l2] = at.given or [0] * 2
    at.grids = {}
    tile = tiles["pool"] | {"EVICT_FIRST": is_long}
    at.grids["pool_l1_kernel"] = heads * ceil_div(pooled_tokens, 256) + 2 * keys[2] * kv_heads, tile
    tile = tiles["select_l2"] | {"RUNS": has_runs(keys[2], tiles["select_l2"])}
    at.grids["select_l2_kernel"] = heads * ceil_div(queries[2], tile["BLOCK_M"]), tile
    tile = tiles["select_l1"]
    at.grids["select_l1_kernel"] = heads * queries[2] * ceil_div(min(16, queries[1]), tile["BLOCK_M"]), tile
    tile = tiles["keep"]
    at.grids["keep_kernel"] = heads * (ceil_div(queries[1], tile["BLOCK_M"]) + ceil_div(queries[2], tile["BLOCK_M"])), tile
    tile = tiles["attend"] | {"FULL": not at.given and is_full(queries, keys, tiles["attend"])}
    at.grids["attend_kernel"] = heads * queries[2] * ceil_div(min(16, queries[1]), tile["GROUP"]), tile
    if is_in_gluon(tile):  # that kernel's tiles and programs
        full = is_full(queries, keys, {"BLOCK_C": 64, "BLOCK_N": 16})
        tile["FULL"] = full and not at.given
        at.grids["attend_kernel"] = heads * ceil_div(m_tokens, 64), tile
        programs = heads * ceil_div(m_tokens, 1024)
        at.grids["attend_hopper_recompute_kernel"] = programs, {"num_warps": 4, "maxnreg": 168}
    tile = tiles["scan"]
    at.grids["scan_kernel"] = 3 * heads, tile
    tile = tiles["invert_l2"]
    at.grids["invert_l2_kernel"] = heads * ceil_div(keys[2], tile["KEYS"]), tile
    tile = tiles["invert_l1"]
    at.grids["invert_l1_kernel"] = heads * keys[2], tile
    tile = tiles["grad_q"] | {"FULL": not at.given and is_full(queries, keys, tiles["grad_q"])}
    at.grids["grad_q_kernel"] = heads * queries[2] * ceil_div(min(16, queries[1]), tile["GROUP"]), tile
    if is_in_gluon(tile):  # that kernel's tiles and programs
        full = is_full(queries, keys, {"BLOCK_C": 64, "BLOCK_N": 16})
        tile["FULL"] = full and not at.given
        at.grids["grad_q_kernel"] = heads * ceil_div(m_tokens, 64), tile
    tile = tiles["grad_kv_global"]
    at.grids["grad_kv_global_kernel"] = heads * splits_global * ceil_div(g_tokens, tile["BLOCK_N"]), tile
    tile = tiles["grad_sum"]
    at.grids["grad_kv_global_sum_kernel"] = kv_heads * ceil_div(g_tokens, tile["BLOCK"]), tile
    tile = tiles["grad_kv_l2"]
    at.grids["grad_kv_l2_kernel"] = heads * splits_l2 * ceil_div(keys[2], tile["BLOCK_N"]), tile
    tile = tiles["grad_sum"]
    at.grids["grad_kv_l2_sum_kernel"] = kv_heads * ceil_div(keys[2], tile["BLOCK"]), tile
    tile = tiles["grad_kv_l1"]
    at.grids["grad_kv_l1_kernel"] = heads * queries[2] * splits_l1 * ceil_div(16 * min(8, keys[2]), tile["BLOCK_N"]), tile
    tile = tiles["grad_gather_l1"]
    at.grids["grad_kv_l1_sum_kernel"] = keys[2] * kv_heads * ceil_div(16, tile["BLOCK"]), tile
    tile = tiles["grad_kv_l0"]
    at.grids["grad_kv_l0_overflow_kernel"] = heads * parts_l0 * ceil_div(16, tile["BLOCK_N"]), tile
    at.grids["grad_kv_l0_kernel"] = keys[1] * kv_heads * ceil_div(16, tile["BLOCK_N"]), tile


LISTS_FILL = True  # whether lists can be without gaps
PARTIAL_IN_GLUON = True  # whether kernels in Gluon also take partial tiles


def forward_launches(at, launch, scale, q, k, v, o, lse, saved, memory, *extras, stages=FORWARD_STAGES):
    """The launches of the forward pass, or of some of its stages. What is saved of a head lies together.

    `extras` are what `at.extras` names: global tokens, lists that are given.
    """
    [
        peak, total, k_l1, v_l1, k_l2, v_l2,
        counts_l1, counts_l2, kept_l1, kept_l2,
    ] = at.buffers(saved, "saved")
    [q_l1, q_l2] = at.buffers(memory, "selection")
    q_steps, k_steps, v_steps = at.steps
    k_global, v_global, global_mask, given_l1, given_l2 = at.named(
        extras, "k_global", "v_global", "global_mask", "given_l1", "given_l2"
    )
    if "pool" in stages:
        launch(
            pool_l1_kernel, q, *q_steps, k, *k_steps, v, *v_steps, q_l1, k_l1, v_l1, q_l2, k_l2, v_l2, counts_l1, counts_l2,
            at.heads_per_batch, at.heads, at.pooled_tokens, at.n_tokens, at.saved_step,
        )
    if "select" in stages:
        launch(
            select_l2_kernel, q_l2, k_l2, kept_l2, at.width_l2, counts_l2, at.m_tokens, at.n_tokens, at.saved_step,
        )
        launch(
            select_l1_kernel, q_l1, k_l1, kept_l2, at.width_l2, kept_l1, at.width_l1, counts_l1, at.m_tokens, at.n_tokens,
            at.saved_step,
        )
    if "keep" in stages:
        launch(
            keep_kernel, given_l1, at.given_width_l1, given_l2, at.given_width_l2, kept_l1, at.width_l1, kept_l2,
            at.width_l2, counts_l1, counts_l2, at.m_tokens, at.n_tokens, at.saved_step,
        )
    if "attend" in stages:
        launch(
            (attend_kernel, attend_hopper_kernel), q, *q_steps, k, *k_steps, v, *v_steps, k_l1, v_l1, k_l2, v_l2, kept_l1,
            at.width_l1, kept_l2, at.width_l2, k_global, v_global, global_mask, o, lse, peak, total, scale,
            at.heads_per_batch, at.m_tokens, at.n_tokens, at.g_tokens, at.saved_step,
        )
        if "attend_hopper_recompute_kernel" in at.grids:
            launch(
                attend_hopper_recompute_kernel, q, *q_steps, k, *k_steps, v, *v_steps, k_l1, v_l1, k_l2, v_l2, kept_l1,
                at.width_l1, kept_l2, at.width_l2, k_global, v_global, global_mask, o, lse, peak, total, scale,
                at.heads_per_batch, at.m_tokens, at.n_tokens, at.g_tokens, at.saved_step,
            )


def grad_launches(at, launch, scale, q, k, v, grad_o, o, saved, grad_q, grad_k, grad_v, memory, *extras):
    """The launches of the backward pass. `extras` are what `at.extras` names: the gradient of lse, global tokens and theirs.

    With `zeros` among them, float32 as many as means of level 1, no level hands its gradient down.
    """
    [
        peak, total, k_l1, v_l1, k_l2, v_l2,
        counts_l1, counts_l2, kept_l1, kept_l2,
    ] = at.buffers(saved, "saved")
    [
        partial_grad_k_global, partial_grad_v_global, delta, offsets_l1, keepers_l1, overflow_l1,
        offsets_l2, keepers_l2, overflow_grad_k_l0, overflow_grad_v_l0, partial_grad_k_l1, partial_grad_v_l1,
        partial_grad_k_l2, partial_grad_v_l2, grad_k_l1, grad_v_l1, grad_k_l2, grad_v_l2,
    ] = at.buffers(memory, "gradients")
    q_steps, k_steps, v_steps, grad_o_steps = at.steps
    grad_lse, k_global, v_global, global_mask, grad_k_global, grad_v_global, zeros = at.named(
        extras, "grad_lse", "k_global", "v_global", "global_mask", "grad_k_global", "grad_v_global", "zeros"
    )
    handed = [zeros] * 4 if zeros else [grad_k_l2, grad_v_l2, grad_k_l1, grad_v_l1]
    [handed_grad_k_l2, handed_grad_v_l2, handed_grad_k_l1, handed_grad_v_l1] = handed

    launch(
        scan_kernel, counts_l1, counts_l2, offsets_l1, overflow_l1, offsets_l2, at.part_l1, at.heads, at.n_tokens,
        at.saved_step,
    )
    launch(
        invert_l2_kernel, kept_l2, at.width_l2, offsets_l2, keepers_l2, at.m_tokens, at.n_tokens, at.saved_step,
    )
    launch(
        invert_l1_kernel, kept_l1, at.width_l1, offsets_l1, offsets_l2, keepers_l2, at.width_l2, keepers_l1,
        at.m_tokens, at.n_tokens, at.saved_step,
    )
    launch(
        (grad_q_kernel, grad_q_hopper_kernel), q, *q_steps, k, *k_steps, v, *v_steps, k_l1, v_l1, k_l2, v_l2, kept_l1,
        at.width_l1, kept_l2, at.width_l2, o, grad_o, *grad_o_steps, peak, total, grad_lse, k_global, v_global,
        global_mask, grad_q, delta, scale, at.heads_per_batch, at.m_tokens, at.n_tokens, at.g_tokens, at.saved_step,
    )
    if k_global:
        launch(
            (grad_kv_global_kernel, grad_kv_global_hopper_kernel), q, *q_steps, grad_o, *grad_o_steps, peak, total, delta,
            k_global, v_global, global_mask, partial_grad_k_global, partial_grad_v_global, at.rows_global, at.splits_global,
            scale, at.heads_per_batch, at.m_tokens, at.g_tokens, at.saved_step,
        )
    if k_global:
        launch(
            grad_kv_global_sum_kernel, partial_grad_k_global, partial_grad_v_global, grad_k_global, grad_v_global,
            at.splits_global, at.g_tokens,
        )
    launch(
        (grad_kv_l2_kernel, grad_kv_l2_hopper_kernel), q, *q_steps, grad_o, *grad_o_steps, peak, total, delta, k_l2,
        v_l2, partial_grad_k_l2, partial_grad_v_l2, at.rows_l2, at.splits_l2, scale, at.heads_per_batch, at.m_tokens,
        at.n_tokens, at.saved_step,
    )
    launch(
        grad_kv_l2_sum_kernel, partial_grad_k_l2, partial_grad_v_l2, grad_k_l2, grad_v_l2, at.splits_l2, at.n_tokens,
    )
    launch(
        (grad_kv_l1_kernel, grad_kv_l1_hopper_kernel), q, *q_steps, grad_o, *grad_o_steps, peak, total, delta, k_l1,
        v_l1, kept_l2, at.width_l2, partial_grad_k_l1, partial_grad_v_l1, at.rows_l1, at.splits_l1, scale,
        at.heads_per_batch, at.m_tokens, at.n_tokens, at.saved_step,
    )
    launch(
        grad_kv_l1_sum_kernel, partial_grad_k_l1, partial_grad_v_l1, kept_l2, at.width_l2, keepers_l2, offsets_l2,
        handed_grad_k_l2, handed_grad_v_l2, grad_k_l1, grad_v_l1, at.splits_l1, at.m_tokens, at.n_tokens, at.saved_step,
    )
    launch(
        grad_kv_l0_overflow_kernel, q, *q_steps, grad_o, *grad_o_steps, peak, total, delta, k, *k_steps, v, *v_steps,
        keepers_l1, at.width_l1, offsets_l1, overflow_l1, overflow_grad_k_l0, overflow_grad_v_l0, at.parts_l0, scale,
        at.heads_per_batch, at.m_tokens, at.n_tokens, at.saved_step,
    )
    launch(
        (grad_kv_l0_kernel, grad_kv_l0_hopper_kernel), q, *q_steps, grad_o, *grad_o_steps, peak, total, delta, k,
        *k_steps, v, *v_steps, keepers_l1, at.width_l1, offsets_l1, overflow_l1, overflow_grad_k_l0, overflow_grad_v_l0,
        handed_grad_k_l1, handed_grad_v_l1, grad_k, grad_v, at.parts_l0, scale, at.heads_per_batch, at.m_tokens,
        at.n_tokens, at.saved_step,
    )


def flops(heads, kv_heads, m_tokens, n_tokens, g_tokens=0):
    """FLOPs of the forward pass, the backward pass, the selection and its scores alone, as llsa_gen's cost model counts them."""
    queries, keys = level_tokens(m_tokens), level_tokens(n_tokens)
    of_forward = (
        256 * g_tokens * heads * m_tokens
        + 256 * heads * keys[2] * m_tokens
        + 128 * heads * keys[2] * queries[2]
        + 256 * heads * m_tokens * min(128, keys[1])
        + 256 * heads * m_tokens * min(128, n_tokens)
        + 64 * heads * m_tokens
        + 128 * heads * queries[1] * min(128, keys[1])
        + 64 * heads * queries[1]
        + 128 * keys[1] * kv_heads
        + 128 * kv_heads * n_tokens
    )
    of_backward = (
        896 * g_tokens * heads * m_tokens
        + 896 * heads * keys[2] * m_tokens
        + 896 * heads * m_tokens * min(128, keys[1])
        + 896 * heads * m_tokens * min(128, n_tokens)
        + 128 * keys[1] * kv_heads
        + 128 * kv_heads * n_tokens
    )
    of_selection = (
        128 * heads * keys[2] * queries[2]
        + 64 * heads * m_tokens
        + 128 * heads * queries[1] * min(128, keys[1])
        + 64 * heads * queries[1]
        + 128 * keys[1] * kv_heads
        + 128 * kv_heads * n_tokens
    )
    of_scores = (
        128 * heads * keys[2] * queries[2]
        + 128 * heads * queries[1] * min(128, keys[1])
    )
    return of_forward, of_backward, of_selection, of_scores


LEVELS = 2
GIVEN_NAMES = ("given_l1", "given_l2", )  # lists of the caller's own
GIVEN = (0,) * LEVELS  # their widths where they do not matter: the backward pass, which has copies, reads no others
BLOCKS = (16, 16)  # b_1, b_2, ...
SPANS = (1, 16, 256)  # P_0, P_1, ...
WIDTHS = (8, 8, )  # tokens of levels 1, 2, ... that a query keeps at most
LISTED = (0, 1)  # levels whose attended keys are the children of kept tokens
ENRICHED = (1, 2)  # coarse levels that are attended
SPLIT_KEYS = 8  # queries a key and split at least, so that partial sums stay small beside q
WEIGHTED = True  # whether a key weighs as many tokens as it covers

# ---- the same in every module from here on ---------------------------------------------------------------------------

# What launches a whole pass, for the CUDA driver.
REPLAY_C = r"""
/* One call of C that launches a whole pass. The text is compiled by `replayer` in driver.py, which defines BASES and PARAMETERS.

   A captured pass is the context of the GPU and the launches. A parameter of a kernel is a base and an offset from it: base 0 is 0,
   base 1 the bits of the scale, the others are the addresses of the pass's tensors. */
#include <Python.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { RELAXED = 2 }; /* a thread's capture mode: it may allocate and free while another captures */
struct launch { uint64_t kernel; uint32_t programs, threads, shared, count; }; /* and then its parameters */
struct parameter { uint64_t base, offset; };
struct node { void *kernel; unsigned grid[3], block[3], shared; void **parameters, **extra, *kern, *context; };

/* The functions of the driver that are used, in the order of DRIVER; each returns a CUresult. */
struct driver {
    int (*launch)(void *kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    int (*is_capturing)(void *stream, int *status);
    int (*exchange_capture_mode)(int *mode);
    int (*graph_create)(void **graph, unsigned flags);
    int (*graph_destroy)(void *graph);
    int (*add_node)(void **added, void *graph, void **after, size_t count, const struct node *);
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*exec_destroy)(void *exec);
    int (*set_node)(void *exec, void *node, const struct node *);
    int (*graph_launch)(void *exec, void *stream);
    int (*get_context)(void **context);
    int (*set_context)(void *context);
};

/* A pass as a CUDA graph. Who has made it busy may set its nodes and launch it; nobody waits for that, for who has may be a
   thread that a fork left behind. Nodes are those of `all`, which has to stay. */
struct graph { struct driver driver; atomic_flag busy; pid_t maker; void *all, *exec, *nodes[]; };

/* Read one launch of a captured pass, with parameters put together in `values`; returns where the next begins. */
static const char *next(const char *at, const uint64_t *bases, uint64_t *values, struct node *node) {
    const struct launch *launch = (const struct launch *)at;
    const struct parameter *parameter = (const struct parameter *)(launch + 1);
    node->kernel = (void *)launch->kernel;
    node->grid[0] = launch->programs;
    node->block[0] = launch->threads;
    node->shared = launch->shared;
    for (uint32_t i = 0; i < launch->count; i++, parameter++)
        values[i] = bases[parameter->base] + parameter->offset;
    return (const char *)parameter;
}

static struct node blank(uint64_t *values, void **parameters) {
    for (int i = 0; i < PARAMETERS; i++)
        parameters[i] = &values[i];
    return (struct node){.grid = {1, 1, 1}, .block = {1, 1, 1}, .parameters = parameters};
}

/* The launches of a captured pass, with its context current: a thread that has launched nothing yet may have none. */
static const char *open_captured(const struct driver *driver, const char *captured) {
    void *context = NULL;
    if (!driver->get_context(&context) && !context)
        driver->set_context(*(void *const *)captured);
    return captured + sizeof(void *);
}

static void release(struct graph *graph) {
    int mode = RELAXED;
    if (graph->maker == getpid()) { /* a fork has the driver of its parent, and must not call it */
        graph->driver.exchange_capture_mode(&mode);
        if (graph->exec)
            graph->driver.exec_destroy(graph->exec); /* what runs, runs on */
        if (graph->all)
            graph->driver.graph_destroy(graph->all);
        graph->driver.exchange_capture_mode(&mode);
    }
    PyMem_Free(graph);
}

static void forget(PyObject *capsule) { release(PyCapsule_GetPointer(capsule, NULL)); }

/* graph(driver, captured, launches, stream): the pass as a CUDA graph, one kernel after the other; False if the driver fails, and
   None while the stream is captured, which needs no graph. */
static PyObject *make_graph(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *functions, *captured;
    Py_ssize_t count;
    unsigned long long stream;
    uint64_t bases[BASES] = {0}, values[PARAMETERS] = {0};
    void *parameters[PARAMETERS];
    struct node node = blank(values, parameters);
    if (!PyArg_ParseTuple(arguments, "SSnK", &functions, &captured, &count, &stream))
        return NULL;
    const struct driver *driver = (const struct driver *)PyBytes_AS_STRING(functions);
    const char *at = open_captured(driver, PyBytes_AS_STRING(captured));
    int capturing = 0, mode = RELAXED;
    if (driver->is_capturing((void *)stream, &capturing) || capturing)
        Py_RETURN_NONE;
    struct graph *graph = PyMem_Malloc(sizeof(struct graph) + count * sizeof(void *));
    if (!graph)
        return PyErr_NoMemory();
    graph->driver = *driver;
    graph->all = graph->exec = NULL;
    graph->maker = getpid();
    atomic_flag_clear(&graph->busy);
    driver->exchange_capture_mode(&mode);
    int error = driver->graph_create(&graph->all, 0);
    for (Py_ssize_t i = 0; i < count && !error; i++) {
        at = next(at, bases, values, &node);
        error = driver->add_node(&graph->nodes[i], graph->all, i ? &graph->nodes[i - 1] : NULL, i > 0, &node);
    }
    if (!error)
        error = driver->instantiate(&graph->exec, graph->all, 0);
    driver->exchange_capture_mode(&mode);
    PyObject *capsule = error ? NULL : PyCapsule_New(graph, NULL, forget);
    if (!capsule)
        release(graph);
    if (error)
        Py_RETURN_FALSE;
    return capsule;
}

/* run(driver, captured, graph, stream, scale, *addresses): what the driver says of the first launch that fails, or 0. As a graph
   whose nodes are set first; launch by launch where there is none, it is busy, or the stream is captured. Also where the
   driver refuses to set or to launch the graph: -1 then. */
static PyObject *run(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    uint64_t bases[BASES] = {0}, values[PARAMETERS];
    void *parameters[PARAMETERS];
    struct node node = blank(values, parameters);
    if (count < 5 || count - 3 > BASES || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "run: expected the driver and a captured pass, bytes, a graph, a stream, a scale, addresses");
        return NULL;
    }
    const struct driver *driver = (const struct driver *)PyBytes_AS_STRING(arguments[0]);
    const char *captured = PyBytes_AS_STRING(arguments[1]), *end = captured + PyBytes_GET_SIZE(arguments[1]), *at;
    struct graph *graph = PyCapsule_CheckExact(arguments[2]) ? PyCapsule_GetPointer(arguments[2], NULL) : NULL;
    void *stream = PyLong_AsVoidPtr(arguments[3]);
    union { float scale; uint32_t bits; } scale = {(float)PyFloat_AsDouble(arguments[4])};
    bases[1] = scale.bits;
    for (Py_ssize_t i = 5; i < count; i++)
        bases[i - 3] = PyLong_AsUnsignedLongLong(arguments[i]);
    if (PyErr_Occurred())
        return NULL;

    int error = 0, capturing = 0, launched = 0, refused = 0;
    Py_BEGIN_ALLOW_THREADS
    captured = open_captured(driver, captured);
    if (graph && !driver->is_capturing(stream, &capturing) && !capturing && !atomic_flag_test_and_set(&graph->busy)) {
        at = captured;
        for (int i = 0; at < end && !refused; i++) {
            at = next(at, bases, values, &node);
            refused = driver->set_node(graph->exec, graph->nodes[i], &node);
        }
        if (!refused)
            refused = driver->graph_launch(graph->exec, stream);
        launched = !refused;
        atomic_flag_clear(&graph->busy);
    }
    for (at = captured; at < end && !launched && !error;) {
        at = next(at, bases, values, &node);
        error = driver->launch(node.kernel, node.grid[0], 1, 1, node.block[0], 1, 1, node.shared, stream, parameters, NULL);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error ? error : refused ? -1 : 0);
}

static PyMethodDef methods[] = {
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL}, {"graph", make_graph, METH_VARARGS, NULL}, {0} };
static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "llsa_replay", .m_size = -1, .m_methods = methods};
PyMODINIT_FUNC PyInit_llsa_replay(void) { return PyModule_Create(&module); }
"""
BASES, PARAMETERS = 32, 128  # of a pass and of a launch, at most
DRIVER = (
    "cuLaunchKernel", "cuStreamIsCapturing", "cuThreadExchangeStreamCaptureMode", "cuGraphCreate", "cuGraphDestroy",
    "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags", "cuGraphExecDestroy", "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphLaunch", "cuCtxGetCurrent", "cuCtxSetCurrent",
)  # fmt: skip


@functools.cache
def libcuda() -> ctypes.CDLL:
    """The CUDA driver, for ctypes."""
    return ctypes.CDLL("libcuda.so.1")


def words_of(error: int) -> str:
    """What the driver calls an error."""
    text = ctypes.c_char_p()
    libcuda().cuGetErrorString(error, ctypes.byref(text))
    return (text.value or b"unknown").decode()


def said(error: Exception) -> str:
    """An exception in words: kept itself, it would keep the tensors of its frames."""
    return f"{type(error).__name__}: {error}"


@functools.cache
def replayer() -> Any:
    """`run` and `graph` of REPLAY_C, compiled and kept as Triton does with its own driver, and DRIVER's functions.

    What is wrong, in words, where that fails: it is tried once.
    """
    source = f"#define BASES {BASES}\n#define PARAMETERS {PARAMETERS}\n{REPLAY_C}"
    try:
        _ = libcuda().cuFuncGetParamInfo  # from CUDA 12.4 on
        functions = [ctypes.cast(getattr(libcuda(), name), ctypes.c_void_p).value for name in DRIVER]
        compiled = triton.runtime.build.compile_module_from_src(source, "llsa_replay")
        return compiled.run, compiled.graph, struct.pack(f"{len(DRIVER)}P", *functions)
    except Exception as error:
        return said(error)


def parameter_sizes(function: int) -> list[int]:
    """The sizes in bytes of a kernel's parameters, as the driver knows them."""
    offset, size, found = ctypes.c_size_t(), ctypes.c_size_t(), []
    while True:
        which = ctypes.c_void_p(function), ctypes.c_size_t(len(found))
        if libcuda().cuFuncGetParamInfo(*which, ctypes.byref(offset), ctypes.byref(size)):
            return found
        found.append(size.value)


def in_triton(tile: dict[str, Any]) -> dict[str, Any]:
    """Tile shapes for the kernel in Triton: in an entry of another backend, its register cap is `triton_maxnreg`."""
    own = {name: value for name, value in tile.items() if name not in ("backend", "GAPS")}
    if tile.get("backend", "triton") != "triton":
        own.pop("maxnreg", None)
        if "triton_maxnreg" in own:
            own["maxnreg"] = own.pop("triton_maxnreg")
    return own


def is_in_gluon(tile: dict[str, Any]) -> bool:
    """Whether tile shapes are for the kernel in Gluon, of which the interpreter knows nothing."""
    return tile.get("backend") == "gluon_sm90" and not INTERPRETED


def variant(kernel: Any, tile: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Which kernel a launch is, and what it takes of its tile shapes.

    A pair is a kernel in Triton and one in Gluon. The latter may be slow with partial tiles: those stay in Triton, but
    where the tiles are partial for the GAPS of given lists alone.
    """
    if not isinstance(kernel, tuple):
        return kernel, in_triton(tile)
    if not is_in_gluon(tile) or not (PARTIAL_IN_GLUON or tile.get("FULL", True) or tile["GAPS"]):
        return kernel[0], in_triton(tile)
    taken = ("num_warps", "maxnreg", *kernel[1].arg_names)
    return kernel[1], {name: value for name, value in tile.items() if name in taken}


MANY_GRAPHS = 512  # are kept: each takes some 100 KB of the GPU, and half a millisecond to make
SOON = 32  # replays of any pass: what comes back within so many takes the place of another's graph
ONE_BY_ONE = (
    os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
)  # whoever asks which launch it was will not be told of a graph
SIZES = {"i32": 4, "i64": 8, "fp32": 4}  # of a parameter, bytes, by Triton's name of its type; addresses take 8
LAUNCH = os.environ.get("LLSA_GEN_LAUNCH") or "auto"
if LAUNCH not in ("auto", "triton"):
    raise ValueError(f"LLSA_GEN_LAUNCH: expected auto or triton, got {LAUNCH!r}")
PLAIN = LAUNCH == "triton" or INTERPRETED or bool(torch.version.hip)  # every launch as Triton does it; see `give_up`
TOLD = []  # why launches take longer, once somebody was told
CLOCK = itertools.count(1)  # ticks at every replay of a pass
GRAPHS = weakref.WeakSet()  # of all passes
MAKING = threading.Lock()  # a graph; nobody waits for it, for who has it may be a thread that a fork left behind


class Argument(NamedTuple):
    """What differs from call to call in the arguments of a launch, as REPLAY_C puts it together; its value now."""

    value: torch.Tensor | float
    base: int
    offset: int = 0


def tell(why: str) -> None:
    """One warning, whatever else goes wrong later."""
    if not TOLD:
        TOLD.append(why)
        warnings.warn(f"{OPERATOR}: launching its kernels takes longer: {why}", RuntimeWarning, stacklevel=3)


def give_up(error: Exception) -> None:
    """From now on every launch is Triton's, as after LLSA_GEN_LAUNCH=triton."""
    global PLAIN
    PLAIN = True
    tell(said(error))


@functools.lru_cache(maxsize=256)
def parameters_of(compiled: Any) -> list[bool]:
    """Which arguments of a kernel are its parameters, one bool each; a RuntimeError where it takes more than these."""
    known = compiled.metadata
    kinds = list(compiled.src.signature.values())
    taken = [kind != "constexpr" for kind in kinds]  # nor numbers that Triton has made constants
    sizes = [8 if kind[0] == "*" else SIZES.get(kind) for kind in itertools.compress(kinds, taken)]
    more = known.num_ctas > 1 or known.launch_cooperative_grid or known.launch_pdl
    more = more or known.global_scratch_size or known.profile_scratch_size or len(sizes) + 2 > PARAMETERS
    if more or parameter_sizes(compiled.function) != [*sizes, 8, 8]:
        raise RuntimeError(f"{known.name} takes more than its arguments and two addresses of scratch memory")
    return taken


def captured(compiled: Any, programs: int, arguments: Sequence[Any]) -> bytes:
    """A launch as REPLAY_C reads it; a RuntimeError where that cannot replay it."""
    parameters = []
    for argument in itertools.compress(arguments, parameters_of(compiled)):
        parameters += argument[1:] if isinstance(argument, Argument) else (0, argument % 2**64)
    parameters += 0, 0, 0, 0  # no scratch memory of either kind
    known = compiled.metadata
    launch = compiled.function, programs, 32 * known.num_warps, known.shared, len(parameters) // 2
    return struct.pack(f"=Q4I{len(parameters)}Q", *launch, *parameters)


class Graph:
    """A pass as a CUDA graph, `made` until another takes its place, and the tick of CLOCK when it ran last."""

    def __init__(self, made: Any, replayed: int) -> None:
        self.made, self.replayed = made, replayed


class Replay:
    """The launches of a pass, `parts`, on the GPU whose context is current; `kernels` are theirs and stay loaded.

    graphs: by stream, for launches of one graph wait for each other. replayed: the tick of CLOCK of the last run, or 0.
    """

    def __init__(self, kernels: list[Any], parts: list[bytes]) -> None:
        context = ctypes.c_void_p()
        libcuda().cuCtxGetCurrent(ctypes.byref(context))
        self.graphs, self.replayed, self.refused = {}, 0, ONE_BY_ONE
        self.run_replay, self.make_graph, self.driver = replayer()
        self.text, self.count = b"".join([struct.pack("P", context.value or 0), *parts]), len(parts)
        self.kernels = kernels  # the last to go, after graphs of them

    def run(self, stream: int, scale: float, tensors: Sequence[torch.Tensor]) -> int:
        """Launch them all for these tensors; what the driver says of the launch that fails, or 0."""
        before, self.replayed = self.replayed, next(CLOCK)
        graph = self.graphs.get(stream)
        made = graph and graph.made
        if graph and made:
            graph.replayed = self.replayed
        elif before and not self.refused:
            made = self.graph(stream, before)
        error = self.run_replay(self.driver, self.text, made, stream, scale, *[x.data_ptr() for x in tensors])
        if error < 0:  # all are launched, one by one
            self.refuse()
            return 0
        return error

    def graph(self, stream: int, before: int) -> Any:
        """The pass as a graph; None where there will be none now. `before` is the tick of the replay before this one.

        If there are as many as there may be, the least recently used one has to go, but only for a pass that comes back
        soon: who goes round and round more shapes than that would make all of them in vain.
        """
        if (len(GRAPHS) >= MANY_GRAPHS and self.replayed - before > SOON) or not MAKING.acquire(blocking=False):
            return None
        try:
            made = self.make_graph(self.driver, self.text, self.count, stream)
            if made is False:
                self.refuse()
            if not made:  # a stream that is captured needs none
                return None
            if len(GRAPHS) >= MANY_GRAPHS:
                oldest = min(GRAPHS, key=lambda graph: graph.replayed)
                oldest.made = None
                GRAPHS.discard(oldest)
            graph = Graph(made, self.replayed)
            GRAPHS.add(graph)
            self.graphs = {place: other for place, other in self.graphs.items() if other.made} | {stream: graph}
            return made
        finally:
            MAKING.release()

    def refuse(self) -> None:
        """No graph any more: the driver takes none of this pass."""
        self.refused, self.graphs = True, {}
        tell("CUDA refuses a graph of them")


def tile_of(at: Any, kernel: Any) -> tuple[str, int, dict[str, Any]]:
    """The name of a kernel, its programs and its tile shapes."""
    name = (kernel[0] if isinstance(kernel, tuple) else kernel).__name__
    return name, *at.grids[name]


def values_of(arguments: Sequence[Any]) -> list[Any]:
    """What Triton takes."""
    return [x.value if isinstance(x, Argument) else x for x in arguments]


def by_triton(at: Any, kernel: Any, *arguments: Any) -> None:
    """Launch a kernel with its grid and tile shapes, or the one of a pair that fits, as Triton does it."""
    _, programs, tile = tile_of(at, kernel)
    kernel, tile = variant(kernel, tile)
    kernel[(programs,)](*values_of(arguments), **tile, **OPTIONS)


def by_what_is_ready(at: Any, kernel: Any, *arguments: Any) -> None:
    """Launch what Triton made of a kernel at the first call, so that it need not look for it again."""
    name, programs, _ = tile_of(at, kernel)
    compiled, shapes = at.ready[name]
    if programs:
        compiled[programs, 1, 1](*values_of(arguments), *shapes)


class Capture:
    """Launches the kernels of a pass through Triton at the first call, and notes how: Triton needs to see no other.

    Others are those that Triton does not tell apart, the calls of one `LaunchPlan`. `why` says, in words, what went
    wrong in noting, which is no reason to stop.
    """

    def __init__(self, at: Any) -> None:
        self.at, self.kernels, self.parts, self.why, self.unknown = at, [], [], None, False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.why = self.why or said(error)

    def __call__(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel with its grid and tile shapes, or one of a pair; without programs, only compile it."""
        values = values_of(arguments)
        name, programs, tile = tile_of(self.at, kernel)
        chosen, taken = variant(kernel, tile)
        compiled = chosen[(programs,)](*values, **taken, **OPTIONS)
        if compiled is None:  # a stand-in, or somebody has told Triton not to compile
            self.unknown = True
            return
        with self.noting():
            warm_others(kernel, tile, programs, values, bool(self.at.given))
        with self.noting():
            self.at.ready[name] = compiled, [taken[parameter] for parameter in chosen.arg_names[len(values) :]]
        with self.noting():
            if programs:
                self.kernels.append(compiled)
                self.parts.append(captured(compiled, programs, arguments))

    def replay(self) -> Replay | None:
        """What was launched; None where that cannot be replayed."""
        if len(self.parts) < len(self.kernels):
            return None
        if isinstance(replayer(), str):
            self.why = self.why or replayer()
            return None
        with self.noting():
            return Replay(self.kernels, self.parts)


def warm_others(kernel: Any, tile: dict[str, Any], programs: int, values: list[Any], given: bool) -> None:
    """Compile the variants of a kernel that another length may need: nothing is compiled then.

    Along `given` lists no call is FULL; of many levels, other lengths may leave Gluon.
    """
    if "EVICT_FIRST" in tile:
        warm(kernel, tile | {"EVICT_FIRST": not tile["EVICT_FIRST"]}, programs, values)
    if "FULL" in tile and LISTS_FILL and not given:
        warm(kernel, tile | {"FULL": not tile["FULL"]}, programs, values)
    for gaps in ("GAPS", "PARTIAL"):
        if gaps in tile and given:
            warm(kernel, tile | {gaps: not tile[gaps]}, programs, values)
    if "RUNS" in tile and has_runs(MANY_CANDIDATES, tile):
        warm(kernel, tile | {"RUNS": not tile["RUNS"]}, programs, values)


def warm(kernel: Any, tile: dict[str, Any], programs: int, values: list[Any]) -> None:
    """Compile a kernel, or the one of a pair that fits, and do not launch it."""
    kernel, tile = variant(kernel, tile)
    kernel.warmup(*values, **tile, **OPTIONS, grid=(programs,))


MANY_CANDIDATES = 1024  # of the coarsest level: from so many on, `best_by_runs` is the faster


def has_runs(n_candidates: int, tile: dict[str, int]) -> bool:
    """Whether runs of candidates are ranked first: many, dealt to several warps, and at least two to a run."""
    return tile["SPLIT"] > 1 and tile["BLOCK_N"] >= 8 * tile["KEEP"] and n_candidates >= MANY_CANDIDATES


def is_watched() -> bool:
    """Whether Triton tells somebody of launches, a profiler say: by a chain of its own, or what was put there."""
    runtime, chain = triton.knobs.runtime, triton.knobs.HookChain
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook.calls if isinstance(hook, chain) else hook is not None:
            return True
    return False


def level_tokens(length: int) -> tuple[int, ...]:
    """T_l of a length, the tokens of every level l = 0..L."""
    return length, *[ceil_div(length, span) for span in SPANS[1:]]


def split_queries(walks: int, n_queries: int, n_keys: int, tile: dict[str, int]) -> tuple[int, int]:
    """How queries are shared out where all of them attend to the same few keys: (rows a split, splits).

    `walks` is how many times that happens in a call, over all heads. Enough splits to fill a GPU, but no more than keep
    the partial sums small beside q: splits * n_keys <= n_queries / SPLIT_KEYS, or one split.
    """
    n_keys = max(n_keys, 1)
    programs = walks * ceil_div(n_keys, tile["BLOCK_N"])
    wanted = min(ceil_div(FILLING, programs), n_queries // (SPLIT_KEYS * n_keys))
    rows = ceil_div(ceil_div(n_queries, max(wanted, 1)), tile["BLOCK_M"]) * tile["BLOCK_M"]
    return rows, ceil_div(n_queries, rows)


def is_full(queries: Sequence[int], keys: Sequence[int], tile: dict[str, int]) -> bool:
    """Whether nothing needs a mask: all tokens are whole, so that no list has gaps, and lists fill their tiles."""
    if not LISTS_FILL or queries[0] % SPANS[-1] or keys[0] % SPANS[-1]:
        return False
    return all(
        min(WIDTHS[level], keys[level + 1]) * BLOCKS[level] % tile["BLOCK_C" if level else "BLOCK_N"] == 0
        for level in LISTED
    )


Extras = tuple[str, ...]
Widths = tuple[int, ...]


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def own_dtypes(layout: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The buffers of a layout and their dtypes; partial sums are rounded as the whole is, if that has the range."""
    own: dict[Any, Any] = {"input": dtype, "partial": dtype if dtype == torch.bfloat16 else torch.float32}
    return {name: own.get(known, known) for name, known in LAYOUTS[layout].items()}


def lay_out(layout: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[list[tuple[int, int]], int]:
    """Where each buffer of a layout begins, at a multiple of 256, and ends in its memory; its length. In bytes.

    What is saved lies head by head: these are the places and the length of one.
    """
    places, size = [], 0
    for name, own in own_dtypes(layout, dtype).items():
        length = math.prod(shapes[name]) * own.itemsize
        places.append((size, size + length))
        size += ceil_div(length, 256) * 256
    return places, size


def views_of(
    memory: torch.Tensor, layout: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The buffers of a layout as tensors in its memory; `saved` is [B, H, bytes], and so are they, [B, H, ...]."""
    places, _ = lay_out(layout, shapes, dtype)
    return [
        memory[..., begin:end].view(own).unflatten(-1, shapes[name])
        for (begin, end), (name, own) in zip(places, own_dtypes(layout, dtype).items(), strict=True)
    ]


def named_views(at: Any, like: Sequence[torch.Tensor] = (), **memories: torch.Tensor) -> dict[str, torch.Tensor]:
    """The buffers of some layouts by name, in their memory: of a `LaunchPlan`, or only `saved`, for q and k `like`."""
    found: dict[str, torch.Tensor] = {}
    for layout, memory in memories.items():
        shapes, dtype = (at.shapes, at.dtype) if at else (saved_shapes(*[x.shape[2] for x in like]), like[0].dtype)
        found |= zip(LAYOUTS[layout], views_of(memory, layout, shapes, dtype), strict=True)
    return found


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the shape, the dtype and the device of `x`; `new_empty` takes torch twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_saved(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Memory for what the forward pass over `q` and `k` leaves to the backward pass, [B, H, bytes].

    Never empty: torch.export 2.15 asks whether it may be, and of a symbol's formula it can't tell.
    """
    _, size = lay_out("saved", saved_shapes(q.shape[2], k.shape[2]), q.dtype)
    length: Any = torch.sym_max(size, 256)
    return q.new_empty((*q.shape[:2], length), dtype=torch.uint8)


def empty_outputs(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator's outputs for inputs like `q` and `k`, not filled in: o, lse and what is saved."""
    return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), empty_saved(q, k)


def empty_selection(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, not filled in."""
    shapes = saved_shapes(q.shape[2], k.shape[2])
    return [q.new_empty((*q.shape[:2], *shapes[f"kept_l{level}"]), dtype=torch.int32) for level in range(1, LEVELS + 1)]


def is_aligned(stride: Sequence[int]) -> bool:
    """Whether a row's elements lie side by side, and rows begin at multiples of ROW_UNIT elements."""
    batches, heads, rows, step = stride
    return step == 1 and (batches | heads | rows) % ROW_UNIT.value == 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if its rows do not lie as kernels need them: see `is_aligned`.

    Not by `contiguous`, which leaves the stride of a single row as it is: kernels make addresses of rows beyond it too.
    """
    return x if is_aligned(x.stride()) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def target_of(device: torch.device) -> str:
    """A GPU as the schedules name it; for one that they do not know, the nearest older one, or the oldest."""
    if device.type != "cuda":
        return "cuda:80"  # the interpreter, for which any schedule will do
    if torch.version.hip:
        return "hip:gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(target.split(":")[1]) for target in SCHEDULES if target.startswith("cuda")]
    return f"cuda:{max((arch for arch in known if arch <= 10 * major + minor), default=min(known))}"


def schedule_for(target: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Tile shapes of every kernel for a target and a dtype."""
    return SCHEDULES[target][dtype.itemsize]


def plan_launches(
    tensors: Sequence[torch.Tensor], extras: Extras = (), g_tokens: int = 0, given: Widths = ()
) -> tuple[Any, ...]:
    """The `LaunchPlan` for q, k, ... [B, H, N, D]; q, k, ..., `aligned`.

    Triton also tells apart where a row begins, at a multiple of 16 bytes or not, and which `extras` there are beside.
    Lists that are `given`, of these widths, may have gaps where those of the selection have none.
    """
    q, k, *_ = tensors
    strides = tuple([x.stride() for x in tensors])
    starts = tuple([x.data_ptr() % 16 for x in tensors])
    at = launch_plan(q.device, q.dtype, q.shape, k.shape, strides, starts, extras, g_tokens, given)
    return (at, *tensors) if at is not None else plan_launches([aligned(x) for x in tensors], extras, g_tokens, given)


@functools.lru_cache(maxsize=2048)
def launch_plan(
    device: torch.device, dtype: torch.dtype, q_shape: torch.Size, k_shape: torch.Size,
    strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], extras: Extras, g_tokens: int, given: Widths,
) -> "LaunchPlan | None":  # fmt: skip
    """One `LaunchPlan` for all calls that Triton does not tell apart; None where tensors have to be copied first."""
    if not all(map(is_aligned, strides)):
        return None
    tiles = schedule_for(target_of(device), dtype)
    return LaunchPlan(device, dtype, q_shape, k_shape, strides, starts, tiles, extras, g_tokens, given)


class LaunchPlan:
    """What depends on shapes, strides, dtype and device alone, worked out at the first call with them.

    rows: [B, H, M]. steps: between batches, heads and rows of each tensor. shapes: of every buffer. places, sizes: of
    buffers in the memory of each layout and of that memory, see `lay_out`. grids: programs and tile shapes of every
    launch. extras: names of the tensors that a pass takes beside those that it always takes, in their order.
    ready: what Triton made of each launch, so that it need not look for it again. replays: the launches of each pass,
    from its first call on, or None where that cannot be replayed. What else there is, `work_out` says.
    """

    shapes: dict[str, tuple[int, ...]]
    grids: dict[str, tuple[int, dict[str, Any]]]

    def __init__(
        self, device: torch.device, dtype: torch.dtype, q_shape: torch.Size, k_shape: torch.Size,
        strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], tiles: dict[str, dict[str, Any]],
        extras: Extras = (), g_tokens: int = 0, given: Widths = (),
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.extras, self.g_tokens, self.given = device, dtype, extras, g_tokens, given
        batch, self.heads_per_batch, self.m_tokens = self.rows = q_shape[:3]
        self.heads, self.kv_heads, self.n_tokens = batch * self.heads_per_batch, batch * k_shape[1], k_shape[2]
        self.steps = [stride[:3] for stride in strides]
        # the kernels in Gluon copy 16 bytes at a time, and multiply a stride in 32 bits
        if any(starts) or any(stride[2] >= 2**30 for stride in strides):
            tiles = {stage: in_triton(entry) for stage, entry in tiles.items()}
        work_out(self, tiles)
        self.places, self.sizes = {}, {}
        for layout in LAYOUTS:
            self.places[layout], self.sizes[layout] = lay_out(layout, self.shapes, dtype)
        self.saved_step = self.sizes["saved"] // 256
        heads: dict[str, tuple[int, ...]] = {"saved": (batch, self.heads_per_batch)}
        self.memories = {layout: (*heads.get(layout, ()), size) for layout, size in self.sizes.items()}
        self.ready: dict[str, Any] = {}
        self.replays: dict[Callable[..., None], Any] = {}

    def memory(self, layout: str) -> torch.Tensor:
        """One piece of memory for all buffers of a layout."""
        # sizes one by one: torch takes half a microsecond longer for a tuple
        return torch.empty(*self.memories[layout], dtype=torch.uint8, device=self.device)

    def named(self, extras: Sequence["Argument"], *names: str) -> list["Argument | None"]:
        """The extra tensors of these names; None where there is none."""
        known = dict(zip(self.extras, extras, strict=True))
        return [known.get(name) for name in names]

    def buffers(self, memory: Any, layout: str) -> list["Argument"]:
        """The buffers of a layout in its memory, an `Argument`: an `Argument` each."""
        views = views_of(memory.value, layout, self.shapes, self.dtype)
        return [Argument(view, memory.base, begin) for view, (begin, _) in zip(views, self.places[layout], strict=True)]

    def run(self, launches: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float = 0.0) -> None:
        """Launch a pass, whose function `launches` names its kernels in order, over tensors alike at every call.

        The kernels read and write only these and, at `Argument.offset`, what lies in them; lengths and strides stay.
        """
        error = 0
        if PLAIN:
            self.launch(launches, functools.partial(by_triton, self), tensors, scale)
        elif launches in self.replays:
            try:
                error = self.replay(launches, tensors, scale)
            except Exception as reason:
                # Some kernels may be launched already. All are again, from those on that clear what others count in.
                # What is wrong with more than the way of launching, Triton says.
                self.launch(launches, functools.partial(by_triton, self), tensors, scale)
                give_up(reason)
        else:
            capture = Capture(self)
            self.launch(launches, capture, tensors, scale)
            if not capture.unknown:
                self.replays[launches] = capture.replay()
                if capture.why is not None:
                    tell(capture.why)
        if error:
            raise RuntimeError(f"{OPERATOR}: CUDA error {error} at a launch: {words_of(error)}")

    def replay(self, launches: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float) -> int:
        """Launch a pass from its second call on; what the driver says of the launch that fails, or 0."""
        replay = self.replays[launches]
        if replay is not None and not is_watched():
            stream: int = triton.runtime.driver.active.get_current_stream(self.device.index)  # type: ignore[attr-defined]
            return replay.run(stream, scale, tensors)
        self.launch(launches, functools.partial(by_what_is_ready, self), tensors, scale)
        return 0

    def launch(
        self, launches: Callable[..., None], launch: Callable[..., None], tensors: Sequence[torch.Tensor], scale: float
    ) -> None:
        """Launch a pass, each of its kernels by `launch`."""
        launches(self, launch, Argument(scale, 1), *[Argument(x, 2 + i) for i, x in enumerate(tensors)])


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


# ---- the CPU path ----------------------------------------------------------------------------------------------------

CHUNK = 2**24  # elements of the largest intermediate
Tensors = Sequence[torch.Tensor]


def slices(length: int, step: int) -> list[slice]:
    """Slices of `step`, at least 1, that cover range(length) in order; the last one may be shorter."""
    step = max(1, step)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def block_sizes(length: int) -> Sequence[int]:
    """b_1, b_2, ...; of a sequence shorter than a block its length, 1, 1, ...: nothing is filled up."""
    return BLOCKS if length >= BLOCKS[0] else (length, *(1 for _ in BLOCKS[1:]))


def blocks_of(x: torch.Tensor, block: int, run: slice | None = None) -> torch.Tensor:
    """Rows in blocks, those of a run or all, the last one filled up with zeros: [H, T, D] to [H, R, block, D]."""
    if run is not None:
        x = x[:, run.start * block : run.stop * block]
    missing = -x.shape[1] % block
    return (torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (-1, block))


def put_blocks(to: torch.Tensor, run: slice, blocks: torch.Tensor) -> None:
    """Write the blocks [H, R, b, ...] of a run to where `blocks_of` takes them from, in `to` [H, T, ...]."""
    first, rows = run.start * blocks.shape[2], blocks.flatten(1, 2)
    to = to[:, first : first + rows.shape[1]]
    to.copy_(rows[:, : to.shape[1]])


def block_sums(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over the blocks of x in float32: [H, T, D] to [H, ceil(T / block), D]."""
    heads, rows, dim = x.shape
    sums = x.new_empty((heads, ceil_div(rows, block), dim), dtype=torch.float32)
    for run in slices(sums.shape[1], CHUNK // (heads * block * dim)):
        sums[:, run] = blocks_of(x, block, run).float().sum(2)
    return sums


def covered_tokens(level: int, n_tokens: int, device: torch.device) -> torch.Tensor:
    """c_l(j) of every token of a level, [T_l] float32."""
    first = torch.arange(0, n_tokens, SPANS[level], device=device)
    return (n_tokens - first).clamp(max=SPANS[level]).float()


def token_means(x: torch.Tensor) -> list[torch.Tensor]:
    """The pyramid of x [H, N, D]: L tensors [H, T_l, D], finest first, rounded to x's dtype once and float32 again."""
    means, sums, n_tokens = [], x, x.shape[1]
    for level, block in enumerate(block_sizes(n_tokens), start=1):
        sums = block_sums(sums, block)
        covered = covered_tokens(level, n_tokens, x.device)
        means.append((sums / covered[:, None]).to(x.dtype).float())
    return means


def enriched_by(x: torch.Tensor) -> list[torch.Tensor]:
    """x [H, N, D] and its pyramid, if any level of it is attended and there is anything to pool."""
    return [x, *token_means(x)] if ENRICHED and x.shape[1] else [x]


def block_rows(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Where the blocks of a list are in `blocks` [H, T, block, D] seen as [H * T, block, D]; block 0 for -1."""
    first = torch.arange(blocks.shape[0], device=kept.device)[:, None, None] * blocks.shape[1]
    return (kept.clamp(min=0) + first).flatten()


def gather_blocks(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The blocks that a list names, side by side: [H, T, block, D] and [H, R, W] to [H, R, W * block, D]."""
    found = blocks.flatten(0, 1).index_select(0, block_rows(blocks, kept))
    return found.view(*kept.shape, *blocks.shape[2:]).flatten(2, 3)


def scatter_add_blocks(total: torch.Tensor, kept: torch.Tensor, parts: torch.Tensor) -> None:
    """Add what `gather_blocks` took from [H, T, block, D] back to where it came from, in place."""
    rows = parts.unflatten(2, (-1, total.shape[2])).flatten(0, 2)
    total.view(-1, *total.shape[2:]).index_add_(0, block_rows(total, kept), rows)


def children_of(kept: torch.Tensor, block: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Children of the tokens in a list, and which of them exist: [H, R, W] to twice [H, R, W * block]."""
    child = (kept.long()[..., None] * block + torch.arange(block, device=kept.device)).flatten(2)
    return child, (child >= 0) & (child < n_tokens)


def elements_seen(kept: Tensors, m_tokens: int, n_tokens: int, g_tokens: int = 0) -> int:
    """Elements of the keys, values and logits of a block of queries of one head, the logits twice."""
    blocks = block_sizes(n_tokens)
    listed = sum(kept[level].shape[2] * blocks[level] for level in LISTED)
    seen = listed + g_tokens + (level_tokens(n_tokens)[LEVELS] if LEVELS in ENRICHED else 0)
    return 2 * (listed * HEAD_DIM.value + seen * block_sizes(m_tokens)[0])


def slices_of_heads(kept: Tensors, m_tokens: int, n_tokens: int, g_tokens: int = 0) -> list[slice]:
    """Slices of the heads: of so many that a block of queries of each, of any level, fits into CHUNK elements."""
    most = max(elements_seen(kept, m_tokens, n_tokens, g_tokens), level_tokens(n_tokens)[LEVELS])
    for lists, q_block, k_block in zip(kept[1:], block_sizes(m_tokens)[1:], block_sizes(n_tokens)[1:], strict=True):
        most = max(most, lists.shape[2] * k_block * (HEAD_DIM.value + q_block))
    return slices(kept[0].shape[0], CHUNK // most)


def log_weights(level: int, token: torch.Tensor, exists: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Logarithms of the weights c_l(j) of key tokens of a level, or 0; -inf for tokens that do not exist."""
    weights = (n_tokens - token * SPANS[level]).clamp(max=SPANS[level]).float().log() if WEIGHTED else 0.0
    return torch.where(exists, weights, float("-inf"))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of `x` are worked out in: float32 or, on a GPU, float64, for torch may take TF32 for float32 there.

    Whether it does is a switch of the user's, of all threads: nothing here turns it. A GPU comes here where there are
    no keys but global ones, which is rare.
    """
    return torch.float64 if x.is_cuda else torch.float32


class Pyramid:
    """Keys and values of some heads as queries see them: every level in blocks, and the kept tokens.

    Keys and values are in the dtype of products, float32 but on a GPU.

    k_levels and v_levels: [H, T_l(N), D] of the levels, finest first; kept: [H, T_l(M), width] of every coarse level,
    of m_tokens queries. shared: what all queries see, keys and values [H, S, D] and log weights [H, S], or None. It is
    the coarsest level, if that is attended, then the global tokens `of_all`. Without keys no level is listed.
    """

    def __init__(
        self, k_levels: Tensors, v_levels: Tensors, kept: Tensors, m_tokens: int, of_all: Tensors = ()
    ) -> None:
        self.kept, self.m_tokens, self.q_block = kept, m_tokens, block_sizes(m_tokens)[0]
        self.heads, self.n_tokens, _ = k_levels[0].shape
        self.blocks, self.listed = block_sizes(self.n_tokens), LISTED if self.n_tokens else ()
        self.wide = product_dtype(k_levels[0])
        self.k_blocks, self.v_blocks = (
            [blocks_of(levels[level], self.blocks[level]).to(self.wide).contiguous() for level in self.listed]
            for levels in (k_levels, v_levels)
        )
        self.n_top, self.g_tokens, parts = 0, of_all[0].shape[1] if of_all else 0, []
        if LEVELS in ENRICHED and self.n_tokens:
            self.n_top = k_levels[-1].shape[1]
            token = torch.arange(self.n_top, device=k_levels[-1].device)
            weights = log_weights(LEVELS, token, token >= 0, self.n_tokens)
            parts.append((k_levels[-1], v_levels[-1], weights.expand(self.heads, -1)))
        if of_all:
            keys, values, weights = of_all
            parts.append((keys.to(self.wide), values.to(self.wide), weights))
        together = [torch.cat(x, 1) for x in zip(*parts, strict=True)] if len(parts) > 1 else [*parts, None][0]
        self.shared: Tensors | None = together

    def runs(self) -> list[slice]:
        """Slices of query blocks such that the keys, values and logits of each fit into CHUNK elements."""
        elements = self.heads * elements_seen(self.kept, self.m_tokens, self.n_tokens, self.g_tokens)
        return slices(self.kept[0].shape[1], CHUNK // elements)

    def lists(self, run: slice) -> list[torch.Tensor]:
        """What the query blocks of a run keep one level above each listed level: a list of [H, R, width]."""
        block = torch.arange(run.start, run.stop, device=self.kept[0].device)
        return [self.kept[level].index_select(1, block * SPANS[1] // SPANS[level + 1]) for level in self.listed]

    def gather(self, lists: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values, lists of [H, R, C, D], and log weights, of [H, R, C], of the children of each list."""
        keys = [gather_blocks(blocks, kept) for blocks, kept in zip(self.k_blocks, lists, strict=True)]
        values = [gather_blocks(blocks, kept) for blocks, kept in zip(self.v_blocks, lists, strict=True)]
        weights = []
        for level, kept in zip(self.listed, lists, strict=True):
            child, exists = children_of(kept, self.blocks[level], level_tokens(self.n_tokens)[level])
            weights.append(log_weights(level, child, exists, self.n_tokens))
        return keys, values, weights


def softmax_blocks(
    queries: torch.Tensor, keys: Tensors, weights: Tensors, shared: Tensors | None, scale: float
) -> tuple[Tensors, torch.Tensor, torch.Tensor | None]:
    """Softmax weights over all keys, a list of [H, R, b_1, C], and lse [H, R, b_1], of query blocks [H, R, b_1, D].

    Also which queries have nothing to attend to, [H, R, b_1, 1], or None for none: there all weights are 0.
    """
    logits = [(queries @ k.mT).mul_(scale).add_(weight[:, :, None]) for k, weight in zip(keys, weights, strict=True)]
    if shared is not None:
        of_all = (queries.flatten(1, 2) @ shared[0].mT).mul_(scale).add_(shared[2][:, None])
        logits.append(of_all.unflatten(1, queries.shape[1:3]))
    sizes = [part.shape[-1] for part in logits]
    logits = torch.cat(logits, dim=-1)
    p, peak = logits.softmax(-1), logits.amax(-1)
    lse = peak - p.amax(-1).log()  # the largest weight is e^(peak - lse)
    nothing = (peak == float("-inf"))[..., None]
    if not (nothing.is_cuda or nothing.any()):  # a GPU would have to be waited for
        return p.split(sizes, dim=-1), lse, None
    return p.masked_fill_(nothing, 0.0).split(sizes, dim=-1), torch.where(nothing[..., 0], peak, lse), nothing


def attend_blocks(
    queries: torch.Tensor, keys: Tensors, values: Tensors, weights: Tensors, shared: Tensors | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [H, R, b_1, D] and lse [H, R, b_1] of query blocks [H, R, b_1, D]: one softmax over all their keys."""
    p, lse, _ = softmax_blocks(queries, keys, weights, shared, scale)
    o: Any = sum(part @ v for part, v in zip(p, values, strict=False))
    if shared is not None:
        o = o + (p[-1].flatten(1, 2) @ shared[1]).unflatten(1, queries.shape[1:3])
    return o, lse


def grad_attend_blocks(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, queries: torch.Tensor, keys: Tensors, values: Tensors,
    weights: Tensors, shared: Tensors | None, scale: float,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """dq, then dk and dv as lists like keys and values, and at their end those of `shared`.

    From the gradients of o [H, R, b_1, D] and lse [H, R, b_1, 1], which may be None.
    """
    p, _, nothing = softmax_blocks(queries, keys, weights, shared, scale)
    if nothing is not None:
        grad_o = grad_o.masked_fill(nothing, 0.0)
        grad_lse = None if grad_lse is None else grad_lse.masked_fill(nothing, 0.0)
    dp = [grad_o @ v.mT for v in values]
    if shared is not None:
        dp.append((grad_o.flatten(1, 2) @ shared[1].mT).unflatten(1, queries.shape[1:3]))
    delta: Any = sum((part * grad).sum(-1, keepdim=True) for part, grad in zip(p, dp, strict=True))
    delta = delta - (0.0 if grad_lse is None else grad_lse)
    ds = [grad.sub_(delta).mul_(part).mul_(scale) for part, grad in zip(p, dp, strict=True)]
    dq: Any = sum(part @ k for part, k in zip(ds, keys, strict=False))
    dk = [part.mT @ queries for part in ds[: len(keys)]]
    dv = [part.mT @ grad_o for part in p[: len(keys)]]
    if shared is not None:
        dq = dq + (ds[-1].flatten(1, 2) @ shared[0]).unflatten(1, queries.shape[1:3])
        dk.append(ds[-1].flatten(1, 2).mT @ queries.flatten(1, 2))
        dv.append(p[-1].flatten(1, 2).mT @ grad_o.flatten(1, 2))
    return dq, dk, dv


def attend_heads(
    o: torch.Tensor, lse: torch.Tensor, kept: Tensors, q: torch.Tensor, k_levels: Tensors, v_levels: Tensors,
    scale: float, of_all: Tensors = (),
) -> None:  # fmt: skip
    """Fill in o [H, M, D] and lse [H, M] of some heads, along the kept tokens of every level, finest first."""
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1], of_all)
    for run in pyramid.runs():
        queries = blocks_of(q, pyramid.q_block, run).to(pyramid.wide).contiguous()
        part_o, part_lse = attend_blocks(queries, *pyramid.gather(pyramid.lists(run)), pyramid.shared, scale)
        put_blocks(o, run, part_o)
        put_blocks(lse, run, part_lse)


def grad_levels(
    dq: torch.Tensor, kept: Tensors, grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
    k_levels: Tensors, v_levels: Tensors, scale: float, of_all: Tensors = (),
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """Fill in dq of some heads; the gradients of keys and of values of every attended level, in the dtype of products.

    Last those of the globals, if there are any.
    """
    pyramid = Pyramid(k_levels, v_levels, kept, q.shape[1], of_all)
    grad_k = [torch.zeros_like(blocks) for blocks in pyramid.k_blocks]
    grad_v = [torch.zeros_like(blocks) for blocks in pyramid.v_blocks]
    of_shared = [] if pyramid.shared is None else [torch.zeros_like(x) for x in pyramid.shared[:2]]
    for run in pyramid.runs():
        lists = pyramid.lists(run)
        queries, grads = (blocks_of(x, pyramid.q_block, run).to(pyramid.wide).contiguous() for x in (q, grad_o))
        of_lse = None if grad_lse is None else blocks_of(grad_lse, pyramid.q_block, run)
        gathered = pyramid.gather(lists)
        part_q, parts_k, parts_v = grad_attend_blocks(grads, of_lse, queries, *gathered, pyramid.shared, scale)
        put_blocks(dq, run, part_q)
        for total_k, total_v, above, part_k, part_v in zip(grad_k, grad_v, lists, parts_k, parts_v, strict=False):
            scatter_add_blocks(total_k, above, part_k)
            scatter_add_blocks(total_v, above, part_v)
        for total, parts in zip(of_shared, (parts_k, parts_v), strict=False):
            total += parts[-1]

    found = [blocks.flatten(1, 2) for blocks in grad_k], [blocks.flatten(1, 2) for blocks in grad_v]
    for levels, total in zip(found, of_shared, strict=False):
        top, of_globals = total[:, : pyramid.n_top], total[:, pyramid.n_top :]
        levels += [x for x, there in ((top, pyramid.n_top), (of_globals, of_all)) if there]
    return found


def put_sums(to: torch.Tensor, sums: Tensors) -> None:
    """Write to `to` [H, N, D] the sums of each token, and its share of the sums of the means that it is part of."""
    if not sums:  # there are no keys
        return
    if not ENRICHED:
        to.copy_(sums[0][:, : to.shape[1]])
        return
    heads, n_tokens, dim = to.shape
    for run in slices(n_tokens, CHUNK // (heads * dim)):
        token, rows = torch.arange(run.start, run.stop, device=to.device), sums[0][:, run]
        for level, coarse in zip(ENRICHED, sums[1:], strict=True):
            above = token // SPANS[level]
            share = 1.0 / covered_tokens(level, n_tokens, to.device)[above][:, None]
            rows += coarse.index_select(1, above).mul_(share)
        to[:, run] = rows


def best_tokens(scores: torch.Tensor, token: torch.Tensor, exists: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` best tokens of each row, best first, of equal scores the lower token; -1 where fewer exist.

    scores [H, R, M, C] float32, overwritten; token and exists [H, R, C]; returns [H, R, M, width] int32.
    """
    # one integer that orders like (score, lower token first): the float's bits made monotonic, then the token
    bits = scores.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    rank = bits.long()
    rank <<= 32
    rank |= 0x7FFFFFFF - token[:, :, None]
    rank.masked_fill_(~exists[:, :, None], EMPTY.value)
    best = rank.topk(width, dim=-1).values
    return torch.where(best == EMPTY.value, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)).int()


def select_levels(
    kept: Sequence[torch.Tensor], q_means: Sequence[torch.Tensor], k_means: Sequence[torch.Tensor], m_tokens: int,
    n_tokens: int,
) -> None:  # fmt: skip
    """Fill in the kept tokens [H, T_l(M), width] of each level, finest first, from the means of each level.

    Those of the queries are [H, T_l(M), D], those of the keys [H, T_l(N), D].
    """
    heads, n_top, _ = k_means[-1].shape
    token = torch.arange(n_top, device=k_means[-1].device).expand(heads, 1, n_top)
    for rows in slices(q_means[-1].shape[1], CHUNK // (heads * n_top)):
        scores = q_means[-1][:, rows] @ k_means[-1].mT
        kept[-1][:, rows] = best_tokens(scores[:, None], token, token >= 0, kept[-1].shape[2])[:, 0]
    for level in range(LEVELS - 1, 0, -1):
        above, q_block, k_block = kept[level], block_sizes(m_tokens)[level], block_sizes(n_tokens)[level]
        k_blocks = blocks_of(k_means[level - 1], k_block)
        for run in slices(above.shape[1], CHUNK // (heads * above.shape[2] * k_block * (HEAD_DIM.value + q_block))):
            lists, queries = above[:, run], blocks_of(q_means[level - 1], q_block, run)
            child, exists = children_of(lists, k_block, k_means[level - 1].shape[1])
            scores = queries @ gather_blocks(k_blocks, lists).mT
            put_blocks(kept[level - 1], run, best_tokens(scores, child, exists, kept[level - 1].shape[2]))


def select_torch(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in torch."""
    selection = empty_selection(q, k)
    q, k, *kept = (x.flatten(0, 1) for x in (q, k, *selection))
    lengths = q.shape[1], k.shape[1]
    for heads in slices_of_heads(kept, *lengths):
        select_levels([lists[heads] for lists in kept], token_means(q[heads]), token_means(k[heads]), *lengths)
    return selection


def global_rows(shared: Sequence[Any] | None) -> Sequence[torch.Tensor]:
    """Global keys and values [B*H, G, D] and log weights [B*H, G], -inf where masked; of None, nothing."""
    if shared is None:
        return ()
    keys, values, mask = shared
    weights = keys.new_zeros((keys.shape[0], keys.shape[2]), dtype=torch.float32)
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    return keys.flatten(0, 1), values.flatten(0, 1), weights.repeat_interleave(keys.shape[1], 0)


def attend_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, shared: Sequence[Any] | None = None,
    given: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, in torch: of the layout `saved`, what is kept, unless that is given."""
    o, lse, saved = empty_outputs(q, k)
    saved.zero_()
    kept = saved_lists(saved, q, k) if given is None else [level.flatten(0, 1) for level in given]
    of_all = global_rows(shared)
    heads_o, heads_lse, q, k, v = (x.flatten(0, 1) for x in (o, lse, q, k, v))
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1], of_all[0].shape[1] if of_all else 0):
        lists, own = [level[heads] for level in kept], [x[heads] for x in of_all]
        if given is None:
            k_levels = [k[heads], *token_means(k[heads])]
            select_levels(lists, token_means(q[heads]), k_levels[1:], q.shape[1], k.shape[1])
        else:
            k_levels = enriched_by(k[heads])
        attend_heads(heads_o[heads], heads_lse[heads], lists, q[heads], k_levels, enriched_by(v[heads]), scale, own)
    return o, lse, saved


def saved_lists(saved: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept tokens of each level, finest first, in what the forward pass over q and k left to the backward pass."""
    lists = views_of(saved, "saved", saved_shapes(q.shape[2], k.shape[2]), q.dtype)[-LEVELS:]
    return [kept.flatten(0, 1) for kept in lists]


def grad_torch(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    saved: torch.Tensor, scale: float, shared: Sequence[Any] | None = None, given: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv in torch, then dk and dv of the globals, if there are any.

    The softmax of every run of query blocks once more, then the pooling backwards.
    """
    kept = saved_lists(saved, q, k) if given is None else [level.flatten(0, 1) for level in given]
    of_all = global_rows(shared)
    grads = tuple(map(empty_like, (q, k, v, *(shared or ())[:2])))
    dq, dk, dv, *of_globals, grad_o, q, k, v = (x.flatten(0, 1) for x in (*grads, grad_o, q, k, v))
    if grad_lse is not None:
        grad_lse = grad_lse.flatten(0, 1)[..., None]
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1], of_all[0].shape[1] if of_all else 0):
        lists, own, to = ([x[heads] for x in tensors] for tensors in (kept, of_all, (dk, dv, *of_globals)))
        of_lse = None if grad_lse is None else grad_lse[heads]
        k_levels, v_levels = enriched_by(k[heads]), enriched_by(v[heads])
        sums = grad_levels(dq[heads], lists, grad_o[heads], of_lse, q[heads], k_levels, v_levels, scale, own)
        for place, levels in enumerate(sums):
            if own:
                to[2 + place].copy_(levels.pop().masked_fill_((own[2] == float("-inf"))[..., None], 0.0))
            put_sums(to[place], levels)
    return grads


def with_means(x: torch.Tensor, means: Sequence[torch.Tensor], heads: slice) -> list[torch.Tensor]:
    """The rows of some heads, and their means."""
    return [x[heads], *(mean[heads] for mean in means)]


def select_means_torch(
    kept: Sequence[torch.Tensor], q_means: Sequence[torch.Tensor], k_means: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Fill in the kept tokens [B, H, T_l(M), width] from the means of each level, in torch."""
    lists, q_levels, k_levels = ([x.flatten(0, 1) for x in levels] for levels in (kept, q_means, k_means))
    lengths = q_levels[0].shape[1] * SPANS[1], k_levels[0].shape[1] * SPANS[1]
    for heads in slices_of_heads(lists, *lengths):
        q_own, k_own = ([x[heads].float() for x in levels] for levels in (q_levels, k_levels))
        select_levels([level[heads] for level in lists], q_own, k_own, *lengths)
    return list(kept)


def attend_along(
    o: torch.Tensor, lse: torch.Tensor, saved: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Fill in o and lse along the lists and with the means that are `saved`, by name."""
    kept, levels = saved_by_level(saved)
    heads_o, heads_lse, q, k, v = (x.flatten(0, 1) for x in (o, lse, q, k, v))
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        k_levels, v_levels = (with_means(x, means, heads) for x, means in zip((k, v), levels, strict=True))
        lists = [level[heads] for level in kept]
        attend_heads(heads_o[heads], heads_lse[heads], lists, q[heads], k_levels, v_levels, scale)


def saved_by_level(saved: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Of what is saved, by name: the lists of every level, and the means of keys and of values, float32. [B*H, ...]."""
    levels = range(1, LEVELS + 1)
    kept = [saved[f"kept_l{level}"].flatten(0, 1) for level in levels]
    none = kept[0].new_empty((kept[0].shape[0], 0, HEAD_DIM.value), dtype=torch.float32)
    means = [
        [saved[f"{x}_l{level}"].flatten(0, 1).float() if level in ENRICHED else none for level in levels] for x in "kv"
    ]
    return kept, means


def grad_along(
    means: Sequence[torch.Tensor], grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, saved: dict[str, torch.Tensor], scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """dq, dk, dv and the gradients of the means, which are filled in: where `attend_along` attended."""
    kept, levels = saved_by_level(saved)
    grads = [empty_like(x) for x in (q, k, v)]
    dq, dk, dv, grad_o, q, k, v = (x.flatten(0, 1) for x in (*grads, grad_o, q, k, v))
    of_k, of_v = means[:LEVELS], means[LEVELS:]
    if grad_lse is not None:
        grad_lse = grad_lse.flatten(0, 1)[..., None]
    for heads in slices_of_heads(kept, q.shape[1], k.shape[1]):
        k_levels, v_levels = (with_means(x, found, heads) for x, found in zip((k, v), levels, strict=True))
        lists, of_lse = [level[heads] for level in kept], None if grad_lse is None else grad_lse[heads]
        sums = grad_levels(dq[heads], lists, grad_o[heads], of_lse, q[heads], k_levels, v_levels, scale)
        for to, own, (first, *coarse) in ((dk, of_k, sums[0]), (dv, of_v, sums[1])):
            to[heads] = first[:, : to.shape[1]]
            for level, total in zip(ENRICHED, coarse, strict=True):
                mean = own[level - 1].flatten(0, 1)
                mean[heads] = total[:, : mean.shape[1]].to(mean.dtype)
    return [*grads, *means]


# ---- the operator ----------------------------------------------------------------------------------------------------

MANY_HEADS = 128
"""More heads than models have; more than that may be tokens."""

LAYOUT_WARNINGS: list[str] = []
"""What was said of layouts in this process: one warning is enough."""

DENSE_ATTENTION = torch._C._nn.scaled_dot_product_attention  # type: ignore[attr-defined]
"""What torch's context_parallel replaces in torch.nn.functional for as long as it lasts."""


def check_layout(layout: Any) -> None:
    """One clear error for a layout that is not [B, H, N, D]."""
    if layout != "BHND":
        raise ValueError(
            f"layout: expected 'BHND' or None, got {layout!r}; of [B, N, H, D] pass x.transpose(1, 2), a view"
        )


def look_at_layout(q: torch.Tensor, k: torch.Tensor) -> None:
    """One warning for keys that look like [B, N, H, D]: far more heads than tokens, whose rows lie together.

    What is [B, H, N, D] because it was transposed has the rows of a token together. Of other lengths than those of the
    keys, queries [B, M, H, D] are an error anyway.
    """
    _, heads, tokens, _ = shape = k.shape
    if LAYOUT_WARNINGS or heads <= 4 * tokens or q.shape != shape or k.stride(1) < k.stride(2):
        return
    d = HEAD_DIM.value
    text = (
        f"{OPERATOR}: k of shape {list(shape)} is read as [B, H, N, {d}], {heads} heads of {tokens} tokens. If it is "
        f"[B, N, H, {d}], {tokens} heads of {heads} tokens, pass x.transpose(1, 2) of q, k and v, which is a view; "
        "if it is right, layout='BHND' says so"
    )
    warnings.warn(text, UserWarning, stacklevel=3)
    LAYOUT_WARNINGS.append(text)


def refuse_context_parallel(q: torch.Tensor, k: torch.Tensor) -> None:
    """One clear error inside torch's context_parallel, where every process has a part of the tokens.

    It replaces torch's own attention alone. Others may replace that too, which is nobody's business here. Queries that
    are fewer than keys, or padded for a query_offset, are those of a caller who takes care of it.
    """
    inside = "context_parallel" in getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", "")
    if inside and q.shape[2] == k.shape[2]:
        raise NotImplementedError(
            f"{OPERATOR}: called inside torch's context_parallel, which shards the tokens and makes up for it in "
            f"scaled_dot_product_attention alone: queries would attend to the {k.shape[2]} keys of this process alone. "
            "Shard by batch or heads, outside that context, or gather k and v and say by query_offset where q begins"
        )


try:
    from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor, peek_interpreter_stack
    from torch.autograd import _profiler_enabled
except ImportError:  # torch's own names: where they are gone, every call is taken for a watched one
    _len_torch_dispatch_stack = None

    def is_legacy_batchedtensor(tensor: torch.Tensor) -> bool:
        return False


USUAL = {torch.Tensor, torch.nn.Parameter}


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether nothing watches what happens to these tensors: no compiler, mode, transform, profiler, no subclass.

    Torch's dispatcher then has nothing to add, and takes longer than the kernels up to some 16,000 tokens.
    """
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack is None or tensors[0].is_meta:
        return False
    for x in tensors:
        if type(x) not in USUAL or is_functorch_wrapped_tensor(x):
            return False
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack()
        or _profiler_enabled()
        or torch.jit.is_tracing()
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which knows `Attend` but not how torch differentiates operators."""
    return torch._C._are_functorch_transforms_active()


ON_CURRENT_DEVICE = contextlib.nullcontext()


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: make it that of `x`."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return ON_CURRENT_DEVICE


def without_autocast(x: torch.Tensor | None = None) -> contextlib.AbstractContextManager[Any]:
    """What the CPU path multiplies, on the CPU or where `x` is, is float32 on purpose, and autocast would round it."""
    return torch.autocast("cpu" if x is None else x.device.type, enabled=False)


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take `x`: on a GPU, or anywhere in Triton's interpreter."""
    return x.is_cuda or INTERPRETED


def without_keys(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator's outputs where there are no queries or no keys: o = 0, lse = -inf."""
    o, lse, saved = empty_outputs(q, k)
    return o.zero_(), lse.fill_(float("-inf")), saved.zero_()


def in_one_piece(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if it lies apart or begins at no multiple of 16 bytes: what was saved, hooks may keep anywhere.

    Kernels that have been compiled for the one kind are not told of the other.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def seen_by_all(
    k_global: torch.Tensor | None, v_global: torch.Tensor | None, global_mask: torch.Tensor | None
) -> "GlobalTokens | None":
    """Global keys, values and their mask or None, as kernels take them; None where there are no global tokens.

    Those that take no part are zeros: they weigh nothing, but nothing times infinity is no number.
    """
    if k_global is None or v_global is None or k_global.shape[2] == 0:
        return None
    if global_mask is None:
        return in_one_piece(k_global), in_one_piece(v_global), None
    k_global, v_global = (torch.where(global_mask[:, None, :, None], x, 0.0) for x in (k_global, v_global))
    return in_one_piece(k_global), in_one_piece(v_global), in_one_piece(global_mask)


def rows_checked(kept: Sequence[torch.Tensor] | None, q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor] | None:
    """Lists as kernels take them. Under torch.compile nothing has looked at their rows, which index memory."""
    if kept is None:
        return None
    shapes = saved_shapes(q.shape[2], k.shape[2])
    for level, lists in enumerate(kept, start=1):
        rows, _ = shapes[f"kept_l{level}"]
        if lists.shape[2] != rows:
            raise ValueError(f"kept, level {level}: expected {rows} rows for M = {q.shape[2]}, got {lists.shape[2]}")
    return [in_one_piece(lists) for lists in kept]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None, global_mask: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, lse and what the backward pass needs, memory of the layout `saved`."""
    if torch.nn.functional.scaled_dot_product_attention is not DENSE_ATTENTION:  # here compiled programs come, too
        refuse_context_parallel(q, k)
    shared: GlobalTokens | None = None
    more: tuple[Any, ...] = ()
    if k_global is not None or kept is not None:
        shared = seen_by_all(k_global, v_global, global_mask)
        more = shared, rows_checked(kept, q, k)
    if q.numel() == 0 or k.numel() == 0:
        if q.numel() == 0 or shared is None:
            return without_keys(q, k)
        with without_autocast(q):
            return attend_torch(q, k, v, scale, shared, empty_selection(q, k))
    if not runs_kernels(q):
        with without_autocast():
            return attend_torch(q, k, v, scale, *more)
    with on_device_of(q):
        return attend_kernels(q, k, v, scale, *more)


def backward(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float, k_global: torch.Tensor | None = None,
    v_global: torch.Tensor | None = None, global_mask: torch.Tensor | None = None,
    kept: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq [B, H, M, D], dk and dv [B, H, N, D], from the gradient of o and, if it has one, that of lse.

    With global tokens also the gradients of their keys and values, [B, H, G, D].
    """
    shared: GlobalTokens | None = None
    of_none: tuple[torch.Tensor, ...] = ()
    more: tuple[Any, ...] = ()
    if k_global is not None or kept is not None:
        shared = seen_by_all(k_global, v_global, global_mask)
        more = shared, kept is not None
        if k_global is not None and shared is None:
            of_none = empty_like(k_global), empty_like(k_global)
    if grad_lse is not None:
        grad_lse = in_one_piece(grad_lse)
    if q.numel() == 0 or k.numel() == 0:
        if q.numel() == 0 or shared is None:
            return tuple(empty_like(x).zero_() for x in (q, k, v, *(shared or of_none)[:2]))
        with without_autocast(q):
            return grad_torch(grad_o, grad_lse, q, k, v, saved, scale, shared, empty_selection(q, k))
    saved = in_one_piece(saved)
    if not runs_kernels(q):
        with without_autocast():
            grads = grad_torch(grad_o, grad_lse, q, k, v, saved, scale, shared, kept)
    else:
        with on_device_of(q):
            grads = grad_kernels(grad_o, grad_lse, q, k, v, in_one_piece(o), saved, scale, *more)
    return (*grads, *of_none) if of_none else grads


def in_five(q: torch.Tensor, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Gradients as torch's operator has them, for which vmap wants a fixed number: without globals two of nothing."""
    return *grads, *[q.new_empty(0) for _ in range(5 - len(grads))]


def five_gradients(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """`backward` for torch's operator."""
    return in_five(inputs[2], backward(*inputs))


def select_forward(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """The kept key tokens of each level, finest first, [B, H, T_l(M), width] each."""
    if torch.nn.functional.scaled_dot_product_attention is not DENSE_ATTENTION:
        refuse_context_parallel(q, k)
    if q.numel() == 0 or k.numel() == 0:
        return empty_selection(q, k)
    if not runs_kernels(q):
        with without_autocast():
            return select_torch(q, k)
    with on_device_of(q):
        return select_kernels(q, k)


def operator(suffix: str, function: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """What computes over these tensors: the function itself or, if anything watches, torch's operator of that name."""
    return function if is_plain(*tensors) else getattr(torch.ops.llsa, OPERATOR + suffix)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what `differentiate` reads."""
    q, k, v, ctx.scale = inputs[:4]
    o, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.more = None
    if len(inputs) == 4:
        ctx.save_for_backward(q, k, v, o, saved)
        return
    more = present(*inputs[4:])  # global keys and values, their mask, and the lists, each of which may be None
    if more:
        ctx.more = [x is not None for x in inputs[4:]]
    ctx.save_for_backward(q, k, v, o, saved, *more)


def present(*inputs: torch.Tensor | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """The tensors among what may be a tensor, a list of them, or None."""
    found: list[torch.Tensor] = []
    for x in inputs:
        if x is not None:
            found += [x] if isinstance(x, torch.Tensor) else x
    return found


def as_saved(given: Sequence[bool], tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What `save_for_backward` has kept beside the usual: global keys and values, their mask, the lists, or None."""
    left = iter(tensors)
    shared = [next(left) if there else None for there in given[:3]]
    return *shared, list(left) if given[3] else None


def differentiate(ctx: Any, grad_o: torch.Tensor | None, grad_lse: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
    """Gradients of the operator's inputs from those of o and lse; the selection is held fixed."""
    grads: Sequence[torch.Tensor | None] = (None,) * 5
    if grad_o is not None or grad_lse is not None:
        q, k, v, o, saved, *tensors = ctx.saved_tensors
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        inputs = grad_o, grad_lse, q, k, v, o, saved, ctx.scale
        if torch.is_grad_enabled() or is_transformed():
            run = Differentiate.apply
        elif is_legacy_batchedtensor(grad_o) or (grad_lse is not None and is_legacy_batchedtensor(grad_lse)):
            # by is_grads_batched
            run = getattr(torch.ops.llsa, OPERATOR + "_backward")
        else:
            run = operator("_backward", backward, grad_o, q)
        grads = run(*inputs) if ctx.more is None else run(*inputs, *as_saved(ctx.more, tensors))
    if ctx.more is None:
        return *grads[:3], None
    of_globals = grads[3:5] if ctx.more[0] else (None, None)
    needed = ctx.needs_input_grad  # torch's operator wants a list for a list, and nothing for what was left out
    of_kept = [None] * len(needed[7]) if len(needed) == 8 and isinstance(needed[7], list) else None
    return (*grads[:3], None, *of_globals, None, of_kept)[: len(needed)]


class Attend(torch.autograd.Function):
    """The operator without torch's dispatcher: o, lse and what is saved, of tensors that are plain."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        """`forward`. In torch 2.15 arguments with a default would be inputs, given or not, and want gradients."""
        return forward(*inputs)

    setup_context = staticmethod(save_for_backward)
    backward = staticmethod(differentiate)


# Without transforms: torch's own `apply` looks up the signature of `forward` at every call.
attend_eagerly = super(torch.autograd.Function, Attend).apply  # type: ignore[attr-defined]


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


LIBRARY = register() or globals().get("LIBRARY")  # which a reload of this module must not drop
