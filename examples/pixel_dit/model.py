"""A diffusion transformer whose tokens are pixels: no patches, no autoencoder.

The blocks of DiT (Peebles and Xie, 2023): adaLN-zero, attention, a perceptron of four times the width. Queries and keys
are normed and rotated by the row and the column of their pixel, so that a model serves any resolution.

What makes it fast is one idea: the order of tokens that attention wants is laid around all blocks, not around each. The
picture is permuted when it becomes tokens, the angles of rotation with it, and nothing inside knows of the order.
"""

from functools import partial

import torch
from attention import Attention, build, spec_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)
from torch.utils.checkpoint import checkpoint

import llsa_gen

COLOURS, PADDED = 3, 8
"""Numbers of a pixel; what they are padded to, for matrix units want rows of 16 bytes."""

TIME_CHANNELS = 256


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm, both modulated by the time: tokens [B, N, channels] to the same.

    The modulation [B, 6, channels] is shift, scale and gate of attention, then of the perceptron. Parameters whose
    gradient would be one more pass over all tokens are left out where others do their work. There are no biases: shifts
    do. There are no gains of channels behind the norm of queries and keys: rows of the projection before it weigh
    channels as well. What the norm takes away is a size. Logits need one: each head learns a number, its sharpness.
    """

    def __init__(self, channels: int, heads: int, attention: Attention, layout: str, modulate: str) -> None:
        super().__init__()
        self.heads, self.layout = heads, layout
        self.linear = {"weights": by_weights, "tokens": by_tokens}[modulate]
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.sharpness = nn.Parameter(torch.ones(heads))
        self.attend = build(attention, channels // heads)
        self.out = nn.Linear(channels, channels, bias=False)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_p, scale_p, gate_p = modulation.unbind(1)
        qkv = self.linear(self.norm(x) + shift_a[:, None], self.qkv.weight, into=1 + scale_a)
        x = x + self.linear(self.attention(qkv, cos, sin), self.out.weight, out_of=gate_a).to(x.dtype)
        h = self.linear(self.norm(x) + shift_p[:, None], self.up.weight, into=1 + scale_p)
        return x + self.linear(gelu(h), self.down.weight, out_of=gate_p).to(x.dtype)

    def attention(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, D]
        q, k = turned(q, cos, sin, self.sharpness[:, None]), turned(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # views: tokens lie apart, each with all heads
        if self.layout == "heads":  # heads lie apart, each with all tokens: copies
            q, k, v = (x.contiguous() for x in (q, k, v))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, size: Tensor | float = 1.0) -> Tensor:
    """Queries or keys x [B, N, H, D], normed to a mean square of size² and turned by the angles of their pixels.

    The size goes into the norm's factor. So its gradient is a sum over numbers that the norm's own gradient needs, one
    for each head of a token, and torch.compile makes one kernel of all of this, backward as well.
    """
    y = x.float()
    y = y * (torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * size)
    pairs = y.unflatten(-1, (2, -1))  # a head's two halves are the two parts of its pairs
    return (pairs * cos + pairs.flip(-2) * sin).flatten(-2).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in the approximation by tanh, of which (1 + tanh(y)) / 2 is written as sigmoid(2 y): two thirds of the
    instructions. With tanh, a GPU would compute for longer than it reads and writes."""
    y = x.float()
    return (y * torch.sigmoid(y * (1.5957691 + 0.0713548 * y * y))).to(x.dtype)  # sqrt(8 / pi), 0.044715 of it


def by_weights(x: Tensor, weight: Tensor, into: Tensor | None = None, out_of: Tensor | None = None) -> Tensor:
    """x [B, N, channels] times weight [out, channels] transposed, channels weighed by into [B, channels] before it, and
    by out_of [B, out] after it: the weights of each picture are modulated, not its tokens.

    A picture has far more tokens than channels. Forward that saves little, for it would be fused anyway. Backward it
    saves passes over all tokens: the gradients of `into` and `out_of` are sums over weights, not over tokens.
    """
    if into is not None:
        weight = weight * into[:, None]
    if out_of is not None:
        weight = weight * out_of[:, :, None]
    if len(x) == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x, weight.mT)


def by_tokens(x: Tensor, weight: Tensor, into: Tensor | None = None, out_of: Tensor | None = None) -> Tensor:
    """The same by modulating tokens, as it is usually done."""
    y = F.linear(x if into is None else x * into[:, None], weight)
    return y if out_of is None else y * out_of[:, None]


class PixelDiT(nn.Module):
    """What a noisy picture's flow is: (pictures [B, 3, height, width], t [B]) to a velocity [B, 3, height, width].

    Args:
        size: (height, width) of the pictures. Parameters do not depend on it: `at_size` gives the model at another one.
        attention: "dense", "dense-flash", "none", the path of a spec, or what stands in one.
        order: "2d", in which a block of tokens is a patch, or "raster", in which it is a strip of a row.
        channels, depth, heads: of the blocks.
        checkpointing: whether a block's activations are computed again in the backward pass instead of kept.
        layout: "tokens", in which q, k and v are views, or "heads", in which they are copied apart.
        modulate: "weights" or "tokens"; the same, to rounding, and not equally fast.
    """

    permutation: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        attention: Attention,
        order: str = "2d",
        channels: int = 384,
        depth: int = 12,
        heads: int = 6,
        checkpointing: bool = False,
        layout: str = "tokens",
        modulate: str = "weights",
    ) -> None:
        super().__init__()
        if channels % heads or channels // heads % 4:
            raise ValueError(f"heads: expected channels {channels} in heads of a multiple of 4 each, got {heads} heads")
        self.attention, self.order, self.head_dim = attention, order, channels // heads
        self.checkpointing = checkpointing
        self.embed = nn.Linear(PADDED, channels)
        self.time = nn.Sequential(
            nn.Linear(TIME_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        )
        self.modulation = nn.Linear(channels, (6 * depth + 2) * channels)  # of all blocks, and of what follows them
        self.blocks = nn.ModuleList(Block(channels, heads, attention, layout, modulate) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(channels, PADDED)
        self._initialise()
        self.at_size(*size)

    def at_size(self, height: int, width: int) -> None:
        """From now on pictures have this size: order and angles are made for it."""
        device = self.embed.weight.device
        spec = spec_of(self.attention)
        order = llsa_gen.order.grid((height, width), spec, device=device) if spec and self.order == "2d" else None
        turns = angles(height, width, self.head_dim).to(device)
        raster = torch.arange(height * width, device=device)
        self.register_buffer("permutation", order.permutation if order else raster, persistent=False)
        self.register_buffer("inverse", order.inverse if order else raster, persistent=False)
        turns = turns.index_select(0, self.permutation)[:, None, None]  # beside pairs [B, N, H, 2, D / 2]
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", torch.cat([-turns.sin(), turns.sin()], -2), persistent=False)
        self.size = height, width

    def to_tokens(self, pictures: Tensor) -> Tensor:
        """[B, 3, height, width] to [B, N, 3], in the order of the tokens."""
        return pictures.flatten(2).mT.index_select(1, self.permutation)

    def to_pictures(self, tokens: Tensor) -> Tensor:
        """And back."""
        return tokens.index_select(1, self.inverse).mT.unflatten(2, self.size)

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Tokens [B, N, 3] of x_t, and t [B], to tokens of the velocity, [B, N, 3] float32."""
        time = self.time(waves(t))
        modulation = self.modulation(time).float().unflatten(1, (-1, self.embed.out_features))
        *of_blocks, of_head = modulation.split([*[6] * len(self.blocks), 2], 1)
        x = self.embed(F.pad(tokens, (0, PADDED - COLOURS)))
        for block, one in zip(self.blocks, of_blocks, strict=True):
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            x = run(x, one, self.cos, self.sin)
        shift, scale = of_head.unbind(1)
        return self.head(self.norm(x) * (1 + scale[:, None]) + shift[:, None])[..., :COLOURS].float()

    def velocity(self, pictures: Tensor, t: Tensor) -> Tensor:
        """The flow of pictures [B, 3, height, width], for sampling."""
        return self.to_pictures(self(self.to_tokens(pictures), t))

    def _initialise(self) -> None:
        """As DiT: every block begins as the identity, and the model says 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.modulation, self.head):
            nn.init.zeros_(module.weight)


def angles(height: int, width: int, head_dim: int) -> Tensor:
    """By how much the pairs of each pixel's queries and keys are turned, row by row: [height * width, head_dim / 2].

    Half of the pairs turn by the row, half by the column: a radian a pixel the fastest, a hundredth the slowest.
    """
    speeds = 100.0 ** -torch.linspace(0, 1, head_dim // 4)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([y.flatten()[:, None] * speeds, x.flatten()[:, None] * speeds], 1)


def waves(t: Tensor) -> Tensor:
    """t [B] as sines and cosines, [B, TIME_CHANNELS], from 1,000 radians down to a tenth."""
    speeds = 1000 * 10_000.0 ** -torch.linspace(0, 1, TIME_CHANNELS // 2, device=t.device)
    turns = t[:, None] * speeds
    return torch.cat([turns.cos(), turns.sin()], 1)
