"""What happens to a model with compiled attention: copies, pickles, files, two specs at once, compilers, restoring."""

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from tiny_transformers import ALL, BERT, DINO, FEW, PIXELS, SIGLIP, VIT, error, gradients, randn, result

import llsa_gen
from llsa_gen.integrations import transformers as llsa


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_restored_it_is_as_before() -> None:
    native = DINO.make()
    before = copy.deepcopy(native)
    llsa.use(native, FEW, min_tokens=0)
    assert not torch.equal(result(native, PIXELS), result(before, PIXELS))
    assert native.state_dict().keys() == before.state_dict().keys()
    assert llsa.restore(native) is native
    assert torch.equal(result(native, PIXELS), result(before, PIXELS))
    assert native.config.to_dict() == before.config.to_dict()
    assert native.config._attn_implementation == before.config._attn_implementation == "sdpa"
    for one, other in zip(native.modules(), before.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert not one._forward_hooks and not one._forward_pre_hooks
    llsa.use(native, ALL, min_tokens=0)
    assert error(result(native, PIXELS), result(before, PIXELS)) < 1e-5


def test_a_compiled_operator_or_its_module_is_a_spec() -> None:
    operator = llsa_gen.compile(FEW)
    wanted = result(llsa.use(VIT.make(), FEW, min_tokens=0), PIXELS)
    for spec in (operator, operator.as_module()):
        assert torch.equal(result(llsa.use(VIT.make(), spec, min_tokens=0), PIXELS), wanted)


def test_models_that_share_a_config_do_not_mix() -> None:
    config = VIT.make().config
    native, sparse, whole = (transformers.ViTModel(config).eval() for _ in range(3))
    for model in (sparse, whole):
        model.load_state_dict(native.state_dict())
    wanted = result(native, PIXELS)
    llsa.use(sparse, FEW, min_tokens=0)
    llsa.use(whole, ALL, min_tokens=0)
    first = result(sparse, PIXELS)
    assert error(result(whole, PIXELS), wanted) < 1e-5 < error(first, wanted)
    assert torch.equal(result(native, PIXELS), wanted) and config._attn_implementation == "sdpa"
    assert llsa.report(sparse).sparse == llsa.report(whole).sparse == 2
    llsa.restore(whole)
    assert torch.equal(result(whole, PIXELS), wanted)
    assert torch.equal(result(sparse, PIXELS), first)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model = llsa.use(DINO.make(), FEW, min_tokens=0)
    wanted = result(model, PIXELS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        wide = {"pixel_values": randn(1, 3, 16, 48)}
        result(other, wide)  # its own grid
        assert torch.equal(result(model, PIXELS), wanted)
        assert torch.equal(result(other, PIXELS), wanted)
        assert llsa.report(other).sparse == 4
        llsa.restore(other)
        assert not torch.equal(result(other, PIXELS), wanted)
        assert torch.equal(result(model, PIXELS), wanted)


def test_what_is_saved_is_the_model_without_a_spec(tmp_path: Path) -> None:
    model = DINO.make()
    wanted = result(model, PIXELS)
    llsa.use(model, FEW, min_tokens=0).save_pretrained(tmp_path)
    assert "llsa" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(result(loaded, PIXELS), wanted)


def test_another_attention_set_meanwhile_is_told() -> None:
    model = llsa.use(VIT.make(), FEW, min_tokens=0)
    model.set_attn_implementation("eager")
    result(model, PIXELS)
    counts = llsa.report(model)
    assert counts.sparse == 0 and "was set to eager attention since use()" in str(counts)


def test_training_moves_every_parameter() -> None:
    model = llsa.use(DINO.make(), FEW, min_tokens=0).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients(model, PIXELS)
    optimizer.step()
    still = {name for name, x in model.state_dict().items() if torch.equal(x, before[name])}
    assert still <= {"embeddings.mask_token"}


def test_checkpointing_computes_the_same_again() -> None:
    plain = llsa.use(DINO.make().train(), FEW, min_tokens=0)
    again = DINO.make().train()
    again.activation_checkpointing_enable()
    llsa.use(again, FEW, min_tokens=0)
    wanted, found = gradients(plain, PIXELS), gradients(again, PIXELS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert llsa.report(again).sparse == 2, "a layer that is computed again is no other call"


def test_checkpointing_goes_back_to_the_grid_of_its_call() -> None:
    plain, again = (llsa.use(DINO.make().train(), FEW, min_tokens=0) for _ in range(2))
    again.activation_checkpointing_enable()
    for model in (plain, again):
        outputs = [model(randn(1, 3, *shape)).last_hidden_state for shape in ((16, 48), (32, 32))]
        torch.stack([x.square().sum() for x in outputs]).sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is None or (other.grad is not None and torch.equal(one.grad, other.grad))
    outputs = [again(randn(1, 3, *shape)).last_hidden_state for shape in ((16, 48), (48, 16))]
    with pytest.raises(ValueError, match="grid: expected the shape of the patches, given to use"):
        torch.stack([x.sum() for x in outputs]).sum().backward()


def test_compiled_without_a_break(fresh_dynamo: None) -> None:
    model = llsa.use(SIGLIP.make(), FEW, min_tokens=0)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for shape in ((32, 32), (16, 64)):
        inputs = {"pixel_values": randn(2, 3, *shape), "interpolate_pos_encoding": True}
        assert error(result(compiled, inputs), result(model, inputs)) < 1e-6
    counts = llsa.report(compiled)
    assert counts.sparse > 0 and "compiled by torch" in str(counts)


def test_compiled_refusals_are_the_same(fresh_dynamo: None) -> None:
    masked = llsa.use(BERT.make(), ALL, min_tokens=0)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 9:] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        torch.compile(masked, backend="aot_eager")(**BERT.inputs, attention_mask=mask)


def test_threads_do_not_mix_their_pictures() -> None:
    """Of as many patches, and of which one thread alone asks for weights."""
    model = llsa.use(VIT.make(), FEW, min_tokens=0)
    inputs = [{"pixel_values": randn(2, 3, *size)} for size in ((32, 32), (16, 64), (64, 16))]
    wanted = [result(model, one, interpolate_pos_encoding=True) for one in inputs]

    def again(index: int) -> bool:
        return all(
            torch.equal(result(model, inputs[index], interpolate_pos_encoding=True), wanted[index]) for _ in range(8)
        )

    def ask() -> bool:
        for _ in range(8):
            with pytest.raises(ValueError, match="output_attentions: expected False"):
                result(model, PIXELS, output_attentions=True)
        return True

    with ThreadPoolExecutor(4) as pool:
        jobs = [*(pool.submit(again, index) for index in range(3)), pool.submit(ask)]
        assert [job.result() for job in jobs] == [True] * 4


def test_half_precision_and_autocast() -> None:
    native = DINO.make()
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = (result(model, PIXELS) for model in (native, sparse))
    assert error(found, wanted) < 1.2e-2
    native, sparse = native.bfloat16(), sparse.bfloat16()
    inputs = {"pixel_values": PIXELS["pixel_values"].bfloat16()}
    assert error(result(sparse, inputs), result(native, inputs)) < 2e-2
