"""Kernels compiled for GPUs that are not there: they compile, they fit, and they spill no more than the budget says."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import budgets
import compiled
import pytest
import torch
import triton
from budgets import CELLS, SPECS, Cell
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pretended_gpu import draw, knowing, pretended
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget

from examples import EXTREMES
from llsa_gen import aot, compile, schedule
from llsa_gen.aot.binary import ASSEMBLY, resources
from llsa_gen.aot.launches import perform
from llsa_gen.compiler import Attention
from llsa_gen.emit import TEMPLATES
from llsa_gen.emit.origin import origin
from llsa_gen.errors import KernelCompileError, LlsaGenError, SharedMemoryError, UnknownTargetError
from llsa_gen.plan import lower
from llsa_gen.plan.sizes import HEADS, KV_HEADS, POOLED_M, M, N
from llsa_gen.schedule import targets
from llsa_gen.store.loading import load_text

ROOT = Path(__file__).resolve().parents[2]


def shipped(name: str) -> Attention:
    return compile(ROOT / "spec" / f"{name}.yaml")


# ---- every shipped spec -------------------------------------------------------------------------------------------


def test_the_cells_name_every_shipped_spec_and_every_target() -> None:
    assert set(SPECS) == {path.stem for path in (ROOT / "spec").glob("*.yaml")}
    assert {cell.target for cell in CELLS} == set(targets())
    assert {(cell.target, cell.spec) for cell in CELLS if cell.dtype == "bfloat16"} == {
        (target, spec) for target in targets() for spec in SPECS
    }


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_kernel_compiles_and_fits(cell: Cell) -> None:
    content = budgets.stored()
    reports = budgets.measure(cell)
    problems = [
        f"{report.kernel} {dict(report.constexprs)}: {report.shared_memory} bytes of {report.shared_memory_limit}"
        for report in reports
        if not report.fits
    ]
    if content["triton"] == triton.__version__:  # another assembler, other figures
        problems += budgets.overruns(content["budgets"][str(cell)], budgets.rows(reports))
    assert not problems, "\n".join([f"{cell}: (if it has to be: make budgets)", *problems])


# ---- what is remembered of compiles ---------------------------------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled, and not remembered; none has its turn."""
    seen: list[str] = []
    genuine = aot.compile_launch

    def compile_launch(launch: aot.Launch, *rest: Any) -> aot.Report:
        seen.append(launch.kernel)
        return genuine(launch, *rest)

    monkeypatch.setattr(aot, "compile_launch", compile_launch)
    monkeypatch.setattr(compiled, "has_its_turn", lambda name: False)
    return seen


def edited(old: str, new: str) -> ModuleType:
    """`topk_b128` with another text."""
    text = shipped("topk_b128").source
    assert old in text
    return load_text("topk_b128", hashlib.sha256(new.encode()).hexdigest(), text.replace(old, new).replace(
        shipped("topk_b128").module.OPERATOR, f"edited_{len(new)}"))  # fmt: skip


PINNED = pytest.mark.skipif(not compiled.stored(), reason="what is remembered is of another Triton: make budgets")


@PINNED
def test_what_did_not_change_is_remembered(compiles: list[str]) -> None:
    module = edited("# ---- geometry", "# another line\n\n\n# ---- geometry")  # which moves every kernel
    reports = compiled.compile_kernels(module, "cuda:80", "bfloat16", aot.USUAL_TOKENS)
    assert compiles == [] and len(reports) >= 7
    assert all(report.fits and report.registers > 0 for report in reports)


@PINNED
def test_a_kernel_that_changed_is_compiled_and_no_other(compiles: list[str]) -> None:
    module = edited("total = sums[0]", "total = sums[0] + 0.5")  # in a function that pooling calls
    compiled.compile_kernels(module, "cuda:80", "bfloat16", aot.USUAL_TOKENS)
    assert compiles == ["pool_l1_kernel"]


@pytest.mark.parametrize(("target", "dtype"), [("cuda:86", "bfloat16"), ("cuda:80", "float16")])
def test_another_target_or_dtype_is_another_compile(target: str, dtype: str) -> None:
    def keys(target: str, dtype: str) -> set[str]:
        made = aot.distinct(shipped("topk_b128"), target, dtype, 4096)
        return {compiled.key(one, target) for one in made if one.launch.kernel.startswith(("pool", "attend"))}

    assert len(keys(target, dtype)) == 2 and not keys(target, dtype) & keys("cuda:80", "bfloat16")


@PINNED
def test_what_has_its_turn_has_to_take_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_its_turn", lambda name: True)
    arguments = (shipped("topk_b128"), "cuda:80", "bfloat16", aot.USUAL_TOKENS)
    (report,) = compiled.compile_kernels(*arguments, kernels={"scan_kernel"})
    assert report.raw, "it was compiled"
    wrong = {name: [figure + 1 for figure in figures] for name, figures in compiled.stored().items()}
    monkeypatch.setattr(compiled, "stored", lambda: wrong)
    with pytest.raises(AssertionError, match=r"scan_kernel took .* as compiled\.json says, and takes"):
        compiled.compile_kernels(*arguments, kernels={"scan_kernel"})


@PINNED
def test_every_entry_has_its_turn_one_day() -> None:
    turns = {int(name, 16) % compiled.ONE_IN for name in compiled.stored()}
    assert turns == set(range(compiled.ONE_IN))


def test_a_budget_is_overrun_by_one_register_or_a_tenth_of_the_instructions() -> None:
    row = {"registers": 100, "spilled_bytes": 0, "shared_memory": 1024, "instructions": 1000}
    assert budgets.overruns({"kernel": row}, {"kernel": {**row, "registers": 80, "instructions": 1100}}) == []
    for name, value in {"registers": 101, "spilled_bytes": 4, "shared_memory": 1040, "instructions": 1101}.items():
        (problem,) = budgets.overruns({"kernel": row}, {"kernel": {**row, name: value}})
        assert name in problem and str(value) in problem
    assert budgets.overruns({}, {"kernel": row}) == ["kernel has no budget"]


def test_every_spill_has_a_reason_and_every_reason_a_spill() -> None:
    content = budgets.stored()
    cells = content["budgets"]
    assert list(cells) == [str(cell) for cell in CELLS], "run: make budgets"
    spilling = [(cell, name) for cell, rows in cells.items() for name, row in rows.items() if row["spilled_bytes"]]
    used = [budgets.reasons(content["why"], cell, kernel) for cell, kernel in spilling]
    unexplained = [f"{cell}/{kernel}" for (cell, kernel), found in zip(spilling, used, strict=True) if not found]
    assert not unexplained, f"{budgets.FILE.name}: say in `why` why these spill: {unexplained}"
    idle = set(content["why"]) - {pattern for found in used for pattern in found}
    assert not idle, f"{budgets.FILE.name}: these reasons explain nothing any more: {sorted(idle)}"
    assert all(reason.strip() for reason in content["why"].values())


# ---- the corners of what a spec may say ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_specs_compile_and_fit(name: str) -> None:
    # in float32, whose tiles take the most memory
    reports = compiled.compile_kernels(compile({"name": name, **EXTREMES[name]}), "cuda:90", "float32")
    too_large = {report.kernel: report.shared_memory for report in reports if not report.fits}
    assert not too_large


# ---- recording ----------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(SPECS),
    n_tokens=st.integers(1, 3000) | st.integers(1, 2**30),
    target=st.sampled_from(sorted(targets())),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    queries=st.one_of(st.none(), st.integers(1, 1 << 17)),
)
@example(name="llsa_l3", n_tokens=70_001, target="cuda:90", dtype="bfloat16", batch=2, heads=3, queries=None)
@example(name="llsa_l2", n_tokens=131_072, target="cuda:90", dtype="bfloat16", batch=2, heads=2, queries=None)
@example(name="llsa_l2", n_tokens=131_072, target="cuda:90", dtype="bfloat16", batch=2, heads=2, queries=4096)
@settings(max_examples=30)
def test_the_host_code_launches_what_the_plan_says(
    name: str, n_tokens: int, target: str, dtype: str, batch: int, heads: int, queries: int | None
) -> None:
    n_tokens = min(n_tokens, shipped(name).module.MAX_TOKENS)
    launches = aot.record(shipped(name), n_tokens, dtype, target, batch=batch, heads=heads, m_tokens=queries)
    m_tokens = n_tokens if queries is None else queries
    plan = lower(shipped(name).spec)
    planned = list(plan.usual)
    for launch in [launch for launch in launches if launch.phase != "select" and launch.step]:
        step = planned.pop(0)
        assert step.name == launch.step
        known: dict[str, Any] = {M.name: m_tokens, POOLED_M.name: m_tokens, N.name: n_tokens}
        known |= {HEADS.name: batch * heads, KV_HEADS.name: batch * heads}
        programs: Any = step.programs
        in_gluon = {"GROUP": 4, "BLOCK_N": 16}  # where they are no arguments
        values = {symbol: {**in_gluon, **launch.arguments, **known}[symbol.name] for symbol in programs.free_symbols}
        wanted = int(programs.subs(values))
        if launch.kernel in ("attend_hopper_kernel", "grad_q_hopper_kernel"):  # none beyond the last block
            assert batch * heads * -(-m_tokens // 64) == launch.grid[0] <= wanted
        else:
            assert launch.grid == (wanted,)
    assert not planned
    selection = [launch.kernel for launch in launches if launch.phase == "select"]
    assert selection == [step.name for step in plan.forward[:-1]]


def test_recording_leaves_the_module_alone_while_others_use_it() -> None:
    attention = shipped("uneven")
    before = dict(vars(attention.module))
    q, k, v = torch.randn(3, 1, 2, 130, 80).unbind()
    expected = attention(q, k, v)
    caches = [value for value in before.values() if hasattr(value, "cache_info")]
    held = [cache.cache_info().currsize for cache in caches]
    wrong: list[bool] = []
    done = threading.Event()

    def attend() -> None:
        while not done.is_set():
            wrong.append(not torch.equal(attention(q, k, v), expected))  # type: ignore[arg-type]

    thread = threading.Thread(target=attend)
    thread.start()
    for _ in range(50):
        aot.record(attention, 5000, torch.bfloat16, "cuda:90")
    done.set()
    thread.join()
    assert wrong and not any(wrong)
    after = vars(attention.module)
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert attention.module.launch_plan in caches and [cache.cache_info().currsize for cache in caches] == held


def shown(x: object) -> object:
    """An argument, of a tensor where it lies in what memory."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.shape, x.stride(), x.dtype, x.storage_offset(), x.untyped_storage().nbytes()


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("name", ["llsa_l2", "topk_l2", "uneven"])
def test_what_is_recorded_is_what_calls_of_the_operator_launch(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, n, head_dim = shipped(name).module, 5001, shipped(name).spec.head_dim
    launched: list[tuple[str, tuple[int], list[object], dict[str, int]]] = []

    def run(at: Any, launches: Any, tensors: Any, scale: float = 0.0) -> None:
        def launch(kernel: Any, *arguments: Any) -> None:
            _, programs, tile = module.tile_of(at, kernel)
            function, taken = module.variant(kernel, tile)
            values = module.values_of(arguments)
            launched.append((function.__name__, (programs,), [*map(shown, values)], {**taken, **module.OPTIONS}))

        at.launch(launches, launch, tensors, scale)

    monkeypatch.setattr(module.LaunchPlan, "run", run)
    monkeypatch.setattr(module, "launch_plan", module.launch_plan.__wrapped__)  # which remembers
    monkeypatch.setattr(module, "target_of", lambda device: target)
    q, k, v, grad_o = (torch.empty(2, 3, n, head_dim, dtype=torch.bfloat16, device="meta") for _ in range(4))
    o, _, saved = module.attend_kernels(q, k, v, head_dim**-0.5)
    module.grad_kernels(grad_o, None, q, k, v, o, saved, head_dim**-0.5)
    module.select_kernels(q, k)
    recorded = aot.record(module, n, "bfloat16", target, batch=2, heads=3)
    for one, (kernel, grid, values, taken) in zip(recorded, launched, strict=True):
        assert (one.kernel, one.grid) == (kernel, grid)
        assert [*map(shown, one.arguments.values())][: len(values)] == values
        tiles = [*one.arguments.items()][len(values) :]
        assert {**dict(tiles), **one.options} == taken


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "not at 16 bytes"])
def test_performing_makes_the_launches_that_it_notes(offset: int) -> None:
    """On a pretended GPU, with other tiles than the module's: those of `record`, if tensors are aligned as its are."""
    with pretended() as gpu, knowing(gpu, shipped("llsa_l2").module) as module:
        tiles = {**module.schedule_for("cuda:90", torch.bfloat16)}
        tiles["scan"] = {**tiles["scan"], "num_warps": 2}
        q, k, v, grad_o = draw(4096, offset=offset)
        results, made = perform(module, tiles, q, k, v, grad_o, 0.125)
        assert [x.shape for x in results[:5]] == [(1, 2, 4096, 64)] * 4 + [(1, 2, 4096)]
        assert [one.kernel for one in made if one.grid[0]] == [one.name for one in gpu.log if one.programs]
        assert any(one.function.is_gluon() for one in made) == (not offset)
        assert not module.launch_plan.cache_info().currsize
        recorded = aot.record(module, 4096, "bfloat16", "cuda:90", batch=1, heads=2, tiles=tiles)
    if not offset:
        wanted = [(one.phase, one.step, one.kernel, one.grid, one.options) for one in recorded if one.phase != "select"]
        assert [(one.phase, one.step, one.kernel, one.grid, one.options) for one in made] == wanted


def test_an_exported_module_is_recorded_like_a_compiled_one() -> None:
    attention = shipped("topk_l1")
    copy = load_text("copy", "0" * 64, attention.source)
    names = [[launch.kernel for launch in aot.record(x, 999, "float16", "cuda:80")] for x in (attention, copy)]
    assert names[0] == names[1]


def test_wrong_arguments_are_told_in_one_sentence() -> None:
    attention = shipped("topk_l1")
    known = "cuda:80, cuda:86, cuda:90, cuda:100, cuda:120, hip:gfx942"
    with pytest.raises(UnknownTargetError, match=f"expected one of {known}, got 'cuda:70'"):
        aot.compile_kernels(attention, "cuda:70", torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected float32, float16, bfloat16, got torch.float64"):
        aot.record(attention, 64, torch.float64, "cuda:90")
    with pytest.raises(ValueError, match=rf"n_tokens: expected 1 to {attention.module.MAX_TOKENS}, got 0"):
        aot.compile_kernels(attention, "cuda:90", "float16", 0)
    with pytest.raises(ValueError, match=rf"m_tokens: expected 1 to {attention.module.MAX_TOKENS}, got 0"):
        aot.record(attention, 64, "float16", "cuda:90", m_tokens=0)
    with pytest.raises(ValueError, match="heads: expected at least 1"):
        aot.record(attention, 64, "float16", "cuda:90", heads=0)
    with pytest.raises(ValueError, match="topk_l1 launches no attend_kernle"):
        aot.compile_kernels(attention, "cuda:90", "float16", kernels=["attend_kernle"])
    with pytest.raises(
        TypeError, match="attention: expected a compiled attention or a generated module, got 'llsa_l2'"
    ):
        aot.record("llsa_l2", 64, "float16", "cuda:90")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a compiled attention or a generated module"):
        aot.record(json, 64, "float16", "cuda:90")


def test_the_interpreter_cannot_be_compiled_and_says_so() -> None:
    code = (
        "import llsa_gen; from llsa_gen import aot\n"
        f"attention = llsa_gen.compile({str(ROOT / 'spec' / 'topk_l1.yaml')!r})\n"
        "try: aot.compile_kernels(attention, 'cuda:90', 'float16')\n"
        "except llsa_gen.LlsaGenError as error: print(error)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "start Python with TRITON_INTERPRET unset" in result.stdout, result.stderr


# ---- compiling ----------------------------------------------------------------------------------------------------


class NoDevice:
    """A Triton driver of a GPU that is not there, as much of one as `JITFunction.warmup` asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"no device, {self.target}"  # a key of Triton's that no real device has

    def get_current_stream(self, device: object) -> int:
        return 0


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_a_launch_is_specialised_as_triton_itself_does(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = aot.gpu_target(target)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice(gpu))
    for launch in aot.record(shipped("topk_l1"), aot.USUAL_TOKENS, "bfloat16", target):
        source, options = aot.specialise(launch, gpu)
        ours = triton.compile(source, target=gpu, options=options)
        theirs = launch.function.warmup(**launch.arguments, **launch.options, grid=launch.grid)
        assert ours.hash == theirs.hash


@pytest.mark.parametrize(("head_dim", "block"), [(64, 48), (128, 33), (72, 63)])
def test_a_block_that_fills_a_tile_alone_does_not_spill(head_dim: int, block: int) -> None:
    # taken for one block of a group it spilled up to 3,392 bytes a thread
    attention = compile({"name": "loose", "head_dim": head_dim, "levels": [{"block": block, "topk": 8}]})
    walks = aot.compile_kernels(attention, "cuda:90", "bfloat16", 65_536, kernels=["attend_kernel", "grad_q_kernel"])
    assert {report.kernel: report.spilled_bytes for report in walks if report.spilled_bytes > 64} == {}


@pytest.mark.parametrize("n_tokens", [4096, 4099])
@pytest.mark.parametrize("head_dim", [72, 80])
def test_rows_are_loaded_sixteen_bytes_at_a_time(head_dim: int, n_tokens: int) -> None:
    # D = 72 (DiT-XL, PixArt): strides are multiples of 8 but not of 16, of which Triton would take note by itself.
    attention = compile({"name": "rows", "head_dim": head_dim, "levels": [{"block": 16, "topk": 8}]})
    gpu = aot.gpu_target("cuda:90")
    walked = {"pool_l1_kernel", "attend_kernel", "grad_q_kernel", "grad_kv_l1_kernel", "grad_kv_l0_kernel"}
    for launch in aot.record(attention, n_tokens, "bfloat16", "cuda:90"):
        if launch.kernel in walked:
            source, options = aot.specialise(launch, gpu)
            text = triton.compile(source, target=gpu, options=options).asm["ptx"]
            assert not re.search(r"ld\.global[.\w]*\.[bu]16\b", text), f"{launch.kernel} loads element by element"
            assert re.search(r"ld\.global[.\w]*\.v4\.b32|cp\.async\.c[ag]\.[^;]*, 0x10,", text), launch.kernel


@pytest.mark.parametrize(("block", "dtype"), [(64, "bfloat16"), (16, "float32")])
def test_the_widest_heads_fit_into_what_consumer_cards_have(block: int, dtype: str) -> None:
    attention = compile({"name": "widest", "head_dim": 256, "levels": [{"block": block, "topk": 8}] * 2})
    walks = aot.compile_kernels(attention, "cuda:86", dtype, 65_536, kernels=["attend_kernel", "grad_q_kernel"])
    assert all(report.fits for report in walks), [(report.kernel, report.shared_memory) for report in walks]


def test_variants_that_other_lengths_need_are_compiled_too() -> None:
    reports = aot.compile_kernels(shipped("topk_l1"), "cuda:90", "float16", kernels=["attend_kernel"])
    assert sorted(report.constexprs["FULL"] for report in reports) == [False, True]


def test_products_of_float32_are_not_summed_in_one_chain() -> None:
    # Triton makes tl.dot(a, b, acc) of acc + tl.dot(a, b): many equal terms, one chain, every one rounded the same way.
    gpu = aot.gpu_target("cuda:90")
    for launch in aot.record(shipped("topk_l1"), 4096, "float32", "cuda:90"):
        if launch.kernel in ("attend_kernel", "grad_q_kernel", "grad_kv_l0_kernel"):
            source, options = aot.specialise(launch, gpu)
            text = triton.compile(source, target=gpu, options=options).asm["ttir"]
            sums = re.findall(r"= tt\.dot %[^,]+, %[^,]+, (%\w+)", text)
            assert sums and all(re.search(rf"{name} = arith\.constant dense<0\.0", text) for name in sums), (
                launch.kernel
            )


def test_the_figures_are_those_of_the_toolchain(tmp_path: Path) -> None:
    (report,) = aot.compile_kernels(shipped("topk_l1"), "cuda:90", "bfloat16", 65536, kernels=["select_l1_kernel"])
    launch = next(x for x in aot.record(shipped("topk_l1"), 65536, "bfloat16", "cuda:90") if x.kernel == report.kernel)
    source, options = aot.specialise(launch, aot.gpu_target("cuda:90"))
    asm = triton.compile(source, target=aot.gpu_target("cuda:90"), options=options).asm
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    cubin.write_bytes(asm["cubin"])
    sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert report.instructions == len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE))
    # a tight limit makes ptxas spill: what it says that it spills to is what the report reads
    ptx.write_text(re.sub(r"^\.reqntid .*", r"\g<0>\n.maxnreg 32", asm["ptx"], flags=re.MULTILINE))
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    tight = resources("cuda", report.kernel, {"ptx": asm["ptx"], "cubin": cubin.read_bytes()})
    assert tight.registers == int(re.findall(r"Used (\d+) registers", said)[0]) <= 32
    assert tight.spilled_bytes == int(re.findall(r"(\d+) bytes stack frame", said)[0]) > 0


# ---- failures -----------------------------------------------------------------------------------------------------


def broken(name: str, right: str, wrong: str) -> tuple[ModuleType, str]:
    """A shipped module in whose text `right` is replaced, and that text."""
    text = shipped(name).source
    assert text.count(right) == 1
    text = text.replace(right, wrong).replace(shipped(name).module.OPERATOR, "broken_" + name)
    return load_text(name, hashlib.sha256(text.encode()).hexdigest(), text), text


def test_a_kernel_that_does_not_compile_is_told_with_its_place_and_its_template() -> None:
    # `store_kept`, which two kernels call, now uses a name that it does not have
    module, text = broken(
        "topk_l2", "    place = KEEP - 1 - tl.arange(0, KEEP)\n", "    palce = KEEP - 1 - tl.arange(0, KEEP)\n"
    )
    with pytest.raises(KernelCompileError) as caught:
        aot.compile_kernels(module, "cuda:90", torch.bfloat16, kernels=["select_l1_kernel"])
    error = caught.value
    use = next(line for line in text.splitlines() if "+ place[None, :]" in line)
    assert error.kernel == "select_l1_kernel"
    assert error.line == text.splitlines().index(use) + 1
    file, _, number = error.template.partition(":")
    assert (TEMPLATES / file).read_text().splitlines()[int(number) - 1] == use
    message = str(error)
    assert f"topk_l2.py:{error.line}" in message and "spec topk_l2" in message and "cuda:90, bfloat16" in message
    assert "in store_kept: NameError('place is not defined')" in message

    python, flag, code = shlex.split(error.reproduce)  # of a spec whose templates are in order it finds nothing wrong
    assert (python, flag) == ("python", "-c")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_a_kernel_that_fails_at_its_first_launch_names_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    good = shipped("topk_l2")
    text = good.source.replace("slot = (start + within)", "slot = (starts + within)")
    assert text != good.source
    text = text.replace(good.module.OPERATOR, "fails_at_its_first_launch")
    module = load_text("topk_l2", hashlib.sha256(text.encode()).hexdigest(), text)
    with pytest.raises(KernelCompileError) as caught:
        aot.compile_kernels(module, "cuda:90", torch.bfloat16, kernels=["attend_kernel"])
    triton_error = caught.value.__cause__
    assert triton_error is not None

    def launch(*args: object, **kwargs: object) -> None:
        raise triton_error

    monkeypatch.setattr(module, "attention", launch)
    q = torch.zeros(1, 1, 3, 64)
    with pytest.raises(KernelCompileError, match=r"tiles\.py\.j2") as caught:
        Attention(good.spec, module, text, None)(q, q, q)
    assert caught.value.line == text.splitlines().index("        slot = (starts + within) // BLOCK") + 1
    assert "spec topk_l2" in str(caught.value) and "reproduce" in str(caught.value)


def test_an_assembler_that_fails_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("PassManager::run failed\nsomewhere")

    monkeypatch.setattr(triton, "compile", fail)
    with pytest.raises(KernelCompileError, match=r"RuntimeError: PassManager::run failed somewhere") as caught:
        aot.compile_kernels(shipped("llsa_l2"), "hip:gfx942", "float32", kernels=["grad_kv_l1_kernel"])
    assert caught.value.template.startswith("triton/grad_kv.py.j2:")
    line = shipped("llsa_l2").source.splitlines()[(caught.value.line or 0) - 1]
    assert line.startswith("def grad_kv_l1_kernel(")


@pytest.mark.parametrize("name", SPECS)
def test_the_template_of_every_kernel_is_found(name: str) -> None:
    source = shipped(name).source.splitlines()
    for function in vars(shipped(name).module).values():
        if isinstance(function, JITFunction):
            at = next(i for i, line in enumerate(source, 1) if line.startswith(f"def {function.__name__}("))
            found = origin(shipped(name).source, at)
            assert found.function == function.__name__
            file, _, number = found.template.partition(":")
            template_line = (TEMPLATES / file).read_text().splitlines()[int(number) - 1]
            assert template_line.startswith("def "), f"{function.__name__}: {found}"


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_export_writes_what_the_manifest_says(target: str, tmp_path: Path) -> None:
    attention = shipped("topk_l1")
    manifest = aot.export(attention, tmp_path, target, "bfloat16")
    folder = Path(manifest.pop("folder"))
    assert folder == tmp_path / f"topk_l1-{target.replace(':', '-')}-bfloat16"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert manifest["spec_digest"] == attention.spec.digest
    assert manifest["versions"]["triton"] == triton.__version__
    names = [row["kernel"] for row in manifest["kernels"]]
    steps = {one.launch.kernel: one.launch.step for one in aot.distinct(attention, target, "bfloat16")}
    assert {steps[name] for name in names} == {step.name for step in lower(attention.spec).usual}
    assert any("hopper" in name for name in names) == (target == "cuda:90")
    files = {"manifest.json"}
    for row in manifest["kernels"]:
        assert row["files"].keys() == set(ASSEMBLY[target.split(":")[0]])
        for entry in row["files"].values():
            assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
            files.add(entry["file"])
        assert row["shared_memory"] <= row["shared_memory_limit"]
        text = (folder / row["files"][ASSEMBLY[target.split(":")[0]][0]]["file"]).read_text()
        if target == "cuda:90":
            parameters = re.findall(
                rf"\.param .*{row['symbol']}_param_\d+", text.partition(".entry ")[2].partition(")")[0]
            )
            assert len(parameters) == len(row["arguments"]) + 2  # and Triton's own two
        else:
            assert f"\t.globl\t{row['symbol']} " in text
    assert {path.name for path in folder.iterdir()} == files


def test_exporting_again_replaces_and_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = shipped("topk_l1")
    folder = Path(aot.export(attention, tmp_path, "cuda:90", "bfloat16", 4096)["folder"])
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == "manifest.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            aot.export(attention, tmp_path, "cuda:90", "bfloat16", 3, batch=1, heads=1)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert not [name for name in after if name.startswith(".")]

    manifest = aot.export(attention, tmp_path, "cuda:90", "bfloat16", 3, batch=1, heads=1)
    named = {entry["file"] for row in manifest["kernels"] for entry in row["files"].values()}
    gone = before.keys() - named - {"manifest.json", "notes.txt"}
    assert gone, "this test needs two exports that differ"
    assert named | {"manifest.json", "notes.txt"} <= {path.name for path in folder.iterdir()}
    assert not gone & {path.name for path in folder.iterdir()}


def test_a_kernel_that_does_not_fit_is_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, folder = shipped("topk_l1"), tmp_path / "topk_l1-cuda-90-bfloat16"
    reports = aot.compile_kernels(attention, "cuda:90", "bfloat16", 4096)
    most = max(reports, key=lambda report: report.shared_memory)
    small = replace(targets()["cuda:90"], shared_memory=most.shared_memory - 1)
    monkeypatch.setattr(schedule, "target", lambda name: small)
    with pytest.raises(SharedMemoryError) as caught:
        aot.export(attention, tmp_path, "cuda:90", "bfloat16", 4096)
    error = caught.value
    assert error.kernels[most.kernel] == most.shared_memory and error.limit == most.shared_memory - 1
    assert f"topk_l1: {most.kernel} takes {most.shared_memory:,}" in str(error) and "\n" not in str(error)
    assert f"bytes of shared memory, and cuda:90 has {error.limit:,} (bfloat16)" in str(error)
    assert not folder.exists()

    # what a manifest that is there says stays true
    monkeypatch.undo()
    aot.export(attention, tmp_path, "cuda:90", "bfloat16", 4096)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(
        row["shared_memory"] <= row["shared_memory_limit"] for row in json.loads(before["manifest.json"])["kernels"]
    )
    monkeypatch.setattr(schedule, "target", lambda name: small)
    with pytest.raises(SharedMemoryError):
        aot.export(attention, tmp_path, "cuda:90", "bfloat16", 4096)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_message_of_a_directory_that_cannot_be_made_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        aot.export(shipped("topk_l1"), tmp_path / "file", "cuda:90", "bfloat16")


def test_an_unreadable_binary_is_an_error_of_ours() -> None:
    with pytest.raises(LlsaGenError, match="cannot read a cubin"):
        resources("cuda", "kernel", {"ptx": "", "cubin": b"nothing"})
    with pytest.raises(LlsaGenError, match=r"metadata of kernel kernel: .*missing \.vgpr_count"):
        resources("hip", "kernel", {"amdgcn": "", "hsaco": b""})
