"""The operator as a part of a model: copied, pickled, spawned, printed and hooked, a module of each model's own."""

import copy
import io
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llsa_gen import Level, Spec, compile
from llsa_gen.compiler import Attention
from llsa_gen.module import AttentionModule

SPEC = Spec(name="in_a_model", head_dim=8, levels=(Level(block=4, topk=3), Level(block=3, topk=2)))


class Model(nn.Module):
    """As people write it: with the operator, or with a module of it."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(params=["operator", "module"])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    attention = compile(SPEC)
    return Model(attention if request.param == "operator" else attention.as_module())


def inputs() -> Tensor:
    return torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1))


def operator_of(model: Model) -> Attention:
    attend = model.attend
    return attend.attention if isinstance(attend, AttentionModule) else attend


def run(model: Model, x: Tensor) -> Any:
    """What a process of its own makes of it; as an array, for torch's tensors go by shared memory."""
    return model(x).detach().numpy()


# ---- copies and pickles -----------------------------------------------------------------------------------------


def through_torch(model: Model) -> Model:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x)), through_torch])
def test_a_copy_computes_the_same_with_the_same_operator(way: Any, model: Model) -> None:
    other = way(model)
    assert other is not model and operator_of(other) is operator_of(model)
    assert torch.equal(other(inputs()), model(inputs()))
    if way is not copy.copy and isinstance(model.attend, nn.Module):
        assert other.attend is not model.attend, "its hooks are its own"


def test_no_copy_compiles_or_copies_anything(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llsa_gen.compiler.load", lambda *_: pytest.fail("compiled again"))
    assert operator_of(copy.deepcopy(model)) is operator_of(model)
    assert copy.copy(operator_of(model)) is operator_of(model)


def test_a_pickle_is_small_and_holds_no_kernels(model: Model) -> None:
    assert len(pickle.dumps(model.attend)) < 3000 < len(operator_of(model).source)


def test_a_spawned_process_makes_its_own(model: Model) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(run, model, inputs()).result(timeout=300)
    torch.testing.assert_close(torch.from_numpy(found), model(inputs()).detach())


def test_the_state_is_that_of_the_parameters(model: Model) -> None:
    assert set(model.state_dict()) == {"qkv.weight", "qkv.bias"}
    model.load_state_dict(model.state_dict())
    assert model.to(torch.float64).attend is model.attend
    assert not [*getattr(model.attend, "parameters", list)()]


def test_a_checkpoint_loads_with_weights_only(model: Model, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))


# ---- as a module ------------------------------------------------------------------------------------------------


def test_it_is_printed_as_a_part_of_the_model() -> None:
    assert "(attend): AttentionModule(in_a_model, head_dim=8, block: topk 4: 3, 3: 2)" in repr(
        Model(compile(SPEC).as_module())
    )


def test_hooks_are_those_of_one_model() -> None:
    one, other = Model(compile(SPEC).as_module()), Model(compile(SPEC).as_module())
    assert one.attend is not other.attend
    seen: list[str] = []
    one.attend.register_forward_pre_hook(lambda *_: seen.append("before"))
    one.attend.register_forward_hook(lambda module, args, o: seen.append(f"{[*o.shape]}"))
    one.attend.register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append("backward"))
    other(inputs()).sum().backward()
    assert not seen
    one(inputs()).sum().backward()
    assert seen == ["before", "[2, 2, 50, 8]", "backward"]
    assert [name for name, _ in one.named_modules()] == ["", "qkv", "attend"]


def test_a_hook_may_change_what_comes_out() -> None:
    model = Model(compile(SPEC).as_module())
    before = model(inputs())
    with_hook = model.attend.register_forward_hook(lambda module, args, o: 2 * o)
    assert torch.equal(model(inputs()), 2 * before)
    with_hook.remove()
    assert torch.equal(model(inputs()), before)


def test_it_takes_and_gives_what_the_operator_does() -> None:
    attention = compile(SPEC)
    module = attention.as_module()
    q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    kept = module.select(q, k)
    assert all(map(torch.equal, kept, attention.select(q, k)))
    for options in ({}, {"return_lse": True}, {"scale": 0.3}, {"kept": kept, "check_kept": True}, {"layout": "BHND"}):
        found, wanted = module(q, k, v, **options), attention(q, k, v, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)
    assert module.spec is attention.spec
    with pytest.raises(TypeError, match="surprise"):
        module(q, k, v, surprise=1)


def test_it_is_traced_without_a_break() -> None:
    model = Model(compile(SPEC).as_module())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs()), model(inputs()))
    program = torch.export.export(model, (inputs(),))
    torch.testing.assert_close(program.module()(inputs()), model(inputs()))


def test_threads_may_share_one() -> None:
    model, found = Model(compile(SPEC).as_module()), [torch.empty(0)] * 4
    wanted = model(inputs())

    def work(at: int) -> None:
        found[at] = model(inputs())

    workers = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(x, wanted) for x in found)
