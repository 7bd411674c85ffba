"""Sparse or dense: what becomes of each call of attention in a watched model, and the count of it.

The router takes a call over only where everything about it is known: that it is self-attention, which of its tokens are
the picture's, their grid, and that neither a mask nor anything else asks for what the operator does not do. Whatever is
left goes to the model's own attention, with the reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llsa_gen.integrations import report, sequences
from llsa_gen.integrations.grids import Shape, candidates, main_input, text_lengths
from llsa_gen.integrations.placed import Run, attend
from llsa_gen.integrations.sequences import Masks, Place, Text
from llsa_gen.integrations.watching import Call, Context, now, resume, resumed

__all__ = ["Router"]

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Of torch's scaled_dot_product_attention, as far as they may be positional."""
LAYER_INPUTS = ("hidden_states", "x", "image", "img", "query")
SOURCES = ("encoder_hidden_states", "context", "encoder_hidden_state", "txt", "text", "kv")
"""Names by which an attention layer is given a second sequence."""
NO_SOURCES = ("rot", "pos", "freq", "emb", "mask", "bias", "cos", "sin", "norm")
"""Parts of names of what else it may be given that is as long."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REMEMBERED = 8
"""Runs of the model that gradient checkpointing may come back to."""

CROSS = "cross-attention"
OTHERS = "queries and keys of other lengths"
OUTSIDE = "called outside of its model's forward"
COMPILED = "the layer itself is compiled: compile its block or the model"
NO_CALL = "it does not call torch's attention: linear attention, or another backend"


class Router:
    """Decides and counts for one model. Copies and pickles of the model take it along, without counts and inputs.

    Args:
        ledger: where calls are counted.
        operators: gives the operator for a layer, by its name and head dim; None if it is to stay dense.
        least: gives the fewest picture tokens that are worth it, or why none are: by operator and the query tensor.
        check: raises for a layer that must not be run so.
        grid: the grid of patches, in place of what inputs show.
        text: where text is, for sequences that do not show it.
        sides: the same, by layer, where the class of the model tells it.
    """

    def __init__(
        self, ledger: report.Ledger, operators: Callable[[str, int], Any], least: Callable[[Any, Tensor], int | str],
        check: Callable[[nn.Module, str], None], grid: Shape | None, text: Text, sides: Mapping[str, Text],
    ) -> None:  # fmt: skip
        self.ledger = ledger
        self.operators = operators
        self.least = least
        self.check = check
        self.grid = grid
        self.text = text
        self.sides = dict(sides)
        """Where the text of a layer is, and "alone" for a layer that was seen to have none."""
        self.joined: set[str] = set()
        """Layers whose keys were seen to be put together of their queries' tokens and others."""
        self.listening = True
        """Whether all of the model is listened to, and not only its layers, until the place of all text is known."""
        self.open = False
        """Whether the place of some text stayed open in this run."""
        self.recent: list[Context] = []
        self.last: dict[str, Any] | None = None
        """The arguments of the model's last run."""
        self.probe: Callable[[str, Run], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"recent": [], "last": None, "probe": None}

    def enter(self, module: nn.Module, arguments: dict[str, Any], around: Context | None) -> Context:
        """What a module is given that shows a grid."""
        self.check(module, "")
        latent = main_input(arguments)
        config: Any = getattr(module, "config", None) or {}
        config = config if isinstance(config, Mapping) else vars(config)
        grids = (self.grid,) if self.grid is not None else candidates(type(module).__name__, config, arguments)
        batch = latent.shape[0] if isinstance(latent, Tensor) else len(latent) if isinstance(latent, list) else 1
        texts = text_lengths(arguments)
        if around is not None and around.owner == self.ledger.key:  # a model within the model
            return Context(self.ledger.key, grids or around.grids, batch, around.texts + texts, around.parts)
        compiling = torch.compiler.is_compiling()
        more = isinstance(latent, Tensor) and latent.ndim == 3 and _other_lengths(latent, grids)
        context = Context(self.ledger.key, grids, batch, texts, learning=self.listening and not compiling, more=more)
        if not compiling:
            self.last = _without_graph(arguments)
            self.open = not grids
            if torch.is_grad_enabled():
                known = [one for one in self.recent if (one.grids, one.batch, one.texts) != (grids, batch, texts)]
                self.recent = [*known[1 - REMEMBERED :], context]
        return context

    def leave(self, context: Context, result: Any) -> None:
        if context.learning:
            self.listening = self.open
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            resume(context, result)

    def begin(self, module: nn.Module, name: str, arguments: dict[str, Any]) -> Call | None:
        """What an attention layer is given."""
        self.check(module, name)
        if not torch.compiler.is_compiling() and module._compiled_call_impl is not None:
            self._count(name, report.DENSE, COMPILED)
            return None
        given = [arguments[one] for one in LAYER_INPUTS if isinstance(arguments.get(one), Tensor)]
        hidden = given[0] if given else next((x for x in arguments.values() if isinstance(x, Tensor)), None)
        crossed = any(_is_source(one, x, hidden) for one, x in arguments.items())
        if hidden is None:
            return Call(name, None, crossed)
        if hidden.ndim == 4:  # a picture [B, C, H, W]
            return Call(name, hidden.shape[2] * hidden.shape[3], crossed, tuple(hidden.shape[2:]))
        return Call(name, hidden.shape[1] if hidden.ndim == 3 else None, crossed)

    def end(self, call: Call) -> None:
        if not call.seen:
            self._count(call.name, report.LEFT, NO_CALL)

    def attend(self, call: Call, native: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Torch's attention, by the operator or by `native`, which is torch's own, with what came, as it came."""
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        decided = self._decide(call, given)
        q, k = given["query"], given["key"]
        compiling = torch.compiler.is_compiling()  # then lengths may be symbols, which no text may hold
        if isinstance(decided, str):
            self._count(call.name, report.DENSE, decided, "" if compiling else _lengths(q, k))
            return native(*args, **kwargs)
        operator, place, masks = decided
        probe = self.probe
        shown = None if probe is None or compiling else lambda run: probe(call.name, run)
        o = attend(
            operator, q, k, given["value"], place, masks, given.get("attn_mask"), given.get("scale"), native, shown
        )
        self._count(call.name, report.SPARSE, "", "" if compiling else str(place))
        return o

    def _decide(self, call: Call, given: Mapping[str, Any]) -> tuple[Any, Place, Masks] | str:
        q, k, v = (given[name] for name in ARGUMENTS[:3])
        if q.ndim != 4 or k.ndim != 4:
            return "tensors that are not [B, H, N, D]"
        tokens, keys = q.shape[2], k.shape[2]
        if keys != tokens and not self._asks_alone(call, tokens, keys):
            return CROSS if call.crossed and not self._joins(call, tokens, keys) else OTHERS
        if keys == tokens and call.crossed and call.tokens == tokens:
            return CROSS
        place = self._place(call, k)
        if isinstance(place, str):
            return place
        if keys != tokens and place.cells != tokens:
            return OTHERS
        operator = self.operators(call.name, q.shape[3])
        if operator is None:
            return f"no spec has its head_dim, {q.shape[3]}"
        if q.shape[3] != v.shape[3] or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1] or q.shape[0] != k.shape[0]:
            return "q, k and v of other shapes"
        alike = q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled(q.device.type)
        if not alike or any(x.dtype not in DTYPES for x in (q, k, v)):
            return "a dtype other than float32, float16 and bfloat16"
        if given.get("dropout_p"):
            return "dropout"
        if given.get("is_causal"):
            return "causal"
        least = self.least(operator, q)
        if isinstance(least, str):
            return least
        if place.cells < least:
            return f"fewer than {least:,} picture tokens"
        mask = given.get("attn_mask")
        if mask is None:
            return operator, place, Masks(None)
        masks = sequences.look(mask, q.shape[0], place, keys)
        return masks if isinstance(masks, str) else (operator, place, masks)

    def _asks_alone(self, call: Call, tokens: int, keys: int) -> bool:
        """Whether the queries are the layer's whole input, whose keys were put together there with others'."""
        return call.tokens == tokens and any(sum(x) == keys and x.count(tokens) == 1 for x in call.parts)

    def _joins(self, call: Call, tokens: int, keys: int) -> bool:
        """Whether the queries are a part of what they attend to: put together in the layer, or by who called it."""
        if any(sum(lengths) == keys for lengths in call.parts):
            return True
        around = [] if now.context is None or torch.compiler.is_compiling() else now.context.parts
        if any(sum(lengths) == keys and tokens in lengths for lengths in around):
            self.joined.add(call.name)  # for later runs, which are not listened to
        return call.name in self.joined

    def _place(self, call: Call, k: Tensor) -> Place | str:
        """Where the picture is among the tokens that a call attends to."""
        if call.grid is not None:
            context = Context(self.ledger.key, (call.grid,), k.shape[0], ())
            return self._place_in(context, call, k)
        context = now.context
        if context is not None and context.owner == self.ledger.key:
            return self._place_in(context, call, k)
        if _in_backward():  # checkpointed: the layer runs again, its model does not
            context = resumed()
            known = self.recent if context is None or context.owner != self.ledger.key else [context]
            found = {self._place_in(one, call, k) for one in known}
            if len(found) > 1:
                raise RuntimeError(
                    f"{call.name}: gradient checkpointing runs it again, and of the model's last runs several had "
                    f"{k.shape[2]} tokens, with other grids: differentiate what the model returns, "
                    "or one run before the next"
                )
            return found.pop() if found else OUTSIDE
        return OUTSIDE

    def _place_in(self, context: Context, call: Call, k: Tensor) -> Place | str:
        tokens, copies = k.shape[2], 1
        if context.batch and k.shape[0] % context.batch == 0:
            copies = k.shape[0] // context.batch
        side = self.sides.get(call.name)
        others = {tokens - math.prod(grid) for grid in context.grids}
        exact = isinstance(self.text, tuple) and sum(self.text) in others
        known = not exact and not context.more and side not in (None, "alone")
        text = side if known else self._said(context, tokens)
        place = sequences.find(tokens, context.grids, call.parts, text, copies=copies)
        if place == sequences.NO_TEXT:
            place = sequences.find(tokens, context.grids, context.parts, text, copies=copies)
        if isinstance(place, str):
            self.open = self.open or place == sequences.NO_TEXT
            return place
        if not place.first and not place.last:
            if tokens in context.texts and side != "alone" and call.grid is None:
                return sequences.AS_MANY
            if side is None:
                self.sides[call.name] = "alone"
        elif place.side is not None and side is None:
            self.sides[call.name] = place.side
        return place

    def _said(self, context: Context, tokens: int) -> Text:
        """What the caller has said of text, where there may be as much of it: another sequence may be no picture."""
        others = [tokens - math.prod(grid) for grid in context.grids]
        return (
            self.text
            if isinstance(self.text, tuple) or not context.texts or any(count in context.texts for count in others)
            else None
        )

    def _count(self, name: str, route: str, why: str = "", tokens: str = "") -> None:
        if torch.compiler.is_compiling() or not _in_backward():  # a run again is no other call
            report.count(self.ledger.key, name, route, why, tokens)


def _other_lengths(latent: Tensor, grids: Sequence[Shape]) -> bool:
    """Whether a packed latent, [B, N, C] or [B, C, N], is as long as no grid: then there is more than a picture."""
    return bool(grids) and all(math.prod(grid) not in latent.shape[1:] for grid in grids)


def _is_source(name: str, x: Any, hidden: Any) -> bool:
    """Whether an argument of an attention layer is a second sequence: by its name, or as long as the first one."""
    if not isinstance(x, Tensor) or x is hidden:
        return False
    if name in SOURCES:
        return True
    alike = x.ndim == 3 and hidden.ndim == 3 and x.is_floating_point() and x.shape[:2] == hidden.shape[:2]
    return alike and not any(part in name for part in NO_SOURCES)


def _without_graph(x: Any) -> Any:
    """Arguments for another run, that keep no graph of autograd alive."""
    if isinstance(x, Tensor):
        return x.detach()
    if type(x) in (list, tuple):
        return type(x)(_without_graph(one) for one in x)
    return {name: _without_graph(one) for name, one in x.items()} if type(x) is dict else x


def _lengths(q: Tensor, k: Tensor) -> str:
    return f"{q.shape[-2]:,}" if q.shape[-2] == k.shape[-2] else f"{q.shape[-2]:,} × {k.shape[-2]:,}"


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
