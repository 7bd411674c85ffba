"""What these tests run in: `place`, a working directory with a spec and a store of its own, and little time."""

import pytest
from commands import place as place

from llsa_gen.bench import timing


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repeats, and a small buffer to drive the caches out with."""
    monkeypatch.setattr(timing, "BUDGET_MS", 5.0)
    monkeypatch.setattr(timing, "CPU_CACHE_BYTES", 1 << 10)
