#!/usr/bin/env bash
# triton 3.6.0: inside a kernel, `pair is not None` is an error for a named tuple that has a None in it.
#
# Optional pointers are passed as None, and a kernel that asks `pointer is not None` is compiled without what it does not
# need. The same question about a tuple of such pointers compiles as long as none of them is None. If one is, Triton 3.6
# raises "'NoneType' object has no attribute 'type'"; 3.7.1 compiles it. So a text that is to run with both hands over
# the pointers one by one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/try.py" <<'PY'
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Keys(NamedTuple):
    ptr: tl.tensor
    mask_ptr: tl.tensor


@triton.jit
def load(keys):
    value = tl.load(keys.ptr)
    if keys is not None:
        value += 1.0
    return value


@triton.jit
def kernel(x_ptr, mask_ptr, y_ptr):
    tl.store(y_ptr, load(Keys(x_ptr, mask_ptr)))


for kind, constants in (("*fp32", {}), ("constexpr", {(1,): None})):
    source = ASTSource(kernel, {"x_ptr": "*fp32", "mask_ptr": kind, "y_ptr": "*fp32"}, constants)
    given = "None" if constants else "a pointer"
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(triton.__version__, given, "compiles")
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(triton.__version__, given, str(error).splitlines()[-1].strip())
PY
for version in 3.6.0 3.7.1; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q triton==$version numpy
    (cd "$dir" && TRITON_CACHE_DIR="cache-$version" "$version/bin/python" try.py 2> /dev/null) >> "$dir/found"
done
cat > "$dir/seen" <<'EOF'
3.6.0 a pointer compiles
3.6.0 None AttributeError("'NoneType' object has no attribute 'type'")
3.7.1 a pointer compiles
3.7.1 None compiles
EOF
diff "$dir/seen" "$dir/found"
echo "triton 3.6.0 and 3.7.1: as described"
