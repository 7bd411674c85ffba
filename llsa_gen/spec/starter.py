"""The text of a new spec file, in which a comment explains every field: one to edit, or one that fits a length."""

import textwrap
from collections.abc import Iterable

from llsa_gen.spec.model import (
    MAX_BLOCK,
    MAX_DESCRIPTION,
    MAX_HEAD_DIM,
    MAX_LEVELS,
    MAX_NAME,
    MAX_TOPK,
    MIN_BLOCK,
    MIN_HEAD_DIM,
    MIN_TOPK,
    SCHEMA_LINE,
    Level,
    Spec,
)
from llsa_gen.spec.yaml import plain_yaml

__all__ = ["commented", "starter"]


def starter(name: str) -> str:
    """The text of a spec file called `name` in which a comment explains every field; `SpecError` for a bad name."""
    return commented(Spec(name=name, head_dim=64, levels=(Level(block=16, topk=8), Level(block=16, topk=8))))


def commented(spec: Spec, reasons: Iterable[str] = ()) -> str:
    """The text of a spec file in which a comment explains every field, and each of the reasons is one at `levels`.

    Of the spec it takes name, head dim and levels, whose blocks are of one size and whose Top-K are equal.
    """
    first, *others = spec.levels
    more = "".join(f"  - block: {level.block}\n    topk: {level.topk}\n" for level in others)
    because = "".join(f"#\n{_comment(reason)}" for reason in reasons)
    span = str(spec.span(spec.num_levels))
    spans = f"{' * '.join([str(first.block)] * spec.num_levels)} = {span}" if others else span
    few = "inputs cheaper: the last level is searched in full, so it should have few tokens"
    few = f"{few} (here: one for every {spans})."
    return f"""\
{SCHEMA_LINE}
#
# A log-linear sparse attention. Tokens are pooled, level by level, into a pyramid; each query picks the coarse tokens
# that score highest, looks inside those, and attends to few tokens instead of all.

# Names the generated module and its operator: a Python identifier of at most {MAX_NAME} ASCII characters that starts
# with a letter.
{plain_yaml({"name": spec.name}).strip()}

# What the spec is for, in your own words. Optional, at most {MAX_DESCRIPTION} characters.
description: ""

# The size of one head's vectors: q, k and v have the shape [batch, heads, tokens, head_dim].
# Any integer from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}.
head_dim: {spec.head_dim}

# 1 to {MAX_LEVELS} levels, the finest first. A token of the first level stands for `block` tokens, one of the second
# for `block` tokens of the first level, and so on; of each level a query keeps the `topk` best. More levels make longer
{_comment(few)}\
{because}\
levels:
  - block: {first.block} # any integer from {MIN_BLOCK} to {MAX_BLOCK}
    topk: {first.topk} # any integer from {MIN_TOPK} to {MAX_TOPK}; where there are fewer tokens, all are kept
{more}
# The levels whose coarse tokens a query also attends to, beside the fine tokens it found: all | none | a list such as
# [1, 2]. Without them (none), what was not picked is not seen at all. Optional, default all.
enrich: all

# Whether a coarse token weighs in the softmax as much as the tokens it stands for (true), or as one token (false).
# Optional, default true.
reweight: true
"""


def _comment(text: str) -> str:
    """A sentence or more as lines of a comment."""
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
