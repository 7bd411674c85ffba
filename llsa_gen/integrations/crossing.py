"""From which length on sparse attention is faster than dense on a device: measured once, and kept.

`<cache>/crossings.json` keeps what was found, by device, spec, dtype, and versions of torch and of the templates.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llsa_gen import emit, forks, order
from llsa_gen.errors import CacheRefused
from llsa_gen.integrations.grids import Shape
from llsa_gen.store import Store, trust
from llsa_gen.store.files import write_whole

__all__ = ["LONGEST", "NEVER", "Least", "crossing", "known", "measured"]

NEVER = 1 << 31
"""In the place of a length where dense attention was faster up to the longest one that was tried."""

SHORTEST = 512
LONGEST = {"cpu": 1 << 13, "cuda": 1 << 17}
HEADS = {"cpu": 2, "cuda": 8}
FINER = 2
"""Halvings of the octave in which the speeds cross."""
REPEATS = 3

_found: dict[str, int] = {}
_lock = forks.Lock()


def crossing(faster: Callable[[int], bool], shortest: int, longest: int) -> int:
    """The shortest length that was found faster, asked for from `shortest` on in octaves, then finer; NEVER if none is.

    Longer is taken to be faster, too, once it is: dense attention grows with the square of the length.

    Args:
        faster: whether sparse attention is faster at a length.
    """
    length = shortest
    while not faster(length):
        length *= 2
        if length > longest:
            return NEVER
    if length == shortest:
        return length
    low, high = length // 2, length
    for _ in range(FINER):
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


def known(attention: Any, device: torch.device, dtype: torch.dtype) -> int | None:
    """What was measured before, here or in another process; None where nobody has."""
    name = _name(attention, device, dtype)
    if name not in _found:
        with _lock:
            _found.update({one: length for one, length in _kept().items() if one not in _found})
    return _found.get(name)


def measured(attention: Any, device: torch.device, dtype: torch.dtype) -> int:
    """The length from which on the operator is faster than torch's dense attention, its permutations included.

    Forward passes without gradients over one picture, quickest of three. It takes a second or two, once for a device, a
    spec and a dtype; then it is kept in the store's directory, as far as that can be written.
    """
    found = known(attention, device, dtype)
    if found is None:
        longest = LONGEST[device.type]
        found = crossing(lambda length: _is_faster(attention, length, device, dtype), SHORTEST, longest)
        name = _name(attention, device, dtype)
        with _lock:
            _found[name] = found
            _keep({**_kept(), name: found})
    return found


def _is_faster(attention: Any, length: int, device: torch.device, dtype: torch.dtype) -> bool:
    head_dim, placed = attention.spec.head_dim, order.grid(_grid(length), attention.spec, device=device)
    dice = torch.Generator(device).manual_seed(0)  # no random numbers of the model's are drawn
    shape = (3, 1, HEADS[device.type], length, head_dim)
    q, k, v = torch.randn(shape, device=device, dtype=dtype, generator=dice)

    def sparse() -> Tensor:
        o = attention(*(x.index_select(2, placed.permutation) for x in (q, k, v)))
        return o.index_select(2, placed.inverse)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _seconds(sparse, device) < _seconds(lambda: scaled_dot_product_attention(q, k, v), device)


def _grid(length: int) -> Shape:
    """A grid of so many cells, near to a square."""
    height = next(size for size in range(int(length**0.5), 0, -1) if length % size == 0)
    return (height, length // height)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for index in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index:  # the first one compiles
            best = min(best, time.perf_counter() - start)
    return best


def _name(attention: Any, device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{device.type}, {torch.get_num_threads()} threads"
    return f"{place}; {attention.spec.digest}; {dtype}; torch {torch.__version__}; {emit.generator_version()}"


def _kept() -> dict[str, int]:
    """What the file says; nothing where there is none, it may not be trusted or says something else."""
    with contextlib.suppress(OSError, CacheRefused, ValueError, RecursionError):
        store = Store()
        if store.trusted():
            data = json.loads(trust.read(store.root / "crossings.json"))
            if isinstance(data, dict):
                return {name: length for name, length in data.items() if type(length) is int}
    return {}


def _keep(lengths: dict[str, int]) -> None:
    try:
        store = Store()
        store.check()
        trust.make_directory(store.root)
        write_whole(store.root / "crossings.json", json.dumps(lengths, indent=2) + "\n")
    except (OSError, CacheRefused) as error:
        warnings.warn(f"the measured crossing is not kept: {error}", RuntimeWarning, stacklevel=3)


class Least:
    """The fewest picture tokens that are worth it: what the caller says, or what is measured on the device, and told.

    Args:
        given: what the caller says; None to have it measured.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self.measured: dict[str, int] = {}
        """By device, dtype and spec, in words."""

    def __call__(self, operator: Any, q: Tensor) -> int | str:
        """For an operator and a query tensor; or why there is none."""
        if self.given is not None:
            return self.given
        device = q.device.type
        if device not in LONGEST:
            return f"not on the CPU or a GPU, but on {device}"
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
        name = f"{device}, {str(dtype).removeprefix('torch.')}, spec {operator.spec.name}"
        if name not in self.measured:
            if torch.compiler.is_compiling():
                return "not measured on this device and dtype: run once uncompiled, or pass min_tokens="
            self.measured[name] = measured(operator, q.device, dtype)
        least = self.measured[name]
        return "dense attention is faster on this device" if least >= NEVER else least

    def prepare(self, operator: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Measure what layers will ask for, before torch.compile can come between."""
        if self.given is None and device.type in LONGEST and dtype in (torch.float32, torch.float16, torch.bfloat16):
            self(operator, torch.empty(0, device=device, dtype=dtype))

    def __str__(self) -> str:
        """What a report says of it; empty where nothing was asked for."""
        if self.given is not None:
            return f"sparse from {self.given:,} picture tokens on: min_tokens"
        found = [
            f"{'at no length that was tried' if n >= NEVER else f'from {n:,} picture tokens on'} ({name})"
            for name, n in self.measured.items()
        ]
        return f"sparse attention is faster than dense {'; '.join(found)}" if found else ""
