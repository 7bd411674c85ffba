"""The memory of the GPU: the tensors of a launch, and nothing else; between them lies nobody's memory."""

from collections.abc import Iterable
from copy import copy

import numpy as np
import torch
from torch import Tensor

from emulator.errors import OutOfBounds, Race
from emulator.operations import Array

BASE = 1 << 32
_GAP = 512


class GlobalMemory:
    """Copies of what tensors lie in. Programs of a launch may not meet there: nothing orders them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages: dict[int, tuple[int, Tensor]] = {}
        end = _GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                # aligned as it is in fact
                begin = end + storage.data_ptr() % 256
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._storages[storage.data_ptr()] = begin, whole
                end = -(-(begin + len(whole) + _GAP) // 256) * 256
        self._bytes = np.zeros(end, np.uint8)
        self._exists = np.zeros(end, np.bool_)
        self._writer, self._reader = np.full((2, end), -1, np.int32)
        """Programs; -2 for several."""
        for begin, whole in self._storages.values():
            self._bytes[begin : begin + len(whole)] = whole.numpy()
            self._exists[begin : begin + len(whole)] = True

    def address(self, tensor: Tensor) -> int:
        """Where a tensor begins."""
        begin, _ = self._storages[tensor.untyped_storage().data_ptr()]
        return BASE + begin + int(tensor.storage_offset()) * tensor.itemsize

    def copy(self) -> "GlobalMemory":
        """The same tensors at the same addresses, for another run."""
        other = copy(self)
        other._bytes = self._bytes.copy()
        other._writer, other._reader = np.full((2, len(self._bytes)), -1, np.int32)
        return other

    def same(self, other: "GlobalMemory") -> bool:
        """Whether a copy holds the same bits."""
        return np.array_equal(self._bytes, other._bytes)

    def write_back(self) -> None:
        """Hand over to the tensors what was written."""
        for begin, whole in self._storages.values():
            whole.numpy()[:] = self._bytes[begin : begin + len(whole)]

    def load(self, address: Array, size: int, program: Array) -> Array:
        """`size` bytes each from these addresses on, read by these programs."""
        at = self._at(address, size)
        self._refuse((self._writer[at] >= 0) & (self._writer[at] != program[:, None]), "read while another writes it")
        before = self._reader[at]
        self._reader[at] = np.where((before == -1) | (before == program[:, None]), program[:, None], -2)
        return self._bytes[at]

    def store(self, address: Array, data: Array, program: Array) -> None:
        """Write rows of bytes from these addresses on."""
        at = self._at(address, data.shape[1])
        for before, verb in (self._writer[at], "writes"), (self._reader[at], "reads"):
            self._refuse((before != -1) & (before != program[:, None]), f"written while another {verb} it")
        self._writer[at] = program[:, None]
        self._refuse(self._writer[at] != program[:, None], "written while another writes it")
        self._bytes[at] = data

    def _at(self, address: Array, size: int) -> Array:
        at = address.astype(np.int64) - BASE
        if (at % size).any():
            raise OutOfBounds(f"{size} bytes at {int(address[at % size != 0][0]):#x}: misaligned")
        at = at[:, None] + np.arange(size)
        inside = (at >= 0) & (at < len(self._bytes))
        inside &= self._exists[np.where(inside, at, 0)]
        if not inside.all():
            wrong = int(at[~inside][0])
            raise OutOfBounds(f"{size} bytes at {BASE + wrong:#x}: {self._nearest(wrong)}")
        return at

    def _nearest(self, at: int) -> str:
        begin, whole = min(self._storages.values(), key=lambda one: max(one[0] - at, at - one[0] - len(one[1])))
        where = f"{begin - at} bytes before" if at < begin else f"{at - begin - len(whole)} bytes after the end of"
        return f"outside of every tensor, {where} one of {len(whole)} bytes"

    def _refuse(self, wrong: Array, what: str) -> None:
        if wrong.any():
            raise Race(f"memory of two programs of a launch: {what}")
