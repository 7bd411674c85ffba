"""Compile the kernels of a module for a GPU that is not there: what they take of it, and files for who has one.

Each launch that the host code makes is specialised just as Triton's launcher would specialise it (types, alignment,
constexprs), so the binaries are the ones that run later, and Triton's cache on this machine is warm for them.
"""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from llsa_gen import emit, schedule
from llsa_gen.aot.binary import ASSEMBLY, resources
from llsa_gen.aot.launches import Launch, dtype_name, module_of, record
from llsa_gen.compiler import Attention
from llsa_gen.emit.failure import locate
from llsa_gen.errors import KernelCompileError, SharedMemoryError
from llsa_gen.spec import load
from llsa_gen.store.files import write_whole

__all__ = ["Export", "Launch", "Report", "compile_kernels", "export", "gpu_target", "prepare", "record"]

USUAL_TOKENS = 65_536
"""Length whose launches are compiled unless one is given: long enough that few kernels sit idle, as in practice."""

SHORT_TOKENS = 8_192
"""A length whose inputs the cache holds, and whose coarsest level has few candidates."""

SHARED: tuple[dict[str, Any], ...] = ({"g_tokens": 512}, {"g_tokens": 512, "masked": True, "given": True})
"""What else calls may have: global tokens; and a mask of them, and lists that are given."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Report:
    """What one kernel, with one set of tile shapes, takes of a target."""

    kernel: str
    target: str
    dtype: str  # of q, k and v: float32, float16, bfloat16
    constexprs: Mapping[str, int]
    num_warps: int
    num_stages: int
    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_memory: int  # bytes a program
    shared_memory_limit: int  # bytes a program may use on the target
    instructions: int  # of the machine
    seconds: float  # to compile; next to nothing where Triton has the kernel in its cache
    raw: Mapping[str, int]  # the toolchain's own figures

    @property
    def fits(self) -> bool:
        """Whether the target has the shared memory; where it has not, every launch fails."""
        return self.shared_memory <= self.shared_memory_limit


@dataclass(frozen=True)
class _Compiled:
    launch: Launch
    source: ASTSource
    result: CompiledKernel
    report: Report


def gpu_target(target: str) -> GPUTarget:
    """`cuda:90` or `hip:gfx942` as Triton's compiler takes it. Raises UnknownTargetError for a target without table."""
    backend, _, arch = schedule.target(target).name.partition(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_kernels(
    attention: Attention | ModuleType,
    target: str,
    dtype: torch.dtype | str,
    n_tokens: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kernels: Collection[str] | None = None,
    shared: bool = False,
) -> list[Report]:
    """Compile every distinct kernel of a module for `target`, or those named in `kernels`, and report on each.

    A kernel is distinct when its constexprs, options or argument types are. The launches are those for q, k, v
    [batch, heads, n_tokens, D]; without `n_tokens` those of 65,536 tokens and, for variants that only other sequences
    need, those of one token less, of the longest or of a short one. With `shared` they are of calls with global tokens
    and given lists. Needs no GPU. Raises KernelCompileError where Triton fails, and what `record` raises.
    """
    done = _compile(attention, target, dtype, n_tokens, batch, heads, kernels, shared)
    return [compiled.report for compiled in done]


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton would compile it."""

    launch: Launch
    source: ASTSource
    options: Mapping[str, Any]


def distinct(
    attention: Attention | ModuleType,
    target: str,
    dtype: torch.dtype | str,
    n_tokens: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kernels: Collection[str] | None = None,
    shared: bool = False,
) -> list[Specialised]:
    """What `compile_kernels` compiles, with the same arguments: one launch of every distinct kernel."""
    module = module_of(attention)
    launches: list[Launch] = []
    for more in SHARED if shared else ({},):
        tokens = USUAL_TOKENS if n_tokens is None else n_tokens
        launches += record(module, tokens, dtype, target, batch=batch, heads=heads, **more)
    if n_tokens is None and not shared:
        seen = set(map(_variant, launches))
        for other in (USUAL_TOKENS - 1, module.MAX_TOKENS, SHORT_TOKENS):
            more = record(module, other, dtype, target, batch=batch, heads=heads)
            launches += [launch for launch in more if _variant(launch) not in seen]
            seen.update(map(_variant, more))
    missing = sorted(set(kernels or ()) - {launch.kernel for launch in launches})
    if missing:
        raise ValueError(f"kernels: {module.SPEC['name']} launches no {', '.join(missing)}")
    gpu = gpu_target(target)
    found: dict[object, Specialised] = {}
    for launch in launches:
        if kernels is None or launch.kernel in kernels:
            source, options = specialise(launch, gpu)
            variant = (launch.kernel, str((source.signature, source.constants, source.attrs, sorted(options.items()))))
            found.setdefault(variant, Specialised(launch, source, options))
    return list(found.values())


def _compile(
    attention: Attention | ModuleType,
    target: str,
    dtype: torch.dtype | str,
    n_tokens: int | None,
    batch: int,
    heads: int,
    kernels: Collection[str] | None,
    shared: bool = False,
) -> list[_Compiled]:
    module, gpu = module_of(attention), gpu_target(target)
    done: list[_Compiled] = []
    chosen = distinct(module, target, dtype, n_tokens, batch=batch, heads=heads, kernels=kernels, shared=shared)
    for one in chosen:
        begin = time.perf_counter()
        try:
            result = triton.compile(one.source, target=gpu, options=dict(one.options))
        except Exception as error:
            raise _failure(error, one.launch, module, target, dtype, n_tokens) from error
        seconds = time.perf_counter() - begin
        report = _report(one.launch, one.source, result, target, dtype, seconds)
        done.append(_Compiled(one.launch, one.source, result, report))
    return done


def _variant(launch: Launch) -> tuple[object, ...]:
    """A kernel and its tile shapes."""
    shapes = {name: value for name, value in launch.arguments.items() if name.isupper()}
    return (launch.kernel, *shapes.items(), *launch.options.items())


def specialise(launch: Launch, gpu: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, and the options it compiles with: the steps of `JITFunction.run`."""
    function = launch.function
    backend = make_backend(gpu)
    options = {
        **launch.options,
        "debug": function.debug or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = binder(**launch.arguments, **options)
    full, signature, constexprs, attrs = function._pack_args(backend, options, bound, specialization, None)
    source = GluonASTSource if function.is_gluon() else ASTSource
    return source(function, signature, constexprs, attrs), dict(full.__dict__)


def compile_launch(launch: Launch, target: str, dtype: torch.dtype | str, gpu: GPUTarget | None = None) -> Report:
    """Compile one recorded launch and report on it; `gpu` may be another GPU, which uses the schedules of `target`.

    What Triton raises comes through as it is.
    """
    gpu = gpu or gpu_target(target)
    begin = time.perf_counter()
    source, options = specialise(launch, gpu)
    result = triton.compile(source, target=gpu, options=options)
    return _report(launch, source, result, target, dtype, time.perf_counter() - begin)


def _report(
    launch: Launch, source: ASTSource, result: CompiledKernel, target: str, dtype: torch.dtype | str, seconds: float
) -> Report:
    used = resources(target.partition(":")[0], launch.kernel, result.asm)
    return Report(
        kernel=launch.kernel,
        target=target,
        dtype=dtype_name(dtype),
        constexprs=constexprs(source),
        num_warps=result.metadata.num_warps,
        num_stages=result.metadata.num_stages,
        registers=used.registers,
        spilled_bytes=used.spilled_bytes,
        shared_memory=result.metadata.shared,
        shared_memory_limit=schedule.target(target).shared_memory,
        instructions=used.instructions,
        seconds=seconds,
        raw=used.raw,
    )


def constexprs(source: ASTSource) -> dict[str, int]:
    """Arguments that are fixed in the binary: the tile shapes, and lengths that happen to be 1."""
    return {source.fn.arg_names[at]: value for (at, *_), value in source.constants.items()}


# ---- failures -----------------------------------------------------------------------------------------------------


def _failure(
    error: Exception, launch: Launch, module: ModuleType, target: str, dtype: torch.dtype | str, n_tokens: int | None
) -> KernelCompileError:
    """A Triton error, told with the place in the generated module and in the template that it comes from."""
    failure = locate(error, module, launch.function)
    spec = load(module.SPEC)
    length = "" if n_tokens is None else f", {n_tokens}"
    code = (
        "import llsa_gen; from llsa_gen import aot; "
        f"aot.compile_kernels(llsa_gen.compile({json.loads(spec.canonical())!r}), "
        f"{target!r}, {dtype_name(dtype)!r}{length}, kernels=[{launch.kernel!r}])"
    )
    return KernelCompileError(
        f"{target}, {dtype_name(dtype)}: {type(error).__name__}: {failure.reason}",
        launch.kernel,
        failure.line,
        failure.template,
        spec.name,
        f"python -c {shlex.quote(code)}",
    )


# ---- files --------------------------------------------------------------------------------------------------------


def folder_of(directory: str | os.PathLike[str], name: str, target: str, dtype: torch.dtype | str) -> Path:
    """Where `export` puts the kernels of a spec."""
    return Path(directory) / f"{name}-{target.replace(':', '-')}-{dtype_name(dtype)}"


@dataclass(frozen=True)
class Export:
    """The kernels of a module, compiled for a target that has room for all of them, as they are about to be written."""

    module: ModuleType
    target: str
    dtype: str
    compiled: list[_Compiled]

    def write(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Write assembly and binary of every kernel, PTX and cubin or amdgcn and hsaco, and `manifest.json`.

        They go to a folder of their own in `directory`, such as `llsa_l2-cuda-90-bfloat16`. Returned is the manifest,
        which then also says the folder, as `folder`. Files carry the start of their content's hash in their names and
        the manifest is replaced last, in one step: who reads it finds what it names, also while another export of the
        same is under way or has failed. Files that only the manifest before named are removed.
        """
        spec = load(self.module.SPEC)
        folder = folder_of(directory, spec.name, self.target, self.dtype)
        folder.mkdir(parents=True, exist_ok=True)
        before = _files_of(folder)
        manifest = {
            "spec": json.loads(spec.canonical()),
            "spec_digest": spec.digest,
            "operator": self.module.OPERATOR,
            "target": self.target,
            "dtype": self.dtype,
            "versions": {"llsa_gen": emit.generator_version(), "torch": version("torch"), "triton": version("triton")},
            "kernels": [_describe(one, _write_binaries(folder, one)) for one in self.compiled],
        }
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for name in before - _files_of(folder):
            with suppress(OSError):
                (folder / name).unlink()
        return {**manifest, "folder": str(folder)}


def prepare(
    attention: Attention | ModuleType,
    target: str,
    dtype: torch.dtype | str,
    n_tokens: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
) -> Export:
    """Compile what `export` writes, and write nothing. Launches as in `compile_kernels`.

    Raises SharedMemoryError where the target has not the shared memory for one, and what `compile_kernels` raises.
    """
    module = module_of(attention)
    compiled = _compile(module, target, dtype, n_tokens, batch, heads, None)
    too_large: dict[str, int] = {}
    for report in (one.report for one in compiled):
        if not report.fits:
            too_large[report.kernel] = max(report.shared_memory, too_large.get(report.kernel, 0))
    if too_large:
        limit = schedule.target(target).shared_memory
        raise SharedMemoryError(module.SPEC["name"], target, dtype_name(dtype), too_large, limit)
    return Export(module, target, dtype_name(dtype), compiled)


def export(
    attention: Attention | ModuleType,
    directory: str | os.PathLike[str],
    target: str,
    dtype: torch.dtype | str,
    n_tokens: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
) -> dict[str, Any]:
    """`prepare`, then `Export.write`: all files and the manifest, or, where a kernel fails or does not fit, none."""
    return prepare(attention, target, dtype, n_tokens, batch=batch, heads=heads).write(directory)


def _describe(compiled: _Compiled, files: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A kernel's row of the manifest: what a launcher must know, and what the report says.

    `arguments` are passed in this order; `divisible_by` is a promise to keep: addresses and numbers that are
    multiples of it. After them come Triton's own two pointers, to scratch memory of the sizes given, null for none.
    """
    source, metadata, report = compiled.source, compiled.result.metadata, asdict(compiled.report)
    arguments = [
        {"name": name, "type": kind} | dict(_promises(source.attrs.get((at,), ())))
        for at, (name, kind) in enumerate(source.signature.items())
        if kind != "constexpr"
    ]
    for known in ("target", "dtype", "seconds", "raw"):
        del report[known]
    scratch = {name: getattr(metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")}
    return {"symbol": metadata.name, **report, "arguments": arguments, "scratch_bytes": scratch, "files": files}


def _promises(attrs: Iterable[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    names = {"tt.divisibility": "divisible_by", "tt.pointer_range": "offset_bits"}
    return ((names.get(name, name), value) for name, value in attrs)


def _write_binaries(folder: Path, compiled: _Compiled) -> dict[str, dict[str, str]]:
    files: dict[str, dict[str, str]] = {}
    for kind in ASSEMBLY[compiled.report.target.partition(":")[0]]:
        data = compiled.result.asm[kind]
        data = data.encode() if isinstance(data, str) else data
        digest = hashlib.sha256(data).hexdigest()
        name = f"{compiled.launch.kernel}.{digest[:12]}.{kind}"
        write_whole(folder / name, data)
        files[kind] = {"file": name, "sha256": digest}
    return files


def _files_of(folder: Path) -> set[str]:
    """Names of the files that the manifest in `folder` lists; none where there is no manifest of ours."""
    try:
        kernels = json.loads((folder / MANIFEST).read_text())["kernels"]
        names = {file["file"] for kernel in kernels for file in kernel["files"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}
