"""How many rows of a matrix meet in the same banks of shared memory where a kernel reads it with `ldmatrix`: from PTX.

The addresses of such a read depend on the thread alone: they are worked out here, for the threads of the first warp, by
following the integer instructions that lead to them. Eight lanes at a time read 16 bytes each; they take as many steps
as there are different addresses in the most popular of the eight groups of banks.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable

WORD = 0xFFFFFFFF

OPERATIONS: dict[str, Callable[..., int]] = {
    "mov": lambda a: a,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "shl": lambda a, bits: a << bits & WORD,
    "shr": lambda a, bits: (a & WORD) >> bits,
    "mad": lambda a, b, c: a * b + c,
    "bfe": lambda a, first, bits: (a & WORD) >> first & (1 << bits) - 1,
    "selp": lambda a, b, chosen: a if chosen else b,
    "setp.eq": operator.eq,
    "setp.ne": operator.ne,
    "setp.lt": operator.lt,
    "setp.gt": operator.gt,
}


def steps(ptx: str) -> list[int]:
    """The steps that each `ldmatrix` of a kernel takes for eight rows, in order: 1 where no two meet."""
    made = {}
    for line in ptx.splitlines():
        if found := re.match(r"\s*(?:@%p\d+ )?([a-z][\w.:]*)\s+(%[a-z]+\d+),\s*(.*);", line):
            made.setdefault(found[2], (found[1], [word.strip() for word in found[3].split(",")]))

    def value(word: str, thread: int, known: dict[str, int]) -> int:
        if re.fullmatch(r"-?\d+", word):
            return int(word)
        if word.startswith("%tid.x"):
            return thread
        if not word.startswith("%"):
            return 0  # where shared memory begins
        if word not in known:
            name, words = made[word]
            base = ".".join(name.split(".")[:2]) if name.startswith("setp") else name.split(".")[0]
            known[word] = OPERATIONS[base](*(value(word, thread, known) for word in words))
        return known[word]

    result = []
    for found in re.finditer(r"ldmatrix\S*[^\[]*\[(%r\d+)(?:\+(\d+))?\]", ptx):
        rows = [value(found[1], thread, {}) + int(found[2] or 0) for thread in range(32)]
        met = [Counter(row // 16 % 8 for row in set(rows[eight : eight + 8])) for eight in range(0, 32, 8)]
        result.append(max(max(groups.values()) for groups in met))
    return result
