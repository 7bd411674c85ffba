"""Stages as operators: pool, select from means, attend along given lists; together they are `attention`."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from llsa_gen import compile, reference
from llsa_gen.spec import Level, Spec


def spec(name: str, head_dim: int, *levels: tuple[int, int], **more: Any) -> Spec:
    return Spec(name=name, head_dim=head_dim, levels=tuple(Level(block=b, topk=k) for b, k in levels), **more)


SPECS = [
    spec("stages_two", 16, (4, 3), (4, 2)),
    spec("stages_uneven", 24, (5, 2), (3, 2), (2, 2), reweight=False),
    spec("stages_some", 16, (4, 2), (4, 3), (2, 2), enrich=(1, 3)),
    spec("stages_none", 16, (16, 2), (2, 2), enrich="none"),
]
LENGTHS = [(64, 64), (37, 90), (90, 37), (3, 50), (50, 2), (1, 1)]
EVERYWHERE = [
    pytest.param("cpu"),
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def draw(chosen: Spec, m: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v and the gradients of o and lse."""
    generator = torch.Generator().manual_seed(m + 1000 * n)
    sizes = [(2, 2, tokens, chosen.head_dim) for tokens in (m, n, n, m)] + [(2, 2, m)]
    made = [torch.randn(size, generator=generator).to(device) for size in sizes]
    return *(x.to(dtype).requires_grad_() for x in made[:3]), made[3].to(dtype), made[4]


def dense(
    chosen: Spec, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], kept: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """o and lse from the weights of the definition, in float64: keys and values of every level, the tokens first."""
    rows = torch.arange(q.shape[2], device=q.device)
    weights = reference.weight_rows(chosen, [x.long() for x in kept], rows, keys[0].shape[2])
    logits = scale * (q.double() @ torch.cat([x.double() for x in keys], 2).mT) + weights.log()
    return logits.softmax(-1) @ torch.cat([x.double() for x in values], 2), logits.logsumexp(-1)


def drop_some(chosen: Spec, kept: list[Tensor]) -> None:
    """Put -1 in place of some tokens, never the best, and of what is no child of a token that is kept; move all on."""
    generator = torch.Generator().manual_seed(0)
    for level in range(len(kept), 0, -1):
        if level > 1 and not chosen.enriched_levels:
            continue  # or a query would have nothing to attend to
        lists = kept[level - 1]
        gone = (torch.rand(lists.shape, generator=generator) < 0.3).to(lists.device)
        gone[..., 0] = False
        if level < len(kept):
            row = torch.arange(lists.shape[2], device=lists.device) // chosen.block(level + 1)
            above = kept[level].index_select(2, row)
            parent = lists // chosen.block(level + 1)
            gone |= ~((parent[..., None] == above[..., None, :]) & (lists >= 0)[..., None]).any(-1)
        lists[gone] = -1
        lists.copy_(lists.roll(1, -1))


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    allowed = reference.tolerance(dtype)
    return bool((found.double() - wanted.double()).abs().max() <= allowed * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_stages_one_after_the_other_are_the_operator(chosen: Spec, dtype: torch.dtype, device: str) -> None:
    module = compile(chosen).module
    lengths = (64, 37)
    if knobs.runtime.interpret:  # ten seconds and more each
        lengths = (64,) if dtype == torch.float16 else (37,)
    for n in lengths:
        q, k, v, grad_o, grad_lse = draw(chosen, n, n, dtype, device)
        wanted = module.attention(q, k, v, return_lse=True)
        kept = module.select_means(*([x.detach() for x in module.pool(y)] for y in (q, k)))
        assert all(torch.equal(x, y) for x, y in zip(kept, module.select(q, k), strict=True))
        found = module.attend_means(q, k, v, module.pool(k), module.pool(v), kept, chosen.head_dim**-0.5)
        pairs = [*zip(found, wanted, strict=True)]
        grads = [torch.autograd.grad(x, (q, k, v), (grad_o, grad_lse)) for x in (found, wanted)]
        pairs += zip(*grads, strict=True)
        assert all(close(x, y, dtype) for x, y in pairs)


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_two_lengths_means_of_their_own_and_lists_with_gaps(
    chosen: Spec, lengths: tuple[int, int], device: str
) -> None:
    """Against the definition, with means that are not those of k and v: their gradients too."""
    module, scale = compile(chosen).module, chosen.head_dim**-0.5
    q, k, v, grad_o, grad_lse = draw(chosen, *lengths, torch.float32, device)
    k_means, v_means = ([(x + 0.1).detach().requires_grad_() for x in module.pool(y)] for y in (k, v))
    kept = module.select_means(module.pool(q.detach()), [x.detach() for x in k_means])
    drop_some(chosen, kept)
    found = module.attend_means(q, k, v, k_means, v_means, kept, scale)
    wanted = dense(chosen, q, (k, *k_means), (v, *v_means), kept, scale)
    assert all(close(x, y, torch.float32) for x, y in zip(found, wanted, strict=True))
    inputs = q, k, v, *(x for level in chosen.enriched_levels for x in (k_means[level - 1], v_means[level - 1]))
    grads = torch.autograd.grad(found, inputs, (grad_o, grad_lse), allow_unused=False)
    truth = torch.autograd.grad(wanted, inputs, (grad_o.double(), grad_lse.double()))
    for place, (x, y) in enumerate(zip(grads, truth, strict=True)):
        assert x.shape == inputs[place].shape and close(x, y, torch.float32), place


@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_selection_from_means_is_right(chosen: Spec, lengths: tuple[int, int]) -> None:
    module = compile(chosen).module
    q, k, *_ = draw(chosen, *lengths, torch.float32, "cpu")
    kept = module.select_means(module.pool(q.detach()), module.pool(k.detach()))
    assert [list(x.shape[:3]) for x in kept] == [
        [2, 2, -(-lengths[0] // chosen.span(level))] for level in range(1, chosen.num_levels + 1)
    ]
    reference.check_selection(chosen, q.detach(), k.detach(), kept)


@pytest.mark.parametrize("n", [1, 37, 64])
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_pooling_is_the_mean_and_its_gradient_is_exact(chosen: Spec, n: int) -> None:
    module = compile(chosen).module
    x = torch.randn(1, 2, n, chosen.head_dim, requires_grad=True)
    means = module.pool(x)
    wanted = [reference.pool(x, chosen.span(level)) for level in range(1, chosen.num_levels + 1)]
    assert all(close(y, z, torch.float32) for y, z in zip(means, wanted, strict=True))
    grads = [torch.randn_like(mean) for mean in means]
    (found,) = torch.autograd.grad(means, x, grads)
    (truth,) = torch.autograd.grad(wanted, x, [grad.double() for grad in grads])
    assert close(found, truth, torch.float32)


@pytest.mark.parametrize("chosen", SPECS[:1], ids=lambda chosen: chosen.name)
def test_torch_knows_the_stages(chosen: Spec) -> None:
    module = compile(chosen).module
    q, k, v, *_ = draw(chosen, 37, 50, torch.float32, "cpu")
    operators = torch.ops.llsa
    means = [[x.detach() for x in module.pool(y)] for y in (q, k, v)]
    kept = module.select_means(*means[:2])
    torch.library.opcheck(getattr(operators, module.OPERATOR + "_pool"), (q,))
    torch.library.opcheck(getattr(operators, module.OPERATOR + "_select_means"), tuple(means[:2]))
    torch.library.opcheck(getattr(operators, module.OPERATOR + "_attend_means"), (q, k, v, *means[1:], kept, 0.25))


@pytest.mark.parametrize("chosen", SPECS[:1], ids=lambda chosen: chosen.name)
def test_no_queries_or_no_keys(chosen: Spec) -> None:
    module = compile(chosen).module
    for m, n in ((0, 9), (9, 0)):
        q, k, v, grad_o, grad_lse = draw(chosen, m, n, torch.float32, "cpu")
        kept = module.select_means(*([x.detach() for x in module.pool(y)] for y in (q, k)))
        o, lse = module.attend_means(q, k, v, module.pool(k), module.pool(v), kept, 0.25)
        assert o.shape == q.shape and not o.any() and bool((lse == float("-inf")).all())
        grads = torch.autograd.grad((o, lse), (q, k, v), (grad_o, grad_lse))
        assert all(not grad.any() for grad in grads)
