"""The commands `llsa-gen cache ...`: what is stored, and why a spec missed."""

from typing import Annotated

import typer

from llsa_gen.cli.terminal import Commands, Json, SpecArgument, console, load_spec, print_json
from llsa_gen.errors import LlsaGenError, short

app = typer.Typer(
    cls=Commands,
    help="List and remove stored modules; explain why a spec missed.",
    epilog="Example: llsa-gen cache ls",
    no_args_is_help=True,
)


@app.command(epilog="Example: llsa-gen cache ls --json")
def ls(as_json: Json = False) -> None:
    """List the stored modules, newest first, and the files of tuned schedules."""
    from rich import box
    from rich.table import Table

    from llsa_gen.plan.units import human_bytes
    from llsa_gen.store import Store, tuned

    store = Store()
    entries, refusal = store.entries(), store.refusal()
    files = [str(file) for file in tuned.files(store)]
    if as_json:
        fields = ("name", "digest", "created", "size_bytes", "intact", "refused")
        rows = [{name: getattr(entry, name) for name in fields} | {"path": str(entry.path)} for entry in entries]
        print_json({"directory": str(store.root), "refused": refusal, "entries": rows, "tuned": files})
        return
    typer.echo(f"{store.root}: {_counted(len(entries))}")
    if refusal is not None:
        typer.echo(f"nothing here is used, for somebody else may have written it: {refusal}")
    for file in files:
        typer.echo(f"tuned schedules: {file}")
    if not entries:
        return
    table = Table("name", "key", "made (UTC)", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("size", justify="right")
    table.add_column()
    for entry in entries:
        made = entry.created[:19].replace("T", " ")
        state = "" if entry.intact else "broken, will be made again"
        if entry.refused is not None:
            state = "refused"
        table.add_row(entry.name, entry.digest[:12], made, human_bytes(entry.size_bytes), state)
    console().print(table)
    for entry in entries:
        if entry.refused is not None and refusal is None:
            typer.echo(f"refused, for somebody else may have written it: {entry.refused}")


@app.command(epilog="Example: llsa-gen cache clear llsa_l2 --yes")
def clear(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only modules of this spec name.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    and_tuned: Annotated[bool, typer.Option("--tuned", help="Also remove what llsa-gen tune has found.")] = False,
) -> None:
    """Remove stored modules: those of one spec, or all. Tuned schedules stay, unless --tuned is given."""
    from llsa_gen.store import Store, tuned

    store = Store()
    store.check()
    doomed = [entry for entry in store.entries() if name is None or entry.name == name]
    if name is not None and not doomed:
        raise LlsaGenError(f"{short(name)}: {store.root} holds no module of this name")
    files = tuned.files(store)
    if (doomed or (and_tuned and files)) and not yes:
        more = " and the tuned schedules" * (and_tuned and bool(files))
        typer.confirm(f"Remove {_counted(len(doomed))}{more} from {store.root}?", abort=True)
    typer.echo(f"removed {_counted(store.clear(name))} from {store.root}")
    if and_tuned:
        typer.echo(f"removed the tuned schedules of {tuned.remove(store)} targets")
    elif files:
        typer.echo(f"tuned schedules stay, in {files[0].parent}; --tuned removes them too")


def _counted(modules: int) -> str:
    return f"{modules} module{'s' * (modules != 1)}"


@app.command(epilog="Example: llsa-gen cache why llsa_l2")
def why(spec: SpecArgument, as_json: Json = False) -> None:
    """Say whether compiling a spec would find it stored, and if not, which part of the key differs."""
    from llsa_gen.compiler import explain_miss

    explanation = explain_miss(load_spec(spec))
    if as_json:
        differences = [difference._asdict() for difference in explanation.differences]
        answer = {"spec": explanation.key.name, "outcome": explanation.outcome, "detail": explanation.detail}
        print_json(answer | {"differences": differences})
    else:
        typer.echo(explanation)
