#!/usr/bin/env bash
# triton 3.9.0: a comment above a kernel makes Triton compile it again, though its source is the same to the letter.
#
# The key of a compiled kernel holds the number of the line on which the kernel begins, beside its text and that of the
# functions it calls. So a line that is put at the head of a file misses the cache for every kernel below it, and a cache
# of compiles that is kept between runs, for CI say, has to be keyed by something else: by `JITFunction.src`, and that of
# what it calls, with signature, constants and options.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q triton==3.9.0 numpy
cat > "$dir/kernel.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, n):
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)
PY
{ echo "# a comment"; cat "$dir/kernel.py"; } > "$dir/moved.py"
cat > "$dir/try.py" <<'PY'
from pathlib import Path

import kernel
import moved
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for module in (kernel, moved):
    source = ASTSource(module.copy, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print("source is the same:", kernel.copy.src == moved.copy.src)
print("key is the same:", kernel.copy.cache_key == moved.copy.cache_key)
print("binaries in the cache:", len(list(Path("cache").rglob("*.cubin"))))
PY
(cd "$dir" && TRITON_CACHE_DIR=cache PYTHONWARNINGS=ignore env/bin/python try.py > found 2> /dev/null)
diff "$dir/found" - <<'TXT'
source is the same: True
key is the same: False
binaries in the cache: 2
TXT
echo "triton 3.9.0: as described"
