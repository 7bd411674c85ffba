"""The main job on real input, `make demo`: a spec becomes an operator, and every pixel of a photograph attends with it.

    python examples/photo/demo.py [--spec spec/llsa_l2.yaml] [--size 128] [--out demo.png]

What it computes is compared with the dense float64 reference: where it differs by more than
docs/semantics.md allows, the exit code is 1.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

import llsa_gen
from llsa_gen import reference, schedule
from llsa_gen.errors import LlsaGenError
from llsa_gen.look import pixels, views
from llsa_gen.plan import cost, lower
from llsa_gen.spec import Spec, load

try:
    import photograph

    from llsa_gen.look import drawing
except ModuleNotFoundError as missing:
    raise SystemExit(f"the demo needs {missing.name}: pip install 'llsa-gen[demo]'") from None

NOISE = 0.1
"""Standard deviation of the noise that attention is to remove; colours are 0 to 1."""

SAMPLE = 128
"""How many queries are compared with the reference: its rows are as long as the input, and in float64."""

QUERIES = (
    views.Query("from a star of the flag", 0.106, 0.129),
    views.Query("from the cheek", 0.47, 0.44),
    views.Query("from the ribbons", 0.94, 0.74),
)

Result = TypeVar("Result")

console = Console(highlight=False, soft_wrap=True)


def timed(run: Callable[[], Result], repeats: int = 3) -> tuple[Result, float]:
    """What a call returns, and its seconds when warm: the least of some, which other programs have disturbed least."""
    result = run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def line(name: str, value: str, text: str, style: str = "bold") -> None:
    """One line of the report: name, number, what it means."""
    console.print(f"  [dim]{name:<10}[/][{style}]{value:>10}[/]  {text}")


def check(spec: Spec, tokens: pixels.Tokens, o: torch.Tensor, kept: tuple[torch.Tensor, ...]) -> bool:
    """Whether selection and attention are those of the dense float64 reference, with a line about each."""
    q, k, v = tokens.q, tokens.k, tokens.v
    levels = "its level" if spec.num_levels == 1 else f"its {spec.num_levels} levels"
    try:
        reference.check_selection(spec, q, k, kept)
    except AssertionError as wrong:
        line("selection", "WRONG", str(wrong), "bold red")
        return False
    line("selection", "right", f"every kept token of {levels} scores at least as high as every dropped one")

    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(q.shape[2], generator=generator)[:SAMPLE]
    expected, _ = reference.attention_rows(spec, q, k, v, rows, kept)
    error, allowed = reference.relative_error(o[:, :, rows], expected), reference.tolerance(o.dtype)
    good = error <= allowed
    sample = f"{len(rows)} queries against the dense float64 reference"
    line("error", f"{error:.1e}", f"{sample}; allowed: {allowed:.0e}", "bold green" if good else "bold red")
    return good


def say_cost(spec: Spec, n_tokens: int, heads: int) -> None:
    """What the keys and the cost of a query are, beside those of dense attention."""
    plan = lower(spec)
    # FLOPs, which are all that is said here, do not depend on tile shapes: any target will do
    counted = cost.Cost(plan, schedule.schedule(plan, schedule.target("cuda:90"), 4), "float32")
    parts = [
        f"{cost.evaluate(counted.candidates(level), n_tokens):,} {'pixels' if level == 0 else f'of level {level}'}"
        for level in counted.plan.attended
    ]
    keys = cost.evaluate(counted.keys, n_tokens)
    line("keys", f"{keys:,}", f"a query instead of {n_tokens:,}: {' + '.join(parts)}")
    forward = counted.totals.forward.flops
    dense = cost.dense(spec.head_dim).forward.flops
    sparse, full = (cost.evaluate(flops, n_tokens, heads) / 1e9 for flops in (forward, dense))
    line("cost", f"{sparse:,.1f}", f"GFLOP forward; dense attention {full:,.1f}, {full / sparse:,.1f} times as many")


def demo(spec: Spec, layout: pixels.Layout, out: Path) -> bool:
    """Runs the demo, prints its report and writes its picture; whether selection and attention are right."""
    photo = photograph.photograph(layout.height, layout.width)
    noisy = photograph.with_noise(photo, NOISE)
    tokens = pixels.tokens(spec, noisy, layout)
    q, k, v = tokens.q, tokens.k, tokens.v
    heads = q.shape[1]
    shape = f"{layout.width}\N{MULTIPLICATION SIGN}{layout.height} pixels = {layout.n_tokens:,} tokens"
    console.print(f"[bold]{spec.name}[/] over a photograph: {shape}, {heads} heads of {spec.head_dim}, float32\n")

    start = time.perf_counter()
    attention = llsa_gen.compile(spec)
    seconds = time.perf_counter() - start
    line("compile", f"{seconds:.2f} s", f"to a module of {len(attention.source.splitlines()):,} lines")
    say_cost(spec, layout.n_tokens, heads)
    with console.status("timing, dense attention too"):
        o, sparse = timed(lambda: attention(q, k, v))
        full, dense = timed(lambda: scaled_dot_product_attention(q, k, v))
    assert isinstance(o, torch.Tensor)
    threads = f"{torch.get_num_threads()} threads"
    ratio = f"{dense / sparse:.1f}\N{MULTIPLICATION SIGN} the speed"
    line("time", f"{sparse:.2f} s", f"forward; {ratio} of torch's dense attention, {dense:.2f} s ({threads})")

    kept = attention.select(q, k)
    good = check(spec, tokens, o, kept)

    denoised = tokens.picture(o)
    was, now, best = (photograph.psnr(picture, photo) for picture in (noisy, denoised, tokens.picture(full)))
    line("denoised", f"{now:.1f} dB", f"from {was:.1f} dB; dense attention gets to {best:.1f} dB")
    seen = [views.view(spec, kept, layout, heads - 1, query.token(layout)) for query in QUERIES]
    before, after = (f"noisy, {was:.1f} dB", noisy), (f"after attention, {now:.1f} dB", denoised)
    drawing.draw(out, spec, layout, photo, QUERIES, seen, (before, after))
    console.print(f"\n  picture  {out}\n  module   {attention.path or 'in memory'}")
    return good


app = typer.Typer(add_completion=False)


@app.command()
def main(
    spec: Annotated[Path, typer.Option(help="The spec file to compile.")] = Path("spec/llsa_l2.yaml"),
    size: Annotated[int, typer.Option(min=1, max=512, help="Width and height of the picture in pixels.")] = 128,
    out: Annotated[Path, typer.Option(help="Where to write the picture, a PNG.")] = Path("demo.png"),
) -> None:
    """Attend over a photograph, compare with the dense reference, and draw what single pixels attend to.

    Example: python examples/photo/demo.py --size 64 --out small.png
    """
    try:
        loaded = load(spec)
        good = demo(loaded, pixels.layout(loaded, size, size), out)
    except (LlsaGenError, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
