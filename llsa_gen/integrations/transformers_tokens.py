"""Where the tokens of a picture stand in a sequence: by the type of the model, and by what its patches come to.

How many class and register tokens there are is written down for types of models whose embedding was looked at. The grid
is that of the convolution that makes patches, in the call at hand: pictures may change their shape from call to call.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llsa_gen.integrations.latest import Latest

__all__ = ["Around", "Patches", "around_of", "patches_of"]


class Around(NamedTuple):
    """What stands around the tokens of a picture, or of a text, which has neither a grid nor globals."""

    first: int
    last: int
    picture: bool


def _registers(config: Any) -> Around:
    return Around(1 + config.num_register_tokens, 0, True)


_NONE, _CLASS = Around(0, 0, True), Around(1, 0, True)
_GROUPS = Around(0, 0, False)
"""Patches that come cut, in groups of 2x2 or in an order of windows: a sequence, picture by picture."""

AROUND: dict[str, Around | Callable[[Any], Around]] = {
    "aimv2_vision_model": _NONE,
    "altclip_vision_model": _CLASS,
    "beit": _CLASS,
    "blip_2_vision_model": _CLASS,
    "chinese_clip_vision_model": _CLASS,
    "clip_vision_model": _CLASS,
    "clipseg_vision_model": _CLASS,
    "deit": Around(2, 0, True),  # class and distillation
    "dinov2": _CLASS,
    "dinov2_with_registers": _registers,
    "dinov3_vit": _registers,
    "dpt": _CLASS,
    "glm4v_vision": _GROUPS,
    "idefics3_vision": _NONE,
    "ijepa": _NONE,
    "instructblip_vision_model": _CLASS,
    "internvl_vision": _CLASS,
    "janus_vision_model": _NONE,
    "metaclip_2_vision_model": _CLASS,
    "mlcd_vision_model": _CLASS,
    "owlv2_vision_model": _CLASS,
    "owlvit_vision_model": _CLASS,
    "pixio": lambda config: Around(config.n_cls_tokens, 0, True),
    "qwen2_5_vl_vision": _GROUPS,
    "qwen2_vl_vision": _GROUPS,
    "qwen3_vl_vision": _GROUPS,
    "siglip2_vision_model": _NONE,
    "siglip_vision_model": _NONE,
    "smolvlm_vision": _NONE,
    "videomae": _NONE,
    "vit": _CLASS,
    "vit_msn": _CLASS,
    "vivit": _CLASS,
    "yolos": lambda config: Around(1, config.num_detection_tokens, True),
}
"""By config.model_type. Tests move a pixel under each and look which token of the first attention layer changes."""


def around_of(model: PreTrainedModel) -> Around | None:
    """Where the tokens of this model stand; None where nobody has written it down."""
    config: PreTrainedConfig = model.config
    found = AROUND.get(config.model_type)
    if found is not None:
        return found if isinstance(found, Around) else found(config)
    try:
        text = isinstance(model.get_input_embeddings(), nn.Embedding)
    except (NotImplementedError, AttributeError):
        text = False
    return Around(0, 0, False) if text else None


class Patches:
    """The grid of the last call's patches, as the convolution that makes them gave it: a forward hook of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.latest: Latest[tuple[tuple[int, ...] | None, bool]] = Latest((None, False))
        self.past: set[tuple[int, ...]] = set()
        """Every grid so far."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._note(tuple(output.shape[2:]))

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Of this thread's last call."""
        return self.latest.get()[0]

    @property
    def mixed(self) -> bool:
        """Whether pictures of one batch have several shapes, in this thread's last call."""
        return self.latest.get()[1]

    def _note(self, grid: tuple[int, ...], mixed: bool = False) -> None:
        self.latest.note((grid, mixed))
        if not torch.compiler.is_compiling():
            self.past.add(grid)

    def of(self, tokens: int) -> tuple[int, ...] | None:
        """The grid that a layer's patches have, which are so many; None where that isn't known.

        A layer that is computed again in a backward pass, by checkpointing, may be one of an earlier call.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.grid
        fitting = [grid for grid in tuple(self.past) if math.prod(grid) == tokens]
        return fitting[0] if len(fitting) == 1 else None

    def watch(self) -> Any:
        """Begin; the handle ends it."""
        return self.module.register_forward_hook(self)


class Shapes(Patches):
    """The same where patches come cut, with the shape of each picture: a hook before the embedding."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        shapes = kwargs["spatial_shapes"] if "spatial_shapes" in kwargs else args[1]
        self._note(tuple(shapes[0].tolist()), bool((shapes != shapes[0]).any()))

    def watch(self) -> Any:
        """Begin; the handle ends it."""
        return self.module.register_forward_pre_hook(self, with_kwargs=True)


def patches_of(model: nn.Module) -> Patches | None:
    """Who will know the grid of a model's patches; None where nothing makes them, or several modules do.

    That is a convolution over pictures, or over tubes of a video; or the embedding of Siglip2, to which patches come.
    """
    found: list[Patches] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and "patch_embed" in name:
            found.append(Patches(module))
        elif type(module).__name__ == "Siglip2VisionEmbeddings":
            found.append(Shapes(module))
    return found[0] if len(found) == 1 else None
