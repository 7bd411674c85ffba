"""Two processes that train one model: DDP, FSDP2, tensor parallel, and tokens sharded over a mesh."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor, nn

from llsa_gen import Level, Spec, compile
from llsa_gen.nn import LLSAttention

WIDTH, HEADS, D, TOKENS = 32, 4, 8, 51
SPEC = Spec(name="parallel", head_dim=D, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))
GRID = (3, 17)
LINEAR_TAKES_TOKENS = torch.__version__ >= "2.13"
"""Whether torch's own nn.Linear takes DTensors [B, N, C] whose tokens are sharded, and so LLSAttention."""


def layer(**more: Any) -> LLSAttention:
    """One with tables, an order and norms, the same in every process."""
    torch.manual_seed(0)
    turned = torch.rand(TOKENS, D)
    return LLSAttention(WIDTH, HEADS, SPEC, qk_norm=True, rotary=(turned.cos(), turned.sin()), order=GRID, **more)


class Projected(nn.Module):
    """Attention with a projection of its own for queries, keys and values: torch's plans know these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.attend = compile(SPEC).as_module()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, D)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def step(module: nn.Module, x: Any) -> list[Tensor]:
    """A step of training; the loss, and the whole gradients and parameters after it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = module(x).square().mean()
    loss.backward()
    optimizer.step()
    grads = [whole(parameter.grad) for parameter in module.parameters()]
    return [whole(loss), *grads, *(whole(parameter) for parameter in module.parameters())]


def differences(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative, the largest of each."""
    return [float((x - y).norm() / (y.norm() + 1e-6)) for x, y in zip(found, wanted, strict=True)]


def train() -> dict[str, list[float]]:
    """How far each way of training is from one process with the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(2)[dist.get_rank()]
    found: dict[str, list[float]] = {}

    found["DDP"] = differences(step(nn.parallel.DistributedDataParallel(layer()), mine)[1:], step(layer(), x)[1:])

    model = nn.Sequential(layer(), nn.GELU(), layer(globals_first=0))
    alone = copy.deepcopy(model)
    for at in (0, 2):
        fully_shard(model[at], mesh=mesh)
    fully_shard(model, mesh=mesh)
    found["FSDP2"] = differences(step(model, mine)[1:], step(alone, x)[1:])

    plan = {**{name: ColwiseParallel() for name in "qkv"}, "out": RowwiseParallel()}
    found["tensor parallel"] = differences(step(parallelize_module(Projected(), mesh, plan), x), step(Projected(), x))

    if not LINEAR_TAKES_TOKENS:
        there = distribute_tensor(x, mesh, [Shard(0)])
        found["sharded by batch"] = differences(step(distribute_module(layer(), mesh), there), step(layer(), x))
        return found

    for name, dim in (("batch", 0), ("tokens", 1)):
        there = distribute_tensor(x, mesh, [Shard(dim)])
        found[f"sharded by {name}"] = differences(step(distribute_module(layer(), mesh), there), step(layer(), x))

    odd = LLSAttention(3 * D, 3, SPEC)  # heads that two processes cannot share evenly
    there = distribute_tensor(x[:, :, : 3 * D], mesh, [Shard(1)])
    alone, shared = copy.deepcopy(odd), distribute_module(odd, mesh)
    found["odd heads"] = differences(step(shared, there), step(alone, x[:, :, : 3 * D]))
    return found


@pytest.mark.slow
def test_a_step_is_that_of_one_process(tmp_path: Path) -> None:
    """One test for all ways, for processes take a while to start."""
    for found in in_processes(2, tmp_path, train):
        ways = {"DDP", "FSDP2", "tensor parallel", "sharded by batch"}
        assert set(found) == (ways | {"sharded by tokens", "odd heads"} if LINEAR_TAKES_TOKENS else ways)
        far = {way: numbers for way, numbers in found.items() if len(numbers) < 9 or max(numbers) > 1e-5}
        assert not far
