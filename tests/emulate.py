"""Run kernels in Gluon in the emulator, with more specs and lengths than the tests have: `make emulate`.

    .venv/bin/python tests/emulate.py                            # all of them: some minutes, most of it compiles
    .venv/bin/python tests/emulate.py of_96 popular              # some
    .venv/bin/python tests/emulate.py l2 n=300 heads=2 std=8.0   # any case of a spec of tests/examples.py: `fuzz.Case`

With another Triton, laid over by PYTHONPATH as in `tests/versions.py`, it runs what that makes of the same kernels.
"""

import sys
import time
from ast import literal_eval
from typing import Any

import triton
from emulator import passes
from emulator.cases import CASES, MORE, case, module_for
from emulator.errors import EmulatorError

from examples import GLUON
from llsa_gen import fuzz


def chosen(words: list[str]) -> dict[str, fuzz.Case]:
    """The cases that a command line asks for."""
    if not words:
        return MORE
    if words[0] in GLUON and len(words) > 1:
        fields = {name: value(text) for name, _, text in (word.partition("=") for word in words[1:])}
        return {" ".join(words): case(words[0], **fields)}
    return {word: (CASES | MORE)[word] for word in words}


def value(text: str) -> Any:
    """A number, True or None; any other text as it is."""
    try:
        return literal_eval(text)
    except ValueError:
        return text


def main() -> int:
    failed = 0
    for name, one in chosen(sys.argv[1:]).items():
        begin = time.perf_counter()
        try:
            made = passes.check(module_for(one.spec), one)
            said = f"passed: {', '.join(name.removesuffix('_hopper_kernel') for name in made.runs)}"
        except (EmulatorError, AssertionError) as error:
            failed += 1
            said = f"FAILED: {error}\n    {one!r}"
        print(f"triton {triton.__version__}, {name}, {time.perf_counter() - begin:.1f} s: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
