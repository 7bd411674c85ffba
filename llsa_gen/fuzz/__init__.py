"""The fuzzer: drawn inputs, the bounds that results have to keep, and the search for a small case that breaks one."""

from llsa_gen.fuzz.case import Case, DType, Kept, Values, cases, on_interpreter, specs
from llsa_gen.fuzz.search import Outcome, Report, attend, check, compare, poisoned_memory, reproducer, run, same_bits

__all__ = [
    "Case",
    "DType",
    "Kept",
    "Outcome",
    "Report",
    "Values",
    "attend",
    "cases",
    "check",
    "compare",
    "on_interpreter",
    "poisoned_memory",
    "reproducer",
    "run",
    "same_bits",
    "specs",
]
