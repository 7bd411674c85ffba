"""A layer as a package of AOTInductor: compiled to C++, it calls the operator, which a module alone registers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llsa_gen import Level, Spec
from llsa_gen.nn import LLSAttention

pytestmark = pytest.mark.slow  # it calls a C++ compiler

SPEC = Spec(name="packaged", head_dim=8, levels=(Level(block=4, topk=2), Level(block=3, topk=2)))

PROGRAM = """
import sys, torch
if "import" in sys.argv:
    import nets.packaged
run = torch._inductor.aoti_load_package("model.pt2")
for x, wanted in torch.load("inputs.pt"):
    torch.testing.assert_close(run(x), wanted, rtol=1e-5, atol=1e-6)
assert "llsa_gen" not in sys.modules
print("fine")
"""


def test_a_package_runs_at_other_lengths_without_llsa_gen(tmp_path: Path) -> None:
    """By the documented import; without it torch's error names the operator, and so the module to import."""
    torch.manual_seed(0)
    layer = LLSAttention(16, 2, SPEC, qk_norm=True, globals_first=2).requires_grad_(False)
    tokens = torch.export.Dim("n", min=8, max=4096)
    program = torch.export.export(layer, (torch.randn(2, 50, 16),), dynamic_shapes={"x": {1: tokens}})
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(2, n, 16) for n in (50, 77, 8)]
    torch.save([(x, layer(x)) for x in inputs], tmp_path / "inputs.pt")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "packaged.py").write_text(layer.attention.source)
    with_it, without = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        for words in (["import"], [])
    )
    assert with_it.stdout == "fine\n", with_it.stderr
    assert without.returncode != 0 and layer.attention.module.OPERATOR in without.stderr
