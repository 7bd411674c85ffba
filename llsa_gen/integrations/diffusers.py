"""Models of diffusers with compiled attention: `use` puts it in, `report` says what went where, `restore` takes it out.

    from llsa_gen.integrations.diffusers import report, use

    use(pipe.transformer, "pixels.yaml")
    images = pipe(prompt).images
    report(pipe.transformer)

Nothing here depends on the class of a model. A layer is one that has a processor, or that is named attention; what it
calls is torch's scaled_dot_product_attention, directly or by diffusers' dispatcher. What is sparse and what stays dense
is decided call by call (`llsa_gen.integrations.routing`).
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, BinaryIO

from torch import nn

from llsa_gen.errors import short
from llsa_gen.integrations.crossing import Least
from llsa_gen.integrations.quality import SAMPLED, draw, judged
from llsa_gen.integrations.report import Ledger, Report
from llsa_gen.integrations.routing import Router
from llsa_gen.integrations.sequences import Text
from llsa_gen.integrations.specs import Specs, operators_of
from llsa_gen.integrations.watching import MARK, unwatch, watch

__all__ = ["report", "restore", "use"]

FIRST: dict[str, Text] = {"*": "first"}
LAST: dict[str, Text] = {"transformer_blocks.*": "last", "single_transformer_blocks.*": "last"}
ALONE: dict[str, Text] = {"transformer_blocks.*.attn1": "alone", "blocks.*.attn1": "alone"}
SIDES: dict[str, dict[str, Text]] = {
    "AuraFlowTransformer2DModel": FIRST,
    "BriaTransformer2DModel": FIRST,
    "ChromaTransformer2DModel": FIRST,
    "CogVideoXTransformer3DModel": FIRST,
    "Flux2Transformer2DModel": FIRST,
    "FluxTransformer2DModel": FIRST,
    "HunyuanImageTransformer2DModel": LAST,
    "HunyuanVideoTransformer3DModel": LAST,
    "LTXVideoTransformer3DModel": ALONE,
    "Lumina2Transformer2DModel": {"noise_refiner.*": "alone", "layers.*": "first"},
    "PRXTransformer2DModel": FIRST,
    "PixArtTransformer2DModel": ALONE,
    "QwenImageTransformer2DModel": FIRST,
    "SD3Transformer2DModel": {"transformer_blocks.*.attn": "last", "transformer_blocks.*.attn2": "alone"},
    "SkyReelsV2Transformer3DModel": ALONE,
    "WanTransformer3DModel": ALONE,
}
"""Where the text is, by the class of a model and patterns of its layers' names; "alone" where there is none.

Models show it themselves when they run, all of these but Lumina2; a test compares. What is written here is for a whole
model that is compiled by torch before it has run, and for runs in which text and picture have as many tokens.
"""


def use(
    model: nn.Module, spec_or_specs: Specs, *, grid: Sequence[int] | None = None, text: Text = None,
    min_tokens: int | None = None,
) -> nn.Module:  # fmt: skip
    """Let the self-attention of a model's pictures be sparse, in place. Returns the model.

    The model keeps its parameters, processors, hooks and state dict, and its class in name and by isinstance. It may be
    trained, checkpointed, copied, pickled and compiled by torch. Sequences with text have it as global tokens
    (`llsa_gen.joint_attention`). Cross-attention, short sequences and whatever the operator does not do stay as they
    are; `report` says which and why.

    Args:
        model: a transformer or a UNet of diffusers, such as `pipe.transformer`.
        spec_or_specs: what `llsa_gen.compile` takes, or an operator that it gave; or a mapping from head dims to such;
            or a function of the name of a layer and its head dim that gives one, or None for a layer to stay dense.
        grid: the grid of patches, such as (height, width) or (frames, height, width), where the model's inputs do not
            show it: `report` then says so. Runs with other grids are dense.
        text: where text is in sequences that have it, where the model does not show that: "first", "last", or how many
            tokens are before and after the picture.
        min_tokens: the fewest picture tokens for which attention is sparse; unless given, from where on it is faster
            on the device, measured once (`llsa_gen.integrations.crossing`).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `compile` raises for a spec.
    """
    model = _model(model)
    if any(MARK in module.__dict__ for module in model.modules()):
        raise ValueError("model: expected one without compiled attention, got one that has it: restore(model) first")
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(f"model: expected one with layers of attention, got {type(model).__name__}, which has none")
    shape = _grid(grid)
    _check_text(text)
    if min_tokens is not None and not _whole(min_tokens):
        raise TypeError(f"min_tokens: expected an integer of at least 0, or None, got {short(repr(min_tokens))}")
    for name, module in [(type(model).__name__, model), *layers.items()]:
        _check_parallel(module, name)
        _check_backend(module, name)
    sizes = {name: _head_dim(layer) for name, layer in layers.items()}
    operators = operators_of(spec_or_specs, sizes)

    least = Least(min_tokens)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        for operator in {operators(name, size) for name, size in sizes.items() if size is not None} - {None}:
            least.prepare(operator, parameter.device, parameter.dtype)
    router = Router(Ledger(list(layers)), operators, least, _check_parallel, shape, text, _sides(model, layers))
    within = [(name, module) for name, module in model.named_modules() if name and _shows_a_grid(module)]
    for name, layer in layers.items():
        watch(layer, router, name, attends=True)
    for name, module in [("", model), *within]:
        watch(module, router, name, attends=False)
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model as it was before `use`. Returns it. Raises ValueError where there is nothing to undo."""
    model = _model(model)
    _router(model)
    for module in list(model.modules()):
        if MARK in module.__dict__:
            unwatch(module)
    return model


def report(
    model: nn.Module, *, quality: bool = False, picture: str | os.PathLike[str] | BinaryIO | None = None,
    layer: str | None = None, reset: bool = False,
) -> Report:  # fmt: skip
    """Print what went where, layer by layer: calls, sparse or dense, of how many tokens, and why. Returns it.

    Args:
        model: one that `use` was given; or a copy, or what torch.compile made of it.
        quality: run the model once more on its last input, without gradients, and say of each sparse layer how much of
            the dense softmax lies on tokens that it attends to, and how far its output is from dense attention's, on
            sampled queries. Counts do not change.
        picture: a file for a PNG of what one layer keeps, over the latent; the model is run once more for that, too. It
            needs a layer over (height, width), and `llsa-gen[demo]`.
        layer: the layer to draw; the middle one of those that are sparse, unless given.
        reset: begin to count anew afterwards.

    Raises:
        ValueError: where `use` was not called, or there is no last input, or no such sparse layer.
    """
    model = _model(model)
    router = _router(model)
    if layer is not None and picture is None:
        raise ValueError(f"layer: expected None without picture=, which draws it, got {short(repr(layer))}")
    if picture is not None and not isinstance(picture, str | os.PathLike) and not hasattr(picture, "write"):
        raise TypeError(f"picture: expected a path or a binary file, got {type(picture).__name__}")
    notes = [str(router.least)]
    found = None
    if quality:
        found = judged(model, router)
        notes.append(
            f"mass: of dense softmax on tokens attended to; error: of o against dense; of {SAMPLED} queries a head"
        )
    if picture is not None:
        notes.append(f"picture: {draw(model, router, picture, layer)}")
    result = router.ledger.report(tuple(note for note in notes if note), found)
    print(result)
    if reset:
        router.ledger.reset()
    return result


def _model(model: Any) -> nn.Module:
    found = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(found, nn.Module):
        raise TypeError(f"model: expected a torch module, such as pipe.transformer, got {type(model).__name__}")
    return found


def _router(model: nn.Module) -> Router:
    mark = model.__dict__.get(MARK)
    if mark is None or mark.name:
        raise ValueError(
            f"model: expected one that use(model, spec) was called for, got another {type(model).__name__}"
        )
    return mark.watcher


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return hasattr(module, "processor") or "attention" in name or name.endswith("attn")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of attention: those with a processor, and those that are named so and have no other such in them."""
    for name, module in model.named_modules():
        if name and _is_attention(module):
            inner = any(_is_attention(other) for other in module.modules() if other is not module)
            if hasattr(module, "processor") or not inner:
                yield name, module


def _shows_a_grid(module: nn.Module) -> bool:
    """Models within models, such as the transformers of a UNet."""
    named = hasattr(module, "config") or type(module).__name__.endswith("Model")
    return named and any(_layers(module))


def _head_dim(layer: Any) -> int | None:
    """Of its queries, where the layer says it."""
    heads, width = getattr(layer, "heads", None), getattr(getattr(layer, "to_q", None), "out_features", None)
    if isinstance(heads, int) and heads and isinstance(width, int):
        return width // heads
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        size = getattr(layer, name, None)
        if isinstance(size, int):
            return size
    return None


def _sides(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Text]:
    patterns = SIDES.get(type(model).__name__, {})
    return {name: side for name in layers for pattern, side in patterns.items() if fnmatchcase(name, pattern)}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _grid(grid: Any) -> tuple[int, ...] | None:
    if grid is None:
        return None
    if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid or not all(map(_whole, grid)) or 0 in grid:
        raise TypeError(
            f"grid: expected integers of at least 1, such as (height, width), or None, got {short(repr(grid))}"
        )
    return tuple([size for size in grid if size != 1]) or (1,)


def _check_text(text: Any) -> None:
    pair = isinstance(text, tuple) and len(text) == 2 and all(map(_whole, text))
    if text is not None and not pair and text not in ("first", "last"):
        raise ValueError(
            f'text: expected "first", "last", (how many before, how many after) or None, got {short(repr(text))}'
        )


def _check_parallel(module: nn.Module, name: str) -> None:
    """Sequences that are cut among devices would be attended to as if each cut were the whole."""
    processor = getattr(module, "processor", None)
    cut = getattr(processor, "_parallel_config", None) is not None
    whole: Any = getattr(module, "_parallel_config", None)
    if cut or getattr(whole, "context_parallel_config", None) is not None:
        raise ValueError(
            f"{name or type(module).__name__}: expected no context parallelism, which cuts sequences among devices, "
            "got a _parallel_config: leave enable_parallelism out, or restore(model)"
        )


def _check_backend(module: nn.Module, name: str) -> None:
    """Other backends do not call torch's attention; diffusers keeps one for a layer, and one for all that have none."""
    processor: Any = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return
    backend = processor._attention_backend
    if backend is None:
        registry: Any = getattr(
            sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None
        )
        backend = None if registry is None else registry.get_active_backend()[0]
    backend = getattr(backend, "value", backend)
    if backend is not None and not str(backend).lstrip("_").startswith("native"):
        raise ValueError(
            f'{name}: expected diffusers\' attention backend "native", got {backend!r}: '
            'model.set_attention_backend("native") first'
        )
