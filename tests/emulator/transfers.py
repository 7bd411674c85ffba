"""Instructions between registers and memory, between threads, and of the matrix units."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from emulator import ptx, tensor_cores
from emulator.errors import EmulatorError, UnknownInstruction
from emulator.operations import TYPES, Array
from emulator.ptx import Instruction, Kernel
from emulator.races import SEVERAL
from emulator.tensor_cores import Descriptor

if TYPE_CHECKING:
    from emulator.machine import Machine, Step


class Product(NamedTuple):
    """A product of a warp group that is on its way."""

    places: Array
    """The programs that it is of."""
    to: list[str]
    left: Array | Descriptor
    right: Descriptor
    onto: Array
    """Whether it is added to what is there, by program."""
    kind: str
    sources: list[str]
    """Registers of the left operand."""


def unit(kernel: Kernel) -> int:
    """The bytes that all accesses to shared memory are multiples of."""
    widths = [16]
    for one in kernel.instructions:
        if one.parts[:2] in (("ld", "shared"), ("st", "shared")):
            widths.append(_width(one.parts[-1]))
        elif one.parts[:2] == ("cp", "async") and len(one.operands) > 2:
            widths.append(int(one.operands[2], 0))
    return min(widths)


def written(one: Instruction) -> set[str]:
    """The registers that an instruction writes; of products, which do so later, none."""
    reads = one.parts[0] in ("st", "stmatrix", "cp", "bra", "ret", "bar", "fence", "wgmma") or not one.operands
    return set() if reads else {*ptx.names(one.operands[0])}


def registers_of_products(kernel: Kernel) -> set[str]:
    """Those that products of warp groups sum up in, or take from."""
    groups = (one.operands[:2] for one in kernel.instructions if one.parts[:2] == ("wgmma", "mma_async"))
    return {name for operands in groups for operand in operands if "{" in operand for name in ptx.names(operand)}


def places_of(machine: Machine, mask: Array) -> Array:
    """The programs of which some thread is in a mask, as a mask of them."""
    return np.asarray(mask.reshape(machine.places, -1).any(1))


def step(machine: Machine, one: Instruction) -> Step | None:
    """What an instruction does; None for those that are not of this kind."""
    maker = _MAKERS.get(one.parts[0]) or _MAKERS.get(".".join(one.parts[:2]))
    return maker(machine, one) if maker else None


def _nothing(machine: Machine, one: Instruction) -> Step:
    return lambda mask: None


def _width(kind: str) -> int:
    return int(re.sub(r"\D", "", kind)) // 8


def _register_type(name: str) -> str:
    """The type of a register, by Triton's names."""
    return {"%rd": "b64", "%rs": "b16"}.get(name[:3], "b32")


def _load(machine: Machine, one: Instruction) -> Step:
    if one.parts[1] == "param":
        return _parameter(machine, one)
    kind, names, space = one.parts[-1], ptx.names(one.operands[0]), one.parts[1]
    if space not in ("global", "shared") or {*one.parts[2:-1]} - {"v2", "v4"}:
        raise UnknownInstruction(one.name)
    width, source = _width(kind), TYPES[kind]
    address = machine.address(one.operands[1], np.uint64 if space == "global" else np.uint32)

    def load(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        at = address()[lanes]
        if space == "global":
            data = machine.memory.load(at, width * len(names), machine.program[machine.place[lanes]])
        else:
            data = machine.shared.load(lanes, at, width * len(names))
        for i, name in enumerate(names):
            value = np.ascontiguousarray(data[:, i * width : (i + 1) * width]).view(source)[:, 0]
            to = np.dtype(TYPES[_register_type(name)])
            if value.dtype.itemsize != to.itemsize:  # with the sign, if it has one
                value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(to)
            machine.put(name, lanes, value.view(to))

    return load


def _parameter(machine: Machine, one: Instruction) -> Step:
    number = re.search(r"_param_(\d+)\]", one.operands[1])
    value = machine.arguments[int(number[1])] if number else 0
    width = 8 if _register_type(one.operands[0]) == "b64" else 4
    bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value & (1 << 8 * width) - 1
    write, constant = machine.target(one.operands[0]), np.asarray(bits, TYPES[f"b{8 * width}"])
    return lambda mask: write(constant, mask)


def _store(machine: Machine, one: Instruction) -> Step:
    kind, space = one.parts[-1], one.parts[1]
    if space not in ("global", "shared") or {*one.parts[2:-1]} - {"v2", "v4"}:
        raise UnknownInstruction(one.name)
    width = _width(kind)
    address = machine.address(one.operands[0], np.uint64 if space == "global" else np.uint32)
    sources = [machine.source(name, TYPES[_register_type(name)]) for name in ptx.names(one.operands[1])]

    def store(mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        words = [np.broadcast_to(read(), mask.shape)[lanes].astype(TYPES[f"b{8 * width}"]) for read in sources]
        data = np.ascontiguousarray(np.stack(words, 1)).view(np.uint8)
        if space == "global":
            machine.memory.store(address()[lanes], data, machine.program[machine.place[lanes]])
        else:
            machine.shared.store(lanes, address()[lanes], data)

    return store


def _copy(machine: Machine, one: Instruction) -> Step:
    if one.parts[2] == "commit_group":
        return lambda mask: machine.shared.commit_copies(mask)
    if one.parts[2] == "wait_group":
        left = int(one.operands[0])
        return lambda mask: machine.shared.wait_for_copies(left, mask)
    if one.parts[3:5] != ("shared", "global"):
        raise UnknownInstruction(one.name)
    to, of = machine.address(one.operands[0], np.uint32), machine.address(one.operands[1], np.uint64)
    size = int(one.operands[2], 0)
    read = machine.source(one.operands[3] if len(one.operands) > 3 else str(size), np.uint32)

    def copy(mask: Array) -> None:
        some = np.broadcast_to(read(), mask.shape)
        if not np.isin(some[mask], (0, size)).all():
            raise UnknownInstruction("a part of a copy")
        lanes = np.flatnonzero(mask & (some > 0))
        data = np.zeros((len(mask), size), np.uint8)
        data[lanes] = machine.memory.load(of()[lanes], size, machine.program[machine.place[lanes]])
        machine.shared.begin_copies(mask, to()[mask], data[mask])

    return copy


def _fence(machine: Machine, one: Instruction) -> Step:
    if one.parts[1:3] == ("proxy", "async"):
        return lambda mask: machine.shared.fence(np.flatnonzero(mask))
    raise UnknownInstruction(one.name)


def _warp_barrier(machine: Machine, one: Instruction) -> Step:
    def meet(mask: Array) -> None:
        machine.whole(mask, 32, one.name)
        if machine.threads == 32:
            machine.shared.watch.barrier(np.unique(machine.place[mask]))

    return meet


def _shuffle(machine: Machine, one: Instruction) -> Step:
    word, by = (machine.source(name, np.uint32) for name in one.operands[1:3])
    write, mode = machine.target(one.operands[0]), one.parts[2]
    if mode not in ("bfly", "idx") or one.operands[3:] != ("31", "-1"):
        raise UnknownInstruction(str(one))
    lane = machine.lane % 32

    def shuffle(mask: Array) -> None:
        machine.whole(mask, 32, "a shuffle")
        at = by().astype(np.int64)
        of = (lane ^ at) if mode == "bfly" else at % 32
        write(np.broadcast_to(word(), mask.shape)[machine.lane - lane + of % 32], mask)

    return shuffle


def _reduce(machine: Machine, one: Instruction) -> Step:
    if one.name != "redux.sync.max.s32":
        raise UnknownInstruction(one.name)
    word, write = machine.source(one.operands[1], np.int32), machine.target(one.operands[0])

    def reduce(mask: Array) -> None:
        machine.whole(mask, 32, "a reduction")
        write(np.repeat(np.broadcast_to(word(), mask.shape).reshape(-1, 32).max(1), 32), mask)

    return reduce


def _load_matrix(machine: Machine, one: Instruction) -> Step:
    if "x4" not in one.parts:
        raise UnknownInstruction(one.name)
    names, address = ptx.names(one.operands[0]), machine.address(one.operands[1], np.uint32)

    def load(mask: Array) -> None:
        machine.whole(mask, 32, "ldmatrix")
        lanes = np.flatnonzero(mask)
        rows = machine.shared.load(lanes, address()[lanes], 16, SEVERAL)
        for name, value in zip(names, tensor_cores.loaded(rows, "trans" in one.parts), strict=True):
            machine.put(name, lanes, value)

    return load


def _store_matrix(machine: Machine, one: Instruction) -> Step:
    if "x4" not in one.parts or "trans" in one.parts:
        raise UnknownInstruction(one.name)
    words, address = _words(machine, one.operands[1]), machine.address(one.operands[0], np.uint32)

    def store(mask: Array) -> None:
        machine.whole(mask, 32, "stmatrix")
        lanes = np.flatnonzero(mask)
        machine.shared.store(lanes, address()[lanes], tensor_cores.stored(words(lanes)), SEVERAL)

    return store


def _words(machine: Machine, operand: str) -> Callable[[Array], Array]:
    """What reads the registers of `{...}` of these threads: [registers, threads]."""
    sources = [machine.source(name, np.uint32) for name in ptx.names(operand)]
    return lambda lanes: np.stack([np.broadcast_to(read(), machine.lane.shape)[lanes] for read in sources])


def _multiply(machine: Machine, one: Instruction) -> Step:
    if one.parts[3:7] != ("m16n8k16", "row", "col", "f32") or one.parts[9:] != ("f32",):
        raise UnknownInstruction(one.name)
    names, kind = ptx.names(one.operands[0]), one.parts[7]
    left, right, onto = (_words(machine, operand) for operand in one.operands[1:])

    def multiply(mask: Array) -> None:
        machine.whole(mask, 32, "mma")
        lanes = np.flatnonzero(mask)
        made = tensor_cores.left(left(lanes), kind) @ tensor_cores.right(right(lanes), kind)
        for name, value in zip(names, tensor_cores.registers_of(made + tensor_cores.product(onto(lanes))), strict=True):
            machine.put(name, lanes, value)

    return multiply


def _group_multiply(machine: Machine, one: Instruction) -> Step:
    """`wgmma`: what it reads and writes, it does when it is waited for."""
    if one.parts[1] == "fence":
        return lambda mask: _order_registers(machine, _places(machine, mask))
    if one.parts[1] == "commit_group":
        return lambda mask: machine.products.commit(_places(machine, mask))
    if one.parts[1] == "wait_group":
        left = int(one.operands[0])
        return lambda mask: _wait(machine, left, _places(machine, mask))
    shape = re.fullmatch(r"m64n(\d+)k16", one.parts[4])
    if not shape or one.parts[5] != "f32" or machine.threads != 128:
        raise UnknownInstruction(one.name)
    columns, kind, to = int(shape[1]), one.parts[6], ptx.names(one.operands[0])
    _, first, second, onto, *signs = one.operands
    in_registers = first.startswith("{")
    if signs[:2] != ["1", "1"] or len(signs) != (3 if in_registers else 4):
        raise UnknownInstruction(f"{one.name} {signs}")
    words, sources = (_words(machine, first), ptx.names(first)) if in_registers else (None, [])
    tile = machine.source(second if in_registers else first, np.uint64)
    other, added = machine.source(second, np.uint64), machine.source(onto, np.bool_)

    def described(source: Callable[[], Array], places: Array, rows: int, transposed: bool) -> Descriptor:
        by_program = np.broadcast_to(source(), machine.lane.shape).reshape(machine.places, -1)[places]
        if (by_program != by_program[:, :1]).any():
            raise EmulatorError("threads of a program have different descriptors")
        shared = machine.shared
        found = tensor_cores.descriptor(
            by_program[:, 0], places, rows, transposed, machine.size, shared.size, shared.watch.unit
        )
        shared.watch.begin_product(found.units)
        return found

    def begin(mask: Array) -> None:
        here = _places(machine, mask)
        places = np.flatnonzero(here)
        for name in (*to, *sources):
            if (machine.unfenced.get(name, False) & here).any():
                raise EmulatorError(f"{name} of a product was written with no wgmma.fence since")
        if words is None:
            left: Array | Descriptor = described(tile, places, 64, signs[-2] == "1")
        else:
            left = tensor_cores.left(words(np.flatnonzero(mask)), kind).reshape(-1, 64, 16)
        right = described(other, places, columns, signs[-1] == "1")
        use = np.broadcast_to(added(), mask.shape).reshape(machine.places, -1)[places, 0]
        machine.products.begin(Product(places, to, left, right, use, kind, sources), here)
        for table, names in (machine.held, to), (machine.lent, sources):
            for name in names:
                table[name] = table.get(name, False) | here

    return begin


def _order_registers(machine: Machine, places: Array) -> None:
    """What these programs have written to registers is there for products."""
    machine.unfenced = {name: whose & ~places for name, whose in machine.unfenced.items() if (whose & ~places).any()}


def _places(machine: Machine, mask: Array) -> Array:
    """The programs that execute an instruction, as a mask of them."""
    places = np.zeros(machine.places, np.bool_)
    places[machine.whole(mask, machine.threads, "wgmma")] = True
    return places


def _wait(machine: Machine, left: int, places: Array) -> None:
    done = machine.products.wait(left, places)
    ended: list[Array] = []
    for product, ready in done:
        mine = ready[product.places]
        halves, kind = machine.shared.halves, product.kind
        first = product.left
        a = tensor_cores.floats(halves[first.at], kind) if isinstance(first, Descriptor) else first
        made = (a @ tensor_cores.floats(halves[product.right.at], kind).mT)[mine]
        lanes = np.flatnonzero(ready[machine.place])
        if product.onto[mine].any():
            before = np.stack([machine.registers[name][lanes] for name in product.to])
            before = tensor_cores.product(before).reshape(made.shape)
            made = made + np.where(product.onto[mine][:, None, None], before, np.float32(0))
        made = made.reshape(-1, 16, made.shape[-1])
        for name, value in zip(product.to, tensor_cores.registers_of(made), strict=True):
            machine.put(name, lanes, value)
        ended += _read(machine, product, ready)
    others = machine.products.on_their_way()
    machine.held, machine.lent = {}, {}
    for product, whose in others:
        for table, names in (machine.held, product.to), (machine.lent, product.sources):
            for name in names:
                table[name] = table.get(name, False) | whose
    machine.shared.watch.end_product(ended, [units for one in others for units in _read(machine, *one)])


def _read(machine: Machine, product: Product, places: Array) -> list[Array]:
    """The units of shared memory that a product reads, of these programs."""
    parts = [part.units for part in (product.left, product.right) if isinstance(part, Descriptor)]
    if places[product.places].all():
        return parts
    return [units[places[units // machine.shared.watch.units]] for units in parts]


_MAKERS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "fence": _fence,
    "bar.warp": _warp_barrier,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply,
    "wgmma": _group_multiply,
}
