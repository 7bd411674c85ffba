"""`merge`: attention over disjoint sets of keys, put together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llsa_gen import merge, reference


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention; of no keys o = 0 and lse = -inf."""
    if not k.shape[2]:
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([1.0, 30.0]), st.integers(0, 99))
def test_parts_together_are_the_whole(sizes: list[int], std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        (torch.randn(1, 2, n, 4, dtype=torch.float64, generator=generator) * std).requires_grad_()
        for n in (3, sum(sizes), sum(sizes))
    )
    parts = [attend(q, *pair) for pair in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)]
    found, wanted = merge(*parts), attend(q, k, v)
    assert all(torch.allclose(x, y, atol=1e-9) for x, y in zip(found, wanted, strict=True))
    if sum(sizes):
        grads = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in found]
        for keep in ((0, 1), (0,), (1,)):  # either gradient may be missing
            pairs = [
                torch.autograd.grad(
                    [x[i] for i in keep], (q, k, v), [grads[i] for i in keep], retain_graph=True, allow_unused=True
                )
                for x in (found, wanted)
            ]
            for x, y in zip(*pairs, strict=True):
                x, y = (torch.zeros(1) if z is None else z for z in (x, y))
                assert torch.allclose(x.double(), y.double(), atol=1e-7 * std**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_the_reference_and_nothing_where_there_is_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(2, 1, 6, 8, generator=generator).to(dtype).requires_grad_(),
              torch.randn(2, 1, 6, generator=generator).requires_grad_()) for _ in range(3)]  # fmt: skip
    with torch.no_grad():
        parts[0][1][0] = float("-inf")
        parts[0][0][0] = float("nan")  # what is not there may hold anything
        for _, lse in parts:
            lse[1, 0, 2] = float("-inf")
    o, lse = merge(*parts)
    wanted_o, wanted_lse = reference.merge(*parts)
    assert o.dtype == dtype and lse.dtype == torch.float32
    assert reference.relative_error(o.detach(), wanted_o.detach()) < reference.tolerance(dtype)
    assert torch.allclose(lse.double(), wanted_lse)
    assert not o[1, 0, 2].any() and float(lse[1, 0, 2]) == float("-inf")
    (o.sum() + lse[lse > float("-inf")].sum()).backward()
    for of_o, of_lse in parts:
        assert of_o.grad is not None and of_lse.grad is not None
        assert bool(of_o.grad.isfinite().all()) and bool(of_lse.grad.isfinite().all())
        assert not of_o.grad[1, 0, 2].any() and not of_lse.grad[1, 0, 2].any()
    assert not parts[0][0].grad[0].any() and not parts[0][1].grad[0].any()  # type: ignore[index]


def test_what_is_no_part_is_refused() -> None:
    o, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"merge: expected one or more of \(o, lse\), got none"):
        merge()
    with pytest.raises(TypeError, match=r"merge, part 1: expected a pair of tensors \(o, lse\), got Tensor"):
        merge((o, lse), o)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"merge, part 1: expected o \[1, 2, 3, 4\] and lse \[1, 2, 3\], got \[1, 2, 2"
    ):
        merge((o, lse), (o[:, :, :2], lse))
    with pytest.raises(TypeError, match=r"merge, part 0: expected floating dtypes, got torch.float32 and torch.int64"):
        merge((o, lse.long()))


@pytest.mark.parametrize("lse", [0.0, 1e3, 1e6, 3e38])
def test_equal_values_stay_what_they_are_whatever_the_sums(lse: float) -> None:
    parts = [(torch.full((1, 1, 2, 4), 1.5), torch.full((1, 1, 2), lse + more)) for more in (0.0, 0.3)]
    assert torch.allclose(merge(*parts)[0], parts[0][0], rtol=1e-6)


def test_what_is_no_number_is_not_hidden() -> None:
    nan, nothing = torch.full((1, 1, 2), float("nan")), torch.full((1, 1, 2), float("-inf"))
    for others in ((), ((torch.ones(1, 1, 2, 4), nothing),), ((torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)),)):
        o, lse = merge((torch.ones(1, 1, 2, 4), nan), *others)
        assert bool(o.isnan().all()) and bool(lse.isnan().all())
