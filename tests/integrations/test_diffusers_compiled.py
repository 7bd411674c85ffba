"""Models with compiled attention under torch.compile: whole and block by block, without a break, at several sizes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers_models import HEAD_DIM, LAST_THREE_PADDED, LITTLE, error, flux, ids, loud, qwen, run, sd3
from torch import Tensor

from llsa_gen.integrations.diffusers import report, restore, use
from llsa_gen.integrations.sequences import OVER_PICTURE

COMPILE: Any = {"fullgraph": True, "backend": "eager"}
"""Traced once: what is tested here is decided while Dynamo traces."""
WITH_AUTOGRAD: Any = {"fullgraph": True, "backend": "aot_eager"}
"""Traced again by AOTAutograd, which takes two to three times as long."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_whole_model_at_several_sizes() -> None:
    model, inputs = loud(sd3(layers=1))
    with torch.no_grad():
        dense = run(model, inputs)
        use(model, LITTLE, min_tokens=0)
        compiled: Any = torch.compile(model, **COMPILE)  # before it has run
        for size in ((16, 12), (12, 16), (8, 16)):  # 48 tokens twice, of other grids
            given = inputs | {"hidden_states": torch.randn(2, 4, *size)}
            assert torch.equal(run(compiled, given), run(model, given)), size
        assert error(run(compiled, inputs), dense) > 1e-3
    found = report(compiled)
    assert found.dense == 0 and any("when it is traced" in note for note in found.notes)


def test_blocks_while_their_model_is_not() -> None:
    """Of ids only a model that is not compiled can tell the grid; its blocks follow it."""
    model, inputs = loud(flux())
    with torch.no_grad():
        use(model, LITTLE, min_tokens=0)
        wanted = [run(model, inputs | {"img_ids": ids(*grid)}) for grid in ((8, 6), (6, 8))]
        restore(model)
        use(model, LITTLE, min_tokens=0)
        model.compile_repeated_blocks(**COMPILE)
        for grid, one in zip([(8, 6), (6, 8), (8, 6)], [*wanted, wanted[0]], strict=True):
            assert torch.equal(run(model, inputs | {"img_ids": ids(*grid)}), one), grid
    assert report(model).dense == 0


def test_a_mask_is_not_looked_at_but_text_is_masked_and_a_picture_asserted() -> None:
    model, inputs = loud(qwen())
    with torch.no_grad():
        use(model, LITTLE, min_tokens=0)
        compiled = torch.compile(model, **COMPILE)
        assert torch.equal(run(compiled, inputs), run(model, inputs))
        other = inputs | {"encoder_hidden_states_mask": LAST_THREE_PADDED.flip(0)}
        assert torch.equal(run(compiled, other), run(model, other)), "the mask is no constant"


class MaskedAttention(torch.nn.Module):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        q = hidden_states.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MaskedAttention()

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return self.layer(hidden_states.flatten(2).mT, mask)


def test_a_mask_over_the_picture_is_an_error_where_nobody_can_look_at_it() -> None:
    model: Any = use(Masked(), LITTLE, min_tokens=0)
    compiled, x = torch.compile(model, **COMPILE), torch.randn(2, 32, 8, 8)
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    assert torch.equal(compiled(x, mask), model(x, mask))
    mask[1, ..., 9] = False
    with pytest.raises(RuntimeError, match="it leaves out picture tokens"):
        compiled(x, mask)
    report(model, reset=True)
    model(x, mask)
    assert report(model).rows[0].why == OVER_PICTURE


def test_a_layer_that_is_compiled_alone_is_dense() -> None:
    model, inputs = loud(sd3())
    use(model, LITTLE, min_tokens=0)
    model.transformer_blocks[0].attn.compile(**COMPILE)
    with torch.no_grad():
        run(model, inputs)
    assert [row.why for row in report(model).rows] == [
        "the layer itself is compiled: compile its block or the model",
        "",
    ]


def test_training_step() -> None:
    model, inputs = loud(sd3())
    use(model, LITTLE, min_tokens=0)
    gradients = []
    for one in (model, torch.compile(model, **WITH_AUTOGRAD)):
        model.zero_grad()
        run(one, inputs).square().mean().backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]))
    assert error(*gradients) < 1e-5
