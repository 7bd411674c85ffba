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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from llsa_gen.compiler import Attention, compile
from llsa_gen.errors import short
from llsa_gen.integrations import crossing
from llsa_gen.integrations.quality import draw, judged
from llsa_gen.integrations.report import Ledger, Report
from llsa_gen.integrations.routing import Router
from llsa_gen.integrations.sequences import Text
from llsa_gen.integrations.watching import MARK, unwatch, watch
from llsa_gen.spec import Spec

__all__ = ["report", "restore", "use"]

OneSpec = str | os.PathLike[str] | Spec | Attention
Specs = OneSpec | Mapping[Any, Any] | Callable[[str, int], Any]

SINGLE_STREAM: dict[str, tuple[str, Text]] = {
    "AuraFlowTransformer2DModel": ("single_", "first"),
    "BriaTransformer2DModel": ("single_", "first"),
    "ChromaTransformer2DModel": ("single_", "first"),
    "Flux2Transformer2DModel": ("single_", "first"),
    "FluxTransformer2DModel": ("single_", "first"),
    "HunyuanImageTransformer2DModel": ("single_", "last"),
    "HunyuanVideoTransformer3DModel": ("single_", "last"),
    "Lumina2Transformer2DModel": ("layers.", "first"),
}
"""Where the text is in layers that are given one sequence, by the class of the model and the beginning of their names.

All but Lumina2 show it themselves, unless the whole model is compiled; tests compare.
"""


def use(
    model: nn.Module, spec_or_specs: Specs, *, grid: Sequence[int] | None = None, text: Text = None,
    min_tokens: int | None = None,
) -> nn.Module:  # fmt: skip
    """Let the self-attention of a model's pictures be sparse, in place. Returns the model.

    The model keeps its class, parameters, processors and state dict. It may be trained, checkpointed, copied and
    compiled by torch. Sequences with text have it as global tokens (`llsa_gen.joint_attention`). Cross-attention, short
    sequences and whatever the operator does not do stay as they are; `report` says which and why.

    Args:
        model: a transformer or a UNet of diffusers, such as `pipe.transformer`.
        spec_or_specs: what `llsa_gen.compile` takes, or an operator that it gave; or a mapping from head dims to such;
            or a function of the name of a layer and its head dim that gives one, or None for a layer to stay dense.
        grid: the grid of patches, such as (height, width) or (frames, height, width), where the model's inputs do not
            show it: `report` then says so.
        text: where text is in sequences that have it, where the model does not show that: "first", "last", or how many
            tokens are before and after the picture.
        min_tokens: the fewest picture tokens for which attention is sparse; unless given, from where on it is faster
            on the device, measured once (`llsa_gen.integrations.crossing`).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `compile` raises for a spec.
    """
    model = _model(model)
    if MARK in model.__dict__:
        raise ValueError("model: expected one without compiled attention, got one that has it: restore(model) first")
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(f"model: expected one with layers of attention, got {type(model).__name__}, which has none")
    shape, text, least = _checked(grid, text, min_tokens)
    operators = _operators(spec_or_specs)
    _check_parallel(model, type(model).__name__)
    sizes = {name: _head_dim(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        _check_parallel(layer, name)
        _check_backend(layer, name)
    known = sorted({size for size in sizes.values() if size is not None})
    if known and not any(operators(name, size) for name, size in sizes.items() if size is not None):
        came = f"a spec of head_dim {_one(spec_or_specs)}" if _one(spec_or_specs) else "none that fits"
        raise ValueError(f"spec_or_specs: expected a spec for head_dim {' or '.join(map(str, known))}, got {came}")

    beginning, side = SINGLE_STREAM.get(type(model).__name__, ("", None))
    sides = {name: side for name in layers if side is not None and name.startswith(beginning)}
    router = Router(Ledger(list(layers)), operators, _Least(least), _check_parallel, shape, text, sides)
    if least is None:
        _measure(model, operators, sizes)
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
            sampled queries. Its counts do not change.
        picture: a file for a PNG of what one layer keeps, over the latent; the model is run once more for that, too.
        layer: the layer to draw; the middle one of those that are sparse, unless given.
        reset: begin to count anew afterwards.

    Raises:
        ValueError: where `use` was not called, or there is no last input, or no such sparse layer.
    """
    model = _model(model)
    router = _router(model)
    notes = [_least_note(router)]
    found = None
    if quality:
        found = judged(model, router)
        notes.append("mass: dense softmax on tokens attended to; error: of o; both over 64 sampled queries a head")
    if picture is not None:
        notes.append(f"picture: {draw(model, router, picture, layer)}")
    result = router.ledger.report(tuple(note for note in notes if note), found)
    print(result)
    if reset:
        router.ledger.reset()
    return result


class _Least:
    """The fewest picture tokens worth it: what the caller says, or what is measured on the device."""

    def __init__(self, given: int | None) -> None:
        self.given = given
        self.measured: dict[str, int] = {}
        """By device and dtype in words, for the report."""

    def __call__(self, operator: Any, q: Tensor) -> int | str:
        if self.given is not None:
            return self.given
        if q.device.type not in crossing.LONGEST:
            return f"no device of ours: {q.device.type}"
        name = f"{q.device.type}, {str(q.dtype).removeprefix('torch.')}, spec {operator.spec.name}"
        if name not in self.measured:
            if torch.compiler.is_compiling():
                return "not measured on this device and dtype: run once uncompiled, or pass min_tokens="
            self.measured[name] = crossing.measured(operator, q.device, q.dtype)
        least = self.measured[name]
        return "dense attention is faster on this device" if least >= crossing.NEVER else least


def _least_note(router: Router) -> str:
    least: Any = router.least
    if least.given is not None:
        return f"sparse from {least.given:,} picture tokens on: min_tokens"
    found = [
        f"{'nowhere' if length >= crossing.NEVER else f'from {length:,} picture tokens on'} ({name})"
        for name, length in least.measured.items()
    ]
    return f"sparse is faster than dense on this device: {'; '.join(found)}" if found else ""


def _measure(model: nn.Module, operators: Callable[[str, int], Any], sizes: Mapping[str, int | None]) -> None:
    """What the layers will ask for, before torch.compile can come between."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type not in crossing.LONGEST:
        return
    for size in {size for size in sizes.values() if size is not None}:
        for name, own in sizes.items():
            operator = operators(name, size) if own == size else None
            if operator is not None and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16):
                crossing.measured(operator, parameter.device, parameter.dtype)
                break


def _model(model: Any) -> nn.Module:
    found = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(found, nn.Module):
        raise TypeError(f"model: expected a torch module, such as pipe.transformer, got {type(model).__name__}")
    return found


def _router(model: nn.Module) -> Router:
    mark = model.__dict__.get(MARK)
    if mark is None or mark.name:
        raise ValueError("model: expected one that use(model, spec) was called for, got another")
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
    return hasattr(module, "config") and any(_layers(module))


def _head_dim(layer: Any) -> int | None:
    """Of its queries, where the layer says it."""
    heads, to_q = getattr(layer, "heads", None), getattr(layer, "to_q", None)
    if isinstance(heads, int) and heads and isinstance(to_q, nn.Linear):
        return to_q.out_features // heads
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        size = getattr(layer, name, None)
        if isinstance(size, int):
            return size
    return None


def _one(specs: Any) -> int | None:
    """The head dim of the one spec, if it is one."""
    try:
        return _operator(specs).spec.head_dim if not callable(specs) or isinstance(specs, Attention) else None
    except Exception:
        return None


def _operator(spec: Any) -> Attention:
    return spec if isinstance(spec, Attention) else compile(spec)


class _ByHeadDim:
    """Operators by head dim: of one spec, or of a mapping."""

    def __init__(self, operators: Mapping[int, Attention]) -> None:
        self.operators = dict(operators)

    def __call__(self, name: str, head_dim: int) -> Attention | None:
        return self.operators.get(head_dim)


class _ByLayer:
    """Operators that a function of the caller's chooses, by layer and head dim; asked once for each."""

    def __init__(self, choose: Callable[[str, int], Any]) -> None:
        self.choose = choose
        self.chosen: dict[tuple[str, int], Attention | None] = {}

    def __call__(self, name: str, head_dim: int) -> Attention | None:
        if (name, head_dim) not in self.chosen:
            spec = self.choose(name, head_dim)
            operator = None if spec is None else _operator(spec)
            if operator is not None and operator.spec.head_dim != head_dim:
                raise ValueError(
                    f"spec_or_specs: expected a spec of head_dim {head_dim} for {name}, got {operator.spec.head_dim}"
                )
            self.chosen[name, head_dim] = operator
        return self.chosen[name, head_dim]


def _operators(specs: Any) -> Callable[[str, int], Any]:
    if isinstance(specs, Mapping) and specs and all(isinstance(size, int) for size in specs):
        found = {}
        for size, spec in specs.items():
            operator = _operator(spec)
            if operator.spec.head_dim != size:
                raise ValueError(
                    f"spec_or_specs[{size}]: expected a spec of head_dim {size}, got {operator.spec.head_dim}"
                )
            found[size] = operator
        return _ByHeadDim(found)
    if callable(specs) and not isinstance(specs, Attention):
        return _ByLayer(specs)
    operator = _operator(specs)
    return _ByHeadDim({operator.spec.head_dim: operator})


def _checked(grid: Any, text: Any, least: Any) -> tuple[tuple[int, ...] | None, Text, int | None]:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if grid is not None:
        if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid or not all(map(whole, grid)):
            raise TypeError(f"grid: expected integers such as (height, width), or None, got {short(repr(grid))}")
        grid = tuple([size for size in grid if size != 1]) or (1,)
    pair = isinstance(text, tuple) and len(text) == 2 and all(map(whole, text))
    if text not in (None, "first", "last") and not pair:
        raise ValueError(f'text: expected "first", "last", (how many before, how many after) or None, got {text!r}')
    if least is not None and not whole(least):
        raise TypeError(f"min_tokens: expected an integer of at least 0, or None, got {short(repr(least))}")
    return grid, text, least


def _check_parallel(module: nn.Module, name: str) -> None:
    """Sequences that are cut among devices would be attended to as if each cut were the whole."""
    holder = getattr(module, "processor", module)
    config = getattr(holder, "_parallel_config", None)
    if config is not None and (holder is not module or getattr(config, "context_parallel_config", None) is not None):
        raise ValueError(
            f"{name}: expected no context parallelism, which cuts sequences among devices, got a _parallel_config; "
            "restore(model), or leave enable_parallelism out"
        )


def _check_backend(layer: nn.Module, name: str) -> None:
    backend = getattr(getattr(layer, "processor", None), "_attention_backend", None)
    if backend is not None and not str(getattr(backend, "value", backend)).lstrip("_").startswith("native"):
        raise ValueError(
            f'{name}: expected diffusers\' attention backend "native", got {getattr(backend, "value", backend)!r}; '
            "model.reset_attention_backend() first"
        )
