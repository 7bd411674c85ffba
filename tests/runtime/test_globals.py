"""Tokens that every query attends to: as the reference has them, and under torch's machinery."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llsa_gen import Level, Spec, compile, reference


def spec(name: str, head_dim: int, *levels: tuple[int, int], **more: Any) -> Spec:
    return Spec(name=name, head_dim=head_dim, levels=tuple(Level(block=b, topk=k) for b, k in levels), **more)


D = 16
TWO = spec("globals_two", D, (4, 3), (4, 2))
SPECS = [
    TWO,
    spec("globals_uneven", 24, (5, 2), (3, 2), (2, 2), reweight=False),
    spec("globals_some", D, (4, 2), (4, 3), (2, 2), enrich=(1, 3)),
    spec("globals_none", D, (16, 2), (2, 2), enrich="none"),
    spec("globals_one", D, (2, 65)),
]
CASES = [(37, 50, 7, 0), (50, 37, 1, 5), (21, 64, 70, 13), (64, 3, 16, 0), (3, 0, 4, 0), (9, 0, 1, 2)]
"""M, N, G and the offset of the queries."""
EVERYWHERE = [
    pytest.param("cpu"),
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CASES_EVERYWHERE = [
    pytest.param(case, *where.values, marks=where.marks, id=f"{case}-{where.values[0]}")
    for where in EVERYWHERE
    for case in (CASES[1:][:1] if pytest.mark.interpret in where.marks else CASES)  # which is slow
]
NOTHING = float("-inf")


def draw(m: int, n: int, g: int, head_dim: int = D, seed: int = 0) -> list[Tensor]:
    """q, k, v, k_global, v_global of two batch entries and two heads."""
    generator = torch.Generator().manual_seed(1000 * m + 10 * n + g + seed)
    return [torch.randn(2, 2, x, head_dim, generator=generator).requires_grad_() for x in (m, n, n, g, g)]


def masks(g: int) -> list[Tensor | None]:
    """None; of one batch entry half of the tokens and none of the other; none at all; all."""
    half = torch.arange(g) % 2 == 0
    return [None, torch.stack([half, torch.zeros_like(half)]), torch.zeros(2, g).bool(), torch.ones(2, g).bool()]


def attend(attention: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    """Attention to global tokens: q, k, v, k_global, v_global and, where it is given, the mask."""
    q, k, v, k_global, v_global, mask = (*inputs, None)[:6]
    return attention(q, k, v, k_global=k_global, v_global=v_global, global_mask=mask, **more)


def dense(chosen: Spec) -> Callable[..., Any]:
    """The reference as `attend` calls it."""
    return lambda *inputs, **more: reference.attention(chosen, *inputs, **more)


def gradients(attention: Callable[..., Any], inputs: list[Tensor], *more: Any, **others: Any) -> tuple[Tensor, ...]:
    """o, lse and the gradients of all inputs."""
    o, lse = attend(attention, *inputs, *more, return_lse=True, **others)
    weights = torch.linspace(-1, 2, o.shape[-1], device=o.device)
    return o, lse, *torch.autograd.grad((o * weights).square().sum() + lse.sin().sum(), inputs)


def close(found: Tensor, wanted: Tensor) -> bool:
    """To float32's tolerance, also of what is 0 by cancellation, and what is infinite is so in both."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    dead = found == NOTHING
    if found.shape != wanted.shape or not torch.equal(dead, wanted == NOTHING):
        return False
    found, wanted = found.masked_fill(dead, 0.0), wanted.masked_fill(dead, 0.0)
    return reference.relative_error(found, wanted) <= 1e-5 or bool((found - wanted).abs().max() <= 1e-5)


@pytest.mark.parametrize(("case", "device"), CASES_EVERYWHERE)
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_like_the_reference(chosen: Spec, case: tuple[int, int, int, int], device: str) -> None:
    """o, lse and all gradients, with what takes no part full of NaN, and NaN coming in where nothing is attended to."""
    m, n, g, offset = case
    attention, inputs = compile(chosen), [x.detach().to(device) for x in draw(m, n, g, chosen.head_dim)]
    kept = attention.select(*inputs[:2], query_offset=offset)
    for mask in masks(g):
        filled = [x.clone() for x in inputs]
        if mask is not None:
            mask = mask.to(device)
            for x in filled[3:]:
                x.masked_fill_(~mask[:, None, :, None], float("nan"))
        own = [x.clone().requires_grad_() for x in filled]
        truth = [x.double().requires_grad_() for x in filled]
        found = attend(attention, *own, mask, query_offset=offset, return_lse=True)
        options = {"indices": kept, "round_to": torch.float32, "query_offset": offset, "return_lse": True}
        wanted = attend(dense(chosen), *truth, mask, **options)
        assert all(map(close, found, wanted))
        dead = found[1] == NOTHING
        assert bool(dead.any()) == (n == 0 and mask is not None and not bool(mask.any(1).all()))
        assert not found[0][dead].any()
        grads = torch.randn_like(found[0]), torch.randn_like(found[1])
        into = grads[0].masked_fill(dead[..., None], float("nan")), grads[1].masked_fill(dead, float("inf"))
        of = [x.double().masked_fill(dead.view(*dead.shape, *(1,) * (x.ndim - 3)), 0.0) for x in grads]
        pairs = torch.autograd.grad(found, own, into), torch.autograd.grad(wanted, truth, of, materialize_grads=True)
        for place, (x, y) in enumerate(zip(*pairs, strict=True)):
            assert x.shape == own[place].shape and close(x, y), place
        if mask is not None:
            absent = ~mask[:, None, :, None]
            assert not any(x.masked_fill(~absent, 0.0).any() for x in pairs[0][3:]), "exactly zero"


def test_half_precision_has_its_tolerance() -> None:
    attention = compile(TWO)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in draw(37, 50, 7)]
        o = attend(attention, *inputs)
        kept = [x.long() for x in attention.select(*inputs[:2])]
        wanted = attend(dense(TWO), *inputs, indices=kept)
        assert o.dtype == dtype and reference.relative_error(o.detach(), wanted.detach()) <= reference.tolerance(dtype)
        assert {x.dtype for x in torch.autograd.grad(o.sum(), inputs)} == {dtype}


def test_no_global_tokens_are_none_given() -> None:
    inputs = draw(37, 50, 0)
    o, lse, *grads = gradients(compile(TWO), inputs, torch.ones(2, 0).bool())
    wanted = gradients(lambda q, k, v, **more: compile(TWO)(q, k, v, return_lse=True), inputs[:3] + inputs[:2])
    assert all(map(torch.equal, (o, lse, *grads[:3]), wanted[:5]))
    assert [x.shape for x in grads[3:]] == [(2, 2, 0, D)] * 2
    o, lse, *grads = gradients(compile(TWO), draw(5, 0, 0))
    assert not o.any() and bool((lse == NOTHING).all()) and not any(x.any() for x in grads)


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


class Products(TorchDispatchMode):
    """Notes the dtypes of all that torch multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


def test_torch_multiplies_float64_on_a_gpu() -> None:
    """Where nothing is attended to but globals: float32 could be TF32 there, by a switch that is the user's."""
    decide = compile(TWO).module.product_dtype
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert decide(torch.empty(2, 3, dtype=dtype, device="cuda")) == torch.float64
            assert decide(torch.empty(2, 3, dtype=dtype)) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_keys_as_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are then of float64, and nothing else changes."""
    module, (q, k, v, *shared) = compile(TWO).module, [x.detach().to(dtype) for x in draw(29, 0, 5)]
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]]).bool()

    def both_passes() -> tuple[Tensor, ...]:
        o, lse, saved = module.forward(q, k, v, 0.25, *shared, mask)
        return o, lse, *module.backward(q.sin(), lse.sin(), q, k, v, o, saved, 0.25, *shared, mask)

    with Products() as products:
        wanted = both_passes()
    assert products.dtypes == {torch.float32}
    monkeypatch.setattr(module, "product_dtype", lambda x: torch.float64)
    with Products() as products:
        found = both_passes()
    assert products.dtypes == {torch.float64}
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.gpu
def test_without_keys_never_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    inputs = [x.detach().to("cuda").requires_grad_() for x in draw(129, 0, 70)]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    found = gradients(compile(TWO), inputs)
    wanted = gradients(dense(TWO), truth, indices=[x.long() for x in compile(TWO).select(*inputs[:2])])
    assert all(map(close, found, wanted))


def test_without_queries_gradients_are_zero() -> None:
    o, lse, *grads = gradients(compile(TWO), draw(0, 9, 4))
    assert o.shape == (2, 2, 0, D) and lse.shape == (2, 2, 0)
    assert [x.shape for x in grads] == [(2, 2, n, D) for n in (0, 9, 9, 4, 4)] and not any(x.any() for x in grads)


def test_a_mask_is_as_good_as_leaving_out() -> None:
    inputs = draw(37, 50, 7)
    mask = torch.tensor([True, False, True, True, False, False, True]).expand(2, 7)
    found = gradients(compile(TWO), inputs, mask)
    fewer = [x.detach()[:, :, mask[0]].requires_grad_() for x in inputs[3:]]
    wanted = gradients(compile(TWO), [*inputs[:3], *fewer])
    found = (*found[:5], *(x[:, :, mask[0]] for x in found[5:]))
    assert all(map(close, found, wanted))


def test_what_takes_no_part_has_zero_gradients_whatever_comes_in() -> None:
    inputs, mask = draw(37, 50, 7), torch.arange(14).view(2, 7) % 3 > 0
    o = attend(compile(TWO), *inputs, mask)
    for x in torch.autograd.grad(o, inputs[3:], torch.full_like(o, float("inf"))):
        assert not x.isfinite().all() and not x.masked_fill(mask[:, None, :, None], 0.0).any()


def test_strides_do_not_matter() -> None:
    inputs = draw(37, 50, 8)
    wanted = gradients(compile(TWO), inputs, torch.arange(8).expand(2, 8) % 3 > 0)
    apart = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    mask = (torch.arange(16).expand(2, 16) // 2 % 3 > 0)[:, ::2]
    assert not mask.is_contiguous() and all(map(torch.equal, gradients(compile(TWO), apart, mask), wanted))


class Largest(TorchDispatchMode):
    """The most elements, of four bytes, of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.nbytes // 4 for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_memory_is_bounded_with_many_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compile(TWO).module
    monkeypatch.setattr(module, "CHUNK", 2**15)
    q, k, v, k_global, v_global = (x.detach() for x in draw(600, 50, 500))
    with Largest() as forward:
        o, _, saved = module.forward(q, k, v, 0.25, k_global, v_global)
    with Largest() as backward:
        module.backward(o, None, q, k, v, o, saved, 0.25, k_global, v_global)
    assert max(forward.elements, backward.elements) <= max(2**15, 4 * 600 * D), "all logits are a million"


# ---- torch's machinery ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_torch_knows_the_operator() -> None:
    name = compile(TWO).module.OPERATOR
    inputs, mask = draw(37, 50, 7), torch.arange(14).view(2, 7) % 3 > 0
    for more in ((*inputs[3:],), (*inputs[3:], mask)):
        torch.library.opcheck(getattr(torch.ops.llsa, name), (*inputs[:3], 0.25, *more))
        q, k, v, *others = (x.detach() for x in (*inputs[:3], *more))
        o, lse, saved = getattr(torch.ops.llsa, name)(q, k, v, 0.25, *others)
        torch.library.opcheck(getattr(torch.ops.llsa, name + "_backward"), (o, lse, q, k, v, o, saved, 0.25, *others))


@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_for_all_numbers_of_globals(masked: bool, fresh_dynamo: None) -> None:
    compiled = torch.compile(compile(TWO), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((37, 50, 7), (90, 21, 64), (64, 63, 2), (21, 22, 130)):
            inputs, mask = draw(*sizes), torch.arange(2 * sizes[2]).view(2, -1) % 3 > 0 if masked else None
            assert all(map(torch.equal, gradients(compiled, inputs, mask), gradients(compile(TWO), inputs, mask)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_for_any_number_of_globals(strict: bool) -> None:
    attention = compile(TWO)

    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return attend(attention, *inputs)

    m, n, g = (torch.export.Dim(name, min=2) for name in "mng")
    inputs, mask = [x.detach() for x in draw(40, 50, 9)], torch.ones(2, 9).bool()
    shapes = (({2: m}, {2: n}, {2: n}, {2: g}, {2: g}, {1: g}),)
    program = torch.export.export(Model(), (*inputs, mask), dynamic_shapes=shapes, strict=strict).module()
    for sizes in ((77, 20, 33), (5, 64, 2)):
        others, mask = [x.detach() for x in draw(*sizes)], torch.arange(2 * sizes[2]).view(2, -1) % 3 > 0
        assert torch.equal(program(*others, mask), attend(attention, *others, mask))


DIMS = [
    (0,) * 6,
    (0, 0, 0, None, None, None),
    (None, None, None, 0, 0, 0),
    (0, None, None, 1, 0, None),
    (None,) * 5 + (0,),
]


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_gradients_of_every_sample(dims: tuple[int | None, ...]) -> None:
    attention = compile(TWO)

    def loss(*sample: Tensor) -> Tensor:
        return (attend(attention, *(x[None] for x in sample)) * torch.linspace(-1, 2, D)).square().sum()

    inputs = [*(x.detach() for x in draw(29, 31, 5)), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()]
    given = [x[0] if at is None else x.movedim(0, at) for x, at in zip(inputs, dims, strict=True)]
    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3, 4)), in_dims=dims)(*given)
    for sample in range(2):
        own = [x[0 if at is None else sample] for x, at in zip(inputs, dims, strict=True)]
        leaves = [x.clone().requires_grad_() for x in own[:5]]
        wanted = torch.autograd.grad(loss(*leaves, own[5]), leaves)
        assert all(close(x[sample], y) for x, y in zip(found, wanted, strict=True))


def test_functional_gradients_are_autograd_to_the_bit() -> None:
    inputs, mask = draw(29, 31, 5), torch.arange(10).view(2, 5) % 3 > 0

    def loss(*x: Tensor) -> Tensor:
        return attend(compile(TWO), *x, mask).square().sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs)
    assert all(map(torch.equal, torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*(x.detach() for x in inputs)), wanted))


def test_several_gradients_at_once() -> None:
    inputs = draw(29, 31, 5)
    o = attend(compile(TWO), *inputs)
    many = torch.randn(3, *o.shape)
    found = torch.autograd.grad(o, inputs, many, is_grads_batched=True, retain_graph=True)
    for index in range(3):
        wanted = torch.autograd.grad(o, inputs, many[index], retain_graph=True)
        assert all(close(x[index], y) for x, y in zip(found, wanted, strict=True))


def test_gradients_of_gradients_and_forward_mode_raise() -> None:
    inputs = draw(9, 9, 3)
    (first,) = torch.autograd.grad(attend(compile(TWO), *inputs).sum(), inputs[3], create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are not available"):
        torch.autograd.grad(first.sum(), inputs[4])
    inputs = [x.detach() for x in inputs]
    with pytest.raises(NotImplementedError, match="forward-mode derivatives are not available"):
        torch.func.jvp(lambda x: attend(compile(TWO), *inputs[:3], x, x), (inputs[3],), (inputs[3],))


def test_a_gradient_of_one_of_them_alone() -> None:
    inputs = [x.detach() for x in draw(29, 31, 5)]
    for place in range(5):
        own = [x.clone().requires_grad_(place == i) for i, x in enumerate(inputs)]
        (found,) = torch.autograd.grad(attend(compile(TWO), *own).square().sum(), own[place])
        every = [x.clone().requires_grad_() for x in inputs]
        assert torch.equal(found, torch.autograd.grad(attend(compile(TWO), *every).square().sum(), every)[place])


def test_meta_and_fake_tensors() -> None:
    inputs = [x.detach().to("meta").requires_grad_() for x in draw(29, 31, 5)]
    o = attend(compile(TWO), *inputs, torch.ones(2, 5, device="meta").bool())
    grads = torch.autograd.grad(o.sum(), inputs)
    assert o.is_meta and [x.shape for x in grads] == [x.shape for x in inputs]
    with FakeTensorMode():
        inputs = [torch.randn(2, 2, n, D, requires_grad=True) for n in (29, 0, 0, 5, 5)]
        _, _, *grads = gradients(compile(TWO), inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_under_autocast_globals_are_cast_too() -> None:
    for n in (31, 0):
        inputs = draw(29, n, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = attend(compile(TWO), *inputs)
        assert torch.equal(o, attend(compile(TWO), *(x.bfloat16() for x in inputs)))
        assert {x.dtype for x in torch.autograd.grad(o.sum(), inputs)} == {torch.float32}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    inputs = draw(29, 31, 5)
    attention = compile(TWO)
    wanted = torch.autograd.grad(attend(attention, *inputs).square().sum(), inputs)
    o: Any = checkpoint(lambda *x: attend(attention, *x), *inputs, use_reentrant=reentrant)
    o.square().sum().backward()
    assert all(x.grad is not None and torch.equal(x.grad, y) for x, y in zip(inputs, wanted, strict=True))


def test_deterministic_mode_and_a_profiler() -> None:
    inputs = draw(29, 31, 5)
    wanted, name = gradients(compile(TWO), inputs), f"llsa::{compile(TWO).module.OPERATOR}"
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, gradients(compile(TWO), inputs), wanted))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert all(map(torch.equal, gradients(compile(TWO), inputs), wanted))
    assert {name, name + "_backward"} <= {event.key for event in profile.key_averages()}


def test_flops_are_asked_for_with_the_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    def flops(heads: int, kv_heads: int, m: int, n: int, g: int = 0) -> tuple[int, int, int, int]:
        return heads + 100 * m + 10_000 * n + 1_000_000 * g, 7 * g, 11, 13

    attention = compile(TWO)
    monkeypatch.setattr(attention.module, "flops", flops)
    inputs = draw(29, 31, 5)
    with FlopCounterMode(display=False) as forward:
        o = attend(attention, *inputs)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (flops(4, 4, 29, 31, 5)[0], 35)


# ---- errors -----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception], str]] = [
    (lambda k, v, m: (k[:1], v, m), ValueError, r"k_global: expected \[2, 2, G, 16\] like q, got \[1, 2, 5, 16\]"),
    (lambda k, v, m: (k[:, :1], v, m), ValueError, r"k_global: expected \[2, 2, G, 16\] like q, got \[2, 1, 5, 16\]"),
    (lambda k, v, m: (k[..., :8], v, m), ValueError, r"k_global: expected head dim 16, got 8 in shape \[2, 2, 5, 8\]"),
    (lambda k, v, m: (k[0], v, m), ValueError, r"k_global: expected 4 dimensions \[B, H, G, 16\], got shape"),
    (lambda k, v, m: (k, v[:, :, :4], m), ValueError, r"v_global: expected shape \[2, 2, 5, 16\] like k_global, got"),
    (lambda k, v, m: (k.half(), v, m), TypeError, "k_global: expected torch.float32 like q, got torch.float16"),
    (lambda k, v, m: (k, v.to("meta"), m), ValueError, "v_global: expected device cpu like q, got meta"),
    (lambda k, v, m: (k, [v], m), TypeError, r"v_global: expected a tensor \[B, H, G, 16\], got list"),
    (lambda k, v, m: (k, None, None), ValueError, "k_global, v_global: expected both or neither, got k_global alone"),
    (lambda k, v, m: (None, v, m), ValueError, "expected both or neither, got v_global and global_mask alone"),
    (lambda k, v, m: (None, None, m), ValueError, "expected both or neither, got global_mask alone"),
    (lambda k, v, m: (k, v, m.float()), TypeError, "global_mask: expected a bool tensor .*, got torch.float32"),
    (lambda k, v, m: (k, v, m.tolist()), TypeError, r"global_mask: expected a bool tensor \[B, G\], True .*, got list"),
    (lambda k, v, m: (k, v, m[:, None, None]), ValueError, r"bool tensor \[B, G\], True where a token takes part, here "
     r"\[2, 5\], got \[2, 1, 1, 5\]"),
    (lambda k, v, m: (k, v, m[:, :4]), ValueError, r"global_mask: .* here \[2, 5\], got \[2, 4\]"),
    (lambda k, v, m: (k, v, m.to("meta")), ValueError, "global_mask: expected device cpu like q, got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_refused(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    q, k, v, k_global, v_global = draw(29, 31, 5)
    with pytest.raises(error, match=message):
        attend(compile(TWO), q, k, v, *change(k_global, v_global, torch.ones(2, 5).bool()))
