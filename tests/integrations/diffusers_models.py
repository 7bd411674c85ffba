"""Real classes of diffusers, small and of random weights, with inputs: what the tests of the adapter run."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

diffusers: Any = importlib.import_module("diffusers")  # whose names are made when they are asked for

Made = tuple[Any, dict[str, Any]]

TEXT, WIDTH = 7, 20
HEAD_DIM = 16
STEP = torch.tensor([3, 5])
LAST_THREE_PADDED = torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 3]])

EVERYTHING = {"name": "everything", "head_dim": HEAD_DIM, "levels": [{"block": 4, "topk": 512}], "enrich": "none"}
"""Keeps every token and adds no means: dense attention."""
LITTLE = {"name": "little", "head_dim": HEAD_DIM, "levels": [{"block": 4, "topk": 2}, {"block": 4, "topk": 2}]}


def text(tokens: int = TEXT) -> Tensor:
    return torch.randn(2, tokens, WIDTH)


def ids(height: int, width: int) -> Tensor:
    """As pipelines of Flux make them: [height * width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros(height, width), rows, columns], -1).reshape(-1, 3)


def dit() -> Made:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=16,
        patch_size=2, num_embeds_ada_norm=8,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": STEP, "class_labels": torch.tensor([1, 2])}


def pixart(tokens: int = TEXT) -> Made:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        patch_size=2, cross_attention_dim=32, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": STEP, "encoder_hidden_states": text(tokens)}
    none = {"resolution": None, "aspect_ratio": None}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, tokens), "added_cond_kwargs": none}


def sd3(height: int = 16, width: int = 12, layers: int = 2) -> Made:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, height, width), "encoder_hidden_states": text(), "timestep": STEP}
    return model, inputs | {"pooled_projections": torch.randn(2, 24)}


def flux(tokens: int = TEXT) -> Made:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 48, 4), "encoder_hidden_states": text(tokens)}
    inputs |= {"pooled_projections": torch.randn(2, 24), "timestep": torch.rand(2)}
    return model, inputs | {"img_ids": ids(8, 6), "txt_ids": torch.zeros(tokens, 3)}


def wan() -> Made:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 3, 8, 12), "timestep": STEP, "encoder_hidden_states": text()}


def ltx() -> Made:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 72, 4), "encoder_hidden_states": text(), "timestep": STEP}
    inputs |= {"num_frames": 3, "height": 4, "width": 6}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool)}


def qwen(mask: Tensor = LAST_THREE_PADDED) -> Made:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 48, 16), "encoder_hidden_states": text(), "timestep": torch.rand(2)}
    return model, inputs | {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 8, 6)]] * 2}


def hunyuan_video(mask: Tensor = LAST_THREE_PADDED) -> Made:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH,
        pooled_projection_dim=24, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 3, 4, 6), "timestep": STEP, "encoder_hidden_states": text()}
    inputs |= {"pooled_projections": torch.randn(2, 24), "guidance": torch.tensor([1000.0, 1000.0])}
    return model, inputs | {"encoder_attention_mask": mask.int()}


def cogvideox() -> Made:
    """Frames before channels; text first."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=1, sample_width=12, sample_height=8, sample_frames=9,
        max_text_seq_length=TEXT,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 3, 4, 8, 12), "timestep": STEP, "encoder_hidden_states": text()}


def lumina2() -> Made:
    """Text and picture put into one tensor without torch.cat; fewer heads of keys than of queries."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, axes_dim_rope=(4, 4, 8), axes_lens=(32, 32, 32), cap_feat_dim=WIDTH, multiple_of=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 12), "timestep": torch.rand(2), "encoder_hidden_states": text()}
    return model, inputs | {"encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.bool)}


def prx(mask: Tensor = LAST_THREE_PADDED) -> Made:
    """Queries of the picture alone, over text and picture."""
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8],
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 12), "timestep": torch.rand(2), "encoder_hidden_states": text()}
    return model, inputs | {"attention_mask": mask}


def sana() -> Made:
    """Self-attention that is linear."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=8,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": text()}


def unet() -> Made:
    """A transformer within, at each resolution a grid of its own."""
    model = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor(3), "encoder_hidden_states": text()}
    return model, inputs


CLASSES: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (dit, pixart, sd3, flux, wan, ltx, qwen, hunyuan_video, cogvideox, lumina2, prx, sana, unet)
}


def loud(made: Made) -> Made:
    """With weights that matter: many are zero at first, and then no error would show."""
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made[0].parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=dice)
    return made[0].eval(), made[1]


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())
