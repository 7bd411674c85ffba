"""What the first part of a generated module defines, as the runtime sees it: for type checkers, never imported."""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

OPERATOR: str
INTERPRETED: bool
DTYPES: tuple[torch.dtype, ...]
MAX_SCALE: float
MAX_TOKENS: int

HEAD_DIM: tl.constexpr
EMPTY: tl.constexpr

LEVELS: int
BLOCKS: tuple[int, ...]
SPANS: tuple[int, ...]
LISTED: tuple[int, ...]
ENRICHED: tuple[int, ...]
WEIGHTED: bool
LISTS_FILL: bool
LOOSE_IN_GLUON: bool
SCHEDULES: dict[str, dict[int, dict[int, dict[str, dict[str, Any]]]]]
LAYOUTS: dict[str, dict[str, Any]]
OPTIONS: dict[str, bool]
ROW_UNIT: tl.constexpr

Differentiate: type[torch.autograd.Function]


def work_out(at: Any, tiles: dict[str, dict[str, Any]]) -> None: ...
def level_tokens(n_tokens: int) -> Sequence[int]: ...
def saved_shapes(heads: int, n_tokens: int) -> dict[str, tuple[int, ...]]: ...
def flops(heads: int, n_tokens: int) -> tuple[int, int, int]: ...
def attend_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def grad_kernels(
    grad_o: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    o: torch.Tensor, saved: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]: ...  # fmt: skip
def select_kernels(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]: ...
