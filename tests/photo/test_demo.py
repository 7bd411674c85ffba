"""The demo: what it says of its tokens and its picture is true, it prints its figures, and fails when it should."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import demo
import drawing
import pixels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from typer.testing import CliRunner

import llsa_gen
from llsa_gen import reference, schedule
from llsa_gen.plan import cost, lower
from llsa_gen.spec import Level, Spec

ROOT = Path(__file__).resolve().parents[2]

small_specs = st.builds(
    lambda levels, enrich: Spec(name="drawn", head_dim=8, levels=levels, enrich=enrich),
    st.lists(st.builds(Level, block=st.integers(2, 9), topk=st.integers(1, 4)), min_size=1, max_size=3),
    st.sampled_from(["all", "none"]),
)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(demo.app, ["--spec", str(ROOT / "spec" / "llsa_l2.yaml"), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch):
    """Makes the demo run an operator whose output or whose kept tokens went through a function."""

    def alter(output=lambda o: o, kept=lambda kept: kept) -> None:
        right = llsa_gen.compile(ROOT / "spec" / "llsa_l2.yaml")

        class Wrong(SimpleNamespace):
            def __call__(self, q, k, v):
                return output(right(q, k, v))

        wrong = Wrong(source=right.source, path=right.path, select=lambda q, k: kept(right.select(q, k)))
        monkeypatch.setattr(llsa_gen, "compile", lambda spec: wrong)

    return alter


# ---- the command -------------------------------------------------------------------------------------------------


def test_prints_its_figures_and_writes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    code, output = run("--size", "32", "--out", str(out))
    assert code == 0, output
    error = re.search(r"error +(\S+)  .*allowed: (\S+)", output)
    assert error and 0 < float(error[1]) < float(error[2]) == 1e-5
    seconds = re.search(r"time +(\S+) s .* dense attention, (\S+) s", output)
    assert seconds and all(float(time) >= 0 for time in seconds.groups())
    decibels = re.search(r"denoised +(\S+) dB  from (\S+) dB", output)
    assert decibels and float(decibels[1]) > float(decibels[2]) + 1  # attention does denoise
    assert re.search(r"keys +196  a query instead of 1,024: 128 pixels \+ 64 of level 1 \+ 4 of level 2", output)
    assert re.search(r"cost +\d+\.\d  GFLOP forward; dense attention \d+\.\d", output)
    assert re.search(r"selection +right", output)

    pixels = image.imread(out)
    assert pixels.shape[1:] == (drawing.WIDTH, 4)
    assert pixels[0, 0, 3] == 0  # outside the card's round corner
    assert pixels[30, 30, 3] == 1
    panels = pixels[drawing.HEAD : -drawing.FOOT, drawing.MARGIN : -drawing.MARGIN, :3]
    assert len({tuple(colour) for colour in panels.reshape(-1, 3)}) > 500  # a photograph, not a plain area


def test_a_wrong_output_fails(tmp_path: Path, altered) -> None:
    altered(output=lambda o: o * 1.0001)
    code, output = run("--size", "32", "--out", str(tmp_path / "demo.png"))
    assert code == 1
    assert re.search(r"error +1.0e-04 ", output)


def test_a_wrong_selection_fails(tmp_path: Path, altered) -> None:
    altered(kept=lambda kept: (kept[0].roll(1, dims=2), *kept[1:]))
    code, output = run("--size", "32", "--out", str(tmp_path / "demo.png"))
    assert code == 1
    assert "WRONG" in output


@pytest.mark.parametrize("size", [1, 15, 37])
def test_any_size_will_do(size: int, tmp_path: Path) -> None:
    code, output = run("--size", str(size), "--out", str(tmp_path / "demo.png"))
    assert code == 0, output
    assert f"{size}×{size} pixels = {size**2:,} tokens" in output


def test_a_missing_spec_is_one_clear_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.app, ["--spec", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "none.yaml" in result.output
    assert "Traceback" not in result.output


# ---- the order of the tokens -------------------------------------------------------------------------------------


def test_blocks_of_16_are_squares() -> None:
    spec = Spec(name="squares", head_dim=8, levels=(Level(block=16, topk=1), Level(block=16, topk=1)))
    layout = pixels.layout(spec, 48)
    assert [layout.box(level, 5)[2:] for level in range(3)] == [(1, 1), (4, 4), (16, 16)]


@given(small_specs, st.integers(1, 40))
@settings(max_examples=40)
def test_a_token_is_the_pixels_in_its_box(spec: Spec, size: int) -> None:
    layout = pixels.layout(spec, size)
    rows, columns = (
        layout.tokens(x[None].double())[:, 0] for x in torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij")
    )
    for level in range(spec.num_levels + 1):
        above = layout.above(level)
        assert above.max() == math.ceil(size**2 / spec.span(level)) - 1
        for token in {0, int(above.max()) // 2, int(above.max())}:
            own = above == token
            assert layout.box(level, token) == (
                rows[own].min(), columns[own].min(), rows[own].max() - rows[own].min() + 1,
                columns[own].max() - columns[own].min() + 1,
            )  # fmt: skip
    token = layout.n_tokens // 2
    assert layout.token_at(*layout.box(0, token)[:2]) == token
    picture = torch.randn(3, size, size)
    assert layout.picture(layout.tokens(picture)).equal(picture)


@given(small_specs, st.integers(1, 20))
@settings(max_examples=20)
def test_a_mosaic_is_of_means(spec: Spec, size: int) -> None:
    layout, picture = pixels.layout(spec, size), torch.randn(3, size, size)
    for level in range(spec.num_levels + 1):
        wanted = [x.mean(0, keepdim=True).expand_as(x) for x in layout.tokens(picture).split(spec.span(level))]
        torch.testing.assert_close(layout.tokens(drawing.mosaic(picture, layout, level)), torch.cat(wanted))


# ---- what attention is given, and what is drawn of it --------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 64])
def test_logits_are_a_gaussian_in_colour_and_position(head_dim: int) -> None:
    spec = Spec(name="gauss", head_dim=head_dim, levels=(Level(block=16, topk=1),))
    layout = pixels.layout(spec, 16)
    picture = pixels.photograph(16, 16)
    near = pixels.Bandwidth(0.2, 0.1)
    tokens = pixels.tokens(spec, picture, layout, [near])
    logits = (tokens.q @ tokens.k.mT)[0, 0].double() / math.sqrt(head_dim)
    logits -= logits.diagonal()[:, None]  # where the distance is 0

    patch = 1 if head_dim == 8 else 3
    around = torch.nn.functional.pad(picture[None], (patch // 2,) * 4, mode="replicate")[0]
    patches = around.unfold(1, patch, 1).unfold(2, patch, 1).flatten(3)  # [3, 16, 16, patch^2]
    colour = patches.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)[layout.order.permutation].double()
    place = torch.cartesian_prod(torch.arange(16), torch.arange(16))[layout.order.permutation].double() / 16
    squares = (torch.cdist(colour, colour) / patch / near.colour) ** 2 + (
        torch.cdist(place, place) / near.position
    ) ** 2
    torch.testing.assert_close(logits, -squares / 2, atol=1e-3, rtol=1e-4)


def test_v_is_the_picture() -> None:
    spec = Spec(name="colours", head_dim=20, levels=(Level(block=6, topk=1),))
    layout = pixels.layout(spec, 13)
    picture = pixels.photograph(layout.height, layout.width)
    tokens = pixels.tokens(spec, picture, layout)
    torch.testing.assert_close(tokens.picture(tokens.v), picture, atol=1e-5, rtol=0)
    assert tokens.v.abs().amax(dim=(0, 1, 2)).min() > 0.01  # every channel carries something


@given(small_specs, st.integers(1, 40), st.data())
@settings(max_examples=25)
def test_what_is_drawn_is_what_the_reference_attends_to(spec: Spec, size: int, data: st.DataObject) -> None:
    layout = pixels.layout(spec, size)
    picture = pixels.photograph(layout.height, layout.width)
    tokens = pixels.tokens(spec, picture, layout)
    kept = reference.select(spec, tokens.q, tokens.k)
    token = data.draw(st.integers(0, layout.n_tokens - 1))
    view = drawing.view(spec, kept, layout, 3, token)
    weights = reference.weight_rows(spec, kept, torch.tensor([token]), layout.n_tokens)[0, 3, 0]
    assert torch.cat(view.seen).equal(weights > 0)

    plan = lower(spec)
    counted = cost.Cost(plan, schedule.schedule(plan, schedule.target("cuda:90"), 4))
    most = cost.evaluate(counted.keys, layout.n_tokens)
    assert view.keys <= most and (view.keys == most or layout.n_tokens % layout.spans[-1])  # the last ones are short

    seen = drawing.seen_picture(spec, picture, layout, view)
    sharp = layout.picture(view.seen[0][:, None])[0]
    assert seen[:, sharp].equal(picture[:, sharp])  # the pixels that it attends to are as they are
    if not spec.enriched_levels:
        torch.testing.assert_close(seen[:, ~sharp], drawing.UNSEEN * picture[:, ~sharp])
