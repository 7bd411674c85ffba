"""Explain: what a spec costs at a length, as plain data and as the tables that `llsa-gen explain` prints of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llsa_gen.errors import LlsaGenError
from llsa_gen.plan import Kernel, Plan, lower
from llsa_gen.plan.cost import BYTES, DENSE_BACKWARD_PRODUCTS, FORWARD_PRODUCTS, Cost, Pass, Totals, evaluate
from llsa_gen.plan.growth import growth, with_another_level
from llsa_gen.plan.sizes import HEADS, KV_HEADS, M, N
from llsa_gen.plan.units import counted, human_bytes, human_flops
from llsa_gen.schedule import Choice, Target, choices, schedule, target
from llsa_gen.spec import Spec

__all__ = ["explain", "plan_tables", "schedule_data", "tables"]

TARGET = "cuda:90"
"""Whose tile shapes are used: how large some scratch buffers are, and what is moved, depends on them."""

Data = dict[str, Any]


# ---- as data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The lengths of keys and of queries, and B*H."""

    n_tokens: int
    m_tokens: int
    heads: int = 1

    def of(self, expr: sympy.Expr) -> int:
        """The value of an expression of the cost model."""
        return evaluate(expr, self.n_tokens, self.heads, self.m_tokens)


def explain(spec: Spec, n_tokens: int, heads: int, dtype: str, m_tokens: int | None = None) -> Data:
    """All that is known about the cost of a spec at a length, for `heads` heads (B*H), as data that json can write.

    `m_tokens` queries, as many as keys unless given. FLOPs and bytes are counted as `llsa_gen.plan.cost` says. Raises
    LlsaGenError for a length that the operator refuses.
    """
    plan = lower(spec)
    at = sizes(plan, n_tokens, heads, m_tokens)
    cost = _cost(plan, target(TARGET), dtype)
    grows = growth(cost)
    sparse, full = _totals(cost.totals, at), _totals(dense(spec.head_dim, BYTES[dtype]), at)
    return {
        "spec": spec.name,
        "n_tokens": n_tokens,
        "m_tokens": at.m_tokens,
        "max_tokens": plan.max_tokens,
        "heads": heads,
        "head_dim": spec.head_dim,
        "dtype": dtype,
        "levels": [_level(cost, level, at) for level in (*cost.plan.levels[::-1], 0)],
        "keys": {"most": at.of(cost.keys), "exact": cost.exact(n_tokens)},
        "cost": sparse,
        "dense": full,
        "dense_over_cost": {name: full[name] / sparse[name] for name in sparse if sparse[name]},
        "growth": {
            "text": str(grows),
            "exponent": grows.exponent,
            "level": grows.level,
            "quadratic_beyond": grows.beyond,
            "with_more_levels": grows.with_levels,
        },
        "warning": _warning(cost, at),
    }


def sizes(plan: Plan, n_tokens: int, heads: int, m_tokens: int | None) -> Sizes:
    """The sizes that are asked for. Raises LlsaGenError for a length that the operator refuses."""
    longest = plan.max_tokens
    for name, what, length in (("n", "tokens", n_tokens), ("m", "queries", m_tokens)):
        if length is not None and not 1 <= length <= longest:
            takes = f"the most that {plan.spec.name} takes"
            raise LlsaGenError(f"{name}: expected 1 to {longest} {what}, {takes}, got {length}")
    return Sizes(n_tokens, n_tokens if m_tokens is None else m_tokens, heads)


def dense(head_dim: int, element: int) -> Totals:
    """Dense flash attention as `llsa_gen.plan.cost.dense` counts it, of M queries: 4 M N D FLOPs forward."""
    pairs = 2 * HEADS * M * N * head_dim
    of_queries, of_keys = HEADS * M * head_dim * element, KV_HEADS * N * head_dim * element
    row = HEADS * M * BYTES["float32"]
    # forward: q, k, v, o, lse; delta: o, do, delta; backward: q, k, v, do, lse, delta, dq, dk, dv
    return Totals(
        Pass(FORWARD_PRODUCTS * pairs, 2 * of_queries + 2 * of_keys + row, sympy.Integer(0)),
        Pass(DENSE_BACKWARD_PRODUCTS * pairs, (2 * of_queries + row) + (3 * of_queries + 4 * of_keys + 2 * row), row),
        row,
    )


def _cost(plan: Plan, goal: Target, dtype: str) -> Cost:
    return Cost(plan, schedule(plan, goal, BYTES[dtype]), dtype)


def _totals(totals: Totals, at: Sizes) -> dict[str, int]:
    totals_of = {
        "forward_flops": totals.forward.flops,
        "backward_flops": totals.backward.flops,
        "forward_bytes_moved": totals.forward.moved,
        "backward_bytes_moved": totals.backward.moved,
        "saved_bytes": totals.saved,
        "forward_scratch_bytes": totals.forward.scratch,
        "backward_scratch_bytes": totals.backward.scratch,
    }
    return {name: at.of(expr) for name, expr in totals_of.items()}


def _level(cost: Cost, level: int, at: Sizes) -> Data:
    plan, attended = cost.plan, level in cost.plan.attended
    candidates = at.of(cost.candidates(level))
    return {
        "level": level,
        "block": plan.block(level) if level else None,
        "span": plan.spec.span(level),
        "tokens": at.of(plan.key_tokens(level)),
        "topk": plan.topk(level) if level else None,
        "kept": at.of(plan.width(level)) if level else None,
        "candidates": candidates if level else None,
        "keys": candidates if attended else 0,
        "flops": at.of(cost.level_flops(level)),
    }


def _warning(cost: Cost, at: Sizes) -> str | None:
    """What to do where the quadratic part is more than half of the work."""
    spec, plan = cost.plan.spec, cost.plan
    share = at.of(cost.level_flops(plan.top)) / at.of(cost.totals.flops)
    if share <= 0.5:
        return None
    text = f"level {spec.num_levels} grows quadratically and takes {share:.0%} of the FLOPs at {at.n_tokens:,} tokens"
    longer = with_another_level(spec)
    if longer is None:
        return f"{text}; there are no more levels to add, so use wider blocks"
    other = _cost(lower(longer), target(TARGET), "bfloat16")
    less = at.of(cost.totals.flops) / at.of(other.totals.flops)
    if less <= 1:
        return f"{text}; with another level it would take as many"
    level = spec.levels[-1]
    return f"{text}; add a level: another {{block: {level.block}, topk: {level.topk}}} takes {less:.3g} times fewer"


# ---- as tables --------------------------------------------------------------------------------------------------


def _table(title: str, columns: Mapping[str, str]) -> Table:
    """An empty table; `columns` says how each is aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify="right" if justify == "right" else "left")
    return table


def tables(data: Data) -> RenderableType:
    """The tables of `explain`."""
    length = counted(data["n_tokens"], "token")
    if data["m_tokens"] != data["n_tokens"]:
        queries = "query" if data["m_tokens"] == 1 else "queries"
        length = f"{counted(data['n_tokens'], 'key')} and {data['m_tokens']:,} {queries}"
    head = (
        f"{data['spec']} at {length}, {counted(data['heads'], 'head')} of {data['head_dim']} (batch included), "
        f"{data['dtype']}"
    )
    parts: list[RenderableType] = [Text(f"{head}\n", style="bold"), _levels_table(data), Text(), _cost_table(data)]
    grows = data["growth"]
    beyond = f"The quadratic part is the larger one beyond {grows['quadratic_beyond']:,} tokens"
    if grows["quadratic_beyond"] > data["max_tokens"]:
        beyond = f"The quadratic part stays the smaller one up to {data['max_tokens']:,} tokens, the most there can be"
    parts.append(Text.assemble(("\nGrowth  ", "bold"), grows["text"], ", dense attention N^2"))
    parts.append(Text(f"        {beyond}"))
    parts.append(Text(f"        With a level more whenever N grows by a block: {grows['with_more_levels']}"))
    if data["warning"]:
        parts += [Text(), Text(f"warning: {data['warning']}", style="yellow")]
    return Group(*parts)


def _levels_table(data: Data) -> Table:
    columns = ["level", "block", "span", "tokens", "candidates", "kept", "keys a query sees", "FLOPs"]
    table = _table("Levels", dict.fromkeys(columns, "right"))
    whole = sum(level["flops"] for level in data["levels"])
    for level in data["levels"]:
        numbers = [level[name] for name in ("level", "block", "span", "tokens", "candidates", "kept", "keys")]
        table.add_row(
            *("-" if number is None else f"{number:,}" for number in numbers), f"{level['flops'] / whole:.1%}"
        )
    keys, n_tokens = data["keys"]["most"], data["n_tokens"]
    most = "" if data["keys"]["exact"] else "at most "
    table.add_section()
    table.add_row("all", "", "", "", "", "", f"{most}{keys:,}", "100.0%")
    table.add_row("dense", "", "", "", "", "", f"{n_tokens:,}", "")
    return table


def _cost_table(data: Data) -> Table:
    table = _table("Cost", {"": "left", data["spec"]: "right", "dense": "right", "dense / this": "right"})
    for name, value in data["cost"].items():
        human = human_flops if name.endswith("flops") else human_bytes
        ratio = data["dense_over_cost"].get(name)
        table.add_row(NAMES[name], human(value), human(data["dense"][name]), f"{ratio:,.3g}x" if ratio else "-")
    table.caption, table.caption_justify = "* beside q, k, v and o, which both save", "left"
    return table


NAMES = {
    "forward_flops": "FLOPs, forward",
    "backward_flops": "FLOPs, backward",
    "forward_bytes_moved": "bytes moved, forward",
    "backward_bytes_moved": "bytes moved, backward",
    "saved_bytes": "saved for the backward pass *",
    "forward_scratch_bytes": "scratch, forward",
    "backward_scratch_bytes": "scratch, backward",
}


def schedule_data(spec: Spec, dtype: str, goal: Target) -> Data:
    """The entry of every stage on a target: its tiles, the row or rule it is from, what did not fit."""
    stages = choices(lower(spec), goal, BYTES[dtype])
    return {"target": goal.name, "stages": {name: vars(one) for name, one in stages.items()}}


def plan_tables(
    spec: Spec, n_tokens: int, heads: int, dtype: str, goal: Target, m_tokens: int | None = None
) -> RenderableType:  # fmt: skip
    """The plan: the kernels in launch order, their tile shapes on a target, and the buffers, with sizes at a length."""
    plan = lower(spec)
    at = sizes(plan, n_tokens, heads, m_tokens)
    cost = _cost(plan, goal, dtype)
    stages = choices(plan, goal, BYTES[dtype])
    return Group(
        Text("Kernels, in launch order (tile shapes in capitals)", style="bold"),
        *_kernels("forward", plan.forward),
        *_kernels("in place of the selection, where lists are given", (plan.keep,)),
        *_kernels("backward", plan.backward),
        Text(f"\nTile shapes on {goal.name}, {dtype}", style="bold"),
        *_tiles(stages),
        Text(),
        _buffers(cost, goal, at),
    )


def _tiles(stages: Mapping[str, Choice]) -> Iterable[RenderableType]:
    width = max(map(len, stages))
    for stage, choice in stages.items():
        yield Text(f"  {stage:<{width}}  {', '.join(f'{name} {value}' for name, value in choice.entry.items())}")
        yield Text(f"  {'':<{width}}    from {choice.origin}", style="dim")
        for reason in choice.pruned:
            yield Text(f"  {'':<{width}}    not {reason}", style="dim")


def _kernels(name: str, kernels: Iterable[Kernel]) -> Iterable[RenderableType]:
    yield Text(f"\n  {name}", style="bold")
    for number, kernel in enumerate(kernels, start=1):
        yield Text(f"  {number:>2}  {kernel.name}: {kernel.computes}")
        yield Text(f"        grid    {kernel.programs}", style="dim")
        yield Text(f"        reads   {', '.join(kernel.reads)}", style="dim")
        yield Text(f"        writes  {', '.join(kernel.writes)}", style="dim")


def _buffers(cost: Cost, goal: Target, at: Sizes) -> Table:
    columns = {"name": "left", "shape": "left", "dtype": "left", "role": "left", "bytes": "right"}
    table = _table(f"Buffers, with these tile shapes on {goal.name}", columns)
    for buffer in cost.plan.buffers.values():
        size = human_bytes(at.of(cost.buffer_bytes(buffer)))
        shape = Text(f"[{', '.join(map(str, buffer.shape))}]")  # as a plain string it would be taken for markup
        table.add_row(buffer.name, shape, cost.dtype_of(buffer), buffer.role, size)
    return table
