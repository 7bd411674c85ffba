#!/usr/bin/env bash
# torch 2.13.0, autograd.Function: one that defines `setup_context` has its `forward` inspected at every call.
#
# The documentation recommends the form with a separate `setup_context`, which torch.func needs. `Function.apply` then calls
# inspect.signature(forward) and binds the arguments, each time, also where no transform is at work; the older form, with
# `ctx` in `forward`, does not. On one machine a call took three to four times as long: tens of microseconds, as much as
# several kernel launches. `super(torch.autograd.Function, F).apply` leaves that out, and the transforms with it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/try.py" <<'PY'
import inspect

import torch


class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Newer(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


calls = 0
signature = inspect.signature


def counted(*args, **kwargs):
    global calls
    calls += 1
    return signature(*args, **kwargs)


inspect.signature = counted
x = torch.ones(3, requires_grad=True)
ways = {"older": Older.apply, "newer": Newer.apply, "newer, past Function.apply": super(torch.autograd.Function, Newer).apply}
for name, apply in ways.items():
    calls = 0
    for _ in range(10):
        apply(x).sum().backward()
    print(f"{name}: {calls} signatures in 10 calls")
PY
"$dir/env/bin/python" "$dir/try.py" > "$dir/found"
diff "$dir/found" - <<'TXT'
older: 0 signatures in 10 calls
newer: 10 signatures in 10 calls
newer, past Function.apply: 0 signatures in 10 calls
TXT
echo "torch 2.13.0: as described"
