"""The command `llsa-gen look`: what chosen pixels of a picture keep at every level, drawn over the picture."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llsa_gen.cli.terminal import SpecArgument, between, load_spec
from llsa_gen.errors import LlsaGenError, short
from llsa_gen.store.files import must_take, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from llsa_gen.look.pixels import Layout
    from llsa_gen.look.views import Query, View
    from llsa_gen.spec import Spec

SPREAD = ((0.25, 0.25), (0.7, 0.5), (0.4, 0.8))
"""Where pixels are asked about unless --query says so: fractions of the width and of the height."""


def look(
    spec: SpecArgument,
    image: Annotated[Path, typer.Option("--image", metavar="PICTURE", help="The picture file: PNG, JPEG, ...")],
    queries: Annotated[
        list[str] | None,
        typer.Option(
            "--query",
            metavar="X,Y",
            help="A pixel, counted in the file from its left and from its top; may be repeated. Three unless given.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.png", help="Where to draw it.")] = Path(
        "look.png"
    ),
    size: Annotated[
        int, typer.Option("--size", callback=between(1, 512), help="Average the longer side to so many pixels at most.")
    ] = 128,
) -> None:
    """Draw what single pixels keep at every level, over the picture, and say how many pixels that is.

    Every pixel is a token. Queries and keys are made of its colours, those around it, and its place. What it keeps at
    a level is what its token of that level keeps, the mean of a block.
    """
    source = load_spec(spec)
    try:
        from llsa_gen.look import drawing, picture
    except ModuleNotFoundError as missing:
        raise LlsaGenError(f"look needs {missing.name}: pip install 'llsa-gen[demo]'") from None
    from llsa_gen.look import pixels

    points = list(dict.fromkeys(_point(text) for text in queries or ()))
    if len(points) > drawing.MAX_QUERIES:
        raise LlsaGenError(f"--query: expected at most {drawing.MAX_QUERIES} pixels, got {len(points)}")
    if out.suffix.lower() != ".png":
        raise LlsaGenError(f"-o {short(str(out), 300)}: expected a file that ends with .png")
    if os.path.realpath(out) == os.path.realpath(image):
        raise LlsaGenError(f"-o {out}: expected another file than that of --image, got the same")
    whole = picture.read(image)
    height, width = whole.shape[1:]
    asked = _queries(points, height, width)
    must_take(out)

    small = picture.averaged(whole, size)
    layout = pixels.layout(source, *small.shape[1:])
    views = _views(source, small, layout, asked)
    file = io.BytesIO()
    drawing.draw(file, source, layout, small, asked, views)
    write_whole(out, file.getvalue())
    less = "" if small.shape == whole.shape else f", averaged to {_size(layout.height, layout.width)}"
    _tell(source, f"{image}, {_size(height, width)} pixels{less}", layout, asked, views)
    typer.echo(f"  picture  {out}")


def _point(text: str) -> tuple[int, int]:
    """X and Y."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,9})\s*,\s*(-?[0-9]{1,9})\s*", text)
    if found is None:
        raise LlsaGenError(f"--query: expected X,Y, two integers such as 40,25, got {short(repr(text))}")
    return int(found[1]), int(found[2])


def _queries(points: Sequence[tuple[int, int]], height: int, width: int) -> "list[Query]":
    """The queries at these pixels of a file's picture, or at some that are spread over it."""
    from llsa_gen.look.views import Query

    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            most = f"0,0 to {width - 1},{height - 1}"
            size = f"a picture of {_size(height, width)} pixels"
            raise LlsaGenError(f"--query {x},{y}: expected a pixel from {most}, inside {size}")
    spread = [(int(right * width), int(down * height)) for right, down in SPREAD]
    chosen = points or list(dict.fromkeys(spread))
    return [Query(f"pixel {x},{y}", (y + 0.5) / height, (x + 0.5) / width) for x, y in chosen]


def _views(spec: "Spec", picture: "Tensor", layout: "Layout", queries: "Sequence[Query]") -> "list[View]":
    """What the queries see and keep, in one head: the one that looks everywhere."""
    from llsa_gen.compiler import compile
    from llsa_gen.look import pixels
    from llsa_gen.look.views import view

    tokens = pixels.tokens(spec, picture, layout, pixels.HEADS[-1:])
    kept = compile(spec).select(tokens.q, tokens.k)
    return [view(spec, kept, layout, 0, query.token(layout)) for query in queries]


def _tell(spec: "Spec", source: str, layout: "Layout", queries: "Sequence[Query]", views: "Sequence[View]") -> None:
    """A line about the picture, and one for each query."""
    typer.echo(f"{spec.name} over {source} = {layout.n_tokens:,} tokens")
    wide = max(len(query.name) for query in queries)
    for query, view in zip(queries, views, strict=True):
        levels = [
            f"{view.pixels_kept(layout, level):,} pixels at level {level} ({len(view.kept[level - 1])} of "
            f"{-(-layout.n_tokens // spec.span(level)):,} tokens)"
            for level in range(spec.num_levels, 0, -1)
        ]
        typer.echo(f"  {query.name:<{wide}}  keeps {', '.join(levels)}; attends to {view.keys:,} keys")


def _size(height: int, width: int) -> str:
    return f"{width}\N{MULTIPLICATION SIGN}{height}"
