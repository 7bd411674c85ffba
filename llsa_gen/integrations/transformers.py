"""Compiled attention in models of transformers: `use` puts it in, `report` says what it took, `restore` takes it out.

    from llsa_gen.integrations import transformers as llsa

    llsa.use(model, "pixels.yaml")

It goes through the interfaces that transformers has for this, AttentionInterface and AttentionMaskInterface: no class
is patched, no weight is touched, and what is saved is the model as it was.
"""

import copy
import inspect
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

try:
    from transformers import PreTrainedConfig, PreTrainedModel
except ImportError as error:
    raise ImportError("expected transformers 5 or newer, got none: pip install 'llsa-gen[transformers]'") from error

from llsa_gen.integrations.crossing import Least
from llsa_gen.integrations.latest import Latest
from llsa_gen.integrations.quality import judged
from llsa_gen.integrations.report import LEFT, Ledger, Report
from llsa_gen.integrations.specs import OneSpec, operator_of
from llsa_gen.integrations.transformers_attention import (
    NATIVE,
    PREFIX,
    TAG,
    Asked,
    Layer,
    Shared,
    layer_of,
    native_function,
    native_options,
)
from llsa_gen.integrations.transformers_tokens import Around, around_of, patches_of

__all__ = ["report", "restore", "use"]


Model = TypeVar("Model", bound=nn.Module)


def use(
    model: Model,
    spec: OneSpec,
    *,
    grid: Sequence[int] | None = None,
    globals_first: int | None = None,
    globals_last: int | None = None,
    min_tokens: int | None = None,
    otherwise: str = "error",
) -> Model:
    """Let every attention layer of a model attend by a compiled spec, in training and inference.

    Class, distillation, register and detection tokens of vision models are global tokens, as in
    `llsa_gen.joint_attention`; patches are put into the order of their grid around each attention. Texts are sequences
    without globals. From now on the model has a config of its own, a copy. Returns the model.

    Args:
        model: a model of transformers, or a module with some in it; its attention "sdpa" or "eager".
        spec: what `llsa_gen.compile` takes, or an operator that it gave; its head_dim is that of the model.
        grid: shape of the patches, (height, width) or (frames, height, width); unless given, what the convolution of
            the model makes of each input.
        globals_first, globals_last: how many tokens stand before and after the patches; unless given, what is known
            for the type of the model.
        min_tokens: below this many patches, or tokens of a text, the model's own attention is taken; unless given, the
            length from which on the compiled one is faster on the device, measured once and kept.
        otherwise: "error", or "dense" for leaving what the compiled attention does not do, such as causal layers,
            masks, windows and dropout, to the model's own attention, call by call. `report` says which and why.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `compile` raises for a spec.
    """
    plain = _plain(model)
    if otherwise not in ("error", "dense"):
        raise ValueError(f'otherwise: expected "error" or "dense", got {otherwise!r}')
    for name, count in (("globals_first", globals_first), ("globals_last", globals_last), ("min_tokens", min_tokens)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise ValueError(f"{name}: expected an integer of at least 0, or None, got {count!r}")
    shape = None if grid is None else _shape(grid)
    attention = operator_of(spec)
    models = {name: module for name, module in plain.named_modules() if isinstance(module, PreTrainedModel)}
    if not models:
        raise TypeError(f"model: expected a model of transformers, got {type(plain).__name__} without one")

    if any(layer_of(module) is not None for module in plain.modules()):
        raise ValueError("model: expected one without compiled attention, got one that has it: restore(model) first")
    least = Least(min_tokens)
    shared = Shared(attention, Ledger(), least, otherwise, shape)
    layers, left = _layers(plain, models, shared, (globals_first, globals_last))
    names = ("head_dim", "attention_head_size")
    sizes: set[Any] = {vars(module).get(name) for module, _ in layers for name in names} - {None}
    if sizes and attention.spec.head_dim not in sizes:
        wanted = " or ".join(map(str, sorted(sizes)))
        raise ValueError(f"spec: expected head_dim {wanted}, as in the model, got {attention.spec.head_dim}")
    parameter = next(plain.parameters(), None)
    if parameter is not None:
        least.prepare(attention, parameter.device, parameter.dtype)
    _own_configs(plain)
    shared.weights.update((name, Latest(False)) for name in models)
    for index, (name, one) in enumerate(models.items()):
        shared.handles.append(one.register_forward_pre_hook(Asked(shared, name, not index), with_kwargs=True))
    for patches in {id(layer.patches): layer.patches for _, layer in layers}.values():
        if patches is not None:
            shared.handles.append(patches.watch())
    for module, layer in layers:
        module.__dict__[TAG] = layer
    shared.ledger = Ledger([layer.name for module, layer in layers if _calls_interface(module)])
    for name, why in left.items():
        shared.ledger.count(name, LEFT, why)
    return model


def report(model: nn.Module, *, quality: bool = False, reset: bool = False) -> Report:
    """Print which layers of a model attended by the compiled operator, which did not, and why. Returns it.

    Args:
        model: one that `use` was given; or a copy, or what torch.compile made of it.
        quality: run the model once more on its last input, without gradients, and say of each sparse layer how much of
            the dense softmax lies on tokens that it attends to, and how far its output is from dense attention's, on
            sampled queries. Its counts do not change.
        reset: begin to count anew afterwards.

    Raises:
        ValueError: where `use` was not called, or the model has not run since.
    """
    model = _plain(model)
    shared = _shared(model)
    notes = [str(shared.least)]
    names = {config._attn_implementation for config in _configs(model)} - {PREFIX + name for name in NATIVE}
    if names:
        notes.append(f"a part of the model was set to {', '.join(sorted(map(str, names)))} attention since use()")
    found = None
    if quality:
        found = judged(model, shared)
        notes.append("mass: dense softmax on tokens attended to; error: of o; both over 64 sampled queries a head")
    result = shared.ledger.report(tuple(note for note in notes if note), found)
    print(result)
    if reset:
        shared.ledger.reset()
    return result


def restore(model: Model) -> Model:
    """The model as it was before `use`; its config says what it said. Returns it. ValueError if nothing is to undo."""
    plain = _plain(model)
    _shared(plain)
    for module in plain.modules():
        layer = layer_of(module)
        if layer is not None:
            del module.__dict__[TAG]
            while layer.shared.handles:
                layer.shared.handles.pop().remove()
    for config in _configs(plain):
        name = config._attn_implementation
        if name is not None and name.startswith(PREFIX):
            config._attn_implementation_internal = name.removeprefix(PREFIX)
    return model


def _layers(
    model: nn.Module, models: dict[str, Any], shared: Shared, given: tuple[int | None, int | None]
) -> tuple[list[tuple[nn.Module, Layer]], dict[str, str]]:
    """The modules of attention with what they will carry; and those that don't ask transformers' interface, and why."""
    layers: list[tuple[nn.Module, Layer]] = []
    left: dict[str, str] = {}
    made = {name: patches_of(one) for name, one in models.items()}
    for name, module in model.named_modules():
        parts = tuple(one for one in models if not one or name == one or name.startswith(one + "."))
        named = re.search("attention|attn", type(module).__name__, re.IGNORECASE)
        if not parts or not (named or _calls_interface(module)):
            continue
        owner = models[parts[-1]]
        if not owner._can_set_attn_implementation():
            left[name] = f"{type(owner).__name__} does not use transformers' AttentionInterface"
        elif not owner._supports_sdpa:
            left[name] = f"attention of {type(owner).__name__} is more than torch's"
        else:
            patches = next((made[one] for one in reversed(parts) if made[one] is not None), None)
            known = around_of(owner)
            if known is None and given == (None, None) and shared.otherwise == "error":
                raise ValueError(
                    f"globals_first: expected an integer, for nothing is known of the tokens of "
                    f"{type(owner).__name__}, {owner.config.model_type!r}: how many stand before the patches, or the "
                    "text, and are no part of it"
                )
            if given != (None, None):
                seen = owner.main_input_name.startswith("pixel")  # no sequence: its patches need a grid
                first, last, picture = known or Around(0, 0, seen or shared.grid is not None or patches is not None)
                known = Around(first if given[0] is None else given[0], last if given[1] is None else given[1], picture)
            native = native_function(module, _native_name(name, module, owner))
            if native is None and not _calls_interface(module):
                continue  # what holds one that does
            if native is None:
                raise ValueError(
                    f"model: expected eager_attention_forward beside {type(module).__name__}, got none in {name}; "
                    'model.set_attn_implementation("sdpa") does without'
                )
            layers.append((module, Layer(name, shared, known, patches, parts, native, native_options(native))))
    asked = any(_calls_interface(module) for module, _ in layers)
    if not asked or (left and shared.otherwise == "error"):
        name, why = next(iter(left.items()), (type(model).__name__, "none of its layers asks it for an attention"))
        raise TypeError(f"model: expected one whose attention goes through transformers' interface; {name}: {why}")
    return layers, left


def _native_name(name: str, module: nn.Module, owner: Any) -> str:
    """What a module attends by without this adapter, "sdpa" or "eager"."""
    config = module.__dict__.get("config", owner.config)
    native = str(config._attn_implementation).removeprefix(PREFIX)
    if native not in NATIVE:
        raise ValueError(
            f'model: expected attention "sdpa" or "eager", got {native!r} in {name}; '
            'model.set_attn_implementation("sdpa") changes it'
        )
    return native


def _calls_interface(module: nn.Module) -> bool:
    """Whether this module asks for the attention function itself; others of such names hold one that does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _own_configs(model: nn.Module) -> None:
    """Copies of all configs for this model, which another one may share; they name the registered functions."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                module.__dict__[name] = copy.deepcopy(value, memo)
    for config in _configs(model):
        if config._attn_implementation in NATIVE:
            config._attn_implementation_internal = PREFIX + config._attn_implementation


def _plain(model: Any) -> nn.Module:
    """The model that torch.compile was given."""
    found = getattr(model, "_orig_mod", model)
    if not isinstance(found, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    return found


def _configs(model: nn.Module) -> list[Any]:
    """All configs that modules hold, each once."""
    found = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, PreTrainedConfig)
    }
    return list(found.values())


def _shared(model: nn.Module) -> Shared:
    for module in model.modules():
        layer = layer_of(module)
        if layer is not None:
            return layer.shared
    raise ValueError(f"model: expected one that was given to use(), got {type(model).__name__} without a spec")


def _shape(grid: Any) -> tuple[int, ...]:
    expected = "grid: expected the shape of the patches, 2 or 3 integers of at least 1, such as (height, width)"
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        raise TypeError(f"{expected}, got {type(grid).__name__}")
    if len(grid) not in (1, 2, 3) or not all(type(size) is int and size > 0 for size in grid):
        raise ValueError(f"{expected}, got {list(grid)!r}")
    return tuple(grid)
