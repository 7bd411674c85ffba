"""Who has touched which bytes of shared memory since the last barrier: two who meet there are a race.

Threads run in lockstep here, so a barrier that is missing shows in no result. What is held against the order that PTX
promises, for each unit of some bytes:

- between a write and another access by others lies a barrier. These "others" are the warps of a program or, where it
  has but one, its threads; then `bar.warp.sync` is the barrier.
- a copy (`cp.async`) writes from when it begins until its own thread has waited for it. Until then nobody may touch the
  bytes; from then on it is a write by that thread.
- a product (`wgmma`) reads from when it begins until it has been waited for. Until then nobody may write the bytes.
  It is of the four warps together, and so PTX has a group of products "per warpgroup": it ends for all of them at once.
  Triton stores where it has read with no barrier behind the wait. Copies by hand are held to more: that there is one.
- products read through the asynchronous proxy, and stores and copies (those of `cp.async` that are not `bulk`, too) go
  through the generic one: between the two the writer has a `fence.proxy.async`.

Stores by one warp are seen by that warp: those are taken to be in order that PTX would have a `bar.warp.sync` between.
"""

import numpy as np

from emulator.errors import Race
from emulator.operations import Array

NOBODY, SEVERAL = -1, -2


class Watch:
    """What is known of the shared memory of some programs, side by side, in units of `unit` bytes."""

    def __init__(self, programs: int, units: int, unit: int, warps: int) -> None:
        self.unit, self.warps, self.units = unit, warps, units
        size = programs * units
        self._writer, self._reader = np.full((2, size), NOBODY, np.int16)
        self._written, self._read = np.full((2, size), -1, np.int32)
        """The epoch of the last write, the last read: how many barriers its program had been at."""
        self._since = np.zeros(size, np.int64)
        """When the last write was there, as a number of instructions."""
        self._arriving, self._in_use = np.zeros((2, size), np.bool_)
        """What copies write, what products read."""
        self._used = np.full(size, -1, np.int32)
        """The epoch in which a product that read it was waited for."""
        self._epoch = np.zeros(programs, np.int32)
        self._fenced = np.full((programs, warps), -1, np.int64)

    def at(self, first: Array, size: int) -> Array:
        """The units of `size` bytes each, from the bytes `first` on."""
        return (first[:, None] + np.arange(0, size, self.unit)) // self.unit

    def barrier(self, programs: Array) -> None:
        """All threads of these programs have met."""
        self._epoch[programs] += 1

    def fence(self, programs: Array, warps: Array, now: int) -> None:
        """These warps have put their writes before whatever goes through the asynchronous proxy."""
        self._fenced[programs, warps] = now

    def read(self, units: Array, agent: Array | int) -> None:
        """Threads read: `agent` says of each row of units who."""
        epoch = self._epoch[units // self.units]
        who = np.broadcast_to(np.asarray(agent)[..., None] if isinstance(agent, np.ndarray) else agent, units.shape)
        self._refuse(self._arriving[units], units, "read while a copy to it is on its way")
        writer = self._writer[units]
        fresh = (writer != NOBODY) & (self._written[units] == epoch) & ((writer != who) | (who == SEVERAL))
        self._refuse(fresh, units, "read with no barrier since others wrote it")
        first = self._read[units] != epoch
        alone = first | (self._reader[units] == who)
        self._reader[units] = np.where(alone, who, SEVERAL)
        self._reader[units[self._reader[units] != np.where(alone, who, SEVERAL)]] = SEVERAL
        self._read[units] = epoch

    def write(self, units: Array, agent: Array | int, now: int) -> None:
        """Threads write."""
        self._may_write(units, agent)
        self._note(units, agent, now)

    def begin_copy(self, units: Array, agent: Array) -> None:
        """Copies to these are on their way."""
        self._may_write(units, agent)
        used = self._used[units] == self._epoch[units // self.units]
        self._refuse(used, units, "filled with no barrier since a product that reads it was waited for")
        self._arriving[units] = True

    def end_copy(self, units: Array, agent: Array, now: int) -> None:
        """The threads that began copies have waited for them."""
        self._arriving[units] = False
        self._note(units, agent, now)

    def begin_product(self, units: Array) -> None:
        """Products of all warps read these."""
        self._refuse(self._arriving[units], units, "read by a product while a copy to it is on its way")
        program = units // self.units
        writer = self._writer[units]
        fresh = (writer != NOBODY) & (self._written[units] == self._epoch[program])
        self._refuse(fresh, units, "read by a product with no barrier since it was written")
        fenced = self._fenced[program, np.maximum(writer, 0)]
        late = (writer != NOBODY) & (fenced <= self._since[units])
        self._refuse(late, units, "read by a product with no fence.proxy.async since it was written")
        self._in_use[units] = True

    def end_product(self, done: list[Array], others: list[Array]) -> None:
        """Products have been waited for; `others` are still on their way."""
        for units in done:
            self._in_use[units] = False
            self._used[units] = self._epoch[units // self.units]
        for units in others:
            self._in_use[units] = True

    def _may_write(self, units: Array, agent: Array | int) -> None:
        epoch = self._epoch[units // self.units]
        who = np.broadcast_to(np.asarray(agent)[..., None] if isinstance(agent, np.ndarray) else agent, units.shape)
        self._refuse(self._arriving[units], units, "written while a copy to it is on its way")
        self._refuse(self._in_use[units], units, "written while a product reads it")
        for last, when, verb in (self._writer, self._written, "wrote"), (self._reader, self._read, "read"):
            before = last[units]
            met = (before != NOBODY) & (when[units] == epoch) & ((before != who) | (who == SEVERAL))
            self._refuse(met, units, f"written with no barrier since others {verb} it")

    def _note(self, units: Array, agent: Array | int, now: int) -> None:
        self._writer[units] = np.asarray(agent)[..., None] if isinstance(agent, np.ndarray) else agent
        self._written[units] = self._epoch[units // self.units]
        self._since[units] = now

    def _refuse(self, wrong: Array, units: Array, what: str) -> None:
        if wrong.any():
            program, unit = divmod(int(units[wrong][0]), self.units)
            raise Race(f"shared memory at {unit * self.unit:#x}, place {program} of those run together: {what}")
