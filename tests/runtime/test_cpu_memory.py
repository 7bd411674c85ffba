"""The CPU path's memory: bounded in the heads and in the tokens, and nothing small is kept from run to run.

Bytes are those of the tensors, counted operation by operation: they do not depend on the allocator or on the machine.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples import spec
from llsa_gen import Spec, compile

CHUNK = 2**15
"""Elements, in place of what ships: small tensors then take as many runs and slices as large ones take with that."""
SCRATCH = 3
"""Times CHUNK elements of float32, or what one block of queries of one head sees where that is more."""
COPIES = 4
"""Times q, k and v in float32, beside the outputs: copies in float32, means, gradients that are summed up."""


class Counted(TorchDispatchMode):
    """The storages that operations have made and that are still alive: their bytes, their number, the most of both."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = [x.untyped_storage() for x in inputs]  # a storage has one Python object as long as that lives
        self.alive: dict[int, int] = {}
        self.bytes = self.most_bytes = self.most_alive = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return result

    def see(self, storage: UntypedStorage) -> None:
        if id(storage) in self.alive or any(storage is one for one in self.inputs):
            return
        self.alive[id(storage)] = storage.nbytes()
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self.gone, id(storage))
        self.most_bytes, self.most_alive = max(self.most_bytes, self.bytes), max(self.most_alive, len(self.alive))

    def gone(self, name: int) -> None:
        self.bytes -= self.alive.pop(name)


@dataclass
class Use:
    """What a pass took at the most: bytes, of which outputs, and storages alive at once."""

    most_bytes: int
    outputs: int
    most_alive: int
    result: list[Tensor] = field(repr=False)


def used(run: Callable[..., Any], *tensors: Tensor) -> Use:
    """`run` over tensors, counted."""
    with Counted(*tensors) as counted:
        result = [x for x in tree_leaves(run(*tensors)) if isinstance(x, Tensor)]
    return Use(counted.most_bytes, sum(x.nbytes for x in result), counted.most_alive, result)


def passes(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, grad_o: Tensor) -> dict[str, Use]:
    """The three things that a module does on the CPU, counted."""
    forward = used(lambda *x: module.forward(*x, 0.25), q, k, v)
    o, _, saved = forward.result
    backward = used(lambda grad_o, *x: module.backward(grad_o, None, *x, 0.25), grad_o, q, k, v, o, saved)
    return {"forward": forward, "backward": backward, "select": used(module.select_forward, q, k)}


def block_elements(chosen: Spec) -> int:
    """Elements of keys, values, logits and scores of the block of queries that sees the most, of one head."""
    listed = sum(level.block * level.topk for level in chosen.levels)
    widest = max(level.block for level in chosen.levels)
    return 2 * listed * (chosen.head_dim + widest)


def assert_bounded(chosen: Spec, shape: tuple[int, int, int], chunk: int, use: Use, what: str) -> None:
    inputs = 3 * 4 * prod(shape) * chosen.head_dim
    bound = use.outputs + COPIES * inputs + SCRATCH * 4 * max(chunk, block_elements(chosen))
    assert use.most_bytes <= bound, f"{what}: {use.most_bytes:,} bytes at a time, at most {bound:,} expected"


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, transposed: bool = False) -> list[Tensor]:
    """q, k, v and the gradient of o."""
    generator = torch.Generator().manual_seed(prod(shape))
    b, h, n, d = shape
    if transposed:
        return [torch.randn(b, n, h, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


SPECS = (
    spec("memory_l1", 16, (16, 8)),
    spec("memory_wide", 8, (256, 8)),
    spec("memory_none", 16, (8, 2), (64, 2), enrich="none"),
    spec("memory_l2", 24, (16, 2), (5, 3)),
    spec("memory_wide_above", 8, (2, 4), (128, 1)),
    spec("memory_l3", 16, (16, 8), (16, 8), (16, 8)),
    spec("memory_pairs", 16, (2, 2), (2, 2), (2, 2), (2, 2)),
)


@settings(max_examples=6)
@given(
    chosen=st.sampled_from(SPECS),
    shape=st.sampled_from([(1, 1, 4001), (1, 3, 1024), (3, 5, 211), (60, 1, 33), (5, 99, 5), (2000, 1, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
@example(chosen=SPECS[0], shape=(4000, 1, 1), dtype=torch.float32, transposed=False)
@example(chosen=SPECS[1], shape=(4000, 1, 1), dtype=torch.bfloat16, transposed=False)
@example(chosen=SPECS[2], shape=(500, 1, 2), dtype=torch.float32, transposed=False)
@example(chosen=SPECS[3], shape=(3, 5, 667), dtype=torch.float32, transposed=True)
@example(chosen=SPECS[6], shape=(2, 1, 2999), dtype=torch.bfloat16, transposed=True)
def test_memory_is_bounded_in_tokens_and_heads(
    chosen: Spec, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool
) -> None:
    module, inputs = compile(chosen).module, drawn((*shape, chosen.head_dim), dtype, transposed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", CHUNK)
        for what, use in passes(module, *inputs).items():
            assert_bounded(chosen, shape, CHUNK, use, what)


@pytest.mark.parametrize("block", [16, 256])
def test_many_heads_of_a_single_token(block: int) -> None:
    chosen = spec("memory_single", 64, (block, 8))
    module, inputs = compile(chosen).module, drawn((70_000, 1, 1, 64))
    for what, use in passes(module, *inputs).items():
        assert_bounded(chosen, (70_000, 1, 1), module.CHUNK, use, what)
        assert use.most_bytes < use.outputs + 6 * 70_000 * 64 * 4 * 3, what  # no token is filled up to a block
        if what == "forward":
            torch.testing.assert_close(use.result[0], inputs[2])  # the one token attends to itself and to its mean


def test_nothing_small_is_kept_from_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is left of a run, between the large tensors that come and go, makes holes in the heap.
    module = compile(SPECS[5]).module
    monkeypatch.setattr(module, "CHUNK", 2**16)
    short, long = (passes(module, *drawn((1, 1, tokens, 16))) for tokens in (2048, 8192))
    for what, use in short.items():
        assert long[what].most_alive <= use.most_alive + 2, what  # the last block may be filled up
        assert long[what].most_bytes <= 4.1 * use.most_bytes, what


@settings(max_examples=8)
@given(
    chosen=st.sampled_from(SPECS),
    shape=st.sampled_from([(40, 1, 1), (6, 2, 37), (1, 4, 300)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_slices_of_heads_change_nothing(chosen: Spec, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    module, inputs = compile(chosen).module, drawn((*shape, chosen.head_dim), dtype)
    whole = passes(module, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 2**12)
        sliced = passes(module, *inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for what, use in whole.items():
        for x, y in zip(use.result, sliced[what].result, strict=True):
            if not x.is_floating_point():
                assert torch.equal(x, y), what
            else:
                assert float((x.double() - y.double()).norm()) <= tolerance * float(x.double().norm()) + 1e-12, what
