"""What went wrong without a word in models of diffusers: it is right, refused, or dense and counted with a reason."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers_models import (
    EVERYTHING,
    HEAD_DIM,
    LAST_THREE_PADDED,
    LITTLE,
    dit,
    error,
    flux,
    hunyuan_video,
    ids,
    loud,
    pixart,
    prx,
    qwen,
    run,
    sd3,
    text,
    wan,
)
from torch import nn

import llsa_gen
from llsa_gen.integrations.diffusers import report, restore, use
from llsa_gen.integrations.report import DENSE, LEFT, SPARSE
from llsa_gen.integrations.routing import Router
from llsa_gen.integrations.watching import now


def routes(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Layer -> (route, why), of layers that went one way."""
    return {row.layer: (row.route, row.why) for row in report(model).rows}


def router(model: Any) -> Router:
    return model._llsa_gen.watcher


def wrong(model: nn.Module, spec: Any = EVERYTHING, **options: Any) -> None:
    before = [type(module) for module in model.modules()]
    try:
        use(model, spec, **options)
    finally:
        assert [type(module) for module in model.modules()] == before, "nothing is half done"


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [qwen, hunyuan_video, prx])
@pytest.mark.parametrize("mask", [torch.ones_like(LAST_THREE_PADDED), LAST_THREE_PADDED])
def test_a_mask_of_text_is_sparse_whether_it_is_all_true_or_not(make: Any, mask: torch.Tensor) -> None:
    torch.manual_seed(0)
    model, inputs = loud(make(mask))
    use(model, LITTLE, min_tokens=0)
    with torch.no_grad():
        before = run(model, inputs)
        layer = "blocks.0.attention" if make is prx else "transformer_blocks.0.attn"
        assert routes(model)[layer] == (SPARSE, "")
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
        inputs["encoder_hidden_states"][1, 5] += 1.0
        after = run(model, inputs)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) == bool(~mask[1, 5]), "padding is seen by nobody, text by all"


class Masked(nn.Module):
    """A layer of diffusers over a picture, with any mask."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"patch_size": 1}
        self.attn = Attention(query_dim=32, heads=2, dim_head=HEAD_DIM)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.attn(hidden_states.flatten(2).mT, attention_mask=mask)


def test_a_mask_over_the_picture_is_dense() -> None:
    model, x = Masked(), torch.randn(2, 32, 8, 8)
    mask = torch.zeros(2, 1, 64)
    mask[1, :, 10] = -10_000.0
    wanted = model(x, mask)
    use(model, LITTLE, min_tokens=0)
    assert torch.equal(model(x, mask), wanted)
    assert routes(model) == {"attn": (DENSE, "the mask leaves out tokens of the picture")}
    report(model, reset=True)
    model(x, torch.zeros(2, 1, 64))
    assert routes(model) == {"attn": (SPARSE, "")}


# ---- text and picture --------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Queries of the picture alone, which attend to text too: it is put together before the layer, as in Cascade."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"patch_size": 1}
        self.attn = Attention(query_dim=32, heads=2, dim_head=HEAD_DIM)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.flatten(2).mT
        return self.attn(x, encoder_hidden_states=torch.cat([x, encoder_hidden_states], 1))


def test_queries_of_the_picture_alone_with_as_much_text_are_dense() -> None:
    model, inputs = loud(prx(torch.ones(2, 48, dtype=torch.bool)))
    inputs["encoder_hidden_states"] = text(48)
    wanted = run(model, inputs)
    use(model, LITTLE, min_tokens=0)
    assert torch.equal(run(model, inputs), wanted)
    assert set(routes(model).values()) == {(DENSE, "queries and keys of other lengths")}


def test_self_attention_that_sees_text_too_is_not_called_cross_attention() -> None:
    model = use(Joined(), LITTLE, min_tokens=0)
    for tokens in (7, 7, 9):  # the model is listened to in its first run
        model(torch.randn(2, 32, 8, 8), torch.randn(2, tokens, 32))
        assert routes(model) == {"attn": (DENSE, "queries and keys of other lengths")}


def test_as_much_text_as_picture_is_no_guess() -> None:
    torch.manual_seed(0)
    for make, layer in ((flux, "transformer_blocks.0.attn"), (pixart, "transformer_blocks.0.attn1")):
        model, inputs = loud(make(48 if make is flux else 64))
        use(model, EVERYTHING, min_tokens=0)
        run(model, inputs)
        assert routes(model)[layer] == (SPARSE, ""), "the table says where it is"
        restore(model)
        use(model, EVERYTHING, min_tokens=0)
        router(model).sides.clear()  # as for a class that nobody has heard of
        run(model, inputs)
        route, why = routes(model)[layer]
        assert route == DENSE and "text" in why
        report(model, reset=True)
        other = (flux if make is flux else pixart)()[1]
        run(model, other)
        report(model, reset=True)
        run(model, inputs)
        assert routes(model)[layer] == (SPARSE, ""), "which another run has shown"


def test_cross_attention_of_as_many_tokens_stays_dense() -> None:
    torch.manual_seed(0)
    model, inputs = loud(pixart(64))
    wanted = run(model, inputs)
    use(model, EVERYTHING, min_tokens=0)
    assert error(run(model, inputs), wanted) < 1e-5
    assert routes(model)["transformer_blocks.0.attn2"] == (DENSE, "cross-attention")


def test_a_text_encoder_within_is_not_taken_for_the_picture() -> None:
    model, inputs = loud(hunyuan_video(torch.ones(2, 72)))
    inputs["encoder_hidden_states"] = text(72)
    use(model, EVERYTHING, min_tokens=0)
    run(model, inputs)
    refiner = "context_embedder.token_refiner.refiner_blocks.0.attn"
    assert routes(model)[refiner] == (DENSE, "as many text tokens as patches, so that which these are is not known")


def test_said_text_is_believed_where_nothing_else_shows_it() -> None:
    model, inputs = loud(flux())
    for said, route in (("first", SPARSE), ((7, 0), SPARSE), ((3, 3), DENSE), (None, DENSE)):
        use(model, EVERYTHING, min_tokens=0, text=said)
        router(model).sides.clear()
        router(model).listening = False  # as in a model that is compiled before it has run
        run(model, inputs)
        assert routes(model)["single_transformer_blocks.0.attn"][0] == route, said
        restore(model)


# ---- the grid ----------------------------------------------------------------------------------------------------


def test_without_a_grid_everything_is_dense_until_it_is_given() -> None:
    model, inputs = loud(flux())
    inputs["img_ids"] = torch.randn(48, 3)
    wanted = run(model, inputs)
    use(model, EVERYTHING, min_tokens=0)
    assert torch.equal(run(model, inputs), wanted)
    assert set(routes(model).values()) == {(DENSE, "the grid of patches is not known: pass grid=")}
    restore(model)
    use(model, EVERYTHING, min_tokens=0, grid=(8, 6))
    assert error(run(model, inputs), wanted) < 1e-5
    assert {row.tokens for row in report(model).rows} == {"7 text + 8×6"}


def test_tokens_are_put_into_the_order_of_the_grid() -> None:
    model, inputs = loud(flux())
    use(model, LITTLE, min_tokens=0)
    with torch.no_grad():
        wide, high = (run(model, inputs | {"img_ids": ids(*grid)}) for grid in ((8, 6), (6, 8)))
        said = use(restore(model), LITTLE, min_tokens=0, grid=(2, 24))
        flat = run(said, inputs)
        run(said, inputs | {"hidden_states": torch.randn(2, 24, 4), "img_ids": ids(4, 6)})
    assert error(wide, high) > 1e-3 and error(wide, flat) > 1e-3
    assert [row.why for row in report(said).rows if row.route == DENSE] == ["fewer tokens than the grid has cells"] * 2


@pytest.mark.parametrize(
    ("said", "tokens"),
    [(None, "75"), ("first", "75"), ((7, 20), "7 text + 8×6 + 20 text"), ((0, 27), "8×6 + 27 text")],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_picture_for_reference_in_the_latent_is_no_part_of_a_said_grid(said: Any, tokens: str, before: bool) -> None:
    """As Flux Kontext packs them, behind the picture; text first, as the table says, would take both for text."""
    model, inputs = loud(flux())
    use(model, LITTLE, min_tokens=0, grid=(8, 6), text=said)
    if before:
        run(model, inputs)
        report(model, reset=True)
    reference = ids(5, 4) + torch.tensor([1.0, 0, 0])
    packed = {"hidden_states": torch.randn(2, 68, 4), "img_ids": torch.cat([ids(8, 6), reference])}
    run(model, inputs | packed)
    assert {row.tokens for row in report(model).rows} == {tokens}
    why = "which of its tokens are text is not known: pass text=(how many before, how many after)"
    assert set(routes(model).values()) == {(SPARSE, "") if isinstance(said, tuple) else (DENSE, why)}
    report(model, reset=True)
    run(model, inputs)
    assert {row.tokens for row in report(model).rows} == {"7 text + 8×6"}, "without one the table holds"


# ---- what the operator does not do -------------------------------------------------------------------------------


def test_short_pictures_are_dense() -> None:
    model, inputs = loud(dit())
    wanted = run(model, inputs)
    use(model, LITTLE, min_tokens=65)
    assert torch.equal(run(model, inputs), wanted)
    assert routes(model) == {"transformer_blocks.0.attn1": (DENSE, "fewer than 65 picture tokens")}
    restore(model)
    use(model, LITTLE, min_tokens=64)
    assert error(run(model, inputs), wanted) > 1e-3


class Calls(nn.Module):
    """A layer that is named attention and calls torch's with what it is told."""

    def __init__(self, dtype: torch.dtype = torch.float32, heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.options, self.dtype, self.heads = options, dtype, heads

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q = hidden_states.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).to(self.dtype)
        k = q[:, : self.heads]
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, **self.options)


Calls.__name__ = Calls.__qualname__ = "CallsAttention"


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.config = {"patch_size": 1}
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states.flatten(2).mT)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout_p": 0.5}, "dropout"),
        ({"is_causal": True}, "causal"),
        ({"dtype": torch.float64}, "a dtype other than float32, float16 and bfloat16"),
    ],
)
def test_dropout_causality_and_other_dtypes_are_dense(options: dict[str, Any], why: str) -> None:
    model = use(Around(Calls(**options)), EVERYTHING, min_tokens=0)
    model(torch.randn(2, 32, 8, 8))
    assert routes(model) == {"layer": (DENSE, why)}


def test_a_config_may_be_an_object() -> None:
    model: Any = Around(Calls())
    model.config = SimpleNamespace(patch_size=1)
    use(model, EVERYTHING, min_tokens=0)(torch.randn(2, 32, 8, 8))
    assert routes(model) == {"layer": (SPARSE, "")}


def test_fewer_heads_of_keys_and_a_scale_are_honoured() -> None:
    model, x = Around(Calls(heads=1, enable_gqa=True, scale=0.7)), torch.randn(2, 32, 8, 8)
    wanted = model(x)
    use(model, EVERYTHING, min_tokens=0)
    assert error(model(x), wanted) < 1e-5 and routes(model) == {"layer": (SPARSE, "")}


def test_another_backend_is_refused_or_counted() -> None:
    model, inputs = loud(flux())
    refused = r"transformer_blocks.0.attn: expected diffusers' attention backend .*'flex'"
    try:
        model.set_attention_backend("flex")
        for one in (model, flux()[0]):  # it is the backend of all other models, too
            with pytest.raises(ValueError, match=refused):
                wrong(one)
    finally:
        model.set_attention_backend("native")
    use(model, EVERYTHING, min_tokens=0)

    class Own:
        _attention_backend = _parallel_config = None

        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    model.single_transformer_blocks[0].attn.set_processor(Own())
    run(model, inputs)
    assert routes(model)["single_transformer_blocks.0.attn"][0] == LEFT


def test_context_parallelism_is_refused_before_and_after() -> None:
    model, inputs = loud(wan())
    layer = model.blocks[0].attn1
    layer.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"blocks.0.attn1: expected no context parallelism"):
        wrong(model)
    layer.processor._parallel_config = None
    use(model, EVERYTHING, min_tokens=0)
    layer.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"blocks.0.attn1: expected no context parallelism"):
        run(model, inputs)
    layer.processor._parallel_config = None
    run(model, inputs)


# ---- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({**EVERYTHING, "head_dim": 32}, {}, "spec_or_specs: expected a spec for head_dim 16, .*, got 32"),
        ({8: {**EVERYTHING, "head_dim": 8}}, {}, "spec_or_specs: expected a spec for head_dim 16, .*, got 8"),
        ({32: EVERYTHING}, {}, r"spec_or_specs\[32\]: expected a spec of head_dim 32, got 16"),
        (lambda name, size: {**EVERYTHING, "head_dim": 32}, {}, "spec_or_specs: expected a spec of head_dim 16 for"),
        (lambda name, size: None, {}, "spec_or_specs: expected a spec for head_dim 16"),
        (EVERYTHING, {"grid": "8x8"}, "grid: expected integers"),
        (EVERYTHING, {"grid": (8, -1)}, "grid: expected integers"),
        (EVERYTHING, {"grid": (0, 8)}, "grid: expected integers of at least 1"),
        (EVERYTHING, {"text": "before"}, "text: expected"),
        (EVERYTHING, {"min_tokens": 1.5}, "min_tokens: expected an integer"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_is(spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        wrong(dit()[0], spec, **options)


@pytest.mark.parametrize("made", [lambda x: x, lambda x: x.as_module(), lambda x: {HEAD_DIM: x.as_module()}])
def test_compiled_operators_and_their_modules_are_specs(made: Any) -> None:
    torch.manual_seed(0)
    model, inputs = loud(flux())
    use(model, made(llsa_gen.compile(LITTLE)), min_tokens=0)
    found = run(model, inputs)
    use(restore(model), LITTLE, min_tokens=0)
    assert torch.equal(found, run(model, inputs))


def test_a_model_is_used_once_and_restored_once() -> None:
    model = use(dit()[0], EVERYTHING, min_tokens=0)
    with pytest.raises(ValueError, match="restore"):
        use(model, EVERYTHING)
    restore(model)
    for undone in (restore, report):
        with pytest.raises(ValueError, match=r"use\(model, spec\)"):
            undone(model)
    with pytest.raises(TypeError, match=r"pipe\.transformer"):
        use(object(), EVERYTHING)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers of attention"):
        use(nn.Linear(2, 2), EVERYTHING)


def test_a_function_chooses_layers() -> None:
    model, inputs = loud(sd3())
    use(model, lambda name, size: EVERYTHING if name.startswith("transformer_blocks.1") else None, min_tokens=0)
    run(model, inputs)
    assert routes(model) == {
        "transformer_blocks.0.attn": (DENSE, "no spec has its head_dim, 16"),
        "transformer_blocks.1.attn": (SPARSE, ""),
    }


# ---- how models are run ------------------------------------------------------------------------------------------


def test_checkpointing_runs_a_layer_again_as_it_ran() -> None:
    """Runs of as many tokens and other grids, as in training on pictures of several shapes."""
    torch.manual_seed(0)
    model, inputs = loud(sd3())
    use(model, LITTLE, min_tokens=0)
    shapes = [inputs, inputs | {"hidden_states": inputs["hidden_states"].mT}]

    def gradients() -> list[torch.Tensor]:
        found = []
        for together in ([shapes[0]], [shapes[1]], shapes, shapes[::-1]):
            model.zero_grad()
            losses = [run(model, one).square().mean() for one in together]
            torch.stack(losses).sum().backward()
            found += [x.grad.clone() for x in model.parameters() if x.grad is not None]
        return found

    wanted = gradients()
    model.train()
    model.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(), wanted))
    assert all(row.calls == 12 for row in report(model).rows), "a run again is no other call"


def test_checkpointing_that_does_not_come_from_the_output_is_no_guess() -> None:
    model, inputs = loud(sd3())
    use(model, LITTLE, min_tokens=0)
    model.train()
    model.enable_gradient_checkpointing()
    blocks: list[torch.Tensor] = []
    model.transformer_blocks[0].register_forward_hook(lambda module, args, out: blocks.append(out[1]))
    run(model, inputs)
    blocks[0].sum().backward()
    blocks.clear()
    run(model, inputs)
    run(model, inputs | {"hidden_states": inputs["hidden_states"].mT})
    with pytest.raises(RuntimeError, match="differentiate what the model returns, or one run before the next"):
        blocks[0].sum().backward()


def test_autocast_takes_the_operator_along() -> None:
    model, inputs = loud(sd3())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = run(model, inputs)
        use(model, EVERYTHING, min_tokens=0)
        found = run(model, inputs)
    assert found.dtype == wanted.dtype and error(found.float(), wanted.float()) < 3e-2
    assert set(routes(model).values()) == {(SPARSE, "")}


def test_threads_do_not_mix_their_grids() -> None:
    model, inputs = loud(sd3())
    use(model, LITTLE, min_tokens=0)
    sizes = [(16, 12), (12, 16), (8, 16), (16, 8)]
    given = [inputs | {"hidden_states": torch.randn(2, 4, *size)} for size in sizes]
    with torch.no_grad():
        wanted = [run(model, one) for one in given]
    found: list[Any] = [None] * len(sizes)

    def again(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[index] = run(model, given[index])

    threads = [threading.Thread(target=again, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, wanted))


def test_an_error_within_leaves_nothing_behind() -> None:
    model, inputs = loud(dit())
    use(model, EVERYTHING, min_tokens=0)
    layer = model.transformer_blocks[0].attn1
    layer.to_out[0], linear = nn.Linear(3, 3), layer.to_out[0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, inputs)
    layer.to_out[0] = linear
    assert now.call is None and now.context is None
    q = torch.randn(1, 2, 64, HEAD_DIM)
    torch.nn.functional.scaled_dot_product_attention(q, q, q)  # of nobody's
    before = report(model).sparse
    run(model, inputs)
    assert report(model).sparse == before + 1


def test_a_layer_alone_is_dense_and_says_so() -> None:
    model, _ = loud(dit())
    use(model, EVERYTHING, min_tokens=0)
    model.transformer_blocks[0].attn1(torch.randn(2, 64, 32))
    assert routes(model) == {"transformer_blocks.0.attn1": (DENSE, "called outside of its model's forward")}
