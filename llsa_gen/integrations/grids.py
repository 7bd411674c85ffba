"""The grid of patches that a model's inputs show: of a latent and the patch size of its config, or of ids and sizes.

Models of diffusers take a latent as [B, C, H, W], as [B, C, F, H, W], with frames or channels elsewhere, or packed as
[B, N, C] with ids or sizes beside it. What can be read off is a candidate, not a fact: whoever uses it compares its
number of cells with the number of tokens. Where inputs may mean several grids, all of them are candidates.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Shape", "candidates", "main_input", "text_lengths"]

Shape = tuple[int, ...]
"""Sizes of a grid, such as (height, width) or (frames, height, width); axes of size 1 are left out."""

MAIN = ("hidden_states", "x", "sample", "latents", "latent_model_input")
"""Names of a model's first input: its latent."""
CHANNELS = ("in_channels", "in_visual_dim", "num_channels")
"""Names by which a config says how many channels a latent has."""
CHANNEL_AXES = {"CogVideoX": 1, "ConsisID": 1, "Kandinsky": 3}
"""Where the channels of a video are, beside the batch, by the beginning of the class: elsewhere they are found."""
NO_TEXT = ("rot", "pos", "freq", "mask", "ids", "coords", "control", "residual")
"""Parts of names of inputs that have a row for each patch, and are no text."""
PACKED_IDS = ("img_ids", "latent_image_ids", "image_ids")

_read = WeakTensorKeyDictionary()
"""What was read off ids, by their tensor: (its version, the grid or None). Pipelines pass the same every step."""


def main_input(arguments: Mapping[str, Any]) -> Any:
    """The latent among a model's arguments, by name; else the first of them."""
    for name in MAIN:
        if arguments.get(name) is not None:
            return arguments[name]
    return next(iter(arguments.values()), None)


def text_lengths(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens inputs beside the latent have, [B, T, C] each: those of text, of pictures for reference."""
    main = main_input(arguments)
    found: list[int] = []
    for name, value in arguments.items():
        if any(part in name for part in NO_TEXT):
            continue
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and x is not main and x.ndim in (2, 3, 4) and x.is_floating_point():
                found.append(x.shape[-2])
    return tuple(found)


def candidates(kind: str, config: Any, arguments: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Grids that the arguments of a model may mean, most certain first, none twice; none where nothing shows one.

    Args:
        kind: the name of the model's class.
        config: the model's config, a mapping; a model without one passes an empty one.
        arguments: the arguments of its forward, by name.
    """
    found: list[Shape] = []
    for shape in _all(kind, config, arguments):
        shape = tuple([size for size in shape if size != 1]) or (1,)
        if shape not in found:
            found.append(shape)
    return tuple(found)


def _all(kind: str, config: Any, arguments: Mapping[str, Any]) -> Iterator[Shape]:
    latent = main_input(arguments)
    if isinstance(latent, list | tuple) and latent and isinstance(latent[0], Tensor):
        shapes = [tuple(x.shape) for x in latent]
        if any(shape != shapes[0] for shape in shapes):
            return
        latent = latent[0][None]
    if not isinstance(latent, Tensor):
        return
    patch = _patch(config, arguments)
    if latent.ndim in (4, 5):
        spatial = _spatial(latent, kind, config)
        sizes = patch[-len(spatial) :]
        # what a patch does not fit into is cut off by most models, filled up by some
        yield tuple([size // p for size, p in zip(spatial, sizes, strict=True)])
        yield tuple([-(-size // p) for size, p in zip(spatial, sizes, strict=True)])
    elif latent.ndim == 3:
        yield from _packed(latent, patch, config, arguments)


def _spatial(latent: Tensor, kind: str, config: Any) -> Shape:
    """The sizes of a latent without its channels, which come first, but in a few videos."""
    shape = latent.shape[1:]
    axis = 0
    if latent.ndim == 5:
        channels = next((config[name] for name in CHANNELS if name in config), None)
        axes = [axis for axis, size in enumerate(shape) if size == channels]
        told = [place for name, place in CHANNEL_AXES.items() if kind.startswith(name)]
        axis = told[0] if told else axes[0] if axes else 0
    return (*shape[:axis], *shape[axis + 1 :])


def _patch(config: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The patch of (frames, height, width)."""
    several, several_t = (config.get(name) or [1] for name in ("all_patch_size", "all_f_patch_size"))
    size = arguments.get("patch_size") or config.get("patch_size") or several[0]
    frames = arguments.get("f_patch_size") or config.get("patch_size_t") or several_t[0]
    if isinstance(size, Sequence):
        sizes = tuple(size)
        return (frames, *sizes) if len(sizes) == 2 else ((1, 1, *sizes)[-3:])  # type: ignore[return-value]
    return (frames, size, size)


def _packed(latent: Tensor, patch: tuple[int, int, int], config: Any, arguments: Mapping[str, Any]) -> Iterator[Shape]:
    for name in PACKED_IDS:
        ids = arguments.get(name)
        if isinstance(ids, Tensor) and not torch.compiler.is_compiling():  # which cannot look at numbers
            shape = _raster(ids)
            if shape is not None:
                yield shape
    shapes = arguments.get("img_shapes")
    if shapes:
        shape = _of_all(shapes)
        if shape is not None:
            yield shape
    sizes: Any = tuple([arguments.get(name) for name in ("num_frames", "height", "width")])
    if all(isinstance(size, int) for size in sizes):
        yield tuple([size // p for size, p in zip(sizes, patch, strict=True)])
    if config.get("in_channels") == latent.shape[1] != latent.shape[2]:  # a wave, [B, C, N]
        yield (latent.shape[2],)


def _of_all(shapes: Any) -> Shape | None:
    """The one shape in a list with one for each sample, each perhaps a list of one; None where there are more."""
    found = set()
    for sample in shapes:
        of_sample = [sample] if isinstance(sample[0], int) else list(sample)
        if len(of_sample) != 1:
            return None
        found.add(tuple(of_sample[0]))
    return found.pop() if len(found) == 1 else None


def _raster(ids: Tensor) -> Shape | None:
    """The grid whose cells, in raster order, have these ids, [N, axes] or [B, N, axes]; None where it is none."""
    if ids.is_inference():  # then nothing tells whether somebody has written into it
        return _raster_of(ids)
    known = _read.get(ids)
    if known is None or known[0] != ids._version:
        known = (ids._version, _raster_of(ids))
        _read[ids] = known
    return known[1]


def _raster_of(ids: Tensor) -> Shape | None:
    if ids.ndim == 3:
        if ids.shape[0] > 1 and not torch.equal(ids, ids[:1].expand_as(ids)):
            return None
        ids = ids[0]
    if ids.ndim != 2 or not len(ids):
        return None
    place, shape = torch.zeros(len(ids), dtype=torch.int64, device=ids.device), []
    for column in ids.detach().unbind(1):
        values, rank = column.unique(return_inverse=True)
        place = place * len(values) + rank
        shape.append(len(values))
    if math.prod(shape) != len(ids) or not torch.equal(place, torch.arange(len(ids), device=ids.device)):
        return None
    return tuple(shape)
