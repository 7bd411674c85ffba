"""What the emulator runs: a few passes that every run of the tests has, and more for `make emulate`."""

import hashlib
from functools import cache
from types import ModuleType
from typing import Any

from examples import GLUON, spec
from llsa_gen import Spec, emit, fuzz
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
from llsa_gen.store.loading import load_text


def load(chosen: Spec) -> ModuleType:
    """The module of a spec, by the templates as they are now."""
    plan = lower(chosen)
    text = emit.render(plan, schedules(plan))
    return load_text(chosen.name, hashlib.sha256(text.encode()).hexdigest(), text)


module_for = cache(load)
"""The same, made once."""


def case(name: str, n: int, dtype: fuzz.DType = "bfloat16", **more: Any) -> fuzz.Case:
    """A case of a spec of `examples.GLUON`."""
    return fuzz.Case(GLUON[name][0], n=n, dtype=dtype, **more)


def other(head_dim: int, levels: tuple[tuple[int, int], ...], n: int, **more: Any) -> fuzz.Case:
    """A case of a spec of its own."""
    options = {name: more.pop(name) for name in ("enrich", "reweight") if name in more}
    return fuzz.Case(spec(f"emulated_{head_dim}", head_dim, *levels, **options), n=n, dtype="bfloat16", **more)


# as few specs as show every kernel: to compile those of one takes five to ten seconds
CASES: dict[str, fuzz.Case] = {
    "partial": case("l2", 300, heads=2),
    "whole": case("l2", 512),
    "lists_globals_lengths": case("l2", 100, m=330, global_tokens=70, masked=True, kept="thinned", grad_lse=True),
    "float16": case("d72", 301, "float16"),
    "of_72_few": case("d72_l1", 100, heads=2, batch=2),
    "of_96": case("d96", 303),
    "of_128": case("d128", 256),
    "three_levels": case("d80_l3", 520),
    "gaps": case("gaps", 300),
    "wide": case("wide", 200),
    "wide_128": case("wide_128", 300, global_tokens=5),
}
MORE: dict[str, fuzz.Case] = {
    "one_token": case("d96", 1),
    "below_a_block": case("d72", 15, heads=2),
    "float16_whole": case("d128", 512, "float16", heads=2),
    "float16_gaps": case("gaps_l3", 300, "float16"),
    "three_levels_64": case("l3", 256),
    "three_levels_72": other(72, ((16, 8), (4, 16), (4, 16)), 511, m=77),
    "three_levels_88": other(88, ((16, 8), (4, 16), (4, 16)), 300),
    "three_levels_96": other(96, ((16, 8), (4, 16), (4, 16)), 257, global_tokens=70),
    "three_levels_128": case("d128_l3", 300),
    "gaps_88": case("d88_gaps", 801),
    "gaps_120": case("d120_gaps", 801, m=500),
    "long_lists_72": other(72, ((16, 40), (16, 2)), 333),
    "short_lists": case("short_lists", 500),
    "half_a_tile": case("half_a_tile", 500),
    "odd_children": case("odd_children", 600),
    "keeper": case("l3_keeper", 600),
    "short_heads": case("l1_40", 300),
    "popular": case("d72_l1", 2000, popular=True),
    "popular_in_three": case("d80_l3", 2050, popular=True),
    "wide_one_token": case("wide", 1),
    "wide_72": case("wide_72", 300),
    "wide_96": case("wide_96", 300),
    "wide_192": other(72, ((192, 2),), 600),
    "wide_192_128": case("wide_l1", 400),
    "wide_two_levels": case("wide_l2", 700),
    "wide_many": case("wide_many", 700),
    "wide_short": case("wide_short", 700, m=65, global_tokens=5, masked=True),
}
"""Heads of 72 to 96 in two tiles and of 128, odd lengths, M unlike N, lists in parts, wide blocks of 64 to 192."""
