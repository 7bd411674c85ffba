"""The demo's photograph, the noise that attention is to remove, and how much of it is left."""

import math

import torch
from matplotlib import cbook, image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

PHOTOGRAPH = "grace_hopper.jpg"
"""In matplotlib's sample data: 512 x 600 pixels, in the public domain."""

HEADROOM = 20
"""Rows of the photograph above the hat, which a square crop leaves out."""


def photograph(height: int, width: int) -> Tensor:
    """The photograph from the hat down, cropped to these proportions and averaged to this size: [3, height, width] in
    0 to 1."""
    path = cbook.get_sample_data(PHOTOGRAPH, asfileobj=False)
    pixels = torch.tensor(image.imread(path)).permute(2, 0, 1)[:, HEADROOM:].float() / 255
    zoom = min(pixels.shape[1] / height, pixels.shape[2] / width)
    rows, columns = round(height * zoom), round(width * zoom)
    left = (pixels.shape[2] - columns) // 2
    return adaptive_avg_pool2d(pixels[:, :rows, left : left + columns], (height, width))


def with_noise(picture: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """The picture with Gaussian noise; not clipped, or dark and bright parts would be given away."""
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return picture + deviation * noise


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels: higher is better."""
    return -10 * math.log10(float(mse_loss(picture, truth)))
