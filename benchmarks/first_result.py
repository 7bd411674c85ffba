"""How long the first result of a new spec takes, cold and warm: CPU seconds of a fresh process, torch's import aside.

    .venv/bin/python benchmarks/first_result.py [SPEC]

Cold is a compile, forward and backward; warm is forward alone, with the module in the store. The aims are 40 s and 2 s.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import sys, time
import torch
start = time.process_time()
import llsa_gen
attention = llsa_gen.compile(sys.argv[1])
grad = sys.argv[2] == "cold"
q, k, v = torch.randn(3, 1, 2, 1000, attention.spec.head_dim).requires_grad_(grad).unbind(0)
o = attention(q, k, v)
if grad:
    o.sum().backward()
print(f"{sys.argv[2]}: {time.process_time() - start:.2f} s", flush=True)
"""


def main() -> int:
    spec = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "spec" / "llsa_l3.yaml")
    with tempfile.TemporaryDirectory() as store:
        variables = os.environ | {"LLSA_GEN_CACHE_DIR": store}
        for state in ("cold", "warm", "warm", "warm"):
            subprocess.run([sys.executable, "-c", PROGRAM, spec, state], env=variables, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
