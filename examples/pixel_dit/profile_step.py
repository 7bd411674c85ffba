"""Where the time of a step goes: steps with several attentions, replayed in turns, and their kernels by kind.

    python examples/pixel_dit/profile_step.py --size 256 --batch 1 --attentions dense llsa_l2 none --out profile.json

All of them are prepared in one process and take turns, so that a GPU that is slower for a while is so for all. Without
attention ("none"), queries and keys are made, normed and rotated all the same, and added up. What a step takes more
than that one is what its attention adds; its own kernels are those of the compiled spec.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

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
TURNS, TURN_MS, PROFILED_STEPS = 10, 400.0, 3

Step = Callable[[], object]
Kernels = dict[str, tuple[float, float]]
"""(ms, launches) of every kernel in one step, by name."""


def kind_of(kernel: str) -> str:
    """The first kind that a kernel's name fits, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), "other")


def ready(wanted: Settings) -> Step:
    """A step that is compiled and, if settings say so, recorded."""
    _, step = prepared(wanted)
    for _ in range(WARM_UPS + 1):
        step()
    return step


def in_turns(steps: Mapping[str, Step]) -> dict[str, list[float]]:
    """Milliseconds of a step, a number a turn. A turn takes as many steps as make up its time, at least one."""
    counts = {name: max(1, int(TURN_MS / timed(step, 1))) for name, step in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            found[name].append(timed(step, counts[name]))
    return found


def timed(step: Step, count: int) -> float:
    """Milliseconds of one of so many steps in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def kernels_of(step: Step) -> Kernels:
    """What a step runs on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / 1e3 / PROFILED_STEPS, event.count / PROFILED_STEPS)
        for event in seen.key_averages()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    }


def by_kind(found: Kernels) -> dict[str, float]:
    """Milliseconds of each kind, and of all."""
    sums = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, (ms, _) in found.items():
        sums[kind_of(name)] += ms
    return {**sums, "all kernels": sum(sums.values())}


def shown(turns: Mapping[str, list[float]], kinds: Mapping[str, dict[str, float]]) -> str:
    """A column an attention: ms of its kernels by kind, and of a step; then what each adds to a step without any."""
    steps = {name: statistics.median(of) for name, of in turns.items()}
    lines = [[kind, *(f"{of[kind]:.2f}" for of in kinds.values())] for kind in next(iter(kinds.values()))]
    lines.append(["a step", *(f"{ms:.2f}" for ms in steps.values())])
    if "dense" in steps:
        lines.append(["× dense", *(f"{steps['dense'] / ms:.2f}" for ms in steps.values())])
    said = [rows.table(["ms a step", *steps], lines)]
    for name, ms in steps.items():
        own = kinds[name]["attention"]
        if own and "none" in steps:
            more = ms - steps["none"]
            said.append(f"{name} adds {more:.2f} ms, {more / own:.2f} times its own kernels, {own:.2f} ms")
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps in turns, and say where their time goes.")
    parser.add_argument("--attentions", nargs="+", default=["dense", "llsa_l2", "none"], metavar="A")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="print so many kernels of each step")
    parser.add_argument("--out", type=Path, default=Path("profile.json"))
    settings.add_flags(parser, varied=("attention",))
    options = parser.parse_args()
    wanted = settings.from_flags(options).model_dump()
    chosen = [settings.checked(wanted | {"attention": one}) for one in options.attentions]
    names = [attention.name_of(one.attention) for one in chosen]
    if len({*names}) < len(names):
        sys.exit(f"--attentions: expected names that differ, got {', '.join(names)}")
    if not torch.cuda.is_available():
        sys.exit("profile_step.py: expected a GPU, whose kernels are what is profiled, got none")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or else what is one model too many runs as it is
    steps = {name: ready(one) for name, one in zip(names, chosen, strict=True)}
    turns = in_turns(steps)
    kernels = {name: kernels_of(step) for name, step in steps.items()}
    for name, found in kernels.items() if options.top else ():
        lines = sorted(found.items(), key=lambda item: -item[1][0])[: options.top]
        print(f"\n{name}")
        print(rows.table(["kernel", "kind", "ms", "launches"], [
            [kernel[:90], kind_of(kernel), f"{ms:.3f}", f"{launches:.0f}"] for kernel, (ms, launches) in lines
        ]))  # fmt: skip
    kinds = {name: by_kind(found) for name, found in kernels.items()}
    print("\n" + shown(turns, kinds))
    row = {**rows.stamp("cuda"), "settings": chosen[0].model_dump(mode="json", exclude={"attention"})}
    rows.add(options.out, [row | {"step_ms": turns, "kernels": kernels, "kinds_ms": kinds}])


if __name__ == "__main__":
    main()
