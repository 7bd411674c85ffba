"""Loose ends of walks in Gluon, without a GPU: where tiles have them, and what their keys weigh.

Functions of a module compute in NumPy here. Whether kernels use them rightly shows in test_emulated.py and test_gpu.py.
"""

import random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pretended_gpu import ROOT, PretendedGpu, draw, knowing, pretended
from torch import Tensor
from triton import JITFunction

from examples import GLUON
from llsa_gen import Spec, compile
from llsa_gen.emit.module import walked_by_all
from llsa_gen.plan import Plan, lower

NUMPY = SimpleNamespace(
    arange=lambda begin, end, layout: np.arange(begin, end),
    cdiv=lambda a, b: -(-a // b),
    where=lambda condition, a, b: np.where(condition, a, b),
)


@pytest.fixture
def in_numpy(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[ModuleType, Plan]:
    """A module whose functions in Gluon can be called with numbers, and its plan."""
    module, plan = compile(GLUON[name][0]).module, lower(GLUON[name][0])
    monkeypatch.setattr(module, "gl", NUMPY)
    for level in range(1, plan.top + 1):
        for constant in (f"SPAN_{level}", f"BLOCK_{level}"):
            monkeypatch.setattr(module, constant, getattr(module, constant).value)
    for function in ("is_loose", "is_partial_tile", "relative_weights"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, getattr(module, function).fn)
    monkeypatch.setattr(module, "not_before", lambda number: number)
    return module, plan


def lists(plan: Plan, n_tokens: int, rng: random.Random) -> dict[int, list[int]]:
    """A list of tokens for every level: random ones, at times fewer than there is room for."""
    found = {}
    for level in range(1, plan.top + 1):
        tokens = range(-(-n_tokens // plan.span(level)))
        kept = rng.sample(tokens, min(len(tokens), rng.choice((plan.topk(level), rng.randint(0, plan.topk(level))))))
        if kept and rng.random() < 0.5:
            kept[rng.randrange(len(kept))] = tokens[-1]
        found[level] = list(dict.fromkeys(kept))
    return found


def weights(plan: Plan, level: int, parents: list[int], room: int, n_tokens: int) -> list[float]:
    """What the children of `parents`, at `level`, weigh beside a whole token; 0 in places that hold none."""
    block, span, found = plan.block(level + 1), plan.span(level) if level else 1, []
    for place in range(-(-room // 64) * 64):
        slot = place // block
        token = parents[slot] * block + place % block if slot < len(parents) else n_tokens
        found.append(max(0, min(span, n_tokens - token * span)) / span)
    return found


@pytest.mark.parametrize(
    "name", ["l1", "l1_40", "l2", "l2_8", "l3", "l3_keeper", "odd_children", "d128_l3", "wide", "wide_l2", "wide_short"]
)
def test_what_keys_weigh_and_which_tiles_have_to_ask(name: str, in_numpy: tuple[ModuleType, Plan]) -> None:
    (module, plan), rng = in_numpy, random.Random(name)
    walked = walked_by_all(plan)
    asked = 0
    for _ in range(60):
        n_tokens = rng.choice((1, rng.randint(1, 3 * plan.span(plan.top)), plan.span(plan.top) * rng.randint(1, 3)))
        kept = lists(plan, n_tokens, rng)
        keys, ahead = {"n_tokens": n_tokens}, 0
        expected: list[float] = []
        for level in walked:
            if level == plan.top:
                room = -(-n_tokens // plan.span(level))
                own = [
                    min(1.0, max(0, n_tokens - x * plan.span(level)) / plan.span(level))
                    for x in range(-(-room // 64) * 64)
                ]
            else:
                room = plan.topk(level + 1) * plan.block(level + 1)
                own = weights(plan, level, kept[level + 1], room, n_tokens)
            expected += own
            ahead += len(own) // 64
            keys[f"end_l{level}"] = ahead
        loose: list[Any] = []
        for level in (level for level in walked if level != plan.top):
            parents, short = kept[level + 1], n_tokens // plan.span(level + 1)
            loose += [parents.index(short) if short in parents else -1, len(parents)]
        for tile in range(ahead):
            wanted = np.array(expected[tile * 64 : tile * 64 + 64])
            if not plan.spec.reweight:
                wanted = np.ceil(wanted)
            partial = module.is_partial_tile(SimpleNamespace(**keys), tile, *loose)
            whole = (wanted == 1.0).all()
            assert partial or whole, (n_tokens, kept, tile)
            # none asks in vain, but the first part of a block of several tiles
            level = next(level for level in walked if tile < keys[f"end_l{level}"])
            in_parts = level != plan.top and plan.block(level + 1) > 64
            assert not partial or not whole or in_parts, (n_tokens, kept, tile)
            if partial:
                asked += not whole
                # a dynamic `if` is one of Python's here: tiles are numbers
                found = module.relative_weights(SimpleNamespace(**keys), tile, *loose, None)
                np.testing.assert_allclose(found, wanted, err_msg=str((n_tokens, kept, tile)))
    assert asked > 20, "few tiles had loose ends"


@pytest.mark.parametrize(
    ("chosen", "lengths"),
    [("llsa_l2", (4096, 4097, 65_536, 512, 200)), (GLUON["l4"][0], (17_408, 17_409, 34_816, 512))],
    ids=["two levels", "four levels"],
)
def test_given_lists_of_another_length_compile_nothing(
    chosen: str | Spec, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(gpu_module: ModuleType, n_tokens: int) -> None:
        q, k, v, grad_o = draw(n_tokens)
        kept: list[Tensor] = [torch.zeros_like(x) for x in gpu_module.empty_selection(q, k)]
        o, _, saved = gpu_module.attend_kernels(q, k, v, 0.125, None, kept)
        gpu_module.grad_kernels(grad_o, None, q, k, v, o, saved, 0.125, None, True)

    def compiled(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} is compiled")

    gpu: PretendedGpu
    source = compile(ROOT / "spec" / f"{chosen}.yaml" if isinstance(chosen, str) else chosen)
    with pretended() as gpu, knowing(gpu, source.module) as module:
        attend(module, lengths[0])
        monkeypatch.setattr(JITFunction, "_do_compile", compiled)
        for n_tokens in lengths[1:]:
            attend(module, n_tokens)
