"""The table of what went where, how well a spec fits, and the picture of what a layer keeps."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers_models import EVERYTHING, LITTLE, Made, dit, flux, hunyuan_video, loud, run, unet
from torch import Tensor

import llsa_gen
from llsa_gen.integrations import quality
from llsa_gen.integrations.diffusers import report, use
from llsa_gen.integrations.placed import Run
from llsa_gen.integrations.report import DENSE, SPARSE, Ledger, Quality, count
from llsa_gen.integrations.sequences import Place


def test_a_table_says_layer_by_layer_what_and_why() -> None:
    ledger = Ledger(["first", "second", "third"])
    for _ in range(1200):
        count(ledger.key, "second", SPARSE, "", "8×8 + 7 text")
    count(ledger.key, "second", DENSE, "dropout", "71")
    count(ledger.key, "third", DENSE, "cross-attention", "64 × 7")
    found = ledger.report(("a note",), {"second": Quality(0.5, 0.125)})
    assert (found.sparse, found.dense) == (1200, 2)
    assert str(found).splitlines() == [
        "layer   calls  route   tokens         mass  error  why",
        "first       0  -                                   not called",
        "second  1,200  sparse  8×8 + 7 text  50.0%   0.12",
        "second      1  dense   71                          dropout",
        "third       1  dense   64 × 7                      cross-attention",
        "",
        "1,200 calls sparse, 2 dense",
        "a note",
    ]
    assert str(ledger.report()).splitlines()[0] == "layer   calls  route   tokens        why"


def test_copies_and_pickles_count_for_themselves() -> None:
    ledger = Ledger(["layer"])
    ledger.count("layer", SPARSE)
    for other in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):
        assert other.report().sparse == 0
        count(other.key, "layer", SPARSE)
        assert other.report().sparse == ledger.report().sparse == 1
    ledger.reset()
    assert ledger.report().rows[0].why == "not called"


def made(spec: dict[str, object], text: int = 0, tokens: int = 64) -> Run:
    operator, dice = llsa_gen.compile(spec), torch.Generator().manual_seed(0)
    q, k, v = 2 * torch.randn(3, 2, 2, tokens, 16, generator=dice)
    k_global, v_global = torch.randn(2, 2, 2, text, 16, generator=dice) if text else (None, None)
    mask = torch.arange(text).expand(2, -1) < 3 if text else None
    o = operator(q, k, v, k_global=k_global, v_global=v_global, global_mask=mask)
    assert isinstance(o, Tensor)
    return Run(operator, Place((tokens,), text, 0), q, k, v, k_global, v_global, mask, None, o)


@pytest.mark.parametrize("text", [0, 5])
def test_quality_is_that_of_the_dense_softmax(text: int) -> None:
    everything = quality.of_run(made(EVERYTHING, text))
    assert everything.mass == pytest.approx(1) and everything.error < 1e-5

    run_ = made(LITTLE, text, tokens=62)  # the last block is short
    found = quality.of_run(run_, sampled=62)
    weights, dense, attended = [], [], []
    kept = run_.attention.select(run_.q[:1], run_.k[:1])[0][0]
    for head in range(2):
        for query in range(62):
            logits = run_.q[0, head, query] @ run_.k[0, head].mT / 4
            values, seen = run_.v[0, head], torch.tensor([j // 4 in kept[head, query // 4].tolist() for j in range(62)])
            if run_.k_global is not None and run_.v_global is not None:
                logits = torch.cat([logits, run_.q[0, head, query] @ run_.k_global[0, head, :3].mT / 4])
                values, seen = torch.cat([values, run_.v_global[0, head, :3]]), torch.cat([seen, torch.ones(3).bool()])
            row = logits.softmax(0)
            weights.append(row[seen].sum())
            dense.append(row @ values)
            attended.append(run_.o[0, head, query])
    assert found.mass == pytest.approx(float(torch.stack(weights).mean()), rel=1e-5) and found.mass < 0.9
    wanted = torch.stack(dense)
    assert found.error == pytest.approx(float((torch.stack(attended) - wanted).norm() / wanted.norm()), rel=1e-4)


def test_quality_runs_the_last_input_again_and_counts_nothing() -> None:
    model, inputs = loud(hunyuan_video())
    use(model, LITTLE, min_tokens=0)
    with pytest.raises(ValueError, match="no last input"):
        report(model, quality=True)
    run(model, inputs).sum().backward()
    before = report(model).rows
    state = torch.get_rng_state()
    found = report(model, quality=True)
    assert torch.equal(state, torch.get_rng_state())
    judged = {row.layer: row.quality for row in found.rows if row.quality is not None}
    assert set(judged) == {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"}
    assert all(0 < one.mass < 1 and 0 < one.error < 1 for one in judged.values())
    assert [(row.layer, row.route, row.calls) for row in found.rows] == [(r.layer, r.route, r.calls) for r in before]
    assert report(model).rows == before


@pytest.mark.parametrize("make", [dit, flux, unet])
def test_a_picture_shows_what_a_layer_keeps(make: Callable[[], Made], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model, inputs = loud(make())
    use(model, LITTLE, min_tokens=0)
    with torch.no_grad():
        run(model, inputs)
    file = io.BytesIO()
    report(model, picture=file)
    assert file.getvalue().startswith(b"\x89PNG") and len(file.getvalue()) > 10_000
    assert "picture: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="layer: expected one that is sparse"):
        report(model, picture=file, layer="nowhere")
    with pytest.raises(ValueError, match="layer: expected None without picture="):
        report(model, layer="nowhere")
    with pytest.raises(TypeError, match="picture: expected a path or a binary file, got int"):
        report(model, picture=3)  # type: ignore[arg-type]


def test_no_picture_of_a_video() -> None:
    pytest.importorskip("matplotlib")
    model, inputs = loud(hunyuan_video())
    use(model, LITTLE, min_tokens=0)
    run(model, inputs)
    with pytest.raises(ValueError, match=r"\(height, width\), got one over \(3, 4, 6\)"):
        report(model, picture=io.BytesIO())
