#!/usr/bin/env bash
# triton 3.9.0, Gluon: a process that has compiled a kernel with gl.reshape ends with a list of leaked objects.
#
# nanobind prints some 20 lines to stderr when Python has been taken apart; 3.8.0 prints nothing. The kernel compiles and the
# exit status is 0. A process that finds the kernel in Triton's cache prints nothing, nor does one that compiles a plain
# Triton kernel with tl.reshape.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q numpy
for version in 3.8.0 3.9.0; do
    "$dir/env/bin/pip" install -q --no-deps --target "$dir/$version" "triton==$version"
done
cat > "$dir/try.py" <<'PY'
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource


@gluon.jit
def kernel(x_ptr):
    i = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.reshape(gl.load(x_ptr + i), [8, 16])
    gl.store(x_ptr + gl.program_id(0), gl.sum(gl.sum(x, 1), 0))


source = GluonASTSource(kernel, {"x_ptr": "*fp32"}, {}, {})
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
print(triton.__version__, "compiled")
PY
for version in 3.8.0 3.9.0; do
    for time in first cached; do
        TRITON_CACHE_DIR="$dir/cache" PYTHONPATH="$dir/$version" "$dir/env/bin/python" "$dir/try.py" 2> "$dir/err"
        echo "$version $time: $(grep -c leaked "$dir/err" || true) lines"
    done
done | sed -E 's/: [1-9][0-9]* lines/: some lines/' > "$dir/found"
diff "$dir/found" - <<'TXT'
3.8.0 compiled
3.8.0 first: 0 lines
3.8.0 compiled
3.8.0 cached: 0 lines
3.9.0 compiled
3.9.0 first: some lines
3.9.0 compiled
3.9.0 cached: 0 lines
TXT
echo "triton 3.8.0 and 3.9.0: as described"
