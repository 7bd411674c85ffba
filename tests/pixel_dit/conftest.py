"""A folder of pictures for every test that wants one."""

from pathlib import Path

import pytest
from tiny_runs import draw_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")
