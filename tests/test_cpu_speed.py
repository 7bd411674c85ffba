"""The CPU path is quick enough to use: at the size of the demo it beats torch's own dense attention.

The threads are those that torch has: in a worker of pytest-xdist its share of the cores, so that workers do not wait
for each other.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import llsa_gen

ROOT = Path(__file__).resolve().parents[1]
N_TOKENS, HEADS = 16_384, 4
SECONDS = 5.0


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.slow
def test_forward_is_under_five_seconds_and_faster_than_dense() -> None:
    attention = llsa_gen.compile(ROOT / "spec" / "llsa_l2.yaml")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, N_TOKENS, 64, generator=generator) for _ in range(3))
    attention(q, k, v)
    scaled_dot_product_attention(q[:, :, :1024], k, v)  # warm, and in less time
    pairs = [
        (seconds(lambda: attention(q, k, v)), seconds(lambda: scaled_dot_product_attention(q, k, v))) for _ in range(3)
    ]  # in turns, so that both suffer alike from whatever else runs
    sparse, dense = (median(times) for times in zip(*pairs, strict=True))
    assert sparse < SECONDS
    assert sparse < dense, f"llsa_l2 took {sparse:.2f} s, dense attention {dense:.2f} s"
