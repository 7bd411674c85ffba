"""Ahead of time: what the host code launches, compiled for a GPU that need not be there."""

from llsa_gen.aot.kernels import (
    MANIFEST,
    USUAL_TOKENS,
    Export,
    Report,
    Specialised,
    compile_kernels,
    compile_launch,
    distinct,
    export,
    folder_of,
    gpu_target,
    prepare,
    specialise,
)
from llsa_gen.aot.launches import Launch, record

__all__ = [
    "MANIFEST",
    "USUAL_TOKENS",
    "Export",
    "Launch",
    "Report",
    "Specialised",
    "compile_kernels",
    "compile_launch",
    "distinct",
    "export",
    "folder_of",
    "gpu_target",
    "prepare",
    "record",
    "specialise",
]
