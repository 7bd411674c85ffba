"""What attends in a block: a compiled spec, torch's dense attention, or nothing at all.

Each takes q, k, v [B, H, N, D] and gives o [B, H, N, D].
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import llsa_gen

Attention = str | Mapping[str, object]
"""A spec: the path of a YAML file, or what stands in one; or one of `PLAIN`."""

PLAIN = ("dense", "dense-flash", "none")
SPECS = (Path(__file__).with_name("specs"), Path(__file__).parents[2] / "spec")
"""Where a spec is looked for that is named without a folder."""


class Dense(nn.Module):
    """Torch's dense attention: on a GPU in half precision by cuDNN, its fastest, or by its flash backend."""

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda or q.dtype == torch.float32:
            return scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(q, k, v)


class Nothing(nn.Module):
    """No pixel sees another: what a model costs without attention. q and k still have to be made."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k + v


def spec_of(attention: Attention) -> llsa_gen.Spec | None:
    """The spec; None for what is none. "llsa_l2" is a file of that name, with .yaml, in one of `SPECS`. Raises
    ValueError where there is none."""
    if not isinstance(attention, str):
        return llsa_gen.load(attention)
    if attention in PLAIN:
        return None
    paths = [*(folder / f"{attention}.yaml" for folder in SPECS), Path(attention)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        known = sorted({path.stem for folder in SPECS for path in folder.glob("*.yaml")})
        raise ValueError(
            f"attention: expected {', '.join(PLAIN)}, one of {', '.join(known)}, or the file of a spec, got {attention}"
        )
    return llsa_gen.load(found)


def build(attention: Attention, head_dim: int) -> nn.Module:
    """The module that attends. Raises ValueError where a spec is for another head dim than the model's."""
    spec = spec_of(attention)
    if spec is None:
        plain = {
            "dense": lambda: Dense(SDPBackend.CUDNN_ATTENTION),
            "dense-flash": lambda: Dense(SDPBackend.FLASH_ATTENTION),
            "none": Nothing,
        }
        return plain[str(attention)]()
    if spec.head_dim != head_dim:
        raise ValueError(
            f"attention: expected head_dim {head_dim} in spec {spec.name}, for a model of that, got {spec.head_dim}"
        )
    return llsa_gen.compile(spec).as_module()


def name_of(attention: Attention) -> str:
    """What people call it in tables."""
    spec = spec_of(attention)
    return str(attention) if spec is None else spec.name


def seconds(module: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """What one forward and backward pass of it alone takes, for q, k and v of a shape [B, H, N, D]."""
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    grad, repeats = torch.randn(shape, dtype=dtype, device=device), 3
    began = 0.0
    for turn in range(-2, repeats):  # the first two compile and record
        if turn == 0:
            _wait(device)
            began = time.perf_counter()
        torch.autograd.grad(module(q, k, v), (q, k, v), grad)
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
