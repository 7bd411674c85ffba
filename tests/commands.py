"""Commands of the command line, in this process or in one of their own, where there is a spec and an empty store."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llsa_gen import compiler
from llsa_gen.cli import app

ROOT = Path(__file__).resolve().parents[1]

SPEC = """\
name: tiny
head_dim: 8
levels:
  - {block: 4, topk: 2}
  - {block: 2, topk: 1}
"""


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a spec in ./spec and a store of its own."""
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "tiny.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLSA_GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_compiled", {})
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path


def call(command: str | Sequence[str], answer: str | None = None) -> Result:
    """A command in this process, as it is typed or in words."""
    words = shlex.split(command) if isinstance(command, str) else command
    result = CliRunner().invoke(app, words, input=answer, prog_name="llsa-gen")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def real(command: str, **environment: str) -> Result:
    """A command in a process of its own."""
    python = [sys.executable, "-m", "llsa_gen", *shlex.split(command)]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    result = subprocess.run(
        python, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True, timeout=600
    )
    return Result(result.returncode, result.stdout, result.stderr)
