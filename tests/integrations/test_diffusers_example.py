"""The example of a small DiT runs, and learns, and draws with sparse attention."""

import pytest
import stripes
import torch

from llsa_gen.integrations.diffusers import report, use


def test_it_learns_densely_and_sparsely() -> None:
    torch.manual_seed(0)
    model = stripes.small_dit()
    dense = stripes.train(model, steps=16, batch=4)
    assert sum(dense[-4:]) < 0.8 * sum(dense[:4])
    use(model, stripes.SPEC, min_tokens=0)
    before = stripes.judge(model, batch=8)
    stripes.train(model, steps=16, batch=4, seed=1)
    assert stripes.judge(model, batch=8) < before
    assert stripes.draw(model, steps=2).shape == (4, 1, 32, 32)
    assert report(model).dense == 0 and report(model).sparse == 2 * (2 + 16 + 2)


def test_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    stripes.main(steps=4, batch=2)
    said = capsys.readouterr().out
    assert "sparse, after 1 steps more" in said and "0 dense" in said and "pictures of 4 classes" in said
