"""The vision transformer of examples/vit learns; each of its parameters has a part in it."""

import torch
import vit


def test_it_learns() -> None:
    losses, right = vit.train(steps=20, batch=8)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert right > 0.5  # 0.25 by chance


def test_without_rotary_embedding() -> None:
    model = vit.VisionTransformer(size=48, depth=1, rotary=False)
    pictures, classes = vit.draw(2, size=48)
    logits = model(pictures)
    torch.nn.functional.cross_entropy(logits, classes).backward()
    assert logits.shape == (2, vit.CLASSES)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
