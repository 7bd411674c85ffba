"""What is the same in every module: real files, spliced word for word, that need no more than they declare."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples import BRANCHES
from llsa_gen import Spec, emit, load, runtime
from llsa_gen.compiler import compile
from llsa_gen.emit import module as emission
from llsa_gen.emit.origin import origin
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules

ROOT = Path(__file__).resolve().parents[2]
SOME = [BRANCHES[1], BRANCHES[9], load(ROOT / "spec" / "llsa_l2.yaml"), load(ROOT / "spec" / "topk_b128.yaml")]
PYTHON = [name for name in runtime.FILES if name.endswith(".py")]


def render(spec: Spec) -> str:
    return emit.render(lower(spec), schedules(lower(spec)))


def head(name: str) -> ast.Module:
    """What stands above the line."""
    return ast.parse((runtime.FOLDER / name).read_text().split(runtime.SPLICED)[0])


def imported(tree: ast.AST) -> set[str]:
    """What the imports of a text make known, not those for type checkers alone."""
    names: set[str] = set()
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_all_files_are_spliced() -> None:
    there = {path.name for path in runtime.FOLDER.iterdir() if path.is_file()}
    assert there == {*runtime.FILES, "__init__.py", "module.py"}


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: spec.name)
def test_every_module_has_every_file_word_for_word_and_after_the_line(spec: Spec) -> None:
    text = render(spec)
    _, line, rest = text.partition("\n# ---- the same in every module from here on ")
    assert line and text.count(line) == 1
    at = 0
    for name in runtime.FILES:
        assert runtime.text(name) in rest, name
        assert (at := rest.index(runtime.text(name), at)) >= 0, f"{name} is not where FILES has it"


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: spec.name)
def test_nothing_in_a_module_takes_the_name_of_something_else(spec: Spec) -> None:
    """A function of the host with the name of a kernel's helper would take its place, and be compiled by Triton."""
    body = ast.parse(render(spec)).body
    names = [one.name for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    names += [x.id for one in body if isinstance(one, ast.Assign) for x in one.targets if isinstance(x, ast.Name)]
    assert len(names) > 100 and not [name for name, times in Counter(names).items() if times > 1]


def test_after_the_line_modules_are_the_same() -> None:
    assert len({render(spec).partition("# ---- the same in every module")[2] for spec in SOME}) == 1


@pytest.mark.parametrize("name", runtime.FILES)
def test_nothing_in_them_is_a_template(name: str) -> None:
    assert not any(mark in runtime.text(name) for mark in ("{{", "{%", "{#")), name


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_imports_what_a_file_imports(name: str) -> None:
    assert imported(head(name)) - {"Path", "TYPE_CHECKING"} <= imported(ast.parse(render(SOME[0])))


@pytest.mark.parametrize("name", runtime.FILES)
def test_a_line_is_found_in_its_file(name: str) -> None:
    text, file = render(SOME[0]), (runtime.FOLDER / name).read_text().splitlines()
    first = text[: text.index(runtime.text(name))].count("\n") + 1
    length = runtime.text(name).count("\n")
    for line in (first, first + length // 2, first + length - 1):
        where, _, number = origin(text, line).template.partition(":")
        assert where == f"runtime/{name}" and file[int(number) - 1] == text.splitlines()[line - 1]
    assert not origin(text, 100).template.startswith("runtime/")


@pytest.mark.parametrize("name", PYTHON)
def test_a_file_can_be_imported_by_itself(name: str) -> None:
    importlib.import_module(f"llsa_gen.runtime.{name.removesuffix('.py')}")


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: spec.name)
def test_every_module_defines_what_is_declared_of_it(spec: Spec) -> None:
    module = compile(spec).module
    declared = ast.parse((runtime.FOLDER / "module.py").read_text()).body
    names = {one.target.id for one in declared if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    names |= {one.name for one in declared if isinstance(one, ast.FunctionDef | ast.ClassDef)}
    assert len(names) > 20 and not [name for name in sorted(names) if not hasattr(module, name)]


@pytest.mark.parametrize("name", runtime.FILES)
def test_a_letter_in_a_file_is_another_module_and_another_key(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, digest = render(SOME[0]), runtime.digests()
    folder = shutil.copytree(runtime.FOLDER, tmp_path / "runtime")
    with (folder / name).open("a") as file:
        file.write("\n/* more */\n" if name.endswith(".c") else "\nMORE = 1\n")
    monkeypatch.setattr(runtime, "FOLDER", folder)
    monkeypatch.setattr(emission, "environment", emission.environment.__wrapped__)
    assert render(SOME[0]) != before
    assert {one for one in digest if runtime.digests()[one] != digest[one]} == {name}


@pytest.mark.slow
def test_the_replayer_reads_and_writes_only_what_is_its_own(tmp_path: Path) -> None:
    """Graphs and plain launches with the pretended driver once more, the C compiled with sanitizers."""
    found = shutil.which(os.environ.get("CC", "cc"))
    library = found and subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not found or not library or not Path(library.strip()).is_absolute():
        pytest.skip("needs a C compiler with AddressSanitizer")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {found} -fsanitize=address,undefined -fno-sanitize-recover=all "$@"\n')
    compiler.chmod(0o755)
    variables = {"CC": str(compiler), "LD_PRELOAD": library.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    tests = [f"tests/runtime/test_launch_graphs.py::{name}" for name in SANITIZED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = tmp_path.rglob("llsa_replay*.so")
    assert b"__asan_" in library.read_bytes(), "it was compiled with them"


SANITIZED = ("test_threads_share_few_graphs",)
