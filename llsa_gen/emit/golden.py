"""Golden: `generated/` shows in review what a change to a template does to the module of every spec in `spec/`.

Three modules are whole, for people to read; of the others `digests.json` holds a hash, which tells that one changed.
`python -m llsa_gen.emit.golden` writes all of it, `--check` only says what differs. Modules are rendered here and now
and do not come from the store: what is committed is what the templates beside it say.
"""

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from llsa_gen.emit.module import render
from llsa_gen.errors import LlsaGenError
from llsa_gen.plan import lower
from llsa_gen.schedule import schedules
from llsa_gen.spec import load

__all__ = ["READ", "check", "files", "main", "modules", "write"]

ROOT = Path(__file__).resolve().parents[2]
SPECS, GENERATED = ROOT / "spec", ROOT / "generated"
READ = ("llsa_l2", "topk_b128", "uneven")
"""The specs whose modules are whole: the usual case, blocks of 128 alone, and sizes of which none is a power of two."""

DIGESTS = "digests.json"
ACCEPT = "make golden"
SHOWN_LINES = 20


def modules(specs: Path = SPECS) -> dict[str, str]:
    """{name: text} of the module of every spec in a folder. Raises LlsaGenError where there is none."""
    paths = sorted(specs.glob("*.yaml"))
    if not paths:
        raise LlsaGenError(f"{specs}: expected a folder with spec files, got none; this works in a checkout only")
    texts: dict[str, str] = {}
    for path in paths:
        spec = load(path)
        if spec.name != path.stem:
            raise LlsaGenError(f"{path}: expected the name {path.stem}, like the file, got {spec.name}")
        plan = lower(spec)
        texts[spec.name] = render(plan, schedules(plan))
    return texts


def files(texts: Mapping[str, str]) -> dict[str, str]:
    """{file name: content} of the folder for these modules: those of `READ`, and the hashes of the others."""
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items() if name not in READ}
    found = {f"{name}.py": text for name, text in texts.items() if name in READ}
    return found | {DIGESTS: json.dumps(digests, indent=2, sort_keys=True) + "\n"}


def check(wanted: Mapping[str, str], folder: Path = GENERATED) -> list[str]:
    """One text for each file in `folder` that is not as in `wanted`: missing, stale or, with a diff, different."""
    there = _there(folder)
    found = [f"{name}: missing" for name in wanted if name not in there]
    found += [f"{name}: stale, no spec has this name" for name in there if name not in wanted]
    for name, text in wanted.items():
        if name in there and there[name] != text:
            found.append(f"{name}: differs\n{_diff(there[name], text)}")
    return found


def _there(folder: Path) -> dict[str, str]:
    """The files of the folder that are ours."""
    paths = sorted([*folder.glob("*.py"), *folder.glob(DIGESTS)])
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def _diff(old: str, new: str) -> str:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "generated", "emitted", n=1, lineterm=""))
    more = len(lines) - SHOWN_LINES
    return "\n".join([*lines[:SHOWN_LINES], *([f"... and {more} lines more"] if more > 0 else [])])


def write(wanted: Mapping[str, str], folder: Path = GENERATED) -> list[str]:
    """Make the files in `folder` those of `wanted`, and say what changed."""
    folder.mkdir(exist_ok=True)
    there, changed = _there(folder), []
    for name in there:
        if name not in wanted:
            (folder / name).unlink()
            changed.append(f"{name}: removed")
    for name, text in wanted.items():
        if there.get(name) != text:
            (folder / name).write_text(text, encoding="utf-8")
            changed.append(f"{name}: written")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where `--check` finds a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m llsa_gen.emit.golden", description="Emit generated/ from spec/ and templates/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs and exit with 1 if any")
    options = parser.parse_args(arguments)
    try:
        texts = modules(SPECS)
    except LlsaGenError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.check:
        changed = write(files(texts), GENERATED)
        print("\n".join(changed) or f"{GENERATED}: {len(texts)} modules, all as they were")
        return 0
    found = check(files(texts), GENERATED)
    print("\n".join([*found, f"accept with: {ACCEPT}"] if found else [f"{len(texts)} modules are as emitted"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
