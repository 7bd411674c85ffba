"""What the README shows is what a reader gets: the outputs of commands, and the Python that builds on each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llsa_gen
from llsa_gen.cli import app
from llsa_gen.compiler import Attention

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```\n", README, re.DOTALL)

BAD = """\
# what the README calls bad.yaml
name: bad
levels:
  - {block: 16, topk: 8}
  - {block: 16, topk: eight}
enrichh: all
head_dim: 64
"""


@pytest.mark.parametrize("command", ["explain llsa_l2 -n 65536", "explain bad.yaml -n 4096"])
def test_an_output_is_that_of_the_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = [text.split("\n", 1)[1] for _, text in BLOCKS if text.startswith(f"$ llsa-gen {command}\n")]
    monkeypatch.chdir(ROOT)
    if "bad.yaml" in command:
        monkeypatch.chdir(tmp_path)
        Path("bad.yaml").write_text(BAD)
    result = CliRunner().invoke(app, command.split())
    assert [line.rstrip() for line in result.output.splitlines()] == [line.rstrip() for line in shown.splitlines()]


def test_the_module_is_as_long_as_it_says() -> None:
    lines = (ROOT / "generated" / "llsa_l2.py").read_text(encoding="utf-8").count("\n")
    assert re.findall(r"to a module of ([\d,]+) lines", README) == [f"{lines:,}"]


def save_a_program(attention: Attention) -> None:
    """What the README speaks of: nets/pixels.py and model.pt2."""

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return attention(q, q, q)  # type: ignore[return-value]

    Path("nets").mkdir()
    Path("nets/pixels.py").write_text(attention.source)
    torch.export.save(torch.export.export(Model(), (torch.randn(1, 1, 40, 32),)), "model.pt2")


def test_the_python_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (spec,) = [text for language, text in BLOCKS if language == "yaml"]
    Path("pixels.yaml").write_text(spec)
    save_a_program(llsa_gen.compile("pixels.yaml"))
    monkeypatch.syspath_prepend(tmp_path)
    scripts = [text for language, text in BLOCKS if language == "python"]
    assert len(scripts) >= 3
    for script in scripts:
        exec(compile(script, "README.md", "exec"), {})


def program(heading: str) -> str:
    """The one program of a section."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    (text,) = re.findall(r"```python\n(.*?)```\n", section, re.DOTALL)
    return text


def run_program(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the names of a section's program are in the end."""
    monkeypatch.chdir(folder)
    Path("pixels.yaml").write_text(next(text for language, text in BLOCKS if language == "yaml"))
    names: dict[str, Any] = {}
    exec(compile(program(heading), "README.md", "exec"), names)
    return names


def test_text_and_image_are_one_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program("Text and image in one sequence").count("\n") <= 25
    names = run_program("Text and image in one sequence", tmp_path, monkeypatch)
    layer, text, image = (names[name] for name in ("layer", "text", "image"))
    assert names["of_text"].shape == text.shape and names["of_image"].shape == image.shape
    assert all(x.grad is not None and x.grad.isfinite().all() for x in layer.parameters())
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    before = layer(text, image, mask)
    padding = text.masked_fill(~mask[..., None], float("nan"))  # may hold anything
    assert all(map(torch.equal, before, layer(padding, image, mask)))
    assert torch.equal(before[0][1, 7:], layer.out.bias.expand(13, -1)), "its own row of o is 0"
    text[1, 3] += 1.0
    assert all((x != y).any(-1)[1, :7].all() for x, y in zip(before, layer(text, image, mask), strict=True))


def test_class_tokens_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program("Class tokens").count("\n") <= 25
    names = run_program("Class tokens", tmp_path, monkeypatch)
    layer = names["layer"]
    assert names["x"].shape == (2, 5 + 1024, 128)
    assert all(x.grad is not None and x.grad.any() for x in layer.parameters())
    patches = torch.randn(1, 1024, 128)
    before = layer(patches)
    patches[0, 700] += 1.0
    assert (layer(patches) != before).any(-1)[0, :5].all(), "every one of them sees every patch"


def test_a_selection_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_program("A selection used again", tmp_path, monkeypatch)
    assert torch.equal(names["o"], names["attention"](names["q"], names["k"], names["v"]))
    assert not torch.equal(names["o"], names["later"])


def test_three_lines_move_a_model_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = "llsa_gen.integrations.crossing.measured"
    monkeypatch.setattr(measured, lambda *_: 512)
    names = run_program("Models of transformers", tmp_path, monkeypatch)
    model = names["model"]
    assert model.config._attn_implementation == "sdpa", "restored"
    names["llsa"].use(model, "pixels.yaml")
    model(torch.randn(1, 3, 128, 128))
    counts = names["llsa"].report(model, quality=True)
    assert counts.sparse == 2 and all(row.quality is not None and 0 < row.quality.mass < 1 for row in counts.rows)
    assert all(x.grad is not None for name, x in model.named_parameters() if "pooler" not in name)


def test_a_model_of_diffusers_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_program("Models of diffusers", tmp_path, monkeypatch)
    assert not any("_llsa_gen" in module.__dict__ for module in names["model"].modules())
    (shown,) = [text for language, text in BLOCKS if language == "text" and text.startswith("layer ")]
    printed = capsys.readouterr().out.splitlines()
    for line, wanted in zip(printed, shown.splitlines(), strict=False):
        figures = r"\d+\.\d+%|0\.\d+"  # weights are random
        assert re.sub(figures, "", line).split() == re.sub(figures, "", wanted).split()


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
