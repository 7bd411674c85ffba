"""The operator over DTensors: the bits of one process, in every placement, forward and backward."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llsa_gen import Level, Spec, compile, order

D = 8
SPEC = Spec(name="sharded", head_dim=D, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))
OFFSET = 7  # within a block of both levels

# the letters of a case's placements: one for each dimension of its mesh
# replicated, by batch, heads, tokens, channels, and a sum that is pending
LINE = [(letter,) for letter in "RBHTDP"]
SQUARE: list[tuple[str, ...]] = [tuple(pair) for pair in ("RR", "BH", "HB", "HH", "BB", "TB", "RT", "PH", "HD")]
EVEN, ODD = (4, 8), (2, 3)  # batch and heads; of the odd ones, some processes get none
EXTRAS = ("", "kept", "offset kept", "globals mask kept offset")

CASES: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[int, int], str]] = {}
for sides, all_letters in (((4,), LINE), ((2, 2), SQUARE)):
    for letters, size in [*product(all_letters, [EVEN]), *product(all_letters[1:4], [ODD])]:
        CASES[f"{'x'.join(map(str, sides))} {''.join(letters)} {size}"] = (sides, letters, size, "globals mask")
for letter, extras in product("BHT", EXTRAS):
    CASES[f"4 {letter} with {extras or 'nothing'}"] = (4,), (letter,), EVEN, extras


def placement(letter: str) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"R": Replicate(), "P": Partial()}.get(letter) or Shard("BHTD".index(letter))


def taken(letter: str) -> Any:
    """What the operator makes of a placement."""
    return placement(letter if letter in "RBH" else "H")


def distributed(x: Tensor, mesh: DeviceMesh, places: tuple[Any, ...]) -> Any:
    """A part of x for this process. Where a sum is pending, one process of those that share it has all of it."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    whole = distribute_tensor(x, mesh, [Replicate() if place.is_partial() else place for place in places])
    local = whole.to_local()
    for dim, place in enumerate(places):
        if place.is_partial() and mesh.get_local_rank(dim):
            local = torch.zeros_like(local)
    return DTensor.from_local(local, mesh, places, shape=x.shape, stride=x.stride())


def inputs(batch: int, heads: int, extras: str) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, global keys and values, whether used or not; then the other arguments. Not contiguous."""
    torch.manual_seed(0)
    lengths = (37, 50, 50, 5, 5)
    tensors = [torch.randn(batch, n, heads, D).transpose(1, 2) for n in lengths]
    options: dict[str, Any] = {"query_offset": OFFSET} if "offset" in extras else {}
    if "kept" in extras:
        kept = compile(SPEC).select(*tensors[:2], **options)
        options["kept"] = [kept[0][..., :-1], kept[1]]  # no longer what it would select
    if "mask" in extras:
        options["global_mask"] = torch.rand(batch, 5) < 0.6
    return tensors, options


def results(tensors: list[Any], options: dict[str, Any], weights: list[Any], extras: str) -> list[Any]:
    """o, lse, and the gradients of what takes part."""
    own = tensors if "globals" in extras else tensors[:3]
    shared = {"k_global": own[3], "v_global": own[4]} if "globals" in extras else {}
    o, lse = compile(SPEC)(*own[:3], return_lse=True, **shared, **options)
    return [o, lse, *torch.autograd.grad((o * weights[0]).sum() + (lse * weights[1]).sum(), own)]


def attend_everywhere() -> dict[str, tuple[list[bool], list[tuple[Any, ...]]]]:
    """Of each case, whether each result has the bits of one process, and its placements."""
    from torch.distributed.tensor import Replicate

    meshes: dict[tuple[int, ...], DeviceMesh] = {shape: init_device_mesh("cpu", shape) for shape in ((4,), (2, 2))}
    found: dict[str, tuple[list[bool], list[tuple[Any, ...]]]] = {}
    for name, (shape, letters, (batch, heads), extras) in CASES.items():
        mesh, places = meshes[shape], tuple(placement(letter) for letter in letters)
        tensors, options = inputs(batch, heads, extras)
        weights = [torch.randn(batch, heads, 37, D), torch.randn(batch, heads, 37)]
        wanted = results([x.clone().requires_grad_() for x in tensors], options, weights, extras)
        everywhere = (Replicate(),) * len(places)
        if "kept" in options:
            options["kept"] = [distributed(x, mesh, everywhere) for x in options["kept"]]
            options["check_kept"] = True
        if "global_mask" in options:
            options["global_mask"] = distributed(options["global_mask"], mesh, everywhere)
        own = [distributed(x, mesh, places).requires_grad_() for x in tensors]
        got = results(own, options, [distributed(x, mesh, everywhere) for x in weights], extras)
        found[name] = (
            [torch.equal(x.full_tensor(), y) for x, y in zip(got, wanted, strict=True)],
            [x.placements for x in got],
        )
    return found


def mixed_and_selected() -> dict[str, Any]:
    """What is placed differently from tensor to tensor; the selection."""
    from torch.distributed.tensor import Replicate

    attention, mesh = compile(SPEC), init_device_mesh("cpu", (4,))
    tensors, _ = inputs(*EVEN, "")
    found: dict[str, Any] = {}
    leaves = [x.clone().requires_grad_() for x in tensors]
    wanted = results(leaves, {}, [torch.tensor(1.0), torch.tensor(1.0)], "globals")

    own = [distributed(x, mesh, (placement(p),)).requires_grad_() for x, p in zip(tensors, "RTBHD", strict=True)]
    one = distributed(torch.tensor(1.0), mesh, (Replicate(),))
    got = results(own, {}, [one, one], "globals")
    found["mixed"] = [torch.equal(x.full_tensor(), y) for x, y in zip(got, wanted, strict=True)]
    found["mixed placements"] = [x.placements for x in got]

    for letter, offset in product("RBHT", (0, OFFSET)):
        q, k = (distributed(x, mesh, (placement(letter),)) for x in tensors[:2])
        kept: Any = attention.select(q, k, query_offset=offset)
        alone = attention.select(*tensors[:2], query_offset=offset)
        found[f"select {letter} {offset}"] = [torch.equal(x.full_tensor(), y) for x, y in zip(kept, alone, strict=True)]
        found[f"select {letter} {offset}"] += [x.placements == (taken(letter),) for x in kept]

    return found


def compiled_cold() -> dict[str, list[bool]]:
    """Compiled before anything was called, of tensors that are sharded by tokens."""
    attention: Any = compile(SPEC)
    mesh, place = init_device_mesh("cpu", (4,)), placement("T")
    tensors = inputs(*EVEN, "")[0][:3]
    compiled = torch.compile(lambda *x: attention(*x), fullgraph=True, backend="aot_eager", dynamic=False)
    results: list[list[Any]] = []
    for run, own in ((compiled, [distributed(x, mesh, (place,)) for x in tensors]), (attention, tensors)):
        leaves = [x.clone().requires_grad_() for x in own]
        o = run(*leaves)
        results.append([o, *torch.autograd.grad(o.sum(), leaves)])
    same = [torch.equal(x.full_tensor(), y) for x, y in zip(*results, strict=True)]
    return {"compiled": same + [x.placements == (place,) for x in results[0][1:]]}


def everything() -> dict[str, Any]:
    return {**compiled_cold(), **attend_everywhere(), **mixed_and_selected()}


def faults(name: str, same: list[bool], places: list[tuple[Any, ...]]) -> list[str]:
    """What is not as it should be in a case."""
    _, letters, size, extras = CASES[name]
    # what is pending has a gradient that is not
    own = tuple(placement(letter if letter != "P" else "R") for letter in letters)
    wrong = [f"{name}: number {at} has other bits" for at, equal in enumerate(same) if not equal]
    if len(same) != (7 if "globals" in extras else 5):
        wrong.append(f"{name}: {len(same)} results")
    if size == EVEN and not places[0] == places[1] == tuple(map(taken, letters)):
        wrong.append(f"{name}: o and lse are placed {places[:2]}")
    if places[2:] != [own] * len(places[2:]):
        wrong.append(f"{name}: gradients are placed {places[2:]}, their tensors {own}")
    return wrong


@pytest.mark.slow
def test_every_placement_has_the_bits_of_one_process(tmp_path: Path) -> None:
    """One test, for four processes take a while to start."""
    found, *others = in_processes(4, tmp_path, everything)
    assert all(one == found for one in others)
    wrong = [fault for name in CASES for fault in faults(name, *found[name])]
    assert not wrong, "\n".join(wrong)

    assert len(found["mixed"]) == 7 and all(found["mixed"])
    o, lse, *grads = found["mixed placements"]
    assert o == lse == (placement("B"),), "the first placement that the operator takes"
    assert grads == [(placement(letter),) for letter in "RTBHD"]

    selected = {name: same for name, same in found.items() if name.startswith("select")}
    assert len(selected) == 8 and all(len(same) == 4 and all(same) for same in selected.values()), selected
    assert len(found["compiled"]) == 7 and all(found["compiled"]), found["compiled"]


# ---- in one process ---------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process that is all there are."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_plain_tensor_among_them_is_refused(mesh: DeviceMesh) -> None:
    """It could be the whole tensor or this process's part of it."""
    attention, ((q, k, v, k_global, v_global), options) = compile(SPEC), inputs(2, 2, "mask kept")
    there = distributed(q, mesh, (placement("H"),)), *(distributed(x, mesh, (placement("H"),)) for x in (k, v))
    for name, tensors in (("k", (there[0], k, v)), ("q", (q, *there[1:])), ("v", (*there[:2], v))):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a DTensor like [qk], got a plain tensor; distribute_te"
        ):
            attention(*tensors)
    for name, more in (
        ("k_global", {"k_global": k_global, "v_global": v_global}),
        ("kept, level 1", {"kept": options["kept"]}),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected a DTensor like q, got a plain tensor"):
            attention(*there, **more)
    for pair in ((q, there[1]), (there[0], k)):
        with pytest.raises(TypeError, match=r"^[qk]: expected a DTensor like [qk], got a plain tensor"):
            attention.select(*pair)
    shared = distributed(k_global, mesh, (placement("H"),))
    with pytest.raises(TypeError, match=r"^global_mask: expected a DTensor like q, got a plain tensor"):
        attention(*there, k_global=shared, v_global=shared, global_mask=options["global_mask"])


def test_an_order_permutes_them_and_brings_them_back(mesh: DeviceMesh) -> None:
    """Forward and backward, whether its tensors are plain, as everywhere, or on the mesh, as in a distributed model."""
    from torch.distributed.tensor import distribute_module

    ordered = order.Ordered(compile(SPEC).as_module(), order.grid((5, 7), SPEC))
    x = torch.randn(2, 2, 35, D)
    for module in (ordered, distribute_module(copy.deepcopy(ordered), mesh)):
        for letter in "BT":
            results: list[tuple[Any, ...]] = []
            for run, own in ((ordered, x), (module, distributed(x, mesh, (placement(letter),)))):
                leaf = own.clone().requires_grad_()
                o = run(leaf, leaf, leaf)
                results.append((o, *torch.autograd.grad(o.square().sum(), leaf)))
            assert all(torch.equal(a, b.full_tensor()) for a, b in zip(*results, strict=True)), letter


def test_two_meshes_are_refused(mesh: DeviceMesh) -> None:
    attention, ((q, k, v, *_), _) = compile(SPEC), inputs(2, 2, "")
    other = init_device_mesh("cpu", (1, 1))
    there = distributed(q, mesh, (placement("H"),))
    elsewhere = [distributed(x, other, (placement("H"), placement("R"))) for x in (k, v)]
    with pytest.raises(ValueError, match=r"^k: expected a DTensor on DeviceMesh.* like q, got one on DeviceMesh"):
        attention(there, *elsewhere)


def test_local_map_does_without_rules(mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import local_map

    attention: Any = compile(SPEC)
    (q, k, v, *_), _ = inputs(2, 2, "")
    places = [placement("H")]
    mapped = local_map(attention.module.attention, out_placements=places, in_placements=(places,) * 3, device_mesh=mesh)
    found = mapped(*(distributed(x, mesh, tuple(places)) for x in (q, k, v)))
    assert isinstance(found, DTensor) and torch.equal(found.to_local(), attention(q, k, v))


PROGRAM = """
import sys, torch
from exported import attention
q = torch.randn(1, 2, 40, 8, requires_grad=True)
attention(q, q, q).sum().backward()
with torch.autograd.profiler.profile():
    attention(q, q, q)
print("torch.distributed.tensor" in sys.modules)
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
there = distribute_tensor(q, init_device_mesh("cpu", (1,)), [Shard(1)])
print(torch.equal(attention(there, there, there).to_local(), attention(q, q, q)))
"""


def test_a_module_alone_imports_it_for_those_who_have_dtensors(tmp_path: Path) -> None:
    (tmp_path / "exported.py").write_text(compile(SPEC).source)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.stdout.split() == ["False", "True"], result.stderr
