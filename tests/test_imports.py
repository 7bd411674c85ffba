"""The directions of import: which package may know which, written down once and checked against the source.

A row of `ROOMS` that has to grow is a design decision: it belongs in the review.
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
    """What one package of llsa_gen may import beside the standard library and `EVERYBODYS`."""

    packages: frozenset[str]  # of llsa_gen
    libraries: frozenset[str]  # from elsewhere, by their import names


def room(packages: str = "", libraries: str = "") -> Room:
    return Room(frozenset(packages.split()), frozenset(libraries.split()))


EVERYBODYS = {"errors", "forks", "joint", "runtime"}
"""What knows none of the packages: three files beside them, and what is spliced into modules, which stand alone."""

ROOMS = {
    # the five stages, each knowing only what is before it
    "spec": room("", "pydantic pydantic_core yaml"),
    "plan": room("spec", "sympy rich"),
    "schedule": room("plan"),
    "emit": room("spec plan schedule", "jinja2 sympy triton"),
    "store": room("schedule", "filelock platformdirs"),
    "module": room("", "torch"),
    "compiler": room("spec plan schedule emit store module", "torch triton"),
    # beside the line
    "reference": room("spec", "torch"),
    "order": room("spec", "torch numpy"),
    "look": room("spec order", "torch matplotlib"),
    "nn": room("spec order compiler", "torch"),
    "integrations": room("spec order look emit store module compiler", "torch transformers"),
    "fuzz": room("spec reference store compiler", "torch triton hypothesis"),
    "aot": room("spec schedule emit store compiler", "torch triton"),
    "bench": room("spec plan schedule emit store compiler reference fuzz aot", "torch pydantic rich matplotlib"),
    "tune": room("spec plan schedule store compiler reference fuzz aot", "torch triton"),
    # what people call
    "cli": room("spec plan schedule store compiler look fuzz aot bench tune", "typer rich sympy torch"),
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
    modules = present().keys()
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


def package_of(name: str) -> str:
    """`store.entry` -> "store"; a file beside the packages is one by itself."""
    return name.partition(".")[0]


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


def test_every_package_has_a_row() -> None:
    there = {package_of(name) for name in present()} - EVERYBODYS - {"__init__", "__main__"}
    assert there == set(ROOMS), f"say in ROOMS, in {Path(__file__).name}, what a new package may import"


@pytest.mark.parametrize("name", sorted(present()))
def test_a_module_imports_only_what_the_row_of_its_package_names(name: str) -> None:
    own, others = imports(present()[name].read_text(), ".".join(present()[name].relative_to(ROOT).parent.parts))
    known = {package_of(one) for one in own} - EVERYBODYS - {package_of(name)}
    if package_of(name) in EVERYBODYS:
        assert not known and others <= {"runtime": GENERATED_MAY_IMPORT, "joint": {"torch"}}.get(
            package_of(name), set()
        )
    elif name == "__main__":
        assert known == {"cli"} and not others
    elif name == "__init__":  # the front door: it imports when it is asked to
        assert known == {"spec", "compiler", "fuzz", "nn", "order", "reference"} and not others
    else:
        row = ROOMS[package_of(name)]
        known -= {"__init__"} if package_of(name) == "cli" else set()  # the front door, which has the version
        assert known <= row.packages, f"{name} must not know {sorted(known - row.packages)} of llsa_gen"
        assert others <= row.libraries, f"{name} must not import {sorted(others - row.libraries)}"


def test_no_package_imports_upwards() -> None:
    rows = list(ROOMS)
    upwards = {name: row.packages & set(rows[rows.index(name) :]) for name, row in ROOMS.items()}
    assert not any(upwards.values()), upwards


def test_every_row_is_used_up() -> None:
    """What a row allows and nobody needs would let in what nobody meant."""
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for name, path in present().items():
        if package_of(name) in ROOMS:
            own, others = imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
            used[package_of(name)] |= {package_of(one) for one in own} | others
    spare = {name: sorted((row.packages | row.libraries) - used[name]) for name, row in ROOMS.items()}
    assert not any(spare.values()), spare


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        name: imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))[0] - {name, "__init__"}
        for name, path in present().items()
        if name != "__init__"  # the package itself imports lazily, by name, so that being its user closes no circle
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def adapts(name: str) -> bool:
    """Whether a module may need the library that it is an adapter for, which is an extra."""
    return name.startswith("integrations.transformers")


def draws(name: str) -> bool:
    """Whether a module may need matplotlib, which is an extra: nothing else may import it but when it is asked to."""
    return name in {"bench.plot", "look.drawing", "look.picture"}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def declared(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}

    always, extras = declared(project["dependencies"]), project["optional-dependencies"]
    for name, path in present().items():
        extra = "demo" if draws(name) else "transformers" if adapts(name) else None
        allowed = always | declared(extras[extra]) if extra else always
        missing = {DISTRIBUTIONS.get(library, library) for library in imports(path.read_text())[1]} - allowed
        assert not missing, f"pyproject.toml does not declare {sorted(missing)}, which {name} imports"


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


WATCHED = {"torch", "triton", "jinja2", "sympy", "pydantic", "transformers"}
LOADED = f"import sys; print(*sorted({WATCHED} & sys.modules.keys()))"


def test_importing_the_package_loads_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_fresh(f"import llsa_gen.integrations; assert llsa_gen.__version__; {LOADED}", tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_declaring_a_spec_needs_no_torch(tmp_path: Path) -> None:
    assert run_fresh(f"import llsa_gen; llsa_gen.Spec; {LOADED}", tmp_path) == "pydantic"
    assert list(tmp_path.iterdir()) == []


def test_source_is_emitted_and_stored_without_torch(tmp_path: Path) -> None:
    loaded = run_fresh(f"import llsa_gen.emit, llsa_gen.store, llsa_gen.plan.cost; {LOADED}", tmp_path)
    assert not {"torch", "triton"} & set(loaded.split())


def test_importing_every_module_leaves_nothing_behind(tmp_path: Path) -> None:
    # matplotlib makes a folder of its own when it is imported
    names = [name for name in present() if not draws(name) and not name.startswith("__")]
    run_fresh("import " + ", ".join(f"llsa_gen.{name}" for name in sorted(names)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there() -> None:
    import llsa_gen

    for name in llsa_gen.__all__:
        assert getattr(llsa_gen, name) is not None
    assert set(llsa_gen.__all__) <= set(dir(llsa_gen))
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        getattr(llsa_gen, "attend")  # noqa: B009  (a plain attribute would be a type error, as it should)
