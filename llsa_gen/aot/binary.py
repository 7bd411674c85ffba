"""What a compiled kernel takes from the GPU: registers, spilled bytes and instructions, read from its binary.

Triton knows these numbers only once a driver has loaded the binary. Without a GPU they are read where the assembler
left them: for CUDA in the cubin, by the `cuobjdump` that Triton ships; for HIP in the metadata of the assembly text.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from llsa_gen.errors import LlsaGenError

SASS_BYTES = 16
"""Bytes of one machine instruction, on every NVIDIA GPU since compute capability 7.0."""

ASSEMBLY = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco")}
"""Backend: the kinds of assembly text and of binary that Triton makes for it."""


@dataclass(frozen=True)
class Resources:
    """What every thread of a kernel takes, and how long the kernel is."""

    registers: int  # 32 bits each, a thread; on AMD vector registers, the accumulators among them
    spilled_bytes: int  # of slow memory a thread: what did not fit into registers
    instructions: int  # of the machine, padding included
    raw: Mapping[str, int]  # the same and more, under the names that the toolchain gives them


def resources(backend: str, kernel: str, asm: Mapping[str, str | bytes]) -> Resources:
    """Read the resources of `kernel` from what Triton made, by kind: `{"ptx": ..., "cubin": ..., ...}`."""
    assembly, binary = (asm[kind] for kind in ASSEMBLY[backend])
    if backend == "cuda":
        assert isinstance(binary, bytes)
        return _of_cubin(kernel, binary)
    assert isinstance(assembly, str)
    return _of_amdgcn(kernel, assembly)


def _of_cubin(kernel: str, cubin: bytes) -> Resources:
    usage = _cuobjdump(cubin)
    found = re.search(rf"^ *Function {re.escape(kernel)}:\n(.*)$", usage, re.MULTILINE)
    raw = {name: int(value) for name, value in re.findall(r"(\S+):(\d+)", found.group(1))} if found else {}
    _expect(("REG", "STACK", "LOCAL"), raw, f"cuobjdump --dump-resource-usage, kernel {kernel}")
    # STACK is the frame that ptxas spills to; LOCAL the arrays that the code itself indexes at run time.
    text = _section_bytes(cubin, f".text.{kernel}")
    return Resources(raw["REG"], raw["STACK"] + raw["LOCAL"], text // SASS_BYTES, raw)


def _cuobjdump(cubin: bytes) -> str:
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory(prefix="llsa_gen_") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            result = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True)
        except OSError as error:
            raise LlsaGenError(f"{tool}: cannot be run to read a cubin: {error}") from error
    if result.returncode:
        raise LlsaGenError(f"{tool}: cannot read a cubin: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def _section_bytes(elf: bytes, name: str) -> int:
    """Bytes of one section of a 64-bit little-endian ELF file (System V ABI, figures 4-3 and 4-8)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    # of each section: where its name stands, and its offset and size
    headers = [
        (*struct.unpack_from("<I", elf, at), *struct.unpack_from("<QQ", elf, at + 0x18))
        for at in range(table, table + entry * count, entry)
    ]
    start = headers[names][1]
    for at, _, size in headers:
        if elf[start + at : elf.index(b"\0", start + at)] == name.encode():
            return size
    raise LlsaGenError(f"a cubin has no section {name}")


def _of_amdgcn(kernel: str, assembly: str) -> Resources:
    raw = {name: int(value) for name, value in re.findall(r"^ +(\.[a-z_]+): +(\d+)$", assembly, re.MULTILINE)}
    wanted = (".vgpr_count", ".sgpr_count", ".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size")
    _expect(wanted, raw, f"amdgcn metadata of kernel {kernel}")
    # Spilled scalar registers go to lanes of vector registers first: only the private segment is memory.
    body = assembly.partition(f"\n{kernel}:")[2].partition("\n.Lfunc_end")[0]
    instructions = len(re.findall(r"^\t[a-z]", body, re.MULTILINE))
    return Resources(
        raw[".vgpr_count"],
        raw[".private_segment_fixed_size"],
        instructions,
        {name: raw[name] for name in wanted},
    )


def _expect(wanted: Iterable[str], raw: Mapping[str, int], where: str) -> None:
    missing = [name for name in wanted if name not in raw]
    if missing:
        raise LlsaGenError(f"{where}: expected {', '.join(wanted)}, missing {', '.join(missing)}")
