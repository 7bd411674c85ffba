"""What the fuzzer tries: a `Case` says, in a few plain values, one input of one spec; strategies draw specs and cases.

A case makes its tensors from its seed, always the same ones, on the CPU and then copied: a failure found anywhere can
be run again from the text `repr(case)`. A bench on a GPU draws them there, which a CPU takes minutes for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from triton import knobs

from llsa_gen import reference
from llsa_gen.reference.selection import parent_token
from llsa_gen.spec import Level, Spec

DType = Literal["float32", "float16", "bfloat16"]

Layout = Literal["contiguous", "transposed", "expanded", "sliced", "shifted", "every_second", "columns"]
"""How a [B, H, N, D] tensor lies in memory:

contiguous; transposed from [B, N, H, D]; heads expanded from one (a gradient: expanded from a scalar a row); a slice of
a wider last dimension, whose rows begin anywhere; such a slice whose rows all begin one element beyond where aligned
ones do; every second token of twice as many; D before N, so that no row has unit stride.
"""

Layouts = tuple[Layout, Layout, Layout, Layout]
CONTIGUOUS: Layouts = ("contiguous", "contiguous", "contiguous", "contiguous")

Values = Literal["normal", "integers", "constant", "zero_queries"]
"""What the elements are, all times `std`: normal; integers -2 to 2 (many equal scores); the same vector for every token
of a tensor; queries all zero (every score is equal).
"""

Kept = Literal["own", "other", "thinned"]
"""Which lists attention is given: those that `select` gives for the case, so that nothing may change; those of other
queries and keys; those of the case without some of their ids, in another order and width, some rows without any.
"""

ABOVE = 12.0
"""How far the logits of loud global tokens lie above those of all others, about."""


@dataclass(frozen=True)
class Case:
    """One input of one spec, made from `seed`."""

    spec: Spec
    n: int
    """Keys, and queries unless `m` says otherwise."""
    batch: int = 1
    heads: int = 1
    dtype: DType = "float32"
    layouts: Layouts = CONTIGUOUS
    """Of q, k, v and the gradient of o."""
    values: Values = "normal"
    std: float = 1.0
    """Standard deviation of q, k and v; the gradient of o always has 1."""
    popular: bool = False
    """Whether every query prefers the same few keys, so that every list names the same blocks."""
    scale: float | None = None
    grad_lse: bool = False
    """Whether lse has a gradient too, with a standard deviation of 1."""
    seed: int = 0
    device: str = "cpu"
    m: int | None = None
    """Queries, where they are not as many as keys."""
    query_offset: int = 0
    global_tokens: int = 0
    """Tokens that every query attends to, G. Their keys and values lie in memory as k and v do."""
    masked: bool = False
    """Whether some of them take no part, which hold NaN; often all of one batch entry."""
    loud: bool = False
    """Whether their logits lie far above all others: queries and global keys then have a direction in common."""
    kept: Kept | None = None
    """Which lists attention is given, if any."""
    drawn_there: bool = False
    """Whether q, k, v and the gradient of o are drawn on the device: other numbers than on a CPU."""

    @property
    def queries(self) -> int:
        """M."""
        return self.n if self.m is None else self.m

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and o."""
        return getattr(torch, self.dtype)

    @property
    def softmax_scale(self) -> float:
        """The factor of the logits."""
        return self.spec.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def standard(self) -> bool:
        """Whether q, k, v are standard normal: the inputs that `reference.tolerance` speaks of."""
        return self.values == "normal" and self.std == 1.0 and not self.popular and self.scale is None and not self.loud

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of o, [B, H, M or N, D] of the case's dtype and strides, on its device."""
        place = torch.device(self.device if self.drawn_there else "cpu")
        generator = torch.Generator(place).manual_seed(self.seed)
        shape, of_keys = ((self.batch, self.heads, tokens, self.spec.head_dim) for tokens in (self.queries, self.n))
        q, k, v = (self._elements(size, generator) * self.std for size in (shape, of_keys, of_keys))
        grad_o = torch.randn(shape, generator=generator, device=place)
        if self.values == "zero_queries":
            q = torch.zeros_like(q)
        if self.popular:
            bump = 3.0 * self.std / self.spec.head_dim**0.5
            q, k = q + bump, k + bump * popularity(self.spec, self.n).to(place)[:, None]
        if self.loud:
            q = q + self.std * self._direction().to(place)
        if self.layouts[3] == "expanded":
            grad_o = grad_o[..., :1].expand(shape)
        q, k, v, grad_o = (
            lay_out(x.to(self.torch_dtype), layout) for x, layout in zip((q, k, v, grad_o), self.layouts, strict=True)
        )
        if self.layouts[3] == "expanded":
            grad_o = grad_o[..., :1].expand(shape)
        return tuple(on_device(x, self.device) for x in (q, k, v, grad_o))  # type: ignore[return-value]

    def gradient_of_lse(self) -> Tensor | None:
        """The gradient of lse, float32 [B, H, M], or None."""
        if not self.grad_lse:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn((self.batch, self.heads, self.queries), generator=generator).to(self.device)

    def shared(self) -> dict[str, Tensor]:
        """k_global, v_global [B, H, G, D] and, where there is one, global_mask [B, G], by these names; maybe nothing.

        Those that take no part hold NaN, so that whoever looks at them gives himself away.
        """
        if not self.global_tokens:
            return {}
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.batch, self.heads, self.global_tokens, self.spec.head_dim)
        k, v = (self._elements(shape, generator) * self.std for _ in range(2))
        if self.loud and self.softmax_scale:
            # the logits of other keys have this standard deviation, and few are four of them away
            spread = abs(self.softmax_scale) * self.std**2 * (2 * self.spec.head_dim) ** 0.5
            logit = (ABOVE + 4 * spread) / (self.softmax_scale * self.std**2 * self.spec.head_dim)
            k = k / 4 + logit * self.std * self._direction()
        given = {"k_global": k, "v_global": v}
        mask = self._mask(generator)
        for (name, x), layout in zip(given.items(), self.layouts[1:3], strict=True):
            x = x.to(self.torch_dtype)
            x = x if mask is None else x.masked_fill(~mask[:, None, :, None], torch.nan)
            given[name] = on_device(lay_out(x, layout), self.device)
        return given if mask is None else given | {"global_mask": on_device(mask, self.device)}

    def lists(self, q: Tensor, k: Tensor, selected: Sequence[Tensor]) -> list[Tensor] | None:
        """The lists that attention is given, int32 [B, H, T_l(M), W_l], finest level first, or None.

        `q` and `k` are those of the case, `selected` what the operator selects for them. Each id is a child of one that
        the parent query token has in its list.
        """
        if self.kept is None or self.kept == "own":
            return None if self.kept is None else list(selected)
        if self.kept == "other":
            generator = torch.Generator().manual_seed(self.seed + 3)
            q, k = (torch.randn(x.shape, generator=generator).to(x) for x in (q, k))
        lists = list(reference.select(self.spec, q, k, query_offset=self.query_offset))
        return thinned(self, lists) if self.kept == "thinned" else lists

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        """Which global tokens take part, bool [B, G]; where k has unusual strides, so has the mask."""
        if not self.masked:
            return None
        mask = torch.rand((self.batch, self.global_tokens), generator=generator) < 0.6
        if torch.rand((), generator=generator) < 0.5:
            mask[int(torch.randint(self.batch, (), generator=generator))] = False
        return mask if self.layouts[1] == "contiguous" else mask.T.contiguous().T

    def _direction(self) -> Tensor:
        """What queries and loud global keys have in common, [D]: ones of either sign."""
        generator = torch.Generator().manual_seed(self.seed + 4)
        return 2.0 * torch.randint(2, (self.spec.head_dim,), generator=generator) - 1

    def _elements(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        place = generator.device
        if self.values == "integers":
            return torch.randint(-2, 3, shape, generator=generator, device=place).float()
        if self.values == "constant":
            return torch.randn((*shape[:2], 1, *shape[3:]), generator=generator, device=place).expand(shape)
        return torch.randn(shape, generator=generator, device=place)

    def __repr__(self) -> str:
        """As it would be written: fields that have their default value are left out, and descriptions with them."""
        spec = self.spec.model_copy(update={"description": ""})
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"spec": spec}
        told = [f"{field.name}={values[field.name]!r}" for field in fields(self) if values[field.name] != field.default]
        return f"Case({', '.join(told)})"


def popularity(spec: Spec, n: int) -> Tensor:
    """How popular each key token is, float32 [n]: at every level, K_l tokens in the middle more so than the rest."""
    popular = torch.zeros(n)
    top = spec.span(spec.num_levels)
    first = n // 2 // top * top
    for level in range(1, spec.num_levels + 1):
        popular[first : first + spec.topk(level) * spec.span(level)] += 1
    return popular


def thinned(case: Case, lists: Sequence[Tensor]) -> list[Tensor]:
    """Lists without some of their ids, and without the children of those, in another order; some rows of -1 alone.

    A level may be narrower than it was, or wider as far as its K allows. Where q has unusual strides, so have they.
    """
    spec, device = case.spec, lists[0].device
    generator = torch.Generator().manual_seed(case.seed + 5)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    given = list(lists)
    for level in range(spec.num_levels, 0, -1):
        ids = lists[level - 1]
        *rows, width = ids.shape
        dropped = (random(*rows, width) < 0.3) | (random(*rows, 1) < 0.15)
        if level < spec.num_levels:
            above = parent_token(spec, level, torch.arange(ids.shape[2], device=device), case.query_offset)
            parents = given[level][:, :, above]
            dropped |= ~(ids[..., :, None] // spec.block(level + 1) == parents[..., None, :]).any(-1)
        ids = ids.masked_fill(dropped, -1).gather(-1, random(*rows, width).argsort(-1))
        if width:
            widths = width, width, 1 + int(random(1) * width), min(spec.topk(level), width + 1 + int(random(1) * 3))
            chosen = widths[int(random(1) * len(widths))]
            ids = pad(ids[..., :chosen], (0, max(0, chosen - width)), value=-1)
        given[level - 1] = ids.contiguous() if case.layouts[0] == "contiguous" else ids.mT.contiguous().mT
    return given


def lay_out(x: Tensor, layout: Layout) -> Tensor:
    """The values of `x` [B, H, N, D], other strides; for `expanded` those of its first head.

    Whatever lies between the elements is NaN, so that a kernel that reads too much gives itself away.
    """
    batch, heads, n, dim = x.shape
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].contiguous().expand(x.shape)
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "sliced":
        wide = x.new_full((batch, heads, n, 2 * dim + 3), torch.nan)[..., 1 : dim + 1]
        return wide.copy_(x)
    if layout == "shifted":
        return x.new_full((batch, heads, n, 2 * dim), torch.nan)[..., 1 : dim + 1].copy_(x)
    if layout == "every_second":
        return x.new_full((batch, heads, 2 * n, dim), torch.nan)[:, :, ::2].copy_(x)
    return x.contiguous()


def on_device(x: Tensor, device: str) -> Tensor:
    """`x` on `device` with the strides and the surroundings that it has on the CPU."""
    if torch.device(device) == x.device:
        return x
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).to(device)
    return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())


def on_interpreter(device: str) -> bool:
    """Whether tensors there go through Triton's interpreter, for which the variable is set before triton's import."""
    return torch.device(device).type == "cpu" and knobs.runtime.interpret


GLOBAL_TOKENS = (1, 2, 3, 5, 16, 17, 32, 33, 64, 77, 128, 200)
"""Numbers of global tokens that are drawn: a few, and about as many as tiles of keys hold."""


@dataclass(frozen=True)
class Reach:
    """How far drawn cases go: what a device does in a moment."""

    tokens: int
    """Longest sequence, but for specs whose coarsest tokens span more."""
    longest: int
    """Longest sequence for those."""
    total: int
    """Most tokens over all heads."""
    blocks: int
    """Most level-1 tokens over all heads: what the number of programs goes by."""
    global_tokens: tuple[int, ...]
    """Numbers of global tokens, beside none."""
    dtypes: tuple[DType, ...]


def reach(device: str) -> Reach:
    """The reach of a device. The interpreter is slow, and its products of bfloat16 tensors are wrong."""
    if torch.device(device).type != "cpu":
        return Reach(
            tokens=2048, longest=12288, total=12288, blocks=12288, global_tokens=GLOBAL_TOKENS, dtypes=get_args(DType)
        )
    if on_interpreter(device):
        return Reach(
            tokens=100,
            longest=300,
            total=300,
            blocks=24,
            global_tokens=GLOBAL_TOKENS[:8],
            dtypes=("float32", "float16"),
        )
    return Reach(tokens=400, longest=2000, total=2000, blocks=2000, global_tokens=GLOBAL_TOKENS, dtypes=get_args(DType))


def specs(max_levels: int = 4, max_topk: int = 40) -> st.SearchStrategy[Spec]:
    """Legal specs, mostly small ones: few levels, short blocks, small K and head dims, powers of two or not."""
    finest = st.one_of(st.integers(2, 20), st.sampled_from([2, 4, 8, 16]), st.integers(21, 140))
    coarser = st.one_of(st.integers(2, 6), st.integers(2, 20))  # or else one coarsest token spans everything
    topks = st.one_of(st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(1, max_topk))
    head_dims = st.one_of(st.integers(8, 40), st.sampled_from([8, 16, 32, 64]), st.sampled_from([80, 128, 200, 256]))

    @st.composite
    def draw_spec(draw: st.DrawFn) -> Spec:
        above = draw(st.lists(st.builds(Level, block=coarser, topk=topks), max_size=max_levels - 1))
        levels = (draw(st.builds(Level, block=finest, topk=topks)), *above)
        some = st.lists(st.integers(1, len(levels)), unique=True, min_size=1).map(lambda chosen: tuple(sorted(chosen)))
        whole: st.SearchStrategy[Literal["all", "none"]] = st.sampled_from(("all", "none"))
        enrich = draw(st.one_of(whole, some))
        reweight = draw(st.sampled_from([True, True, False]))
        return Spec(name="fuzzed", head_dim=draw(head_dims), levels=levels, enrich=enrich, reweight=reweight)

    return draw_spec()


def lengths(spec: Spec, most: int) -> st.SearchStrategy[int]:
    """Lengths from 1 to `most`: any, and those where a level's last token is full, one short, or one over."""
    edges = {1, 2, 3, most}
    for level in range(1, spec.num_levels + 1):
        span = spec.span(level)
        for multiple in (1, 2, 3, spec.topk(level), spec.topk(level) + 1, most // span):
            edges.update(span * multiple + shift for shift in (-1, 0, 1))
    return st.one_of(st.integers(1, most), st.sampled_from(sorted(n for n in edges if 1 <= n <= most)))


def cases(spec: Spec | None = None, device: str = "cpu") -> st.SearchStrategy[Case]:
    """Cases of one spec, or of drawn ones, within the `reach` of the device."""
    far = reach(device)
    layout = st.sampled_from(get_args(Layout))
    common: st.SearchStrategy[Layouts] = st.just(CONTIGUOUS)
    drawn_specs = specs(max_topk=9 if on_interpreter(device) else 40)

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        chosen = draw(drawn_specs) if spec is None else spec
        most = max(far.tokens, min(far.longest, 3 * chosen.span(chosen.num_levels)))
        length = lengths(chosen, min(most, far.blocks * chosen.block(1)))
        n = draw(length)
        room = max(1, min(far.total // n, far.blocks * chosen.block(1) // n))
        heads = draw(st.integers(1, min(3, room)))
        m = draw(st.one_of(st.none(), st.none(), length))
        missing = draw(st.sampled_from([None] * 30 + ["keys", "queries"]))
        seen = draw(st.sampled_from([False, False, True]))
        global_tokens = draw(st.sampled_from(far.global_tokens)) if seen else 0
        return Case(
            spec=chosen,
            n=0 if missing == "keys" else n,
            heads=heads,
            batch=draw(st.integers(1, min(3, room // heads))),
            dtype=draw(st.sampled_from(far.dtypes)),
            layouts=draw(st.one_of(common, st.tuples(layout, layout, layout, layout))),
            values=draw(st.sampled_from(["normal", "normal", "normal", "integers", "constant", "zero_queries"])),
            std=draw(st.sampled_from([1.0, 1.0, 8.0, 0.1])),
            popular=draw(st.sampled_from([False, False, True])),
            scale=draw(st.sampled_from([None, None, None, 1.0, 0.0, -0.3])),
            grad_lse=draw(st.sampled_from([False, False, True])),
            seed=draw(st.integers(0, 9999)),
            device=device,
            m=n if missing == "keys" and m is None else 0 if missing == "queries" else m,
            query_offset=draw(st.sampled_from([0, 0, 0, 1, chosen.block(1), chosen.span(chosen.num_levels) + 3])),
            global_tokens=global_tokens,
            masked=global_tokens > 0 and draw(st.sampled_from([False, True])),
            loud=global_tokens > 0 and draw(st.sampled_from([False, False, True])),
            kept=draw(st.sampled_from([None, None, None, None, None, None, "own", "other", "thinned", "thinned"])),
        )

    return draw_case()
