"""`LLSAttention`: a compiled spec as a layer, multi-head self-attention in the place of a dense one."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from llsa_gen.compiler import compile
from llsa_gen.errors import short
from llsa_gen.joint import joint_attention
from llsa_gen.order import Order, grid
from llsa_gen.order.sequence import permuted
from llsa_gen.spec import Spec

__all__ = ["LLSAttention"]

Rotary = tuple[Tensor, Tensor]


class LLSAttention(nn.Module):
    """Multi-head self-attention over tokens [B, N, embed_dim], by a compiled spec.

    Parameters have the names, shapes and first values of torch.nn.MultiheadAttention: `in_proj_weight`, `in_proj_bias`,
    `out_proj.weight`, `out_proj.bias`. So a dense layer's state dict loads, and `from_dense` takes over a whole layer.
    With qk_norm there are `q_norm.weight` and `k_norm.weight` too.

    Of the tokens of x the `globals_first` first and the `globals_last` last are global: they see and are seen by all
    (`llsa_gen.joint_attention`). The others, called image tokens here, attend sparsely to each other.

    With an order the image tokens alone are permuted, and come back as they came; global tokens stay in place. That
    costs two copies of one number a channel: x goes through one index_select before the projection, a third of what q,
    k and v would be, and o through one that takes the place of the copy which brings heads beside each other anyway.
    The rows of rotary tables are permuted with the tokens, so that the result is that of rotating first. Where several
    layers follow each other, it is cheaper to permute once around all of them, and to leave `order` out.

    Order and tables are no part of the state dict. They go with the module to its device, keep their dtype, and are
    made again by `to_empty`.

    Args:
        embed_dim: channels of x.
        num_heads: how many heads; embed_dim / num_heads is the head_dim of the spec.
        spec: what `llsa_gen.compile` takes: a path, a dict or a Spec.
        bias: whether both projections have one.
        qk_norm: whether each head's queries and keys go through an RMSNorm with a weight of their own, before they are
            rotated.
        rotary: (cos, sin), floats [N, head_dim] each, N being all tokens of x, global ones too: a row of cos 1 and
            sin 0 leaves a token as it is. A head's two halves are the parts of its rotated pairs: q becomes
            q * cos + cat(-q_second, q_first) * sin, in the wider of both dtypes, and k the same way. These tables are
            constants; `forward` may be given others.
        order: the order of the image tokens: an `llsa_gen.order.Order`, or the shape of their grid, such as
            (height, width), for `llsa_gen.order.grid`. It fixes how many there are.
        globals_first, globals_last: how many tokens of x are global, at its beginning and at its end.
        scale: the factor of the logits, 1/sqrt(head_dim) unless given.
        device, dtype: of the parameters, as in torch's own layers; float32, float16 or bfloat16.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; what `compile` raises for a spec.
    """

    in_proj_bias: nn.Parameter | None
    permutation: Tensor | None
    inverse: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        spec: str | os.PathLike[str] | Mapping[str, object] | Spec,
        *,
        bias: bool = True,
        qk_norm: bool = False,
        rotary: Rotary | None = None,
        order: Order | int | Sequence[int] | None = None,
        globals_first: int = 0,
        globals_last: int = 0,
        scale: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = _whole("embed_dim", embed_dim, 1)
        self.num_heads = _whole("num_heads", num_heads, 1)
        self.globals_first = _whole("globals_first", globals_first, 0)
        self.globals_last = _whole("globals_last", globals_last, 0)
        self.scale = scale
        self.attention = compile(spec)
        self.head_dim = self.attention.spec.head_dim
        if self.head_dim * num_heads != embed_dim:
            raise ValueError(
                f"embed_dim: expected num_heads * head_dim, {num_heads} * {self.head_dim} = "
                f"{num_heads * self.head_dim}, for the head_dim {self.head_dim} of spec {self.attention.spec.name}, "
                f"got {embed_dim}, a head_dim of {embed_dim / num_heads:g}"
            )

        where: Any = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **where))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **where)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **where)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **where) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **where) if qk_norm else None
        self._reset_own()

        if order is None or isinstance(order, Order):
            self._grid, self._order = None, order
        else:
            self._order = grid(order, self.attention.spec, device="cpu")  # even if the parameters are on meta
            self._grid = (order,) if isinstance(order, int) else tuple(order)
        self._rotary = None
        if rotary is not None:
            self._check_rotary(rotary, None if self._order is None else self._globals + len(self._order))
            self._rotary = (rotary[0].detach(), rotary[1].detach())
        # not the parameters' device: accelerate's init_empty_weights has these on meta, but buffers where they belong
        self._place(torch.get_default_device() if device is None else torch.device(device))

    @classmethod
    def from_dense(
        cls, module: nn.MultiheadAttention, spec: str | os.PathLike[str] | Mapping[str, object] | Spec, **more: Any
    ) -> Self:
        """The sparse layer with the weights of a dense one: copies, so that training one does not change the other.

        dtype, device, training flag and the requires_grad of each parameter are those of `module`; hooks are not
        taken over. The layer takes [B, N, embed_dim]. If `module` is not batch_first, a warning says so.

        Args:
            module: a torch.nn.MultiheadAttention for self-attention, without what this layer does not have: kdim or
                vdim other than embed_dim, add_bias_kv, add_zero_attn, dropout.
            spec, more: the other arguments of the class: qk_norm, whose weights begin at 1, rotary, order,
                globals_first, globals_last, scale.

        Raises:
            TypeError, ValueError: naming what `module` has and this layer does not; what the class raises.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"module: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        size = module.embed_dim
        for name, found, expected in (
            ("kdim", module.kdim, size),
            ("vdim", module.vdim, size),
            ("add_bias_kv", module.bias_k is not None, False),
            ("add_zero_attn", module.add_zero_attn, False),
            ("dropout", module.dropout, 0.0),
        ):
            if found != expected:
                raise ValueError(f"module: expected {name} {expected}, got {found}, which LLSAttention does not have")
        if not module.batch_first:
            warnings.warn(
                "from_dense: the dense layer takes [N, B, embed_dim], this one [B, N, embed_dim]: transpose its input "
                "and output",
                stacklevel=2,
            )
        weight: Tensor = module.in_proj_weight
        # on meta nothing is initialised in vain, and no random numbers are drawn
        made = cls(size, module.num_heads, spec, bias=module.in_proj_bias is not None, device="meta",
                   dtype=weight.dtype, **more)  # fmt: skip
        made.to_empty(device=weight.device)
        for norm in (made.q_norm, made.k_norm):
            if norm is not None:
                norm.reset_parameters()
        for ours, theirs in ((made, module), (made.out_proj, module.out_proj)):
            for name, parameter in ours.named_parameters(recurse=False):
                value: Tensor = getattr(theirs, name)
                with torch.no_grad():
                    parameter.copy_(value)
                parameter.requires_grad_(value.requires_grad)
        return made.train(module.training)

    def forward(
        self,
        x: Tensor,
        *,
        global_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        kv: None = None,
        key_padding_mask: None = None,
    ) -> Tensor:
        """Attend: x [B, N, embed_dim] to [B, N, embed_dim], in the dtype of the parameters, or that of autocast.

        Args:
            x: global tokens first, then image tokens, then global tokens again; N is the number of all.
            global_mask: bool [B, globals_first + globals_last], True where a global token takes part; first the first
                ones, then the last ones. The others are seen by nobody, and their own rows are the bias of `out_proj`.
            rotary: (cos, sin) instead of those of the class, [N, head_dim], by the place in x: differentiable.
            kv, key_padding_mask: None; they are here to say that there is neither cross-attention nor a mask of image
                tokens.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
        """
        if kv is not None:
            raise ValueError("kv: expected None, for LLSAttention is self-attention; llsa_gen.compile(spec) gives more")
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask: expected None, for image tokens have no mask; global_mask is for global tokens"
            )
        self._check_input(x)
        if rotary is None and self.cos is not None and self.sin is not None:
            cos, sin = tables = self.cos, self.sin  # in the order of the tokens
            self._check_rotary(tables, x.shape[1])
        elif rotary is not None:
            self._check_rotary(rotary, x.shape[1])
            cos, sin = (t if self.permutation is None else t.index_select(0, self.permutation) for t in rotary)
        else:
            cos = sin = None
        if self.permutation is not None and self.inverse is not None:
            x = permuted(x, self.permutation, self.inverse, 1)

        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()  # [B, H, N, D]
        if self.q_norm is not None and self.k_norm is not None:
            wide = self.q_norm.weight.dtype  # under autocast another one than that of q
            q, k = self.q_norm(q.to(wide)), self.k_norm(k.to(wide))
        if cos is not None and sin is not None:
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        o = joint_attention(
            self.attention, q.to(v.dtype), k.to(v.dtype), v, globals_first=self.globals_first,
            globals_last=self.globals_last, global_mask=global_mask, scale=self.scale,
        ).transpose(1, 2)  # fmt: skip
        if self.permutation is not None and self.inverse is not None:
            o = permuted(o, self.inverse, self.permutation, 1)
        if hasattr(o, "placements"):  # a DTensor, known without an import
            o = _whole_heads(o)
        return self.out_proj(o.flatten(2))

    def reset_parameters(self) -> None:
        """New first values for all parameters, those of torch.nn.MultiheadAttention; also for what `to_empty` left."""
        self.out_proj.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        self._reset_own()

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, spec={self.attention.spec.name!r}"]
        if self.in_proj_bias is None:
            parts.append("bias=False")
        if self._globals:
            parts.append(f"globals_first={self.globals_first}, globals_last={self.globals_last}")
        if self._order is not None:
            parts.append(f"order={self._grid or f'{len(self._order)} tokens'}")
        if self._rotary is not None:
            parts.append("rotary=True")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        return ", ".join(parts)

    @property
    def _globals(self) -> int:
        return self.globals_first + self.globals_last

    def _reset_own(self) -> None:
        """After `out_proj`, so that a seed gives the numbers that it gives MultiheadAttention."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _place(self, device: torch.device) -> None:
        """The order, with global tokens in it that stay where they are, and the tables in that order, as buffers."""
        buffers: dict[str, Tensor | None] = dict.fromkeys(("permutation", "inverse", "cos", "sin"))
        if self._order is not None:
            before, after = self.globals_first, self.globals_first + len(self._order)
            for name in ("permutation", "inverse"):
                places = torch.arange(after + self.globals_last, device=device)
                places[before:after] = before + self._placed("order", getattr(self._order, name), device)
                buffers[name] = places
        if self._rotary is not None:
            for name, table in zip(("cos", "sin"), self._rotary, strict=True):
                table, places = self._placed("rotary", table, device), buffers["permutation"]
                buffers[name] = table if places is None else table.index_select(0, places)
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def _placed(self, name: str, x: Tensor, device: torch.device) -> Tensor:
        if x.is_meta and device.type != "meta":
            raise ValueError(f"{name}: expected tensors with values, got some that were made on the meta device")
        return x.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """`to`, `half`, `to_empty` and others: what came out of a buffer may be of another dtype, or hold nothing."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        if any(self._buffers[name] is not old for name, old in before.items()):
            self._place(self.in_proj_weight.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """With `assign=True` the parameters may be on another device from now on."""
        super()._load_from_state_dict(*args, **kwargs)
        device = self.in_proj_weight.device
        if device.type != "meta" and any(x is not None and x.device != device for x in self._buffers.values()):
            self._place(device)

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor [B, N, {self.embed_dim}], got {type(x).__name__}")
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x: expected shape [B, N, {self.embed_dim}], got {[*x.shape]}")
        if self._order is not None and x.shape[1] != self._globals + len(self._order):
            raise ValueError(
                f"x: expected {len(self._order)} tokens in the order and {self._globals} global ones, got {x.shape[1]}"
            )
        if not torch.compiler.is_compiling() and x.shape[1] < self._globals:
            raise ValueError(f"x: expected at least {self._globals} tokens, the global ones, got {x.shape[1]}")

    def _check_rotary(self, rotary: Any, tokens: int | None) -> None:
        """tokens: how many rows the tables have; None for any number."""
        expected = f"rotary: expected (cos, sin), floats [N, {self.head_dim}] each"
        if self.head_dim % 2:
            raise ValueError(f"{expected}, for which head_dim must be even, got {self.head_dim}")
        if not isinstance(rotary, tuple | list) or len(rotary) != 2 or not all(isinstance(x, Tensor) for x in rotary):
            raise TypeError(f"{expected}, got {short(type(rotary).__name__)}")
        for table in rotary:
            if not table.is_floating_point():
                raise TypeError(f"{expected}, got {table.dtype}")
            rows = rotary[0].shape[0] if tokens is None and rotary[0].ndim else tokens
            if table.ndim != 2 or table.shape[0] != rows or table.shape[1] != self.head_dim:
                here = "" if rows is None else f", here {[rows, self.head_dim]}"
                raise ValueError(f"{expected}{here}, got shape {[*table.shape]}")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D] with each pair (x_i, x_{i + D/2}) turned by the angle of its token."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _whole_heads(o: Any) -> Any:
    """A DTensor [B, N, H, D] of which torch can flatten the heads: where they are sharded unevenly, all of them."""
    from torch.distributed.tensor import Replicate

    shares = [o.device_mesh.size(dim) for dim, place in enumerate(o.placements) if place.is_shard(2)]
    if o.shape[2] % math.prod(shares) == 0:
        return o
    return o.redistribute(placements=[Replicate() if place.is_shard(2) else place for place in o.placements])


def _whole(name: str, value: Any, least: int) -> int:
    """An integer of at least so much, or what is wrong with it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer of at least {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    return value
