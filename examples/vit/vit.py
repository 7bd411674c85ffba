"""A small vision transformer whose patches attend sparsely, trained for a few steps on pictures made up here.

    python examples/vit/vit.py

A picture of 64×64 pixels is 16×16 patches, 256 tokens; a class token and 2 registers stand in front of them. Every
picture shows stripes in one of 4 directions under noise, and its class is the direction.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import llsa_gen
from llsa_gen.nn import LLSAttention

SPEC = llsa_gen.load({"name": "vit", "head_dim": 32, "levels": [{"block": 16, "topk": 4}, {"block": 4, "topk": 2}]})
CLASSES, REGISTERS = 4, 2


def angles(rows: int, columns: int) -> Tensor:
    """By how much rotary embedding turns each patch, row by row: half of a head's pairs by its row, half by its column.

    Returns [rows * columns, head_dim].
    """
    speeds = 30.0 ** -torch.linspace(0, 1, SPEC.head_dim // 4)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    turns = torch.cat([y.flatten()[:, None] * speeds, x.flatten()[:, None] * speeds], 1)
    return torch.cat([turns, turns], 1)  # the two halves of a head are the two parts of its pairs


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual: tokens [B, N, width] to the same."""

    def __init__(self, width: int, rotary: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.attention = LLSAttention(
            width, width // SPEC.head_dim, SPEC, qk_norm=True, rotary=rotary, globals_first=1 + REGISTERS
        )
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.perceptron(self.norm_perceptron(x))


class VisionTransformer(nn.Module):
    """Pictures [B, 1, size, size] to logits [B, CLASSES].

    All blocks want the same order of the patches, so they are permuted once, in front of the first block. Nobody has to
    permute them back, for the class token is all that is read. A block alone would be given `order=(rows, rows)`.
    """

    permutation: Tensor

    def __init__(self, size: int = 64, patch: int = 4, width: int = 64, depth: int = 2, rotary: bool = True) -> None:
        super().__init__()
        rows = size // patch
        order = llsa_gen.order.grid((rows, rows), SPEC)
        self.register_buffer("permutation", order.permutation, persistent=False)
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(rows * rows, width) * 0.02)  # row by row
        self.first = nn.Parameter(torch.randn(1 + REGISTERS, width) * 0.02)
        tables = None
        if rotary:
            still = torch.zeros(1 + REGISTERS, SPEC.head_dim)  # these tokens are nowhere: they are not turned
            turned = torch.cat([still, order.apply(angles(rows, rows))])
            tables = turned.cos(), turned.sin()
        self.blocks = nn.Sequential(*(Block(width, tables) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.embed(pictures).flatten(2).mT + self.positions  # [B, rows * rows, width]
        patches = patches.index_select(1, self.permutation)
        x = torch.cat([self.first.expand(len(patches), -1, -1), patches], 1)
        return self.head(self.norm(self.blocks(x)[:, 0]))


def draw(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures [count, 1, size, size] of stripes under noise, and their classes [count]."""
    classes = torch.randint(CLASSES, (count,))
    angle = (classes * math.pi / CLASSES)[:, None, None]
    phase, width = torch.rand(2, count, 1, 1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin((x * angle.cos() + y * angle.sin()) * (0.4 + 0.4 * width) + 2 * math.pi * phase)
    return (waves + torch.randn(count, size, size))[:, None], classes


def train(steps: int = 30, batch: int = 16, rotary: bool = True, seed: int = 0) -> tuple[list[float], float]:
    """The losses of all steps, and the share of 200 new pictures whose class is right then."""
    torch.manual_seed(seed)
    model = VisionTransformer(rotary=rotary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        pictures, classes = draw(batch)
        loss = nn.functional.cross_entropy(model(pictures), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
    pictures, classes = draw(200)
    with torch.no_grad():
        return losses, (model(pictures).argmax(1) == classes).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small vision transformer on pictures of stripes.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--no-rotary", action="store_true", help="position embeddings alone")
    options = parser.parse_args()
    _, right = train(options.steps, rotary=not options.no_rotary)
    print(f"{right:.0%} of new pictures right; {1 / CLASSES:.0%} by chance")
