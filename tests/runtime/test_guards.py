"""What a call gets wrong and no shape tells: the wrong layout is warned of, a part of the tokens is refused."""

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llsa_gen import Level, Spec, compile
from llsa_gen.compiler import Attention

D = 8
SPEC = Spec(name="guarded", head_dim=D, levels=(Level(block=4, topk=2),))
OTHER = Spec(name="guarded_too", head_dim=D, levels=(Level(block=4, topk=2),))


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Attention:
    """An operator that has not warned of anything yet."""
    for spec in (SPEC, OTHER):
        monkeypatch.setattr(compile(spec).module, "LAYOUT_WARNINGS", [])
    return compile(SPEC)


def warned(function: Callable[..., Any], *inputs: Any, **options: Any) -> list[str]:
    """The layouts that a call warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(*inputs, **options)
    return [str(one.message) for one in found if "is read as" in str(one.message)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(0))


# ---- the layout -------------------------------------------------------------------------------------------------


def test_tokens_in_the_place_of_heads_are_warned_of_once_a_module(attention: Attention) -> None:
    x = draw(1, 200, 3)
    (said,) = warned(attention, x, x, x)
    for part in ("[1, 200, 3, 8] is read as [B, H, N, 8], 200 heads of 3 tokens", "[B, N, H, 8], 3 heads of 200 tokens",
                 "x.transpose(1, 2)", "layout='BHND'"):  # fmt: skip
        assert part in said
    assert not warned(attention, x, x, x)
    assert len(warned(compile(OTHER), x, x, x)) == 1, "another module has its own"


def test_an_argument_says_that_it_is_meant(attention: Attention) -> None:
    x = draw(1, 200, 3)
    assert not warned(attention, x, x, x, layout="BHND")
    assert not warned(attention.module.attention, x, x, x, layout="BHND")
    o = attention(x, x, x, layout="BHND")
    assert len(warned(attention, x, x, x)) == 1
    assert torch.equal(o, attention(x, x, x))  # type: ignore[arg-type]
    for wrong in ("BNHD", "bhnd", True):
        with pytest.raises(ValueError, match=r"layout: expected 'BHND' or None, got .* x\.transpose\(1, 2\)"):
            attention(x, x, x, layout=wrong)  # type: ignore[arg-type]


def test_slices_of_one_projection_are_warned_of_and_their_transposes_are_not(attention: Attention) -> None:
    q, k, v = draw(1, 200, 3, 2).unbind(2)  # [B, N, H, D]
    assert not warned(attention, *(x.transpose(1, 2) for x in (q, k, v)))
    assert not warned(attention, *(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    many = draw(1, 3, 200).transpose(1, 2)  # [B, H, N, D] of 200 heads: somebody has transposed it
    assert not warned(attention, many, many, many)
    assert len(warned(attention, q, k, v)) == 1


def test_gradients_do_not_hide_it(attention: Attention) -> None:
    x = draw(1, 200, 3).requires_grad_()
    assert len(warned(attention, x, x, x)) == 1


@pytest.mark.parametrize("shape", [(2, 128, 3), (1, 129, 33), (3, 16, 1), (1, 1, 300), (1, 200, 50)], ids=str)
def test_what_models_have_is_not_warned_of(shape: tuple[int, ...], attention: Attention) -> None:
    x = draw(*shape)
    assert not warned(attention, x, x, x)


def test_many_heads_of_few_keys_may_have_many_queries(attention: Attention) -> None:
    q, k = draw(1, 200, 20), draw(1, 200, 3)
    assert not warned(attention, q, k, k)


def test_nothing_that_only_traces_is_warned_of(attention: Attention) -> None:
    x = draw(1, 200, 3)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return attention(x, x, x)

    assert not warned(torch.compile(Model(), fullgraph=True, backend="aot_eager"), x)
    assert not warned(torch.export.export, Model(), (x,))
    assert not warned(torch.jit.trace, Model(), (x,), check_trace=False)
    assert not warned(Model(), x.to("meta"))
    with FakeTensorMode() as mode:
        assert not warned(Model(), mode.from_tensor(x))
    assert not attention.module.LAYOUT_WARNINGS
    assert len(warned(Model(), x)) == 1


def test_many_heads_stay_dynamic(attention: Attention) -> None:
    """The guard must not make a bound of what a compiled program may be called with."""
    compiled = torch.compile(attention.module.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for heads in (100, 150, 220):
            x = draw(2, heads, 5)
            assert torch.equal(compiled(x, x, x), attention(x, x, x, layout="BHND"))  # type: ignore[arg-type]


# ---- parts of the tokens ----------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process that is all there are."""
    if dist.is_initialized():
        pytest.skip("another test's processes")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_inside_context_parallel_it_refuses(mesh: DeviceMesh, attention: Attention) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    x, y = draw(1, 2, 40), draw(1, 2, 80)
    compiled = torch.compile(attention.module.attention, fullgraph=True, backend="aot_eager")
    wanted = attention(x, x, x)
    assert torch.equal(compiled(x, x, x), wanted)  # type: ignore[arg-type]
    with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
        for function in (attention, compiled, lambda q, k, v: attention.select(q, k)):
            with pytest.raises(
                NotImplementedError, match=r"inside torch's context_parallel, .* 40 keys .* query_offset"
            ):
                function(x, x, x)
        leaf = x.clone().requires_grad_()
        with pytest.raises(NotImplementedError, match="context_parallel"), torch.enable_grad():
            attention(leaf, x, x)
        there = attention(x, y, y)  # gathered by the caller
        there_too = attention(y[:, :, 40:], y, y, query_offset=40)
    assert torch.equal(there, attention(x, y, y))  # type: ignore[arg-type]
    assert torch.equal(there_too, attention(y, y, y)[:, :, 40:])  # type: ignore[arg-type, index]
    assert torch.equal(attention(x, x, x), wanted)  # type: ignore[arg-type]


def test_whoever_else_replaces_dense_attention_is_left_alone(
    attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = draw(1, 2, 40)
    wanted = attention(x, x, x)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("called"))
    assert torch.equal(attention(x, x, x), wanted)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", object())
    assert torch.equal(attention(x, x, x), wanted)  # type: ignore[arg-type]


def test_threads_may_warn_at_the_same_time(attention: Attention) -> None:
    x = draw(1, 200, 3)

    def run() -> None:
        workers = [threading.Thread(target=attention, args=(x, x, x)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    assert warned(run)
    assert not warned(attention, x, x, x)
