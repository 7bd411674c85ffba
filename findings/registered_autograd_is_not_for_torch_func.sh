#!/usr/bin/env bash
# torch 2.13.0: an operator whose gradient is registered with torch.library.register_autograd has none for torch.func.
#
# Autograd, torch.compile and torch.export differentiate it. torch.func.grad raises, and its message speaks of an
# autograd.Function and of `setup_context`, though `setup_context` was given to register_autograd. A Function with
# `setup_context` around the same operator is differentiated by both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/try.py" <<'PY'
import torch


@torch.library.custom_op("mine::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def setup_context(ctx, inputs, output):
    pass


def backward(ctx, grad):
    return grad * 2


double.register_fake(torch.empty_like)
double.register_autograd(backward, setup_context=setup_context)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return torch.ops.mine.double(x)

    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward)


x = torch.ones(3, requires_grad=True)
print("autograd, operator:", torch.autograd.grad(torch.ops.mine.double(x).sum(), x)[0].tolist())
try:
    torch.func.grad(lambda x: torch.ops.mine.double(x).sum())(torch.ones(3))
except RuntimeError as error:
    print("torch.func, operator:", "must override the setup_context staticmethod" in str(error))
print("torch.func, Function:", torch.func.grad(lambda x: Double.apply(x).sum())(torch.ones(3)).tolist())
PY
"$dir/env/bin/python" "$dir/try.py" > "$dir/found"
diff "$dir/found" - <<'TXT'
autograd, operator: [2.0, 2.0, 2.0]
torch.func, operator: True
torch.func, Function: [2.0, 2.0, 2.0]
TXT
echo "torch 2.13.0: as described"
