"""What the CUDA driver is asked for: the launches of a pass, replayed by one call of C, and what it says of errors."""

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any

import triton.runtime.build

REPLAY_C = (Path(__file__).parent / "replay.c").read_text(encoding="utf-8")

# ---- spliced into every module from here on

BASES, PARAMETERS = 32, 128  # of a pass and of a launch, at most
DRIVER = (
    "cuLaunchKernel", "cuStreamIsCapturing", "cuThreadExchangeStreamCaptureMode", "cuGraphCreate", "cuGraphDestroy",
    "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags", "cuGraphExecDestroy", "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphLaunch", "cuCtxGetCurrent", "cuCtxSetCurrent",
)  # fmt: skip


@functools.cache
def libcuda() -> ctypes.CDLL:
    """The CUDA driver, for ctypes."""
    return ctypes.CDLL("libcuda.so.1")


def words_of(error: int) -> str:
    """What the driver calls an error."""
    text = ctypes.c_char_p()
    libcuda().cuGetErrorString(error, ctypes.byref(text))
    return (text.value or b"unknown").decode()


def said(error: Exception) -> str:
    """An exception in words: kept itself, it would keep the tensors of its frames."""
    return f"{type(error).__name__}: {error}"


@functools.cache
def replayer() -> Any:
    """`run` and `graph` of REPLAY_C, compiled and kept as Triton does with its own driver, and DRIVER's functions.

    What is wrong, in words, where that fails: it is tried once.
    """
    source = f"#define BASES {BASES}\n#define PARAMETERS {PARAMETERS}\n{REPLAY_C}"
    try:
        _ = libcuda().cuFuncGetParamInfo  # from CUDA 12.4 on
        functions = [ctypes.cast(getattr(libcuda(), name), ctypes.c_void_p).value for name in DRIVER]
        compiled = triton.runtime.build.compile_module_from_src(source, "llsa_replay")
        return compiled.run, compiled.graph, struct.pack(f"{len(DRIVER)}P", *functions)
    except Exception as error:
        return said(error)


def parameter_sizes(function: int) -> list[int]:
    """The sizes in bytes of a kernel's parameters, as the driver knows them."""
    offset, size, found = ctypes.c_size_t(), ctypes.c_size_t(), []
    while True:
        which = ctypes.c_void_p(function), ctypes.c_size_t(len(found))
        if libcuda().cuFuncGetParamInfo(*which, ctypes.byref(offset), ctypes.byref(size)):
            return found
        found.append(size.value)
