"""Where the tokens of a picture stand in a sequence: by the type of the model, and by what its patches come to.

How many class and register tokens there are is written down for types of models whose embedding was looked at. The grid
is that of the convolution that makes patches, in the call at hand: pictures may change their shape from call to call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Patches", "Place", "patches_of", "place_of"]


class Place(NamedTuple):
    """What stands around the tokens of a picture, or of a text, which has neither a grid nor globals."""

    first: int
    last: int
    picture: bool


def _registers(config: Any) -> Place:
    return Place(1 + config.num_register_tokens, 0, True)


_NONE, _CLASS = Place(0, 0, True), Place(1, 0, True)

PLACES: dict[str, Place | Callable[[Any], Place]] = {
    "altclip_vision_model": _CLASS,
    "beit": _CLASS,
    "blip_2_vision_model": _CLASS,
    "chinese_clip_vision_model": _CLASS,
    "clip_vision_model": _CLASS,
    "clipseg_vision_model": _CLASS,
    "deit": Place(2, 0, True),  # class and distillation
    "dinov2": _CLASS,
    "dinov2_with_registers": _registers,
    "dinov3_vit": _registers,
    "ijepa": _NONE,
    "instructblip_vision_model": _CLASS,
    "internvl_vision": _CLASS,
    "metaclip_2_vision_model": _CLASS,
    "owlv2_vision_model": _CLASS,
    "owlvit_vision_model": _CLASS,
    "pixio": lambda config: Place(config.n_cls_tokens, 0, True),
    "siglip_vision_model": _NONE,
    "videomae": _NONE,
    "vit": _CLASS,
    "vit_msn": _CLASS,
    "vivit": _CLASS,
    "yolos": lambda config: Place(1, config.num_detection_tokens, True),
}
"""By config.model_type. Tests move a pixel under each and look which token of the first attention layer changes."""


def place_of(model: PreTrainedModel) -> Place | None:
    """Where the tokens of this model stand; None where nobody has written it down."""
    config: PreTrainedConfig = model.config
    found = PLACES.get(config.model_type)
    if found is not None:
        return found if isinstance(found, Place) else found(config)
    return Place(0, 0, False) if model.main_input_name == "input_ids" else None


class Patches:
    """The grid of the last call's patches, as the convolution that makes them gave it: a forward hook of it."""

    grid: tuple[int, ...] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.grid = tuple(output.shape[2:])


def patches_of(model: nn.Module) -> nn.Module | None:
    """The convolution over patches, or over tubes of a video, that a model has; None without one, or with several."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d) and "patch_embed" in name
    ]
    return found[0] if len(found) == 1 else None
