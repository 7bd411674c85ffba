"""On a GPU: `LLSAttention`, against itself on the CPU in float32, and what torch's machinery does to it there."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import llsa_gen
from llsa_gen import Spec
from llsa_gen.nn import LLSAttention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GRID = 27, 38  # 1,026 tokens: no block is whole at the end of a row
GLOBALS = 3
TOKENS = GRID[0] * GRID[1] + GLOBALS


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 as float32, and memory given back: other workers use the same GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def everything() -> Spec:
    """A spec that keeps all, so that nothing hangs on which of two nearly equal scores is the larger one."""
    levels = [{"block": 16, "topk": 65}, {"block": 16, "topk": 5}]
    return llsa_gen.load({"name": "all_kept", "head_dim": 64, "levels": levels})


def layer(dtype: torch.dtype = torch.float32, device: str = "cpu") -> LLSAttention:
    torch.manual_seed(0)
    angles = torch.rand(TOKENS, 64) * 6
    made = LLSAttention(
        192, 3, everything(), qk_norm=True, rotary=(angles.cos(), angles.sin()), order=GRID, globals_first=1,
        globals_last=GLOBALS - 1,
    )  # fmt: skip
    return made.to(device, dtype)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, grad = torch.randn(2, 2, TOKENS, 192).unbind()
    return x.to(DEVICE, dtype), grad.to(DEVICE, dtype)


def step(module: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """o, dx and the gradients of all parameters."""
    x = x.detach().requires_grad_()
    o = module(x)
    return [o.detach(), *torch.autograd.grad(o, (x, *module.parameters()), grad.to(o.dtype))]


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error."""
    pairs = zip(found, wanted, strict=True)
    return max(float((x.cpu().double() - y.cpu().double()).norm() / y.cpu().double().norm()) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_computes_what_it_computes_on_the_cpu(dtype: torch.dtype) -> None:
    x, grad = drawn()
    wanted = step(layer(), x.cpu(), grad.cpu())
    found = step(layer(dtype, DEVICE), x.to(dtype), grad.to(dtype))
    assert far(found, wanted) < {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_autocast_takes_its_dtype() -> None:
    module, (x, grad) = layer(device=DEVICE), drawn()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.bfloat16):
        found = step(module, x, grad)
    assert far(found, step(module, x, grad)) < 3e-2


def test_compiled_in_one_graph() -> None:
    module, (x, grad) = layer(device=DEVICE), drawn()
    compiled = torch.compile(module, fullgraph=True)
    assert far(step(compiled, x, grad), step(module, x, grad)) < 2e-5
    assert far(step(compiled, x[:1], grad[:1]), step(module, x[:1], grad[:1])) < 2e-5  # another batch: dynamic


def test_compiled_into_cuda_graphs() -> None:
    module, (x, grad) = layer(torch.bfloat16, DEVICE), drawn(torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = [y.clone() for y in step(compiled, x, grad)]
    assert far(found, step(module, x, grad)) < 3e-2


def test_a_training_step_as_one_cuda_graph() -> None:
    module, (x, grad) = layer(torch.bfloat16, DEVICE), drawn(torch.bfloat16)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (torch.randn_like(x, requires_grad=True),))
    for seed in range(2):
        torch.manual_seed(seed)
        x, grad = torch.randn_like(x), torch.randn_like(grad)
        found, plain = step(graphed, x, grad), step(module, x, grad)
        assert far(found, plain) < 3e-2  # cuBLAS may take another way inside a graph


def test_checkpointing_recomputes_the_same_bits() -> None:
    module, (x, grad) = layer(torch.bfloat16, DEVICE), drawn(torch.bfloat16)
    wanted = step(module, x, grad)
    for reentrant in (False, True):
        x = x.detach().requires_grad_()
        o = checkpoint(module, x, use_reentrant=reentrant)
        o.backward(grad)
        found = [o.detach(), x.grad, *(p.grad for p in module.parameters())]
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        module.zero_grad()


def test_exported_saved_and_loaded(tmp_path: Path) -> None:
    module, (x, _) = layer(torch.bfloat16, DEVICE).eval(), drawn(torch.bfloat16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=True)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for size in (1, 2):
        assert far([loaded(x[:size])], [module(x[:size])]) < 1e-2


def test_it_moves_to_the_gpu_and_back_with_its_order_and_its_tables() -> None:
    module, (x, _) = layer(), drawn()
    here = module(x.cpu())
    there = module.to(DEVICE)(x)
    back = module.to("cpu")(x.cpu())
    assert far([there], [here]) < 2e-5
    assert torch.equal(back, here)
