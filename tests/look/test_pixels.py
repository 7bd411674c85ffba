"""Pixels as tokens: what is said of their order, of the logits and of what one of them sees is true."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photograph import photograph

from llsa_gen import reference, schedule
from llsa_gen.look import pixels, views
from llsa_gen.plan import cost, lower
from llsa_gen.spec import Level, Spec

small_specs = st.builds(
    lambda levels, enrich: Spec(name="drawn", head_dim=8, levels=levels, enrich=enrich),
    st.lists(st.builds(Level, block=st.integers(2, 9), topk=st.integers(1, 4)), min_size=1, max_size=3),
    st.sampled_from(["all", "none"]),
)


# ---- the order of the tokens -------------------------------------------------------------------------------------


def test_blocks_of_16_are_squares() -> None:
    spec = Spec(name="squares", head_dim=8, levels=(Level(block=16, topk=1), Level(block=16, topk=1)))
    layout = pixels.layout(spec, 48, 48)
    assert [layout.box(level, 5)[2:] for level in range(3)] == [(1, 1), (4, 4), (16, 16)]


@given(small_specs, st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40)
def test_a_token_is_the_pixels_in_its_box(spec: Spec, height: int, width: int) -> None:
    layout = pixels.layout(spec, height, width)
    rows, columns = (
        layout.tokens(x[None].double())[:, 0]
        for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    for level in range(spec.num_levels + 1):
        above = layout.above(level)
        assert above.max() == math.ceil(height * width / spec.span(level)) - 1
        for token in {0, int(above.max()) // 2, int(above.max())}:
            own = above == token
            assert layout.box(level, token) == (
                rows[own].min(), columns[own].min(), rows[own].max() - rows[own].min() + 1,
                columns[own].max() - columns[own].min() + 1,
            )  # fmt: skip
    token = layout.n_tokens // 2
    assert layout.token_at(*layout.box(0, token)[:2]) == token
    picture = torch.randn(3, height, width)
    assert layout.picture(layout.tokens(picture)).equal(picture)


@given(small_specs, st.integers(1, 20))
@settings(max_examples=20)
def test_a_mosaic_is_of_means(spec: Spec, size: int) -> None:
    layout, picture = pixels.layout(spec, size, size), torch.randn(3, size, size)
    for level in range(spec.num_levels + 1):
        wanted = [x.mean(0, keepdim=True).expand_as(x) for x in layout.tokens(picture).split(spec.span(level))]
        torch.testing.assert_close(layout.tokens(views.mosaic(picture, layout, level)), torch.cat(wanted))


# ---- what attention is given, and what is drawn of it --------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "patch"),
    [(8, 1), (29, 1), (30, 3), (64, 3), (77, 3), (78, 5), (149, 5), (150, 7), (245, 7), (246, 9), (256, 9)],
)
def test_logits_are_a_gaussian_in_colour_and_position(head_dim: int, patch: int) -> None:
    spec = Spec(name="gauss", head_dim=head_dim, levels=(Level(block=16, topk=1),))
    layout = pixels.layout(spec, 16, 16)
    picture = photograph(16, 16)
    near = pixels.Bandwidth(0.2, 0.1)
    tokens = pixels.tokens(spec, picture, layout, [near])
    logits = (tokens.q @ tokens.k.mT)[0, 0].double() / math.sqrt(head_dim)
    logits -= logits.diagonal()[:, None]  # where the distance is 0

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
    layout = pixels.layout(spec, 13, 13)
    picture = photograph(layout.height, layout.width)
    tokens = pixels.tokens(spec, picture, layout)
    torch.testing.assert_close(tokens.picture(tokens.v), picture, atol=1e-5, rtol=0)
    assert tokens.v.abs().amax(dim=(0, 1, 2)).min() > 0.01  # every channel carries something


@given(small_specs, st.integers(1, 40), st.data())
@settings(max_examples=25)
def test_what_is_drawn_is_what_the_reference_attends_to(spec: Spec, size: int, data: st.DataObject) -> None:
    layout = pixels.layout(spec, size, size)
    picture = photograph(layout.height, layout.width)
    tokens = pixels.tokens(spec, picture, layout)
    kept = reference.select(spec, tokens.q, tokens.k)
    token = data.draw(st.integers(0, layout.n_tokens - 1))
    view = views.view(spec, kept, layout, 3, token)
    weights = reference.weight_rows(spec, kept, torch.tensor([token]), layout.n_tokens)[0, 3, 0]
    assert torch.cat(view.seen).equal(weights > 0)

    plan = lower(spec)
    counted = cost.Cost(plan, schedule.schedule(plan, schedule.target("cuda:90"), 4))
    most = cost.evaluate(counted.keys, layout.n_tokens)
    assert view.keys <= most and (view.keys == most or layout.n_tokens % layout.spans[-1])  # the last ones are short

    seen = views.seen_picture(spec, picture, layout, view)
    sharp = layout.picture(view.seen[0][:, None])[0]
    assert seen[:, sharp].equal(picture[:, sharp])  # the pixels that it attends to are as they are
    if not spec.enriched_levels:
        torch.testing.assert_close(seen[:, ~sharp], views.UNSEEN * picture[:, ~sharp])
