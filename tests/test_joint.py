"""`merge`: attention over disjoint sets of keys, put together. `joint_attention`: text and image in one sequence."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llsa_gen import Level, Spec, compile, joint_attention, merge, reference


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


# ---- text and image in one sequence -----------------------------------------------------------------------------

D = 16
TWO = Spec(name="joint_two", head_dim=D, levels=(Level(block=4, topk=3), Level(block=4, topk=2)))
NONE = Spec(name="joint_none", head_dim=D, levels=(Level(block=8, topk=2), Level(block=3, topk=2)), enrich="none")
SIZES = [(3, 40, 4), (0, 37, 5), (6, 21, 0), (3, 0, 2), (0, 30, 0), (1, 1, 0), (0, 0, 0)]
"""Text tokens before the image, image tokens, text tokens after it."""


def sequence(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [2, 2, tokens, D]."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, 2, tokens, D, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def close(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.detach().double(), wanted.detach().double()
    same = reference.relative_error(found, wanted) <= 1e-5 or bool((found - wanted).abs().max() <= 1e-5)
    return found.shape == wanted.shape and same


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """o and the gradients."""
    o = run(*inputs)
    return o, *torch.autograd.grad((o * torch.linspace(-1, 2, D)).square().sum(), inputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chosen", [TWO, NONE], ids=lambda chosen: chosen.name)
def test_joint_attention_is_that_of_the_reference(chosen: Spec, sizes: tuple[int, int, int]) -> None:
    first, image, last = sizes
    text, attention = first + last, compile(chosen)
    some = torch.stack([torch.arange(text) % 3 > 0, torch.arange(text) % 2 == 0])
    for mask in (None, some, torch.zeros_like(some), torch.stack([~some[0] | True, some[0] & False])):
        inputs = [x.detach().clone() for x in sequence(text + image)]
        present = torch.ones(2, text + image).bool()
        if mask is not None:  # what takes no part may hold anything
            present = torch.cat([mask[:, :first], torch.ones(2, image).bool(), mask[:, first:]], 1)
            for x in inputs:
                x.masked_fill_(~present[:, None, :, None], float("nan"))
        own, truth = ([x.to(d).requires_grad_() for x in inputs] for d in (torch.float32, torch.float64))
        options: dict[str, Any] = {"globals_first": first, "globals_last": last, "global_mask": mask, "scale": 0.3}
        kept = [x.long() for x in attention.select(*(x[:, :, first : first + image] for x in inputs[:2]))]
        found = joint_attention(attention, *own, **options)
        wanted = reference.joint_attention(chosen, *truth, indices=kept, round_to=torch.float32, **options)
        assert found.dtype == torch.float32 and (not found.numel() or close(found, wanted))
        into = torch.randn_like(found)
        grads = torch.autograd.grad(found, own, into)
        for x, y in zip(grads, torch.autograd.grad(wanted, truth, into.double()), strict=True):
            assert x.shape == y.shape and (not x.numel() or close(x, y))
        absent = ~present[:, None, :, None].expand_as(found)
        assert not any(x[absent].any() for x in (found, *grads)), "exactly zero"


def test_the_parts_are_what_they_are_alone() -> None:
    """Image rows are those of `attention` to the bit; without text or without image there is nothing else."""
    attention, (q, k, v) = compile(TWO), sequence(45)
    o = joint_attention(attention, q, k, v, globals_first=3, globals_last=5)
    k_global, v_global = (torch.cat([x[:, :, :3], x[:, :, 40:]], 2) for x in (k, v))
    wanted = attention(q[:, :, 3:40], k[:, :, 3:40], v[:, :, 3:40], k_global=k_global, v_global=v_global)
    assert isinstance(wanted, Tensor) and torch.equal(o[:, :, 3:40], wanted)
    whole = attention(q, k, v)
    assert isinstance(whole, Tensor) and torch.equal(joint_attention(attention, q, k, v), whole)
    assert torch.equal(joint_attention(attention.module.attention, q, k, v, globals_first=3, globals_last=5), o)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(joint_attention(attention, q, k, v, globals_last=45), dense)


def test_one_split_and_one_cat_a_tensor_and_no_mask_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the gradient of each tensor is one cat, and torch may take its flash kernels."""
    masks: list[Any] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def dense(*inputs: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        masks.append(attn_mask)
        return own(*inputs, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dense)
    q, k, v = sequence(40)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        o = joint_attention(lambda q, k, v, **_: q + k + v, q, k, v, globals_first=5)
    counted = {event.key: event.count for event in profile.key_averages()}
    assert masks == [None] and counted["aten::cat"] == 1, "with text on one side only the result is put together"
    assert type(o.grad_fn).__name__ == "CatBackward0"
    joint_attention(compile(TWO), q, k, v, globals_first=5, global_mask=torch.ones(2, 5).bool())
    assert masks[1].shape == (2, 1, 1, 40)
    joint_attention(compile(TWO), q, k, v, globals_first=40, global_mask=torch.zeros(2, 40).bool())
    assert bool(masks[2].any(-1).all()), "a row without any key is NaN to some of torch's kernels"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
def test_joint_attention_compiled_once_for_all_lengths(masked: bool, fresh_dynamo: None) -> None:
    attention, mask = compile(TWO), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool() if masked else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joint_attention(attention, q, k, v, globals_first=3, globals_last=2, global_mask=mask)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (40, 55, 90):
            pairs = gradients(compiled, sequence(tokens)), gradients(attend, sequence(tokens))
            assert all(map(close, *pairs))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_joint_attention_is_exported_for_any_length(strict: bool) -> None:
    attention = compile(TWO)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return joint_attention(attention, q, k, v, globals_first=3, globals_last=2)

    n = {2: torch.export.Dim("n", min=8)}
    inputs, others = ([x.detach() for x in sequence(tokens)] for tokens in (40, 71))
    program = torch.export.export(Model(), tuple(inputs), dynamic_shapes=(n, n, n), strict=strict).module()
    assert close(program(*others), Model()(*others))


def test_joint_attention_under_autocast_and_checkpointing() -> None:
    attention, inputs = compile(TWO), sequence(45)

    def attend(*x: Tensor) -> Tensor:
        return joint_attention(attention, *x, globals_first=3, globals_last=5)

    wanted = gradients(attend, inputs)
    found = gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs)
    assert all(map(torch.equal, found, wanted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(*inputs)
    assert o.dtype == torch.bfloat16 and reference.relative_error(o.detach(), wanted[0].detach()) < 2e-2
    assert {x.dtype for x in torch.autograd.grad(o.sum(), inputs)} == {torch.float32}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"globals_first": -1}, ValueError, "globals_first: expected an integer of at least 0, got -1"),
    ({"globals_last": -2}, ValueError, "globals_last: expected an integer of at least 0, got -2"),
    ({"globals_last": 1.0}, TypeError, "globals_last: expected an integer of at least 0, got float"),
    ({"globals_first": True}, TypeError, "globals_first: expected an integer of at least 0, got bool"),
    ({"globals_first": 30, "globals_last": 16}, ValueError, "expected together at most 45 tokens, got 30 and 16"),
    ({"global_mask": torch.ones(2, 1).bool()}, ValueError, r"global_mask: .* here \[2, 0\], got \[2, 1\]"),
    ({"globals_first": 3, "global_mask": torch.ones(2, 3)}, TypeError, r"bool tensor \[B, T\], True .* got torch"),
    ({"globals_first": 3, "global_mask": torch.ones(2, 1, 1, 3).bool()}, ValueError,
     r"here \[2, 3\], got \[2, 1, 1, 3\]"),
    ({"globals_first": 3, "global_mask": [True]}, TypeError, r"global_mask: expected a bool tensor .*, got list"),
    ({"globals_first": 3, "global_mask": torch.ones(2, 3, device="meta").bool()}, ValueError,
     "global_mask: expected device cpu like q, got meta"),
    ({"k": torch.zeros(2, 2, 44, D)}, ValueError, r"k: expected shape \[2, 2, 45, 16\] like q, got \[2, 2, 44, 16\]"),
    ({"v": torch.zeros(2, 2, 45, D).half()}, TypeError, "v: expected torch.float32 like q, got torch.float16"),
    ({"v": torch.zeros(2, 2, 45, D, device="meta")}, ValueError, "v: expected device cpu like q, got meta"),
    ({"q": torch.zeros(2, 45, D)}, ValueError,
     r"q: expected 4 dimensions \[B, H, T \+ N, D\], got shape \[2, 45, 16\]"),
    ({"q": None}, TypeError, r"q: expected a tensor \[B, H, T \+ N, D\], got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_no_joint_sequence_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        joint_attention(compile(TWO), **{**dict(zip("qkv", sequence(45), strict=True)), **change})
