"""On a GPU: shipped and drawn specs in three dtypes, short, odd and long, against the float64 reference.

`fuzz.run` compares the selection by value, o, lse, dq, dk and dv by the tolerances, and a second run bit by bit.
"""

from pathlib import Path

import pytest
import torch

import llsa_gen
from llsa_gen import fuzz

pytestmark = pytest.mark.gpu

SPECS = sorted(Path(__file__).parent.parent.joinpath("spec").glob("*.yaml"))
DTYPES = ("bfloat16", "float16", "float32")


def by_stem(path: Path) -> str:
    return path.stem


def case(path: Path | str, n: int, dtype: fuzz.DType = "bfloat16", **fields: object) -> fuzz.Case:
    return fuzz.Case(llsa_gen.load(path), n=n, dtype=dtype, device="cuda", **fields)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def give_memory_back() -> None:
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", SPECS, ids=by_stem)
def test_shipped_specs(path: Path, dtype: fuzz.DType) -> None:
    for n in (1, 17, 255, 1000, 2049):
        fuzz.run(case(path, n, dtype, heads=2, seed=n)).raise_if_failed()
    layouts = ("transposed", "expanded", "sliced", "transposed")
    fuzz.run(case(path, 777, dtype, batch=2, heads=2, layouts=layouts)).raise_if_failed()
    fuzz.run(case(path, 1024, dtype, heads=2, std=8.0)).raise_if_failed()


@pytest.mark.parametrize("n", [16_384, 65_537, 262_143])
@pytest.mark.parametrize("name", ["llsa_l2", "llsa_l3", "topk_b128"])
def test_long_sequences(name: str, n: int) -> None:
    fuzz.run(case(f"spec/{name}.yaml", n)).raise_if_failed()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llsa_l1", "llsa_l2", "uneven", "llsa_b64"])
def test_popular_keys(name: str, dtype: fuzz.DType) -> None:
    fuzz.run(case(f"spec/{name}.yaml", 9001, dtype, popular=True)).raise_if_failed()


def test_drawn_specs() -> None:
    fuzz.check(seconds=60, device="cuda", seed=2512)


@pytest.mark.parametrize("name", ["llsa_l2", "llsa_l3", "topk_l2"])
def test_nothing_waits_for_the_gpu_and_a_graph_replays(name: str) -> None:
    chosen = case(f"spec/{name}.yaml", 3000, heads=2)
    attention = llsa_gen.compile(chosen.spec)
    q, k, v, grad_o = chosen.tensors()

    def step() -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attention(*leaves)
        return (o.detach(), *torch.autograd.grad(o, leaves, grad_o))

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def test_compiles_whole_into_a_larger_graph() -> None:
    torch._dynamo.reset()
    chosen = case("spec/llsa_l2.yaml", 1500, heads=2)
    attention = llsa_gen.compile(chosen.spec)
    q, k, v, grad_o = chosen.tensors()

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v) + q

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(model, fullgraph=True)(*leaves)
    eager = model(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)
    for x, y in zip(
        torch.autograd.grad(compiled, leaves, grad_o), torch.autograd.grad(eager, leaves, grad_o), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_more_than_2_to_the_31_elements() -> None:
    """The last head lies beyond 2^31 elements in q, k, v, o and all gradients; alone it gives the same bits."""
    attention = llsa_gen.compile("spec/topk_b128.yaml")
    heads, n = 33, 1_048_576
    assert heads * n * 64 > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad_o = (
        torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
    )
    last = [x[:, -1:].clone().requires_grad_() for x in (q, k, v)]
    alone = attention(*last)
    expected = (alone.detach(), *torch.autograd.grad(alone, last, grad_o[:, -1:]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves)
    found = [o.detach()[:, -1:].clone()]
    grads = torch.autograd.grad(o, leaves, grad_o)
    found += [x[:, -1:] for x in grads]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_peak_memory_of_a_million_tokens() -> None:
    """Nothing of size T x T, and little beside q, k, v, o and their gradients."""
    attention = llsa_gen.compile("spec/llsa_l3.yaml")
    q, k, v, grad_o = (torch.randn(1, 2, 1_048_576, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    before = torch.cuda.memory_allocated() - 4 * q.nbytes
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attention(*leaves), leaves, grad_o)
    assert torch.cuda.max_memory_allocated() - before <= 1.3 * 8 * q.nbytes
