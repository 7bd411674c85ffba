"""Programs of one kernel, run side by side: a thread is a lane of NumPy's, and all at one place go on together.

Where threads part, those that are furthest back go first, so that they meet again where their ways do.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emulator import ptx, transfers
from emulator.errors import EmulatorError
from emulator.memory import GlobalMemory
from emulator.operations import TYPES, Array, operation
from emulator.ptx import Instruction, Kernel
from emulator.shared import Shared
from emulator.waits import Groups

Step = Callable[[Array], None]
"""An instruction, for the threads of a mask."""

BITS: dict[Any, Any] = {np.dtype(TYPES[f"b{bits}"]).itemsize: TYPES[f"b{bits}"] for bits in (16, 32, 64)}
SHARED_MEMORY = "global_smem"
"""What Triton calls its beginning."""

LANES = 2048
"""Threads that run together, about."""


def run(kernel: Kernel, arguments: Sequence[int | float], memory: GlobalMemory, shared: int, programs: int) -> int:
    """Run a whole launch; returns how many instructions were executed, each by some programs together."""
    together = max(1, LANES // kernel.threads)
    machine = Machine(kernel, arguments, memory, shared, min(together, programs))
    executed = 0
    with np.errstate(all="ignore"):
        for first in range(0, programs, together):
            machine.run(first, min(together, programs - first))
            executed += machine.shared.now
    return executed


class Machine:
    """`places` programs of a kernel: their registers, and what their instructions do."""

    def __init__(
        self, kernel: Kernel, arguments: Sequence[int | float], memory: GlobalMemory, shared: int, places: int
    ) -> None:
        self.kernel, self.arguments, self.memory, self.places = kernel, arguments, memory, places
        self.threads = kernel.threads
        self.size, self.unit = shared, transfers.unit(kernel)
        self.lane = np.arange(places * self.threads)
        self.thread, self.place = self.lane % self.threads, self.lane // self.threads
        self.registers: dict[str, Array] = {}
        self.program = np.zeros(places, np.int64)
        self.everyone = np.ones(len(self.lane), np.bool_)
        """The mask of all threads that have not ended, while they are at one place."""
        used = transfers.registers_of_products(kernel)
        self._fresh = [transfers.written(one) & used for one in kernel.instructions]
        """What each instruction writes that products use."""
        self._names = [{*re.findall(r"%\w+", str(one))} for one in kernel.instructions]
        self._steps = [self._guarded(one) for one in kernel.instructions]

    def run(self, first: int, count: int) -> None:
        """Run the programs from number `first` on."""
        self.registers.clear()
        self.program = first + np.arange(self.places)
        self.shared = Shared(self.places, self.size, self.threads, self.unit)
        self.products: Groups[transfers.Product] = Groups(self.places)
        self.held: dict[str, Array] = {}
        """Registers that products on their way will write, and of which programs."""
        self.lent: dict[str, Array] = {}
        """Registers that they read."""
        self.unfenced: dict[str, Array] = {}
        """Registers that were written since the last `wgmma.fence`, and of which programs."""
        self.alive = self.place < count
        at = np.zeros(len(self.lane), np.int64)
        end = len(self._steps)
        while self.alive.any():
            now = int(at[self.alive].min())
            active = self.alive & (at == now)
            behind = at[self.alive & ~active]
            self.everyone = active if not len(behind) else self.alive
            limit = int(behind.min()) if len(behind) else end
            while now < limit:
                one = self.kernel.instructions[now]
                self.shared.now += 1
                try:
                    if self.held or self.lent:
                        self._refuse_held(one, active)
                    taken = self._branch(one, active) if one.parts[0] in ("bra", "ret") else None
                    if taken is None:
                        self._steps[now](active)
                    for name in self._fresh[now]:
                        self.unfenced[name] = self.unfenced.get(name, False) | transfers.places_of(self, active)
                except (EmulatorError, ArithmeticError, LookupError, ValueError, TypeError) as error:
                    raise self._told(error, one, active) from error
                now += 1
                if taken is not None and taken.any():
                    self.alive = self.alive & ~taken if one.parts[0] == "ret" else self.alive
                    at[active] = now
                    if one.parts[0] == "bra":
                        at[taken] = self.kernel.labels[one.operands[0]]
                    break
            else:
                at[active] = now
                if now == end:
                    return

    def _branch(self, one: Instruction, active: Array) -> Array:
        """Who leaves."""
        return active & self._condition(one)() if one.guard else active

    def _told(self, error: Exception, one: Instruction, active: Array) -> EmulatorError:
        kind = type(error) if isinstance(error, EmulatorError) else EmulatorError
        programs = self.program[np.unique(self.place[active])].tolist()
        why = error if isinstance(error, EmulatorError) else f"{type(error).__name__}: {error}"
        return kind(
            f"{self.kernel.name}, line {one.line} of the module, instruction {one.at}, {one}: {why} "
            f"(programs {programs})"
        )

    # ---- what instructions are made of

    def source(self, operand: str, kind: Any) -> Callable[[], Array]:
        """What reads an operand as this type of NumPy's."""
        kind = np.dtype(kind)
        if operand in ("%tid.x", "%ctaid.x"):
            if operand == "%tid.x":
                thread = self.thread.astype(kind)
                return lambda: thread
            return lambda: self.program.astype(kind)[self.place]
        if not operand.startswith("%"):
            value = np.asarray(_constant(operand, kind))
            return lambda: value
        registers = self.registers

        def read() -> Array:
            value = registers[operand]
            if value.dtype.itemsize > kind.itemsize:  # of which conversions and stores take the lower bits
                value = value.astype(BITS[kind.itemsize])
            return value.view(kind)

        return read

    def target(self, name: str) -> Callable[[Array, Array], None]:
        """What writes a register, for the threads of a mask."""
        registers, count = self.registers, len(self.lane)

        def write(value: Array, mask: Array) -> None:
            value = value if value.dtype == np.bool_ else value.view(BITS[value.dtype.itemsize])
            before = registers.get(name)
            if mask is self.everyone and value.shape:
                registers[name] = value
            elif mask is self.everyone or before is None:
                registers[name] = np.broadcast_to(value, (count,)).copy()
            else:
                registers[name] = np.where(mask, value, before)

        return write

    def put(self, name: str, lanes: Array, value: Array) -> None:
        """Write a register of these threads."""
        if len(lanes) == len(self.lane):
            self.registers[name] = value
            return
        before = self.registers.get(name)
        after = np.zeros(len(self.lane), value.dtype) if before is None else before.copy()
        after[lanes] = value
        self.registers[name] = after

    def address(self, operand: str, kind: Any) -> Callable[[], Array]:
        """What works out an address."""
        name, offset = ptx.address(operand)
        if name == SHARED_MEMORY:
            where = np.broadcast_to(np.int64(offset), self.lane.shape)
            return lambda: where
        base = self.source(name, kind)
        return lambda: base().astype(np.int64) + offset

    def whole(self, mask: Array, threads: int, what: str) -> Array:
        """Numbers of the groups of `threads` threads that execute an instruction, all of their threads together."""
        groups = mask.reshape(-1, threads)
        some = groups.any(1)
        if not np.array_equal(groups.all(1), some):
            raise EmulatorError(f"{what} in divergent flow")
        return np.flatnonzero(some)

    # ---- the kinds of instructions

    def _guarded(self, one: Instruction) -> Step:
        step = self._step(one)
        if one.guard is None:
            return step
        condition = self._condition(one)
        return lambda mask: step(mask & condition())

    def _condition(self, one: Instruction) -> Callable[[], Array]:
        guard = self.source(one.guard or "", np.bool_)
        return (lambda: ~guard()) if one.negated else guard

    def _step(self, one: Instruction) -> Step:
        if one.parts[0] in ("bra", "ret"):
            return lambda mask: None
        if one.name == "bar.sync":
            return self._barrier
        made = transfers.step(self, one)
        if made is not None:
            return made
        if one.parts[0] == "mov" and "{" in "".join(one.operands):
            return self._packed(one)
        known = operation(one.parts)
        sources = [self.source(name, kind) for name, kind in zip(one.operands[1:], known.sources, strict=True)]
        write, function, result = self.target(one.operands[0]), known.function, np.dtype(known.result)

        def compute(mask: Array) -> None:
            value = function(*[read() for read in sources])
            write(value if value.dtype == result else value.astype(result), mask)

        return compute

    def _packed(self, one: Instruction) -> Step:
        """A register as two halves, or the reverse."""
        to, of = one.operands
        if to.startswith("{"):
            word, writes = self.source(of, np.uint32), [self.target(name) for name in ptx.names(to)]

            def unpack(mask: Array) -> None:
                value = word()
                for half, write in enumerate(writes):
                    write((value >> np.uint32(16 * half)).astype(np.uint16), mask)

            return unpack
        low, high = (self.source(name, np.uint16) for name in ptx.names(of))
        write = self.target(to)
        return lambda mask: write(low().astype(np.uint32) | (high().astype(np.uint32) << np.uint32(16)), mask)

    def _barrier(self, mask: Array) -> None:
        groups, alive = mask.reshape(self.places, -1), self.alive.reshape(self.places, -1)
        here = groups.any(1)
        if not np.array_equal(groups[here], alive[here]):
            raise EmulatorError("a barrier in divergent flow")
        self.shared.watch.barrier(np.flatnonzero(here))

    def _refuse_held(self, one: Instruction, active: Array) -> None:
        """Registers of products on their way are not to be touched, but by products that go on with the same sum."""
        names = self._names[one.at]
        if one.parts[:2] == ("wgmma", "mma_async"):
            names = names - {*ptx.names(one.operands[0])}
        written = transfers.written(one)
        for table, touched, verb in (self.held, names, "touched"), (self.lent, written, "written"):
            for name in touched & table.keys():
                if table[name][self.place[active]].any():
                    raise EmulatorError(f"{name} is {verb} while a product with it is on its way")


def _constant(text: str, kind: np.dtype) -> Any:
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(kind)
    value = 0 if text == SHARED_MEMORY else int(text, 0)
    if kind == np.bool_:
        return np.bool_(value != 0)
    bits = BITS[kind.itemsize]
    return bits(value & (1 << 8 * kind.itemsize) - 1).view(kind)
