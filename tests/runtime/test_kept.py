"""Lists that are given: attention follows them as the reference does, and looks at their entries if it is asked to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config as shape_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llsa_gen import Level, Spec, compile, reference


def spec(name: str, head_dim: int, *levels: tuple[int, int], **more: Any) -> Spec:
    return Spec(name=name, head_dim=head_dim, levels=tuple(Level(block=b, topk=k) for b, k in levels), **more)


D = 16
TWO = spec("kept_two", D, (4, 3), (4, 2))
SPECS = [
    TWO,
    spec("kept_uneven", 24, (5, 2), (3, 2), (2, 2), reweight=False),
    spec("kept_some", D, (4, 2), (4, 3), (2, 2), enrich=(1, 3)),
    spec("kept_fine", D, (4, 2), (4, 3), enrich=(1,)),
    spec("kept_none", D, (16, 2), (2, 2), enrich="none"),
    spec("kept_one", D, (2, 65)),
    spec("kept_wide", D, (4, 7), (2, 1)),  # a level keeps more than its candidates: lists may all the same
]
CASES = [(37, 90, 0), (90, 37, 19), (64, 64, 0), (21, 50, 1000), (3, 50, 2), (50, 2, 0), (1, 1, 0)]
"""M, N and the offset of the queries."""
EVERYWHERE = [
    pytest.param("cpu"),
    pytest.param("cpu", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CASES_EVERYWHERE = [
    pytest.param(case, *where.values, marks=where.marks, id=f"{case}-{where.values[0]}")
    for where in EVERYWHERE
    for case in (CASES[4:][:1] if pytest.mark.interpret in where.marks else CASES)  # which is slow
]
NOTHING = float("-inf")


def draw(m: int, n: int, head_dim: int = D, g: int = 0) -> list[Tensor]:
    """q, k, v and, if there are any, k_global and v_global of two batch entries and two heads."""
    generator = torch.Generator().manual_seed(1000 * m + n)
    sizes = (m, n, n, g, g) if g else (m, n, n)
    return [torch.randn(2, 2, x, head_dim, generator=generator).requires_grad_() for x in sizes]


def query_rows(chosen: Spec, m: int, offset: int) -> list[int]:
    """T_l(M) of every level."""
    spans = [chosen.span(level) for level in range(1, chosen.num_levels + 1)]
    return [(offset + m - 1) // span - offset // span + 1 if m else 0 for span in spans]


def parents(chosen: Spec, level: int, rows: int, offset: int) -> Tensor:
    """The query token of the level above for each of a level, as docs/semantics.md says it."""
    a, block = torch.arange(rows), chosen.block(level + 1)
    return (a + offset // chosen.span(level)) // block - offset // chosen.span(level + 1)


def own_lists(chosen: Spec, m: int, n: int, offset: int, narrow: int = 0) -> list[Tensor]:
    """Lists of nobody's selection: children of what is kept above, in any order, -1 anywhere, some rows of it alone."""
    generator = torch.Generator().manual_seed(m + n)
    found: list[Tensor] = []
    for level in range(chosen.num_levels, 0, -1):
        tokens, rows = -(-n // chosen.span(level)), query_rows(chosen, m, offset)[level - 1]
        width = max(1, chosen.topk(level) - narrow)
        legal = torch.ones(2, 2, rows, tokens, dtype=torch.bool)
        if level < chosen.num_levels:
            above = found[-1][:, :, parents(chosen, level, rows, offset)]
            legal = ((torch.arange(tokens) // chosen.block(level + 1))[:, None] == above[..., None, :]).any(-1)
        rank = torch.rand(2, 2, rows, tokens, generator=generator).masked_fill(~legal, -1.0)
        best = rank.topk(min(width, tokens), -1)
        lists = best.indices.masked_fill(best.values < 0.3, -1)  # some legal ones are left out, too
        lists = torch.nn.functional.pad(lists, (0, width - lists.shape[3]), value=-1)
        lists = lists.gather(-1, torch.rand(lists.shape, generator=generator).argsort(-1))
        lists[:, 0, rows // 2 :: 5] = -1
        found.append(lists.int())
    return found[::-1]


def close(found: Tensor, wanted: Tensor) -> bool:
    """To float32's tolerance, also of what is 0 by cancellation, and what is infinite is so in both."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    dead = found == NOTHING
    if found.shape != wanted.shape or not torch.equal(dead, wanted == NOTHING):
        return False
    found, wanted = found.masked_fill(dead, 0.0), wanted.masked_fill(dead, 0.0)
    return reference.relative_error(found, wanted) <= 1e-5 or bool((found - wanted).abs().max() <= 1e-5)


def gradients(attention: Callable[..., Any], inputs: Sequence[Tensor], **more: Any) -> tuple[Tensor, ...]:
    """o, lse and the gradients of all inputs."""
    if len(inputs) == 5:
        more |= {"k_global": inputs[3], "v_global": inputs[4]}
    o, lse = attention(*inputs[:3], return_lse=True, **more)
    weights = torch.linspace(-1, 2, o.shape[-1], device=o.device)
    finite = lse.masked_fill(lse == NOTHING, 0.0)
    return o, lse, *torch.autograd.grad((o * weights).square().sum() + finite.sin().sum(), inputs)


def assert_like_the_reference(
    chosen: Spec, inputs: Sequence[Tensor], kept: Sequence[Tensor], offset: int = 0, **more: Any
) -> Tensor:
    """o, lse and all gradients, with NaN coming in where nothing is attended to; returns lse."""
    own = [x.detach().clone().requires_grad_() for x in inputs]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    options = {"query_offset": offset, "return_lse": True}
    pairs = [{}, {}] if len(inputs) == 3 else [{"k_global": x[3], "v_global": x[4], **more} for x in (own, truth)]
    found = compile(chosen)(*own[:3], kept=kept, check_kept=chosen.name != "kept_wide", **options, **pairs[0])
    ids = [x.long() for x in kept]
    wanted = reference.attention(chosen, *truth[:3], indices=ids, round_to=torch.float32, **options, **pairs[1])
    assert all(map(close, found, wanted))
    dead = found[1] == NOTHING
    grads = torch.randn_like(found[0]), torch.randn_like(found[1])
    into = grads[0].masked_fill(dead[..., None], float("nan")), grads[1].masked_fill(dead, float("inf"))
    of = [x.double().masked_fill(dead.view(*dead.shape, *(1,) * (x.ndim - 3)), 0.0) for x in grads]
    both = torch.autograd.grad(found, own, into), torch.autograd.grad(wanted, truth, of, materialize_grads=True)
    for place, (x, y) in enumerate(zip(*both, strict=True)):
        assert x.shape == own[place].shape and close(x, y), place
    return found[1]


@pytest.mark.parametrize(("case", "device"), CASES_EVERYWHERE)
@pytest.mark.parametrize("chosen", SPECS[:-1], ids=lambda chosen: chosen.name)
def test_lists_of_anybody_are_followed(chosen: Spec, case: tuple[int, int, int], device: str) -> None:
    m, n, offset = case
    inputs = [x.detach().to(device) for x in draw(m, n, chosen.head_dim)]
    nothing = False
    for narrow in (0, 1):
        kept = [x.to(device) for x in own_lists(chosen, m, n, offset, narrow)]
        nothing |= bool((assert_like_the_reference(chosen, inputs, kept, offset) == NOTHING).any())
    if chosen.name in ("kept_none", "kept_fine") and m > 3 and n > 3:
        assert nothing, "some queries have nothing to attend to"


def test_lists_beyond_what_is_kept_above_are_followed_on_the_cpu() -> None:
    """And may be wider than any selection: 7 blocks under one token of two."""
    chosen = SPECS[-1]
    generator = torch.Generator().manual_seed(0)
    kept = [torch.rand(2, 2, rows, tokens, generator=generator).argsort(-1)[..., :width].int()
            for rows, tokens, width in ((10, 13, 7), (5, 7, 1))]  # fmt: skip
    assert_like_the_reference(chosen, draw(37, 50), kept)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_beside_globals_and_a_mask(device: str) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool().to(device)
    for chosen in (TWO, SPECS[4]):
        inputs = [x.detach().to(device) for x in draw(37, 90, g=5)]
        kept = [x.to(device) for x in own_lists(chosen, 37, 90, 7)]
        lse = assert_like_the_reference(chosen, inputs, kept, 7, global_mask=mask)
        assert bool((lse[1] == NOTHING).any()) == (chosen is not TWO) and bool(lse[0].isfinite().all())


@pytest.mark.parametrize(("case", "device"), CASES_EVERYWHERE)
@pytest.mark.parametrize("chosen", SPECS, ids=lambda chosen: chosen.name)
def test_a_selection_used_again_gives_the_same_bits(chosen: Spec, case: tuple[int, int, int], device: str) -> None:
    m, n, offset = case
    attention, inputs = compile(chosen), [x.detach().to(device).requires_grad_() for x in draw(m, n, chosen.head_dim)]
    kept = attention.select(*inputs[:2], query_offset=offset)
    found = gradients(attention, inputs, kept=kept, query_offset=offset, check_kept=True)
    assert all(map(torch.equal, found, gradients(attention, inputs, query_offset=offset)))


def test_shards_with_their_part_of_the_lists_are_the_whole() -> None:
    attention, (q, k, v) = compile(TWO), draw(100, 70)
    kept = own_lists(TWO, 100, 70, 0)
    whole = attention(q, k, v, kept=kept)
    for begin, end in ((0, 32), (32, 48), (48, 100)):
        part = [x[:, :, begin // TWO.span(i) : -(-end // TWO.span(i))] for i, x in enumerate(kept, start=1)]
        found = attention(q[:, :, begin:end], k, v, kept=part, query_offset=begin, check_kept=True)
        assert torch.equal(found, whole[:, :, begin:end])  # type: ignore[arg-type, index]


@pytest.mark.parametrize(("m", "n"), [(0, 9), (9, 0), (0, 0)])
def test_no_queries_or_no_keys(m: int, n: int) -> None:
    inputs = draw(m, n)
    o, lse, *grads = gradients(compile(TWO), inputs, kept=compile(TWO).select(*inputs[:2]), check_kept=True)
    assert not o.any() and bool((lse == NOTHING).all()) and not any(x.any() for x in grads)
    inputs = draw(m, n, g=3)
    found = gradients(compile(TWO), inputs, kept=compile(TWO).select(*inputs[:2]))
    assert all(map(torch.equal, found, gradients(compile(TWO), inputs)))


def test_strides_do_not_matter() -> None:
    inputs, kept = draw(37, 90), own_lists(TWO, 37, 90, 0)
    apart = [torch.stack([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0] for x in kept]
    assert not any(x.is_contiguous() for x in apart)
    pairs = gradients(compile(TWO), inputs, kept=apart), gradients(compile(TWO), inputs, kept=tuple(kept))
    assert all(map(torch.equal, *pairs))


# ---- torch's machinery ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_torch_knows_the_operator() -> None:
    name, inputs, kept = compile(TWO).module.OPERATOR, draw(37, 50, g=5), own_lists(TWO, 37, 50, 0)
    for more in ((None, None, None, kept), (*inputs[3:], torch.ones(2, 5).bool(), kept)):
        torch.library.opcheck(getattr(torch.ops.llsa, name), (*inputs[:3], 0.25, *more))
        q, k, v, *others = (x.detach() if isinstance(x, Tensor) else x for x in (*inputs[:3], *more))
        o, lse, saved = getattr(torch.ops.llsa, name)(q, k, v, 0.25, *others)
        torch.library.opcheck(getattr(torch.ops.llsa, name + "_backward"), (o, lse, q, k, v, o, saved, 0.25, *others))


@pytest.mark.parametrize("offset", [0, 5])
def test_one_graph_for_all_lengths(offset: int, fresh_dynamo: None) -> None:
    compiled = torch.compile(compile(TWO), fullgraph=True, dynamic=True, backend="aot_eager")
    # lengths that happen to be the same in the first call are not for that the same in all
    with torch._dynamo.config.patch(error_on_recompile=True), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        for m, n in ((37, 50), (90, 70), (64, 63)):
            inputs = draw(m, n, g=3)
            options = {"kept": own_lists(TWO, m, n, offset), "query_offset": offset}
            pairs = gradients(compiled, inputs, **options), gradients(compile(TWO), inputs, **options)
            assert all(map(torch.equal, *pairs))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_for_any_length(strict: bool) -> None:
    attention = compile(TWO)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor]) -> Tensor:
            return attention(q, k, v, kept=kept)  # type: ignore[return-value]

    any_length, inputs = {2: torch.export.Dim.DYNAMIC}, [x.detach() for x in draw(40, 50)]
    shapes = (any_length, any_length, any_length, [any_length, any_length])
    kept = own_lists(TWO, 40, 50, 0)
    program = torch.export.export(Model(), (*inputs, kept), dynamic_shapes=shapes, strict=strict).module()
    for m, n in ((77, 20), (21, 64)):
        others, kept = [x.detach() for x in draw(m, n)], own_lists(TWO, m, n, 0)
        assert torch.equal(program(*others, kept), Model()(*others, kept))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0, 0), (0, 0, 0, None), (None, None, None, 0), (0, None, None, [None, 1])], ids=str
)
def test_gradients_of_every_sample(dims: Any) -> None:
    attention = compile(TWO)

    def loss(q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor]) -> Tensor:
        o = attention(q[None], k[None], v[None], kept=[x[None] for x in kept])
        return (o * torch.linspace(-1, 2, D)).square().sum()  # type: ignore[operator]

    inputs, kept = [x.detach() for x in draw(37, 50)], own_lists(TWO, 37, 50, 0)
    at_kept = dims[3] if isinstance(dims[3], list) else [dims[3]] * 2

    def given(x: Tensor, at: int | None) -> Tensor:
        return x[0] if at is None else x.movedim(0, at)

    (q, k, v), lists = map(given, inputs, dims[:3]), [*map(given, kept, at_kept)]
    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(*dims[:3], at_kept))(q, k, v, lists)
    for sample in range(2):
        leaves = [x[0 if at is None else sample].clone().requires_grad_() for x, at in zip(inputs, dims, strict=False)]
        own = [x[0 if at is None else sample] for x, at in zip(kept, at_kept, strict=True)]
        wanted = torch.autograd.grad(loss(leaves[0], leaves[1], leaves[2], own), leaves)
        assert all(close(x[sample], y) for x, y in zip(found, wanted, strict=True))


def test_several_gradients_at_once_and_gradients_of_gradients() -> None:
    inputs, kept = draw(37, 50), own_lists(TWO, 37, 50, 0)
    o: Any = compile(TWO)(*inputs, kept=kept)
    many = torch.randn(2, *o.shape)
    found = torch.autograd.grad(o, inputs, many, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        wanted = torch.autograd.grad(o, inputs, many[index], retain_graph=True)
        assert all(close(x[index], y) for x, y in zip(found, wanted, strict=True))
    (first,) = torch.autograd.grad(o.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are not available"):
        torch.autograd.grad(first.sum(), inputs[1])


def test_checkpointing_autocast_and_meta() -> None:
    inputs, kept, attention = draw(37, 50), own_lists(TWO, 37, 50, 0), compile(TWO)

    def attend(*x: Tensor) -> Any:
        return attention(*x, kept=kept)

    wanted = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    o: Any = checkpoint(attend, *inputs, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(o.square().sum(), inputs), wanted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*inputs), attend(*(x.bfloat16() for x in inputs)))
    o = attention(*(x.to("meta") for x in inputs), kept=[x.to("meta") for x in kept], check_kept=True)
    assert o.is_meta and o.shape == inputs[0].shape


def test_flops_are_without_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, inputs = compile(TWO), [x.detach() for x in draw(37, 50)]
    monkeypatch.setattr(attention.module, "flops", lambda *_: (1000, 200, 30, 4))
    with FlopCounterMode(display=False) as counted:
        attention(*inputs, kept=own_lists(TWO, 37, 50, 0))
    assert counted.get_total_flops() == 996


# ---- errors -----------------------------------------------------------------------------------------------------

Lists = list[Tensor]
REFUSED: list[tuple[Callable[[Lists], Any], type[Exception], str]] = [
    (lambda x: x[0], TypeError, "kept: expected 2 tensors, one a level, finest first, got Tensor"),
    (lambda x: x[:1], ValueError, "kept: expected 2 tensors, one a level, finest first, got 1"),
    (lambda x: [x[0], None], TypeError, "kept, level 2: expected an int32 tensor, got NoneType"),
    (lambda x: [x[0].long(), x[1]], TypeError, "kept, level 1: expected a dense int32 tensor, got torch.int64"),
    (lambda x: [x[0], x[1].to("meta")], ValueError, "kept, level 2: expected device cpu like q, got meta"),
    (lambda x: x[::-1], ValueError, r"kept, level 1: expected \[2, 2, 10, 1 to 3\], got \[2, 2, 3, 2\]"),
    (lambda x: [x[0][:1], x[1]], ValueError, r"kept, level 1: expected \[2, 2, 10, 1 to 3\], got \[1, 2, 10, 3\]"),
    (lambda x: [x[0], x[1][:, :1]], ValueError, r"kept, level 2: expected \[2, 2, 3, 1 to 2\], got \[2, 1, 3, 2\]"),
    (lambda x: [x[0], x[1][0]], ValueError, r"kept, level 2: expected \[2, 2, 3, 1 to 2\], got \[2, 3, 2\]"),
    (lambda x: [x[0], x[1][..., :0]], ValueError, r"kept, level 2: .* 1 to 2\], got \[2, 2, 3, 0\]"),
    (lambda x: [x[0].repeat(1, 1, 1, 2), x[1]], ValueError, r"kept, level 1: .* 1 to 3\], got \[2, 2, 10, 6\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_other_lists_are_refused(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile(TWO)(*draw(37, 50), kept=change(own_lists(TWO, 37, 50, 0)))


def test_rows_are_those_of_the_shard() -> None:
    with pytest.raises(ValueError, match=r"kept, level 1: expected \[2, 2, 10, 1 to 3\], got \[2, 2, 11, 3\]"):
        compile(TWO)(*draw(38, 50), kept=own_lists(TWO, 38, 50, 3), query_offset=4)


def test_rows_are_counted_under_compile_too(fresh_dynamo: None) -> None:
    compiled = torch.compile(compile(TWO), backend="aot_eager", dynamic=True)
    with pytest.raises(Exception, match="kept, level 1: expected 10 rows for M = 37, got 9"):
        compiled(*draw(37, 50), kept=own_lists(TWO, 36, 50, 0))


WRONG: list[tuple[int, int, tuple[int, int], str]] = [
    (1, 0, (13, -1), r"expected -1 or a token from 0 to 12, got 13"),
    (1, 0, (-1, -2), r"expected -1 or a token from 0 to 12, got -2"),
    (2, 0, (4, 1), r"expected -1 or a token from 0 to 3, got 4"),
    (2, 0, (1, 1), r"expected no token twice in a row, got 1"),
    (1, 0, (8, 8), r"expected no token twice in a row, got 8"),
    (1, 0, (8, 3), r"expected a child, 4 each, of a token that its parent keeps at level 2, \[1, 2\], got 3"),
    (1, 5, (3, 8), r"expected a child, 4 each, of a token that its parent keeps at level 2, \[1, 2\], got 3"),
]


@pytest.mark.parametrize(("level", "offset", "row", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_entries_are_looked_at_when_asked_to(level: int, offset: int, row: tuple[int, int], message: str) -> None:
    attention, inputs = compile(TWO), draw(37, 50)
    kept = own_lists(TWO, 37, 50, offset)
    kept[1][1, 0] = torch.tensor([2, 1])
    kept[0].fill_(-1)
    attention(*inputs, kept=kept, query_offset=offset, check_kept=True)
    wrong = min(3, kept[level - 1].shape[2] - 1)
    kept[level - 1][1, 0, wrong, -2:] = torch.tensor(row)
    with pytest.raises(ValueError, match=f"^kept, level {level}, batch 1, head 0, row {wrong}: {message}$"):
        attention(*inputs, kept=kept, query_offset=offset, check_kept=True)


def test_the_parent_is_that_of_the_place_in_the_sequence() -> None:
    """Queries 5 ... 41 of a sequence: row 2 of level 1 is token 3, the last under token 0 of level 2."""
    attention, inputs = compile(TWO), draw(37, 50)
    kept = [torch.full((2, 2, rows, 1), -1, dtype=torch.int32) for rows in query_rows(TWO, 37, 5)]
    kept[1][:, :, 0], kept[1][:, :, 1] = 3, 1
    for row, token, legal in ((2, 12, True), (2, 4, False), (3, 4, True), (3, 12, False)):
        lists = [kept[0].clone(), kept[1]]
        lists[0][0, 0, row] = token
        if legal:
            attention(*inputs, kept=lists, query_offset=5, check_kept=True)
        else:
            with pytest.raises(ValueError, match=rf"row {row}: expected a child.*, got {token}$"):
                attention(*inputs, kept=lists, query_offset=5, check_kept=True)


def test_entries_cannot_be_looked_at_under_compile(fresh_dynamo: None) -> None:
    inputs, options = draw(37, 50), {"kept": own_lists(TWO, 37, 50, 0), "check_kept": True}
    with pytest.raises(Exception, match=r"check_kept: expected False under torch\.compile"):
        torch.compile(compile(TWO), backend="eager", fullgraph=True)(*inputs, **options)


def test_entries_cannot_be_looked_at_under_vmap() -> None:
    q, k, v = (torch.stack([x, -x]) for x in draw(37, 50)[:3])
    kept = [torch.stack([x, x]) for x in own_lists(TWO, 37, 50, 0)]

    def attend(q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], check: bool) -> Tensor:
        o = compile(TWO)(q, k, v, kept=kept, check_kept=check)
        assert isinstance(o, Tensor)
        return o

    found = torch.func.vmap(attend, (0, 0, 0, 0, None))(q, k, v, kept, False)
    assert torch.equal(found[1], attend(q[1], k[1], v[1], [x[1] for x in kept], True))
    with pytest.raises(ValueError, match=r"check_kept: expected False under torch\.func\.vmap"):
        torch.func.vmap(attend, (0, 0, 0, 0, None))(q, k, v, kept, True)
