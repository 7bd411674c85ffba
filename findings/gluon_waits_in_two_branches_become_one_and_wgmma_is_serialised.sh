#!/usr/bin/env bash
# triton 3.7.1 and 3.9.0, Gluon, Hopper: two branches of an `if` that both end with a wait for their products share one
# wait after it, and ptxas then runs every wgmma of the kernel one by one.
#
# Both branches end with warpgroup_mma_wait(0, deps=[acc]), which is the same inline assembly, so LLVM keeps one, behind
# the branches (in the PTX: 3 waits for all in place of 4). The accumulators join there while they are still in flight, which
# ptxas takes for other instructions that define them: C7515. In SASS each HGMMA then has gsb0 and a WARPGROUP.DEPBAR
# behind it. ptxas says so, but Triton shows what it says only with TRITON_DUMP_PTXAS_LOG=1, as here. 3.6.0 does as 3.7.1.
#
# A function that is called in both branches is the usual way to get there, with equal constants or others. A result that
# is merged is not needed: the same store in both branches goes behind them with the wait. Loops are: products outside of
# loops are the same assembly in both branches as well and go the same way, and one copy is left, not serialised.
#
# What helps is any instruction behind one of the waits that the other branch lacks, an empty line of assembly for one
# (`marked`); or no branches: the loops in turn, of which one has no rounds (`in turn`).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q numpy
for version in 3.7.1 3.9.0; do
    "$dir/env/bin/pip" install -q --no-deps --target "$dir/$version" "triton==$version"
done
cat > "$dir/try.py" <<'PY'
import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper

PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
TILE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def add(acc, a, b, n, MARK: gl.constexpr):
    acc = hopper.warpgroup_mma_init(acc)
    for i in range(n):
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    if MARK:
        gl.inline_asm_elementwise("// mark", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    return acc


@gluon.jit
def kernel(x_ptr, y_ptr, n, swap, WAY: gl.constexpr):
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, TILE))[:, None]
    at = row * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, TILE))[None, :]
    a = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, gl.load(x_ptr + at))
    b = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, gl.load(x_ptr + 4096 + at))
    hopper.fence_async_shared()
    acc = gl.zeros([64, 64], gl.float32, layout=PRODUCT)
    if WAY == "once":
        acc = add(acc, a, b, n, False)
    elif WAY == "in turn":
        acc = add(acc, a, b, gl.where(swap > 0, 0, n), False)
        acc = add(acc, b, a, gl.where(swap > 0, n, 0), False)
    else:
        if swap > 0:
            acc = add(acc, b, a, n, False)
        else:
            acc = add(acc, a, b, n, WAY == "marked")
    gl.store(y_ptr + at, gl.convert_layout(acc.to(gl.bfloat16), TILE))


print(f"triton {triton.__version__}")
signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "swap": "i32", "WAY": "constexpr"}
by_16 = {(i,): [["tt.divisibility", 16]] for i in range(2)}
dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for way in ("once", "both branches", "marked", "in turn"):
    source = GluonASTSource(kernel, signature, {(4,): way}, by_16)
    with contextlib.redirect_stdout(io.StringIO()) as log:  # what ptxas says
        asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        sass = subprocess.run([dump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"HGMMA.*?;", sass)
    waited = sum("gsb0" in product for product in products)
    waits = asm["ptx"].count("wgmma.wait_group.sync.aligned 0;")
    said = ", ".join(re.findall(r"\(C\d+\)", log.getvalue())) or "nothing"
    print(f"  {way}: waits for all {waits}; HGMMA {len(products)}, with gsb0 {waited}; ptxas says {said}")
PY
for version in 3.7.1 3.9.0; do
    TRITON_DUMP_PTXAS_LOG=1 TRITON_CACHE_DIR="$dir/cache" PYTHONPATH="$dir/$version" \
        "$dir/env/bin/python" "$dir/try.py" 2> "$dir/err" || { cat "$dir/err" >&2; exit 1; }
done > "$dir/found"
diff "$dir/found" - <<'TXT'
triton 3.7.1
  once: waits for all 2; HGMMA 32, with gsb0 8; ptxas says nothing
  both branches: waits for all 3; HGMMA 68, with gsb0 68; ptxas says (C7515)
  marked: waits for all 4; HGMMA 64, with gsb0 16; ptxas says nothing
  in turn: waits for all 5; HGMMA 56, with gsb0 14; ptxas says nothing
triton 3.9.0
  once: waits for all 2; HGMMA 32, with gsb0 8; ptxas says nothing
  both branches: waits for all 3; HGMMA 36, with gsb0 36; ptxas says (C7515)
  marked: waits for all 4; HGMMA 64, with gsb0 16; ptxas says nothing
  in turn: waits for all 5; HGMMA 56, with gsb0 14; ptxas says nothing
TXT
echo "triton 3.7.1 and 3.9.0: as described"
