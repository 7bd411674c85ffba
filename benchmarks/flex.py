"""FlexAttention along the blocks that a spec keeps, for `llsa-gen bench SPEC --along benchmarks.flex:attend`.

    llsa-gen bench topk_b128 -n 65536 --along benchmarks.flex:attend

It is handed the blocks: what it is timed at is attention alone, where ours also pools and selects. On a GPU it is
compiled by torch.compile with the tile shapes that torch chooses. On a CPU, which works out the scores of all pairs,
it is for trying things out, and has no backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llsa_gen import Spec

SMALLEST = 128
"""Rows of the largest tile of its backward kernels on Hopper, for heads of 64 to 128. A block must be whole tiles."""


def attend(spec: Spec, kept: Tensor, m: int, n: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What attends to the blocks that `kept` names for each block of queries, int32 [B, H, T_1(M), K_1], -1 for none.

    Raises ValueError for blocks that FlexAttention has no kernels for.
    """
    size = spec.block(1)
    if size % SMALLEST:
        raise ValueError(f"FlexAttention's backward kernels need blocks of {SMALLEST} or a multiple of it, got {size}")
    mask = block_mask(kept.long(), size, m, n)
    torch.compiler.reset()  # or the fifth length would be one too many for torch.compile
    run = torch.compile(flex_attention, dynamic=False, fullgraph=True) if kept.is_cuda else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def block_mask(kept: Tensor, size: int, m: int, n: int) -> BlockMask:
    """All pairs of the blocks that are kept, and no other; each counts as full, so that no pair is looked at."""
    blocks = -(-n // size)
    table = torch.zeros(*kept.shape[:3], blocks + 1, dtype=torch.bool, device=kept.device)
    table.scatter_(-1, torch.where(kept < 0, blocks, kept), True)  # the extra column takes the -1s
    table = table[..., :blocks]
    full, order = table.sum(-1, dtype=torch.int32), table.int().argsort(dim=-1, descending=True, stable=True).int()

    def looked_up(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[b, h, query // size, key // size]

    return BlockMask.from_kv_blocks(
        torch.zeros_like(full),
        order,
        full,
        order,
        BLOCK_SIZE=size,
        mask_mod=None if kept.is_cuda else looked_up,  # without compiled kernels blocks are not looked at, but pairs
        seq_lengths=(m, n),
    )
