"""Golden: `generated/` holds the module of every spec in `spec/`, so that a change to a template shows in review.

`python -m llsa_gen.golden` writes it, `--check` only says what differs. Modules are rendered here and now and do not
come from the store: what is committed is what the templates beside it say.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

from llsa_gen import emit
from llsa_gen.errors import LlsaGenError
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
from llsa_gen.spec import load

__all__ = ["check", "main", "modules", "write"]

ROOT = Path(__file__).resolve().parents[1]
SPECS, GENERATED = ROOT / "spec", ROOT / "generated"
ACCEPT = "make golden"
SHOWN_LINES = 20


def modules(specs: Path = SPECS) -> dict[str, str]:
    """{file name: text} of the module of every spec in a folder. Raises LlsaGenError where there is none."""
    paths = sorted(specs.glob("*.yaml"))
    if not paths:
        raise LlsaGenError(f"{specs}: expected a folder with spec files, got none; this works in a checkout only")
    texts: dict[str, str] = {}
    for path in paths:
        spec = load(path)
        if spec.name != path.stem:
            raise LlsaGenError(f"{path}: expected the name {path.stem}, like the file, got {spec.name}")
        plan = lower(spec)
        texts[f"{spec.name}.py"] = emit.render(plan, schedules(plan))
    return texts


def check(texts: Mapping[str, str], folder: Path = GENERATED) -> list[str]:
    """One text for each file in `folder` that is not as in `texts`: missing, stale or, with a diff, different."""
    there = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    found = [f"{name}: missing" for name in texts if name not in there]
    found += [f"{name}: stale, no spec has this name" for name in there if name not in texts]
    for name, text in texts.items():
        if name in there and there[name] != text:
            found.append(f"{name}: differs\n{_diff(there[name], text)}")
    return found


def _diff(old: str, new: str) -> str:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "generated", "emitted", n=1, lineterm=""))
    more = len(lines) - SHOWN_LINES
    return "\n".join([*lines[:SHOWN_LINES], *([f"... and {more} lines more"] if more > 0 else [])])


def write(texts: Mapping[str, str], folder: Path = GENERATED) -> list[str]:
    """Make the modules in `folder` those in `texts`, and say what changed."""
    folder.mkdir(exist_ok=True)
    changed = []
    for path in sorted(folder.glob("*.py")):
        if path.name not in texts:
            path.unlink()
            changed.append(f"{path.name}: removed")
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(f"{name}: written")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where `--check` finds a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m llsa_gen.golden", description="Emit generated/ from spec/ and templates/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs and exit with 1 if any")
    options = parser.parse_args(arguments)
    try:
        texts = modules(SPECS)
    except LlsaGenError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.check:
        changed = write(texts, GENERATED)
        print("\n".join(changed) or f"{GENERATED}: {len(texts)} modules, all as they were")
        return 0
    found = check(texts, GENERATED)
    print("\n".join([*found, f"accept with: {ACCEPT}"] if found else [f"{len(texts)} modules are as emitted"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
