"""Shared memory of several programs, side by side: bounds, races, and copies that arrive when they are waited for."""

from typing import NamedTuple

import numpy as np

from emulator.errors import OutOfBounds, Race
from emulator.operations import Array
from emulator.races import Watch
from emulator.waits import Groups


class _Copies(NamedTuple):
    """Copies of one instruction, by thread: what arrives where."""

    lanes: Array
    at: Array
    data: Array
    units: Array


class Shared:
    """`size` bytes for each of `programs` programs; what nobody has written is NaN, as a number of any kind."""

    def __init__(self, programs: int, size: int, threads: int, unit: int) -> None:
        self.size = -(-size // 1024) * 1024
        self._own = size
        self.bytes = np.full(programs * self.size, 0xFF, np.uint8)
        self.halves = self.bytes.view(np.uint16)
        warps = threads // 32
        lane = np.arange(programs * threads)
        self.program = lane // threads
        self._agent = (lane % threads) // 32 if warps > 1 else lane % threads
        self._warp = (lane % threads) // 32
        self.watch = Watch(programs, self.size // unit, unit, warps)
        self._copies: Groups[_Copies] = Groups(programs * threads)
        self.now = 0
        """Instructions executed."""

    def load(self, lanes: Array, at: Array, size: int, agent: int | None = None) -> Array:
        """`size` bytes for each thread; `agent` is SEVERAL where a warp reads together."""
        first = self._first(lanes, at, size)
        self.watch.read(self.watch.at(first, size), self._who(lanes, agent))
        return self.bytes[first[:, None] + np.arange(size)]

    def store(self, lanes: Array, at: Array, data: Array, agent: int | None = None) -> None:
        """Write a row of bytes for each thread."""
        first = self._first(lanes, at, data.shape[1])
        self.watch.write(self.watch.at(first, data.shape[1]), self._who(lanes, agent), self.now)
        to = first[:, None] + np.arange(data.shape[1])
        self.bytes[to] = data
        if (self.bytes[to] != data).any():  # threads that hold the same do write it to the same place
            raise Race("threads write different numbers to one place at once")

    def begin_copies(self, mask: Array, at: Array, data: Array) -> None:
        """A row of bytes of each thread of `mask` is on its way."""
        lanes = np.flatnonzero(mask)
        first = self._first(lanes, at, data.shape[1])
        units = self.watch.at(first, data.shape[1])
        self.watch.begin_copy(units, self._agent[lanes])
        self._copies.begin(_Copies(lanes, first, data, units), mask)

    def commit_copies(self, mask: Array) -> None:
        """The copies that threads have begun are a group."""
        self._copies.commit(mask)

    def wait_for_copies(self, left: int, mask: Array) -> None:
        """Those of all groups but the last `left` arrive."""
        for copies, ready in self._copies.wait(left, mask):
            now = ready[copies.lanes]
            self.bytes[copies.at[now][:, None] + np.arange(copies.data.shape[1])] = copies.data[now]
            self.watch.end_copy(copies.units[now], self._agent[copies.lanes[now]], self.now)

    def fence(self, lanes: Array) -> None:
        """`fence.proxy.async` by these threads."""
        self.watch.fence(self.program[lanes], self._warp[lanes], self.now)

    def _who(self, lanes: Array, together: int | None) -> Array | int:
        return self._agent[lanes] if together is None or self.watch.warps > 1 else together

    def _first(self, lanes: Array, at: Array, size: int) -> Array:
        at = at.astype(np.int64)
        wrong = (at < 0) | (at + size > self._own)
        if wrong.any():
            raise OutOfBounds(f"{size} bytes of shared memory at {int(at[wrong][0]):#x}, of {self._own:#x}")
        if (at % size).any():
            raise OutOfBounds(f"{size} bytes of shared memory at {int(at[at % size != 0][0]):#x}: misaligned")
        return at + self.program[lanes] * self.size
