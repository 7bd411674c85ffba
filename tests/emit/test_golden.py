"""`generated/` is what the templates say, and the tool that keeps it so does what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llsa_gen.emit import golden
from llsa_gen.emit import module as emission
from llsa_gen.errors import LlsaGenError
from llsa_gen.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"one.py": "a\nb\n", "two.py": "c\n"}  # files of the folder


@pytest.fixture(scope="module")
def emitted() -> dict[str, str]:
    return golden.modules()


def test_generated_is_what_the_templates_say(emitted: dict[str, str]) -> None:
    found = golden.check(golden.files(emitted))
    assert not found, "\n".join([*found, f"if that is what you want: {golden.ACCEPT}"])


def test_there_is_a_module_for_every_spec(emitted: dict[str, str]) -> None:
    assert set(emitted) == {path.stem for path in (ROOT / "spec").glob("*.yaml")}
    assert set(golden.READ) < set(emitted)


def test_a_module_is_held_whole_or_by_its_digest(emitted: dict[str, str], tmp_path: Path) -> None:
    files = golden.files(emitted)
    assert set(files) == {"digests.json", *(f"{name}.py" for name in golden.READ)}
    held = json.loads(files["digests.json"])
    assert set(held) | set(golden.READ) == set(emitted)
    golden.write(files, tmp_path)
    for name in held:  # a change of one character shows
        (found,) = golden.check(golden.files(emitted | {name: emitted[name] + " "}), tmp_path)
        assert found.startswith("digests.json: differs") and f'-  "{name}"' in found


def test_what_is_written_passes_the_check(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    assert golden.check(TEXTS, folder) == ["one.py: missing", "two.py: missing"]
    assert golden.write(TEXTS, folder) == ["one.py: written", "two.py: written"]
    assert golden.check(TEXTS, folder) == []
    assert golden.write(TEXTS, folder) == []


def test_a_difference_is_shown_and_a_long_one_cut(tmp_path: Path) -> None:
    golden.write(TEXTS, tmp_path)
    (tmp_path / "one.py").write_text("a\nx\n")
    (found,) = golden.check(TEXTS, tmp_path)
    assert found.startswith("one.py: differs\n--- generated\n+++ emitted\n")
    assert found.endswith("\n a\n-x\n+b")
    (found,) = golden.check(TEXTS | {"one.py": "\n".join(map(str, range(1000)))}, tmp_path)
    assert len(found.splitlines()) == golden.SHOWN_LINES + 2
    assert found.endswith("lines more")


def test_stale_modules_go_and_other_files_stay(tmp_path: Path) -> None:
    golden.write(TEXTS, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    del (fewer := dict(TEXTS))["two.py"]
    assert golden.check(fewer, tmp_path) == ["two.py: stale, no spec has this name"]
    assert golden.write(fewer, tmp_path) == ["two.py: removed"]
    assert {path.name for path in tmp_path.iterdir()} == {"one.py", "README.md"}


def test_a_spec_is_in_the_file_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "right.yaml").write_text(Spec.model_validate(MINIMAL | {"name": "wrong"}).to_yaml())
    with pytest.raises(LlsaGenError, match=r"right\.yaml: expected the name right, like the file, got wrong"):
        golden.modules(tmp_path)


def test_without_specs_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LlsaGenError, match="expected a folder with spec files, got none"):
        golden.modules(tmp_path)


MINIMAL = {"name": "x", "head_dim": 8, "levels": [{"block": 2, "topk": 1}]}


def test_the_command_line_checks_writes_and_checks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = tmp_path / "spec"
    specs.mkdir()
    (specs / "x.yaml").write_text(Spec.model_validate(MINIMAL).to_yaml())
    monkeypatch.setattr(golden, "SPECS", specs)
    monkeypatch.setattr(golden, "READ", ("x",))
    monkeypatch.setattr(golden, "GENERATED", tmp_path / "generated")
    assert golden.main(["--check"]) == 1
    assert capsys.readouterr().out == "x.py: missing\ndigests.json: missing\naccept with: make golden\n"
    assert golden.main([]) == 0
    assert golden.main(["--check"]) == 0
    assert capsys.readouterr().out == "x.py: written\ndigests.json: written\n1 modules are as emitted\n"
    monkeypatch.setattr(emission, "generator_version", lambda: "another")
    assert golden.main(["--check"]) == 1
    assert "+Made by llsa_gen another" in capsys.readouterr().out


def test_it_runs_as_make_runs_it(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "llsa_gen.emit.golden", "--check"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) in ((0, ""), (1, ""))
    assert ("accept with" in result.stdout) == bool(result.returncode)
