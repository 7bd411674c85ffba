"""Rows as an H100 would give them, for tests of what is made of rows: no GPU, nothing measured."""

from typing import Any

from llsa_gen import Level, Spec
from llsa_gen.bench.rows import Ceilings, KernelRow, Machine, Memory, Row, Timing

MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    driver="580.159.04",
    llsa_gen="0.1.0",
    torch="2.11.0+cu130",
    triton="3.6.0",
    python="3.12.3",
    commit="7cdd7579ba" * 4,
    dirty=False,
)

SPECS = {
    levels: Spec(name=f"llsa_l{levels}", head_dim=64, levels=(Level(block=16, topk=8),) * levels) for levels in (2, 3)
}

CEILINGS = Ceilings(bytes_per_s=3.0e12, flops_per_s=744e12)


def timing(ms: float) -> Timing:
    return Timing(median_ms=ms, p20_ms=0.98 * ms, p80_ms=1.03 * ms, repeats=max(3, min(1000, int(500 / ms))))


def row(n: int, forward: float | None, both: float | None, **fields: Any) -> Row:
    """A row of ours unless the fields say otherwise; times in milliseconds."""
    spec = fields.pop("spec", SPECS[2])
    tensors = 8 * 8 * n * 64 * 2
    given: dict[str, Any] = {
        "date": "2026-11-23T20:00:00+00:00", "machine": MACHINE, "spec": spec.canonical(), "digest": spec.digest,
        "implementation": "llsa_gen", "kind": "ours", "n_tokens": n, "batch": 2, "heads": 4, "head_dim": 64,
        "dtype": "bfloat16", "mode": "graph", "error": 0.3, "host_us": 140.0,
        "forward": forward and timing(forward), "forward_backward": both and timing(both),
        "memory": Memory(peak_bytes=tensors * 5 // 4, tensors_bytes=tensors, ratio=1.25),
    }  # fmt: skip
    return Row(**(given | fields))


def kernels() -> tuple[KernelRow, ...]:
    return (
        KernelRow(kernel="attend_kernel", launches=1, us=543.0, share=0.75, flops=69 * 10**9, moved_bytes=285 * 2**20,
                  roofline=0.18),
        KernelRow(kernel="void at::native::fill", launches=2, us=181.0, share=0.25, flops=None, moved_bytes=None,
                  roofline=None),
    )  # fmt: skip


def h100() -> tuple[Row, ...]:
    """What the performance notebook says, roughly, at four lengths."""
    rows = []
    for n, ours, dense in (
        (4096, (0.054, 0.204), ((0.120, 0.46), (0.079, 0.28))),
        (16384, (0.154, 0.554), ((1.78, 6.5), (1.11, 4.05))),
        (65536, (0.680, 2.354), ((28.0, 102.0), (19.6, 67.0))),
        (262144, (4.9, 16.8), ((454.0, None), (302.0, None))),
    ):
        rows.append(row(n, *ours, breakdown=kernels(), ceilings=CEILINGS))
        for name, times in zip(("sdpa-flash", "sdpa-cudnn"), dense, strict=True):
            missing = {} if times[1] else {"forward_backward": "backward raised OutOfMemoryError: no memory"}
            rows.append(row(n, *times, implementation=name, kind="dense", missing=missing))
    rows.append(row(262144, 2.66, 10.5, spec=SPECS[3]))
    rows.append(row(1048576, 10.9, 44.0, spec=SPECS[3]))
    rows.append(row(65536, 0.99, 5.96, implementation="sla:attend", kind="other"))
    rows.append(row(262144, 7.2, 44.0, implementation="sla:attend", kind="other"))
    return tuple(rows)
