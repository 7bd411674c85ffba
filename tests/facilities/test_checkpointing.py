"""Activation checkpointing of a layer: both kinds, and a policy that keeps the operator's outputs."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llsa_gen import Level, Spec, compile
from llsa_gen.nn import LLSAttention

SPEC = Spec(name="checkpointed", head_dim=8, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))
OPERATOR = compile(SPEC).operator


def layer() -> LLSAttention:
    torch.manual_seed(0)
    return LLSAttention(32, 4, SPEC, qk_norm=True, globals_first=2)


def trained(run: Any, module: LLSAttention) -> list[Tensor]:
    x = torch.randn(2, 53, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for every forward pass of the operator."""
    calls: list[str] = []
    module = compile(SPEC).module
    original = module.attend_torch
    monkeypatch.setattr(module, "attend_torch", lambda *args: (calls.append("forward"), original(*args))[1])
    return calls


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator == OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE: dict[str, Any] = {
    "a list": functools.partial(create_selective_checkpoint_contexts, [OPERATOR]),
    "a policy": functools.partial(create_selective_checkpoint_contexts, policy),
}


@pytest.mark.parametrize("reentrant", [True, False])
def test_all_is_made_again(reentrant: bool, attended: list[str]) -> None:
    module = layer()
    wanted = trained(module, module)
    attended.clear()

    def run(x: Tensor) -> Any:
        return checkpoint(module, x, use_reentrant=reentrant)

    if reentrant:  # of whose gradients torch knows by `backward` alone
        x = torch.randn(2, 53, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        found: list[Any] = [y, x.grad, *(parameter.grad for parameter in module.parameters())]
    else:
        found = trained(run, module)
    assert all(map(torch.equal, found, wanted)) and len(attended) == 2


@pytest.mark.parametrize("kind", SELECTIVE)
def test_what_a_policy_names_is_kept(kind: str, attended: list[str]) -> None:
    module = layer()
    wanted = trained(module, module)
    attended.clear()
    found = trained(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=SELECTIVE[kind]), module)
    assert all(map(torch.equal, found, wanted)) and len(attended) == 1


def test_a_policy_holds_under_compile(attended: list[str], fresh_dynamo: None) -> None:
    module = layer()
    wanted = trained(module, module)
    attended.clear()

    def run(x: Tensor) -> Any:
        return checkpoint(module, x, use_reentrant=False, context_fn=SELECTIVE["a policy"])

    found = trained(torch.compile(run, fullgraph=True, backend="aot_eager"), module)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    assert len(attended) == 1
