"""Whether a spec fits a model, without training it: what its selection keeps of dense attention, on a real input.

The model is run once more on its last input, and each sparse call is compared with dense attention on a few queries.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from llsa_gen import order
from llsa_gen.integrations.grids import main_input
from llsa_gen.integrations.placed import Run
from llsa_gen.integrations.report import Ledger, Quality

if TYPE_CHECKING:
    from llsa_gen.look.pixels import Layout

__all__ = ["SAMPLED", "Probed", "draw", "judged", "of_run"]

SAMPLED = 64
"""Queries of each head that are compared."""
QUERIES = (("one third in", 1 / 3, 1 / 3), ("the middle", 0.5, 0.5), ("two thirds in", 2 / 3, 2 / 3))


class Probed(Protocol):
    """A router: it has the last input, shows its sparse calls, and counts."""

    last: dict[str, Any] | None
    probe: Callable[[str, Run], None] | None
    ledger: Ledger


def of_run(run: Run, sampled: int = SAMPLED) -> Quality:
    """How well a call does on queries that are spread evenly over the picture, of its first batch entry.

    In float32, with 4 bytes for each of H * sampled * (N + T) pairs.
    """
    spec, tokens = run.attention.spec, run.q.shape[2]
    rows = torch.linspace(0, tokens - 1, min(sampled, tokens), device=run.q.device).long().unique()
    q, k, v = run.q[0, :, rows].float(), run.k[0].float(), run.v[0].float()
    span = spec.span(1)
    blocks = run.attention.select(run.q[:1], run.k[:1])[0][0][:, rows // span].long()  # [H, rows, width], -1 for none
    kept = torch.zeros(*blocks.shape[:2], -(-tokens // span) + 1, dtype=torch.bool, device=q.device)
    kept = kept.scatter_(2, blocks % kept.shape[2], True)[..., :-1]  # -1 falls into the last, which is cut off
    seen = kept.repeat_interleave(span, 2)[..., :tokens]
    if run.k_global is not None and run.v_global is not None:
        k, v = torch.cat([k, run.k_global[0].float()], 1), torch.cat([v, run.v_global[0].float()], 1)
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], run.k_global.shape[2])], 2)
    logits = q @ k.mT * (run.scale if run.scale is not None else spec.head_dim**-0.5)
    if run.global_mask is not None:
        logits[..., tokens:] = logits[..., tokens:].masked_fill(~run.global_mask[0], float("-inf"))
    weights = logits.softmax(-1)
    dense = weights @ v
    error = (run.o[0, :, rows].float() - dense).norm() / dense.norm()
    return Quality(float((weights * seen).sum(-1).mean()), float(error))


def judged(model: nn.Module, router: Probed) -> dict[str, Quality]:
    """The quality of each sparse layer on the model's last input; the mean over its calls there."""
    found: dict[str, list[Quality]] = {}
    _again(model, router, lambda name, run: found.setdefault(name, []).append(of_run(run)))
    return {
        name: Quality(*(sum(values) / len(several) for values in zip(*several, strict=True)))
        for name, several in found.items()
    }


def draw(model: nn.Module, router: Probed, file: str | os.PathLike[str] | BinaryIO, layer: str | None) -> str:
    """Write a PNG of what three queries of a layer's first head keep, over the latent. Returns what was drawn."""
    from pathlib import Path

    from llsa_gen.look.drawing import draw as draw_card
    from llsa_gen.look.views import Query, view

    runs: dict[str, Run] = {}

    def keep(name: str, run: Run) -> None:
        runs.setdefault(name, run)

    latent = main_input(_again(model, router, keep))
    if not runs:
        raise ValueError("picture: expected a model whose last input had sparse layers, got none that was sparse")
    names = list(runs)
    name = names[len(names) // 2] if layer is None else layer
    if name not in runs:
        raise ValueError(f"layer: expected one that is sparse, such as {names[0]}, got {layer!r}")
    run = runs[name]
    if len(run.place.grid) != 2:
        raise ValueError(f"picture: expected a layer over a grid (height, width), got one over {run.place.grid}")
    layout = _layout(run)
    queries = [Query(*query) for query in QUERIES]
    kept = [lists.cpu() for lists in run.attention.select(run.q[:1], run.k[:1])]
    views = [view(run.attention.spec, kept, layout, 0, query.token(layout)) for query in queries]
    target = file if hasattr(file, "write") else Path(os.fspath(file))  # type: ignore[arg-type]
    draw_card(target, run.attention.spec, layout, _colours(latent, layout), queries, views)  # type: ignore[arg-type]
    return f"{name}, over {layout.height} × {layout.width} patches"


def _again(model: nn.Module, router: Probed, probe: Callable[[str, Run], None]) -> Mapping[str, Any]:
    """Runs the model on its last input, which it returns; nothing is counted, no random number of others is drawn."""
    if router.last is None:
        raise ValueError("report: expected a model that has run since use(model, spec), uncompiled, got no last input")
    arguments, before, ledger = router.last, router.probe, router.ledger
    devices = [x.device for x in model.parameters() if x.device.type == "cuda"][:1]
    router.probe = probe
    counts = ledger.hold()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model(**arguments)
    finally:
        router.probe = before
        ledger.restore(counts)
    return arguments


def _layout(run: Run) -> "Layout":
    from llsa_gen.look.pixels import Layout

    spec, (height, width) = run.attention.spec, run.place.grid
    spans = tuple(spec.span(level) for level in range(spec.num_levels + 1))
    return Layout(height, width, spans, order.grid((height, width), spec, device="cpu"))


def _colours(latent: Any, layout: "Layout") -> Tensor:
    """The latent of the first batch entry as [3, height, width] in 0 to 1: its first three channels, each stretched."""
    x = latent[0]
    x = x[0] if isinstance(x, list | tuple) else x
    x = x.detach().float().cpu()
    if x.ndim == 2:  # packed, [N, C]
        x = x.mT.unflatten(1, (layout.height, layout.width))
    while x.ndim > 3:  # of one frame
        x = x.squeeze(next(axis for axis, size in enumerate(x.shape) if size == 1))
    x = interpolate(x[None, :3], (layout.height, layout.width), mode="area")[0]
    x = x if len(x) == 3 else x[:1].expand(3, -1, -1)
    low, high = x.flatten(1).min(1).values[:, None, None], x.flatten(1).max(1).values[:, None, None]
    return (x - low) / (high - low).clamp_min(1e-6)
