"""The segmenter of examples/lightning learns under Lightning; each of its parameters has a part in it."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

import segment  # it imports lightning

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of few workers and small batches


def test_it_learns(tmp_path: Path) -> None:
    _, right = segment.train(steps=30, default_root_dir=tmp_path, enable_progress_bar=False)
    assert right > 0.62  # 0.5 by chance


def test_every_parameter_takes_part() -> None:
    model = segment.Segmenter()
    pictures, classes = (
        torch.stack(x) for x in zip(*map(segment.Pictures(2, seed=3).__getitem__, (0, 1)), strict=True)
    )
    logits = model(pictures)
    torch.nn.functional.cross_entropy(logits, classes).backward()
    assert logits.shape == (2, segment.CLASSES, segment.SIZE, segment.SIZE)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
