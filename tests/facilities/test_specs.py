"""Every shipped spec under torch's machinery: opcheck, a cold compile for all lengths, saved programs in a new process.

Lengths are held out: none of them is a multiple of a block.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from llsa_gen import compile

SPECS = sorted((Path(__file__).resolve().parents[2] / "spec").glob("*.yaml"), key=lambda path: path.stem)
NAMES = [path.stem for path in SPECS]
QUERIES, KEYS, GLOBALS = 45, 83, 3


def attention_of(name: str) -> Any:
    return compile(SPECS[NAMES.index(name)])


def draw(attention: Any, *lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, n, attention.spec.head_dim, generator=generator).requires_grad_() for n in lengths]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_there_are_specs() -> None:
    assert len(NAMES) >= 9


@pytest.mark.parametrize("name", NAMES)
def test_its_operators_pass_torchs_checks(name: str) -> None:
    attention = attention_of(name)
    q, k, v, k_global, v_global = draw(attention, QUERIES, KEYS, KEYS, GLOBALS, GLOBALS)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    kept, scale = list(attention.select(q.detach(), k.detach())), 0.3
    torch.library.opcheck(attention.operator, (q, k, v, scale, k_global, v_global, mask, kept))
    with torch.no_grad():
        plain = [x.detach() for x in (q, k, v)]
        o, lse, saved = attention.operator(*plain, scale)
        backward, select = (
            getattr(torch.ops.llsa, attention.module.OPERATOR + suffix).default for suffix in ("_backward", "_select")
        )
        torch.library.opcheck(backward, (torch.randn_like(o), torch.randn_like(lse), *plain, o, saved, scale))
        torch.library.opcheck(select, tuple(plain[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_cold_for_all_lengths(name: str, fresh_dynamo: None) -> None:
    attention = attention_of(name)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((QUERIES, KEYS, KEYS), (301, 77, 77)):
            leaves = draw(attention, *lengths)
            pairs = []
            for run in (compiled, attention):
                o, lse = run(*leaves, return_lse=True)
                pairs.append([o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), leaves)])
            for found, wanted in zip(*pairs, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---- saved programs ---------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attention(q, k, v, return_lse=True)


PROGRAM = """
import importlib, pathlib, sys, torch
for path in sorted(pathlib.Path("nets").glob("*.py")):
    importlib.import_module("nets." + path.stem)
for path in sorted(pathlib.Path("programs").glob("*.pt2")):
    inputs, wanted = torch.load("inputs/" + path.stem.split("-")[0] + ".pt")
    found = torch.export.load(path).module()(*inputs)
    print(path.stem, all(map(torch.equal, found, wanted)))
assert "llsa_gen" not in sys.modules
"""


@pytest.mark.slow
def test_saved_programs_run_in_a_new_process(tmp_path: Path) -> None:
    """Without llsa_gen, after the imports of the README. One test, for a process takes a while to start."""
    for name in ("nets", "programs", "inputs"):
        (tmp_path / name).mkdir()
    m, n = torch.export.Dim("m", min=2), torch.export.Dim("n", min=2)
    for name in NAMES:
        attention = attention_of(name)
        (tmp_path / "nets" / f"{name}.py").write_text(attention.source)
        example = tuple(x.detach() for x in draw(attention, QUERIES, KEYS, KEYS))
        for strict in (True, False)[: 1 + (name == NAMES[-1])]:
            shapes = {"q": {2: m}, "k": {2: n}, "v": {2: n}}
            program = torch.export.export(Attend(attention), example, dynamic_shapes=shapes, strict=strict)
            torch.export.save(program, tmp_path / "programs" / f"{name}-{'strict' if strict else 'not_strict'}.pt2")
        others = [x.detach() for x in draw(attention, 301, 77, 77, seed=1)]
        torch.save((others, attention(*others, return_lse=True)), tmp_path / "inputs" / f"{name}.pt")
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    programs = sorted([*(f"{name}-strict" for name in NAMES), f"{NAMES[-1]}-not_strict"])
    assert sorted(result.stdout.splitlines()) == [f"{program} True" for program in programs]
