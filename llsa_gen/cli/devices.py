"""Devices: whether one that a person named can be used."""

import torch

from llsa_gen.errors import LlsaGenError, short

__all__ = ["must_exist"]


def must_exist(device: str) -> None:
    """One clear error, LlsaGenError, for a device that cannot be used: `cpu` can, and `cuda`, `cuda:1` where they are.

    Without it, what is run there would look faulty itself.
    """
    expected = f"--device: expected cpu or a GPU such as cuda, got {short(repr(device))}"
    try:
        known = torch.device(device).type in ("cpu", "cuda")
    except RuntimeError:  # whose text names every kind of device that torch has ever had
        known = False
    if not known:
        raise LlsaGenError(expected)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise LlsaGenError(f"{expected}: {str(error).partition(': ')[0]}") from None
