"""The grid that a model's inputs show."""

from typing import Any

import pytest
import torch
from diffusers_models import ids

from llsa_gen.integrations.grids import candidates, text_lengths


@pytest.mark.parametrize(
    ("kind", "config", "latent", "wanted"),
    [
        ("Any", {"patch_size": 2}, (2, 4, 16, 12), (8, 6)),
        ("Any", {"patch_size": (2, 2)}, (2, 4, 16, 12), (8, 6)),
        ("Any", {"patch_size": None}, (2, 4, 16, 12), (16, 12)),
        ("Any", {}, (2, 4, 16, 1), (16,)),
        ("Any", {"patch_size": 2, "in_channels": 4}, (2, 4, 3, 16, 12), (3, 8, 6)),
        ("Any", {"patch_size": 2, "patch_size_t": 3, "in_channels": 4}, (2, 4, 6, 16, 12), (2, 8, 6)),
        ("Any", {"patch_size": (1, 2, 2), "in_channels": 4}, (2, 4, 1, 16, 12), (8, 6)),
        ("Any", {"patch_size": 2, "in_channels": 4}, (2, 3, 4, 16, 12), (3, 8, 6)),
        ("CogVideoXTransformer3DModel", {"patch_size": 2, "in_channels": 16}, (2, 3, 16, 16, 12), (3, 8, 6)),
        ("Kandinsky5Transformer3DModel", {"patch_size": (1, 2, 2), "in_visual_dim": 4}, (2, 4, 16, 12, 4), (4, 8, 6)),
    ],
)
def test_a_latent_and_a_patch_show_it(
    kind: str, config: dict[str, Any], latent: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert candidates(kind, config, {"hidden_states": torch.empty(latent)})[0] == wanted


def test_a_size_that_patches_do_not_divide_has_two_candidates() -> None:
    assert candidates("Any", {"patch_size": 2}, {"hidden_states": torch.empty(1, 4, 15, 8)}) == ((7, 4), (8, 4))


def test_packed_latents_have_it_beside_them() -> None:
    latent = {"hidden_states": torch.empty(2, 48, 4)}
    assert candidates("Any", {}, latent) == ()
    assert candidates("Any", {}, latent | {"img_ids": ids(8, 6)}) == ((8, 6),)
    assert candidates("Any", {}, latent | {"img_ids": ids(8, 6).expand(2, -1, -1)}) == ((8, 6),)
    assert candidates("Any", {}, latent | {"img_ids": ids(8, 6).flip(0)}) == (), "not in raster order"
    assert candidates("Any", {}, latent | {"img_ids": ids(8, 6)[:-1]}) == (), "no grid"
    assert candidates("Any", {}, latent | {"img_shapes": [[(1, 8, 6)]] * 2}) == ((8, 6),)
    assert candidates("Any", {}, latent | {"img_shapes": [[(1, 8, 6)], [(1, 6, 8)]]}) == ()
    assert candidates("Any", {}, latent | {"img_shapes": [[(1, 8, 3), (1, 8, 3)]] * 2}) == (), "several pictures"
    assert candidates("Any", {"patch_size": 1}, latent | {"num_frames": 2, "height": 4, "width": 6}) == ((2, 4, 6),)


def test_ids_that_were_written_into_are_read_again() -> None:
    own = ids(8, 6)
    latent = {"hidden_states": torch.empty(2, 48, 4), "img_ids": own}
    assert candidates("Any", {}, latent) == ((8, 6),)
    own.copy_(ids(6, 8))
    assert candidates("Any", {}, latent) == ((6, 8),)


def test_pictures_in_a_list_share_a_grid_or_show_none() -> None:
    config = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4}
    picture = torch.empty(4, 1, 16, 12)
    assert candidates("Any", config, {"x": [picture, picture]})[0] == (8, 6)
    assert candidates("Any", config, {"x": [picture, torch.empty(4, 1, 12, 16)]}) == ()


def test_lengths_of_text_are_those_of_what_is_beside_the_latent() -> None:
    arguments = {"hidden_states": torch.empty(2, 48, 4), "encoder_hidden_states": torch.empty(2, 7, 20)}
    assert text_lengths(arguments | {"more": [torch.empty(2, 9, 3)], "mask": torch.ones(2, 7).bool()}) == (7, 9)
    of_patches = {name: [torch.empty(2, 48, 4)] for name in ("image_rotary_emb", "block_controlnet_hidden_states")}
    assert text_lengths(arguments | of_patches) == (7,)
