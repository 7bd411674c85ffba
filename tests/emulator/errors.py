"""What is wrong with a kernel, told with the instruction where it shows."""


class EmulatorError(Exception):
    """A kernel did what it must not, or what the emulator does not know."""


class UnknownInstruction(EmulatorError):
    """An instruction, or a form of it, that the emulator has no meaning for."""


class OutOfBounds(EmulatorError):
    """An address that belongs to no tensor, or lies outside of the shared memory of the program, or is misaligned."""


class Race(EmulatorError):
    """Two threads, or a thread and what is on its way, meet in memory with nothing that orders them."""
