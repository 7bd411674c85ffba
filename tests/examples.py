"""Specs that, together, take every branch of the templates; small enough for Triton's interpreter."""

from collections.abc import Iterator
from itertools import chain

from llsa_gen import Level, Spec
from llsa_gen.compiler import Attention
from llsa_gen.schedule import Schedule


def spec(name: str, head_dim: int, *levels: tuple[int, int], **fields: object) -> Spec:
    """A spec from (block, topk) pairs, finest first."""
    made = tuple(Level(block=block, topk=topk) for block, topk in levels)
    return Spec(name=name, head_dim=head_dim, levels=made, **fields)  # type: ignore[arg-type]


def every_schedule(attention: Attention) -> Iterator[Schedule]:
    """The tile shapes of every target and element, as the module has them: what is changed there is used."""
    return chain.from_iterable(by_size.values() for by_size in attention.module.SCHEDULES.values())


BRANCHES = (
    # one level: a coarsest level that is the finest, all of it attended, or none
    spec("l1", 16, (4, 3)),
    spec("l1_none", 20, (5, 2), enrich="none"),
    spec("l1_unweighted", 8, (7, 40), reweight=False),
    spec("l1_wide", 32, (70, 1)),  # blocks of more than 32: one program a block, not several blocks a program
    spec("l1_dit", 72, (16, 2)),  # rows of nine times 16 bytes
    spec("l1_narrow", 16, (31, 2)),  # as wide as blocks that are grouped can be: two of 32 rows fill a tile
    spec("l1_loose", 16, (40, 2)),  # wider, and yet narrower than the tile that each has for itself
    spec("l1_wide_none", 16, (66, 2), enrich="none"),
    spec("l1_whole_none", 16, (64, 2), enrich="none"),  # lists that fill their tiles
    # two levels: both enriched, one, the other, none
    spec("l2", 80, (12, 3), (5, 2)),
    spec("l2_fine", 16, (4, 2), (3, 2), enrich=(1,)),
    spec("l2_top", 24, (3, 4), (4, 3), enrich=(2,)),
    spec("l2_none", 16, (4, 2), (2, 5), enrich="none"),
    spec("l2_unweighted", 16, (6, 2), (2, 3), reweight=False),
    spec("l2_wide", 16, (64, 2), (2, 33)),  # and so many kept that keys are not taken keeper by keeper
    spec("l2_wide_above", 16, (2, 3), (30, 1)),
    # keys of a coarse level keeper by keeper, with the top's share and without; three splits of a keeper's queries
    spec("l2_keepers", 16, (24, 2), (3, 1)),
    spec("l2_keepers_many", 64, (32, 2), (5, 3)),  # several tiles of children, the last one short
    spec("l2_keepers_alone", 16, (40, 2), (3, 1), enrich=(1,), reweight=False),
    # a K too large to sort for, at the top and below it
    spec("l1_large", 8, (2, 65)),
    spec("l2_large", 8, (2, 65), (70, 1)),
    # three: the pyramid goes on after its first two levels; levels between others left out
    spec("l3", 16, (4, 2), (2, 3), (3, 2)),
    spec("l3_outer", 16, (3, 2), (2, 2), (3, 2), enrich=(1, 3)),
    spec("l3_middle", 16, (2, 2), (3, 2), (2, 3), enrich=(2,)),
    spec("l3_keepers", 16, (32, 2), (2, 1), (3, 1), enrich=(1, 3)),  # what is handed down skips a level
    spec("l3_between", 16, (32, 2), (2, 2), (2, 33)),  # keeper by keeper below a level by lists
    spec("l3_none", 16, (2, 3), (2, 2), (2, 2), enrich="none"),
    # four: two levels in the second step of the pyramid
    spec("l4", 16, (2, 3), (3, 2), (2, 2), (2, 2)),
    spec("l4_some", 16, (3, 2), (2, 2), (2, 2), (2, 1), enrich=(2, 4)),
    # five: a third step, so that sums are handed on twice
    spec("l5", 8, (2, 2), (2, 2), (2, 2), (2, 2), (2, 1), enrich=(1, 5)),
)

GLUON: dict[str, tuple[Spec, tuple[int, ...]]] = {
    # tiles of the coarsest level that are not full, and full ones with one that is not
    "l1": (spec("gluon_l1", 64, (16, 3)), (80, 1136, 4096, 1, 17, 1009, 1025)),
    "l1_40": (spec("gluon_l1_40", 40, (16, 8), reweight=False), (64, 1040, 1051)),
    "l2": (spec("gluon_l2", 64, (16, 8), (16, 8)), (2048, 1024, 65 * 256, 1, 300, 2047, 65 * 256 + 17)),
    "l2_8": (spec("gluon_l2_8", 64, (16, 5), (8, 8)), (9 * 128, 70 * 128, 70 * 128 - 1)),
    "l2_32": (spec("gluon_l2_32", 48, (16, 9), (32, 2)), (3 * 512, 3 * 512 + 5)),
    "l2_64": (spec("gluon_l2_64", 64, (16, 4), (64, 3), reweight=False), (2 * 1024, 2 * 1024 + 16)),
    "l3": (spec("gluon_l3", 64, (16, 8), (4, 16), (4, 16)), (20 * 256, 20 * 256 - 100)),
    "l3_keeper": (spec("gluon_l3_keeper", 56, (16, 2), (16, 4), (2, 32)), (40 * 512, 40 * 512 + 257)),
    "l4": (spec("gluon_l4", 64, (16, 8), (4, 16), (4, 16), (4, 16)), (17 * 1024, 17 * 1024 + 1023)),
    # lists with gaps, up to 40 of 32 or fewer; lists whose children do not fill tiles of 64 keys
    "gaps": (spec("gluon_gaps", 64, (16, 40), (16, 2)), (4096, 4097)),
    "gaps_l3": (spec("gluon_gaps_l3", 64, (16, 9), (4, 8), (4, 1)), (3 * 256, 3 * 256 + 33)),
    "short_lists": (spec("gluon_short", 64, (16, 8), (16, 3)), (4096, 4000)),
    "half_a_tile": (spec("gluon_half", 64, (16, 8), (16, 6)), (4096, 4081)),
    # rows of 256 bytes, of which a head of 120 leaves some empty
    "d128": (spec("gluon_d128", 128, (16, 8), (16, 8)), (2048, 1024, 65 * 256, 1, 300, 2047, 65 * 256 + 17)),
    "d128_l1": (spec("gluon_d128_l1", 128, (16, 3)), (80, 1136, 1009, 17)),
    "d128_l3": (spec("gluon_d128_l3", 128, (16, 8), (4, 16), (4, 16)), (20 * 256, 20 * 256 - 100)),
    # and of which heads of 72 to 96 come in two tiles, of 64 columns and of 16 or 32
    "d72": (spec("gluon_d72", 72, (16, 8), (16, 8)), (2048, 1024, 65 * 256, 2047, 300)),
    "d72_l1": (spec("gluon_d72_l1", 72, (16, 3), reweight=False), (80, 1136, 1009, 1, 17)),
    "d80_l3": (spec("gluon_d80_l3", 80, (16, 8), (4, 16), (4, 16)), (20 * 256, 20 * 256 - 100)),
    "d88_gaps": (spec("gluon_d88", 88, (16, 9), (4, 8), (4, 1)), (3 * 256, 3 * 256 + 33)),
    "d96": (spec("gluon_d96", 96, (16, 8), (16, 8)), (2048, 1024, 65 * 256, 1, 300, 2047)),
    "d120_gaps": (spec("gluon_d120", 120, (16, 9), (4, 8), (4, 1)), (3 * 256, 3 * 256 + 33)),
    # wide blocks: all 64 queries of a program see the same tokens
    "wide": (spec("gluon_wide", 128, (64, 5), enrich="none"), (64 * 21, 64 * 21 + 17, 1, 64, 63)),
    "wide_128": (spec("gluon_wide_128", 128, (128, 3), enrich="none"), (128 * 9, 128 * 9 + 70, 128 * 9 + 1, 100)),
    "wide_many": (spec("gluon_wide_many", 72, (64, 65), (4, 40), enrich="none"), (64 * 150, 64 * 150 + 33)),
    "wide_72": (spec("gluon_wide_72", 72, (64, 4), (64, 3)), (64 * 64 * 2, 64 * 64 * 2 + 1, 64 * 64 - 77, 1)),
    "wide_96": (spec("gluon_wide_96", 96, (128, 3)), (128 * 65, 128 * 9 + 70)),
    "wide_l1": (spec("gluon_wide_l1", 128, (192, 3)), (192 * 70, 192 * 10 + 191)),
    "wide_l2": (spec("gluon_wide_l2", 128, (64, 4), (64, 3)), (64 * 64 * 5, 64 * 64 * 5 + 1, 64 * 64 * 3 - 77)),
    "wide_short": (spec("gluon_wide_short", 128, (64, 9), (4, 2), reweight=False), (64 * 40, 64 * 40 + 100)),
    "odd_children": (spec("gluon_odd", 64, (16, 7), (12, 7), (5, 3)), (960 * 4, 3823)),
}
"""Specs whose attention is in Gluon on an H100, and lengths; where lists can fill tiles, the first needs no mask."""

_LENGTHS = (("l1_40", 0), ("l1_40", 1), ("l2_32", 0), ("l2_32", 1), ("l3", 0), ("l3", 1), ("gaps_l3", 0), ("l4", 0))
_LENGTHS += ("d128_l3", 1), ("wide_128", 0), ("wide_l2", 1), ("d72", 0), ("d72", 1), ("d96", 1)
GLUON_COMPILED = [(name, more, dtype) for name, more in _LENGTHS for dtype in ("bfloat16", "float16")]
"""Which of them are compiled: tokens beyond the first of their lengths, and dtype."""

EXTREMES = {
    "widest": {"head_dim": 256, "levels": [{"block": 256, "topk": 4}, {"block": 2, "topk": 1}]},
    "deepest": {"head_dim": 8, "levels": [{"block": 2, "topk": 1}] * 6},
    "most_kept": {"head_dim": 16, "levels": [{"block": 2, "topk": 512}, {"block": 256, "topk": 512}]},
}
"""The corners of what a spec may say."""
