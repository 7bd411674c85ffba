"""Token orders: permutations that make the blocks of every level compact, and the module that permutes in and out."""

import copy
import io
import math
import pickle
import threading
from pathlib import Path

import curves
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import llsa_gen
from llsa_gen import Level, Spec, order
from llsa_gen.order import grids
from llsa_gen.order.cut import compact
from llsa_gen.order.tubes import tubes

ROOT = Path(__file__).resolve().parents[1]
SPEC = Spec(name="small", head_dim=8, levels=(Level(block=4, topk=2), Level(block=4, topk=2)))

some_blocks = st.lists(st.sampled_from([2, 3, 4, 5, 7, 8, 12, 16, 16, 32, 64]), min_size=1, max_size=3)
shapes = st.one_of(
    st.lists(st.integers(1, 90), min_size=2, max_size=2),
    st.lists(st.integers(1, 20), min_size=3, max_size=3),
    st.lists(st.integers(1, 8), min_size=4, max_size=4),
).map(tuple)


# ---- how compact ---------------------------------------------------------------------------------------------------


@given(shapes, some_blocks)
@settings(max_examples=100)
def test_an_order_is_a_permutation_and_no_worse_than_raster_order(shape: tuple[int, ...], blocks: list[int]) -> None:
    found = order.grid(shape, blocks)
    n = math.prod(shape)
    assert found.permutation.sort().values.equal(torch.arange(n))
    assert found.inverse[found.permutation].equal(torch.arange(n))
    ours, rows = (order.compactness(one, shape, blocks) for one in (found, curves.raster(shape)))
    both = [(x.fill + x.reach, y.fill + y.reach) for x, y in zip(ours, rows, strict=True)]
    assert sum(x for x, _ in both) <= sum(y for _, y in both) + 1e-9  # what docs/orders.md promises
    for x, y in zip(ours, rows, strict=True):
        assert 1 - 1e-9 <= x.fill <= min(1.6 * y.fill, 2.25)
        assert 1 - 1e-9 <= x.reach <= 1.35 * y.reach
        assert x.fill + x.reach <= 1.25 * (y.fill + y.reach)


@given(st.integers(1, 6).map(lambda bits: (1 << bits,) * 2) | st.integers(1, 4).map(lambda bits: (1 << bits,) * 3),
       some_blocks)  # fmt: skip
@settings(max_examples=60)
def test_as_compact_as_the_curves_where_there_are_some(shape: tuple[int, ...], blocks: list[int]) -> None:
    ours = order.compactness(order.grid(shape, blocks), shape, blocks)
    for curve in (curves.morton(shape), curves.hilbert(shape)):
        theirs = order.compactness(curve, shape, blocks)
        assert sum(x.fill + x.reach for x in ours) <= 1.05 * sum(y.fill + y.reach for y in theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert x.fill + x.reach <= 1.15 * (y.fill + y.reach)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8), (4, 4, 4, 4)])
def test_the_curve_that_it_is_measured_against_is_one(shape: tuple[int, ...]) -> None:
    path = torch.stack(curves.places(shape))[:, curves.hilbert(shape).permutation]
    assert (path.diff(dim=1).abs().sum(0) == 1).all()


@given(st.lists(st.sampled_from([(2, 2), (4, 2), (2, 4), (4, 4), (2, 3), (3, 2), (3, 3)]), min_size=1, max_size=3),
       st.integers(1, 4), st.integers(1, 4))  # fmt: skip
@settings(max_examples=60)
def test_boxes_where_the_sides_are_multiples_of_round_ones(
    tiles: list[tuple[int, int]], rows: int, columns: int
) -> None:
    """The same tile at every level: it is the roundest of its size, and all of them nest."""
    tile = tiles[0]
    height, width = (tile[axis] ** len(tiles) for axis in (0, 1))
    blocks = [math.prod(tile)] * len(tiles)
    if max(height, width) > 2 * min(height, width):
        return  # no round box
    found = order.compactness(order.grid((height * rows, width * columns), blocks), (height * rows, width * columns),
                              blocks)  # fmt: skip
    assert all(x.worst_fill == 1 for x in found)


def test_boxes_of_squares() -> None:
    found = order.grid((256, 256), (16, 16))
    for span, side in ((16, 4), (256, 16)):
        rows, columns = found.permutation.view(-1, span) // 256, found.permutation.view(-1, span) % 256
        for x in (rows, columns):
            assert (x.amax(1) - x.amin(1) == side - 1).all()
            assert (x.amin(1) % side == 0).all()
    assert order.compactness(found, (256, 256), (16, 16)) == (order.Compactness(1, 1, 1, 1),) * 2


@pytest.mark.parametrize("shape", [(61, 61), (37, 53), (101, 7), (16, 30, 52)])
@pytest.mark.parametrize("blocks", [(16,), (16, 16), (12, 5)])
def test_no_block_crosses_a_border_into_the_next_row(shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    """In raster order a block has the first and the last cells of a row, and the box around it the whole row."""
    for ours in order.compactness(order.grid(shape, blocks), shape, blocks):
        assert ours.worst_fill <= 3 and ours.worst_reach <= 2.5
    rows = order.compactness(curves.raster(shape), shape, blocks)
    assert shape == (101, 7) or (rows[0].worst_fill > 4 and rows[0].worst_reach > 3.5)


def test_measured_by_hand() -> None:
    """3 rows of 2, blocks of 4 and 2: a box of 3x2 around 4 cells, and one of 2x2 around the last two."""
    given_order = order.from_codes(torch.tensor([0, 1, 4, 2, 3, 5]))
    (found,) = order.compactness(given_order, (3, 2), (4,))
    assert given_order.permutation.tolist() == [0, 1, 3, 4, 2, 5]
    assert found == pytest.approx(((6 / 4 + 4 / 2) / 2, 2, (2.5 / 2 + 2 / 2**0.5) / 2, 2**0.5))


def test_the_table_of_the_document_is_what_is_measured() -> None:
    assert curves.table() in (ROOT / "docs" / "orders.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", [(1021, 1027), (31, 180, 180)])
def test_a_million_tokens(shape: tuple[int, ...]) -> None:
    """How long it takes nobody asks; how many regions are looked at is what it depends on."""
    found = compact(shape, (16, 128, 1024))
    assert (np.bincount(found) == 1).all()
    for x in order.compactness(order.from_codes(np.argsort(found)), shape, (16, 8, 8)):
        assert x.fill < 1.2 and x.reach < 1.2


def test_where_raster_order_is_better_it_is_taken() -> None:
    """2 rows of 6: blocks of 9 and 3 that are walked through come to a little more, at both levels together."""
    assert order.grid((2, 6), (3, 3)).permutation.equal(torch.arange(12))


def test_long_sides_are_no_burden() -> None:
    """Ways to cut are told by widths and numbers of bands, so a long side takes no more of them than a short one."""
    ways = tubes((1 << 30, 2), (16, 1 << 20))
    assert len(ways) < 50 and all(len(bands) <= 2 for way in ways for bands in way.bands)


@pytest.mark.parametrize("shape", [(1,), (0,), (0, 5), (1, 1), (1, 7), (7, 1), (1, 1, 1), (2, 2), (1, 2, 1, 3), (3, 5)])
def test_small_grids(shape: tuple[int, ...]) -> None:
    found = order.grid(shape, (16, 16))
    assert found.permutation.tolist() == list(range(math.prod(shape)))  # one block, in raster order
    assert len(found) == math.prod(shape)


def test_a_line_stays_as_it_is() -> None:
    for shape in (4096, (4096,), (1, 4096), (1, 4096, 1)):
        assert order.grid(shape, (16, 16)).permutation.equal(torch.arange(4096))


# ---- in and out ------------------------------------------------------------------------------------------------------


@given(shapes, some_blocks, st.integers(0, 2), st.booleans())
@settings(max_examples=30)
def test_restored_is_what_was_given(shape: tuple[int, ...], blocks: list[int], dim: int, back: bool) -> None:
    found, n = order.grid(shape, blocks), math.prod(shape)
    x = torch.randn([*(2, 3)[:dim], n, *(2, 3)[dim:]], requires_grad=True)
    dim = dim - 3 if back else dim
    there = found.apply(x, dim)
    assert there.movedim(dim, 0)[0].equal(x.movedim(dim, 0)[found.permutation[0]])
    assert found.restore(there, dim).equal(x)
    (grad,) = torch.autograd.grad(there, x, there.detach())
    assert grad.equal(x)


def test_the_default_dim_is_that_of_heads_and_of_layers() -> None:
    found = order.grid((4, 6), (4,))
    for x in (torch.randn(2, 3, 24, 5), torch.randn(2, 24, 5)):
        assert found.apply(x).equal(x[..., found.permutation, :])


def test_attention_in_and_out() -> None:
    attention = llsa_gen.compile(SPEC)
    found = order.grid((7, 9), SPEC)
    module = order.Ordered(attention, found)
    q, k, v = torch.randn(3, 2, 2, 63, 8).unbind(0)
    wanted, wanted_lse = attention(*(found.apply(x) for x in (q, k, v)), return_lse=True)
    assert module(q, k, v).equal(found.restore(wanted))
    o, lse = module(q, k, v, return_lse=True)
    assert o.equal(found.restore(wanted)) and lse.equal(found.restore(wanted_lse, -1))


class Neighbours(nn.Module):
    """Something that the order matters to: x [B, N, C] to means of 4 tokens, a weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).mean(2).repeat_interleave(4, 1) * self.weight


def test_the_module_has_no_state_of_its_own_and_survives_copies() -> None:
    module = order.Ordered(Neighbours(), order.grid((4, 8), (4,)), dim=1)
    assert [*module.state_dict()] == ["inner.weight"]
    x = torch.randn(2, 32, 3)
    wanted = module(x)
    assert not wanted.equal(module.inner(x))
    tiles = x.unflatten(1, (2, 2, 4, 2)).mean((2, 4), keepdim=True).expand(2, 2, 2, 4, 2, 3).flatten(1, 4)
    assert torch.allclose(wanted, tiles * module.inner.weight)  # 2x2 tiles
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert other(x).equal(wanted)
    assert module.double()(x.double()).dtype == torch.float64 and module.permutation.dtype == torch.int64
    assert {x.device.type for x in module.to("meta").buffers()} == {"meta"}


def test_the_module_compiles_exports_and_differentiates() -> None:
    module = order.Ordered(Neighbours(), order.grid((4, 8), (4,)), dim=1)
    x = torch.randn(2, 32, 3, requires_grad=True)
    wanted = module(x)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.allclose(found, wanted) and torch.allclose(grad, wanted_grad)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=(({0: batch},),))
    more = torch.randn(5, 32, 3)
    assert torch.allclose(exported.module()(more), module(more))
    assert torch.autograd.gradcheck(module.double(), (torch.randn(1, 32, 3).double().requires_grad_(),))


def pictures(x: Tensor) -> Tensor:
    """Tokens of a picture [B, C, H, W], in an order of its own size, in runs of 4 means; and back."""
    found = order.grid((x.shape[2], x.shape[3]), (4,), device=x.device)
    tokens = found.apply(x.flatten(2).mT)
    return found.restore(tokens.cumsum(1)).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("shape", [(1, 2, 6, 8), (1, 2, 5, 7)])
def test_a_shape_may_be_symbolic(shape: tuple[int, ...]) -> None:
    class Pictures(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pictures(x)

    torch._dynamo.reset()
    compiled = torch.compile(pictures, backend="aot_eager", fullgraph=True, dynamic=True)
    height, width = torch.export.Dim("height", min=3, max=50), torch.export.Dim("width", min=3, max=50)
    exported = torch.export.export(Pictures(), (torch.randn(1, 2, 6, 8),), dynamic_shapes=({2: height, 3: width},))
    x = torch.randn(shape)
    assert torch.allclose(compiled(x), pictures(x))
    assert torch.allclose(exported.module()(x), pictures(x))


def test_the_operator_keeps_what_torch_asks_of_one() -> None:
    device = torch.device("cpu")
    torch.library.opcheck(torch.ops.llsa_gen.grid_order.default, ([5, 7], [4], device))
    permutation, _ = torch.ops.llsa_gen.grid_order([5, 7], [4], device)
    assert permutation.equal(order.grid((5, 7), (4,)).permutation)
    assert permutation.data_ptr() != order.grid((5, 7), (4,)).permutation.data_ptr()


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_kept", type(grids._kept)())


@pytest.mark.usefixtures("empty")
def test_the_same_again_for_the_same_arguments() -> None:
    first = order.grid((6, 9), (4, 4))
    assert order.grid([6, 9], SPEC, device="cpu") is first
    assert order.grid(torch.Size((6, 9)), SPEC.model_dump()) is first
    numpys = tuple(np.array([6, 9]))
    assert order.grid(numpys, (4, 4, 16), device=torch.device("cpu")) is first  # 256 tokens: one block
    assert order.grid((9, 6), (4, 4)) is not first
    assert order.grid((6, 9), (4, 5)) is not first


@pytest.mark.usefixtures("empty")
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "KEPT_TOKENS", 100)
    first = order.grid((5, 8), (4,))
    order.grid((5, 9), (4,))
    assert order.grid((5, 8), (4,)) is first  # 85 tokens
    order.grid((5, 10), (4,))  # 135: the one of 45 goes
    assert [sizes for sizes, *_ in grids._kept] == [(5, 8), (5, 10)]
    order.grid((20, 20), (4,))
    assert [sizes for sizes, *_ in grids._kept] == [(20, 20)]


@pytest.mark.usefixtures("empty")
def test_threads_get_the_same() -> None:
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        found.append(order.grid((97, 89), (16, 16)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(one) for one in found}) == 1


@pytest.mark.usefixtures("empty")
def test_what_is_kept_is_good_outside_the_mode_that_it_was_made_in() -> None:
    with FakeTensorMode():
        order.grid((6, 7), (4,))
    with torch.inference_mode():
        order.grid((6, 7), (4,))
    with torch.device("meta"):
        assert order.grid((6, 7), (4,)).permutation.device.type == "meta"
        assert order.grid((6, 7), (4,), device="cpu").permutation.device.type == "cpu"
    x = torch.randn(42, 2, requires_grad=True)
    order.grid((6, 7), (4,)).apply(x).sum().backward()  # a tensor of inference mode could not be saved
    assert x.grad is not None


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    found = order.grid((37, 53), (16, 16), device="cuda")
    assert found is order.grid((37, 53), (16, 16), device="cuda:0")
    assert found.permutation.cpu().equal(order.grid((37, 53), (16, 16)).permutation)
    x = torch.randn(2, 37 * 53, 4, device="cuda", requires_grad=True)
    assert found.restore(found.apply(x)).equal(x)
    assert order.from_codes(torch.tensor([3, 1, 2], device="cuda")).permutation.tolist() == [1, 2, 0]


# ---- codes -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), max_size=40))
def test_codes_are_sorted_and_equal_ones_stay(codes: list[int]) -> None:
    wanted = sorted(range(len(codes)), key=lambda token: codes[token])
    for given_codes in (codes, torch.tensor(codes, dtype=torch.int32), np.array(codes, dtype=np.int64)):
        found = order.from_codes(given_codes)
        assert found.permutation.tolist() == wanted
        assert found.inverse[found.permutation].equal(torch.arange(len(codes)))


def test_the_programs_of_the_document() -> None:
    text = (ROOT / "docs" / "orders.md").read_text(encoding="utf-8")
    programs = text.split("```python\n")[1:]
    assert len(programs) >= 3
    for program in programs:
        exec(compile(program.split("```")[0], "docs/orders.md", "exec"), {})


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("8x8", (4,)), TypeError, r"shape: expected 1 or more integers of at least 0, such as .*, got str"),
        ((8.0, (4,)), TypeError, r"shape: .*, got float"),
        ((True, (4,)), TypeError, r"shape: .*, got bool"),
        (((), (4,)), ValueError, r"shape: .*, got none"),
        (((8, 8.5), (4,)), TypeError, r"shape: .*, got 8.5 among them"),
        (((8, -1), (4,)), ValueError, r"shape: .*, got -1 among them"),
        (((1 << 20, 1 << 20), (4,)), ValueError, r"shape: expected at most 1073741824 cells, got \[1048576, 1048576\]"),
        (((8, 8), 4), TypeError, r"blocks: expected a spec, or its blocks, 1 or more integers of at least 2, got int"),
        (((8, 8), ()), ValueError, r"blocks: .*, got none"),
        (((8, 8), (4, 1)), ValueError, r"blocks: .*, got 1 among them"),
        (((8, 8), (4, "4")), TypeError, r"blocks: .*, got '4' among them"),
        (((8, 8), {"name": "x"}), llsa_gen.LlsaGenError, r"levels"),
        (((8, 8), "none.yaml"), FileNotFoundError, r"none.yaml"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: tuple, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        order.grid(*arguments)


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"device: expected a device of torch, got 'gpu'"):
        order.grid((8, 8), (4,), device="gpu")


def test_what_does_not_fit_an_order_is_refused() -> None:
    found = order.grid((4, 6), (4,))
    with pytest.raises(ValueError, match=r"x: expected 24 tokens along dim -2, got shape \[2, 25, 3\]"):
        found.apply(torch.zeros(2, 25, 3))
    with pytest.raises(TypeError, match=r"x: expected a tensor, got 'list'"):
        found.restore([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim: expected a dimension of x, which has shape \[24\], got -2"):
        found.apply(torch.zeros(24))
    for dim, got in (("a", "str"), (1.0, "float"), (None, "NoneType"), (True, "bool")):
        with pytest.raises(TypeError, match=rf"^dim: expected an integer, got {got}$"):
            found.apply(torch.zeros(2, 24, 3), dim)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected device cpu like the order, got meta"):
        found.apply(torch.zeros(24, 2, device="meta"))
    with pytest.raises(ValueError, match=r"order: expected one of 25 cells, at least 1, got one of 24"):
        order.compactness(found, (5, 5), (4,))
    with pytest.raises(TypeError, match=r"order: expected an llsa_gen.order.Order, got Tensor"):
        order.compactness(found.permutation, (4, 6), (4,))  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    found = order.grid((4, 6), (4,))
    with pytest.raises(TypeError, match=r"inner: expected a module or another callable, got int"):
        order.Ordered(3, found)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"order: expected an llsa_gen.order.Order, got Tensor"):
        order.Ordered(nn.Identity(), found.permutation)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dim: expected an integer, got str"):
        order.Ordered(nn.Identity(), found, "2")  # type: ignore[arg-type]
    module = order.Ordered(nn.Identity(), found, dim=1)
    with pytest.raises(TypeError, match=r"expected at least one positional tensor, got none"):
        module(x=torch.zeros(1, 24, 2))
    with pytest.raises(ValueError, match=r"x: expected 24 tokens along dim 1, got shape \[1, 23, 2\]"):
        module(torch.zeros(1, 23, 2))
    with pytest.raises(ValueError, match=r"result: expected 24 tokens along dim 1, got shape \[1, 12, 2\]"):
        order.Ordered(lambda x: x[:, ::2], found, dim=1)(torch.zeros(1, 24, 2))


@pytest.mark.parametrize(
    ("codes", "kind", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"codes: expected integers \[N\], .*, got shape \[2, 3\]"),
        (torch.zeros(3), TypeError, r"codes: .*, got torch.float32"),
        ([True, False], TypeError, r"codes: .*, got torch.bool"),
        ("abc", TypeError, r"codes: .*, got str"),
        (None, TypeError, r"codes: .*, got NoneType"),
    ],
)
def test_what_are_no_codes_is_refused(codes: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        order.from_codes(codes)
