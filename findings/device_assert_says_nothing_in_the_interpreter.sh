#!/usr/bin/env bash
# triton 3.7.1 (3.6.0 and 3.9.0 alike): in the interpreter tl.device_assert does nothing, with TRITON_DEBUG=1 neither.
#
# Where kernels run as Python, one would expect an assertion to hold. But it is made only where the options say `debug`,
# which is False in those of the interpreter and set by nothing. The same options say `sanitize_overflow`, so that each
# sum, difference and product of integers is worked out in 64 bits as well, and compared: a dozen operations of Python,
# whose result goes to such an assertion. That took a third of the time of our kernels, and a sum that leaves its 32
# bits is still no error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy
cat > "$dir/try.py" <<'PY'
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr)
    tl.device_assert(x < 0, "x is not negative")
    tl.store(y_ptr, x + x)


x = torch.tensor([2**31 - 1], dtype=torch.int32)
y = torch.zeros_like(x)
kernel[(1,)](x, y)
options = interpreter.InterpreterOptions()
print("no error:", y.item(), "debug:", options.debug, "sanitize_overflow:", options.sanitize_overflow)
PY
for debug in 0 1; do
    TRITON_INTERPRET=1 TRITON_DEBUG=$debug "$dir/env/bin/python" "$dir/try.py" 2> /dev/null
done > "$dir/found"
diff "$dir/found" - <<'TXT'
no error: -2 debug: False sanitize_overflow: True
no error: -2 debug: False sanitize_overflow: True
TXT
echo "triton 3.7.1: as described"
