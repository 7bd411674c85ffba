"""A layer under torch.func: gradients of each sample, an ensemble of models, the Jacobian's products and rows."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

from llsa_gen import Level, Spec
from llsa_gen.nn import LLSAttention

SPEC = Spec(name="functional", head_dim=8, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))


def layer(seed: int = 0) -> LLSAttention:
    torch.manual_seed(seed)
    return LLSAttention(16, 2, SPEC, qk_norm=True, order=(3, 7), globals_last=2)


def tokens(batch: int) -> Tensor:
    return torch.randn(batch, 23, 16, generator=torch.Generator().manual_seed(1))


def close(x: Any, y: Any) -> bool:
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x[None],)).square().sum()


def test_gradients_of_each_sample() -> None:
    module, x = layer(), tokens(3)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    found = vmap(grad(lambda p, one: loss(module, p, one)), in_dims=(None, 0))(parameters, x)
    for at, one in enumerate(x):
        module.zero_grad()
        module(one[None]).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and close(found[name][at], parameter.grad), name


def test_an_ensemble_in_one_call() -> None:
    modules, x = [layer(seed) for seed in range(3)], tokens(2)
    base = copy.deepcopy(modules[0])
    parameters, buffers = stack_module_state(modules)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert all(close(y, module(x)) for y, module in zip(found, modules, strict=True))


def test_a_product_with_the_jacobian_and_its_rows() -> None:
    module, x = layer().requires_grad_(False), tokens(1)
    y, product, *_ = vjp(module, x)
    cotangent = torch.randn_like(y)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(module(leaf), leaf, cotangent)
    assert close(product(cotangent)[0], wanted)
    rows = jacrev(lambda x: module(x)[0, 5, :3])(x)
    for at in range(3):
        (wanted,) = torch.autograd.grad(module(leaf)[0, 5, at], leaf)
        assert close(rows[at], wanted)
