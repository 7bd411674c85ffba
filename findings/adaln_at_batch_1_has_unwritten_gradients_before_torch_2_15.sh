#!/usr/bin/env bash
# torch 2.13.0: what torch.compile makes for a GPU leaves gradients of adaLN's shift and scale unwritten at batch 1.
#
# Where one tensor holds shift and scale for all tokens, their gradients are sums over tokens. Since torch 2.10 Inductor
# fuses such a sum with the backward pass of the norm, each program leaving its part in a workspace. A line of Python
# adds the parts up under the name of a buffer. But that name was a part of the gradient of the whole tensor, which
# `stack` or `cat` would have put together in place: now nobody writes it, and the gradient is whatever lay in that
# memory, often that of the step before. No error, no NaN; a model goes on learning, badly. Fixed in torch 2.15
# (https://github.com/pytorch/pytorch/issues/193061). `triton.mix_order_reduction = False` leaves it out.
#
# No GPU is needed to see it: the code for one is generated, and read.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy
cat > "$dir/try.py" <<'PY'
import contextlib
import copy
import re
from functools import partial
from unittest import mock

import torch
import torch._dynamo.device_interface as interface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

GPU = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)
PRETENDED = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch._inductor.codecache.CacheBase.get_system": lambda *_: {"hash": ""},
    "torch.utils._triton.triton_hash_with_backend": lambda: "",
}


def modulated(x, table):
    """Tokens x [1, tokens, channels], normed, with shift and scale of all of them in table [1, 2, channels]."""
    shift, scale = table.chunk(2, dim=1)
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def for_a_gpu(graph):
    """What Inductor would run for a graph on an H100."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    graph, inputs = copy.deepcopy(graph), []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            with fake:
                inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0"))
        elif "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    with contextlib.ExitStack() as stack:
        for name, value in PRETENDED.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda _: GPU))
        stack.enter_context(mock.patch.object(interface, "caching_worker_device_properties", {"cuda": [GPU]}))
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
        lowered = GraphLowering(graph)
        for handler in (
            V.set_fake_mode(fake), V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]),
            V.set_debug_handler(mock.MagicMock()),
        ):
            stack.enter_context(handler)
        lowered.run(*inputs)
        return lowered.codegen()[0].value


def backward(tokens, channels):
    """The code of the backward pass."""
    texts = []

    def keep(graph, _):
        texts.append(for_a_gpu(graph))
        return make_boxed_func(graph.forward)

    compiled = aot_function(
        modulated, lambda graph, _: make_boxed_func(graph.forward), keep, decompositions=select_decomp_table(),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )
    x, table = (torch.randn(shape, requires_grad=True) for shape in ((1, tokens, channels), (1, 2, channels)))
    compiled(x, table).sum().backward()
    return texts[0]


def lost(text):
    """How many sums are made under a name that nothing reads, and how many are made."""
    made = re.findall(r"^ +(buf\d+) = workspace_\d+\[.*\.sum\(", text, re.M)
    lines = [line for line in text.splitlines() if not re.match(r"^ +(del |#)", line)]
    read = [name for name in made if sum(bool(re.search(rf"\b{name}\b", line)) for line in lines) > 1]
    return len(made) - len(read), len(made)


if __name__ == "__main__":
    for fused in (True, False):
        with config.patch({"triton.mix_order_reduction": fused}):
            print("fused:" if fused else "not fused:", "%d of %d sums are lost" % lost(backward(16384, 384)))
PY
"$dir/env/bin/python" "$dir/try.py" > "$dir/found"
diff "$dir/found" - <<'TXT'
fused: 2 of 2 sums are lost
not fused: 0 of 0 sums are lost
TXT
echo "torch 2.13.0: as described"
