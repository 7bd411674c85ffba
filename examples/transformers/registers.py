"""DINOv2 with registers, a class of transformers, fine-tuned with sparse attention on pictures made up here.

    python examples/transformers/registers.py

A picture of 64×64 pixels is 16×16 patches; a class token and 4 registers stand in front of them. Every picture shows
stripes in one of 4 directions under noise, and its class is the direction. The model is a small one with random
weights, so that nothing is downloaded; `from_pretrained` gives a real one.
"""

import argparse
import math

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

from llsa_gen.integrations import transformers as llsa

SPEC = {"name": "patches", "head_dim": 32, "levels": [{"block": 16, "topk": 4}, {"block": 4, "topk": 2}]}
CLASSES = 4


def dinov2() -> Dinov2WithRegistersForImageClassification:
    """Two layers of two heads."""
    config = Dinov2WithRegistersConfig(
        image_size=64, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        mlp_ratio=2, layerscale_value=0.1, num_register_tokens=4,
    )  # fmt: skip
    config.num_labels = CLASSES
    return Dinov2WithRegistersForImageClassification(config)


def draw(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures [count, 1, size, size] under noise, and classes [count]."""
    classes = torch.randint(CLASSES, (count,))
    angle = (classes * math.pi / CLASSES)[:, None, None]
    phase, width = torch.rand(2, count, 1, 1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin((x * angle.cos() + y * angle.sin()) * (0.4 + 0.4 * width) + 2 * math.pi * phase)
    return (waves + 0.5 * torch.randn(count, size, size))[:, None], classes


def tune(steps: int = 40, batch: int = 16, seed: int = 0) -> tuple[nn.Module, list[float], float]:
    """The model, the losses of all steps, and the share of 200 new pictures whose class is right then."""
    torch.manual_seed(seed)
    # min_tokens=0, or these 256 patches would stay dense: sparse attention pays from some thousand on
    model = llsa.use(dinov2(), SPEC, min_tokens=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        pictures, classes = draw(batch)
        loss = model(pixel_values=pictures, labels=classes).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
    model.eval()
    pictures, classes = draw(200)
    with torch.no_grad():
        right = (model(pixel_values=pictures).logits.argmax(1) == classes).float().mean().item()
    return model, losses, right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune a small DINOv2 with registers on pictures of stripes.")
    parser.add_argument("--steps", type=int, default=40)
    tuned, _, share = tune(parser.parse_args().steps)
    print(f"{share:.0%} of new pictures right; {1 / CLASSES:.0%} by chance\n")
    llsa.report(tuned, quality=True)
