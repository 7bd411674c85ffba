"""The emitted text: the same bytes everywhere, safe from what a spec says, and clear about a broken template."""

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import BRANCHES, GLUON
from llsa_gen import Level, Spec, emit, load
from llsa_gen.emit import module as emission
from llsa_gen.errors import SpecError, TemplateError
from llsa_gen.fuzz.case import specs
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "spec").glob("*.yaml"))
PIXELS = Spec(name="pixels", head_dim=64, levels=(Level(block=16, topk=8), Level(block=16, topk=8)))
"""One that has kernels in Gluon."""

SMALL = Spec(name="small", head_dim=20, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))

PRINT_DIGESTS = """
import hashlib, sys
from llsa_gen import emit, load
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
for path in sys.argv[1:]:
    plan = lower(load(path))
    print(hashlib.sha256(emit.render(plan, schedules(plan)).encode()).hexdigest())
assert "torch" not in sys.modules
"""


def render(spec: Spec) -> str:
    plan = lower(spec)
    return emit.render(plan, schedules(plan))


def operator(text: str) -> str:
    found = re.search(r'^OPERATOR = "(\w+)"', text, re.MULTILINE)
    assert found
    return found[1]


def described(text: str) -> Spec:
    return SMALL.model_copy(update={"description": text})


# ---- the same bytes ---------------------------------------------------------------------------------------------


def test_two_processes_emit_the_same_bytes(tmp_path: Path) -> None:
    def digests(seed: str, folder: Path) -> str:
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PRINT_DIGESTS, *map(str, SHIPPED)]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = digests("1", ROOT)
    assert len(set(first.split())) == len(SHIPPED)
    assert digests("2", tmp_path) == first


@settings(max_examples=15)
@given(specs(max_levels=5))
def test_a_module_is_well_formed_whatever_the_spec(spec: Spec) -> None:
    text = render(spec)
    assert render(spec) == text
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]\n|\n{4,}|\t", text)
    assert "{{" not in text and "{%" not in text and "{#" not in text
    names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert {kernel.name for kernel in lower(spec).kernels} <= names
    assert {"attention", "select"} <= names


def test_modules_pass_ruff(tmp_path: Path) -> None:
    """No unused name, no undefined one, no dead variable: in the branches of all shipped specs."""
    for spec in (*map(load, SHIPPED), *(spec for spec, _ in GLUON.values())):
        (tmp_path / f"{spec.name}.py").write_text(render(spec))
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F,E9,RUF059"]
    result = subprocess.run([*ruff, "."], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_kernels_use_all_their_arguments(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(render(load(path)))) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any("triton.jit" in ast.unparse(by) for by in node.decorator_list)]
    assert kernels
    for kernel in kernels:
        used = {node.id for statement in kernel.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        unused = {argument.arg for argument in kernel.args.args} - used
        assert not unused, f"{kernel.name} does not use {sorted(unused)}"


# ---- what a spec says -------------------------------------------------------------------------------------------

HOSTILE = (
    '"""',
    "'''\n\nimport os\nos.abort()\n'''",
    '", "x": __import__("os").abort(), "y": "',
    "\\",
    '\\"',
    "{{ plan }}{% raw %}{# no #}",
    "%s {} {0} {name}",
    "a  \n\n\n\n\nb   \n(\n\n\nc",
    "@" * 16,
    "\N{SNOWMAN} ünï \U0001f600 \N{NO-BREAK SPACE}",
    "#" * 200,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_description_stays_a_text(text: str) -> None:
    check_description(text)


@settings(max_examples=30)
@given(st.text(st.characters(codec="utf-8"), max_size=100))
@example("@" * 17)
def test_any_description_stays_a_text(text: str) -> None:
    try:
        described(text)
    except SpecError:
        return  # a control character
    check_description(text)


def check_description(text: str) -> None:
    """The module holds the description as a value, in one place, and is the same as without it everywhere else."""
    spec = described(text)
    source = render(spec)
    assert source.isascii()
    fields, rest = split(source)
    assert fields == {**spec.model_dump(mode="json"), "enrich": [1, 2]}
    assert rest == split(render(SMALL))[1]


def split(source: str) -> tuple[object, str]:
    """The value of SPEC, and all else that the module does; hashes, which have to differ, left out."""
    module = ast.parse(source)
    (statement,) = [
        node for node in module.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SPEC"
    ]
    module.body.remove(statement)
    return ast.literal_eval(statement.value), re.sub(r"\b(small_)?[0-9a-f]{16}\b", "HASH", ast.unparse(module))


# ---- the operator's name ----------------------------------------------------------------------------------------


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the templates that the emitter uses instead."""
    copy = Path(copytree(emit.TEMPLATES, tmp_path / "templates"))
    monkeypatch.setattr(emission, "TEMPLATES", copy)
    fresh = emit.environment.__wrapped__
    monkeypatch.setattr(emission, "environment", fresh)
    return copy


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} no longer has {old!r}: this test wants another place to break"
    path.write_text(text.replace(old, new, 1))


def test_the_operator_is_named_by_all_that_runs(templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(SMALL)
    assert re.fullmatch(r"small_[0-9a-f]{16}", operator(before))
    changed = SMALL.model_copy(update={"reweight": False})
    assert operator(render(changed)) != operator(before)
    replace_in(templates / "host/tables.py.j2", "at.grids = {}", "at.grids  = {}")  # one blank within a line
    other = operator(render(SMALL))
    assert other != operator(before)
    monkeypatch.setattr(emission, "generator_version", lambda: "0.0")
    assert operator(render(SMALL)) not in (other, operator(before))


def test_the_operator_keeps_its_name_through_harmless_edits(templates: Path) -> None:
    """A program that was exported before finds it by that name."""
    before = render(SMALL)
    for text in HOSTILE:
        assert operator(render(described(text))) == operator(before)
    replace_in(templates / "module.py.j2", "Log-linear sparse attention", "An attention")  # in the header
    replace_in(templates / "module.py.j2", "# the softmax works in base 2", "# of the softmax")
    replace_in(templates / "shared/tiles.py.j2", "    dim = tl", "    # a line of its own\n\n    dim = tl")
    after = render(SMALL)
    assert after != before and operator(after) == operator(before)


def test_another_text_under_a_taken_name_is_refused(tmp_path: Path) -> None:
    texts = {
        "first": render(SMALL),
        "again": render(SMALL),
        "described": render(described("in other words")),
        "commented": render(SMALL).replace("\n\ndef ", "\n\n# of no consequence\ndef "),
        "edited": render(SMALL).replace("CHUNK = 2**24", "CHUNK = 2**23"),
    }
    modules = {}
    for name, text in texts.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        if name != "edited":
            spec.loader.exec_module(modules[name])
            continue
        with pytest.raises(
            RuntimeError, match=r"expected one text under this name, got another in .*edited\.py"
        ) as caught:
            spec.loader.exec_module(modules[name])
        assert str(tmp_path / "first.py") in str(caught.value)
    q = torch.randn(1, 1, 9, SMALL.head_dim)
    assert torch.equal(modules["first"].attention(q, q, q), modules["described"].attention(q, q, q))


def test_every_template_has_a_part_in_the_modules(templates: Path) -> None:
    """Each is a part of the key; one that nobody includes would be dead."""
    for path in sorted(templates.rglob("*.j2")):
        text = path.read_text()
        path.write_text("{{ nobody_knows_this_name }}\n" + text)
        with pytest.raises(TemplateError):
            for spec in (SMALL, PIXELS):
                render(spec)
        path.write_text(text)
    render(SMALL)


@pytest.mark.parametrize("spec", [*BRANCHES, *(spec for spec, _ in GLUON.values())], ids=lambda spec: spec.name)
def test_no_name_of_a_module_is_taken_twice(spec: Spec) -> None:
    made = ast.parse(render(spec)).body
    names = [one.name for one in made if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    nodes = (node for one in made if isinstance(one, ast.Assign) for node in ast.walk(one))
    names += [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert [name for name, times in Counter(names).items() if times > 1] == []


def test_what_all_modules_share_is_read_once() -> None:
    emission.uncommented_once.cache_clear()
    for chosen in BRANCHES[:3]:
        assert emission.THE_SAME in render(chosen)
    assert emission.uncommented_once.cache_info().misses == 1


# ---- broken templates -------------------------------------------------------------------------------------------


def break_with(line: str) -> Callable[[Path], int]:
    """Puts `line` in front of the second line of a template and says where it is now."""

    def do(path: Path) -> int:
        lines = path.read_text().splitlines(keepends=True)
        at = next(index for index, text in enumerate(lines) if text.startswith("@triton.jit"))
        path.write_text("".join([*lines[:at], line + "\n", *lines[at:]]))
        return at + 1

    return do


# one that is included first, and one that takes in another
@pytest.mark.parametrize("template", ["shared/tiles.py.j2", "triton/select.py.j2"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{{ plan.levles }}", "levles"),
        ("{{ unknown }}", "'unknown' is undefined"),
        ("{% if plan.top > %}", "TemplateSyntaxError"),
        ("{{ plan.top + 'x' }}", "TypeError"),
        ("{{ plan.block(plan.top + 1) }}", "expected a level from 1 to 2, got 3"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'gone.py.j2' %}", "gone.py.j2"),
    ],
)
def test_a_broken_template_is_named_with_its_line(templates: Path, template: str, line: str, reason: str) -> None:
    at = break_with(line)(templates / template)
    with pytest.raises(TemplateError) as caught:
        render(SMALL)
    error = caught.value
    assert (error.template, error.line, error.spec) == (template, at, "small")
    assert reason in str(error)
    assert str(error).startswith(f"{template}:{at}: ")
    assert error.reproduce in str(error)


def test_what_reproduces_a_template_error_does(templates: Path) -> None:
    """The command is run by a shell, as a person would paste it, with the spec's text as hostile as it may be."""
    break_with("{{ unknown }}")(templates / "triton/pool.py.j2")
    with pytest.raises(TemplateError) as caught:
        render(described('it\'s "quoted" $HOME `id` \\'))
    command = caught.value.reproduce.replace("python", sys.executable, 1)
    broken = f"from pathlib import Path; from llsa_gen.emit import module; module.TEMPLATES = Path({str(templates)!r})"
    (templates.parent / "sitecustomize.py").write_text(broken)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(templates.parent), *sys.path])}
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert "TemplateError: triton/pool.py.j2:" in result.stderr.splitlines()[-1], result.stderr


def test_what_is_hashed_is_the_text_without_what_the_tokenizer_calls_a_comment() -> None:
    texts = [render(load(path)).split('"""', 2)[2] for path in SHIPPED]
    for text in [*texts, 'a = "#\\"#"  # "\nb = \'#"\'  # \'\n\n"""\n# no\n"""  # "" #\n']:
        lines = text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        assert emission.uncommented(text).splitlines() == [line.rstrip() for line in lines if line.strip()]
