"""Worker processes, forked and spawned, call the operator and the layer: those of a DataLoader, one that trains."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llsa_gen import Level, Spec, compile
from llsa_gen.nn import LLSAttention

SPEC = Spec(name="working", head_dim=8, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


class Attended(Dataset[Tensor]):
    """What a layer makes of tokens, worked out where a sample is read."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer, self.attention = LLSAttention(16, 2, SPEC, order=(5, 5)), compile(SPEC)
        self.x = torch.randn(4, 1, 25, 16)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: int) -> Tensor:
        with torch.no_grad():
            y = self.layer(self.x[at])
            heads = y.unflatten(-1, (2, 8)).transpose(1, 2)
            return self.attention(heads, heads, heads)  # type: ignore[return-value]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader(context: str) -> None:
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    data = Attended()
    wanted = [data[at] for at in range(len(data))]  # so that a fork finds a module that has run
    loader: Any = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert all(map(torch.equal, loader, wanted))


def step(layer: LLSAttention, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    layer(x).square().sum().backward()
    queue.put([parameter.grad.numpy() for parameter in layer.parameters() if parameter.grad is not None])


def test_a_spawned_process_trains_a_model_that_was_sent() -> None:
    layer, x = Attended().layer, torch.randn(2, 25, 16)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=step, args=(layer, x, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join()
    layer.zero_grad()
    layer(x).square().sum().backward()
    wanted = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    assert len(found) == len(wanted) == 4
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(found, wanted, strict=True))
