"""What the compiled attention does not do is one error, or the model's own attention where that is asked for.

Each case is a mistake that an adapter can make in silence.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from tiny_transformers import (
    ALL,
    BERT,
    FEW,
    GLOBAL,
    IDS,
    LLAMA,
    MODERNBERT,
    PATCHES,
    PICTURE,
    PIXELS,
    SIGLIP2,
    TEXT,
    VIT,
    Case,
    error,
    randn,
    result,
    vision,
)  # fmt: skip

from llsa_gen.integrations import transformers as llsa

PADDED = torch.ones(2, 24, dtype=torch.int64)
PADDED[1, 10:] = 0


CAUSAL, MASK = ("is_causal", "causal attention"), ("attention_mask", "a mask that hides or weighs tokens")
EAGER = {"attn_implementation": "eager"}


class Refused(NamedTuple):
    """A call that has to be refused: because of which argument, and what came there."""

    case: Case
    argument: str
    came: str
    calls: Mapping[str, Any] = MappingProxyType({})
    config: Mapping[str, Any] = MappingProxyType({})
    use: Mapping[str, Any] = MappingProxyType({})
    train: bool = False
    sparse: int = 0
    """Layers that may be sparse all the same."""


def bert(**more: Any) -> Case:
    return Case("BertModel", {**TEXT, **more}, IDS)


LOCAL = Case("Gemma3TextModel", {**TEXT, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}, IDS)
CROSSING = bert(is_decoder=True, add_cross_attention=True)
ENCODED = {"encoder_hidden_states": randn(2, 24, 32)}
T5 = Case(
    "T5EncoderModel", {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64, "vocab_size": 100}, IDS
)
SWIN = Case(
    "SwinModel",
    {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    PIXELS,
)
TOWERS = Case(
    "SiglipModel", {"text_config": TEXT, "vision_config": {**PICTURE, "num_attention_heads": 4}}, {**PIXELS, **IDS}
)
CUT = {
    **PATCHES, "pixel_attention_mask": torch.arange(64) < torch.tensor([[64], [48]]),
    "spatial_shapes": torch.tensor([[8, 8], [6, 8]]),
}  # fmt: skip

CASES = {
    "causal": Refused(LLAMA, *CAUSAL),
    "causal, eager": Refused(LLAMA, *CAUSAL, config=EAGER),
    "causal, padded": Refused(LLAMA, *CAUSAL, calls={"attention_mask": PADDED}),
    "causal by the call": Refused(BERT, *CAUSAL, calls={"is_causal": True}),
    "causal and local": Refused(LOCAL, *CAUSAL),
    "causal, beside an encoder": Refused(CROSSING, *CAUSAL, calls=ENCODED),
    "padding": Refused(BERT, *MASK, calls={"attention_mask": PADDED}),
    "padding, eager": Refused(BERT, *MASK, calls={"attention_mask": PADDED}, config=EAGER),
    "padding of ModernBERT": Refused(GLOBAL, *MASK, calls={"attention_mask": PADDED}),
    "padded patches": Refused(SIGLIP2, *MASK, calls=CUT),
    "pictures of several shapes": Refused(
        SIGLIP2, "grid", "pictures of several shapes in one batch",
        calls={**PATCHES, "spatial_shapes": torch.tensor([[8, 8], [4, 16]])},
    ),
    "a window": Refused(MODERNBERT, "sliding_window", "a sliding window", sparse=2),
    "a bias by place": Refused(vision("BeitModel", use_relative_position_bias=True), *MASK),
    "a bias that layers share": Refused(vision("BeitModel", use_shared_relative_position_bias=True), *MASK),
    "a bias of its own argument": Refused(T5, "position_bias", "a position bias"),
    "windows": Refused(SWIN, *MASK, use={"globals_first": 0}),
    "dropout": Refused(vision("ViTModel", attention_probs_dropout_prob=0.1), "dropout", "0.1", train=True),
    "weights": Refused(VIT, "output_attentions", "True", calls={"output_attentions": True}),
    "weights, not told to layers": Refused(
        vision("SiglipVisionModel"), "output_attentions", "True", calls={"output_attentions": True}
    ),
    "weights by the config": Refused(VIT, "output_attentions", "True", config={**EAGER, "output_attentions": True}),
    "another head dim in one tower": Refused(TOWERS, "head_dim", "8, of values 8", sparse=2),
    "patches left out": Refused(vision("ViTMAEModel"), "query", "17 tokens", use={"globals_first": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_error_and_dense_where_that_is_asked_for(name: str) -> None:
    refused = CASES[name]
    native = refused.case.make(**refused.config).train(refused.train)
    inputs = {**refused.case.inputs, **refused.calls}
    strict = llsa.use(copy.deepcopy(native), ALL, min_tokens=0, **refused.use)
    with pytest.raises(ValueError, match=f"{refused.argument}: expected .*, got {refused.came}; use") as caught:
        result(strict, inputs)
    assert "\n" not in str(caught.value) and 'otherwise="dense"' in str(caught.value)

    dense = llsa.use(copy.deepcopy(native), ALL, min_tokens=0, otherwise="dense", **refused.use)
    outputs = []
    for model in (native, dense):
        torch.manual_seed(2)  # for dropout
        outputs.append(result(model, inputs))
    assert error(*outputs) < 1e-5 if refused.sparse else torch.equal(*outputs)
    counts = llsa.report(dense)
    assert counts.sparse == refused.sparse and counts.dense > 0
    assert f"{refused.argument}: {refused.came}" in {row.why for row in counts.rows}


def test_a_short_call_is_refused_all_the_same() -> None:
    with pytest.raises(ValueError, match="is_causal"):
        result(llsa.use(LLAMA.make(), ALL, min_tokens=1000), IDS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [BERT, GLOBAL], ids=lambda case: case.name)
def test_a_mask_of_ones_hides_nothing(case: Case, attention: str) -> None:
    native = case.make(attn_implementation=attention)
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    inputs = {**case.inputs, "attention_mask": torch.ones(2, 24, dtype=torch.int64)}
    assert torch.allclose(result(sparse, inputs), result(native, inputs), atol=1e-5)
    assert llsa.report(sparse).sparse == 2


def test_a_mask_that_a_model_made_and_that_hides_nothing() -> None:
    sparse = llsa.use(BERT.make(), ALL, min_tokens=0)
    result(sparse, {**IDS, "attention_mask": torch.ones(2, 1, 24, 24, dtype=torch.bool)})
    result(sparse, {**IDS, "attention_mask": torch.zeros(2, 1, 24, 24)})
    assert llsa.report(sparse).sparse == 4
    with pytest.raises(ValueError, match="attention_mask"):
        result(sparse, {**IDS, "attention_mask": torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()})


def test_cross_attention_is_known_by_its_name() -> None:
    model = llsa.use(CROSSING.make(), ALL, min_tokens=0, otherwise="dense")
    result(model, {**IDS, **ENCODED})
    crossing = {row.why for row in llsa.report(model).rows if "crossattention" in row.layer}
    assert crossing == {"key: of another sequence than the queries"}


def test_a_double_is_refused() -> None:
    model = llsa.use(VIT.make().double(), ALL, min_tokens=0)
    with pytest.raises(ValueError, match=r"query: expected float32, float16 or bfloat16, got torch\.float64"):
        result(model, {"pixel_values": PIXELS["pixel_values"].double()})


SAM = Case(
    "SamVisionModel", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "mlp_dim": 64,
                       "image_size": 32, "patch_size": 4, "output_channels": 16}, PIXELS
)  # fmt: skip

MODELS: list[tuple[Case, dict[str, Any], type[Exception], str]] = [
    (Case("Gemma2Model", {**TEXT, "num_key_value_heads": 1, "head_dim": 16}, IDS), {}, TypeError,
     "Gemma2Model is more than torch's"),
    (Case("DebertaV2Model", TEXT, IDS), {}, TypeError, "DebertaV2Model does not use transformers' AttentionInterface"),
    (SAM, {"globals_first": 0}, TypeError, "SamVisionModel: none of its layers asks it for an attention"),
    (vision("ViTMAEModel"), {}, ValueError, "globals_first: expected an integer, for nothing is known .* 'vit_mae'"),
    (vision("ViTModel", num_attention_heads=4), {}, ValueError, "spec: expected head_dim 8, as in the model, got 16"),
    (VIT, {"otherwise": "sparse"}, ValueError, "otherwise: expected .* got 'sparse'"),
    (VIT, {"globals_first": -1}, ValueError, "globals_first: expected an integer of at least 0, or None, got -1"),
    (VIT, {"min_tokens": True}, ValueError, "min_tokens: expected an integer of at least 0, or None, got True"),
    (VIT, {"grid": "8x8"}, TypeError, "grid: expected the shape of the patches, .* got str"),
    (VIT, {"grid": (8, 0)}, ValueError, r"grid: .* got \[8, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "more", "kind", "message"), MODELS, ids=[message for *_, message in MODELS])
def test_what_use_refuses(case: Case, more: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = case.make()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(kind, match=message):
        llsa.use(model, FEW, **{"min_tokens": 0, **more})
    assert model.config.to_dict() == before and not str(model.config._attn_implementation).startswith("llsa")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a model of transformers, got str"):
        llsa.use("vit", FEW)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear without one"):
        llsa.use(torch.nn.Linear(2, 2), FEW)
    flash = VIT.make()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='model: expected attention "sdpa" or "eager", got \'flash_attention_2\''):
        llsa.use(flash, FEW)
    for call in (llsa.report, llsa.restore):
        with pytest.raises(ValueError, match="model: expected one that was given to use"):
            call(VIT.make())
    model = llsa.use(VIT.make(), FEW, min_tokens=0)
    with pytest.raises(ValueError, match="expected one without compiled attention"):
        llsa.use(model, FEW)


def test_a_name_without_a_spec_is_refused() -> None:
    model = VIT.make(attn_implementation="llsa_sdpa")
    with pytest.raises(ValueError, match=r"expected a module of a model that was given to .*use, got one without"):
        result(model, PIXELS)
