#!/usr/bin/env bash
# transformers 5.24.0: an attention function registered under a name of its own gets no mask, though the caller gave one.
#
# AttentionInterface.register(name, function) is all that the function needs to be called. But what makes masks asks another
# table, AttentionMaskInterface, by the same name, and gives None where it is not in it: padded tokens are attended to, and a
# causal model is not causal unless the function looks at module.is_causal. No warning says so. With a mask function
# registered under the name, the mask comes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
cat > "$dir/try.py" <<'PY'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

got = []


def mine(module, query, key, value, attention_mask, **options):
    got.append("none" if attention_mask is None else f"one, {attention_mask.dtype}")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("alone", mine)
AttentionInterface.register("both", mine)
AttentionMaskInterface.register("both", sdpa_mask)
sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
ids = torch.ones(1, 4, dtype=torch.int64)
for kind, config in ((BertModel, BertConfig), (LlamaModel, LlamaConfig)):
    for name in ("alone", "both"):
        kind(config(**sizes, attn_implementation=name))(ids, attention_mask=torch.tensor([[1, 1, 0, 0]]))
        print(f"{kind.__name__}, {name}: mask {got.pop()}")
PY
"$dir/env/bin/python" -W ignore "$dir/try.py" > "$dir/found"
diff "$dir/found" - <<'TXT'
BertModel, alone: mask none
BertModel, both: mask one, torch.bool
LlamaModel, alone: mask none
LlamaModel, both: mask one, torch.bool
TXT
echo "transformers 5.24.0: as described"
