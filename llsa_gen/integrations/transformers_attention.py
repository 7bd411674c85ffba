"""The attention function and the mask functions that transformers calls, and what they refuse.

A module of a model that was given to `use` carries a `Layer`; by it the function knows the spec, so that two models
in one process do not mix. Names of the functions say what the model's own attention is: "llsa_sdpa" or "llsa_eager".
That one takes what is refused, if the caller asked for it, and what is too short to be worth it.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llsa_gen.compiler import Attention
from llsa_gen.integrations.crossing import Least
from llsa_gen.integrations.latest import Latest
from llsa_gen.integrations.placed import Run, attend
from llsa_gen.integrations.report import DENSE, SPARSE, Ledger, count
from llsa_gen.integrations.sequences import Masks, Place
from llsa_gen.integrations.transformers_tokens import Around, Patches
from llsa_gen.integrations.watching import names_of

__all__ = ["NATIVE", "PREFIX", "TAG", "Asked", "Layer", "Shared", "layer_of", "native_function", "native_options"]

PREFIX = "llsa_"
NATIVE = ("sdpa", "eager")
"""Attention of transformers' own in whose place the compiled one is put."""
TAG = "llsa_layer"

CHANGING = (
    "sliding_window", "softcap", "s_aux", "sinks", "position_bias", "head_mask", "cache", "attention_chunk_size",
    "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "block_table", "cross_attention_states",
)  # fmt: skip
"""Arguments of attention functions that say what is attended to, beside the mask."""
COMMON = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "kwargs"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Reason(NamedTuple):
    """Why a call can't be sparse, as an error says it."""

    argument: str
    came: str
    expected: str


@dataclass(eq=False)
class Shared:
    """What the layers of one `use` have in common."""

    attention: Attention
    ledger: Ledger
    least: Least
    otherwise: str
    grid: tuple[int, ...] | None
    last: dict[str, Any] | None = None
    """What the model was last called with, by name."""
    probe: Callable[[str, Run], None] | None = None
    """Shown each sparse call, while somebody asks for its quality."""
    weights: dict[str, Latest[bool]] = field(default_factory=dict)
    """Which models of it were called with output_attentions, by their names."""
    handles: list[Any] = field(default_factory=list)
    """Of the hooks."""


@dataclass(eq=False)
class Layer:
    """What a module of attention carries: where it is, and how its tokens stand."""

    name: str
    shared: Shared
    around: Around | None
    """What stands around the patches or the text, as far as it is known."""
    patches: Patches | None
    models: tuple[str, ...]
    """Names of the models that it is a part of."""
    native: Callable[..., Any]
    """The attention that the model has without this one."""
    options: tuple[str, ...]
    """What that one takes beside the common arguments."""


@dataclass(eq=False)
class Asked:
    """Notes what a model is called with, and whether for weights of attention: a hook before its forward pass."""

    shared: Shared
    name: str
    outermost: bool

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.outermost and not torch.compiler.is_compiling():
            self.shared.last = dict(zip(names_of(type(model)), args, strict=False)) | kwargs
        asked = kwargs.get("output_attentions")
        self.shared.weights[self.name].note(bool(model.config.output_attentions if asked is None else asked))


def layer_of(module: nn.Module) -> Layer | None:
    """What `use` put there."""
    return module.__dict__.get(TAG)


def native_function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The function that transformers calls for a module under "sdpa" or "eager"; None if the latter isn't found.

    It stands where the class's forward is written.
    """
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")


def native_options(function: Callable[..., Any]) -> tuple[str, ...]:
    """What an attention function takes beside what all take: a value for one of these may change what is attended."""
    return tuple(name for name in inspect.signature(function).parameters if name not in COMMON)


def refused(
    layer: Layer, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, options: dict[str, Any]
) -> Reason | None:
    """The first thing about a call that the compiled attention does not do."""
    if q.shape[2] != k.shape[2] or _crosses(layer, module):
        return Reason("key", "of another sequence than the queries", "self-attention")
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)  # as transformers' own function takes it
    if causal:
        return Reason("is_causal", "causal attention", "False, for every token sees every other one")
    for name in (*CHANGING, *layer.options):
        if options.get(name) is not None:
            return Reason(name, f"a {name.replace('_', ' ')}", "None")
    if mask is not None and not _hides_nothing(mask):
        return Reason(
            "attention_mask", "a mask that hides or weighs tokens", "none, or one that is True for every token"
        )
    if dropout:
        return Reason("dropout", f"{dropout}", "0: model.eval(), or the config's attention dropout set to 0")
    if options.get("output_attentions") or any(layer.shared.weights[name].get() for name in layer.models):
        return Reason("output_attentions", "True", "False, for there is no matrix of weights")
    head_dim = layer.shared.attention.spec.head_dim
    if q.shape[3] != head_dim or v.shape[3] != head_dim:
        return Reason("head_dim", f"{q.shape[3]}, of values {v.shape[3]}", f"{head_dim}, as in the spec")
    if q.shape[1] % k.shape[1]:
        return Reason("key", f"{k.shape[1]} heads for {q.shape[1]} of queries", "a divisor of them")
    if q.dtype not in DTYPES:
        return Reason("query", f"{q.dtype}", "float32, float16 or bfloat16")
    return None


def _crosses(layer: Layer, module: nn.Module) -> bool:
    """Whether keys come from elsewhere, which nothing in the call says: by the names that transformers has for it."""
    name = f"{layer.name.rpartition('.')[2]} {type(module).__name__}".lower()
    return getattr(module, "is_cross_attention", False) or any(x in name for x in ("cross", "encoder_att", "encdec"))


def _place(layer: Layer, q: Tensor) -> Place | Reason:
    """Which of the tokens are patches, or the text, and in which grid."""
    around, patches, fixed = layer.around, layer.patches, layer.shared.grid
    if around is None:
        return Reason("globals_first", "unknown for this type of model", "an integer given to use()")
    tokens, others = q.shape[2], around.first + around.last
    if not around.picture and fixed is None:
        if tokens < others:
            return Reason("query", "fewer tokens than globals", "at least as many")
        return Place((tokens - others,), around.first, around.last)
    grid = patches.of(tokens - others) if fixed is None and patches is not None else fixed
    shown = None if patches is None else patches.grid
    if shown is not None and math.prod(shown) == 1 != tokens - others:  # patches come cut, a batch to the convolution
        grid, shown = fixed, None
    if grid is None:
        return Reason("grid", "unknown, for nothing shows it", "the shape of the patches, given to use()")
    told = not torch.compiler.is_compiling()  # what a compiler counts is named by constants, and lengths may be none
    if patches is not None and patches.mixed:
        return Reason("grid", "pictures of several shapes in one batch", "one shape")
    if shown is not None and fixed not in (None, shown):
        return Reason("grid", f"patches {list(shown)}" if told else "others", f"{list(grid)}, as given to use()")
    place = Place(grid, around.first, around.last)
    if tokens == place.cells + others:
        return place
    if not told:
        return Reason("query", "another number of tokens", "patches and globals")
    return Reason("query", f"{tokens} tokens", f"{list(grid)} patches and {others} around them")


def _hides_nothing(mask: Any) -> bool:
    """Whether a mask is there and says nothing. Compilers are not asked for values."""
    if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
        return False
    return bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


def _attention(native: str) -> Callable[..., Any]:
    """The function that is registered for models whose own attention is `native`."""

    def llsa_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        dropout: float = 0.0, scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        layer = layer_of(module)
        if layer is None:
            raise ValueError(
                f"{type(module).__name__}: expected a module of a model that was given to "
                f'llsa_gen.integrations.transformers.use, got one without a spec under "{PREFIX}{native}"'
            )
        shared, why = layer.shared, ""
        found = refused(layer, module, query, key, value, attention_mask, dropout, options) or _place(layer, query)
        if isinstance(found, Reason):
            if shared.otherwise == "error":
                raise ValueError(
                    f"{layer.name}: {found.argument}: expected {found.expected}, got {found.came}; "
                    'use(..., otherwise="dense") leaves such calls to the model\'s own attention'
                )
            why = f"{found.argument}: {found.came}"
        else:
            least = shared.least(shared.attention, query)
            if isinstance(least, str):
                why = least
            elif found.cells < least:
                why = f"fewer than {least:,} tokens"
        said = "" if torch.compiler.is_compiling() else _said(found, query.shape[2])
        if why or isinstance(found, Reason):
            _count(layer, DENSE, why, said)
            return layer.native(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
        probe = shared.probe
        o = attend(
            shared.attention, query, key, value, found, Masks(None), None, scaling, scaled_dot_product_attention,
            None if probe is None else lambda run: probe(layer.name, run),
        )  # fmt: skip
        _count(layer, SPARSE, "", said)
        return o.transpose(1, 2).contiguous(), None

    return llsa_attention


def _said(found: Any, tokens: int) -> str:
    """The tokens of a call in words, for the report."""
    others = found.first + found.last if isinstance(found, Place) else 0
    return f"{tokens - others:,} + {others} global" if others else f"{tokens:,}"


def _count(layer: Layer, route: str, why: str, said: str) -> None:
    """One call more, unless a backward pass computes one again."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        count(layer.shared.ledger.key, layer.name, route, why, said)


for _native, _mask in zip(NATIVE, (sdpa_mask, eager_mask), strict=True):
    AttentionInterface.register(PREFIX + _native, _attention(_native))
    AttentionMaskInterface.register(PREFIX + _native, _mask)
