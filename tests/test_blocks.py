"""docs/blocks.md: attention along a mask or lists of blocks is dense attention with that mask."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llsa_gen
from llsa_gen import reference
from llsa_gen.reference.selection import kept_mask

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "blocks.md"
FUNCTIONS, EXAMPLE = re.findall(r"```python\n(.*?)```\n", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
NAMES: dict[str, Any] = {}
exec(compile(FUNCTIONS, str(DOCUMENT), "exec"), NAMES)
attend_blocks, lists_of_mask, lists_of_indices, mask_of_rows = (
    NAMES[name] for name in ("attend_blocks", "lists_of_mask", "lists_of_indices", "mask_of_rows")
)

CASES = [(16, 100, 333), (16, 333, 100), (64, 300, 1000), (64, 1000, 130), (128, 300, 1100), (128, 128, 128)]
"""b, M and N."""
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(m: int, n: int, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 32) -> list[Tensor]:
    """q, k and v of two batch entries and two heads."""
    generator = torch.Generator().manual_seed(1000 * m + n)
    return [torch.randn(2, 2, x, head_dim, generator=generator).to(device, dtype).requires_grad_() for x in (m, n, n)]


def draw_mask(block: int, m: int, n: int, device: str = "cpu") -> Tensor:
    """Of blocks: another share of them in each row, none in some."""
    generator = torch.Generator().manual_seed(m + n)
    shape = 2, 2, -(-m // block), -(-n // block)
    mask = torch.rand(shape, generator=generator) < torch.rand(shape[:3], generator=generator)[..., None]
    mask[0, 1, 0] = False
    mask[1, :, -1] = False
    return mask.to(device)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """o and lse of a softmax over all keys, in float64, with the mask of blocks; rows of nothing are 0 and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    of_tokens = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, : q.shape[2], : k.shape[2]]
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~of_tokens, float("-inf"))
    nothing = ~of_tokens.any(-1, keepdim=True)
    assert logits.softmax(-1).isnan().any(-1, keepdim=True).equal(nothing), "what docs/blocks.md warns of"
    p = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return p @ v, logits.logsumexp(-1)


def assert_like_dense(inputs: list[Tensor], kept: Tensor, mask: Tensor, block: int) -> None:
    o, lse = attend_blocks(*inputs, kept, block, return_lse=True, check_kept=True)
    q, k, v = truth = [x.detach().requires_grad_() for x in inputs]
    wanted, wanted_lse = dense(q, k, v, mask, block)
    tolerance, nothing = reference.tolerance(o.dtype), wanted_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), nothing) and not o[nothing].any()
    assert reference.relative_error(o.detach(), wanted.detach()) <= tolerance
    assert torch.allclose(lse[~nothing].double(), wanted_lse[~nothing], rtol=0, atol=tolerance)
    into = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o)
    grads = torch.autograd.grad(o, inputs, into), torch.autograd.grad(wanted, truth, into.double())
    for x, y in zip(*grads, strict=True):
        assert reference.relative_error(x, y) <= tolerance
    assert not grads[0][0][nothing].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mask_of_blocks(case: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    block, m, n = case
    mask = draw_mask(block, m, n, device)
    kept = lists_of_mask(mask)
    assert kept.dtype == torch.int32 and torch.equal((kept >= 0).sum(-1), mask.sum(-1))
    assert_like_dense(draw(m, n, device, dtype), kept, mask, block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_with_counts(case: tuple[int, int, int], device: str) -> None:
    """In any order, with any ids behind the counted ones."""
    block, m, n = case
    mask = draw_mask(block, m, n, device)
    counts, order = mask.sum(-1), torch.rand(mask.shape, device=device) - 2.0 * mask
    kept = lists_of_indices(order.argsort(-1), counts)
    assert kept.dtype == torch.int32 and kept.shape[3] == max(1, int(counts.max()))
    assert torch.equal(kept_mask(kept, mask.shape[3]), mask)
    assert_like_dense(draw(m, n, device), kept, mask, block)


def rows_of(mask: Tensor) -> Iterator[Tensor]:
    """Compressed rows of a mask [R, C]: where each begins, and the columns of all."""
    yield torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    yield mask.nonzero()[:, 1]


def test_compressed_rows() -> None:
    mask = draw_mask(16, 100, 333)[1, 0]
    found = mask_of_rows(*rows_of(mask), mask.shape[1])
    assert torch.equal(found, mask[None, None])
    kept = lists_of_mask(found.expand(2, 2, -1, -1))
    assert_like_dense(draw(100, 333), kept, mask.expand(2, 2, -1, -1), 16)


@pytest.mark.parametrize("device", DEVICES)
def test_no_block_at_all(device: str) -> None:
    mask = torch.zeros(2, 2, 3, 5, dtype=torch.bool, device=device)
    o, lse = attend_blocks(*(inputs := draw(40, 70, device)), lists_of_mask(mask), 16, return_lse=True)
    assert not o.any() and bool((lse == float("-inf")).all())
    assert not any(x.any() for x in torch.autograd.grad(o.sum() + lse.sum(), inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_up_to_512_blocks_a_row(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([512, 0, 511, 1, 300, 512]).view(1, 1, 6, 1)
    mask = torch.rand(1, 1, 6, 600, generator=generator).argsort(-1).argsort(-1).lt(counts).to(device)
    inputs = [x.detach()[:1, :1].requires_grad_() for x in draw(90, 9595, device)]
    assert_like_dense(inputs, lists_of_mask(mask), mask, 16)
    with pytest.raises(ValueError, match=r"kept, level 1: expected \[1, 1, 6, 1 to 512\], got \[1, 1, 6, 600\]"):
        attend_blocks(*inputs, lists_of_mask(torch.ones_like(mask)), 16)


def test_larger_query_blocks_are_rows_repeated() -> None:
    mask = draw_mask(32, 100, 333)[..., : -(-333 // 32)]
    rows = mask.repeat_interleave(2, 2)[:, :, : -(-100 // 16)].repeat_interleave(2, 3)[..., : -(-333 // 16)]
    assert_like_dense(draw(100, 333), lists_of_mask(rows), mask.repeat_interleave(2, 2).repeat_interleave(2, 3), 16)


def test_the_example_runs() -> None:
    names = NAMES.copy()
    exec(compile(EXAMPLE, str(DOCUMENT), "exec"), names)
    assert names["o"].shape == (2, 4, 300, 64) and names["k"].grad.isfinite().all()


def test_a_call_compiles_once() -> None:
    level = llsa_gen.Level(block=16, topk=512)
    specs = [llsa_gen.Spec(name="blocks_16", head_dim=32, levels=(level,), enrich="none") for _ in range(2)]
    assert llsa_gen.compile(specs[0]).module is llsa_gen.compile(specs[1]).module
