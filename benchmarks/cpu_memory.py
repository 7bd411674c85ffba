"""Peak memory of the CPU path above its inputs, forward and forward + backward, over the length of the sequence.

    python benchmarks/cpu_memory.py
    python benchmarks/cpu_memory.py --spec spec/llsa_l3.yaml --heads 4 --from 16384 --to 262144

Each row is a process of its own. It makes the inputs, runs once over 1,000 tokens, has the kernel forget the peak so
far, and runs: the peak of the resident memory (VmHWM) less what was resident before. The outputs count, the inputs do
not. Linux only. The exit code is 1 where a doubling of the length takes more than 2.2 times the memory.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import llsa_gen
from llsa_gen.compiler import Attention

MOST = 2.2
"""Times the memory that a doubling of the length may cost."""
SPEC = {"name": "l3", "head_dim": 16, "levels": [{"block": 16, "topk": 8}] * 3}
PASSES = ("forward", "forward + backward")


def resident(line: str) -> int:
    """Bytes in a line of this process's status: VmRSS, what is resident, or VmHWM, the most that has been."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def attend(attention: Attention, shape: tuple[int, ...], backward: bool) -> int:
    """Bytes at the peak above the inputs, [B, H, N, D] each."""
    q, k, v, grad_o = (torch.randn(shape) for _ in range(4))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    if backward:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = attention(*leaves)
        assert isinstance(o, torch.Tensor)
        gradients = torch.autograd.grad(o, leaves, grad_o)
        assert all(x.shape == q.shape for x in gradients)
    else:
        attention(q, k, v)
    return resident("VmHWM") - before


def measure(spec: str, heads: int, tokens: int, backward: bool) -> int:
    """What `attend` says in a process of its own."""
    command = [sys.executable, __file__, "--spec", spec, "--heads", str(heads), "--row", str(tokens)]
    done = subprocess.run([*command, *["--backward"] * backward], check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spec", default="", help="a spec file; three levels of 16, K = 8, heads of 16 unless given")
    parser.add_argument("--heads", type=int, default=1, help="heads, in one batch entry")
    parser.add_argument("--from", dest="first", type=int, default=65_536, help="the shortest sequence")
    parser.add_argument("--to", dest="last", type=int, default=1_048_576, help="the longest, by doublings")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)  # measure this length here, and print bytes
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()

    attention = llsa_gen.compile(chosen.spec or SPEC)
    head_dim = attention.spec.head_dim
    if chosen.row is not None:
        attend(attention, (1, chosen.heads, 1000, head_dim), chosen.backward)
        print(attend(attention, (1, chosen.heads, chosen.row, head_dim), chosen.backward))
        return 0

    print(f"{json.loads(attention.spec.canonical())}\n{chosen.heads} heads, float32, torch {torch.__version__}\n")
    print(f"{'tokens':>10}  {'q, k, v':>10}", *(f"{name:>20}  {'x':>4}" for name in PASSES), sep="  ")
    tokens, before, worst = chosen.first, [0, 0], 0.0
    while tokens <= chosen.last:
        row = [measure(chosen.spec, chosen.heads, tokens, backward) for backward in (False, True)]
        cells = [f"{tokens:>10,}", f"{3 * 4 * chosen.heads * tokens * head_dim / 1e6:>7.1f} MB"]
        for now, then in zip(row, before, strict=True):
            cells += [f"{now / 1e6:>17.1f} MB", f"{now / then:>4.2f}" if then else f"{'':>4}"]
            worst = max(worst, now / then if then else 0.0)
        print(*cells, sep="  ", flush=True)
        tokens, before = 2 * tokens, row
    print(f"\nThe most that a doubling takes: {worst:.2f} times, allowed {MOST}")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
