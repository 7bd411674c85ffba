"""The demo: it prints its figures and draws its picture, and fails when it should."""

import re
from pathlib import Path
from types import SimpleNamespace

import demo
import pytest
from matplotlib import image
from typer.testing import CliRunner

import llsa_gen
from llsa_gen.look import drawing

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner().invoke(demo.app, ["--spec", str(ROOT / "spec" / "llsa_l2.yaml"), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch):
    """Makes the demo run an operator whose output or whose kept tokens went through a function."""

    def alter(output=lambda o: o, kept=lambda kept: kept) -> None:
        right = llsa_gen.compile(ROOT / "spec" / "llsa_l2.yaml")

        class Wrong(SimpleNamespace):
            def __call__(self, q, k, v):
                return output(right(q, k, v))

        wrong = Wrong(source=right.source, path=right.path, select=lambda q, k: kept(right.select(q, k)))
        monkeypatch.setattr(llsa_gen, "compile", lambda spec: wrong)

    return alter


# ---- the command -------------------------------------------------------------------------------------------------


def test_prints_its_figures_and_writes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    code, output = run("--size", "32", "--out", str(out))
    assert code == 0, output
    error = re.search(r"error +(\S+)  .*allowed: (\S+)", output)
    assert error and 0 < float(error[1]) < float(error[2]) == 1e-5
    seconds = re.search(r"time +(\S+) s .* dense attention, (\S+) s", output)
    assert seconds and all(float(time) >= 0 for time in seconds.groups())
    decibels = re.search(r"denoised +(\S+) dB  from (\S+) dB", output)
    assert decibels and float(decibels[1]) > float(decibels[2]) + 1  # attention does denoise
    assert re.search(r"keys +196  a query instead of 1,024: 128 pixels \+ 64 of level 1 \+ 4 of level 2", output)
    assert re.search(r"cost +\d+\.\d  GFLOP forward; dense attention \d+\.\d", output)
    assert re.search(r"selection +right", output)

    pixels = image.imread(out)
    assert pixels.shape[1:] == (drawing.WIDTH, 4)
    assert pixels[0, 0, 3] == 0  # outside the card's round corner
    assert pixels[30, 30, 3] == 1
    panels = pixels[drawing.HEAD : -drawing.FOOT, drawing.MARGIN : -drawing.MARGIN, :3]
    assert len({tuple(colour) for colour in panels.reshape(-1, 3)}) > 500  # a photograph, not a plain area


def test_a_wrong_output_fails(tmp_path: Path, altered) -> None:
    altered(output=lambda o: o * 1.0001)
    code, output = run("--size", "32", "--out", str(tmp_path / "demo.png"))
    assert code == 1
    assert re.search(r"error +1.0e-04 ", output)


def test_a_wrong_selection_fails(tmp_path: Path, altered) -> None:
    altered(kept=lambda kept: (kept[0].roll(1, dims=2), *kept[1:]))
    code, output = run("--size", "32", "--out", str(tmp_path / "demo.png"))
    assert code == 1
    assert "WRONG" in output


@pytest.mark.parametrize("size", [1, 15, 37])
def test_any_size_will_do(size: int, tmp_path: Path) -> None:
    code, output = run("--size", str(size), "--out", str(tmp_path / "demo.png"))
    assert code == 0, output
    assert f"{size}×{size} pixels = {size**2:,} tokens" in output


def test_a_missing_spec_is_one_clear_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.app, ["--spec", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "none.yaml" in result.output
    assert "Traceback" not in result.output
