"""The reference: attention as one dense float64 softmax, selection by value. It shares nothing with the rest."""

from llsa_gen.reference.dense import attention, attention_rows, dense_in_dtype, relative_error, tolerance, weight_rows
from llsa_gen.reference.joint import joint_attention
from llsa_gen.reference.merging import merge
from llsa_gen.reference.selection import (
    candidates,
    check_selection,
    covered_tokens,
    kept_width,
    num_tokens,
    pool,
    select,
)

__all__ = [
    "attention",
    "attention_rows",
    "candidates",
    "check_selection",
    "covered_tokens",
    "dense_in_dtype",
    "joint_attention",
    "kept_width",
    "merge",
    "num_tokens",
    "pool",
    "relative_error",
    "select",
    "tolerance",
    "weight_rows",
]
