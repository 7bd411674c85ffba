"""The command line: thin, every command one call into the package and a few lines that print.

Only typer is imported here; each command imports what it needs, so that `llsa-gen --help` does not wait for torch, and
so that `check --interpret` can turn on Triton's interpreter before Triton is there.
"""

import atexit
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llsa_gen.cli import cache
from llsa_gen.cli.bench import bench
from llsa_gen.cli.check import check
from llsa_gen.cli.look import look
from llsa_gen.cli.new import new
from llsa_gen.cli.terminal import Commands, DType, Json, SpecArgument, between, console, load_spec, print_json, warn
from llsa_gen.cli.tune import tune
from llsa_gen.errors import LlsaGenError
from llsa_gen.store.files import must_take, write_whole

if TYPE_CHECKING:
    from llsa_gen.aot import Export
    from llsa_gen.compiler import Attention

__all__ = ["app", "main"]

MODULE_MARK = "Made by llsa_gen"
"""Stands in the header of every generated module."""

app = typer.Typer(
    cls=Commands,
    help="Compile YAML specs of log-linear sparse attention into specialised Triton modules.",
    epilog="Start with: llsa-gen new mine; llsa-gen explain mine -n 65536",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Tokens = Annotated[
    int, typer.Option("-n", "--tokens", callback=between(1, 2**30), help="Sequence length N, in tokens.")
]
Heads = Annotated[int, typer.Option("--heads", callback=between(1), help="Heads of all batch entries, B*H.")]
Queries = Annotated[
    int | None,
    typer.Option("-m", "--queries", callback=between(1, 2**30), help="Queries M, where they are not as many as keys."),
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Dtype of q, k and v.")]


def _show_version(asked: bool) -> None:
    if asked:
        import llsa_gen

        typer.echo(f"llsa-gen {llsa_gen.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command(epilog="Example: llsa-gen new pixel_256 --tokens 65536 --head-dim 64")(new)


@app.command(epilog="Example: llsa-gen build llsa_l2 -n 65536")
def build(spec: SpecArgument, n: Tokens = 65536, heads: Heads = 8, as_json: Json = False) -> None:
    """Compile a spec, say where the module is and what it will cost."""
    import time

    from llsa_gen.cli.explain import explain
    from llsa_gen.compiler import compile
    from llsa_gen.plan.units import human_bytes, human_flops

    source = load_spec(spec)
    start = time.perf_counter()
    attention = compile(source)
    seconds = time.perf_counter() - start
    data = explain(source, n, heads, DType.BFLOAT16)
    if as_json:
        path = None if attention.path is None else str(attention.path)
        print_json({"spec": source.name, "digest": source.digest, "path": path, "seconds": seconds, "cost": data})
        return
    cost, keys = data["cost"], data["keys"]["most"]
    typer.echo(f"{source.name}: compiled in {seconds:.1f} s")
    typer.echo(f"  module  {attention.path or 'in memory only'}")
    typer.echo(f"  cost    at {n:,} tokens and {heads} heads, bfloat16:")
    typer.echo(f"          {keys:,} keys a query, of {n:,}")
    for one in ("forward", "backward"):
        flops = f"{one}_flops"
        less = data["dense_over_cost"][flops]
        typer.echo(f"          {human_flops(cost[flops])} {one}, {less:,.3g} times fewer than dense attention")
    typer.echo(f"          {human_bytes(cost['saved_bytes'])} saved for the backward pass, beside q, k, v, o")
    typer.echo(f"  growth  {data['growth']['text']}")
    if data["warning"]:
        warn(data["warning"])


app.command(epilog="Example: llsa-gen check llsa_l2 --seconds 60")(check)
app.command(epilog="Example: llsa-gen tune llsa_l2 -n 65536 --stage attend --seconds 120")(tune)


@app.command(epilog="Example: llsa-gen explain llsa_l2 -n 65536 --heads 8")
def explain(
    spec: SpecArgument,
    n: Tokens,
    m: Queries = None,
    heads: Heads = 8,
    dtype: DTypeOption = DType.BFLOAT16,
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan: kernels, tile shapes, buffers.")] = False,
    on: Annotated[
        str | None, typer.Option("--target", help="GPU whose tile shapes --plan prints: cuda:90, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show levels, keys a query sees, FLOPs, bytes, memory and growth order, against dense attention.

    Counted are matrix products (2 FLOPs a multiply-add) and pooling; bytes moved, each buffer once a kernel.
    """
    from llsa_gen.cli.explain import TARGET, explain, plan_tables, schedule_data, tables
    from llsa_gen.plan import lower
    from llsa_gen.schedule import target as known
    from llsa_gen.store import Store, tuned

    source = load_spec(spec)
    data = explain(source, n, heads, dtype, m)
    goal = tuned.targets(Store())[known(on or TARGET).name]
    if as_json:
        more = {"plan": lower(source).to_dict(), "schedule": schedule_data(source, dtype, goal)}
        print_json(data | (more if plan else {}))
        return
    console().print(tables(data))
    if plan:
        console().print("\n", plan_tables(source, n, heads, dtype, goal, m), sep="")


app.command(epilog="Example: llsa-gen look llsa_l2 --image photo.jpg --query 120,80 -o seen.png")(look)


@app.command(epilog="Example: llsa-gen export llsa_l2 -o build --target cuda:90 --target hip:gfx942")
def export(
    spec: SpecArgument,
    directory: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", file_okay=False, help="Where to write it.")
    ] = Path(),
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="TARGET", help="Also compile for this GPU, such as cuda:90; may be repeated."),
    ] = None,
    dtype: DTypeOption = DType.BFLOAT16,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that llsa-gen did not make.")] = False,
    as_json: Json = False,
) -> None:
    """Write the self-contained module, DIR/NAME.py; with --target also its kernels, compiled, and a manifest.

    Nothing is written where a kernel does not compile, or takes more shared memory than a target has.
    """
    from llsa_gen.compiler import compile
    from llsa_gen.schedule import target as known

    for target in targets or ():
        known(target)  # a misspelt one should not be found out after the others
    source = load_spec(spec)
    path = directory / f"{source.name}.py"
    if path.is_file() and not force and MODULE_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise LlsaGenError(f"{path}: exists already and is no module that llsa-gen made; --force replaces it")
    must_take(path, folders=True)  # before minutes are spent
    if targets:
        from llsa_gen import aot

        for target in targets:
            must_take(aot.folder_of(directory, source.name, target, dtype.value) / aot.MANIFEST, folders=True)
    attention = compile(source)
    # all of it, before anything is written
    ready = [_compile_for(attention, target, dtype) for target in targets or ()]
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, attention.source)
    manifests = {one.target: str(_write_for(one, directory)) for one in ready}
    if as_json:
        print_json({"spec": attention.spec.name, "module": str(path), "manifests": manifests})
        return
    for written in (path, *manifests.values()):
        typer.echo(written)


def _compile_for(attention: "Attention", target: str, dtype: DType) -> "Export":
    """The kernels, compiled for a target."""
    from llsa_gen import aot

    typer.echo(f"compiling for {target}, {dtype} ...", err=True)
    return aot.prepare(attention, target, dtype.value)


def _write_for(ready: "Export", directory: Path) -> Path:
    """Write them to a folder of their own; returns the path of the manifest there."""
    from llsa_gen.aot import MANIFEST

    return Path(ready.write(directory)["folder"]) / MANIFEST


app.command(epilog="Example: llsa-gen bench llsa_l2 -n 4096 -n 65536 --json rows.json --plot rows.png")(bench)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """The entry point of `llsa-gen` and `python -m llsa_gen`."""
    code: object = 1
    atexit.register(lambda: leave(code))  # the first to register is the last to be called
    try:
        app(prog_name="llsa-gen")
    except SystemExit as end:
        code = end.code
        raise


def leave(code: object) -> None:
    """End a process that has imported Triton here: after what was registered for its end, before Python is taken apart.

    Triton 3.9 keeps references to Python's classes where nothing gives them back, from the first kernel in Gluon whose
    layouts it infers, and its bindings then list 300 objects as leaked.
    """
    if "triton" not in sys.modules:
        return
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            code = code or 1
    os._exit(code if isinstance(code, int) else int(code is not None))
