"""What the first part of a generated module defines, as the runtime sees it: for type checkers, never imported."""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl

SPEC: dict[str, Any]
OPERATOR: str
INTERPRETED: bool
DTYPES: tuple[torch.dtype, ...]
MAX_SCALE: float
MAX_TOKENS: int

HEAD_DIM: tl.constexpr
EMPTY: tl.constexpr

LEVELS: int
GIVEN_NAMES: tuple[str, ...]
GIVEN: tuple[int, ...]
BLOCKS: tuple[int, ...]
SPANS: tuple[int, ...]
LISTED: tuple[int, ...]
WIDTHS: tuple[int, ...]
SPLIT_KEYS: int
FILLING: int
ENRICHED: tuple[int, ...]
WEIGHTED: bool
LISTS_FILL: bool
PARTIAL_IN_GLUON: bool
SCHEDULES: dict[str, dict[int, dict[str, dict[str, Any]]]]
LAYOUTS: dict[str, dict[str, Any]]
OPTIONS: dict[str, bool]
ROW_UNIT: tl.constexpr

Differentiate: type[torch.autograd.Function]


def work_out(at: Any, tiles: dict[str, dict[str, Any]]) -> None: ...
def saved_shapes(m_tokens: int, n_tokens: int) -> dict[str, tuple[int, ...]]: ...
def flops(heads: int, kv_heads: int, m_tokens: int, n_tokens: int, g_tokens: int = 0) -> tuple[int, int, int, int]: ...
def forward_launches(
    at: Any, launch: Callable[..., None], scale: Any, *tensors: Any, stages: tuple[str, ...] = ...
) -> None: ...
def grad_launches(at: Any, launch: Callable[..., None], scale: Any, *tensors: Any) -> None: ...
