"""The model: order, rotation and modulation are right, for every attention, and all of it has a part in learning."""

import pytest
import torch
from model import PixelDiT, gelu

ALL = {"name": "everything", "head_dim": 32, "levels": [{"block": 16, "topk": 512}], "enrich": "none"}
"""Every block is kept, and nothing else attended to: dense attention."""


def model(attention: object, size: tuple[int, int] = (12, 20), **more: object) -> PixelDiT:
    """With modulations and a head that are not 0, as they are when a model has learnt."""
    torch.manual_seed(0)
    made = PixelDiT(size, attention, channels=64, depth=2, heads=2, **more)  # type: ignore[arg-type]
    for module in (made.modulation, made.head):
        torch.nn.init.normal_(module.weight, std=0.05)
    return made


@pytest.mark.parametrize("order", ["2d", "raster"])
@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_a_spec_that_keeps_everything_is_dense_in_any_order(order: str, layout: str) -> None:
    x, t = torch.randn(2, 3, 12, 20), torch.tensor([0.2, 0.9])
    dense, sparse = model("dense"), model(ALL, order=order, layout=layout)
    assert torch.allclose(sparse.velocity(x, t), dense.velocity(x, t), atol=1e-5)
    assert sparse.permutation.equal(torch.arange(240)) == (order == "raster")


@pytest.mark.parametrize("batch", [1, 3])
def test_modulating_weights_is_modulating_tokens(batch: int) -> None:
    x, t = torch.randn(batch, 240, 3), torch.rand(batch)
    made = []
    for modulate in ("weights", "tokens"):
        one = model("dense", modulate=modulate)
        said = one(x, t)
        said.square().mean().backward()
        made.append([said, *(parameter.grad for parameter in one.parameters())])
    for weights, tokens in zip(*made, strict=True):
        assert (weights - tokens).norm() < 1e-5 * tokens.norm()


@pytest.mark.parametrize("attention", ["small", "dense", "none"])
def test_every_parameter_has_a_part(attention: str) -> None:
    one = model(attention)
    one(torch.randn(2, 240, 3), torch.rand(2)).square().mean().backward()
    silent = [name for name, x in one.named_parameters() if x.grad is None or not x.grad.any()]
    assert silent == []


@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_logits_depend_on_how_far_pixels_are_apart_alone(layout: str) -> None:
    """All pixels have the same query and the same key before they are turned."""
    one = model("dense", (6, 7), layout=layout)
    block = one.blocks[0]
    seen: list[torch.Tensor] = []
    block.attend.register_forward_pre_hook(lambda _, qkv: seen.extend(qkv))  # type: ignore[operator, union-attr]
    block.attention(torch.randn(1, 1, 3 * 64).expand(1, 42, -1), one.cos, one.sin)  # type: ignore[operator]
    q, k = (x[0].unflatten(1, (6, 7)) for x in seen[:2])  # [H, row, column, D]
    logits = torch.einsum("hyxd,hvud->hyxvu", q, k)
    assert torch.allclose(logits[:, 1:, 1:, 1:, 1:], logits[:, :-1, :-1, :-1, :-1], atol=1e-4)
    assert (logits[:, 0, 0, 0, 1] - logits[:, 0, 0, 1, 0]).abs().min() > 1e-3  # rows are not columns
    assert (logits[:, 0, 0, 0, 1] - logits[:, 0, 0, 0, 2]).abs().min() > 1e-3
    assert torch.allclose(q.square().mean(-1), torch.ones(2, 6, 7), atol=1e-3)


def test_sharpness_is_the_size_of_a_heads_queries() -> None:
    one, seen = model("dense", (6, 7)), list[torch.Tensor]()
    block = one.blocks[0]
    block.attend.register_forward_pre_hook(lambda _, qkv: seen.extend(qkv))  # type: ignore[operator, union-attr]
    block.sharpness.data = torch.tensor([1.0, 3.0])
    block.attention(torch.randn(1, 42, 3 * 64), one.cos, one.sin)  # type: ignore[operator]
    sizes = [x.square().mean(-1).sqrt()[0, :, 0] for x in seen[:2]]
    assert torch.allclose(torch.stack(sizes), torch.tensor([[1.0, 3.0], [1.0, 1.0]]), atol=1e-3)


def test_gelu_is_that_of_torch() -> None:
    x = torch.linspace(-9, 9, 1001, requires_grad=True)
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(gelu(x), wanted, atol=1e-6)
    ours, slopes = (torch.autograd.grad(y.sum(), x)[0] for y in (gelu(x), wanted))
    assert torch.allclose(ours, slopes, atol=1e-6)


def test_a_new_model_says_nothing() -> None:
    assert not PixelDiT((8, 8), "small", channels=64, depth=1, heads=2)(torch.randn(1, 64, 3), torch.rand(1)).any()


def test_a_picture_comes_back_from_its_tokens() -> None:
    one, x = model("small", (9, 14)), torch.randn(2, 3, 9, 14)
    assert one.to_pictures(one.to_tokens(x)).equal(x)


def test_checkpointing_changes_no_gradient() -> None:
    x, t = torch.randn(1, 240, 3), torch.rand(1)
    gradients = []
    for checkpointing in (False, True):
        one = model("small", checkpointing=checkpointing)
        one(x, t).square().mean().backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_compiles_as_one_graph() -> None:
    one, x, t = model("small"), torch.randn(1, 240, 3), torch.rand(1)
    assert torch.allclose(torch.compile(one, backend="aot_eager", fullgraph=True)(x, t), one(x, t), atol=1e-6)


def test_a_spec_of_another_head_dim_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"attention: expected head_dim 16 in spec small, .* got 32"):
        PixelDiT((8, 8), "small", channels=64, heads=4)
    with pytest.raises(ValueError, match="heads: expected channels 64 in heads of a multiple of 4"):
        PixelDiT((8, 8), "dense", channels=64, heads=3)
