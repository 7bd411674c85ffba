"""Real classes of diffusers: a spec that keeps everything changes nothing, and what is sparse, dense and restored."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers_models import CLASSES, EVERYTHING, LITTLE, error, loud, run

from llsa_gen.integrations import diffusers as adapter
from llsa_gen.integrations.diffusers import report, restore, use
from llsa_gen.integrations.report import DENSE, LEFT, SPARSE
from llsa_gen.integrations.routing import NO_CALL

TOLERANCE = 1e-5

SPARSE_LAYERS = {
    "dit": {"transformer_blocks.0.attn1": "8×8"},
    "pixart": {"transformer_blocks.0.attn1": "8×8"},
    "sd3": {f"transformer_blocks.{i}.attn": "8×6 + 7 text" for i in range(2)},
    "flux": {"transformer_blocks.0.attn": "7 text + 8×6", "single_transformer_blocks.0.attn": "7 text + 8×6"},
    "wan": {"blocks.0.attn1": "3×4×6"},
    "ltx": {"transformer_blocks.0.attn1": "3×4×6"},
    "qwen": {"transformer_blocks.0.attn": "7 text + 8×6"},
    "hunyuan_video": {
        "transformer_blocks.0.attn": "3×4×6 + 7 text",
        "single_transformer_blocks.0.attn": "3×4×6 + 7 text",
    },
    "cogvideox": {"transformer_blocks.0.attn1": "7 text + 3×4×6"},
    "lumina2": {"noise_refiner.0.attn": "8×6", "layers.0.attn": "7 text + 8×6"},
    "prx": {f"blocks.{i}.attention": "7 text + 8×6" for i in range(2)},
    "sana": {},
    "unet": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": "16×16",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1": "16×16",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1": "16×16",
        "mid_block.attentions.0.transformer_blocks.0.attn1": "8×8",
    },
}
REST = {
    "pixart": {"transformer_blocks.0.attn2": (DENSE, "cross-attention")},
    "wan": {"blocks.0.attn2": (DENSE, "cross-attention")},
    "ltx": {"transformer_blocks.0.attn2": (DENSE, "cross-attention")},
    "hunyuan_video": {
        "context_embedder.token_refiner.refiner_blocks.0.attn": (DENSE, "fewer tokens than the grid has cells")
    },
    "lumina2": {"context_refiner.0.attn": (DENSE, "fewer tokens than the grid has cells")},
    "sana": {
        "transformer_blocks.0.attn1": (LEFT, NO_CALL),
        "transformer_blocks.0.attn2": (DENSE, "cross-attention"),
    },
    "unet": {
        f"{block}.transformer_blocks.0.attn2": (DENSE, "cross-attention")
        for block in (
            "down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
            "mid_block.attentions.0",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_keeping_everything_is_dense_attention(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = loud(CLASSES[name]())
    wanted = run(model, inputs)
    wanted.square().mean().backward()
    gradients = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
    state = list(model.state_dict())
    model.zero_grad()

    assert use(model, EVERYTHING, min_tokens=0) is model
    assert list(model.state_dict()) == state and isinstance(model, type(CLASSES[name]()[0]))
    found = run(model, inputs)
    assert error(found, wanted) <= TOLERANCE
    found.square().mean().backward()
    found_gradients = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    assert found_gradients.keys() == gradients.keys()
    assert error(*(torch.cat([x.flatten() for x in g.values()]) for g in (found_gradients, gradients))) <= TOLERANCE
    rows = report(model).rows
    assert {row.layer: row.tokens for row in rows if row.route == SPARSE} == SPARSE_LAYERS[name]
    assert {row.layer: (row.route, row.why) for row in rows if row.route != SPARSE} == REST.get(name, {})
    assert all(row.calls == 1 for row in rows)

    assert restore(model) is model
    assert torch.equal(run(model, inputs), wanted), "the bits from before"
    assert type(model) is type(CLASSES[name]()[0])
    assert not any("_llsa_gen" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "qwen"])
def test_few_tokens_are_kept_and_text_is_seen_by_all(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = loud(CLASSES[name]())
    with torch.no_grad():
        dense = run(model, inputs)
        use(model, LITTLE, min_tokens=0)
        sparse = run(model, inputs)
        assert 1e-3 < error(sparse, dense) < 1, "another attention, of the same model"
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, pickled):
            assert torch.equal(run(other, inputs), sparse)
            assert report(other).sparse == report(model).sparse, "counts of its own"
        restore(copied)
        assert torch.equal(run(copied, inputs), dense) and torch.equal(run(model, inputs), sparse)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("dit", "sana", "unet", "lumina2")])
def test_the_table_of_sides_says_what_models_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CLASSES[name]()
    table = adapter._sides(model, dict(adapter._layers(model)))
    monkeypatch.setattr(adapter, "SIDES", {})
    use(model, EVERYTHING, min_tokens=0)
    run(model, inputs)
    seen = adapter._router(model).sides
    assert seen.keys() == SPARSE_LAYERS[name].keys(), "all of it is shown in one run"
    assert {layer: table.get(layer) for layer in seen} == seen


def test_processors_stay_the_same_objects() -> None:
    model, _ = CLASSES["flux"]()
    before = model.attn_processors
    use(model, EVERYTHING, min_tokens=0)
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert type(model).__name__ == "FluxTransformer2DModel", "by which diffusers saves and finds it"


def test_models_of_the_same_class_are_not_watched(tmp_path: Path) -> None:
    model, inputs = loud(CLASSES["flux"]())
    wanted = run(model, inputs)
    use(model, LITTLE, min_tokens=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), wanted)
    with pytest.raises(ValueError, match=r"use\(model, spec\)"):
        report(loaded)
    use(loaded, LITTLE, min_tokens=0)
    assert torch.equal(run(loaded, inputs), run(model, inputs)) and report(loaded).sparse == 2
    assert torch.equal(run(restore(loaded), inputs), wanted)
    assert type(loaded) is type(restore(model))


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_may_wrap_a_model(hooked_first: bool) -> None:
    model, inputs = loud(CLASSES["flux"]())
    wanted, seen = run(model, inputs), []

    class Seeing(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    def hook() -> None:
        for module in (model, model.transformer_blocks[0].attn):
            add_hook_to_module(module, Seeing())

    if hooked_first:
        hook()
    use(model, EVERYTHING, min_tokens=0)
    if not hooked_first:
        hook()
    assert error(run(model, inputs), wanted) <= TOLERANCE
    assert len(seen) == 2 and report(model).sparse == 2
