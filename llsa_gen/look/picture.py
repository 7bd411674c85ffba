"""Picture files: read as colours by matplotlib, and averaged to a size that attention over all pixels is quick for."""

from pathlib import Path
from typing import Any

import torch
from matplotlib import image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llsa_gen.errors import LlsaGenError, short

__all__ = ["averaged", "read"]


def read(path: Path) -> Tensor:
    """The picture in a file of any format that Pillow reads: [3, height, width] in 0 to 1, on white.

    Raises LlsaGenError where there is no such file, or no picture in it.
    """
    name = short(str(path), 300)
    try:
        file = path.open("rb")
    except OSError as error:
        raise LlsaGenError(f"{name}: {error.strerror}") from None
    with file:
        try:
            pixels: Any = image.imread(file, format="any")  # by its content, not by its name
        except Exception as error:  # Pillow's readers raise anything for bytes that are no picture
            # Pillow names the file by its repr where it knows of no format that begins so
            reason = "other content" if repr(file) in str(error) else short(str(error), 200)
            raise LlsaGenError(f"{name}: expected a picture, such as a PNG or a JPEG, got: {reason}") from None
    most = 1 if pixels.dtype.kind == "f" else 2 ** (8 * pixels.dtype.itemsize) - 1
    return _on_white(torch.tensor(pixels.astype("float32")) / most)


def averaged(picture: Tensor, longest: int) -> Tensor:
    """The picture with its longer side averaged to at most so many pixels, its proportions kept."""
    height, width = picture.shape[1:]
    zoom = min(1.0, longest / max(height, width))
    return adaptive_avg_pool2d(picture, (max(1, round(height * zoom)), max(1, round(width * zoom))))


def _on_white(pixels: Tensor) -> Tensor:
    """[height, width] or [height, width, 1 to 4], the last of 2 or 4 being how opaque it is: [3, height, width]."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] in (2, 4):
        opaque = pixels[:, :, -1:]
        pixels = pixels[:, :, :-1] * opaque + (1 - opaque)
    return pixels.expand(-1, -1, 3).permute(2, 0, 1).contiguous()
