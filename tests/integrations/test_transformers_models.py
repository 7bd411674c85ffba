"""Models of transformers with compiled attention: the native result where all is kept, and blocks that are patches."""

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_transformers import (
    ALL,
    BERT,
    DINO,
    FEW,
    GLOBAL,
    GROUPED,
    GROUPED_PATCHES,
    MODERNBERT,
    PICTURES,
    PIXELS,
    SIGLIP2,
    VIT,
    Case,
    error,
    gradients,
    randn,
    result,
)  # fmt: skip
from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTAttention

import llsa_gen
from llsa_gen import order
from llsa_gen.integrations import transformers as llsa
from llsa_gen.integrations.transformers_attention import Layer, layer_of
from llsa_gen.integrations.transformers_tokens import AROUND


def first_layer(model: nn.Module) -> tuple[Any, Layer]:
    """The first module that calls transformers' interface, and what it carries."""
    for module in model.modules():
        layer = layer_of(module)
        if layer is not None and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(module).forward):
            return module, layer
    raise AssertionError


@pytest.mark.parametrize("case", [*PICTURES, SIGLIP2, BERT, GLOBAL, GROUPED], ids=lambda case: case.name)
def test_what_keeps_everything_is_the_native_attention(case: Case) -> None:
    native = case.make()
    sparse = copy.deepcopy(native)
    assert llsa.use(sparse, ALL, min_tokens=0) is sparse
    assert 0 < error(result(sparse, case.inputs), result(native, case.inputs)) < 1e-5
    counts = llsa.report(sparse)
    assert (counts.sparse, counts.dense) == (native.config.num_hidden_layers, 0)


@pytest.mark.parametrize("case", GROUPED_PATCHES, ids=lambda case: case.name)
def test_pictures_whose_patches_come_cut_are_sequences_one_by_one(case: Case) -> None:
    native = case.make()
    wanted = result(native, case.inputs)
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    assert 0 < error(result(sparse, case.inputs), wanted) < 1e-5
    counts = llsa.report(sparse)
    assert counts.sparse >= 2 * 2 and counts.dense == 0, "each layer, each picture"
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0, grid=(8, 8), otherwise="dense")
    assert error(result(sparse, case.inputs), wanted) < 1e-5
    rows = {(row.route, row.why, row.tokens) for row in llsa.report(sparse).rows}
    assert {("sparse", "", "64"), ("dense", "query: 32 tokens", "32")} <= rows, "the second one has another grid"


def test_every_known_type_of_model_is_among_them() -> None:
    made = {case.make().config.model_type for case in (*PICTURES, *GROUPED_PATCHES, SIGLIP2)}
    assert made == set(AROUND)


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.name)
def test_a_patch_is_the_token_that_the_table_says(case: Case) -> None:
    model = llsa.use(case.make(), ALL, min_tokens=0)
    module, layer = first_layer(model)
    seen: list[Tensor] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()), with_kwargs=True
    )
    pixels = case.inputs["pixel_values"].clone()
    result(model, case.inputs)
    pixels[..., 4:8, 8:12] += 1.0  # of all frames
    result(model, {"pixel_values": pixels})
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten()
    around, patches = layer.around, layer.patches
    assert around is not None and patches is not None and patches.grid is not None
    *frames, height, width = patches.grid
    wanted = torch.arange(frames[0] if frames else 1) * height * width + width + 2
    assert torch.equal(changed, around.first + wanted)
    assert seen[0].shape[1] == around.first + height * width * len(wanted) + around.last


@pytest.mark.parametrize("case", [DINO, GROUPED], ids=lambda case: case.name)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_gradients_are_the_native_ones(case: Case, train: bool) -> None:
    native = case.make().train(train)
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    wanted, found = gradients(native, case.inputs), gradients(sparse, case.inputs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        if not name.endswith("k_proj.bias"):  # which changes no softmax: its gradient is 0, and rounding
            assert error(found[name], wanted[name]) < 1e-5, name


def by_hand(q: Tensor, k: Tensor, v: Tensor, first: int, grid: tuple[int, ...]) -> Tensor:
    """Rows of patches, in an order of the grid, with what stands before them as globals."""
    attention = llsa_gen.compile(FEW)
    placed = order.grid(grid, FEW, device="cpu")
    patches = [placed.apply(x[:, :, first:]) for x in (q, k, v)]
    o = attention(*patches, k_global=k[:, :, :first], v_global=v[:, :, :first])
    assert isinstance(o, Tensor)
    return placed.restore(o)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)], ids=str)
def test_patches_stand_in_the_order_of_the_picture_at_hand(shape: tuple[int, int]) -> None:
    model = llsa.use(DINO.make(), FEW, min_tokens=0)
    module, _ = first_layer(model)
    hidden: list[Tensor] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    module.o_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    result(model, {"pixel_values": randn(1, 3, *shape)})
    x, o = hidden[:2]
    q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    wanted = by_hand(q, k, v, 4, (shape[0] // 4, shape[1] // 4)).transpose(1, 2).flatten(2)
    assert error(o[:, 4:], wanted) < 1e-6
    dense = nn.functional.scaled_dot_product_attention(q[:, :, :4], k, v).transpose(1, 2).flatten(2)
    assert error(o[:, :4], dense) < 1e-6, "class and registers see everything"


def test_local_layers_stay_as_they_are_where_that_is_asked_for() -> None:
    native = MODERNBERT.make()
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0, otherwise="dense")
    assert error(result(sparse, MODERNBERT.inputs), result(native, MODERNBERT.inputs)) < 1e-5
    rows = {row.layer: (row.route, row.why) for row in llsa.report(sparse).rows}
    local = ("dense", "sliding_window: a sliding window")
    assert rows == {
        "layers.0.attn": ("sparse", ""), "layers.1.attn": local, "layers.2.attn": local, "layers.3.attn": ("sparse", "")
    }  # fmt: skip


def test_a_class_token_of_a_text_may_be_global() -> None:
    native = BERT.make()
    few = llsa.use(copy.deepcopy(native), FEW, globals_first=1, min_tokens=0)
    none = llsa.use(copy.deepcopy(native), FEW, min_tokens=0)
    outputs = [result(model, BERT.inputs) for model in (few, none)]
    assert not torch.equal(*outputs)
    assert "23 + 1 global" in {row.tokens for row in llsa.report(few).rows}


class Renamed(ViTAttention):
    """A class of the user's, under any name and in another file than transformers' eager attention."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_subclass_is_known_by_what_it_calls(attention: str) -> None:
    native = VIT.make(attn_implementation=attention)
    for block in native.layers:
        block.attention.__class__ = Renamed
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    assert 0 < error(result(sparse, PIXELS), result(native, PIXELS)) < 1e-5
    llsa.restore(sparse)
    llsa.use(sparse, ALL, min_tokens=10**6)
    assert torch.equal(result(sparse, PIXELS), result(native, PIXELS))
    assert [row.calls for row in llsa.report(sparse).rows] == [1, 1]


def test_patches_of_several_convolutions_are_no_line() -> None:
    """In raster order their blocks would be strips: nothing shows the grid, so that it has to be said."""
    sizes = {"hidden_sizes": [32, 32], "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1]}
    sizes |= {"num_attention_heads": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    case = Case("SegformerModel", sizes, PIXELS)
    with pytest.raises(ValueError, match="grid: expected the shape of the patches, given to use"):
        result(llsa.use(case.make(), FEW, min_tokens=0, globals_first=0), PIXELS)
    model = llsa.use(case.make(), FEW, min_tokens=0, globals_first=0, grid=(8, 8), otherwise="dense")
    result(model, PIXELS)
    assert {(row.tokens, row.route) for row in llsa.report(model).rows} == {("64", "sparse"), ("16", "dense")}


def test_arguments_go_before_what_is_known() -> None:
    native = VIT.make()
    sparse = llsa.use(copy.deepcopy(native), ALL, grid=(8, 8), globals_first=1, globals_last=0, min_tokens=0)
    assert error(result(sparse, PIXELS), result(native, PIXELS)) < 1e-5
    cut = llsa.use(native, ALL, grid=(5, 13), globals_first=0, min_tokens=0)
    with pytest.raises(ValueError, match=r"grid: expected \[5, 13\], as given to use\(\), got patches \[8, 8\]"):
        result(cut, PIXELS)


def test_short_inputs_stay_dense() -> None:
    native = VIT.make()
    sparse = llsa.use(copy.deepcopy(native), FEW, min_tokens=65)
    assert torch.equal(result(sparse, PIXELS), result(native, PIXELS))
    counts = llsa.report(sparse)
    assert {row.why for row in counts.rows} == {"fewer than 65 tokens"} and counts.sparse == 0
    assert "sparse from 65 picture tokens on: min_tokens" in str(counts)


def test_the_least_length_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("llsa_gen.integrations.crossing.measured", lambda *args: asked.append(args) or 64)
    model = llsa.use(VIT.make(), FEW)
    assert len(asked) == 1, "before anybody compiles"
    result(model, PIXELS)
    counts = llsa.report(model)
    assert counts.sparse == 2 and "from 64 picture tokens on (cpu, float32, spec few)" in str(counts)


def test_the_report_judges_the_last_input() -> None:
    model = llsa.use(VIT.make(), ALL, min_tokens=0)
    with pytest.raises(ValueError, match="got no last input"):
        llsa.report(model, quality=True)
    result(model, PIXELS)
    found = llsa.report(model, quality=True)
    assert found.sparse == 2, "the run again is not counted"
    for row in found.rows:
        assert row.quality is not None and row.quality.mass > 0.9999 and row.quality.error < 1e-5
    few = llsa.use(VIT.make(), FEW, min_tokens=0)
    result(few, PIXELS)
    for row in llsa.report(few, quality=True, reset=True).rows:
        assert row.quality is not None and row.quality.mass < 0.9 and row.quality.error > 1e-3
    assert llsa.report(few).sparse == 0


def test_a_whole_with_two_towers() -> None:
    parts = {"text_config": {**BERT.config}, "vision_config": {**VIT.config}}
    case = Case("SiglipModel", parts, {**PIXELS, **BERT.inputs})
    native = case.make()
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    assert error(result(sparse, case.inputs), result(native, case.inputs)) < 1e-5
    assert llsa.report(sparse).sparse == 4
    tower = copy.deepcopy(native)
    llsa.use(tower.vision_model, ALL, min_tokens=0)
    assert error(result(tower, case.inputs), result(native, case.inputs)) < 1e-5
    assert llsa.report(tower.vision_model).sparse == 2
