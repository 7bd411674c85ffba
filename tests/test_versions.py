"""Other versions of Triton: what `tests/versions.py` runs in each, with tests elsewhere, and what it makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import overlay
import pytest
import triton
import version_rows
from version_table import errors, flags, markdown, write

ROOT = Path(__file__).resolve().parents[1]

IN_ORDER = """
import torch, llsa_gen
q, k, v = torch.randn(3, 1, 2, 50, 16).requires_grad_().unbind(0)
levels = [{"block": 4, "topk": 2}, {"block": 3, "topk": 2}]
attention = llsa_gen.compile({"name": "in_order", "head_dim": 16, "levels": levels})
attention(q, k, v).sum().backward()
print("done")
"""


def python(*words: str, **variables: str) -> tuple[str, str]:
    """What a process prints and what it complains of."""
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *words], env=environment | {"PYTHONPATH": paths} | variables,
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# ---- in every version -------------------------------------------------------------------------------------------


@pytest.mark.versions
def test_the_version_is_the_one_that_was_asked_for() -> None:
    assert triton.__version__ == os.environ.get("LLSA_GEN_TEST_TRITON", triton.__version__)


@pytest.mark.versions
@pytest.mark.parametrize("words", [("-c", IN_ORDER), ("-m", "llsa_gen", "build", "spec/topk_l1.yaml")])
def test_it_runs_and_says_nothing_on_the_side(words: tuple[str, ...], tmp_path: Path) -> None:
    said, complained = python(*words, LLSA_GEN_CACHE_DIR=str(tmp_path))
    assert said and complained == ""


# ---- which versions ---------------------------------------------------------------------------------------------


def test_of_each_minor_version_the_last_is_taken_and_none_that_is_too_old() -> None:
    assert overlay.choose(["3.10.0", "3.9.1", "3.9.0", "3.7.0", "3.7.1", "3.6.0", "3.5.1"]) == [
        "3.6.0",
        "3.7.1",
        "3.9.1",
        "3.10.0",
    ]


# ---- figures ----------------------------------------------------------------------------------------------------

SASS = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0 LDGSTS.E.BYPASS.LTC128B.128 [R17], desc[UR8][R4.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.64 [R17], desc[UR8][R4.64] ;
        /*0030*/              @!UP1 UTMALDG.2D [UR4], [UR6] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   IMMA.16816.S8.S8 R4, R8, R12, R4 ;
"""


def test_instructions_are_counted_by_kind() -> None:
    assert version_rows.counted(SASS) == {"hgmma": 1, "hmma": 2, "copies": 2}


def row(**figures: int) -> dict[str, int]:
    usual = {"registers": 100, "spilled_bytes": 0, "shared_memory": 1024, "instructions": 1000}
    return {**usual, "hgmma": 0, "hmma": 8, "copies": 4} | figures


def versions(*rows: dict[str, Any]) -> dict[str, Any]:
    names = ("3.9.0", "3.10.0", "3.11.0")  # which are not in the order of their letters
    return {
        name: {"interpreter": "7 passed", "passed": True, "kernels": {"cuda:90/x": {"a_kernel": one}}}
        for name, one in zip(names, rows, strict=False)
    }


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"instructions": 1151}, "instructions 1,000 to 1,151"),
        ({"registers": 116}, "registers 100 to 116"),
        ({"spilled_bytes": 4}, "spilled bytes 0 to 4"),
        ({"hgmma": 4, "hmma": 0}, "multiplies with HGMMA in place of HMMA"),
        ({"copies": 3}, "asynchronous copies 4 to 3"),
    ],
)
def test_what_is_worse_than_in_the_version_before_is_flagged(change: dict[str, int], flag: str) -> None:
    assert flags(versions(row(), row(**change), row(**change))) == [f"3.9.0 to 3.10.0: cuda:90/x/a_kernel: {flag}"]
    assert flags(versions(row(instructions=1150, registers=115, spilled_bytes=8), row())) == []
    assert flags(versions(row(), row(instructions=1150, registers=115, copies=9, shared_memory=9999))) == []


def test_what_no_longer_compiles_is_flagged_and_counted() -> None:
    made = versions(row(), {"error": "no such layout"}, row())
    assert flags(made) == ["3.9.0 to 3.10.0: cuda:90/x/a_kernel: does not compile any more: no such layout"]
    assert errors(made["3.10.0"]["kernels"]) == ["cuda:90/x/a_kernel: no such layout"]
    assert "| a | 100 / error / 100 |" in markdown(made) and "| 3.10.0 | 7 passed | 1 |" in markdown(made)


def test_the_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    content = {"kernels": "0" * 64, "versions": versions(row(), row(instructions=2000))}
    write(tmp_path / "table.json", content)
    assert json.loads((tmp_path / "table.json").read_text()) == content
    told = (tmp_path / "table.md").read_text()
    assert "| a | 100 | 0 | 1,024 | 1,000 / 2,000 | HMMA 8 | 4 |" in told
