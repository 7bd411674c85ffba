"""Flow matching with the noise scale of the resolution: what is learnt, how wrong a guess is, and how to sample.

    x_t = (1 - t) x_0 + s t eps        velocity  v = dx_t / dt = s eps - x_0        t in (0, 1)

x_0 is a picture in -1 ... 1 and eps white noise. A large picture needs more noise to be hidden, for its neighbours tell
more of a pixel: s = n/64 for n×n pixels above 64×64, and 1 below. t is logit-normal: most steps are in the middle.

The network sees x_t divided by its usual size, and says the velocity divided by its usual size, so that both have
numbers about 1 at any resolution. A network that says 0 has a loss of about 1.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

SPREAD = 0.5
"""The usual size of a picture's numbers, which run from -1 to 1."""

Network = Callable[[Tensor, Tensor], Tensor]
"""Of x_t over its usual size, [B, 3, height, width], and t [B], the velocity over its usual size."""


def noise_scale(height: int, width: int) -> float:
    """s, by the area of the picture."""
    return max(1.0, math.sqrt(height * width) / 64)


def input_size(t: Tensor, scale: float) -> Tensor:
    """The usual size of x_t at t [B], as [B, 1, 1, 1]."""
    return ((1 - t) ** 2 * SPREAD**2 + (scale * t) ** 2).sqrt()[:, None, None, None]


def velocity_size(scale: float) -> float:
    """The usual size of a velocity."""
    return math.sqrt(scale**2 + SPREAD**2)


def draw_noise(seed: int, position: int, height: int, width: int) -> tuple[float, Tensor]:
    """(t, eps) of training window number `position`: these follow from (seed, position). eps [3, height, width]."""
    random = np.random.default_rng([seed, 1, position])
    t = 1 / (1 + math.exp(-random.standard_normal()))
    return t, torch.from_numpy(random.standard_normal((3, height, width), dtype=np.float32))


def fixed_times(count: int) -> Tensor:
    """`count` times that stand for the logit-normal ones: its quantiles, in the same mixed order in every run."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = torch.from_numpy(np.random.default_rng(1).permutation(count))
    return torch.special.ndtri(places).sigmoid().float()[order]


def noised(x_0: Tensor, t: Tensor, eps: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the network is given and what it ought to say: both [B, 3, height, width], for t [B]."""
    at = t[:, None, None, None]
    x_t = (1 - at) * x_0 + scale * at * eps
    return x_t / input_size(t, scale), (scale * eps - x_0) / velocity_size(scale)


def pixelwise_loss(t: Tensor, scale: float) -> float:
    """The least loss of a network that looks at each number alone, were the pictures white noise of size SPREAD.

    It knows how much of x_t is noise, but nothing of pictures: a model that has learnt anything is below.
    """
    unexplained = (scale * SPREAD) ** 2 / (input_size(t, scale) ** 2 * velocity_size(scale) ** 2)
    return float(unexplained.mean())


@torch.no_grad()
def sample(network: Network, eps: Tensor, scale: float, steps: int, heun: bool = True) -> Tensor:
    """Pictures [B, 3, height, width] in -1 ... 1, from white noise of that shape: the flow from t = 1 to 0.

    Euler's method, or with `heun` that of Heun, which asks the network twice a step.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        return network(x / input_size(times, scale), times).float() * velocity_size(scale)

    x, times = scale * eps, torch.linspace(1, 0, steps + 1).tolist()
    for here, there in pairwise(times):
        slope = velocity(x, here)
        if heun and there > 0:
            slope = (slope + velocity(x + (there - here) * slope, there)) / 2
        x = x + (there - here) * slope
    return x.clamp(-1, 1)
