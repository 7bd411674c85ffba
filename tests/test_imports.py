"""The directions of import: who may know whom, written down once and checked against the source.

A new module gets its row in `ROOMS`. A row that has to grow is a design decision: it belongs in the review.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llsa_gen"
MAX_LINES = 400


@dataclass(frozen=True)
class Room:
    """What one module of llsa_gen may import beside the standard library and `errors`, which is everybody's."""

    modules: frozenset[str]  # of llsa_gen
    libraries: frozenset[str]  # from elsewhere, by their import names


def room(modules: str = "", libraries: str = "") -> Room:
    return Room(frozenset(modules.split()), frozenset(libraries.split()))


ROOMS = {
    # the five stages, each knowing only what is before it
    "errors": room(),
    "files": room(),
    "forks": room(),
    "trust": room(),
    "spec_mistakes": room("", "pydantic"),
    "spec_yaml": room("spec_mistakes", "yaml"),
    "spec": room("spec_mistakes spec_yaml", "pydantic pydantic_core"),
    "sizes": room("", "sympy"),
    "levels": room("sizes spec", "sympy"),
    "plan": room("levels sizes spec", "sympy"),
    "schedule_table": room("sizes plan"),
    "schedule_memory": room("plan schedule_table"),
    "schedule_fit": room("plan schedule_table schedule_memory"),
    "schedule": room("plan schedule_table schedule_memory schedule_fit"),
    "networks": room(),
    "emit": room("spec plan schedule cost networks", "jinja2 sympy"),
    "store_entry": room("trust"),
    "store": room("store_entry trust forks", "filelock platformdirs"),
    "loading": room("store_entry forks"),
    "tuned": room("schedule_table store trust files"),
    "compiler": room("spec plan schedule tuned emit store loading forks failure", "torch triton"),
    # beside the line
    "reference": room("spec reference_selection", "torch"),
    "reference_selection": room("spec", "torch"),
    "cost": room("sizes plan schedule", "sympy"),
    "growth": room("sizes spec plan cost", "sympy"),
    "units": room("", "rich"),
    "explain": room("spec plan schedule schedule_table cost growth units", "rich"),
    "fuzz_cases": room("spec", "torch triton hypothesis"),
    "fuzz_oracle": room("spec reference fuzz_cases", "torch"),
    "fuzz": room("spec reference reference_selection compiler store fuzz_cases fuzz_oracle", "torch hypothesis"),
    "devices": room("", "torch"),
    "launches": room("schedule compiler", "torch triton"),
    "binary": room("", "triton"),
    "origin": room("emit"),
    "failure": room("origin", "triton"),
    "aot": room("spec schedule schedule_table emit compiler launches binary failure files", "torch triton"),
    "golden": room("spec plan schedule emit"),
    "bench_rows": room("", "pydantic"),
    "bench_machine": room("emit bench_rows", "torch"),
    "bench_timing": room("bench_rows", "torch"),
    "bench_rivals": room("bench_rows", "torch"),
    "bench_check": room("reference compiler fuzz fuzz_cases fuzz_oracle bench_rivals", "torch"),
    "bench_kernels": room("cost launches bench_rows bench_timing", "torch"),
    "bench_cell": room(
        "plan schedule tuned store compiler cost fuzz_cases bench_rows bench_timing bench_rivals bench_check"
        " bench_kernels",
        "torch",
    ),
    "bench": room(
        "spec plan compiler fuzz_cases bench_rows bench_machine bench_timing bench_rivals bench_kernels bench_cell",
        "torch",
    ),
    "bench_table": room("bench_rows units", "rich"),
    "bench_plot": room("bench_rows bench_table files", "matplotlib"),
    "tune_candidates": room("plan schedule schedule_table schedule_fit"),
    "tune_search": room("plan schedule tune_candidates"),
    "tune_bench": room("plan schedule compiler launches aot fuzz reference", "torch triton"),
    "tune": room(
        "spec plan schedule schedule_table store tuned compiler launches fuzz_cases "
        "tune_candidates tune_search tune_bench",
        "torch triton",
    ),
    # what people call
    "terminal": room("spec", "typer rich"),
    "cli": room(
        "__init__ spec cli_bench cli_cache cli_check cli_tune terminal files plan schedule store tuned compiler "
        "explain units aot",
        "typer",
    ),
    "cli_cache": room("terminal compiler store tuned units", "typer rich"),
    "cli_tune": room("terminal tune tune_search", "typer rich"),
    "cli_bench": room("terminal files devices bench bench_rows bench_table bench_plot", "typer rich torch"),
    "cli_check": room("terminal devices fuzz", "typer rich"),
    "demo": room("__init__ spec plan schedule compiler reference cost demo_photo demo_picture", "torch rich typer"),
    "demo_photo": room("spec", "torch matplotlib"),
    "demo_picture": room("spec demo_photo", "torch matplotlib"),
    "__init__": room("spec compiler reference fuzz forks"),
    "__main__": room("cli"),
}

GENERATED_MAY_IMPORT = {"torch", "triton"}

# Import name -> the name it is installed by, where the two differ.
DISTRIBUTIONS = {"yaml": "pyyaml", "pydantic_core": "pydantic"}


def module_name(path: Path) -> str:
    """`llsa_gen/store.py` -> "store", `llsa_gen/fuzz/draw.py` -> "fuzz.draw", `llsa_gen/__init__.py` -> "__init__"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@cache
def present() -> dict[str, Path]:
    """The modules that llsa_gen really has, by name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _home(name: str) -> str:
    """The module that the dotted name inside llsa_gen leads to: its longest part that is a module."""
    modules = present().keys() | ROOMS.keys()
    parts = name.split(".") if name else []
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in modules:
            return ".".join(parts[:end])
    return "__init__"


def imports(source: str, package: str = "llsa_gen") -> tuple[set[str], set[str]]:
    """(modules of llsa_gen, other top-level names) imported anywhere in `source`: in functions and for typing too.

    package: the dotted package that the source lies in, to which its relative imports refer.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")
            base = ".".join(up[: len(up) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            inside = origin.split(".")[0] == "llsa_gen"
            # `from llsa_gen import spec` reaches a module, `from llsa_gen.spec import Spec` a name in one
            names.update(f"{origin}.{alias.name}" if inside else origin for alias in node.names)
    own = {_home(name.partition(".")[2]) for name in names if name.split(".")[0] == "llsa_gen"}
    others = {name.split(".")[0] for name in names} - {"llsa_gen"} - sys.stdlib_module_names
    return own, others


@pytest.mark.parametrize(
    ("source", "own", "others"),
    [
        ("import torch.nn as nn, os", set(), {"torch"}),
        ("from collections import abc", set(), set()),
        ("from llsa_gen import errors", {"errors"}, set()),
        ("from llsa_gen.errors import LlsaGenError", {"errors"}, set()),
        ("from .errors import LlsaGenError", {"errors"}, set()),
        ("from . import errors", {"errors"}, set()),
        ("import llsa_gen.errors", {"errors"}, set()),
        ("from llsa_gen import compile", {"__init__"}, set()),
        ("def f():\n    import triton", set(), {"triton"}),
        ("if TYPE_CHECKING:\n    from torch import Tensor", set(), {"torch"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, own: set[str], others: set[str]) -> None:
    assert imports(source) == (own, others)


def test_every_module_has_a_row() -> None:
    unplaced = sorted(present().keys() - ROOMS.keys())
    assert not unplaced, f"say in ROOMS, in {Path(__file__).name}, what these modules may import: {unplaced}"
    gone = sorted(ROOMS.keys() - present().keys())
    assert not gone, f"ROOMS, in {Path(__file__).name}, names modules that llsa_gen does not have: {gone}"


@pytest.mark.parametrize("name", sorted(present().keys() & ROOMS.keys()))
def test_module_imports_only_what_its_row_names(name: str) -> None:
    path = present()[name]
    package = ".".join(path.relative_to(ROOT).parent.parts)
    own, others = imports(path.read_text(), package)
    too_many = sorted(own - ROOMS[name].modules - {"errors", name})
    assert not too_many, f"{name} must not know {too_many} of llsa_gen"
    foreign = sorted(others - ROOMS[name].libraries)
    assert not foreign, f"{name} must not import {foreign}"


def test_the_rows_have_one_direction() -> None:
    # The package itself is left out: it imports lazily, by name, so that being its user closes no circle.
    order = TopologicalSorter({name: row.modules - {"__init__"} for name, row in ROOMS.items()})
    order.prepare()  # raises CycleError, which names the circle


def test_nothing_but_main_knows_the_command_line() -> None:
    assert {name for name, row in ROOMS.items() if "cli" in row.modules} == {"__main__"}


def draws(name: str) -> bool:
    """Whether a module may need matplotlib, which is an extra: nothing else may import it but when it is asked to."""
    return name.startswith("demo") or name == "bench_plot"


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def declared(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}

    always = declared(project["dependencies"])
    for name, row in ROOMS.items():
        allowed = always | declared(project["optional-dependencies"]["demo"]) if draws(name) else always
        missing = {DISTRIBUTIONS.get(library, library) for library in row.libraries} - allowed
        assert not missing, f"pyproject.toml does not declare {sorted(missing)}, which {name} may import"


@pytest.mark.parametrize("name", sorted(present()))
def test_a_file_is_one_room(name: str) -> None:
    lines = len(present()[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, more than {MAX_LINES}: it holds more than one idea"


def test_generated_modules_stand_alone() -> None:
    modules = sorted((ROOT / "generated").glob("*.py"))
    assert modules, "generated/ holds no module"
    for path in modules:
        own, others = imports(path.read_text())
        assert not own, f"{path.name} imports llsa_gen"
        assert others <= GENERATED_MAY_IMPORT, f"{path.name} imports {sorted(others - GENERATED_MAY_IMPORT)}"


def run_fresh(code: str, home: Path) -> str:
    """Runs `code` in a new interpreter whose home, cache and working directory are the empty folder `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLSA_GEN", "XDG_"))}
    environment |= {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LOADED = "import sys; print(*sorted({'torch', 'triton', 'jinja2', 'sympy', 'pydantic'} & sys.modules.keys()))"


def test_importing_the_package_loads_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_fresh(f"import llsa_gen; assert llsa_gen.__version__; {LOADED}", tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_declaring_a_spec_needs_no_torch(tmp_path: Path) -> None:
    assert run_fresh(f"import llsa_gen; llsa_gen.Spec; {LOADED}", tmp_path) == "pydantic"
    assert list(tmp_path.iterdir()) == []


def test_source_is_emitted_and_stored_without_torch(tmp_path: Path) -> None:
    loaded = run_fresh(f"import llsa_gen.emit, llsa_gen.store, llsa_gen.cost; {LOADED}", tmp_path)
    assert not {"torch", "triton"} & set(loaded.split())


def test_importing_every_module_leaves_nothing_behind(tmp_path: Path) -> None:
    # matplotlib makes a folder of its own when it is imported
    names = [name for name in ROOMS if not draws(name) and not name.startswith("__")]
    run_fresh("import " + ", ".join(f"llsa_gen.{name}" for name in sorted(names)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there() -> None:
    import llsa_gen

    for name in llsa_gen.__all__:
        assert getattr(llsa_gen, name) is not None
    assert set(llsa_gen.__all__) <= set(dir(llsa_gen))
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        getattr(llsa_gen, "attend")  # noqa: B009  (a plain attribute would be a type error, as it should)
