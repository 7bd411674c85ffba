"""Emit: a plan and its schedules to the text of one Python module, the same bytes for the same input.

Templates live in `templates/`; jinja2 decides structure only (which levels, which arguments), numbers reach the text
as named constants. What a template may ask is the plan, plus the few printers below.
"""

import hashlib
import io
import json
import re
import shlex
import tokenize
import traceback
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import sympy
from sympy.printing.pycode import PythonCodePrinter

from llsa_gen import networks
from llsa_gen.cost import Cost
from llsa_gen.errors import TemplateError
from llsa_gen.plan import Plan
from llsa_gen.schedule import CACHED, FILLING, LOOSE_LEVELS, Schedule, Schedules, list_length, pad
from llsa_gen.spec import Spec

ROOT = Path(__file__).parent
TEMPLATES = next(path for path in (ROOT / "templates", ROOT.parent / "templates") if path.is_dir())
PLACEHOLDER = "\0" * 16
"""Stands for the hash; no spec can contain it, since its texts are escaped."""


def generator_version() -> str:
    """The version of the installed package."""
    try:
        return version("llsa-gen")
    except PackageNotFoundError:
        return "unknown"


class HostPrinter(PythonCodePrinter):
    """Prints sizes as host code: `ceil_div(n_tokens, 256)`, tile shapes looked up in the schedule entry `tile`."""

    smaller = "min"

    def _print_Symbol(self, expr: sympy.Symbol) -> str:  # noqa: N802
        return f'tile["{expr.name}"]' if expr.name.isupper() else expr.name

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        numerator, divisor = sympy.fraction(expr.args[0])
        return f"ceil_div({self._print(numerator)}, {self._print(divisor)})"

    def _print_floor(self, expr: sympy.floor) -> str:
        numerator, divisor = sympy.fraction(expr.args[0])
        return f"(({self._print(numerator)}) // {self._print(divisor)})"  # a quotient binds no tighter than a product

    def _print_Min(self, expr: sympy.Min) -> str:  # noqa: N802
        *rest, last = [self._print(arg) for arg in sorted(expr.args, key=str)]
        return "".join(f"{self.smaller}({arg}, " for arg in rest) + last + ")" * len(rest)


class SymbolicPrinter(HostPrinter):
    """The same for lengths that may be symbols of torch.compile: `min` would ask which is the smaller, a guard each."""

    smaller = "torch.sym_min"


@jinja2.pass_context
def python(context: jinja2.runtime.Context, expr: sympy.Expr | int) -> str:
    """An expression of the plan as host code, in which `tokens[l]` is T_l."""
    return printed(context["plan"], expr, HostPrinter())


@jinja2.pass_context
def symbolic(context: jinja2.runtime.Context, expr: sympy.Expr | int) -> str:
    """The same where lengths may be symbols of torch.compile."""
    return printed(context["plan"], expr, SymbolicPrinter())


def printed(plan: Plan, expr: sympy.Expr | int, printer: HostPrinter) -> str:
    """An expression of the plan as a printer has it."""
    named = [
        (plan.tokens(level), sympy.Symbol(f"tokens[{level}]", integer=True, positive=True)) for level in plan.levels
    ]
    return str(printer.doprint(sympy.sympify(expr).subs(named))).replace("*", " * ").replace("*  *", "**")


@cache
def environment() -> jinja2.Environment:
    """The templates, strict about names and whitespace."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters["py"] = python
    env.filters["sym"] = symbolic
    env.filters["pad"] = lambda number: pad(number, 1)  # up to a power of two
    env.globals |= {"sorting": networks.sorting, "merging": networks.merging}
    env.filters["each"] = lambda items, form: ", ".join(form.format(item) for item in items)
    return env


def template_digests() -> dict[str, str]:
    """Content hash of every template, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(TEMPLATES.glob("*.j2"))}


def render(plan: Plan, schedules: Schedules) -> str:
    """The module's text; the operator's name carries the hash of everything else in it."""
    try:
        text = (
            environment()
            .get_template("module.py.j2")
            .render(
                plan=plan,
                version=generator_version(),
                operator=f"{plan.spec.name}_{PLACEHOLDER}",
                spec_literal=spec_literal(plan.spec),
                pad_dim=pad(plan.head_dim),
                schedules=schedules_literal(schedules),
                hopper=stages_in_gluon(schedules),
                filling=FILLING,
                flops=[Cost(plan, {}).flops(kernels) for kernels in (plan.forward, plan.backward, plan.forward[:-1])],
                cached=CACHED,
                lists={level: list_length(plan, level) for level in plan.sorted_levels},
                loose_in_gluon=plan.top <= LOOSE_LEVELS,
            )
        )
    except Exception as error:  # whatever an expression in a template may raise
        template, line = place(error)
        code = f"import llsa_gen; llsa_gen.compile({json.loads(plan.spec.canonical())!r})"
        reproduce = f"python -c {shlex.quote(code)}"
        raise TemplateError(f"{type(error).__name__}: {error}", template, line, plan.spec.name, reproduce) from error
    text = tidy(text)
    digest = hashlib.sha256(f"{generator_version()}\n{essence(text, plan)}".encode()).hexdigest()
    return text.replace(PLACEHOLDER, digest[: len(PLACEHOLDER)])


def essence(text: str, plan: Plan) -> str:
    """A module's text without what changes nothing that runs: header, comments, blank lines, the spec's description.

    The operator is named by its hash, so that a program that was exported with the one still finds the other.
    """
    _, _, body = text.split('"""', 2)
    plain = plan.spec.model_copy(update={"description": ""})
    body = body.replace(spec_literal(plan.spec), spec_literal(plain)).replace(PLACEHOLDER, "")
    lines = body.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(body).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def place(error: Exception) -> tuple[str, int]:
    """Template and line, from 1, where rendering failed."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.name or "?", error.lineno
    frames = [(Path(frame.filename).name, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return next((frame for frame in reversed(frames) if frame[0].endswith(".j2")), ("module.py.j2", 1))


def spec_literal(spec: Spec) -> str:
    """A spec as the Python dict that stands in its module."""
    return literal(json.loads(spec.canonical()))


def literal(spec: Mapping[str, object]) -> str:
    """A spec as a Python dict, one field a line, its texts escaped."""

    def escaped(value: object) -> str:
        # not json's own escapes: beyond the first 2^16 characters they are not Python's
        return json.dumps(value, ensure_ascii=False).encode("ascii", "backslashreplace").decode("ascii")

    values = {name: repr(value) if isinstance(value, bool) else escaped(value) for name, value in spec.items()}
    return "{\n" + "".join(f'    "{name}": {value},\n' for name, value in values.items()) + "}"


def stages_in_gluon(schedules: Schedules) -> frozenset[str]:
    """The stages that some target's schedule hands to a kernel for the matrix units of H100."""
    tables = (tiles for by_size in schedules.values() for lengths in by_size.values() for tiles in lengths.values())
    return frozenset(stage for tiles in tables for stage, entry in tiles.items() if entry.get("HOPPER"))


def runs(lengths: Mapping[int, Schedule]) -> dict[int, Schedule]:
    """Length buckets with what they have in common said once: neighbours with the same schedule become one."""
    ends = sorted(lengths)
    return {
        end: lengths[end]
        for end, above in zip(ends, [*ends[1:], None], strict=True)
        if above is None or lengths[end] != lengths[above]
    }


def schedules_literal(schedules: Schedules) -> str:
    """The schedules as the statement `SCHEDULES = {...}`, one line a kernel, equal tables written once.

    A table that differs from one before it in a quarter of its kernels at the most is that one and the difference.
    {target: {bytes of an element: {most tokens: tiles}}}: that of a length is the first whose key it does not exceed.
    """
    tables: list[tuple[str, Schedule, bool]] = []  # the name of each, its entries, and whether all of them are written
    lines: list[str] = []
    rows: list[str] = []

    def name_of(kernels: Schedule) -> str:
        for name, known, _ in tables:
            if known == kernels:
                return name
        name = f"TILES_{len(tables) + 1}"
        near = [(other, _changed(known, kernels)) for other, known, whole in tables if whole and [*known] == [*kernels]]
        base, changed = min(near, key=lambda one: len(one[1]), default=("", kernels))
        brief = 4 * len(changed) <= len(kernels)
        told = changed if brief else kernels
        body = "".join(f"    {kernel!r}: {entry_literal(entry)},\n" for kernel, entry in told.items())
        lines.append(f"{name} = {base + ' | ' if brief else ''}{{\n{body}}}\n")
        tables.append((name, kernels, not brief))
        return name

    for target, by_size in schedules.items():
        entries = []
        for size, lengths in by_size.items():
            buckets = [(end, name_of(kernels)) for end, kernels in runs(lengths).items()]
            told = ", ".join(f"{'MAX_TOKENS' if end == max(lengths) else end}: {name}" for end, name in buckets)
            entries.append(f"{size}: {{{told}}}")
        rows.append(f"    {target!r}: {{{', '.join(entries)}}},\n")
    comment = "# the schedule of a length is the first whose key, in tokens, it does not exceed"
    return ("".join(lines) + f"SCHEDULES = {{  {comment}\n{''.join(rows)}}}").replace("'", '"')


def _changed(known: Schedule, kernels: Schedule) -> Schedule:
    """The entries that a table of the same kernels has otherwise."""
    return {kernel: entry for kernel, entry in kernels.items() if entry != known[kernel]}


def entry_literal(entry: Mapping[str, int]) -> str:
    return "{" + ", ".join(f"{name!r}: {value}" for name, value in entry.items()) + "}"


def tidy(text: str) -> str:
    """No trailing blanks, and no more than two empty lines in a row: what unrolled loops may leave behind."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\(\n\n+", "(\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"
