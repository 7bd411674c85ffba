#!/usr/bin/env bash
# torch 2.13.0: the `vmap` rule of an autograd.Function is for torch.func alone; is_grads_batched=True does not ask it.
#
# A backward pass that is itself a Function with a `vmap` rule is batched by that rule under torch.func.vmap. Under
# torch.autograd.grad(..., is_grads_batched=True), and so under torch.autograd.functional.jacobian(vectorize=True), an older
# vmap is at work: `forward` gets tensors that look plain (their type is torch.Tensor, no transform is active) and whose
# memory cannot be read. Who hands data pointers to kernels has to ask torch._C._functorch.is_legacy_batchedtensor.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/try.py" <<'PY'
import torch
from torch._C._functorch import is_legacy_batchedtensor

seen = []


class Twice(torch.autograd.Function):
    """The backward pass of Double."""

    @staticmethod
    def forward(grad):
        plain = type(grad) is torch.Tensor and not torch._C._are_functorch_transforms_active()
        seen.append(f"forward, looks plain: {plain}, legacy batch: {is_legacy_batchedtensor(grad)}")
        return grad * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, dims, grad):
        seen.append("vmap rule")
        return Twice.apply(grad), dims[0]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return Twice.apply(grad)


x = torch.ones(3, requires_grad=True)
torch.autograd.grad(Double.apply(x), x, torch.ones(4, 3), is_grads_batched=True)
print("is_grads_batched:", *seen, sep="\n  ")
seen.clear()
_, pull = torch.func.vjp(Double.apply, torch.ones(3))
torch.func.vmap(pull)(torch.ones(4, 3))
print("torch.func.vmap:", *seen, sep="\n  ")
PY
"$dir/env/bin/python" "$dir/try.py" > "$dir/found"
diff "$dir/found" - <<'TXT'
is_grads_batched:
  forward, looks plain: True, legacy batch: True
torch.func.vmap:
  vmap rule
  forward, looks plain: True, legacy batch: False
TXT
echo "torch 2.13.0: as described"
