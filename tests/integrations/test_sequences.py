"""Where a picture is in a sequence, and what a mask says of it: from lengths, and a reason where they leave it open."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen.integrations import sequences
from llsa_gen.integrations.sequences import Masks, Place, find, look

GRID = (6, 8)


def test_a_sequence_as_long_as_a_grid_is_the_picture() -> None:
    assert find(48, [(4, 4), GRID], [(7, 41)], None) == Place(GRID, 0, 0)
    assert find(48, [GRID, (8, 6)], [], None) == sequences.MANY_GRIDS
    assert find(48, [], [], None) == sequences.NO_GRID
    assert find(47, [GRID], [(7, 40)], None) == sequences.FEWER


@given(st.integers(1, 60), st.integers(0, 60))
def test_parts_show_where_text_is(first: int, last: int) -> None:
    found = find(first + 48 + last, [GRID], [(1, 2), (first, 48, last)], None)
    if 48 in (first, last):
        assert found == sequences.NO_TEXT, "either part may be the picture"
        if last == 0:
            assert find(first + 48, [GRID], [(first, 48)], "first") == Place(GRID, first, 0)
    else:
        assert found == Place(GRID, first, last)


def test_what_is_said_of_text_decides_where_nothing_shows_it() -> None:
    assert find(55, [GRID], [], None) == sequences.NO_TEXT
    assert find(55, [GRID], [], "first") == Place(GRID, 7, 0)
    assert find(55, [GRID], [], "last") == Place(GRID, 0, 7)
    assert find(55, [GRID], [], (3, 4)) == Place(GRID, 3, 4)
    assert find(55, [GRID], [], (3, 3)) == sequences.NO_TEXT, "another sequence than was spoken of"
    assert find(55, [GRID], [(48, 7)], "first") == Place(GRID, 0, 7), "what the model does counts more"


def test_frames_one_by_one_have_the_grid_of_a_frame() -> None:
    assert find(48, [(3, *GRID)], [], None, copies=3) == Place(GRID, 0, 0)
    assert find(48, [(3, *GRID)], [], None, copies=2) == sequences.FEWER


def mask_of(*left_out: int) -> torch.Tensor:
    """[2, 1, 1, 55] bool: 7 of text, then the picture; the second batch entry leaves some out."""
    mask = torch.ones(2, 1, 1, 55, dtype=torch.bool)
    mask[1, ..., list(left_out)] = False
    return mask


PLACE = Place(GRID, 7, 0)


@pytest.mark.parametrize("floats", [None, float("-inf"), torch.finfo(torch.float16).min, -10_000.0])
@pytest.mark.parametrize("rows", [1, 55])
def test_padding_of_text_is_told_from_a_mask_that_is_all_true(floats: float | None, rows: int) -> None:
    def made(*left_out: int) -> torch.Tensor:
        mask = mask_of(*left_out).expand(2, 1, rows, 55)
        return mask if floats is None else torch.zeros(mask.shape).masked_fill(~mask, floats)

    assert look(made(), 2, PLACE, 55) == Masks(None)
    found = look(made(5, 6), 2, PLACE, 55)
    assert isinstance(found, Masks) and found.text is not None
    assert found.text.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert look(made(6, 30), 2, PLACE, 55) == sequences.OVER_PICTURE


def test_masks_that_the_operator_does_not_have_are_told_apart() -> None:
    assert look(torch.randn(1, 1, 1, 55), 2, PLACE, 55) == sequences.BIAS
    causal = torch.ones(55, 55, dtype=torch.bool).tril()
    assert look(causal, 2, PLACE, 55) == sequences.PER_QUERY
    causal[7:] = True  # rows of text alone are causal, and stay dense
    assert look(causal, 2, PLACE, 55) == Masks(None)
    heads = torch.ones(2, 4, 1, 55, dtype=torch.bool)
    heads[:, 2, :, 3] = False
    assert look(heads, 2, PLACE, 55) == sequences.PER_HEAD


def test_a_mask_that_was_written_into_is_looked_at_again() -> None:
    mask = mask_of()
    assert look(mask, 2, PLACE, 55) == Masks(None)
    mask[0, ..., 20] = False
    assert look(mask, 2, PLACE, 55) == sequences.OVER_PICTURE
    with torch.inference_mode():
        mask = mask_of()
        assert look(mask, 2, PLACE, 55) == Masks(None)
        mask[0, ..., 20] = False
        assert look(mask, 2, PLACE, 55) == sequences.OVER_PICTURE


def test_rows_of_the_pictures_queries_alone() -> None:
    place = Place(GRID, 7, 0)
    rows = torch.ones(2, 1, 48, 55, dtype=torch.bool)
    rows[1, :, :, 5:7] = False
    found = look(rows, 2, place, 55)
    assert isinstance(found, Masks) and found.text is not None
    assert torch.equal(found.text, rows[:, 0, 0, :7])
    rows[1, :, :3, 4] = False  # of its first queries, which a whole sequence would give to text
    assert look(rows, 2, place, 55) == sequences.PER_QUERY
