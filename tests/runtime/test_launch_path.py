"""The fast way of launching is never the reason for a failure: without what it stands on, Triton launches as ever."""

import ctypes
import importlib.util
import os
import subprocess
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from pretended_gpu import (
    ROOT,
    PretendedGpu,
    draw,
    knowing,
    launches,
    pretended,
    step,
    warned_once,
)
from triton import knobs
from triton.runtime import JITFunction

from llsa_gen import compile

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a callback from C


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended() as made:
        yield made


@pytest.fixture
def module(gpu: PretendedGpu) -> Iterator[ModuleType]:
    with knowing(gpu, compile(ROOT / "spec" / "llsa_l2.yaml").module) as made:
        yield made


@contextmanager
def watched() -> Iterator[None]:
    """Somebody wants to be told of launches, which Triton alone does."""

    def told(metadata: Any) -> None:
        pass

    knobs.runtime.launch_enter_hook.add(told)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(told)


def ways(gpu: PretendedGpu, module: ModuleType) -> tuple[list[object], list[set[str]]]:
    """The launches of four calls, recorded, replayed and, the last, watched; and by whom each was launched."""
    found, by = [], []
    for call in range(4):
        if call < 3:
            found.append(launches(gpu, module, draw(4096)))
        else:
            with watched():
                found.append(launches(gpu, module, draw(4096)))
        by.append({launch.by for launch in gpu.log})
    return found, by


def afresh(module: ModuleType, *, plain: bool = False) -> None:
    """Forget shapes and what was wrong, not what is compiled."""
    module.launch_plan.cache_clear()
    module.replayer.cache_clear()
    module.parameters_of.cache_clear()
    module.TOLD.clear()
    vars(module)["PLAIN"] = plain


class Seen:
    """An object of Triton's as a module sees it: notes the names that are asked for, and lacks one of them."""

    def __init__(self, of: Any, path: str, asked: set[str], lacks: str) -> None:
        self._seen = of, path, asked, lacks

    @property
    def __class__(self) -> type:  # for isinstance
        return type(self._seen[0])

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError

    def __getattr__(self, name: str) -> Any:
        of, path, asked, lacks = self._seen
        path = f"{path}.{name}"
        asked.add(path)
        if path == lacks:
            raise AttributeError(f"{path} has moved")
        value = getattr(of, name)
        plain = (
            int,
            float,
            str,
            bytes,
            list,
            dict,
            type,
            types.FunctionType,
            types.MethodType,
            types.BuiltinFunctionType,
        )
        if value is None or isinstance(value, plain) or type(value) is tuple:
            return value
        return Seen(value, path, asked, lacks)

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        of, path, asked, lacks = self._seen
        path = f"{path}[]"
        asked.add(path)
        if path == lacks:
            raise TypeError(f"{path} has moved")

        def launch(*values: Any, **tile: Any) -> Any:
            compiled = of[grid](*values, **tile)
            return None if compiled is None else Seen(compiled, "compiled", asked, lacks)

        return launch


@contextmanager
def seen(module: ModuleType, lacks: str = "") -> Iterator[set[str]]:
    """A module that sees a Triton without one name; the names that it asks for."""
    asked: set[str] = set()
    stand_ins: dict[str, Any] = {"triton": Seen(module.triton, "triton", asked, lacks)}
    for name, value in vars(module).items():
        if name.endswith("_kernel") and isinstance(value, JITFunction):
            stand_ins[name] = Seen(value, "kernel", asked, lacks)
    with patch.multiple(module, **stand_ins):
        yield asked


def test_names_of_triton_may_move(gpu: PretendedGpu, module: ModuleType) -> None:
    # also those that nobody has thought of: what the module asks for is found by watching it
    afresh(module, plain=True)
    with seen(module) as needed:
        wanted, by = ways(gpu, module)
    assert by == 4 * [{"triton"}] and needed == {"kernel.__name__", "kernel.arg_names", "kernel[]"}
    afresh(module)
    with seen(module) as asked:
        found, by = ways(gpu, module)
    assert found == wanted and by == [{"triton"}, {"launch"}, {"graph"}, {"triton"}]
    moving = asked - needed
    assert {
        "kernel.warmup",
        "compiled[]",
        "compiled.function",
        "compiled.src.signature",
        "compiled.metadata.num_warps",
        "triton.runtime.build.compile_module_from_src",
        "triton.runtime.driver.active.get_current_stream",
        "triton.knobs.runtime.launch_exit_hook",
    } <= moving and len(moving) > 20
    for name in sorted(moving):
        afresh(module)
        with seen(module, name), warned_once(module):
            found, by = ways(gpu, module)
        assert found == wanted, name
        if name != "kernel.warmup":  # which only compiles what other lengths need
            assert by[-1] == {"triton"}, name


@pytest.mark.parametrize(
    ("name", "warnings"),
    [
        ("cuStreamIsCapturing", 0),
        ("cuThreadExchangeStreamCaptureMode", 0),
        ("cuGraphCreate", 1),
        ("cuGraphAddKernelNode_v2", 1),
        ("cuGraphInstantiateWithFlags", 1),
        ("cuGraphExecKernelNodeSetParams_v2", 1),
        ("cuGraphLaunch", 1),
        ("cuCtxGetCurrent", 0),
        ("cuCtxSetCurrent", 0),
    ],
)
def test_a_driver_may_refuse_or_lack_any_function(
    gpu: PretendedGpu, module: ModuleType, name: str, warnings: int, recwarn: pytest.WarningsRecorder
) -> None:
    wanted = [launches(gpu, module, draw(4096))] * 4
    for lacks in (False, True):
        afresh(module)
        recwarn.clear()
        one = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
        if name == "cuThreadExchangeStreamCaptureMode":
            gpu.context.mode = 2  # where graphs may be made
        with patch.object(gpu, name, None if lacks else one):
            if lacks:
                delattr(gpu, name)
            found, by = ways(gpu, module)
            if lacks:
                setattr(gpu, name, None)
        assert found == wanted and by[-1] == {"triton"}
        assert len(recwarn) == (1 if lacks else warnings), [str(one.message) for one in recwarn]
        module.launch_plan.cache_clear()


def test_a_launch_that_is_cut_short_is_begun_again(gpu: PretendedGpu, module: ModuleType) -> None:
    # from the first kernel on: what the selection adds to, pooling has to clear
    wanted = launches(gpu, module, draw(4096))
    made, count = module.by_what_is_ready, 0

    def cut(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise TypeError("one argument more")
        made(*arguments)

    with patch.object(module, "by_what_is_ready", cut), warned_once(module), watched():
        assert launches(gpu, module, draw(4096)) == wanted[:2] + wanted
    assert module.PLAIN


def test_an_error_that_is_not_of_the_way_of_launching_stays_one(gpu: PretendedGpu, module: ModuleType) -> None:
    step(module, draw(4096))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the hook's own")

    knobs.runtime.launch_enter_hook.add(refuse)
    try:
        with pytest.raises(RuntimeError, match="the hook's own"):
            step(module, draw(4096))
    finally:
        knobs.runtime.launch_enter_hook.remove(refuse)
    assert not module.PLAIN and not module.TOLD


@pytest.mark.parametrize("cached", [b"", b"no library", None])
def test_what_lies_in_the_cache_of_the_replayer_may_be_broken(
    gpu: PretendedGpu, module: ModuleType, cached: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = launches(gpu, module, draw(4096))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    module.replayer.cache_clear()
    assert not isinstance(module.replayer(), str)
    (library,) = tmp_path.rglob("llsa_replay*.so")
    library.unlink()
    if cached is None:
        library.mkdir()
    else:
        library.write_bytes(cached)
    afresh(module)
    found, _ = ways(gpu, module)
    assert found == 4 * [wanted]
    assert cached is None or not module.TOLD, "Triton builds it again"


@pytest.mark.parametrize("value", ["triton", "auto", "", "Triton", "fast"])
def test_the_environment_chooses_the_way(gpu: PretendedGpu, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile(ROOT / "spec" / "llsa_l2.yaml").path
    spec = importlib.util.spec_from_file_location("by_the_environment", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("LLSA_GEN_LAUNCH", value)
    if value not in ("triton", "auto", ""):
        with pytest.raises(ValueError, match=rf"^LLSA_GEN_LAUNCH: expected auto or triton, got '{value}'$"):
            spec.loader.exec_module(made)
        return
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr(made, "libcuda", lambda: gpu)
    found, by = ways(gpu, made)
    assert found == 4 * found[:1]
    assert by == (4 * [{"triton"}] if value == "triton" else [{"triton"}, {"launch"}, {"graph"}, {"triton"}])
    assert gpu.calls.total() == 0 or value != "triton"
    made.launch_plan.cache_clear()


def test_the_replayer_has_no_warnings(module: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "replay.c"
    source.write_text(f"#define BASES {module.BASES}\n#define PARAMETERS {module.PARAMETERS}\n{module.REPLAY_C}")
    include = sysconfig.get_paths()["include"]
    strict = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-isystem", include]
    subprocess.run([os.environ.get("CC", "cc"), *strict, str(source)], check=True)
