"""The flow: its velocity is the derivative, sampling follows it, and the noise grows with the resolution."""

import flow
import pytest
import torch


def test_noise_grows_above_64_pixels_alone() -> None:
    sizes = [(16, 16), (64, 64), (128, 128), (256, 256), (128, 512)]
    assert [flow.noise_scale(*size) for size in sizes] == [1, 1, 2, 4, 4]


def test_velocity_is_the_derivative_of_what_is_seen() -> None:
    x_0, eps, scale = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64), 2.0
    t, h = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6

    def seen(t: torch.Tensor) -> torch.Tensor:
        return flow.noised(x_0, t, eps, scale)[0] * flow.input_size(t, scale)

    velocity = flow.noised(x_0, t, eps, scale)[1] * flow.velocity_size(scale)
    assert torch.allclose((seen(t + h) - seen(t - h)) / (2 * h), velocity, atol=1e-6)


class OfNoise:
    """The best network for pictures that are white noise of size SPREAD: linear, each number by itself."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        size, at = flow.input_size(t, self.scale), t[:, None, None, None]
        covariance = self.scale**2 * at - (1 - at) * flow.SPREAD**2
        return covariance / size * x / flow.velocity_size(self.scale)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_no_network_that_sees_single_numbers_is_better_than_it_says(scale: float) -> None:
    torch.manual_seed(0)
    t = flow.fixed_times(500)
    given, wanted = flow.noised(flow.SPREAD * torch.randn(500, 3, 8, 8), t, torch.randn(500, 3, 8, 8), scale)
    loss = (OfNoise(scale)(given, t) - wanted).square().mean()
    assert float(loss) == pytest.approx(flow.pixelwise_loss(t, scale), rel=0.03)


@pytest.mark.parametrize(("heun", "steps"), [(True, 30), (False, 300)])
def test_sampling_follows_the_flow_to_where_pictures_are(heun: bool, steps: int) -> None:
    torch.manual_seed(0)
    eps = torch.randn(4, 3, 32, 32).clamp(-1.5, 1.5)  # so that nothing is cut off in the end
    made = flow.sample(OfNoise(2.0), eps, 2.0, steps, heun)
    assert torch.allclose(made, flow.SPREAD * eps, atol=0.02)


def test_noise_follows_from_seed_and_position_alone() -> None:
    first = flow.draw_noise(3, 7, 4, 5)
    torch.manual_seed(1)
    again, other_position, other_seed = (
        flow.draw_noise(3, 7, 4, 5),
        flow.draw_noise(3, 8, 4, 5),
        flow.draw_noise(4, 7, 4, 5),
    )
    assert first[0] == again[0] and first[1].equal(again[1])
    assert first[0] not in (other_position[0], other_seed[0])
    assert not first[1].equal(other_position[1]) and not first[1].equal(other_seed[1])


def test_fixed_times_are_logit_normal() -> None:
    t = flow.fixed_times(1000)
    logits = t.double().logit()
    assert abs(float(logits.mean())) < 0.01 and float(logits.std()) == pytest.approx(1, abs=0.02)
    assert not t.equal(t.sort().values)
