#!/usr/bin/env bash
# triton 3.9.0, interpreter: a mask made of a vector and a scalar comparison is refused; up to 3.8.0 it was taken.
#
# `ok & (n > 3)`, with `ok` a vector of int1 and `n` an argument, still has the type int1 as far as the kernel can see, and
# compiles for GPUs in every version. In the interpreter of 3.9.0 tl.store and tl.load raise "mask has unsupported dtype".
# tl.where(n > 3, ok, False) is taken by all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
for version in 3.8.0 3.9.0; do
    "$dir/env/bin/pip" install -q --no-deps --target "$dir/$version" "triton==$version"
done
cat > "$dir/try.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def combined(x, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, 1.0, mask=(i < 2) & (n > 3))


@triton.jit
def chosen(x, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, 1.0, mask=tl.where(n > 3, i < 2, False))


for kernel in (combined, chosen):
    x = torch.zeros(4)
    try:
        kernel[(1,)](x, 4, N=4)
        print(triton.__version__, kernel.fn.__name__, x.tolist())
    except Exception as error:
        print(triton.__version__, kernel.fn.__name__, "mask has unsupported dtype" in str(error))
PY
for version in 3.8.0 3.9.0; do
    TRITON_INTERPRET=1 PYTHONPATH="$dir/$version" "$dir/env/bin/python" "$dir/try.py"
done > "$dir/found"
diff "$dir/found" - <<'TXT'
3.8.0 combined [1.0, 1.0, 0.0, 0.0]
3.8.0 chosen [1.0, 1.0, 0.0, 0.0]
3.9.0 combined True
3.9.0 chosen [1.0, 1.0, 0.0, 0.0]
TXT
echo "triton 3.8.0 and 3.9.0: as described"
