"""`llsa-gen new --tokens`: the paper's levels, as many keys as were asked for, the reason in the file."""

import re
from pathlib import Path

import pytest
from commands import call
from hypothesis import given
from hypothesis import strategies as st

from llsa_gen import load
from llsa_gen.errors import LlsaGenError
from llsa_gen.plan import lower
from llsa_gen.plan.chosen import choose, keys_of, levels_for, pays_from
from llsa_gen.plan.cost import Cost, dense, evaluate
from llsa_gen.schedule import schedule, target
from llsa_gen.spec import schema_text, starter


def cost_of(n: int, keys: int | None = None, block: int = 16) -> Cost:
    plan = lower(choose("chosen", n, 16, keys, block))
    return Cost(plan, schedule(plan, target("cuda:90"), 2))


@pytest.mark.parametrize(
    ("n", "block", "levels"),
    [(32, 16, 1), (4095, 16, 1), (4096, 16, 2), (65_535, 16, 2), (65_536, 16, 3), (2**20, 16, 4), (2**30, 16, 6),
     (2**30, 2, 6), (512, 256, 1), (256**3, 256, 2), (124, 5, 1), (125, 5, 2), (7**6, 7, 5)],
)  # fmt: skip
def test_levels_are_those_of_the_paper(n: int, block: int, levels: int) -> None:
    assert levels_for(n, block) == levels == choose("chosen", n, 16, block=block).num_levels


@given(st.integers(32, 2**28), st.integers(2, 256), st.integers(1, 512))
def test_keys_are_counted_as_by_the_cost_model(n: int, block: int, topk: int) -> None:
    n = max(n, 2 * block)
    spec = choose("chosen", n, 16, block=block)
    spec = spec.model_copy(update={"levels": tuple(x.model_copy(update={"topk": topk}) for x in spec.levels)})
    plan = lower(spec)
    cost = Cost(plan, schedule(plan, target("cuda:90"), 2))
    assert evaluate(cost.keys, n) == keys_of(n, block, spec.num_levels, topk)


@given(st.integers(64, 2**28), st.integers(64, 3000))
def test_the_topk_is_the_one_nearest_to_the_keys(n: int, keys: int) -> None:
    try:
        spec = choose("chosen", n, 16, keys)
    except LlsaGenError as error:
        least, most = map(int, re.findall(r"expected (\d+) to (\d+)", str(error))[0])
        assert not least <= keys <= most
        return
    off = [abs(keys_of(n, 16, spec.num_levels, topk) - keys) for topk in range(1, 513)]
    assert off[spec.levels[0].topk - 1] == min(off)


@pytest.mark.parametrize("n", [32, 4096, 100_000])
def test_it_pays_from_there_on(n: int) -> None:
    cost = cost_of(n)
    there = pays_from(cost)
    assert there is not None
    ours, whole = cost.totals.flops, dense(16).flops
    assert evaluate(ours, there) < evaluate(whole, there)
    assert evaluate(ours, there - 1) >= evaluate(whole, there - 1)


def test_the_file_says_why_and_what_it_costs(place: Path) -> None:
    result = call("new mine --tokens 65536 --head-dim 64")
    assert (result.code, result.err) == (0, "")
    spec, data = load("mine.yaml"), call("explain mine.yaml -n 65536 --json").json
    assert (spec.name, spec.head_dim, spec.num_levels) == ("mine", 64, 3)
    assert {(level.block, level.topk) for level in spec.levels} == {(16, 8)}
    text = Path("mine.yaml").read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    told = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for said in (
        "For N = 65,536 tokens: 3 levels, the paper's floor(log_B N - 1) for blocks of 16",
        "the last one then has 16 tokens", "topk is 8", f"attends to {data['keys']['most']} keys at most",
        f"takes {data['dense_over_cost']['forward_flops']:,.0f} times as many FLOPs forward",
        f"beyond {data['growth']['quadratic_beyond']:,}", "add a level", "fewer from about 184 tokens on",
        "one for every 16 * 16 * 16 = 4096", "llsa-gen explain mine.yaml -n 65536",
    ):  # fmt: skip
        assert said in told
        assert said in " ".join(result.out.split()) or "one for every" in said
    assert (place / "schema.json").read_text() == schema_text()


def test_about_as_many_keys_as_were_asked_for(place: Path) -> None:
    assert call("new mine -n 1048576 --head-dim 128 --keys 1000").code == 0
    data = call("explain mine.yaml -n 1048576 --json").json
    assert abs(data["keys"]["most"] - 1000) <= 32
    assert "for about 1,000 keys a query" in Path("mine.yaml").read_text().replace("\n# ", " ")


def test_without_a_length_nothing_is_chosen(place: Path) -> None:
    result = call("new mine")
    assert Path("mine.yaml").read_text() == starter("mine")
    assert result.out == "mine.yaml: edit it, then: llsa-gen explain mine.yaml -n 65536\n"
    assert "one for every 16 * 16 = 256)" in starter("mine") and "For N =" not in starter("mine")


def test_where_it_costs_more_than_it_saves_it_says_so(place: Path) -> None:
    result = call("new mine -n 1048576 --head-dim 16 --block 2")
    assert result.code == 0 and "use wider blocks" in result.err
    assert "take wider blocks there" in Path("mine.yaml").read_text().replace("\n# ", " ")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ("-n 31 --head-dim 64", 1, "tokens: expected 32 to 1073741824, from two blocks of 16 on, got 31"),
        ("-n 511 --head-dim 64 --block 256", 1, "tokens: expected 512 to 1073741824, from two blocks of 256 on"),
        ("-n 65536 --head-dim 64 --keys 63", 1, "keys: expected 64 to 12560 of 65536 tokens, 64 being one block"),
        ("-n 65536 --head-dim 64 --keys 12561", 1, "keys: expected 64 to 12560 of 65536 tokens"),
        ("-n 65536 --head-dim 64 --keys 0", 2, "'--keys': expected an integer >= 1, got 0"),
        ("-n 65536 --head-dim 7", 2, "expected an integer >= 8 and <= 256, got 7"),
        ("-n 65536 --head-dim 257", 2, "expected an integer >= 8 and <= 256, got 257"),
        ("-n 65536 --head-dim 64 --block 1", 2, "expected an integer >= 2 and <= 256, got 1"),
        ("-n 65536", 2, "expected --head-dim too"),
        ("--head-dim 64", 2, "expected --tokens too"),
        ("--keys 100", 2, "expected --tokens too"),
        ("--block 8", 2, "expected --tokens too"),
    ],
)
def test_what_is_wrong_is_one_error_and_writes_nothing(options: str, code: int, said: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    result = call(f"new mine {options}")
    assert (result.code, result.out) == (code, "")
    assert said in " ".join(result.err.replace("│", " ").split())
    assert sorted(place.rglob("*")) == before


def test_a_bad_name_or_a_file_that_is_there_is_told_first(place: Path) -> None:
    assert call("new 3x -n 65536 --head-dim 64").err.startswith("NAME: expected a")
    (place / "mine.yaml").write_text("precious")
    result = call("new mine -n 65536 --head-dim 64")
    assert (result.code, result.out, result.err) == (1, "", "mine.yaml: exists already; --force replaces it\n")
    assert (place / "mine.yaml").read_text() == "precious"
