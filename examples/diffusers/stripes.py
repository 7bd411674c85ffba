"""A small DiT of diffusers learns to draw stripes with dense attention, then goes on, and draws, with sparse attention.

    python examples/diffusers/stripes.py

A picture of 32×32 pixels is 16×16 patches, 256 tokens. Its class is the direction of its stripes, 0 to 3. The model
is a rectified flow: from a picture mixed with noise it predicts the noise less the picture.
"""

import argparse
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from llsa_gen.integrations.diffusers import report, restore, use

SPEC = {"name": "stripes", "head_dim": 32, "levels": [{"block": 16, "topk": 4}, {"block": 4, "topk": 2}]}
CLASSES, SIDE = 4, 32


def stripes(batch: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [batch, 1, 32, 32] in -1 to 1 and their classes [batch]."""
    classes = torch.randint(CLASSES, (batch,), generator=dice)
    angle = (classes * torch.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase = 6.28 * torch.rand(batch, 1, 1, generator=dice)
    return torch.sin(0.8 * (x * angle.cos() + y * angle.sin()) + phase)[:, None], classes


def small_dit() -> nn.Module:
    """About 200,000 weights."""
    diffusers: Any = importlib.import_module("diffusers")  # whose names are made when they are asked for
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=2, sample_size=SIDE,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip


def velocity(model: nn.Module, x: Tensor, time: Tensor, classes: Tensor) -> Tensor:
    return model(x, timestep=1000 * time, class_labels=classes, return_dict=False)[0]


def loss_of(model: nn.Module, batch: int, dice: torch.Generator) -> Tensor:
    x, classes = stripes(batch, dice)
    noise, time = torch.randn(x.shape, generator=dice), torch.rand(batch, generator=dice)
    mixed = torch.lerp(x, noise, time[:, None, None, None])
    return nn.functional.mse_loss(velocity(model, mixed, time, classes), noise - x)


def train(model: nn.Module, steps: int, batch: int = 8, seed: int = 0) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    dice, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        loss = loss_of(model, batch, dice)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def judge(model: nn.Module, batch: int = 32) -> float:
    """The loss on pictures that it has not seen, the same for every model."""
    return float(loss_of(model.eval(), batch, torch.Generator().manual_seed(99)))


@torch.no_grad()
def draw(model: nn.Module, steps: int = 10) -> Tensor:
    """A picture of each class, [4, 1, 32, 32]: from noise along the velocity."""
    x, classes = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), torch.arange(CLASSES)
    model.eval()
    for step in range(steps, 0, -1):
        x = x - velocity(model, x, torch.full((CLASSES,), step / steps), classes) / steps
    return x


def main(steps: int, batch: int) -> None:
    torch.manual_seed(0)
    model = small_dit()
    train(model, steps, batch)
    print(f"loss {judge(model):.3f}, dense, after {steps} steps")

    use(model, SPEC, min_tokens=0)  # sparse at any length: here dense attention would be faster
    print(f"loss {judge(model):.3f}, sparse, with the same weights\n")
    report(model, quality=True, reset=True)
    train(model, steps // 4, batch, seed=1)
    print(f"\nloss {judge(model):.3f}, sparse, after {steps // 4} steps more\n")
    pictures = draw(model)
    report(model)
    restore(model)
    print(f"\npictures of {CLASSES} classes, from {float(pictures.min()):.1f} to {float(pictures.max()):.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    main(**vars(parser.parse_args()))
