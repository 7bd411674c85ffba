#!/usr/bin/env bash
# torch 2.13.0: torch.compile cannot trace Tensor.unflatten under a TorchFunctionMode, even one that only passes calls on.
#
# Without a mode the call is put into the graph. Under one, `func(*args)` leads Dynamo into the text of Tensor.unflatten,
# which calls super().unflatten: "Attempted to call a super() attribute that is not a function or method". Other methods
# pass. A mode that calls it by name, `args[0].unflatten(...)`, is traced.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 numpy
cat > "$dir/try.py" <<'PY'
import torch
from torch.overrides import TorchFunctionMode


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Naming(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.unflatten:
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def halves(x, mode, name):
    with mode():
        return x.unflatten(0, (2, -1)) if name == "unflatten" else x.view(2, -1)


for mode in (Passing, Naming):
    for name in ("view", "unflatten"):
        torch.compiler.reset()
        try:
            torch.compile(halves, fullgraph=True, backend="eager")(torch.zeros(4), mode, name)
            print(mode.__name__, name, "traced")
        except torch._dynamo.exc.Unsupported as error:
            print(mode.__name__, name, "super()" in str(error))
PY
"$dir/env/bin/python" "$dir/try.py" 2> /dev/null > "$dir/found"
diff "$dir/found" - <<'TXT'
Passing view traced
Passing unflatten True
Naming view traced
Naming unflatten traced
TXT
echo "torch 2.13.0: as described"
