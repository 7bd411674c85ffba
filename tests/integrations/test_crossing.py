"""From which length on the operator is used: the search, which asks no clock here, and what is kept of it."""

import json
from pathlib import Path

import pytest
import torch

import llsa_gen
from llsa_gen.integrations import crossing
from llsa_gen.integrations.crossing import NEVER, Least

SPEC = {"name": "crossed", "head_dim": 8, "levels": [{"block": 4, "topk": 2}]}


@pytest.mark.parametrize("true", [1, 512, 513, 700, 1024, 1500, 3000, 4095, 8192])
def test_the_search_ends_at_or_just_above_the_crossing(true: int) -> None:
    asked: list[int] = []

    def faster(length: int) -> bool:
        asked.append(length)
        return length >= true

    found = crossing.crossing(faster, 512, 8192)
    assert found >= true and faster(found)
    assert found - true < max(512, true) / 4 or found == 512
    assert max(asked[:-1]) <= max(512, 2 * true), "it does not try what takes far longer"


def test_a_device_on_which_dense_is_faster_throughout() -> None:
    assert crossing.crossing(lambda length: False, 512, 8192) == NEVER


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLSA_GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossing, "_found", {})
    return tmp_path / "crossings.json"


def test_it_is_measured_once_and_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, asked = llsa_gen.compile(SPEC), []

    def faster(attention: object, length: int, device: torch.device, dtype: torch.dtype) -> bool:
        asked.append(length)
        return length >= 1024

    monkeypatch.setattr(crossing, "_is_faster", faster)
    cpu = torch.device("cpu")
    assert crossing.measured(operator, cpu, torch.float32) == 1024
    count = len(asked)
    monkeypatch.setattr(crossing, "_found", {})  # another process
    assert crossing.measured(operator, cpu, torch.float32) == 1024 and len(asked) == count
    crossing.measured(operator, cpu, torch.bfloat16)
    assert len(asked) > count and len(json.loads(store.read_text())) == 2
    store.write_text("no JSON")
    monkeypatch.setattr(crossing, "_found", {})
    assert crossing.known(operator, cpu, torch.float32) is None


def test_measuring_draws_no_random_number_of_the_model() -> None:
    operator = llsa_gen.compile(SPEC)
    torch.manual_seed(0)
    crossing._is_faster(operator, 64, torch.device("cpu"), torch.float32)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


def test_the_fewest_tokens_are_said_or_measured(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, q = llsa_gen.compile(SPEC), torch.empty(1, 1, 4, 8)
    assert Least(7)(operator, q) == 7 and "7 picture tokens" in str(Least(7))
    monkeypatch.setattr(crossing, "_is_faster", lambda *args: args[1] >= 2048)
    least = Least(None)
    assert str(least) == "" and least(operator, q) == 2048
    assert (
        str(least) == "sparse attention is faster than dense from 2,048 picture tokens on (cpu, float32, spec crossed)"
    )
    with torch.autocast("cpu", torch.bfloat16):
        least(operator, q)
    assert "cpu, bfloat16" in str(least)
    monkeypatch.setattr(crossing, "_is_faster", lambda *args: False)
    assert Least(None)(operator, q.half()) == "dense attention is faster on this device"
    assert Least(None)(operator, q.to("meta")) == "not on the CPU or a GPU, but on meta"
