"""On a GPU: models of diffusers with compiled attention, against their native attention there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llsa_gen
from llsa_gen.integrations import callable as engine
from llsa_gen.integrations import crossing

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'llsa-gen[diffusers]'")

from diffusers_models import CLASSES, EVERYTHING, HEAD_DIM, LITTLE, diffusers, error, hunyuan_video, loud, qwen, run

from llsa_gen.integrations.diffusers import report, restore, use
from llsa_gen.integrations.report import DENSE, SPARSE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]

DEVICE = "cuda"


def there(x: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same on the GPU, floats in a dtype."""
    if isinstance(x, Tensor):
        return x.to(DEVICE, dtype if x.is_floating_point() else None)
    return {name: there(one, dtype) for name, one in x.items()} if isinstance(x, dict) else x


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, inputs = loud(CLASSES[name]())
    return model.to(DEVICE, dtype), there(inputs, dtype)


def gradients(model: Any, inputs: Any) -> Tensor:
    model.zero_grad()
    run(model, inputs).float().square().mean().backward()
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])


@pytest.mark.parametrize("name", CLASSES)
def test_keeping_everything_is_dense_attention_in_float32(name: str) -> None:
    model, inputs = made(name)
    wanted, of_wanted = run(model, inputs).detach(), gradients(model, inputs)
    use(model, EVERYTHING, min_tokens=0)
    assert error(run(model, inputs), wanted) <= 1e-5
    assert error(gradients(model, inputs), of_wanted) <= 1e-4  # of all parameters; dense attention alone is as far
    assert report(model).sparse > 0 or name == "sana"
    restore(model)
    assert error(run(model, inputs), wanted) <= 1e-6


@pytest.mark.parametrize("name", CLASSES)
def test_keeping_everything_is_as_near_as_dense_attention_in_bfloat16(name: str) -> None:
    """To float32: at most twice the distance that the native model has in this dtype."""
    model, inputs = made(name)
    with torch.no_grad():
        wanted = run(model, inputs)
        model.to(torch.bfloat16)
        inputs = there(inputs, torch.bfloat16)
        native = error(run(model, inputs).float(), wanted)
        use(model, EVERYTHING, min_tokens=0)
        assert error(run(model, inputs).float(), wanted) <= 2 * native


def big() -> tuple[Any, Any]:
    """A DiT of 32x32 patches."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, num_layers=2,
        sample_size=64, patch_size=2, num_embeds_ada_norm=8,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 64, 64), "timestep": torch.tensor([3, 5])}
    return loud((model, inputs | {"class_labels": torch.tensor([1, 2])}))


def test_few_tokens_are_kept_as_on_the_cpu() -> None:
    model, inputs = big()
    dense = run(model, inputs)
    use(model, LITTLE, min_tokens=512)
    wanted, of_wanted = run(model, inputs), gradients(model, inputs)
    model.to(DEVICE)
    found, of_found = run(model, there(inputs)).cpu(), gradients(model, there(inputs)).cpu()
    assert [row.route for row in report(model).rows] == [SPARSE] * 2
    assert error(dense, wanted) > 0.05
    # where two scores are nearly equal, the larger one may be another one on another device
    assert error(found, wanted) < 5e-3 and error(of_found, of_wanted) < 2e-2
    with torch.autocast(DEVICE, torch.bfloat16):
        assert error(run(model, there(inputs)).float().cpu(), wanted) < 0.1
    few = {name: x[..., :32, :32] if name == "hidden_states" else x for name, x in inputs.items()}
    report(model, reset=True)
    run(model, there(few))
    assert {(row.route, row.why) for row in report(model).rows} == {(DENSE, "fewer than 512 picture tokens")}


def test_quality_is_told() -> None:
    model, inputs = big()
    model, inputs = model.to(DEVICE), there(inputs)
    for spec, low, high in ((EVERYTHING, 0.999, 1.001), (LITTLE, 0.01, 0.9)):
        use(model, spec, min_tokens=0)
        run(model, inputs)
        qualities = [row.quality for row in report(model, quality=True).rows]
        for quality in qualities:
            assert quality is not None and low < quality.mass < high
            assert (quality.error < 1e-5) == (spec is EVERYTHING)
        restore(model)


@pytest.mark.parametrize("make", [qwen, hunyuan_video])
def test_padding_is_seen_by_nobody(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = loud(make())
    model, inputs = model.to(DEVICE), there(inputs)
    use(model, LITTLE, min_tokens=0)
    with torch.no_grad():
        before = run(model, inputs)
        inputs["encoder_hidden_states"][1, 5] += 100.0
        assert torch.equal(run(model, inputs), before), "the mask hides it"
        inputs["encoder_hidden_states"][0, 5] += 1.0
        assert not torch.equal(run(model, inputs)[0], before[0])
    assert report(model).sparse >= 2


def test_the_crossing_is_measured_once_and_below_it_attention_is_the_native_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLSA_GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossing, "_found", {})
    model, inputs = big()
    model, inputs = model.to(DEVICE), there(inputs)
    with torch.no_grad():
        wanted = run(model, inputs)
        use(model, LITTLE)
        kept = json.loads((tmp_path / "crossings.json").read_text())
        ((name, length),) = kept.items()
        place = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
        assert name.startswith(place) and "torch.float32" in name and length >= crossing.SHORTEST

        monkeypatch.setattr(crossing, "_is_faster", lambda *_: pytest.fail("measured before"))
        found = run(model, inputs)
        told = report(model)
        assert all(row.route == (SPARSE if length <= 1024 else DENSE) for row in told.rows)
        assert length <= 1024 or torch.equal(found, wanted)
        assert any("sparse attention is faster than dense" in note for note in told.notes)
        if length < crossing.NEVER:
            assert any(f"from {length:,} picture tokens on" in note for note in told.notes)

        small = inputs | {"hidden_states": inputs["hidden_states"][..., :32, :32]}  # 256 tokens
        sparse = run(model, small)
        assert any(row.route == DENSE for row in report(model).rows)
        restore(model)
        assert torch.equal(run(model, small), sparse), "dense to the bit"
        monkeypatch.setattr(crossing, "_found", {})  # as in another process
        use(model, LITTLE)


def test_engines_get_what_dense_attention_gives() -> None:
    torch.manual_seed(0)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k, v = (x.to(DEVICE, dtype).requires_grad_() for x in torch.randn(3, 2, 4, 7 + 20 * 30, HEAD_DIM))
        fn = engine(EVERYTHING, min_tokens=0, schedule="dense for layers 0 and 1")
        for layer in (1, 2):
            o = fn(q, k, v, grid=(20, 30), n_text=7, step=0, layer=layer)
            wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
            assert error(o.double(), wanted) <= allowed
            weight = torch.randn_like(wanted)
            pairs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (o.double(), wanted))
            for one, other in zip(*pairs, strict=True):
                assert error(one, other) <= 2 * allowed
        rows = {row.layer: row.route for row in fn.report().rows}
        assert rows == {"layer 1": DENSE, "layer 2": SPARSE}


def test_sparse_attention_wins_on_long_sequences() -> None:
    operator = llsa_gen.compile(Path(__file__).parents[2] / "spec" / "llsa_l2.yaml")
    assert crossing.measured(operator, torch.device(DEVICE), torch.bfloat16) <= 1 << 15
