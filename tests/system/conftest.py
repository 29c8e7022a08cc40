"""What whole machines are tested with: a C compiler, where there is one.

A test asks for it by taking the fixture `gcc`. Without a compiler such tests are deselected, and the summary
names each of them with the line that installs one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import lacking

INSTALL = "apt-get install gcc libc6-dev"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a C compiler if there is none."""
    if shutil.which("gcc") is None:
        needing = [item for item in items if "gcc" in getattr(item, "fixturenames", ())]
        lacking.deselect(config, items, dict.fromkeys(needing, f"no C compiler ({INSTALL})"))


@pytest.fixture(scope="session")
def gcc() -> Path:
    """The C compiler."""
    found = shutil.which("gcc")
    assert found is not None
    return Path(found)
