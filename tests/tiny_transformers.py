"""Tiny models of real classes of transformers, random, in float32: what the tests of the adapter run."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen2_vl import modeling_qwen2_vl

from llsa_gen import Level, Spec

D = 16
ALL = Spec(name="everything", head_dim=D, levels=(Level(block=4, topk=512), Level(block=4, topk=512)), enrich="none")
"""Keeps every token of these sequences: dense attention."""
FEW = Spec(name="few", head_dim=D, levels=(Level(block=4, topk=2), Level(block=4, topk=2)))

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
PICTURE = {**SIZES, "image_size": 32, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 64}
MODERN = {**TEXT, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)}
VIDEO = {**SIZES, "image_size": 16, "num_frames": 4}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PIXELS = {"pixel_values": randn(2, 3, 32, 32)}
IDS = {"input_ids": torch.randint(2, 99, (2, 24), generator=torch.Generator().manual_seed(1))}
FRAMES = {"pixel_values": randn(1, 4, 3, 16, 16)}


class Case(NamedTuple):
    """A class of transformers, its config's arguments, and an input."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]

    def make(self, **more: Any) -> Any:
        """The same model in every call, in evaluation, with no parameter that nobody would notice."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.name, None) or getattr(modeling_qwen2_vl, self.name)
        model = kind(kind.config_class(**{**copy.deepcopy(self.config), **more}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        return model.eval()


def vision(name: str, **more: Any) -> Case:
    return Case(name, {**PICTURE, **more}, PIXELS)


PICTURES = (
    vision("ViTModel"), vision("DeiTModel"), vision("BeitModel"), vision("Dinov2Model"), vision("ViTMSNModel"),
    vision("Dinov2WithRegistersModel", num_register_tokens=3), vision("DINOv3ViTModel", num_register_tokens=3),
    vision("SiglipVisionModel"), vision("CLIPVisionModel"), vision("ChineseCLIPVisionModel"),
    vision("AltCLIPVisionModel"), vision("MetaClip2VisionModel"), vision("CLIPSegVisionModel"),
    vision("OwlViTVisionModel"), vision("Owlv2VisionModel"), vision("Blip2VisionModel"), vision("IJepaModel"),
    vision("InstructBlipVisionModel"), vision("PixioModel", n_cls_tokens=3),
    vision("InternVLVisionModel", image_size=[32, 32], patch_size=[4, 4]),
    vision("YolosModel", image_size=[32, 32], num_detection_tokens=5),
    vision("MLCDVisionModel"), vision("Aimv2VisionModel"), vision("DPTModel", backbone_out_indices=[0, 1]),
    vision("Idefics3VisionTransformer"), vision("SmolVLMVisionTransformer"), vision("JanusVisionModel"),
    Case("VideoMAEModel", {**VIDEO, "patch_size": 4, "tubelet_size": 2}, FRAMES),
    Case("VivitModel", {**VIDEO, "tubelet_size": [2, 4, 4]}, FRAMES),
)  # fmt: skip
"""One of each type of model whose tokens the adapter knows, but for those whose patches come cut."""

PATCHES = {
    "pixel_values": randn(2, 64, 48),
    "pixel_attention_mask": torch.ones(2, 64, dtype=torch.int32),
    "spatial_shapes": torch.tensor([[8, 8], [8, 8]]),
}
SIGLIP2 = Case("Siglip2VisionModel", {**SIZES, "patch_size": 4, "num_patches": 64}, PATCHES)
CUT = {"hidden_states": randn(96, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]])}
GROUPS = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 64}
GROUPED_PATCHES = (
    Case("Qwen2VisionTransformerPretrainedModel", {**GROUPS, "embed_dim": 32, "mlp_ratio": 2}, CUT),
    Case(
        "Qwen2_5_VisionTransformerPretrainedModel",
        {**GROUPS, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        CUT,
    ),
    Case(
        "Qwen3VLVisionModel",
        {**GROUPS, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": []},
        CUT,
    ),
    Case("Glm4vVisionModel", {**GROUPS, "out_hidden_size": 32, "image_size": 32}, CUT),
)
"""Two pictures in one sequence, attended to one by one."""
VIT = PICTURES[0]
DINO = PICTURES[5]
SIGLIP = PICTURES[7]
BERT = Case("BertModel", TEXT, IDS)
LLAMA = Case("LlamaModel", {**TEXT, "num_key_value_heads": 1}, IDS)
MODERNBERT = Case("ModernBertModel", {**MODERN, "num_hidden_layers": 4, "local_attention": 8}, IDS)
GLOBAL = Case("ModernBertModel", {**MODERN, "layer_types": ["full_attention"] * 2}, IDS)
GROUPED = Case(
    "Gemma3TextModel",
    {**TEXT, "num_key_value_heads": 1, "head_dim": D, "use_bidirectional_attention": True,
     "layer_types": ["full_attention"] * 2},
    IDS,
)  # fmt: skip


def result(model: Callable[..., Any], inputs: dict[str, Any], **more: Any) -> Tensor:
    """The first tensor of a model's output, without gradients."""
    with torch.no_grad():
        output = model(**inputs, **more)
    return next(x for x in output.values() if isinstance(x, Tensor))


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of a sum with weights over the output, by parameter."""
    model.zero_grad()
    output = model(**inputs).last_hidden_state
    (output * randn(*output.shape, seed=5)).sum().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def error(x: Tensor, wanted: Tensor) -> float:
    x, wanted = x.detach(), wanted.detach()
    return float((x - wanted).norm() / wanted.norm())
