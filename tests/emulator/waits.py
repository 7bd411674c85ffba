"""Work on its way, in groups that each thread, or each program, commits and waits for on its own."""

from typing import Generic, TypeVar

import numpy as np

from emulator.operations import Array

Work = TypeVar("Work")


class Groups(Generic[Work]):
    """Pieces of work of several members at once: threads whose copies, or programs whose products are on their way."""

    def __init__(self, members: int) -> None:
        self._committed = np.zeros(members, np.int64)
        """How many groups each has committed."""
        self._jobs: list[tuple[Work, Array, Array]] = []
        """What, whose it still is, and in which group of each; -1 in none yet."""

    def begin(self, work: Work, members: Array) -> None:
        """`work` is on its way for the members of this mask."""
        self._jobs.append((work, members.copy(), np.full(members.shape, -1)))

    def commit(self, members: Array) -> None:
        """All that these have begun is a group of theirs."""
        for _, whose, group in self._jobs:
            new = whose & members & (group < 0)
            group[new] = self._committed[new]
        self._committed[members] += 1

    def wait(self, left: int, members: Array) -> list[tuple[Work, Array]]:
        """What is no longer on its way once these have but `left` groups left, in order, and for which of them."""
        done = []
        for work, whose, group in self._jobs:
            ready = whose & members & (group >= 0) & (group < self._committed - left)
            if ready.any():
                whose &= ~ready
                done.append((work, ready))
        self._jobs = [job for job in self._jobs if job[1].any()]
        return done

    def on_their_way(self) -> list[tuple[Work, Array]]:
        """All that is, and for whom."""
        return [(work, whose) for work, whose, _ in self._jobs]
