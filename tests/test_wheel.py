"""The wheel as a stranger gets it: pure Python, everything inside, and working where no checkout is."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

SPEC = """\
name: from_a_wheel
head_dim: 24
levels:
  - {block: 4, topk: 2}
  - {block: 3, topk: 2}
"""

# Prints what the test looks at; lies in a folder that holds nothing else.
PROGRAM = """\
import torch, llsa_gen

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 101, 24).unbind(0)
attention = llsa_gen.compile("from_a_wheel.yaml")
wanted = llsa_gen.reference.attention(attention.spec, q, k, v, indices=attention.select(q, k))
error = (attention(q, k, v).double() - wanted).norm() / wanted.norm()
print(llsa_gen.__file__, attention.path, llsa_gen.__version__, float(error), sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs `command` away from the checkout, with no PYTHON* or LLSA_GEN* variable but those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLSA_GEN"))}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout with the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a new virtual environment with the wheel installed and no way back to the checkout.

    Torch and the other dependencies are not installed again: a .pth file puts the folder in which this test found them
    behind the environment's own. The interpreter reads no .pth file in a folder reached so, hence the checkout, which
    an editable install names in one, stays out of sight.
    """
    home = tmp_path_factory.mktemp("stranger")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    # Installed before the .pth file is there: pip must not find, and want to replace, the editable install.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    paths = [Path(line) for line in run(python, "-c", "import sys; print(*sys.path, sep='\\n')", cwd=home).splitlines()]
    (own,) = (path for path in paths if path.name == "site-packages")
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "borrowed_dependencies.pth").write_text("\n".join(borrowed) + "\n")
    return home / "bin"


def test_wheel_is_pure_and_complete(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert "Root-Is-Purelib: true" in metadata

    package = ROOT / "llsa_gen"
    expected = {"llsa_gen/py.typed"}
    expected |= {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (package / "schedule" / "tables").glob("*.json")}
    expected |= {str(path.relative_to(ROOT)) for path in (package / "runtime").glob("*.c")}
    expected |= {f"llsa_gen/{path.relative_to(ROOT)}" for path in (ROOT / "templates").rglob("*.j2")}
    assert any(name.endswith(".json") for name in expected)
    assert any(name.endswith(".j2") for name in expected)
    assert expected <= names
    strays = {name for name in names - expected if ".dist-info/" not in name}
    assert not strays, "the wheel carries files that it does not need"


def test_wheel_compiles_a_spec_in_an_empty_environment(stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "from_a_wheel.yaml").write_text(SPEC)
    (tmp_path / "program.py").write_text(PROGRAM)
    cache = tmp_path / "cache"
    output = run(stranger / "python", "program.py", cwd=tmp_path, LLSA_GEN_CACHE_DIR=str(cache))
    package, module, version, error = output.splitlines()[-4:]
    assert Path(package).is_relative_to(stranger.parent)
    assert Path(module).is_relative_to(cache)
    assert version == "0.1.0"
    assert float(error) < 1e-5  # float32's tolerance


def test_wheel_brings_the_command(stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "from_a_wheel.yaml").write_text(SPEC)
    cache = tmp_path / "cache"
    run(stranger / "llsa-gen", "build", "from_a_wheel.yaml", cwd=tmp_path, LLSA_GEN_CACHE_DIR=str(cache))
    assert any(cache.rglob("*.py"))
