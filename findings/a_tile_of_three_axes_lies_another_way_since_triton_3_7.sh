#!/usr/bin/env bash
# triton 3.6.0 and 3.7.1: the same load of a tile of three axes gets another layout, and so a reduction gets other code.
#
# Where only the last axis of a tile is contiguous, the other two tie. 3.6.0 (and 3.5.1) lays threads and warps along axis 0
# before axis 1, order [2, 0, 1]; 3.7.0 and later lay them along axis 1 first, order [2, 1, 0]. That is on purpose, see
# triton-lang/triton#7143, which #8920 had taken back for 3.6. But with it, 4 warps take a maximum over axis 1 of
# [8, 16, 128] across lanes and warps, through shared memory and barriers, that 3.6.0 takes within threads (what barriers it
# has are for the row numbers and the result). Nothing in the kernel says so, and a choice between two ways to write it that
# was measured with one version need not hold for the other. Rows from a table and rows at a stride are alike in this.
#
# What helps is a shape that leaves no choice: load the rows along one axis, [128, 128], and reshape. Then both versions lay
# the tile as 3.7.1 does (`flat`). For a reduction within threads its axis has to come first as well (`turned`).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q numpy
for version in 3.6.0 3.7.1; do
    "$dir/env/bin/pip" install -q --no-deps --target "$dir/$version" "triton==$version"
done
cat > "$dir/try.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def gathered(x_ptr, row_ptr, y_ptr, stride, N: tl.constexpr):
    n = tl.arange(0, N)
    row = tl.load(row_ptr + n[:, None] * 16 + tl.arange(0, 16)[None, :])
    x = tl.load(x_ptr + row[:, :, None] * stride + tl.arange(0, 128)[None, None, :])
    tl.store(y_ptr + n, tl.max(tl.sum(x.to(tl.float32), 2), 1))


@triton.jit
def strided(x_ptr, row_ptr, y_ptr, stride, N: tl.constexpr):
    n = tl.arange(0, N)
    row = n[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row[:, :, None] * stride + tl.arange(0, 128)[None, None, :])
    tl.store(y_ptr + n, tl.max(tl.sum(x.to(tl.float32), 2), 1))


@triton.jit
def flat(x_ptr, row_ptr, y_ptr, stride, N: tl.constexpr):
    row = tl.load(row_ptr + tl.arange(0, N * 16))
    x = tl.load(x_ptr + row[:, None] * stride + tl.arange(0, 128)[None, :])
    x = tl.reshape(x, [N, 16, 128])
    tl.store(y_ptr + tl.arange(0, N), tl.max(tl.sum(x.to(tl.float32), 2), 1))


@triton.jit
def turned(x_ptr, row_ptr, y_ptr, stride, N: tl.constexpr):
    at = tl.arange(0, 16 * N)
    row = tl.load(row_ptr + at % N * 16 + at // N)
    x = tl.load(x_ptr + row[:, None] * stride + tl.arange(0, 128)[None, :])
    x = tl.reshape(x, [16, N, 128])
    tl.store(y_ptr + tl.arange(0, N), tl.max(tl.sum(x.to(tl.float32), 2), 0))


print(f"triton {triton.__version__}: sizePerThread, threadsPerWarp, warpsPerCTA, order")
signature = {"x_ptr": "*bf16", "row_ptr": "*i32", "y_ptr": "*fp32", "stride": "i32", "N": "constexpr"}
by_16 = {(i,): [["tt.divisibility", 16]] for i in range(4)}
for kernel, n in ((gathered, 4), (gathered, 8), (strided, 8), (flat, 8), (turned, 8)):
    source = ASTSource(kernel, signature, {"N": n}, by_16)
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
    # The tile as it is loaded and as it is reduced: one layout, without a conversion between.
    [(shape, name)] = set(re.findall(r"tensor<(\d+x\d+x128)x(?:!tt\.ptr<)?bf16>?, (#\w+)>", asm["ttgir"]))
    layout = re.search(rf"^{name} = #ttg\.blocked<{{(.*)}}>", asm["ttgir"], re.M)[1]
    numbers = ", ".join(re.findall(r"\[.*?\]", layout))
    barriers, shuffles = (len(re.findall(rf"\b{op}\b", asm["ptx"])) for op in (r"bar\.sync", r"shfl\.sync"))
    print(f"  {kernel.__name__} {shape}: {numbers}; barriers: {barriers}, shuffles: {shuffles}")
PY
for version in 3.6.0 3.7.1; do
    TRITON_CACHE_DIR="$dir/cache" PYTHONPATH="$dir/$version" "$dir/env/bin/python" "$dir/try.py"
done > "$dir/found"
diff "$dir/found" - <<'TXT'
triton 3.6.0: sizePerThread, threadsPerWarp, warpsPerCTA, order
  gathered 4x16x128: [1, 1, 8], [2, 1, 16], [2, 2, 1], [2, 0, 1]; barriers: 4, shuffles: 33
  gathered 8x16x128: [1, 1, 8], [2, 1, 16], [4, 1, 1], [2, 0, 1]; barriers: 2, shuffles: 64
  strided 8x16x128: [1, 1, 8], [2, 1, 16], [4, 1, 1], [2, 0, 1]; barriers: 1, shuffles: 64
  flat 8x16x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 6, shuffles: 74
  turned 16x8x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 3, shuffles: 64
triton 3.7.1: sizePerThread, threadsPerWarp, warpsPerCTA, order
  gathered 4x16x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 4, shuffles: 38
  gathered 8x16x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 6, shuffles: 74
  strided 8x16x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 4, shuffles: 74
  flat 8x16x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 6, shuffles: 74
  turned 16x8x128: [1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0]; barriers: 3, shuffles: 64
TXT
echo "triton 3.6.0 and 3.7.1: as described"
