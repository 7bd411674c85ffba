"""What the CPU path's speed rests on, without a clock: few multiplications, in few large operations.

How long they take is for benchmarks: `llsa-gen bench llsa_l2 -n 16384 --device cpu`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import llsa_gen

ROOT = Path(__file__).resolve().parents[2]
HEADS, HEAD_DIM, KEYS = 4, 64, 320
"""Those of llsa_l2 at 16,384 tokens: 128 tokens, 128 of level 1, 64 of level 2."""


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def work(tokens: int) -> dict[str, tuple[int, int]]:
    """FLOPs and operations of each pass of llsa_l2."""
    module = llsa_gen.compile(ROOT / "spec" / "llsa_l2.yaml").module
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_o = (torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(4))
    counts = {}
    o, _, saved = module.forward(q, k, v, 0.125)
    for name, run in (
        ("forward", lambda: module.forward(q, k, v, 0.125)),
        ("backward", lambda: module.backward(grad_o, None, q, k, v, o, saved, 0.125)),
    ):
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            run()
        counts[name] = flops.get_total_flops(), operations.count
    return counts


@pytest.mark.slow
def test_work_is_that_of_the_keys_seen_in_few_large_operations() -> None:
    tokens = 16_384
    short, counts = work(tokens // 4), work(tokens)
    of_keys = 2 * HEADS * tokens * KEYS * HEAD_DIM  # a product of queries and keys
    for name, products in (("forward", 2), ("backward", 5)):
        flops, operations = counts[name]
        assert products * of_keys <= flops <= 1.1 * products * of_keys, name  # selection is the rest; dense is 51 times
        assert flops <= 5 * short[name][0], name
        # an operation costs some microseconds whatever it does, a million FLOPs some ten
        assert flops > 1e6 * operations, f"{name}: {operations} operations"
