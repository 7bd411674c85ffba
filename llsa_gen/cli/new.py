"""The command `llsa-gen new`: a spec to edit, or one chosen for a length, and what that will cost."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llsa_gen.cli.terminal import DType, between, warn
from llsa_gen.errors import LlsaGenError, SpecError
from llsa_gen.store.files import write_whole

if TYPE_CHECKING:
    from llsa_gen.cli.explain import Data
    from llsa_gen.spec import Spec

BLOCK = 16
"""Tokens of a block, unless --block says so: that of the paper and of most shipped specs."""

HEADS = 8
"""B*H for which the cost is told, as by the other commands; ratios do not depend on it."""


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name: a Python identifier.")],
    n: Annotated[
        int | None,
        typer.Option("-n", "--tokens", callback=between(1, 2**30), help="Choose levels and Top-K for N tokens."),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option("--head-dim", callback=between(8, 256), help="With --tokens: size of a head's vectors."),
    ] = None,
    keys: Annotated[
        int | None,
        typer.Option("--keys", callback=between(1), help="With --tokens: about how many keys a query attends to."),
    ] = None,
    block: Annotated[
        int | None, typer.Option("--block", callback=between(2, 256), help="With --tokens: tokens of a block; 16.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace NAME.yaml if it exists.")] = False,
) -> None:
    """Write a commented starter spec, NAME.yaml, and the schema.json by which editors complete it.

    With --tokens and --head-dim it is chosen for a length: comments of the file say why, and what it costs.
    """
    from llsa_gen.spec import schema_text, starter

    if n is None:
        for option, value in (("--head-dim", head_dim), ("--keys", keys), ("--block", block)):
            if value is not None:
                raise typer.BadParameter("expected --tokens too, the length to choose for", param_hint=option)
    elif head_dim is None:
        raise typer.BadParameter("expected --head-dim too, the size of one head's vectors", param_hint="--tokens")
    path, schema = Path(f"{name}.yaml"), Path("schema.json")
    told: list[str] = []
    try:
        text = starter(name)
        if n is not None and head_dim is not None:
            text, told = _chosen(name, n, head_dim, keys, block)
    except SpecError as error:
        raise LlsaGenError(f"NAME: {error.mistakes[0].message}") from None
    if path.exists() and not force:
        raise LlsaGenError(f"{path}: exists already; --force replaces it")
    write_whole(path, text)
    if not schema.exists():
        write_whole(schema, schema_text())
    for line in told:
        typer.echo(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False))
    typer.echo(f"{path}: edit it, then: llsa-gen explain {path} -n {n or 65536}")


def _chosen(name: str, n: int, head_dim: int, keys: int | None, block: int | None) -> tuple[str, list[str]]:
    """The text of a spec for N tokens, and what its comments say."""
    from llsa_gen.cli.explain import explain
    from llsa_gen.plan.chosen import choose
    from llsa_gen.spec import commented

    spec = choose(name, n, head_dim, keys, block or BLOCK)
    data = explain(spec, n, HEADS, DType.BFLOAT16)
    reasons = [_why(spec, n, keys, data), _costs(spec, n, data)]
    if data["warning"]:
        warn(data["warning"])
    return commented(spec, reasons), reasons


def _why(spec: "Spec", n: int, keys: int | None, data: "Data") -> str:
    """Why it has so many levels, and why they keep so many."""
    from llsa_gen.plan.units import counted

    first, top, tokens = spec.levels[0], data["levels"][0], data["levels"][-1]
    formula = f"the paper's floor(log_B N - 1) for blocks of {first.block}, 1 to 6"
    wanted = "which is usual" if keys is None else f"for about {keys:,} keys a query"
    sees = ", ".join(f"{one['keys']:,} of level {one['level']}" for one in data["levels"][-2::-1])
    return (
        f"For N = {n:,} tokens: {counted(spec.num_levels, 'level')}, {formula}; the last one then has "
        f"{counted(top['tokens'], 'token')}. topk is {first.topk}, {wanted}: a query attends to "
        f"{data['keys']['most']:,} keys at most, {counted(tokens['keys'], 'token')}, {sees}."
    )


def _costs(spec: "Spec", n: int, data: "Data") -> str:
    """What `explain` says of it, and from where to where it is worth it."""
    from llsa_gen.cli.explain import TARGET
    from llsa_gen.plan import lower
    from llsa_gen.plan.chosen import pays_from
    from llsa_gen.plan.cost import BYTES, Cost
    from llsa_gen.plan.growth import with_another_level
    from llsa_gen.schedule import schedule, target

    forward, backward = (data["dense_over_cost"][f"{one}_flops"] for one in ("forward", "backward"))
    plan = lower(spec)
    pays = pays_from(Cost(plan, schedule(plan, target(TARGET), BYTES[data["dtype"]]), data["dtype"]))
    beyond = data["growth"]["quadratic_beyond"]
    worth = "It never takes fewer" if pays is None else f"It takes fewer from about {pays:,} tokens on"
    if beyond <= data["max_tokens"]:
        remedy = "add a level" if with_another_level(spec) else "take wider blocks"
        worth += f"; beyond {beyond:,} most of them are due to the last level, and grow as N^2: {remedy} there"
    return (
        f"Dense attention takes {_ratio(forward)} times as many FLOPs forward and {_ratio(backward)} times backward. "
        f"{worth}. More: llsa-gen explain {spec.name}.yaml -n {n}"
    )


def _ratio(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
