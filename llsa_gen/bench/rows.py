"""Rows: what a bench stores of one implementation at one length, dtype and mode, and how it is read back.

A row can be read alone: it says what was measured, on what, with what versions, and when. Nothing here measures, and
nothing needs torch, so that stored rows can be looked at anywhere.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llsa_gen.errors import LlsaGenError, short

__all__ = [
    "Ceilings",
    "KernelRow",
    "Kind",
    "Machine",
    "Memory",
    "Mode",
    "Row",
    "Timing",
    "dumps",
    "label",
    "read",
    "shape",
    "tflops",
]

Kind = Literal["ours", "dense", "other"]
"""`ours`: the compiled spec; `dense`: a backend of torch's attention; `other`: a callable given with --against or
--along."""

Mode = Literal["eager", "graph"]
"""`eager`: called from Python every time; `graph`: captured in a CUDA graph once and replayed."""


BOTH_PASSES = 3.5
"""Forward passes that a forward and a backward pass count as: two products of rows forward, five backward."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timing(_Record):
    """Milliseconds of one call: median, 20th and 80th percentile of `repeats` calls after warm-up."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


class Memory(_Record):
    """Bytes at the peak of one forward and backward pass.

    `peak_bytes` is what the allocator handed out at most beyond what it had before the call, plus q, k, v and the
    gradient of o, which were there; `tensors_bytes` is q, k, v, o and their four gradients; `ratio` is the one over
    the other.
    """

    peak_bytes: int
    tensors_bytes: int
    ratio: float


class Ceilings(_Record):
    """What this GPU reached in this run: a device-to-device copy, read and written bytes both counted, and a matrix
    product in the dtype of the row."""

    bytes_per_s: float
    flops_per_s: float


class KernelRow(_Record):
    """One kernel of a forward and backward pass: microseconds of all its launches in one pass, and its part of all.

    `flops` and `moved_bytes` are those of `llsa_gen.plan.cost`, over all launches; None for a kernel that is not of the
    plan: one of torch's, or what only looks for leftovers. `roofline` is the least time that they take at the ceilings
    over the time taken.
    """

    kernel: str
    launches: float
    us: float
    share: float
    flops: int | None
    moved_bytes: int | None
    roofline: float | None


class Machine(_Record):
    """Where and with what a row was measured. `commit` and `dirty` are None unless llsa_gen runs from a checkout."""

    device: str
    """Name of the GPU or the CPU."""
    driver: str | None
    llsa_gen: str
    torch: str
    triton: str
    python: str
    commit: str | None
    dirty: bool | None
    """Whether the package or its templates differ from that commit."""


class Row(_Record):
    """One implementation at one length, dtype and mode.

    What could not be measured is None, and `missing` says why, by field.
    """

    date: str
    """Begin of the run: UTC, ISO 8601."""
    machine: Machine
    spec: str
    """The canonical spec, as JSON."""
    digest: str
    implementation: str
    kind: Kind
    n_tokens: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    mode: Mode
    m_tokens: int | None = None
    """Queries, where they are not as many as keys."""
    keys: int | None = None
    """The most keys that a query attends to, coarse ones too; None where nobody here knows."""
    missing: dict[str, str] = {}
    error: float | None = None
    """Largest error of what was compared with the float64 reference, as a fraction of what is allowed."""
    forward: Timing | None = None
    forward_backward: Timing | None = None
    host_us: float | None = None
    """Wall-clock time to issue one forward and backward pass without waiting for it, in microseconds; median."""
    memory: Memory | None = None
    breakdown: tuple[KernelRow, ...] | None = None
    ceilings: Ceilings | None = None
    """Those that the breakdown refers to."""


_ROWS = TypeAdapter(tuple[Row, ...])


def shape(row: Row) -> str:
    """What the tensors of a row have in common, whatever the number of keys."""
    queries = "" if row.m_tokens is None else f", M={row.m_tokens:,}"
    return f"B={row.batch}, H={row.heads}, D={row.head_dim}{queries}, {row.dtype}"


def label(row: Row) -> str:
    """What people call it: ours by the name of the spec, for rows of several specs stand side by side."""
    return json.loads(row.spec)["name"] if row.kind == "ours" else row.implementation


def tflops(row: Row, what: Literal["forward", "forward_backward"]) -> float | None:
    """TFLOP/s of attended keys: 4 M keys D B H FLOPs forward, 3.5 times as many with backward, over the median.

    Whatever else a call does, pooling, selecting, working logits out again, takes time and counts for nothing. None
    where time or keys are not known.
    """
    timing: Timing | None = getattr(row, what)
    if timing is None or row.keys is None:
        return None
    queries = row.n_tokens if row.m_tokens is None else row.m_tokens
    flops = 4 * row.batch * row.heads * queries * row.keys * row.head_dim
    return flops * (1 if what == "forward" else BOTH_PASSES) / timing.median_ms / 1e9


def dumps(rows: Sequence[Row]) -> str:
    """The rows as JSON text: a list, one object a row."""
    return json.dumps([row.model_dump(mode="json") for row in rows], indent=1) + "\n"


def read(paths: Sequence[Path]) -> tuple[Row, ...]:
    """The rows of some files, in order. Raises LlsaGenError for a file that is not as `dumps` writes it."""
    rows: list[Row] = []
    for path in paths:
        try:
            rows += _ROWS.validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = short(".".join(map(str, first["loc"])))
            raise LlsaGenError(
                f"{path}: expected rows as `llsa-gen bench --json` writes them, got "
                f"{f'row {where}: ' if where else ''}{short(first['msg'], 200)}"
            ) from None
    return tuple(rows)
