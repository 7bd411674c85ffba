#!/usr/bin/env bash
# diffusers 0.42.1: set_attention_backend of one model sets the attention of all other models of the process, for good.
#
# It writes the backend into the model's own layers, and makes it the active one of the process, which every layer takes
# that has none of its own: those of other models, made before or after. reset_attention_backend of that model clears its
# layers only; they and the others go on with the active one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 numpy
cat > "$dir/try.py" <<'PY'
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import flex_attention

calls = []
real = flex_attention.flex_attention


def counted(*args, **kwargs):
    calls.append(1)
    return real(*args, **kwargs)


flex_attention.flex_attention = counted


def small():
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )


@torch.no_grad()
def flex_calls(model):
    calls.clear()
    ids = torch.zeros(3, 3)
    model(torch.zeros(1, 3, 4), torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.zeros(1), ids, ids)
    return len(calls)


one, other = small(), small()
print("before", flex_calls(one), flex_calls(other))
one.set_attention_backend("flex")
print("set for one", flex_calls(one), flex_calls(other), flex_calls(small()))
one.reset_attention_backend()
print("reset for one", flex_calls(one), flex_calls(other))
PY
HF_HUB_OFFLINE=1 "$dir/env/bin/python" "$dir/try.py" 2> /dev/null > "$dir/found"
diff "$dir/found" - <<'TXT'
before 0 0
set for one 1 1 1
reset for one 1 1
TXT
echo "diffusers 0.42.1: as described"
