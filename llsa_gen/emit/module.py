"""Emit: a plan and its schedules to the text of one Python module, the same bytes for the same input.

Templates live in `templates/`; jinja2 decides structure only (which levels, which arguments), numbers reach the text
as named constants. What a template may ask is the plan, and the printers of sizes.
"""

import hashlib
import json
import re
import shlex
import traceback
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2

from llsa_gen import runtime
from llsa_gen.emit import networks, signature
from llsa_gen.emit.literals import schedules_literal, spec_literal
from llsa_gen.emit.printers import python, symbolic
from llsa_gen.errors import TemplateError
from llsa_gen.plan import Plan
from llsa_gen.plan.cost import Cost
from llsa_gen.plan.sizes import CACHED, FILLING
from llsa_gen.schedule import PARTIAL_LEVELS, Schedules, columns_of, list_length, pad, take_turns
from llsa_gen.schedule.table import GLUON

ROOT = Path(__file__).parents[1]
TEMPLATES = next(path for path in (ROOT / "templates", ROOT.parent / "templates") if path.is_dir())
PLACEHOLDER = "\0" * 16
"""Stands for the hash; no spec can contain it, since its texts are escaped."""
STRING_OR_COMMENT = re.compile(
    r'''"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*''', re.DOTALL
)
"""What a `#` may be in, and what it begins. `tokenize` takes nearly thirty times as long."""
THE_SAME = "# ---- the same in every module from here on"
"""How the line begins after which all modules are alike."""


@cache
def generator_version() -> str:
    """The version of the installed package."""
    try:
        return version("llsa-gen")
    except PackageNotFoundError:
        return "unknown"


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
    env.filters["bool"] = bool
    env.filters["pad"] = lambda number: pad(number, 1)  # up to a power of two
    env.globals |= {"sorting": networks.sorting, "merging": networks.merging, "runtime": runtime.text}
    env.filters["each"] = lambda items, form: ", ".join(form.format(item) for item in items)
    return env


def template_digests() -> dict[str, str]:
    """Content hash of every template, by its path in `TEMPLATES`."""
    return {name: hashlib.sha256((TEMPLATES / name).read_bytes()).hexdigest() for name in template_names()}


def template_names() -> list[str]:
    """Every template, as the others include it: `triton/select.py.j2`."""
    return sorted(path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.j2"))


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
                parameters=partial(signature.parameters, plan),
                base=partial(signature.base, plan),
                launch=partial(signature.launch, plan, stages_in_gluon(schedules)),
                unspecialised=signature.unspecialised(plan),
                spec_literal=spec_literal(plan.spec),
                pad_dim=pad(plan.head_dim),
                columns=columns_of(plan.head_dim),
                take_turns=take_turns(plan.head_dim),
                schedules=schedules_literal(schedules),
                gluon=stages_in_gluon(schedules),
                filling=FILLING,
                flops=[Cost(plan, {}).flops(kernels) for kernels in (plan.forward, plan.backward, *plan.selection)],
                cached=CACHED,
                lists={level: list_length(plan, level) for level in plan.sorted_levels},
                partial_in_gluon=plan.top <= PARTIAL_LEVELS,
                walked=walked_by_all(plan),
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
    own, line, same = body.partition(THE_SAME)
    return "\n".join([uncommented(own), uncommented_once(line + same)])


def uncommented(text: str) -> str:
    """A program's lines without comments, and none that is blank."""
    plain = STRING_OR_COMMENT.sub(lambda found: "" if found[0][0] == "#" else found[0], text)
    return "\n".join(line.rstrip() for line in plain.splitlines() if line.strip())


uncommented_once = lru_cache(maxsize=2)(uncommented)
"""For what all modules share, which is read once a process."""


def place(error: Exception) -> tuple[str, int]:
    """Template and line, from 1, where rendering failed."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.name or "?", error.lineno
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(TEMPLATES):
            return path.relative_to(TEMPLATES).as_posix(), frame.lineno or 0
    return "module.py.j2", 1


def walked_by_all(plan: Plan) -> tuple[int, ...]:
    """Of which levels all queries of a program in Gluon attend to the same keys, in the order of its walk.

    Level 0 is among them where blocks are wide: a program then has 64 queries of one block, and else four blocks.
    """
    return (*reversed(plan.enriched), *([0] if plan.wide else []))


def stages_in_gluon(schedules: Schedules) -> frozenset[str]:
    """The stages that some target's schedule hands to a kernel in Gluon."""
    tables = (tiles for by_size in schedules.values() for tiles in by_size.values())
    return frozenset(stage for tiles in tables for stage, entry in tiles.items() if entry.get("backend") == GLUON)


def tidy(text: str) -> str:
    """No trailing blanks, and no more than two empty lines in a row: what unrolled loops may leave behind."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\(\n\n+", "(\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"
