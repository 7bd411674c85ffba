"""Where the time of a compiled step goes: kernels by kind, and what attention adds beside its own kernels.

    python examples/pixel_dit/profile_step.py --size 256 --batch 1 --attention llsa_l2 --out profile.json

The same step is profiled with attention and without ("none": queries and keys are made, normed and rotated all the
same, and added up). What the two differ by is what attention adds; its own kernels are those of the compiled spec.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import attention
import rows
import settings
import torch
from graphs import WARM_UPS
from settings import Settings
from throughput import prepared
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": re.compile(
        r"^_?(pool|select|keep|attend|scan|invert|grad_q|grad_kv|best|walk)\w*kernel|flash|fmha|cudnn.*(sdpa|attn)"
    ),
    "products": re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitK|ampere_|sm90_|triton_tem", re.IGNORECASE),
    "fused by inductor": re.compile(r"^triton_"),
    "optimiser": re.compile(r"multi_tensor|adam|foreach|lpnorm", re.IGNORECASE),
    "copies": re.compile(r"mem(cpy|set)|copy", re.IGNORECASE),
}
TIMED_STEPS, PROFILED_STEPS = 20, 3


def kind_of(kernel: str) -> str:
    """The first kind that a kernel's name fits, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), "other")


def profiled(wanted: Settings) -> tuple[float, dict[str, tuple[float, float]]]:
    """Milliseconds of a step without the profiler; (ms, launches) of every kernel in one step, by name."""
    torch.compiler.reset()
    _, step = prepared(wanted)
    for _ in range(WARM_UPS + 1):
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TIMED_STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / TIMED_STEPS, {
        event.key: (event.self_device_time_total / 1e3 / PROFILED_STEPS, event.count / PROFILED_STEPS)
        for event in seen.key_averages()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    }


def by_kind(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Milliseconds of each kind, and of all."""
    sums = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, (ms, _) in found.items():
        sums[kind_of(name)] += ms
    return {**sums, "all kernels": sum(sums.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Profile one compiled step with attention and without.")
    parser.add_argument("--top", type=int, default=25, help="kernels to print")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    settings.add_flags(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profile_step.py: expected a GPU, whose kernels are what is profiled, got none")
    wanted = settings.from_flags(options)
    kept: dict[str, dict[str, tuple[float, float]]] = {}
    steps: dict[str, float] = {}
    for one in (wanted.attention, "none"):
        chosen = wanted.model_copy(update={"attention": one})
        name = attention.name_of(one)
        steps[name], kept[name] = profiled(chosen)
        lines = sorted(kept[name].items(), key=lambda item: -item[1][0])[: options.top]
        print(f"\n{name}: {steps[name]:.2f} ms a step")
        print(rows.table(["kernel", "kind", "ms", "launches"], [
            [kernel[:90], kind_of(kernel), f"{ms:.3f}", f"{launches:.0f}"] for kernel, (ms, launches) in lines
        ]))  # fmt: skip
    (name, found), (_, without) = kept.items()
    a, b = by_kind(found), by_kind(without)
    lines = [[kind, f"{a[kind]:.2f}", f"{b[kind]:.2f}", f"{a[kind] - b[kind]:.2f}"] for kind in a]
    lines.append(["a step", *(f"{x:.2f}" for x in (steps[name], steps["none"], steps[name] - steps["none"]))])
    print("\n" + rows.table(["ms a step", name, "none", "difference"], lines))
    own = a.get("attention", 0.0)
    if own:
        print(f"\nattention adds {steps[name] - steps['none']:.2f} ms to a step of {steps[name]:.2f} ms, "
              f"{(steps[name] - steps['none']) / own:.2f} times its own kernels, {own:.2f} ms")  # fmt: skip
    row: dict[str, Any] = {**rows.stamp("cuda"), "settings": wanted.model_dump(mode="json"), "step_ms": steps}
    rows.add(options.out, [row | {"kernels": kept, "kinds": {name: a, "none": b}}])


if __name__ == "__main__":
    main()
