"""Under torch's machinery: torch.func, gradients of gradients, dynamic lengths, counters, profilers, meta tensors."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import Function
from torch.func import grad, hessian, jacfwd, jacrev, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from llsa_gen import Level, Spec, compile, reference
from llsa_gen.compiler import Attention
from llsa_gen.plan import lower
from llsa_gen.plan.cost import Cost, evaluate
from llsa_gen.schedule import schedule, target

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "spec").glob("*.yaml"))
D = 16
SPECS = (
    Spec(name="all_levels", head_dim=D, levels=(Level(block=4, topk=3), Level(block=3, topk=2))),
    Spec(name="tokens_alone", head_dim=D, levels=(Level(block=4, topk=2),), enrich="none"),
)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def attention(request: pytest.FixtureRequest) -> Attention:
    return compile(request.param)


@pytest.fixture
def inputs() -> Inputs:
    """q, k, v [2, 3, 29, D]."""
    q, k, v = torch.randn(3, 2, 3, 29, D, generator=torch.Generator().manual_seed(0)).unbind()
    return q, k, v


def loss_of(attention: Attention) -> Callable[..., Tensor]:
    """A number that every element of o has another part in."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attention(q, k, v) * torch.linspace(-1, 2, D)).square().sum()  # type: ignore[operator]

    return loss


def test_no_input_of_an_autograd_function_has_a_default(attention: Attention) -> None:
    """torch 2.15 takes those for inputs that were given, and asks the backward pass for their gradients."""
    functions = [x for x in vars(attention.module).values() if isinstance(x, type) and issubclass(x, Function)]
    assert functions
    for function in functions:
        parameters = inspect.signature(function.forward).parameters.values()
        assert all(parameter.default is parameter.empty for parameter in parameters), function


def of_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for one sample [H, N, D] of each."""
    return lambda *sample: function(*(x[None] for x in sample))


def by_autograd(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_close(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert reference.relative_error(x, y) <= reference.tolerance(torch.float32)


# ---- torch.func -------------------------------------------------------------------------------------------------


def test_grad_and_vjp_are_autograd_to_the_bit(attention: Attention, inputs: Inputs) -> None:
    loss = loss_of(attention)
    wanted = by_autograd(loss, *inputs)
    assert all(map(torch.equal, grad(loss, argnums=(0, 1, 2))(*inputs), wanted))
    value, pull, *_ = vjp(loss, *inputs)
    assert torch.equal(value, loss(*inputs))
    assert all(map(torch.equal, pull(torch.ones(())), wanted))


def test_vmap_is_a_batch(attention: Attention, inputs: Inputs) -> None:
    assert_close([vmap(of_one(attention))(*inputs)[:, 0]], [attention(*inputs)])
    for x, y in zip(vmap(of_one(attention.select))(*inputs[:2]), attention.select(*inputs[:2]), strict=True):
        assert torch.equal(x[:, 0], y)
    twice = vmap(vmap(lambda q: attention(q[None], q[None], q[None])[0]))
    assert twice(torch.randn(2, 3, 1, 20, D)).shape == (2, 3, 1, 20, D)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 1, 1)], ids=str)
def test_gradients_of_every_sample(dims: tuple[int | None, ...], attention: Attention, inputs: Inputs) -> None:
    loss = of_one(loss_of(attention))
    given = [x[0] if at is None else x.movedim(0, at) for x, at in zip(inputs, dims, strict=True)]
    found = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*given)
    for sample in range(2):
        wanted = by_autograd(loss, *(x[0 if at is None else sample] for x, at in zip(inputs, dims, strict=True)))
        assert_close([x[sample] for x in found], wanted)


@pytest.mark.parametrize("of", ["o", "lse", "both"])
def test_several_gradients_at_once(of: str, attention: Attention, inputs: Inputs) -> None:
    leaves = [x.requires_grad_() for x in inputs]
    results = attention(*leaves, return_lse=True)
    chosen = [x for x, name in zip(results, ("o", "lse"), strict=True) if of in (name, "both")]
    many = [torch.randn(3, *x.shape) for x in chosen]
    found = torch.autograd.grad(chosen, leaves, many, is_grads_batched=True, retain_graph=True)
    for index in range(3):
        wanted = torch.autograd.grad(chosen, leaves, [x[index] for x in many], retain_graph=True)
        assert_close([x[index] for x in found], wanted)


def test_jacobians(attention: Attention, inputs: Inputs) -> None:
    q, k, v = (x[:1, :1, :9] for x in inputs)

    def sums(q: Tensor) -> Tensor:
        return attention(q, k, v).sum(-1)  # type: ignore[union-attr]

    wanted = torch.autograd.functional.jacobian(sums, q)
    assert_close([jacrev(sums)(q)], [wanted])
    assert_close([torch.autograd.functional.jacobian(sums, q, vectorize=True)], [wanted])


SECOND = {
    "grad of grad": lambda f, q: grad(lambda q: grad(f)(q).sum())(q),
    "jacrev of jacrev": lambda f, q: jacrev(jacrev(f))(q),
    "double backward": lambda f, q: torch.autograd.grad(
        torch.autograd.grad(f(q.requires_grad_()), q, create_graph=True)[0].sum(), q
    ),
}
FORWARD = {
    "hessian": lambda f, q: hessian(f)(q),
    "jacfwd": lambda f, q: jacfwd(f)(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
}


@pytest.mark.parametrize("way", [*SECOND, *FORWARD])
def test_what_is_not_there_raises_one_clear_error(way: str, attention: Attention, inputs: Inputs) -> None:
    q = inputs[0][:1, :1]
    message = "gradients of gradients" if way in SECOND else "forward-mode derivatives"
    with pytest.raises(NotImplementedError, match=f"{message} are not available"):
        (SECOND | FORWARD)[way](lambda q: attention(q, q, q).sum(), q)  # type: ignore[union-attr]


def test_a_graph_of_the_gradient_may_be_asked_for(attention: Attention, inputs: Inputs) -> None:
    """It is no error by itself: other parts of a loss may be differentiated twice."""
    loss = loss_of(attention)
    leaves = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    assert all(map(torch.equal, grads, by_autograd(loss, *inputs)))
    assert all(x.requires_grad for x in grads)


# ---- lse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["lse", "both"])
def test_lse_is_differentiable(of: str, attention: Attention, inputs: Inputs) -> None:
    kept = attention.select(*inputs[:2])
    grad_o, grad_lse = torch.randn(2, 3, 29, D).double() * (of == "both"), torch.randn(2, 3, 29).double()

    def gradients(dtype: torch.dtype, attend: Callable[..., Any], **options: Any) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        o, lse = attend(*leaves, return_lse=True, **options)
        loss = (lse * grad_lse).sum()
        return torch.autograd.grad(loss if of == "lse" else loss + (o * grad_o).sum(), leaves, materialize_grads=True)

    def dense(*leaves: Tensor, **options: Any) -> Any:
        return reference.attention(attention.spec, *leaves, indices=kept, round_to=torch.float32, **options)

    assert_close(gradients(torch.float32, attention), gradients(torch.float64, dense))


# ---- lengths ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_one_graph_for_all_lengths(path: Path, fresh_dynamo: None) -> None:
    attention = compile(path)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q, k, v: attention(q, k, v, return_lse=True), backend=counter, dynamic=True)
    # torch takes two symbols that begin as the same number for one: the first length is that of nothing else
    for n in (100, 2, 3, 64, 65, 257, 1000, 4096):
        q, k, v = (torch.randn(1, 1, n, attention.spec.head_dim, requires_grad=True) for _ in range(3))
        o, lse = step(q, k, v)
        (o.sum() + lse.sum()).backward()
        assert q.grad is not None and q.grad.shape == q.shape
        assert counter.frame_count == 1, f"N = {n} took another graph"


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_program_of_any_length_is_exported(path: Path, strict: bool) -> None:
    attention = compile(path)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v)  # type: ignore[return-value]

    n = {2: torch.export.Dim("n", min=2)}
    q, k, v = torch.randn(3, 1, 2, 70, attention.spec.head_dim).unbind()
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=(n, n, n), strict=strict)
    longer = torch.randn(3, 1, 2, 333, attention.spec.head_dim).unbind()
    assert torch.equal(program.module()(*longer), attention(*longer))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_at_all(dtype: torch.dtype, attention: Attention) -> None:
    q, k, v = (torch.empty(2, 3, 0, D, dtype=dtype, requires_grad=True) for _ in range(3))
    o, lse = attention(q, k, v, return_lse=True)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (2, 3, 0), torch.float32)
    (o.sum() + lse.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == q.shape for x in (q, k, v))
    assert {(*kept.shape, kept.dtype) for kept in attention.select(q, k)} == {(2, 3, 0, 0, torch.int32)}


# ---- who watches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 29, 500])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_flops_are_counted_as_the_cost_model_counts_them(path: Path, n: int) -> None:
    attention = compile(path)
    plan = lower(attention.spec)
    cost = Cost(plan, schedule(plan, target("cuda:90"), 2))
    q, k, v = (torch.randn(2, 3, n, plan.head_dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        o = attention(q, k, v)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()  # type: ignore[union-attr]
    with FlopCounterMode(display=False) as selection:
        attention.select(q, k)
    assert forward.get_total_flops() == evaluate(cost.totals.forward.flops, n, 6)
    assert backward.get_total_flops() == evaluate(cost.totals.backward.flops, n, 6)
    assert 0 < selection.get_total_flops() < forward.get_total_flops()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_profiler_sees_the_operator(requires_grad: bool, attention: Attention, inputs: Inputs) -> None:
    leaves = [x.requires_grad_(requires_grad) for x in inputs]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        o = attention(*leaves)
        attention.select(*leaves[:2])
        if requires_grad:
            o.sum().backward()  # type: ignore[union-attr]
    name = f"llsa::{attention.module.OPERATOR}"
    wanted = {name, f"{name}_select", *([f"{name}_backward"] if requires_grad else [])}
    assert wanted <= {event.key for event in profile.key_averages()}


def test_meta_tensors_give_meta_results(attention: Attention, inputs: Inputs) -> None:
    leaves = [x.to("meta").requires_grad_() for x in inputs]
    o, lse = attention(*leaves, return_lse=True)
    assert (o.device.type, o.shape, o.dtype) == ("meta", inputs[0].shape, torch.float32)
    assert (lse.device.type, lse.shape) == ("meta", (2, 3, 29))
    o.sum().backward()
    assert all(x.grad is not None and x.grad.is_meta for x in leaves)
    for kept, wanted in zip(attention.select(*leaves[:2]), attention.select(*inputs[:2]), strict=True):
        assert (kept.device.type, kept.shape, kept.dtype) == ("meta", wanted.shape, wanted.dtype)
