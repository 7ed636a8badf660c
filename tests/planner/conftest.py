"""What the planner's tests share: the folder of fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def planner_data(repository: Path) -> Path:
    return repository / "tests" / "data" / "planner"
