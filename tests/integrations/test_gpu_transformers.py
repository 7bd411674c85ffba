"""On a GPU: models of transformers with compiled attention, against their native attention there."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'llsa-gen[transformers]'")

from tiny_transformers import (
    ALL,
    BERT,
    DINO,
    FEW,
    GLOBAL,
    GROUPED,
    LLAMA,
    PICTURES,
    SIGLIP2,
    Case,
    error,
    randn,
    result,
)

from llsa_gen.integrations import crossing
from llsa_gen.integrations import transformers as llsa
from llsa_gen.integrations.report import DENSE, SPARSE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]

DEVICE = "cuda"


def there(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same on the GPU, floats in a dtype."""
    return {name: x.to(DEVICE, dtype if x.is_floating_point() else None) for name, x in inputs.items()}


@pytest.mark.parametrize("case", [*PICTURES, SIGLIP2, BERT, GLOBAL, GROUPED], ids=lambda case: case.name)
def test_what_keeps_everything_is_the_native_attention(case: Case) -> None:
    """In float32; in bfloat16 at most twice as far from that as the native model is."""
    native = case.make().to(DEVICE)
    sparse = llsa.use(copy.deepcopy(native), ALL, min_tokens=0)
    inputs, short = there(case.inputs), there(case.inputs, torch.bfloat16)
    wanted = result(native, inputs)
    assert error(result(sparse, inputs), wanted) < 1e-5
    far = error(result(native.bfloat16(), short).float(), wanted)
    assert error(result(sparse.bfloat16(), short).float(), wanted) <= 2 * far
    assert llsa.report(sparse).dense == 0


def gradients(model: Any, inputs: dict[str, Any]) -> Tensor:
    model.zero_grad()
    output = model(**inputs).last_hidden_state
    (output * randn(*output.shape, seed=5).to(output)).sum().backward()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])


@pytest.mark.parametrize("case", [DINO, GLOBAL], ids=lambda case: case.name)
def test_few_tokens_are_kept_and_learned_from_as_on_the_cpu(case: Case) -> None:
    model = llsa.use(case.make(), FEW, min_tokens=16)
    wanted, of_wanted = result(model, case.inputs), gradients(model, case.inputs)
    model.to(DEVICE)
    assert error(result(model, there(case.inputs)).cpu(), wanted) < 5e-3
    assert error(gradients(model, there(case.inputs)).cpu(), of_wanted) < 2e-2
    for row in llsa.report(model, quality=True).rows:
        assert row.route == SPARSE and row.quality is not None
        assert 0.01 < row.quality.mass < 1.0 and row.quality.error > 1e-4


def test_padding_and_causal_layers_are_refused_there() -> None:
    model = llsa.use(GLOBAL.make().to(DEVICE), ALL, min_tokens=0)
    inputs = there(GLOBAL.inputs)
    mask = torch.ones_like(inputs["input_ids"])
    whole = result(model, inputs)
    assert error(result(model, inputs, attention_mask=mask), whole) < 1e-6
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        result(model, inputs, attention_mask=mask)
    causal = LLAMA.make().to(DEVICE)
    wanted = result(causal, inputs)
    with pytest.raises(ValueError, match="is_causal"):
        result(llsa.use(causal, ALL, min_tokens=0), inputs)
    llsa.restore(causal)
    assert torch.equal(result(llsa.use(causal, ALL, min_tokens=0, otherwise="dense"), inputs), wanted)


def test_the_crossing_is_measured_once_and_short_inputs_stay_native(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLSA_GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossing, "_found", {})
    model, inputs = DINO.make().to(DEVICE), there(DINO.inputs)
    wanted = result(model, inputs)
    llsa.use(model, FEW)
    assert len(json.loads((tmp_path / "crossings.json").read_text())) == 1
    monkeypatch.setattr(crossing, "_is_faster", lambda *_: pytest.fail("measured before"))
    assert torch.equal(result(model, inputs), wanted)
    assert {row.route for row in llsa.report(model).rows} == {DENSE}
